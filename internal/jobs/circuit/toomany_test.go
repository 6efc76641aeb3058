package circuit

import (
	"testing"
	"time"
)

func TestARefusalIsNewsOncePerAppAndAgainAfterItHasPassed(t *testing.T) {
	var r TooMany
	at := time.Now()
	for i, c := range []struct {
		app   string
		after time.Duration
		want  bool
	}{
		{"a", 0, true}, {"a", time.Minute, false}, {"b", 0, true}, {"a", refusalPassed, false}, {"a", refusalPassed + time.Second, true}, {"a", 0, false},
	} {
		at = at.Add(c.after)
		if got := r.First(c.app, at); got != c.want {
			t.Errorf("%d: of app %s: %t", i, c.app, got)
		}
	}
}
