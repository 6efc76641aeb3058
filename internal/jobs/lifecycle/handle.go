package lifecycle

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
)

// ErrSuperseded means that another worker has taken the job over.
var ErrSuperseded = errors.New("another worker has taken the job over")

// HandleOptions configure a Handle. All fields are required.
type HandleOptions struct {
	Store *kv.Store
	JobID string
	Now   func() time.Time // by the server's clock
	// CancelSeen is called when a write finds that the job is to be cancelled.
	CancelSeen func()
}

// Handle owns the record of one job while a delivery of it is processed: the
// record as last read or written, its revision, and the lock for both.
type Handle struct {
	o HandleOptions

	writing   sync.Mutex // held while the record is read and written back
	cancel    bool       // a write found that the job is to be cancelled: no later one may lose that
	announced bool       // CancelSeen was called

	mu       sync.Mutex // guards the fields below; never held while waiting
	record   *Record    // nil: there is none
	revision uint64
}

// NewHandle returns a Handle without a record. It must not be copied.
func NewHandle(o HandleOptions) *Handle { return &Handle{o: o} }

// Current returns the record as last read or written, or nil if there is none.
// The caller must not change it.
func (h *Handle) Current() *Record {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.record
}

func (h *Handle) set(r *Record, revision uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.record, h.revision = r, revision
}

// Load reads the job's record. It returns nil if there is none.
func (h *Handle) Load(ctx context.Context) (*Record, error) {
	record := new(Record)
	revision, err := h.o.Store.Get(ctx, h.o.JobID, record)
	if err != nil {
		return nil, err
	}
	if revision == 0 {
		record = nil
	} else if err := record.check(); err != nil {
		return nil, fmt.Errorf("record of job %s: %w: correct this record, or delete its key in the bucket", h.o.JobID, err)
	}
	h.set(record, revision)
	return record, nil
}

// Put writes next in place of the record read last.
func (h *Handle) Put(ctx context.Context, next *Record) error {
	h.writing.Lock()
	defer h.writing.Unlock()
	return h.write(ctx, next)
}

// UpdateHeldText writes why the job is still held, if the text has changed. Digits are
// not compared: how much space is left differs each time.
func (h *Handle) UpdateHeldText(ctx context.Context, r *Record, why string) error {
	digits := func(c rune) rune {
		if c >= '0' && c <= '9' {
			return -1
		}
		return c
	}
	if strings.Map(digits, r.HeldWhy) == strings.Map(digits, why) {
		return nil
	}
	next := r.Clone()
	next.HeldWhy = why
	return h.Put(ctx, next)
}

// write is Put for a caller that holds h.writing.
func (h *Handle) write(ctx context.Context, next *Record) error {
	next.UpdatedAt, next.CancelRequested = h.o.Now(), next.CancelRequested || h.cancel
	h.mu.Lock()
	revision := h.revision
	h.mu.Unlock()
	revision, err := h.o.Store.Put(ctx, h.o.JobID, next, revision)
	if err != nil {
		return err
	}
	h.set(next, revision)
	return nil
}

// UpdateLocal changes the record in memory; the next write includes the change.
func (h *Handle) UpdateLocal(f func(*Record)) {
	h.writing.Lock()
	defer h.writing.Unlock()
	next := h.Current().Clone()
	f(next)
	h.mu.Lock()
	h.record = next
	h.mu.Unlock()
}

// PutFenced writes next even if others have written meanwhile, as long as the job
// still belongs to this session. It keeps a request to cancel. It returns
// ErrSuperseded if the job belongs to another session.
func (h *Handle) PutFenced(ctx context.Context, next *Record) error {
	h.writing.Lock()
	defer h.writing.Unlock()
	return h.overwrite(ctx, next)
}

// Change applies f to the record of a running session and writes it.
func (h *Handle) Change(ctx context.Context, f func(*Record)) error {
	h.writing.Lock()
	defer h.writing.Unlock()
	next := h.Current().Clone()
	f(next)
	return h.overwrite(ctx, next)
}

// overwrite is PutFenced for a caller that holds h.writing.
func (h *Handle) overwrite(ctx context.Context, next *Record) error {
	for stale := 0; ; {
		err := h.write(ctx, next)
		if err == nil && h.cancel && !h.announced {
			h.announced = true
			h.o.CancelSeen() // after the progress was written
		}
		if !errors.Is(err, kv.ErrConflict) {
			return err
		}
		var now Record
		revision, err := h.o.Store.Get(ctx, h.o.JobID, &now)
		if err != nil {
			return err
		}
		if now.Run != next.Run || now.Session != next.Session || now.WorkerID != next.WorkerID || now.State.Final() || now.State == StateReleased {
			return ErrSuperseded
		}
		h.cancel = h.cancel || now.CancelRequested
		if h.newer(revision) {
			continue
		}
		// A newly elected leader may not have everything yet.
		if stale++; stale > kv.MaxStale {
			return kv.ErrConflict
		}
		if err := retry.Pause(ctx, kv.RetryPause, kv.ErrConflict); err != nil {
			return err
		}
	}
}

// newer stores a revision that was read after a conflict, and reports whether it
// is newer than the one that conflicted.
func (h *Handle) newer(revision uint64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if revision <= h.revision {
		return false
	}
	h.revision = revision
	return true
}
