package output

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/ack"
	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
)

// Headers of a frame.
const (
	HeaderRun       = "Avatar-Run"
	HeaderSession   = "Avatar-Session"   // a consumer drops frames of lower ones
	HeaderAttempt   = "Avatar-Attempt"   //
	HeaderUtterance = "Avatar-Utterance" // from 1
	HeaderReqID     = "Avatar-Req-Id"    //
	HeaderSeq       = "Avatar-Seq"       // from 1 in the session
	HeaderEnd       = "Avatar-End"       // "true" on an utterance's last
)

const (
	// publishTimeout bounds one publish. An election takes longer; it is waited
	// out.
	publishTimeout = 5 * time.Second
	// publishPause is the wait before a publish is repeated.
	publishPause = 200 * time.Millisecond
	// storeLimit is how long the store may refuse messages while a paid session
	// runs: longer than an election. If NATS is unreachable, the worker's lease
	// ends the session sooner.
	storeLimit = 30 * time.Second
)

// SessionID identifies the session that the frames come from.
type SessionID struct {
	JobID   string
	Run     int
	Session int
	Attempt int
}

// Frames publishes every envelope of a session on the job's frames subject.
type Frames struct {
	js         jetstream.JetStream
	subject    string
	id         SessionID
	maxPayload int64 // payload limit of the server, including headers
	seq        atomic.Int64
	fixed      nats.Header // headers that are the same on each frame
}

var _ Sink = (*Frames)(nil)

// NewFrames returns the sink of one session.
func NewFrames(js jetstream.JetStream, subject string, id SessionID) *Frames {
	return &Frames{
		js: js, subject: subject, id: id, maxPayload: js.Conn().MaxPayload(),
		fixed: nats.Header{
			HeaderRun: {strconv.Itoa(id.Run)}, HeaderSession: {strconv.Itoa(id.Session)}, HeaderAttempt: {strconv.Itoa(id.Attempt)},
		},
	}
}

// LastSeq implements Sink.
func (f *Frames) LastSeq() int64 { return f.seq.Load() }

// Open implements Sink.
func (f *Frames) Open(context.Context) error { return nil }

// Finish implements Sink: every frame was acknowledged when it was written.
func (f *Frames) Finish(context.Context, int) error { return nil }

// Checkpoint implements Sink.
func (f *Frames) Checkpoint() (*Checkpoint, error) { return nil, nil } //nolint:nilnil // frames need none

// Write implements Sink. It waits for the stream's acknowledgement, so the bytes
// may be reused when it returns, and frames stay in order.
func (f *Frames) Write(ctx context.Context, e Envelope) error {
	seq := f.seq.Load() + 1
	msg := &nats.Msg{Subject: f.subject, Header: f.header(e, seq), Data: e.Data}
	if size := int64(msg.Size()); size > f.maxPayload {
		err := errors.Newf(errors.CodeProtocolError, errors.PhaseRuntime,
			"the backend's envelope of %d bytes does not fit the NATS server's payload limit of %d; raise max_payload", len(e.Data), f.maxPayload)
		err.ReqID = e.ReqID
		return err
	}
	if err := f.publish(ctx, msg); err != nil {
		return err
	}
	f.seq.Store(seq)
	return nil
}

func (f *Frames) header(e Envelope, seq int64) nats.Header {
	number := strconv.FormatInt(seq, 10)
	h := make(nats.Header, len(f.fixed)+5)
	for k, v := range f.fixed {
		h[k] = v
	}
	h[HeaderUtterance] = []string{strconv.Itoa(e.Utterance)}
	h[HeaderReqID] = []string{e.ReqID}
	h[HeaderSeq] = []string{number}
	// A publish without a reply may have been stored. The ID makes repeating it
	// safe.
	h[jetstream.MsgIDHeader] = []string{f.id.JobID + ".run" + strconv.Itoa(f.id.Run) + ".s" + strconv.Itoa(f.id.Session) + ".frame" + number}
	if e.End {
		h[HeaderEnd] = []string{"true"}
	}
	return h
}

// publish tries until the stream has acknowledged, ctx ends, or the error is
// permanent.
func (f *Frames) publish(ctx context.Context, msg *nats.Msg) error {
	err := retry(ctx, func(ctx context.Context) error { return f.publishOnce(ctx, msg) })
	if err == nil || ctx.Err() != nil {
		return err
	}
	return errors.Wrap(errors.CodeInternal, errors.PhaseRuntime, storageError(msg.Subject, err), "publish a frame on "+msg.Subject)
}

func (f *Frames) publishOnce(ctx context.Context, msg *nats.Msg) error {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	_, err := ack.Publish(ctx, f.js.Conn(), msg)
	return err
}

// retry tries until f succeeds, f returns a permanent error, ctx ends, or
// storeLimit is over. If ctx ended, its cause is in the error's chain.
func retry(ctx context.Context, f func(context.Context) error) error {
	for since := time.Now(); ; {
		err := f(ctx)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return errors.Join(context.Cause(ctx), err)
		case permanent(err):
			return err
		case time.Since(since) > storeLimit:
			return fmt.Errorf("tried for %s: %w", storeLimit, err)
		}
		wait(ctx)
	}
}

// wait pauses before a repetition. It returns false if ctx has ended.
func wait(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(publishPause):
		return true
	}
}

// permanent reports whether repeating would not help.
func permanent(err error) bool {
	var api *jetstream.APIError
	var taken *TakenError
	switch {
	case errors.Is(err, errChanged):
		return false
	case errors.Is(err, ErrChunksMissing), errors.Is(err, ErrReplaced), errors.Is(err, nats.ErrMaxPayload), errors.As(err, &taken):
		return true
	default:
		return errors.As(err, &api) && api.Code < http.StatusInternalServerError
	}
}

// LastFrame is the content of the headers of a job's last stored frame.
type LastFrame struct {
	Run, Session, Utterance int
	ReqID                   string
	End                     bool

	stored uint64 // its sequence
}

// Last reads the job's last stored frame from the stream's leader. found is false
// if there is none.
func Last(ctx context.Context, js jetstream.JetStream, stream, subject string) (last LastFrame, found bool, err error) {
	msg, err := leader.Last(ctx, js, stream, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return LastFrame{}, false, nil
	}
	if err != nil {
		return LastFrame{}, false, fmt.Errorf("last frame on %s: %w", subject, err)
	}
	return frameOf(msg.Header, msg.Sequence), true, nil
}

func frameOf(h nats.Header, stored uint64) LastFrame {
	number := func(key string) int {
		n, err := strconv.Atoi(h.Get(key))
		if err != nil {
			return 0 // not a frame of ours
		}
		return n
	}
	return LastFrame{
		Run: number(HeaderRun), Session: number(HeaderSession), Utterance: number(HeaderUtterance),
		ReqID: h.Get(HeaderReqID), End: h.Get(HeaderEnd) == "true", stored: stored,
	}
}

// Superseded reports whether a later session's frames were stored before last, in
// which case listeners have dropped it. It reads the headers of all the job's
// frames.
func Superseded(ctx context.Context, js jetstream.JetStream, stream, subject string, last LastFrame) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, storeLimit)
	defer cancel()
	feed, err := leader.OpenFeed(ctx, js, leader.FeedConfig{Stream: stream, Subject: subject, HeadersOnly: true})
	if err != nil {
		return false, fmt.Errorf("frames: %w", err)
	}
	defer feed.Close()
	for {
		var msg *jetstream.RawStreamMsg
		select {
		case msg = <-feed.Messages():
		case <-ctx.Done():
			return false, fmt.Errorf("frames on %s: %w", subject, context.Cause(ctx))
		}
		if msg == nil {
			return false, fmt.Errorf("frames on %s: %w", subject, feed.Err())
		}
		if msg.Sequence >= last.stored {
			return false, nil
		}
		if f := frameOf(msg.Header, 0); f.Run == last.Run && f.Session > last.Session {
			return true, nil
		}
	}
}
