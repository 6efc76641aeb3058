// Package ledger decides what of a job's sessions is written to the ledger, and when:
// a session's usage record once it is closed, the estimate of one that was lost with
// its worker, and the correction of an estimate. It also decides which worker adds
// usage records to the counters.
//
// It owns the codes by which sessions end in the ledger, and the key that names the
// worker which adds. It must not know how jobs are run or settled, nor how the ledger
// keeps its records: that is package usage.
package ledger

import (
	"context"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
)

// Ledger stores what each session used, once, however often it is sent.
type Ledger interface {
	// Sequence is that of the newest usage record that this worker has written.
	Sequence() uint64
	// Credits is what so much connected time costs.
	Credits(connected time.Duration) int64
	// Store writes a session's record, and reports whether it is new.
	Store(ctx context.Context, r usage.Record) (fresh bool, err error)
	// Send is Store that does not wait: wait does, at most as long as limit.
	Send(r usage.Record) (wait func(ctx context.Context, limit time.Duration) (fresh bool, err error))
	// Own returns the records after from up to upto, if this worker has stored them
	// all and still knows them.
	Own(from, upto uint64) (records []usage.Stored, all bool)
	// Correct replaces an estimate by what the session really used.
	Correct(ctx context.Context, estimate, r usage.Record) error
	// Find looks for the records of a session that were stored since a time; nil:
	// there is none.
	Find(ctx context.Context, r usage.Record, since time.Time) (estimate, exactly *usage.Record, err error)
}

// Bucket is the bucket of job records; see kv.Store.
type Bucket interface {
	// Get reads the value of a key into v; revision 0: there is none.
	Get(ctx context.Context, key string, v any) (revision uint64, err error)
	// Put writes a value in place of that revision, or fails with kv.ErrConflict.
	Put(ctx context.Context, key string, v any, revision uint64) (uint64, error)
}

// Causes are errors with which sessions end that did not fail.
type Causes struct {
	Cancelled error   // the publisher wanted the job to end
	Released  []error // the worker hands the job back
	Lost      error   // the worker's lease was lost: the job may be another worker's
	Storage   error   // what the Runner returns: a store of our own failed
}

// Options configure a Writer. All fields are required but Ledger.
type Options struct {
	Ledger Ledger // nil: nothing is written
	Bucket Bucket
	Causes Causes
	// Used is called for each session that was stored in the ledger.
	Used func(app, queue string, connected time.Duration, credits int64)
}

// Writer writes what the sessions of jobs used.
type Writer struct{ o Options }

// New returns a Writer.
func New(o Options) *Writer { return &Writer{o: o} }

// Code says how a session ended, as the ledger has it: err is what the Runner said,
// cause why the session was cancelled, if it was.
func (w *Writer) Code(err, cause error) string {
	switch {
	case err == nil:
		return usage.CodeCompleted
	case errors.Is(cause, w.o.Causes.Cancelled):
		return usage.CodeCancelled
	case w.released(cause), errors.Is(err, lifecycle.ErrSuperseded):
		return usage.CodeReleased
	case errors.Is(err, w.o.Causes.Storage):
		return usage.CodeStorage
	default:
		return string(errors.Of(err).Code)
	}
}

func (w *Writer) released(cause error) bool {
	for _, known := range w.o.Causes.Released {
		if errors.Is(cause, known) {
			return true
		}
	}
	return w.lost(cause)
}

// lost reports whether a session was cancelled because its job is another worker's,
// or may be.
func (w *Writer) lost(cause error) bool {
	return errors.Is(cause, w.o.Causes.Lost) || errors.Is(cause, lifecycle.ErrSuperseded)
}

// Sent is the usage record of a session that is on its way. The zero value is none.
type Sent struct {
	wait func(ctx context.Context, limit time.Duration) (fresh bool, err error)
}

// Send sends the record of the session of r, which was closed, so that it is on its
// way while the job's record is written. A worker whose lease is lost leaves that to
// Correct.
func (w *Writer) Send(r *lifecycle.Record, cause error) Sent {
	if w.o.Ledger == nil || len(r.Usage) == 0 || w.lost(cause) {
		return Sent{}
	}
	s := r.Usage[len(r.Usage)-1]
	if !own(r, s) {
		return Sent{}
	}
	return Sent{w.o.Ledger.Send(w.record(r, s))}
}

// own reports whether s is what the session of r used, as it is known exactly.
func own(r *lifecycle.Record, s usage.Session) bool { return s.Session == r.Session && !s.Estimated }

func (w *Writer) record(r *lifecycle.Record, s usage.Session) usage.Record {
	return r.UsageOf(s, w.o.Ledger.Credits)
}

// Store writes the sessions of a record that are not known to be in the ledger. each
// does one such write, and says how long it may take. It comes before everything
// else that is published: where that is stored the ledger has them.
func (w *Writer) Store(r *lifecycle.Record, sent *Sent, each func(write func(ctx context.Context, limit time.Duration) error) error) error {
	if w.o.Ledger == nil {
		return nil
	}
	for _, s := range r.Usage {
		if s.Stored {
			continue
		}
		err := each(func(ctx context.Context, limit time.Duration) error {
			if sent.wait != nil && own(r, s) {
				return w.finish(ctx, limit, sent, w.record(r, s))
			}
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			return w.write(ctx, w.record(r, s))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// finish waits for what Send has sent.
func (w *Writer) finish(ctx context.Context, limit time.Duration, sent *Sent, u usage.Record) error {
	fresh, err := sent.wait(ctx, limit)
	if err == nil {
		sent.wait = nil
	}
	return w.used(u, fresh, err)
}

func (w *Writer) write(ctx context.Context, u usage.Record) error {
	fresh, err := w.o.Ledger.Store(ctx, u)
	return w.used(u, fresh, err)
}

func (w *Writer) used(u usage.Record, fresh bool, err error) error {
	if fresh {
		w.o.Used(u.AppID, u.Queue, time.Duration(u.ConnectedMS)*time.Millisecond, u.Credits)
	}
	return err
}

// Owed reports whether sessions before that of a record were lost with their workers:
// StoreLost writes them.
func (w *Writer) Owed(r *lifecycle.Record) bool { return w.o.Ledger != nil && len(r.Usage) > 0 }

// StoreLost writes the sessions that were lost with their workers at once, while the
// next session, that of r, runs, which may take long. It notes in the record, by
// update, that they are written. If that fails they are written with what follows from
// that session.
func (w *Writer) StoreLost(ctx context.Context, r *lifecycle.Record, update func(func(*lifecycle.Record))) error {
	for _, s := range r.Usage {
		if s.Stored {
			continue
		}
		if err := w.write(ctx, w.record(r, s)); err != nil {
			return err
		}
	}
	update(func(now *lifecycle.Record) {
		if now.Session == r.Session && now.State == lifecycle.StateRunning {
			now.UsageStored()
		}
	})
	return nil
}

// Correct is for a session whose job was taken from it: r is the record as this worker
// would have left it. Where the ledger has an estimate of it, or will have one, what it
// really used replaces that. No other worker knows it, so Correct tries until ctx ends.
// After an error the ledger keeps the estimate, too low if the worker was frozen.
func (w *Writer) Correct(ctx context.Context, r *lifecycle.Record, sent *Sent) error {
	if w.o.Ledger == nil {
		return nil
	}
	for _, s := range r.Usage {
		if own(r, s) {
			closed := func(err error) bool { return errors.Is(err, nats.ErrConnectionClosed) }
			return retry.Until(ctx, retry.Backoff{Initial: kv.RetryPause, Max: time.Second}, closed, func() error {
				return w.replace(ctx, r, s, sent) // there is one at most
			})
		}
	}
	return nil
}

func (w *Writer) replace(ctx context.Context, r *lifecycle.Record, s usage.Session, sent *Sent) error {
	exact := w.record(r, s)
	if sent.wait != nil {
		// Its id is the estimate's: where it was stored, that is not.
		fresh, err := sent.wait(ctx, 0)
		if err := w.used(exact, fresh, err); fresh && err == nil {
			return nil
		}
	}
	estimate, stored, err := w.o.Ledger.Find(ctx, exact, exact.ConfirmedAt)
	switch {
	case err != nil || stored != nil:
		return err
	case estimate != nil:
		return w.o.Ledger.Correct(ctx, *estimate, exact)
	}
	var now lifecycle.Record
	revision, err := w.o.Bucket.Get(ctx, r.JobID, &now)
	if err != nil {
		return err
	}
	if revision != 0 && now.Run == r.Run {
		if e := now.Estimate(s.Session); e != nil { // it will be stored
			return w.o.Ledger.Correct(ctx, w.record(&now, *e), exact)
		}
	}
	return w.write(ctx, exact) // it was handed back without a crash
}
