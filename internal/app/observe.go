package app

import (
	"context"
	"maps"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/leader"
	"avatarworker/internal/telemetry"
	"avatarworker/internal/topology"
)

// observer turns the worker's reports into metrics.
type observer struct {
	m       *telemetry.Metrics
	waiting *postponed
}

var _ jobs.Observer = observer{}

func (o observer) JobDone(queue string, outcome lifecycle.State) { o.m.JobDone(queue, string(outcome)) }
func (o observer) AttemptDone(code errors.Code, class errors.Class, phase errors.Phase) {
	o.m.Attempt(code, class, phase)
}
func (o observer) TakenOver(why string) { o.m.TakeOver(why) }
func (o observer) FirstStarted(queue string, wait time.Duration) {
	o.m.StartWait(queue, wait)
}
func (o observer) SessionOpened(app string) { o.m.SessionStarted(app) }
func (o observer) SessionClosed(app string, connected time.Duration) {
	o.m.SessionEnded(app, connected)
}

func (o observer) Utterance(u event.Utterance) {
	o.m.Utterance(time.Duration(u.DurationMS) * time.Millisecond)
	if u.Frames > 0 { // a first frame within a millisecond is one too
		o.m.FirstFrame(time.Duration(u.FirstFrameMS) * time.Millisecond)
	}
}

func (o observer) FramesOut(output string, frames int, bytes int64) {
	o.m.Frames(output, frames, bytes)
}

func (o observer) Used(app, queue string, connected time.Duration, credits int64) {
	o.m.Used(app, queue, connected, credits)
}

func (o observer) TotalsAdded(ok bool) { o.m.TotalsAdded(ok) }

func (o observer) LeaseExtended(ok bool) {
	if ok {
		o.m.LeaseExtension("ok")
	} else {
		o.m.LeaseExtension("lost")
	}
}
func (o observer) SlotsBusy(busy, all int)                   { o.m.SetSlots(busy, all-busy) }
func (o observer) CircuitOpen(app, region string, open bool) { o.m.SetCircuit(app, region, open) }
func (o observer) DeadLettered(code errors.Code)             { o.m.DeadLetter(code) }
func (o observer) Alerted(kind string, code errors.Code)     { o.m.Alert(kind, string(code)) }

func (o observer) Postponed(jobID string, state lifecycle.State, wait time.Duration) {
	o.waiting.add(jobID, state, time.Now().Add(wait))
}

// postponed remembers the jobs that this worker has handed back with a delay. Any
// worker may get one next, so each is forgotten when its delay has passed: the sum
// over the fleet is the number of jobs that wait.
type postponed struct {
	mu   sync.Mutex
	jobs map[string]postponedJob
}

type postponedJob struct {
	state lifecycle.State
	until time.Time
}

func newPostponed() *postponed { return &postponed{jobs: make(map[string]postponedJob)} }

func (p *postponed) add(jobID string, state lifecycle.State, until time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.jobs[jobID] = postponedJob{state, until}
}

// count returns how many jobs wait for a retry and how many are held.
func (p *postponed) count(now time.Time) (retrying, held int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, j := range p.jobs {
		switch {
		case now.After(j.until):
		case j.state == lifecycle.StateHeld:
			held++
		default:
			retrying++
		}
	}
	return retrying, held
}

// forget drops the jobs whose delay has passed. It bounds the map where count is
// never called.
func (p *postponed) forget(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.jobs, func(_ string, j postponedJob) bool { return now.After(j.until) })
}

// queuesEvery is how often the queues' gauges are brought up to date.
const queuesEvery = 5 * time.Second

// watchQueues keeps the gauges of the queues up to date until ctx ends.
func (a *App) watchQueues(ctx context.Context, js jetstream.JetStream, h topology.Handles) {
	ticker := time.NewTicker(queuesEvery)
	defer ticker.Stop()
	for {
		a.waiting.forget(time.Now())
		for queue, consumer := range h.Consumers {
			a.measure(ctx, js, queue, consumer)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// measure updates the gauges of one queue. What can't be read stays as it was.
func (a *App) measure(ctx context.Context, js jetstream.JetStream, queue string, consumer jetstream.Consumer) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	info, err := consumer.Info(ctx)
	if err != nil {
		a.log.Debug().Err(err).Str("queue", queue).Msg("could not read the queue's consumer")
		return
	}
	until, changed := a.pauses.set(queue, info)
	if changed {
		a.logPause(queue, until)
	}
	state := telemetry.QueueState{
		Waiting:  int(info.NumPending),
		Runnable: int(info.NumPending) + a.worker.InFleet(queue),
		Paused:   !until.IsZero(),
	}
	if info.NumPending > 0 {
		next, err := leader.Next(ctx, js, a.names.JobsStream(), info.Delivered.Stream+1, a.names.Jobs(queue))
		if err == nil {
			state.Oldest = time.Since(next.Time)
		}
	}
	a.metrics.SetQueue(queue, state)
}
