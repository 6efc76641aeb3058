package storage

import (
	"testing"

	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

func TestEveryOutputIsKnownToStorage(t *testing.T) {
	s := New(Options{JS: natstest.JetStream(t), Names: topology.Names{}})
	fills := map[string]bool{ // a stream or bucket of ours
		jobspec.OutputFrames: true, jobspec.OutputObject: true,
		jobspec.OutputLiveKit: false, jobspec.OutputAgora: false, jobspec.OutputDiscard: false,
	}
	seen := make(map[string]string)
	for _, kind := range jobspec.Outputs() {
		store, err := s.writes(kind)
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			continue
		}
		if ours, listed := fills[kind]; !listed || ours != (store != nil) {
			t.Errorf("%s is written to %v; fills says %v (there: %v)", kind, store, ours, listed)
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
