package storage

import (
	"testing"

	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

func TestEveryOutputIsKnownToStorage(t *testing.T) {
	s := New(Options{JS: natstest.JetStream(t), Names: topology.Names{}})
	seen := make(map[string]string)
	for _, kind := range jobspec.Outputs() {
		store, err := s.writes(kind)
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			continue
		}
		if keeps := kind == jobspec.OutputFrames || kind == jobspec.OutputObject; keeps != (store != nil) {
			t.Errorf("%s is written to %v", kind, store)
		}
		if store != nil {
			if other := seen[store.Name()]; other != "" {
				t.Errorf("%s and %s are both written to %s", kind, other, store.Name())
			}
			seen[store.Name()] = kind
		}
	}
	for _, kind := range []string{"", "nowhere"} {
		if store, err := s.writes(kind); err == nil {
			t.Errorf("the output %q is written to %v", kind, store)
		}
	}
}
