package status

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/streams"
)

// Records are read from the newest to the oldest, window by window: jobs on
// their way changed lately, those that ended long ago did not.
const (
	firstWindow = 1 << 10
	mostWindow  = 1 << 15
)

// countStates counts the records of jobs that were taken and have no outcome.
// A bucket may hold a week of records, nearly all of jobs that have ended: the
// count stops once it has found as many as the consumers report as taken. It
// returns false if the time ran out before.
func (s *Store) countStates(ctx context.Context, t *tally) (all bool, err error) {
	wanted := 0
	for _, q := range t.queues {
		wanted += q.Taken
	}
	if wanted == 0 {
		return true, nil
	}
	bucket := s.names.StateBucket()
	stream, err := s.js.Stream(ctx, "KV_"+bucket)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("bucket %s: %w", bucket, err)
	}
	short, cancel := context.WithTimeout(ctx, s.countFor)
	defer cancel()
	err = backwards(short, stream, s.recordsSubject(), firstWindow, func(msg jetstream.Msg, _ *jetstream.MsgMetadata) bool {
		if t.count(msg.Data()) {
			wanted--
		}
		return wanted > 0
	}, func() bool { return true })
	switch {
	case err == nil:
		return true, nil
	case ctx.Err() == nil && short.Err() != nil:
		return false, nil
	}
	return false, fmt.Errorf("counting the records in bucket %s: %w", bucket, err)
}

// tally counts records.
type tally struct {
	queues map[string]*Queue
	// held is called for each job that is held because a budget is spent; may be nil.
	held func(app string, labels map[string]string)
}

// count adds a record to its queue, if its job is on its way.
func (t *tally) count(data []byte) bool {
	var record recordRow
	// No JSON: the marker of a record that was removed. No sequence: a cancel
	// that came before its job.
	if decodeRow(data, &record) != nil || record.StreamSeq == 0 || t.queues[record.Queue] == nil {
		return false
	}
	q := t.queues[record.Queue]
	switch record.State {
	case lifecycle.StateRunning:
		q.Running++
	case lifecycle.StateRetrying:
		q.Retrying++
	case lifecycle.StateHeld:
		q.Held++
		if record.HeldReason == lifecycle.HeldBudget && t.held != nil {
			t.held(record.AppID, record.Labels)
		}
	case lifecycle.StateReleased:
		q.Released++
	default:
		return false
	}
	return true
}

// backwards calls take for a stream's messages on a subject, newest window first and
// oldest message first in each window, until take returns false, or more does after
// a window. window is the length of the first one.
func backwards(ctx context.Context, stream jetstream.Stream, subject string, window uint64, take func(jetstream.Msg, *jetstream.MsgMetadata) bool, more func() bool) error {
	info, err := stream.Info(ctx)
	if err != nil {
		return err
	}
	first, end := max(info.State.FirstSeq, 1), info.State.LastSeq+1
	for ; end > first; window = max(window, min(window*4, mostWindow)) {
		start := first
		if end-first > window {
			start = end - window
		}
		enough := false
		cfg := jetstream.ConsumerConfig{FilterSubject: subject, DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: start}
		err := streams.Scan(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
			if meta.Sequence.Stream >= end {
				return false
			}
			enough = !take(msg, meta)
			return !enough
		})
		if err != nil || enough || !more() {
			return err
		}
		end = start
	}
	return nil
}

// recordsSubject matches the records of jobs in the bucket, and no other keys: no
// job id has a dot.
func (s *Store) recordsSubject() string { return "$KV." + s.names.StateBucket() + ".*" }
