package pool

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEachItemIsDoneOnceAndAllRunAtTheSameTime(t *testing.T) {
	const n = 200 // more than are kept
	var done [n]atomic.Int32
	type item struct {
		i        int
		together *sync.WaitGroup
	}
	p := New(func(it item) {
		it.together.Done()
		it.together.Wait() // none waits for another's goroutine
		done[it.i].Add(1)
	})
	for range 3 {
		together := new(sync.WaitGroup)
		together.Add(n)
		for i := range n {
			p.Start(item{i, together})
		}
		together.Wait()
	}
	p.Close()
	for i := range done {
		if got := done[i].Load(); got != 3 {
			t.Errorf("item %d was done %d times, want 3", i, got)
		}
	}
}

func TestSomeGoroutinesAreKeptForReuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		proceed := make(chan struct{})
		p := New(func(int) { <-proceed })
		for range 2 {
			for i := range 3 * maxIdle {
				p.Start(i)
			}
			for range 3 * maxIdle {
				proceed <- struct{}{}
			}
			synctest.Wait()
			if n := p.idle.Load(); n != maxIdle {
				t.Errorf("%d goroutines are idle, want %d", n, maxIdle)
			}
		}
		p.Start(0)
		synctest.Wait()
		if n := p.idle.Load(); n != maxIdle-1 {
			t.Errorf("%d goroutines are idle and one works, want %d", n, maxIdle-1)
		}
		close(proceed)
		p.Close()
	})
}
