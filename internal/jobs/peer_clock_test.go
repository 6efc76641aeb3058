package jobs

import (
	"testing"
	"time"
)

func TestAgeOfWhatWasStoredGoesByTheServersClock(t *testing.T) {
	here, server := time.Unix(1000, 0), time.Unix(500_000, 0) // the same moment
	now := here.Add(time.Minute)                              // we were away since
	clock := serverClock{stored: server, seen: here}
	for name, c := range map[string]struct{ stored, want time.Time }{
		"before":               {server.Add(-10 * time.Second), here.Add(-10 * time.Second)},
		"while we were away":   {server.Add(50 * time.Second), here.Add(50 * time.Second)},
		"by another server":    {server.Add(time.Hour), now},
		"at the same moment":   {server, here},
		"just now":             {server.Add(time.Minute), now},
		"long before we began": {server.Add(-time.Hour), here.Add(-time.Hour)},
	} {
		if got := clock.seenAt(c.stored, now); !got.Equal(c.want) {
			t.Errorf("%s: %s, want %s", name, got.UTC(), c.want.UTC())
		}
	}
	if got := (serverClock{}).seenAt(server, now); !got.IsZero() {
		t.Errorf("without knowing the server's clock: %s", got)
	}
}
