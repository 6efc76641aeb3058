package pace

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// returns are jobs that are looked at, handed back for the delay, and looked at
// again until the test is over.
type returns struct {
	p    *Pace
	look time.Duration // what each look takes
	mu   sync.Mutex
	back map[string][]time.Time // by what they wait for
}

func (w *returns) run(what string, n int, until time.Time) {
	for range n {
		go func() {
			for time.Now().Before(until) {
				began := time.Now()
				time.Sleep(w.look)                                  //nolint:forbidigo // fake clock
				time.Sleep(w.p.Next(what, began, time.Millisecond)) //nolint:forbidigo // fake clock
				w.mu.Lock()
				w.back[what] = append(w.back[what], time.Now())
				w.mu.Unlock()
			}
		}()
	}
}

// between counts the returns in [from, to).
func (w *returns) between(what string, from, to time.Time) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, at := range w.back[what] {
		if !at.Before(from) && at.Before(to) {
			n++
		}
	}
	return n
}

func TestReturnsStayWithinTheRate(t *testing.T) {
	for _, tc := range []struct {
		slots, peers, waiting int
		causes                int
		look                  time.Duration
		rate                  float64 // returns a second, for the worker
	}{
		{slots: 1, peers: 1, waiting: 1000, causes: 1, rate: 50},
		{slots: 1, peers: 10, waiting: 300, causes: 1, rate: 5},
		{slots: 100, peers: 1, waiting: 5000, causes: 1, rate: 400},
		{slots: 1000, peers: 4, waiting: 3000, causes: 1, rate: 250},
		{slots: 1, peers: 500, waiting: 50, causes: 1, rate: 2},
		{slots: 1, peers: 1, waiting: 900, causes: 3, rate: 50},
		// A quarter of four slots, busy for 100 ms with each job: ten a second.
		{slots: 4, peers: 1, waiting: 400, causes: 1, look: 100 * time.Millisecond, rate: 10},
		{slots: 1, peers: 1, waiting: 30, causes: 1, look: time.Second, rate: 1},
	} {
		t.Run(fmt.Sprintf("%+v", tc), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(1, 2))
				p := New(tc.slots, func() int { return tc.peers }, rnd.Float64)
				w := &returns{p: p, look: tc.look, back: make(map[string][]time.Time)}
				// Long enough that every job has gone round at least once.
				settle := time.Duration(2 * float64(tc.waiting) / tc.rate * float64(time.Second))
				from := time.Now().Add(settle)
				until := from.Add(60 * time.Second)
				for i := range tc.causes {
					w.run(fmt.Sprint("cause", i), tc.waiting/tc.causes, until)
				}
				time.Sleep(time.Until(until)) //nolint:forbidigo // fake clock
				const window = 10 * time.Second
				for at := from; at.Before(until); at = at.Add(window) {
					n := 0
					for i := range tc.causes {
						n += w.between(fmt.Sprint("cause", i), at, at.Add(window))
					}
					got := float64(n) / window.Seconds()
					// The random part shortens a delay by a quarter at most.
					if got > tc.rate/0.75*1.1 || got < tc.rate/2 {
						t.Errorf("%.1f a second, want about %.0f", got, tc.rate)
					}
				}
				time.Sleep(time.Hour) //nolint:forbidigo // fake clock: for all to end
			})
		})
	}
}

func TestFewThatWaitAreNotKeptAwayByACrowdThatWaitsForSomethingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(1, func() int { return 1 }, func() float64 { return 1 })
		for range 10_000 {
			p.Next("crowd", time.Now(), 0)
		}
		if d := p.Next("crowd", time.Now(), 0); d < 3*time.Minute {
			t.Errorf("one more of the crowd comes back after %s", d)
		}
		if d := p.Next("few", time.Now(), 0); d > 100*time.Millisecond {
			t.Errorf("the first of the few comes back after %s", d)
		}
		if d := p.Next("few", time.Now(), 0); d > 200*time.Millisecond {
			t.Errorf("the second of the few comes back after %s", d)
		}
	})
}

func TestDelayIsAtLeastWhatWasAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(1, func() int { return 1 }, func() float64 { return 0 })
		for i := range 100 {
			if d := p.Next("limit", time.Now(), 5*time.Second); d < 5*time.Second {
				t.Fatalf("job %d comes back after %s", i, d)
			}
		}
	})
}

func TestJobsThatCameBackAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(1, func() int { return 1 }, func() float64 { return 0 })
		for range 1000 {
			p.Next("circuit", time.Now(), time.Second)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // fake clock
		if d := p.Next("circuit", time.Now(), 0); d > 20*time.Millisecond {
			t.Errorf("a job that waits alone comes back after %s", d)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // fake clock
		p.Next("other", time.Now(), 0)
		if n := len(p.waiting); n != 1 {
			t.Errorf("%d crowds are remembered", n)
		}
	})
}

func TestSpreadStaysAroundItsDuration(t *testing.T) {
	const d = 10 * time.Second
	for _, tc := range []struct {
		random float64
		want   time.Duration
	}{{0, d / 2}, {0.5, d}, {0.999, 14990 * time.Millisecond}} {
		p := New(1, func() int { return 1 }, func() float64 { return tc.random })
		if got := p.Spread(d); (got - tc.want).Abs() > time.Millisecond {
			t.Errorf("random %v: got %s, want %s", tc.random, got, tc.want)
		}
	}
}
