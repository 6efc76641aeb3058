package jobs

import (
	"context"
	"strconv"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/topology"
)

// circuitChanged notes that a circuit opened or closed. Every worker of the fleet
// learns of it.
func (w *Worker) circuitChanged(c circuit.Circuit, open bool) {
	w.o.Observer.CircuitOpen(c.App, c.Region, open)
	w.log.Warn().Str("app_id", c.App).Str("region", c.Region).Str("code", string(c.Code)).Bool("open", open).Msg("circuit changed")
}

// announceCircuit publishes the alert of a circuit that opened or closed. Several
// workers may; the id makes it one.
func (w *Worker) announceCircuit(ctx context.Context, a circuit.Alert) error {
	alert := event.CircuitAlert{
		Kind: a.Kind, AppID: a.App, Region: a.Region, Code: a.Code, Failures: a.Failures,
		Message: "sessions of this app work again", Worker: w.o.Name, Time: a.At.UTC(),
	}
	if a.Kind == circuit.AlertOpened {
		alert.Cooldown = a.Cooldown.String()
		alert.Message = "sessions of this app are not started until a probe succeeds. " + errors.Explain(a.Code).Remedy
	}
	id := event.AlertID(a.Kind, a.OpenedAt, topology.Token(a.App), topology.Token(a.Region))
	fresh, err := w.publisher.PublishNew(ctx, event.Event{ID: id, Time: alert.Time, Body: alert})
	if fresh {
		w.o.Observer.Alerted(a.Kind, a.Code)
	}
	return err
}

func (w *Worker) alertStorage(output string, fault error) {
	w.outbox.Alert(event.WorkerAlert{
		Kind: event.AlertStorage, What: output,
		Message: "jobs with output " + output + " are held, because what they make can't be stored: " + fault.Error(),
	}, output)
}

// alertBudget alerts when a share of a budget is spent. Every worker sees it, also one
// that starts later; the id makes it one alert.
func (w *Worker) alertBudget(b budget.Warning) {
	alert := event.WorkerAlert{
		Kind: event.AlertBudget, What: b.What(), Message: b.String(),
		Key: b.Key, Value: b.Value, Credits: b.Credits, Spent: b.Spent, Per: b.Per, Until: b.Until.UTC(),
	}
	if b.Key == "app_id" {
		alert.AppID = b.Value
	}
	w.outbox.AlertOnce(event.AlertID(alert.Kind, b.Since, b.What(), topology.Token(b.Key), topology.Token(b.Value), b.Per, strconv.FormatInt(b.Credits, 10)), b.Until, alert)
}
