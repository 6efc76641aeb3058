// Package output takes the backend's envelopes to where a job wants them: the
// frames stream, a recording, or nowhere. The bytes are never changed.
package output

import "context"

// Envelope is one backend envelope on its way out.
type Envelope struct {
	Utterance int    // from 1
	ReqID     string // as in the envelope
	End       bool   // the utterance's last
	Data      []byte // as received; valid only during the call
}

// Sink takes the envelopes of one session, in order.
type Sink interface {
	// Open is called once, before the session is opened: what it refuses costs
	// nothing.
	Open(ctx context.Context) error
	// Write takes one envelope, and returns when it is stored (frames) or kept
	// (object).
	Write(ctx context.Context, e Envelope) error
	// Finish stores an utterance: once its checkpoint is kept, a later session
	// need not speak it.
	Finish(ctx context.Context, utterance int) error
	// Checkpoint is what the sink of a later session goes on from; nil: it needs
	// nothing.
	Checkpoint() (*Checkpoint, error)
	// LastSeq is the number of the last envelope published; 0 where that has no
	// meaning.
	LastSeq() int64
}

// Discard counts nothing and keeps nothing.
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
