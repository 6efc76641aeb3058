package alert

import (
	"context"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

const (
	// sameWindow is the time within which the same alert of several workers, or of
	// several jobs, is published once.
	sameWindow = 5 * time.Minute
	// publishTimeout bounds one attempt to publish an alert.
	publishTimeout = 10 * time.Second
	// againTimeout is the same after an attempt that failed.
	againTimeout = 2 * time.Second
	// noteTimeout bounds reading and writing that an alert was published.
	noteTimeout = 2 * time.Second
	// maxWaiting is how many alerts wait to be published.
	maxWaiting = 1024
)

// OutboxOptions configure an Outbox. All fields are required.
type OutboxOptions struct {
	// Stored and Publish are explained at Options.
	Stored   func(ctx context.Context, ev event.Event, since time.Time) (bool, error)
	Publish  func(ctx context.Context, ev event.Event) (fresh bool, err error)
	Raised   func(kind string, code errors.Code)
	Store    *kv.Store // AVATAR_FLEET
	Worker   string
	WorkerID func() string
	Now      func() time.Time
	Log      zerolog.Logger
}

// Outbox publishes the worker's own alerts.
type Outbox struct {
	o       OutboxOptions
	waiting chan queued

	mu     sync.Mutex // guards what follows
	window time.Time
	given  map[string]bool // ids of the alerts given in the window
}

// queued is an alert that waits to be published.
type queued struct {
	event.Event
	until time.Time // until then the fleet publishes it once; zero: the stream drops a second one by its id
}

// NewOutbox returns an Outbox; Run makes it publish.
func NewOutbox(o OutboxOptions) *Outbox {
	return &Outbox{o: o, waiting: make(chan queued, maxWaiting)}
}

// Alert publishes an alert; about distinguishes it from others of its kind. The same again
// within a few minutes is dropped.
func (b *Outbox) Alert(alert event.WorkerAlert, about string) {
	window := b.o.Now().Truncate(sameWindow)
	if id := event.AlertID(alert.Kind, window, topology.Token(about)); !b.known(window, id) {
		b.AlertOnce(id, time.Time{}, alert)
	}
}

// AlertOnce publishes an alert once over the whole fleet, by its id. AVATAR_FLEET keeps
// until the given time that it was published. So a worker that starts later may call
// AlertOnce again, in case the first one died before it published the alert.
func (b *Outbox) AlertOnce(id string, until time.Time, alert event.WorkerAlert) {
	alert.Worker, alert.WorkerID, alert.Time = b.o.Worker, b.o.WorkerID(), b.o.Now()
	b.add(queued{event.Event{ID: id, Time: alert.Time, Body: alert}, until})
}

func (b *Outbox) add(a queued) {
	select {
	case b.waiting <- a:
	default:
		alert, _ := a.Body.(event.WorkerAlert)
		b.o.Log.Error().Str("kind", alert.Kind).Str("what", alert.What).Msg("too many alerts wait to be published: this one is dropped. " + alert.Message)
	}
}

// known notes an alert, and reports whether it was given before.
func (b *Outbox) known(window time.Time, id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.given == nil || !b.window.Equal(window) {
		b.window, b.given = window, make(map[string]bool)
	}
	known := b.given[id]
	b.given[id] = true
	return known
}

// Run publishes the alerts until ctx ends, each until the stream has it. An alert that
// can't be published is tried again after the others.
func (b *Outbox) Run(ctx context.Context) {
	timeout := publishTimeout
	for {
		select {
		case <-ctx.Done():
			return
		case a := <-b.waiting:
			err := b.publish(ctx, timeout, a)
			if timeout = publishTimeout; err == nil || ctx.Err() != nil {
				continue
			}
			timeout = againTimeout
			b.o.Log.Error().Err(err).Str("alert", a.ID).Msg("could not publish an alert")
			_ = retry.Pause(ctx, time.Second, nil) // the loop checks ctx
			b.add(a)
		}
	}
}

func (b *Outbox) publish(ctx context.Context, timeout time.Duration, a queued) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if b.noted(ctx, a) {
		return nil
	}
	// The stream drops the same message again for two minutes only.
	if stored, err := b.o.Stored(ctx, a.Event, time.Time{}); err == nil && stored {
		return nil
	}
	fresh, err := b.o.Publish(ctx, a.Event)
	if alert, ok := a.Body.(event.WorkerAlert); ok && fresh {
		b.o.Raised(alert.Kind, errors.Code(alert.What))
	}
	if err == nil {
		b.note(ctx, a)
	}
	return err
}

// noted reports whether an alert was published before, as far as that can be read.
func (b *Outbox) noted(ctx context.Context, a queued) bool {
	if a.until.IsZero() {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, noteTimeout)
	defer cancel()
	at, err := b.o.Store.Stored(ctx, a.ID)
	return err == nil && !at.IsZero()
}

// note stores that an alert was published, for workers that start later. If that fails
// they publish it again.
func (b *Outbox) note(ctx context.Context, a queued) {
	life := a.until.Sub(b.o.Now())
	if life <= 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, noteTimeout)
	defer cancel()
	_, err := b.o.Store.PutTTL(ctx, a.ID, claim{At: b.o.Now(), WorkerID: b.o.WorkerID()}, 0, life)
	if err != nil && !errors.Is(err, kv.ErrConflict) {
		b.o.Log.Debug().Err(err).Str("alert", a.ID).Msg("could not note that an alert was published: it may come again")
	}
}
