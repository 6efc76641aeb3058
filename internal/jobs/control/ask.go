package control

import (
	"context"
	"encoding/json"
	"time"

	"github.com/nats-io/nats.go"
)

// askTimeout bounds the wait for the worker that runs a job.
const askTimeout = 5 * time.Second

// CancelReply returns the reply to the cancel of a job in this state. If the state is not
// final, the cancel is recorded.
func CancelReply(state string, final bool) Reply {
	switch {
	case !final:
		return Reply{Status: StatusRequested}
	case state == StatusCancelled: // also if the worker that ran the job ended it a moment ago
		return Reply{Status: StatusCancelled}
	default:
		return Reply{Status: StatusFinished, Outcome: state}
	}
}

// AskCancel asks the worker that runs a job to cancel it. It reports false if none
// answers in time, or the one that does is too busy: the worker then finds the cancel
// in the job's record.
func AskCancel(ctx context.Context, nc *nats.Conn, subject string) (Reply, bool) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	msg, err := nc.RequestWithContext(ctx, subject, []byte(`{"op":"`+opCancel+`"}`))
	if err != nil {
		return Reply{}, false
	}
	var reply Reply
	if json.Unmarshal(msg.Data, &reply) != nil || reply.Status == "" || reply.Status == StatusRefused {
		return Reply{}, false
	}
	return reply, true
}
