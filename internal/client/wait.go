package client

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
	"avatarworker/internal/streams"
)

// eventGrace is how long the outcome's event may come after the outcome in the
// record: it is published after the recording was assembled.
const eventGrace = 30 * time.Second

// ErrDropped means that a worker dropped the job because its id was used before.
var ErrDropped = errors.New("the id was used before")

// Position is where the streams ended before a job was published. What an
// earlier job of the same id left there is before it. The zero value is the
// beginning of the streams.
type Position struct{ events, frames uint64 }

// Position returns where the streams end now.
func (c *Client) Position(ctx context.Context) (p Position, err error) {
	for _, s := range []struct {
		name string
		at   *uint64
	}{{c.names.EventsStream(), &p.events}, {c.names.FramesStream(), &p.frames}} {
		stream, err := c.stream(ctx, s.name)
		if err != nil {
			return p, err
		}
		*s.at = stream.CachedInfo().State.LastSeq + 1
	}
	return p, nil
}

// Outcome is how a job ended.
type Outcome struct {
	State lifecycle.State
	// Body is the body of the outcome's event, or the job's record where that
	// event did not come.
	Body json.RawMessage
	// Event is nil where that event did not come.
	Event           *status.Event
	LastError       *event.Error // of the record; nil if Event is set or nothing failed
	Recording       string       // its name; "" for none
	Utterances      []event.Utterance
	UtterancesTotal int // also those that were not spoken
}

// WaitOptions say what Wait hands over on its way. The calls come one at a time
// for each function, but not from one goroutine. All may be nil.
type WaitOptions struct {
	From Position // from Position, before the job was published
	// OnEvent takes each event of the job but the outcome's.
	OnEvent func(status.Event)
	// Frames collects the frames that the job publishes on its subject; OnFrame
	// is called after each with their number.
	Frames  *Frames
	OnFrame func(frames int)
}

// Wait follows the first run of a published job until it has its outcome. When it
// returns, nothing that it started is running. The error is ErrDropped for an id
// that was used before, and ctx's where ctx ends first.
func (c *Client) Wait(ctx context.Context, job Published, o WaitOptions) (Outcome, error) {
	if o.From == (Position{}) {
		o.From = Position{events: 1, frames: 1}
	}
	w := &waiter{c: c, job: job, o: o, found: make(chan Outcome, 2), failed: make(chan error, 3)}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	start := func(follow func(context.Context) error) {
		wg.Go(func() {
			if err := follow(ctx); err != nil && ctx.Err() == nil {
				w.failed <- err
			}
		})
	}
	start(w.followEvents)
	start(w.followRecord)
	if o.Frames != nil {
		start(w.followFrames)
	}
	select {
	case end := <-w.found:
		return end, nil
	case err := <-w.failed:
		return Outcome{}, err
	case <-ctx.Done():
		return Outcome{}, ctx.Err()
	}
}

type waiter struct {
	c      *Client
	job    Published
	o      WaitOptions
	found  chan Outcome
	failed chan error
}

func (w *waiter) followEvents(ctx context.Context) error {
	stream, err := w.c.stream(ctx, w.c.names.EventsStream())
	if err != nil {
		return err
	}
	cfg := jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{w.c.names.EventsFilter("", w.job.JobID)},
		DeliverPolicy:  jetstream.DeliverByStartSequencePolicy, OptStartSeq: w.o.From.events,
	}
	return streams.Follow(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) error {
		return w.event(status.NewEvent(msg.Subject(), msg.Headers(), msg.Data(), meta.Sequence.Stream, meta.Timestamp))
	})
}

func (w *waiter) event(e status.Event) error {
	var body struct {
		Run        int               `json:"run"`
		StreamSeq  uint64            `json:"stream_seq"`
		Recording  string            `json:"recording"`
		Utterances []event.Utterance `json:"utterances"`
		Total      int               `json:"utterances_total"`
	}
	if json.Unmarshal(e.Data, &body) != nil || body.Run > 1 {
		return nil // not a worker's, or of a replay
	}
	kind := strings.TrimPrefix(e.Type, "avatar.job.")
	if kind == event.TypeDuplicate {
		if body.StreamSeq == w.job.Seq {
			return w.dropped()
		}
		return nil
	}
	if state := lifecycle.State(kind); state.Final() {
		w.offer(Outcome{
			State: state, Body: e.Data, Event: &e, Recording: body.Recording,
			Utterances: body.Utterances, UtterancesTotal: max(body.Total, len(body.Utterances)),
		})
		return nil
	}
	if w.o.OnEvent != nil {
		w.o.OnEvent(e)
	}
	return nil
}

func (w *waiter) dropped() error {
	return fmt.Errorf("a worker dropped job %s: %w", w.job.JobID, ErrDropped)
}

// offer hands over an outcome; the first one counts.
func (w *waiter) offer(end Outcome) {
	select {
	case w.found <- end:
	default:
	}
}

// followRecord finds an outcome whose event does not come, and a job whose id is
// another job's.
func (w *waiter) followRecord(ctx context.Context) error {
	bucket := w.c.names.StateBucket()
	kv, err := w.c.js.KeyValue(ctx, bucket)
	if err != nil {
		return w.c.names.Unavailable("bucket "+bucket, err)
	}
	watcher, err := kv.Watch(ctx, w.job.JobID, jetstream.IgnoreDeletes())
	if err != nil {
		return fmt.Errorf("following the record of job %s: %w", w.job.JobID, err)
	}
	defer watcher.Stop() //nolint:errcheck // the connection's end does it too
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case entry, open := <-watcher.Updates():
			if !open {
				return nil
			}
			var r lifecycle.Record
			if entry == nil || json.Unmarshal(entry.Value(), &r) != nil {
				continue
			}
			if r.StreamSeq != 0 && r.StreamSeq != w.job.Seq {
				return w.dropped()
			}
			if r.State.Final() && r.Run <= 1 {
				return w.withoutEvent(ctx, &r, entry.Value())
			}
		}
	}
}

// withoutEvent offers the outcome of the record if its event does not come in
// time.
func (w *waiter) withoutEvent(ctx context.Context, r *lifecycle.Record, data []byte) error {
	if err := waitUntil(ctx, time.Now().Add(eventGrace)); err != nil {
		return err
	}
	w.offer(Outcome{
		State: r.State, Body: data, LastError: r.LastError, Recording: r.Recording,
		Utterances: r.Utterances, UtterancesTotal: max(r.UtterancesDone, len(r.Utterances)),
	})
	return nil
}

func (w *waiter) followFrames(ctx context.Context) error {
	stream, err := w.c.stream(ctx, w.c.names.FramesStream())
	if err != nil {
		return err
	}
	cfg := jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{w.c.names.Frames(w.job.JobID)},
		DeliverPolicy:  jetstream.DeliverByStartSequencePolicy, OptStartSeq: w.o.From.frames,
	}
	return streams.Follow(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) error {
		if err := w.o.Frames.Add(msg.Headers(), msg.Data(), meta.Sequence.Stream); err != nil {
			return err
		}
		if w.o.OnFrame != nil {
			w.o.OnFrame(w.o.Frames.Count())
		}
		return nil
	})
}

// RestOfFrames adds the frames that had not arrived when the job had its outcome:
// all of them were stored before it. It is for Frames that Wait has filled.
func (c *Client) RestOfFrames(ctx context.Context, jobID string, from Position, frames *Frames) error {
	stream, err := c.stream(ctx, c.names.FramesStream())
	if err != nil {
		return err
	}
	var failed error
	cfg := jetstream.ConsumerConfig{
		FilterSubject: c.names.Frames(jobID), DeliverPolicy: jetstream.DeliverByStartSequencePolicy,
		OptStartSeq: max(from.frames, frames.reached+1),
	}
	err = streams.Scan(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		failed = frames.Add(msg.Headers(), msg.Data(), meta.Sequence.Stream)
		return failed == nil
	})
	return errors.Join(err, failed)
}
