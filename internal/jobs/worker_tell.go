package jobs

import (
	"context"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// circuitChanged is told by whatever goroutine learns of it first; every worker
// of the fleet tells the same event, and the stream keeps one.
func (w *Worker) circuitChanged(c Circuit, opened bool) {
	w.o.Observer.CircuitOpen(c.App, c.Region, opened)
	alert := CircuitAlert{
		Kind: AlertCircuitClosed, AppID: c.App, Region: c.Region, Code: c.Code,
		Message: "sessions of this app work again", Worker: w.o.Name, Time: w.o.Now().UTC(),
	}
	if opened {
		alert.Kind = AlertCircuitOpened
		alert.Failures, alert.Cooldown = len(c.Failures), c.Cooldown.String()
		alert.Message = "sessions of this app are not started until a probe succeeds. " + errors.Explain(c.Code).Remedy
	}
	w.log.Warn().Str("app_id", c.App).Str("region", c.Region).Str("code", string(c.Code)).Bool("open", opened).
		Msg("circuit changed")
	// By when it opened: every worker that tells of it makes the same id.
	id := AlertID(alert.Kind, c.OpenedAt, keyToken(c.App), keyToken(c.Region))
	select {
	case w.told <- Event{ID: id, Time: alert.Time, Body: alert}:
	default: // other workers tell it too
	}
}

// tell publishes the alerts about circuits.
func (w *Worker) tell(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case ev := <-w.told:
			publishCtx, cancel := context.WithTimeout(ctx, outageBudget)
			if err := w.publisher.Publish(publishCtx, ev); err != nil && ctx.Err() == nil {
				w.log.Error().Err(err).Msg("could not publish an alert about a circuit")
			} else if alert, ok := ev.Body.(CircuitAlert); ok {
				w.o.Observer.Alerted(alert.Kind, alert.Code)
			}
			cancel()
		}
	}
}

// wasTold tells whether the event is the last of its subject in the stream. One
// with this id that is older than since is of an earlier job whose id was used
// again, and proves nothing.
func (w *Worker) wasTold(ctx context.Context, ev Event, since time.Time) (bool, error) {
	msg, err := w.o.Events.GetLastMsgForSubject(ctx, ev.Body.subject(w.o.Names))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	at, err := time.Parse(time.RFC3339Nano, msg.Header.Get("ce-time"))
	return err == nil && msg.Header.Get("ce-id") == ev.ID && !at.Before(since), nil
}
