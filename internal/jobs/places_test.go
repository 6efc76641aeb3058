package jobs_test

import (
	"testing"
	"time"
)

// places hears of busy and free places only.
type places struct {
	quiet
	told chan [2]int
}

func (p places) SlotsBusy(busy, all int) {
	select {
	case p.told <- [2]int{busy, all}:
	default: // only the first is looked at
	}
}

func TestAWorkerWithoutJobsTellsThatItsPlacesAreFree(t *testing.T) {
	h := newHouse(t)
	told := make(chan [2]int, 1)
	h.start(does(nil), func(o *options) { o.Observer, o.Concurrency = places{told: told}, 7 })
	select {
	case got := <-told:
		if got != [2]int{0, 7} {
			t.Errorf("%d of %d places are busy", got[0], got[1])
		}
	case <-time.After(5 * time.Second):
		t.Error("nothing was told")
	}
}
