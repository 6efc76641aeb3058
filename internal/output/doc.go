// Package output writes the backend's envelopes to a job's output: the frames
// stream, a recording, or nowhere. It never changes the bytes. It owns the layout
// of frames and recordings, and must not know about sessions, queues or retries.
package output

import "context"

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
