package streams_test

import (
	"fmt"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/streams"
)

func TestLastReadsTheLastMessageOfEachSubjectHoweverLarge(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.*"}, AllowDirect: true})
	if err != nil {
		t.Fatal(err)
	}
	var subjects []string
	const all = 20
	for i := range all {
		subject := fmt.Sprint("s.", i)
		subjects = append(subjects, subject, fmt.Sprint("s.none", i))
		for _, data := range [][]byte{[]byte("old"), make([]byte, 500_000)} { // one answer can't hold them all
			if _, err := js.Publish(t.Context(), subject, data); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, direct := range []bool{true, false} {
		cfg := stream.CachedInfo().Config
		cfg.AllowDirect = direct
		if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		found, err := streams.NewReader(js, "S").Last(t.Context(), subjects)
		if err != nil || len(found) != all {
			t.Fatalf("direct %t: %d of %d, %v", direct, len(found), all, err)
		}
		for i, msg := range found {
			if msg.Subject != fmt.Sprint("s.", i) || len(msg.Data) != 500_000 {
				t.Errorf("direct %t: %s has %d bytes", direct, msg.Subject, len(msg.Data))
			}
		}
	}
}
