package reliability

import (
	"context"
	"fmt"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/output"
)

func TestARollingRestartUnderLoadCostsNoAttemptAndCutsNoSession(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "", 10*time.Second) // none is to end
	workers := make([]*process, 3)
	for i := range workers {
		workers[i] = f.worker(fmt.Sprintf("w%d", i))
	}
	const total = 180
	published := make(chan struct{})
	go func() {
		defer close(published)
		f.load(t.Context(), total, 20*time.Millisecond, func(i int) map[string]any {
			return job(fmt.Sprintf("j-%d", i), "slow-200", 2)
		})
	}()
	for i, old := range workers {
		f.await("done", (i+1)*total/6, final)
		old.signal(syscall.SIGTERM)
		if !old.waitEnd(20*time.Second) || !old.cmd.ProcessState.Success() {
			t.Fatalf("worker %s did not drain in good order: %v", old.name, old.cmd.ProcessState)
		}
		f.worker(old.name)
	}
	<-published
	f.settle()
	report, seen := f.check()
	if report.Sessions != total || report.Failures != 0 || report.Again != 0 || report.Released != 0 || report.Outcomes[lifecycle.StateCompleted] != total {
		t.Errorf("want %d sessions that complete, and nothing else: %s", total, report)
	}
	for _, s := range seen.Sessions {
		if s.CloseCode != 1000 || s.ClosedBy != "client" {
			t.Errorf("session %s was cut: %d by %s", s.ConnectionID, s.CloseCode, s.ClosedBy)
		}
	}
}

func TestAJobWhoseWorkerDiesIsResumedAfterItsLastWholeUtterance(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "", 4*time.Second)
	victim := f.worker("victim")
	j := withFrames(job("five", "slow-300", 0))
	for range 5 {
		j["utterances"] = append(j["utterances"].([]any), silence(3)) // two frames each
	}
	messages := f.frames("five")
	f.publish(j)
	ends := map[string]string{} // of utterances, with the session that delivered each
	killed := false
	for len(ends) < 5 {
		msg, err := messages.Next(jetstream.NextMaxWait(30 * time.Second))
		if err != nil {
			t.Fatalf("frames: %v; ended: %v; %+v", err, ends, f.record("five"))
		}
		h := msg.Headers()
		n, session := h.Get(output.HeaderUtterance), h.Get("Avatar-Session")
		if h.Get("Avatar-End") == "true" {
			if before, twice := ends[n]; twice {
				t.Errorf("utterance %s was delivered in session %s and again in session %s", n, before, session)
			}
			ends[n] = session
		} else if n == "3" && !killed {
			killed = true
			f.kill(victim)
			f.worker("heir")
		}
	}
	f.settle()
	report, seen := f.check()
	resumed := 3
	if ends["3"] == "1" { // on a busy machine the kill may come after its last frame
		resumed = 4
	}
	want := map[string]string{}
	for n := 1; n <= 5; n++ {
		want[strconv.Itoa(n)] = "1"
		if n >= resumed {
			want[strconv.Itoa(n)] = "2"
		}
	}
	if fmt.Sprint(ends) != fmt.Sprint(want) {
		t.Errorf("utterances by session %v, want %v", ends, want)
	}
	if r := f.record("five"); r.UtterancesDone != 5 || r.Checkpoint != 5 || len(r.ConnectionIDs) == 0 {
		t.Errorf("record %+v", r)
	}
	if report.Sessions != 2 || report.Crashes != 1 || len(seen.Sessions) != 2 || seen.Sessions[1].Utterances != 6-resumed {
		t.Errorf("want two sessions, %d utterances in the second: %s; %+v", 6-resumed, report, seen.Sessions)
	}
}

// frames follows a job's frames until the test ends.
func (f *fleet) frames(jobID string) jetstream.MessagesContext {
	f.t.Helper()
	consumer, err := f.js.OrderedConsumer(f.t.Context(), f.names.FramesStream(), jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{f.names.Frames(jobID)},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	messages, err := consumer.Messages()
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(messages.Stop)
	return messages
}

func TestTwelveFailuresOfOneKindOverTwoWorkersAreOneAlert(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "", 3*time.Second)
	workers := []*process{f.worker("w1", "AVATAR_WORKER_CONCURRENCY=2"), f.worker("w2", "AVATAR_WORKER_CONCURRENCY=2")}
	for i := range 12 {
		j := job(fmt.Sprintf("j-%d", i), "fail-upstreamError", 1)
		j["max_attempts"] = 1
		f.publish(j)
	}
	f.settle()
	f.awaitAlert("recurring", "upstreamError")
	for _, w := range workers { // each tells what it knows before it ends
		w.signal(syscall.SIGTERM)
		if !w.waitEnd(20 * time.Second) {
			t.Fatalf("worker %s did not stop", w.name)
		}
	}
	if n := f.alerts("recurring", "upstreamError"); n != 1 {
		t.Errorf("%d alerts, want 1", n)
	}
	if report, _ := f.check(); report.Failures != 12 {
		t.Errorf("want 12 failures: %s", report)
	}
}

// alerts counts the alerts of a kind and code that are kept.
func (f *fleet) alerts(kind, code string) int {
	f.t.Helper()
	s, err := f.js.Stream(f.t.Context(), f.names.EventsStream())
	if err != nil {
		f.t.Fatal(err)
	}
	subject := f.names.Alerts(kind, code)
	info, err := s.Info(f.t.Context(), jetstream.WithSubjectFilter(subject))
	if err != nil {
		f.t.Fatal(err)
	}
	return int(info.State.Subjects[subject])
}

// awaitAlert returns when there is an alert.
func (f *fleet) awaitAlert(kind, code string) {
	f.t.Helper()
	consumer, err := f.js.OrderedConsumer(f.t.Context(), f.names.EventsStream(), jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{f.names.Alerts(kind, code)},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(f.t.Context(), natstest.Patience)
	defer cancel()
	if _, err := consumer.Next(jetstream.FetchContext(ctx)); err != nil {
		f.t.Fatalf("no %s alert of %s: %v", kind, code, err)
	}
}
