package attempt

import (
	"sync"
	"time"

	"avatarworker/internal/errors"
)

// begunAfter is how long live speech may play before its beginning is recorded,
// unless frames come earlier.
const begunAfter = 100 * time.Millisecond

// begun records, once, where live speech begins. A later session needs that to
// know which speech the frames of this one answer. So it is written with the first
// frame and not with the speech, which it would delay: before the frame if that is
// the utterance's last, else after it.
type begun struct {
	once   sync.Once
	store  func() error
	timer  *time.Timer
	stored chan error // one element; wait takes it
}

func newBegun(store func() error) *begun {
	b := &begun{store: store, stored: make(chan error, 1)}
	b.timer = time.AfterFunc(begunAfter, b.start)
	return b
}

// start begins to write, unless that has begun or wait was called. A nil begun
// has nothing to record.
func (b *begun) start() {
	if b != nil {
		b.once.Do(func() { go b.write() }) // wait waits for it
	}
}

func (b *begun) write() {
	var err error
	defer func() { b.stored <- err }()
	defer errors.Recover(&err, errors.PhaseAudio)
	err = b.store()
}

// wait returns when nothing is being written any more. What has not begun is not
// written: the end of the utterance is recorded next.
func (b *begun) wait() error {
	if b == nil {
		return nil
	}
	b.timer.Stop()
	unused := false
	b.once.Do(func() { unused = true })
	if unused {
		return nil
	}
	return <-b.stored
}
