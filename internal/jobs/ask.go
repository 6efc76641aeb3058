package jobs

import (
	"context"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
)

// answer is what is known of a worker that is said to hold something.
type answer int

const (
	answerHas     answer = iota // it answers that it has it
	answerLet                   // it answers that it has not: it let go
	answerGone                  // it does not answer: it is lost
	answerUnknown               // it may only be cut off for a moment: ask again later
)

const (
	// askTimeout is how long a worker has to answer.
	askTimeout = 2 * time.Second
	// outageBudget is how long after an outage of NATS nobody counts as lost:
	// the others may not have come back yet.
	outageBudget = 10 * time.Second
)

// asker asks other workers whether they still have a job or a slot.
type asker struct {
	nc      *nats.Conn
	subject func(workerID string) string
	// heard tells whether the worker was there so short a time ago that its
	// leases may stand although it does not answer. It may wait, but for ctx.
	heard func(ctx context.Context, workerID string) bool
	back  atomic.Pointer[time.Time] // the last reconnect, monotonic; nil: none
}

func (a *asker) reconnected(now time.Time) { a.back.Store(&now) }

func (a *asker) holdsJob(ctx context.Context, workerID, jobID string) answer {
	return a.ask(ctx, workerID, "job "+jobID)
}

// holdsSlot treats a worker that let go like one that is gone.
func (a *asker) holdsSlot(ctx context.Context, workerID, key string) answer {
	if got := a.ask(ctx, workerID, "slot "+key); got != answerLet {
		return got
	}
	return answerGone
}

func (a *asker) ask(ctx context.Context, workerID, question string) answer {
	if workerID == "" {
		return answerGone
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	msg, err := a.nc.RequestWithContext(ctx, a.subject(workerID), []byte(question))
	switch {
	case err == nil && string(msg.Data) == "yes":
		return answerHas
	case err == nil:
		return answerLet
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, context.DeadlineExceeded):
		if a.justBack(time.Now()) || a.heard(ctx, workerID) {
			return answerUnknown
		}
		return answerGone
	default:
		return answerUnknown
	}
}

func (a *asker) justBack(now time.Time) bool {
	back := a.back.Load()
	return back != nil && now.Sub(*back) < outageBudget
}

// answers tells others what this worker has.
func answers(nc *nats.Conn, subject string, hasJob, hasSlot func(string) bool) (*nats.Subscription, error) {
	return nc.Subscribe(subject, func(msg *nats.Msg) {
		kind, what, _ := strings.Cut(string(msg.Data), " ")
		reply := "no"
		if kind == "job" && hasJob(what) || kind == "slot" && hasSlot(what) {
			reply = "yes"
		}
		// A reply that gets lost is asked for again.
		_ = msg.Respond([]byte(reply))
	})
}
