package output

import (
	"context"

	"avatarworker/internal/errors"
)

// Envelope is one envelope of the backend.
type Envelope struct {
	Utterance int    // from 1
	ReqID     string // as in the envelope
	End       bool   // the utterance's last
	Data      []byte // as received; valid only during the call
}

// Sink receives the envelopes of one session, in order.
type Sink interface {
	// Open is called once, before the session is opened, so that a refusal costs
	// nothing.
	Open(ctx context.Context) error
	// Write writes one envelope. It returns when the envelope is stored (frames)
	// or buffered (object).
	Write(ctx context.Context, e Envelope) error
	// Finish stores an utterance. Once its checkpoint is recorded, a later
	// session need not deliver it again.
	Finish(ctx context.Context, utterance int) error
	// Checkpoint returns the state from which the sink of a later session
	// continues, or nil if it needs none.
	Checkpoint() (*Checkpoint, error)
	// LastSeq returns the number of the last envelope published, or 0 if
	// envelopes have no numbers.
	LastSeq() int64
}

// Discard drops all envelopes.
type Discard struct{}

var _ Sink = Discard{}

// Open implements Sink.
func (Discard) Open(context.Context) error { return nil }

// Write implements Sink.
func (Discard) Write(context.Context, Envelope) error { return nil }

// Finish implements Sink.
func (Discard) Finish(context.Context, int) error { return nil }

// Checkpoint implements Sink.
func (Discard) Checkpoint() (*Checkpoint, error) { return nil, nil } //nolint:nilnil // nothing is kept

// LastSeq implements Sink.
func (Discard) LastSeq() int64 { return 0 }

// ErrStorage is what a *StorageError is, also where only its text is left in an
// error that was cleared of secrets.
var ErrStorage = errors.New("a store of ours did not take what it was given")

// StorageError is in the chain of an error if one of our streams did not store a
// session's output: the fault is neither the job's nor the backend's.
type StorageError struct {
	Store string // stream, or the subject it should be kept under
	Err   error
}

// Error implements error.
func (e *StorageError) Error() string { return e.Store + ": " + e.Err.Error() }

// Is reports whether target is ErrStorage.
func (e *StorageError) Is(target error) bool { return target == ErrStorage }

// Unwrap returns the cause.
func (e *StorageError) Unwrap() error { return e.Err }

// storageError wraps err in a StorageError, unless the job itself is the reason
// why nothing was stored.
func storageError(store string, err error) error {
	if errors.Is(err, ErrReplaced) || errors.Is(err, ErrChunksMissing) {
		return err
	}
	return &StorageError{Store: store, Err: err}
}
