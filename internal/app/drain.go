package app

import (
	"context"
	"encoding/json"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/operate"
)

// serveDrain answers requests to drain this worker, and calls drain for each. The
// worker's id changes with its lease, so it receives the requests to all workers.
func (a *App) serveDrain(nc *nats.Conn, drain func()) error {
	sub, err := nc.Subscribe(a.names.AllWorkerDrains(), func(msg *nats.Msg) {
		state := a.worker.State()
		if msg.Subject != a.names.WorkerDrain(state.WorkerID) {
			return
		}
		a.log.Info().Msg("asked to drain")
		drain()
		answer, err := json.Marshal(operate.Draining{WorkerID: state.WorkerID, Running: a.worker.Running()})
		if err == nil {
			err = msg.Respond(answer)
		}
		if err != nil {
			a.log.Debug().Err(err).Msg("could not answer a request to drain")
		}
	})
	if err != nil {
		return err
	}
	a.onStop("requests to drain", func(context.Context) error { return sub.Unsubscribe() })
	return nil
}
