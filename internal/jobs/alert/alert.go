// Package alert counts error events over the whole fleet and raises one alert for
// each code that recurs, and publishes the worker's own alerts. It owns
// the counts, the keys by which workers agree on who publishes an alert, and the alerts
// that wait to be published. It must not know about jobs, sessions or circuits.
package alert

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

// Config sets when failures with the same code raise an alert.
type Config struct {
	Threshold int           // events of a code
	Window    time.Duration // within this time, over the whole fleet
}

const (
	// raiseTimeout bounds claiming and publishing one alert.
	raiseTimeout = 10 * time.Second
	// maxWindow is how many events of one code are remembered.
	maxWindow = 10_000
	// heartbeat is how often the server confirms that the consumer still waits.
	heartbeat = 5 * time.Second
	// forgottenAfter is when the server removes a consumer that nothing reads.
	forgottenAfter = time.Minute
)

// Counter counts the fleet's error events in their stream and raises one alert
// for each code that recurs. Every worker counts the same events; a
// compare-and-set decides which of them publishes the alert.
type Counter struct {
	o       Options
	windows map[errors.Code]*eventWindow
}

// Options configure a Counter. All fields are required.
type Options struct {
	JS     jetstream.JetStream
	Stream string // of events
	Errors string // the subjects of all error events
	Config Config
	Codes  func(errors.Code) bool // those that alert
	Store  *kv.Store              // AVATAR_FLEET
	// Stored reports whether the event is the last one on its subject, and not
	// older than since.
	Stored func(ctx context.Context, ev event.Event, since time.Time) (bool, error)
	// Publish reports whether the event was new.
	Publish func(ctx context.Context, ev event.Event) (fresh bool, err error)
	Raised  func(code errors.Code)
	Worker  string
	Now     func() time.Time // by the server's clock
	Log     zerolog.Logger
}

// New returns a Counter; Run makes it count.
func New(o Options) *Counter {
	return &Counter{o: o, windows: make(map[errors.Code]*eventWindow)}
}

// eventWindow holds the recent events of one code.
type eventWindow struct {
	seen      []seenEvent // oldest first
	ids       map[string]bool
	alertedAt time.Time // when the last alert known here was raised
}

type seenEvent struct {
	id  string
	at  time.Time // set by the stream, so that every worker counts the same
	app string
	job string
}

// claim is the value in AVATAR_FLEET for each code.
type claim struct {
	At       time.Time `json:"at"`
	WorkerID string    `json:"worker_id"`
}

// Run counts until ctx ends. It starts a new consumer if one ends.
func (a *Counter) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := a.follow(ctx); err != nil && ctx.Err() == nil {
			a.o.Log.Warn().Err(err).Msg("could not follow the error events; recurring failures are not counted until this works")
		}
		if retry.Pause(ctx, time.Second, nil) != nil {
			return
		}
	}
}

// readBatch is how many events are asked for at a time.
const readBatch = 500

// follow counts the events of the last window and the ones that follow. It
// returns an error if its consumer ends or an event is missing. It does not use
// the client's ordered consumer: after the stream is created again, that one
// waits for the sequence it had reached in the old stream.
func (a *Counter) follow(ctx context.Context) error {
	from := a.o.Now().Add(-a.o.Config.Window)
	consumer, err := a.o.JS.CreateConsumer(ctx, a.o.Stream, jetstream.ConsumerConfig{
		Name: nuid.Next(), FilterSubject: a.o.Errors,
		DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &from,
		AckPolicy: jetstream.AckNonePolicy, MaxDeliver: -1,
		MemoryStorage: true, Replicas: 1, InactiveThreshold: forgottenAfter,
	})
	if err != nil {
		return err
	}
	messages, err := consumer.Messages(jetstream.PullHeartbeat(heartbeat), jetstream.WithMessagesErrOnMissingHeartbeat(true),
		jetstream.PullMaxMessages(topology.AtMost(readBatch, consumer.CachedInfo().Config)))
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, messages.Stop)
	defer stop()
	defer messages.Stop()
	for last := uint64(0); ; last++ {
		msg, err := messages.Next()
		if err != nil {
			if errors.Is(err, jetstream.ErrMsgIteratorClosed) && ctx.Err() != nil {
				return nil
			}
			return err
		}
		meta, err := msg.Metadata()
		if err != nil {
			return err
		}
		if meta.Sequence.Consumer != last+1 {
			return fmt.Errorf("%d error events did not arrive", meta.Sequence.Consumer-last-1)
		}
		a.count(ctx, msg, meta.Timestamp)
	}
}

// count counts one error event, which the stream stored at that time.
func (a *Counter) count(ctx context.Context, msg jetstream.Msg, stored time.Time) {
	code := errors.Code(msg.Subject()[strings.LastIndexByte(msg.Subject(), '.')+1:])
	if !a.o.Codes(code) {
		return
	}
	var ev struct {
		AppID string `json:"app_id"`
		JobID string `json:"job_id"`
	}
	if err := json.Unmarshal(msg.Data(), &ev); err != nil {
		return
	}
	w := a.windows[code]
	if w == nil {
		w = &eventWindow{ids: make(map[string]bool)}
		a.windows[code] = w
	}
	w.add(seenEvent{id: msg.Headers().Get("ce-id"), at: stored, app: ev.AppID, job: ev.JobID}, a.o.Config.Window)
	if len(w.seen) >= a.o.Config.Threshold && stored.Sub(w.alertedAt) >= a.o.Config.Window {
		a.raise(ctx, code, w)
	}
}

// add adds an event unless it is already there, and removes those that have left
// the window.
func (w *eventWindow) add(s seenEvent, window time.Duration) {
	if w.ids[s.id] {
		return
	}
	w.ids[s.id] = true
	w.seen = append(w.seen, s)
	for len(w.seen) > maxWindow || s.at.Sub(w.seen[0].at) >= window {
		delete(w.ids, w.seen[0].id)
		w.seen[0] = seenEvent{}
		w.seen = w.seen[1:]
	}
}

// raise claims the alert, unless a worker has claimed it within the window, and
// publishes it.
func (a *Counter) raise(running context.Context, code errors.Code, w *eventWindow) {
	ctx, cancel := context.WithTimeout(running, raiseTimeout)
	defer cancel()
	at, err := a.claim(ctx, code, w.seen[len(w.seen)-1].at)
	if err == nil {
		err = a.publish(ctx, code, w, at)
	}
	switch {
	case err == nil:
		w.alertedAt = at
	case running.Err() == nil:
		a.o.Log.Error().Err(err).Str("code", string(code)).Int("count", len(w.seen)).Msg("could not publish an alert; trying again with the next event")
	}
}

// claim returns when the alert of this window was first raised: now, unless
// another worker has claimed it before.
func (a *Counter) claim(ctx context.Context, code errors.Code, now time.Time) (time.Time, error) {
	key := "alert." + topology.Token(string(code))
	for {
		var given claim
		revision, err := a.o.Store.Get(ctx, key, &given)
		if err != nil {
			return time.Time{}, err
		}
		if revision != 0 && now.Sub(given.At) < a.o.Config.Window {
			return given.At, nil
		}
		_, err = a.o.Store.Put(ctx, key, claim{At: now, WorkerID: a.o.Worker}, revision)
		if !errors.Is(err, kv.ErrConflict) {
			return now, err
		}
	}
}

// publish publishes the alert claimed at at, unless it is stored: the worker that
// claimed it may have died before. The ID is made from the claim, so that several
// workers publish one alert.
func (a *Counter) publish(ctx context.Context, code errors.Code, w *eventWindow, at time.Time) error {
	ev := a.event(code, w)
	ev.ID = event.AlertID(event.AlertRecurring, at, string(code))
	// The ID contains the time, so any stored event with it is this alert. If the
	// check fails, publishing again is harmless.
	if stored, err := a.o.Stored(ctx, ev, time.Time{}); err == nil && stored {
		return nil
	}
	fresh, err := a.o.Publish(ctx, ev)
	if fresh {
		a.o.Raised(code)
	}
	return err
}

func (a *Counter) event(code errors.Code, w *eventWindow) event.Event {
	first, last := w.seen[0], w.seen[len(w.seen)-1]
	alert := event.RecurringAlert{
		Code: code, Count: len(w.seen), Window: a.o.Config.Window.String(),
		First: first.at.UTC(), Last: last.at.UTC(), Worker: a.o.Worker, Time: last.at.UTC(),
		AppIDs: []string{}, JobIDs: []string{},
	}
	for i := len(w.seen) - 1; i >= 0; i-- {
		if s := w.seen[i]; len(alert.JobIDs) < event.MaxAlertJobs && !slices.Contains(alert.JobIDs, s.job) {
			alert.JobIDs = append(alert.JobIDs, s.job)
		}
		if s := w.seen[i]; s.app != "" && len(alert.AppIDs) < event.MaxAlertJobs && !slices.Contains(alert.AppIDs, s.app) {
			alert.AppIDs = append(alert.AppIDs, s.app)
		}
	}
	return event.Event{Time: last.at, Body: alert}
}
