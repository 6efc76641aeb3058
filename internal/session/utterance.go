package session

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"
)

// utterance is one utterance in flight.
type utterance struct {
	reqID       string
	speech      Speech
	onFrame     func(Frame) error
	onInterrupt func()
	stall       stallClock
	cancel      atomic.Pointer[context.CancelFunc] // ends the wait for the source; nil: it is over

	finishing   atomic.Bool   // the last message is being written; in egress an end before that says only that playback ran dry
	allSent     atomic.Bool   // it is written
	endSeen     atomic.Bool   // in egress an end came between the two
	over        atomic.Bool   // nothing more is sent, and no frame is passed on
	interrupted chan struct{} // closed once the interrupt is sent
	done        chan struct{} // closed when there is nothing more to wait for
	doneOnce    sync.Once
	how         ending // what closed done

	// Fields of Start and Wait.
	ctx      context.Context
	span     trace.Span
	begun    bool        // it became the utterance in flight
	sent     bool        // all speech was sent
	err      error       // why it failed: the source's error, or the session's
	unwatch  func()      // stops watchUtterance
	playback *time.Timer // runs while speech is played in a room; nil outside egress

	// Fields of the sender, guarded by Session.sending.
	tc          traceContext
	started     bool // something was sent
	startedAt   time.Time
	audio       time.Duration
	playedUntil time.Time // when everything sent so far will have been played

	// Fields of the reader. Wait reads them after clearCurrent.
	ended        bool
	endedAt      time.Time
	frames       int
	bytes        int64
	firstFrameAt time.Time
}

// newUtterance returns an utterance with a new req_id, or with the one of a
// replayed exchange.
func (s *Session) newUtterance(in Utterance) *utterance {
	reqID := s.replay
	if reqID == "" {
		reqID = newReqID(time.Now())
	}
	return &utterance{
		reqID: reqID, speech: in.Speech, onFrame: in.OnFrame, onInterrupt: in.OnInterrupt,
		tc:          traceContext{orDefault(in.TraceParent, s.tc.parent), orDefault(in.TraceState, s.tc.state)},
		interrupted: make(chan struct{}), done: make(chan struct{}),
	}
}

// stopSource ends the wait for the source, and drops its context: the backend may
// be waited for as long as the session is open.
func (u *utterance) stopSource() {
	if cancel := u.cancel.Swap(nil); cancel != nil {
		(*cancel)()
	}
}

// finish ends the wait for the backend. The first call wins.
func (u *utterance) finish(how ending) {
	u.doneOnce.Do(func() {
		u.how = how
		close(u.done)
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
