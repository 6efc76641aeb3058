package jobs_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/fetch"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

// fill publishes n jobs to a queue without waiting for each.
func (h *env) fill(queue string, n int, more ...string) {
	h.t.Helper()
	for i := range n {
		msg := nats.NewMsg(h.names.Jobs(queue))
		msg.Data = []byte(job(fmt.Sprintf("%s-%d", queue, i), append(more, `"output":{"discard":{}}`)...))
		if _, err := h.js.PublishMsgAsync(msg); err != nil {
			h.t.Fatal(err)
		}
	}
	select {
	case <-h.js.PublishAsyncComplete():
	case <-time.After(natstest.Patience):
		h.t.Fatal("not published")
	}
}

func TestStartsFollowTheWeights(t *testing.T) {
	t.Parallel()
	for _, weights := range []map[string]int{{"a": 3, "b": 1}, {"a": 5, "b": 3, "c": 2}} {
		t.Run(fmt.Sprint(weights), func(t *testing.T) {
			var names []string
			var queues []fetch.Queue
			total := 0
			for name, weight := range weights {
				names = append(names, name)
				queues = append(queues, fetch.Queue{Name: name, Weight: weight})
				total += weight
			}
			h := newEnv(t, names...)
			for name := range weights {
				h.fill(name, 1100)
			}
			var mu sync.Mutex
			started := map[string]int{}
			n := 0
			enough := make(chan struct{})
			h.start(runnerFunc(func(_ context.Context, a *jobs.Attempt) error {
				mu.Lock()
				defer mu.Unlock()
				if n++; n <= 1000 {
					started[a.Job.Queue]++
				}
				if n == 1000 {
					close(enough)
				}
				return nil
			}), func(o *options) { o.Queues, o.AckWait = queues, 30*time.Second })
			receive(t, enough, "1,000 starts")
			mu.Lock()
			defer mu.Unlock()
			// The slots are shared exactly by what was fetched; what is under way
			// when the count ends is not in it.
			const slack = 3 * 16
			for name, weight := range weights {
				want := 1000 * float64(weight) / float64(total)
				if got := float64(started[name]); got < want-slack || got > want+slack {
					t.Errorf("queue %s had %v starts of 1,000, want %v", name, got, want)
				}
			}
		})
	}
}

func TestShareOfAnIdleQueuePassesOnAndNoQueueWaitsLong(t *testing.T) {
	h := newEnv(t, "busy", "idle")
	h.fill("busy", 400)
	var mu sync.Mutex
	running, most := 0, 0
	late := make(chan struct{})
	h.start(runnerFunc(func(_ context.Context, a *jobs.Attempt) error {
		if a.Job.Queue == "idle" {
			close(late)
			return nil
		}
		mu.Lock()
		running++
		most = max(most, running)
		mu.Unlock()
		time.Sleep(20 * time.Millisecond) //nolint:forbidigo // a session takes a moment
		mu.Lock()
		running--
		mu.Unlock()
		return nil
	}), func(o *options) { o.Concurrency = 4 })
	h.outcome("busy-40", lifecycle.StateCompleted)
	from := time.Now()
	h.submit("idle", job("wakes"))
	receive(t, late, "job of the other queue")
	if waited := time.Since(from); waited > natstest.Unhurried(10*time.Second) {
		t.Errorf("waited %s", waited)
	}
	h.eventually("all places busy", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return most == 4
	})
}

func TestJobsInBackoffDoNotDelayAHealthyOne(t *testing.T) {
	h := newEnv(t)
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		if a.Job.ID != "healthy" {
			return failure(errors.CodeConnectionClosed, errors.PhaseRuntime)
		}
		return nil
	}), func(o *options) {
		o.Concurrency = 4
		o.Retry.Initial, o.Retry.Max = time.Minute, time.Minute
		o.Random = func() float64 { return 0.999 }
	})
	h.fill("default", 300)
	h.state("default-299", lifecycle.StateRetrying)
	from := time.Now()
	h.submit("default", job("healthy"))
	h.outcome("healthy", lifecycle.StateCompleted)
	if took := time.Since(from); took > natstest.Unhurried(15*time.Second) { // the others wait for a minute
		t.Errorf("took %s", took)
	}
}

func TestEverythingSettlesAfterNATSWasRestarted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	server, err := natsserver.Start(natsserver.Options{StoreDir: dir, Port: natstest.Port(t)})
	if err != nil {
		t.Fatal(err)
	}
	h := &env{t: t, server: server}
	h.openOnDisk()
	var mu sync.Mutex
	seen := 0
	halfway := make(chan struct{})
	runner := runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		mu.Lock()
		if seen++; seen == 100 {
			close(halfway)
		}
		mu.Unlock()
		time.Sleep(2 * time.Millisecond) //nolint:forbidigo // a session takes a moment
		_, err := speakAll(ctx, a)
		return err
	})
	lease := h.leaseOf(5 * time.Second) // longer than the restart: no job changes hands
	w := h.start(runner, lease)
	h.start(runner, lease)
	h.fill("default", 300)
	receive(t, halfway, "half of the jobs")
	url := server.ClientURL()
	if err := server.Shutdown(); err != nil {
		t.Fatal(err)
	}
	h.eventually("not ready", func() bool { return w.Ready() != nil })
	h.server = natstest.StartWith(t, natsserver.Options{StoreDir: dir, Port: portOf(t, url)})
	h.eventually("connected", h.nc.IsConnected)
	h.settled()
	if n := len(h.events("avatar.events.completed.>")); n != 300 {
		t.Errorf("%d completed events", n)
	}
	for n := range 300 {
		r := h.record(fmt.Sprintf("default-%d", n))
		if r == nil || r.Outcome != lifecycle.StateCompleted || r.Attempt != 1 || r.Crashes != 0 {
			t.Fatalf("job %d: %+v", n, r)
		}
	}
	h.eventually("ready again", func() bool { return w.Ready() == nil })
}

// BenchmarkWorker is whole jobs through a worker, with a Runner that does
// nothing; BenchmarkBareLoop is what it can't do without.
func BenchmarkWorker(b *testing.B) {
	h := newEnv(b)
	left := make(chan struct{}, b.N)
	runner := runnerFunc(func(context.Context, *jobs.Attempt) error { left <- struct{}{}; return nil })
	h.fill("default", b.N)
	b.ReportAllocs()
	b.ResetTimer()
	h.start(runner)
	for range b.N {
		<-left
	}
	h.settled()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
}

func BenchmarkBareLoop(b *testing.B) {
	h := newEnv(b)
	h.fill("default", b.N)
	b.ReportAllocs()
	b.ResetTimer()
	ctx := context.Background()
	record := make([]byte, 500)
	var wg sync.WaitGroup
	for done := 0; done < b.N; {
		batch, err := h.handles.Consumers["default"].Fetch(min(16, b.N-done))
		if err != nil {
			b.Fatal(err)
		}
		for msg := range batch.Messages() {
			done++
			key := fmt.Sprint("k", done)
			wg.Go(func() {
				revision, err := h.handles.State.Create(ctx, key, record)
				if err == nil {
					_, err = h.js.PublishMsgAsync(&nats.Msg{Subject: h.names.Events("started", key), Data: record})
				}
				if err == nil {
					_, err = h.handles.State.Update(ctx, key, record, revision)
				}
				if err == nil {
					_, err = h.js.Publish(ctx, h.names.Events("completed", key), record)
				}
				if err == nil {
					err = msg.DoubleAck(ctx)
				}
				if err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
}

func TestTheNextJobStartsWhileTheLastOnesRecordingIsAssembled(t *testing.T) {
	h := newEnv(t)
	started, assembling, assembled := make(chan string, 3), make(chan string, 3), make(chan struct{})
	runner := runnerFunc(func(_ context.Context, a *jobs.Attempt) error { started <- a.Job.ID; return nil })
	runner.finish = func(_ context.Context, job *jobspec.Job, _ jobs.Finished) error {
		assembling <- job.ID
		<-assembled
		return nil
	}
	w := h.start(runner, func(o *options) { o.Concurrency = 1 })
	for _, id := range []string{"a", "b", "c"} {
		h.submit("default", job(id, `"output":{"object":{}}`))
	}
	first, second := receive(t, started, "a session"), receive(t, started, "another, while the first is being assembled")
	receive(t, assembling, "the first recording")
	receive(t, assembling, "the second recording")
	if first == second {
		t.Errorf("%s started twice", first)
	}
	if n := w.Running(); n != 1 {
		t.Errorf("%d places are taken, one has passed on already", n)
	}
	// As many as there are places are being assembled, and the one place is
	// kept by one more: nothing may pile up behind a store that is slow.
	select {
	case id := <-started:
		t.Errorf("%s started too", id)
	case <-time.After(300 * time.Millisecond):
	}
	close(assembled)
	for _, id := range []string{"a", "b", "c"} {
		h.outcome(id, lifecycle.StateCompleted)
	}
}
