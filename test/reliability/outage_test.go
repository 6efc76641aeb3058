package reliability

import (
	"fmt"
	"net/url"
	"strconv"
	"testing"
	"time"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/test/reliability/invariant"
)

// memoryGrowth is how much a worker may grow while NATS is away.
const memoryGrowth = 64 << 20

func TestWorkersOutliveNATSAndEverythingSettlesWhenItIsBack(t *testing.T) {
	t.Parallel()
	away, total := 15*time.Second, 300
	if long() {
		away, total = time.Minute, 1500
	}
	dir := t.TempDir()
	server := natstest.StartWith(t, natsserver.Options{StoreDir: dir, Port: natstest.Port(t)})
	// All leases end meanwhile. A quarter of one is enough for every worker to find
	// its way back and to write what it had reached.
	f := newFleet(t, server.ClientURL(), 12*time.Second)
	var workers []*process
	for i := range 3 {
		workers = append(workers, f.worker(fmt.Sprintf("w%d", i)))
	}
	published := make(chan struct{})
	go func() {
		defer close(published)
		f.load(t.Context(), total, away/time.Duration(total), func(i int) map[string]any {
			return job(fmt.Sprintf("j-%d", i), "slow-500", 2)
		})
	}()
	f.await("running", 16, running)
	before := memories(t, workers)
	cut := invariant.Fault{Kind: "NATS away", Start: time.Now(), Lasting: true}
	if err := server.Shutdown(); err != nil {
		t.Fatal(err)
	}
	linger(t.Context(), away)
	during := memories(t, workers)
	restart(t, server.ClientURL(), dir)
	cut.End = time.Now().Add(reconnect) // what was on its way lands when the worker is back
	f.fault(cut)
	<-published
	f.settle()
	for i, w := range workers {
		w.alive()
		t.Logf("worker %s: %d MiB before, %d MiB at the end of the outage", w.name, before[i]>>20, during[i]>>20)
		if during[i] > before[i]+memoryGrowth {
			t.Errorf("worker %s grew by %d MiB", w.name, (during[i]-before[i])>>20)
		}
	}
	report, seen := f.check()
	f.writtenLater(cut.Start, seen)
	if report.Outcomes[lifecycle.StateCompleted] != total || report.Crashes != 0 || report.Failures != 0 {
		t.Errorf("want all completed, with no failure and no crash of workers that were alive: %s", report)
	}
}

// restart starts the server again where it was.
func restart(t *testing.T, address, dir string) {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(u.Port())
	if err != nil {
		t.Fatal(err)
	}
	var server *natsserver.Server
	err = insist(func() (err error) {
		server, err = natsserver.Start(natsserver.Options{StoreDir: dir, Port: port})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Shutdown(); err != nil {
			t.Error(err)
		}
	})
}

func memories(t *testing.T, workers []*process) []int64 {
	t.Helper()
	var list []int64
	for _, w := range workers {
		n, err := w.memory()
		if err != nil {
			t.Skipf("memory of a process can't be read here: %v", err)
		}
		list = append(list, n)
	}
	return list
}
