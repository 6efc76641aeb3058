package jobs

import (
	"context"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

// circuitChanged notes that a circuit opened or closed. Every worker of the fleet
// learns of it.
func (w *Worker) circuitChanged(c circuit.Circuit, open bool) {
	w.o.Observer.CircuitOpen(c.App, c.Region, open)
	w.log.Warn().Str("app_id", c.App).Str("region", c.Region).Str("code", string(c.Code)).Bool("open", open).Msg("circuit changed")
}

// tellCircuit publishes the alert of a circuit that opened or closed. Several
// workers may; the id makes it one.
func (w *Worker) tellCircuit(ctx context.Context, a circuit.Alert) error {
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

// alarmEvery is the time within which the same alert of several workers, or of
// several jobs, is one.
const alarmEvery = 5 * time.Minute

// alarm publishes an alert about something of the worker's own. about tells it
// from others of its kind.
func (w *Worker) alarm(alert event.WorkerAlert, about string) {
	alert.Worker, alert.WorkerID, alert.Time = w.o.Name, w.lastWorkerID(), w.now()
	window := alert.Time.Truncate(alarmEvery)
	w.sendAlarm(window, event.AlertID(alert.Kind, window, topology.Token(about)), alert)
}

// sendAlarm publishes an alert, once for its ID as far as this worker knows.
func (w *Worker) sendAlarm(window time.Time, id string, alert event.WorkerAlert) {
	w.mu.Lock()
	known := w.alarmed.add(window, id)
	w.mu.Unlock()
	if known {
		return
	}
	select {
	case w.alarms <- event.Event{ID: id, Time: alert.Time, Body: alert}:
	default:
		w.log.Error().Str("kind", alert.Kind).Str("what", alert.What).Msg("too many alerts wait to be published: this one is dropped. " + alert.Message)
	}
}

// alarmed are the alerts that this worker has given in the current window.
type alarmed struct {
	window time.Time
	ids    map[string]bool
}

// add notes an alert, and reports whether it was given before.
func (a *alarmed) add(window time.Time, id string) bool {
	if a.ids == nil || !a.window.Equal(window) {
		a.window, a.ids = window, make(map[string]bool)
	}
	known := a.ids[id]
	a.ids[id] = true
	return known
}

func (w *Worker) alarmStorage(output string, fault error) {
	w.alarm(event.WorkerAlert{
		Kind: event.AlertStorage, What: output,
		Message: "jobs with output " + output + " are held, because what they make can't be stored: " + fault.Error(),
	}, output)
}

func (w *Worker) alarmUnsettled(r *lifecycle.Record) {
	w.alarm(event.WorkerAlert{Kind: event.AlertUnsettled, What: "sessions", AppID: r.AppID, JobID: r.JobID, Message: "the job is held: " + r.HeldWhy}, r.JobID)
}

// alarmTimeout bounds one try to publish an alert.
const alarmTimeout = 10 * time.Second

// tell publishes the alerts, each until the stream has it.
func (w *Worker) tell(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case ev := <-w.alarms:
			for ctx.Err() == nil && !w.told(ctx, ev) {
			}
		}
	}
}

func (w *Worker) told(ctx context.Context, ev event.Event) bool {
	ctx, cancel := context.WithTimeout(ctx, alarmTimeout)
	defer cancel()
	// The stream drops the same message again for two minutes only.
	if stored, err := w.eventStored(ctx, ev, time.Time{}); err == nil && stored {
		return true
	}
	fresh, err := w.publisher.PublishNew(ctx, ev)
	if err != nil {
		if ctx.Err() == nil {
			w.log.Error().Err(err).Msg("could not publish an alert")
		}
		return retry.Pause(ctx, time.Second, nil) != nil && ctx.Err() == nil
	}
	if alert, ok := ev.Body.(event.WorkerAlert); ok && fresh {
		w.o.Observer.Alerted(alert.Kind, errors.Code(alert.What))
	}
	return true
}
