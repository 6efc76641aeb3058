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

// AlertConfig says when failures with the same code are an alert.
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

// Alerts counts the fleet's error events, as the stream has them, and raises one
// alert for each code that recurs. Every worker counts the same; a
// compare-and-set decides which of them tells.
type Counter struct {
	o       Options
	windows map[errors.Code]*alertWindow
}

// AlertOptions are what Alerts are made of. All are required.
type Options struct {
	JS     jetstream.JetStream
	Stream string // of events
	Errors string // the subjects of all error events
	Config Config
	Codes  func(errors.Code) bool // those that alert
	Store  *kv.Store              // AVATAR_FLEET
	// Stored reports whether the event is the last of its subject, and no older.
	Stored func(ctx context.Context, ev event.Event, since time.Time) (bool, error)
	// Publish reports whether the event was new.
	Publish func(ctx context.Context, ev event.Event) (fresh bool, err error)
	Raised  func(code errors.Code)
	Worker  string
	Log     zerolog.Logger
}

// NewAlerts returns Alerts that count nothing yet; Run does.
func New(o Options) *Counter {
	return &Counter{o: o, windows: make(map[errors.Code]*alertWindow)}
}

// alertWindow is what is remembered of one code.
type alertWindow struct {
	seen  []alertSeen // oldest first
	ids   map[string]bool
	given time.Time // the last alert that this worker knows of
}

type alertSeen struct {
	id  string
	at  time.Time // the stream's, so that every worker counts alike
	app string
	job string
}

// alertGiven is kept in AVATAR_FLEET for each code.
type alertGiven struct {
	At       time.Time `json:"at"`
	WorkerID string    `json:"worker_id"`
}

// Run counts until ctx ends. A consumer that ends is started again.
func (a *Counter) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := a.follow(ctx); err != nil && ctx.Err() == nil {
			a.o.Log.Warn().Err(err).Msg("could not follow the error events; recurring failures are not noticed until this works")
		}
		if retry.Pause(ctx, time.Second, nil) != nil {
			return
		}
	}
}

// follow counts from one window ago. It returns an error when its consumer ends
// or has left out an event. It does not use the client's ordered consumer, which
// would wait in a stream that was made again for the sequence that it had reached.
func (a *Counter) follow(ctx context.Context) error {
	from := time.Now().Add(-a.o.Config.Window)
	consumer, err := a.o.JS.CreateConsumer(ctx, a.o.Stream, jetstream.ConsumerConfig{
		Name: nuid.Next(), FilterSubject: a.o.Errors,
		DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &from,
		AckPolicy: jetstream.AckNonePolicy, MaxDeliver: -1,
		MemoryStorage: true, Replicas: 1, InactiveThreshold: forgottenAfter,
	})
	if err != nil {
		return err
	}
	messages, err := consumer.Messages(jetstream.PullHeartbeat(heartbeat), jetstream.WithMessagesErrOnMissingHeartbeat(true))
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
		w = &alertWindow{ids: make(map[string]bool)}
		a.windows[code] = w
	}
	w.add(alertSeen{id: msg.Headers().Get("ce-id"), at: stored, app: ev.AppID, job: ev.JobID}, a.o.Config.Window)
	if len(w.seen) >= a.o.Config.Threshold && stored.Sub(w.given) >= a.o.Config.Window {
		a.raise(ctx, code, w)
	}
}

// add takes an event in, unless it is there already, and forgets those that
// have left the window.
func (w *alertWindow) add(s alertSeen, window time.Duration) {
	if w.ids[s.id] {
		return
	}
	w.ids[s.id] = true
	w.seen = append(w.seen, s)
	for len(w.seen) > maxWindow || s.at.Sub(w.seen[0].at) >= window {
		delete(w.ids, w.seen[0].id)
		w.seen[0] = alertSeen{}
		w.seen = w.seen[1:]
	}
}

// raise claims the alert, if no worker has within the window, and tells it.
func (a *Counter) raise(running context.Context, code errors.Code, w *alertWindow) {
	ctx, cancel := context.WithTimeout(running, raiseTimeout)
	defer cancel()
	at, err := a.claim(ctx, code, w.seen[len(w.seen)-1].at)
	if err == nil {
		err = a.tell(ctx, code, w, at)
	}
	switch {
	case err == nil:
		w.given = at
	case running.Err() == nil:
		a.o.Log.Error().Err(err).Str("code", string(code)).Int("count", len(w.seen)).Msg("could not tell an alert; trying with the next event")
	}
}

// claim returns when the alert of this window became true, as the worker that
// was first to notice wrote it down: this one at now, unless another was.
func (a *Counter) claim(ctx context.Context, code errors.Code, now time.Time) (time.Time, error) {
	key := "alert." + topology.Token(string(code))
	for {
		var given alertGiven
		revision, err := a.o.Store.Get(ctx, key, &given)
		if err != nil {
			return time.Time{}, err
		}
		if revision != 0 && now.Sub(given.At) < a.o.Config.Window {
			return given.At, nil
		}
		_, err = a.o.Store.Put(ctx, key, alertGiven{At: now, WorkerID: a.o.Worker}, revision)
		if !errors.Is(err, kv.ErrConflict) {
			return now, err
		}
	}
}

// tell publishes the alert claimed at at, unless it is there: whoever claimed it
// may have died before. Its id is the claim's, so that several who tell it tell
// one.
func (a *Counter) tell(ctx context.Context, code errors.Code, w *alertWindow, at time.Time) error {
	ev := a.event(code, w)
	ev.ID = event.AlertID(event.AlertRecurring, at, string(code))
	// Its id has the time in it. Where nobody knows, once more does no harm.
	if told, err := a.o.Stored(ctx, ev, time.Time{}); err == nil && told {
		return nil
	}
	fresh, err := a.o.Publish(ctx, ev)
	if fresh {
		a.o.Raised(code)
	}
	return err
}

func (a *Counter) event(code errors.Code, w *alertWindow) event.Event {
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
