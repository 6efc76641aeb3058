package session

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"
)

// utterance is one in flight.
type utterance struct {
	reqID       string
	speech      Speech
	onFrame     func(Frame) error
	onInterrupt func()
	stall       stallClock
	cancel      context.CancelFunc // ends the wait for the source

	over        atomic.Bool   // nothing is sent and no frame handed out any more
	interrupted chan struct{} // closed once the interrupt is sent
	answered    chan struct{} // closed when nothing more is waited for
	answerOnce  sync.Once
	how         ending // what closed answered: the first to come

	// Say's and End's.
	ctx     context.Context
	span    trace.Span
	begun   bool        // it was the utterance in flight
	sent    bool        // all of it
	err     error       // why it could not be said: the source's, or that of a session that is over
	unwatch func()      // ends the watch over ctx and the backend's silence
	audible *time.Timer // runs while speech is heard in a room; nil outside egress

	// The sender's; guarded by Session.sending.
	tc        traceContext
	started   bool // something was sent
	startedAt time.Time
	audio     time.Duration
	heard     time.Time // when what was sent will have been heard

	// The reader's; Speak reads them when finish has seen the reader out.
	ended        bool
	endedAt      time.Time
	frames       int
	bytes        int64
	firstFrameAt time.Time
}

// newUtterance makes an utterance under a new req_id, or under the one that a
// replayed exchange answers to.
func (s *Session) newUtterance(in Utterance) *utterance {
	reqID := s.replay
	if reqID == "" {
		reqID = newReqID(time.Now())
	}
	return &utterance{
		reqID: reqID, speech: in.Speech, onFrame: in.OnFrame, onInterrupt: in.OnInterrupt,
		tc:          traceContext{orDefault(in.TraceParent, s.p.TraceParent), orDefault(in.TraceState, s.p.TraceState)},
		interrupted: make(chan struct{}), answered: make(chan struct{}),
	}
}

// answer ends the wait for the backend; the first to say how is right.
func (u *utterance) answer(how ending) {
	u.answerOnce.Do(func() {
		u.how = how
		close(u.answered)
	})
}

func (u *utterance) spoken(egress bool) Spoken {
	if !u.started {
		return Spoken{}
	}
	out := Spoken{ReqID: u.reqID, Frames: u.frames, Bytes: u.bytes, Audio: u.audio}
	end := u.endedAt
	if end.IsZero() {
		end = time.Now()
	}
	out.Duration = end.Sub(u.startedAt)
	if u.frames > 0 && !egress {
		out.FirstFrame = u.firstFrameAt.Sub(u.startedAt)
	}
	return out
}
