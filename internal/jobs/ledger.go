package jobs

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/kv"
	"avatarworker/internal/topology"
)

// Ledger keeps what each session used, once, however often it is told.
type Ledger interface {
	// Sequence is that of the newest usage record that this worker has written.
	Sequence() uint64
	// Credits is what so much connected time costs.
	Credits(connected time.Duration) int64
	// Store writes a session's record, and reports whether it is new.
	Store(ctx context.Context, r usage.Record) (fresh bool, err error)
	// Send is Store that does not wait: wait does.
	Send(ctx context.Context, r usage.Record) (wait func(context.Context) (fresh bool, err error))
	// Own returns the records after from up to upto, if this worker has stored them
	// all and still knows them.
	Own(from, upto uint64) (records []usage.Stored, all bool)
	// Correct replaces an estimate by what the session really used.
	Correct(ctx context.Context, estimate, r usage.Record) error
	// Find looks for the records of a session that were stored since a time; nil:
	// there is none.
	Find(ctx context.Context, r usage.Record, since time.Time) (estimate, exactly *usage.Record, err error)
}

// ledger writes what the sessions of an execution's job used.
type ledger struct{ *execution }

// ledger returns the execution as what tells the ledger.
func (e *execution) ledger() ledger { return ledger{e} }

// sessionCode says how the session ended, as the ledger has it.
func (e *execution) sessionCode() string {
	err, cause := e.session.err, e.session.cause
	switch {
	case err == nil:
		return usage.CodeCompleted
	case errors.Is(cause, errCancelled):
		return usage.CodeCancelled
	case errors.Is(cause, errDrained), errors.Is(cause, errUnrecorded), errors.Is(cause, lease.ErrLost),
		errors.Is(err, lifecycle.ErrSuperseded), errors.Is(cause, lifecycle.ErrSuperseded):
		return usage.CodeReleased
	case errors.Is(err, ErrStorage):
		return usage.CodeStorage
	default:
		return string(errors.Of(err).Code)
	}
}

// begin sends the record of a session that was closed, so that it is on its way while
// the job's record is written. A worker whose lease is lost leaves that to correct.
func (l ledger) begin(r *lifecycle.Record) {
	cause := l.session.cause
	if l.w.o.Ledger == nil || len(r.Usage) == 0 || errors.Is(cause, lease.ErrLost) || errors.Is(cause, lifecycle.ErrSuperseded) {
		return
	}
	if s := r.Usage[len(r.Usage)-1]; s.Session == r.Session && !s.Estimated {
		l.session.usage = l.w.o.Ledger.Send(l.ctx, r.UsageOf(s, l.w.o.Ledger.Credits))
	}
}

// store writes the sessions of a record that are not known to be in the ledger. It
// comes before all else that is told: where that is stored the ledger has them.
func (l ledger) store(r *lifecycle.Record) error {
	if l.w.o.Ledger == nil {
		return nil
	}
	for _, s := range r.Usage {
		if s.Stored {
			continue
		}
		err := l.effects().effect(effectUsage, l.w.o.SettleTimeout, func(ctx context.Context) error {
			u := r.UsageOf(s, l.w.o.Ledger.Credits)
			if l.session.usage != nil && s.Session == r.Session && !s.Estimated {
				return l.sent(ctx, u)
			}
			return l.write(ctx, u)
		})
		if err != nil {
			l.w.o.Storage.DistrustLedger()
			return err
		}
	}
	return nil
}

// sent waits for what begin has sent.
func (l ledger) sent(ctx context.Context, u usage.Record) error {
	fresh, err := l.session.usage(ctx)
	if err == nil {
		l.session.usage = nil
	}
	return l.used(u, fresh, err)
}

func (l ledger) write(ctx context.Context, u usage.Record) error {
	fresh, err := l.w.o.Ledger.Store(ctx, u)
	return l.used(u, fresh, err)
}

func (l ledger) used(u usage.Record, fresh bool, err error) error {
	if fresh {
		l.w.o.Observer.Used(u.AppID, u.Queue, time.Duration(u.ConnectedMS)*time.Millisecond, u.Credits)
	}
	return err
}

// estimated writes the sessions that were lost with their workers at once, while
// the next session runs, which may take long. If that fails they are written with
// what follows from that one.
func (l ledger) estimated(r *lifecycle.Record) {
	if l.w.o.Ledger == nil || len(r.Usage) == 0 {
		return
	}
	record := l.record
	l.w.background.Go(func() {
		ctx, cancel := context.WithTimeout(l.w.base, l.w.o.SettleTimeout)
		defer cancel()
		for _, s := range r.Usage {
			if s.Stored {
				continue
			}
			if err := l.write(ctx, r.UsageOf(s, l.w.o.Ledger.Credits)); err != nil {
				l.log().Debug().Err(err).Msg("could not write the usage of a session that was lost yet")
				return
			}
		}
		record.UpdateLocal(func(now *lifecycle.Record) {
			if now.Session == r.Session && now.State == lifecycle.StateRunning {
				now.UsageStored()
			}
		})
	})
}

// correct is for a session whose job was taken from it: r is the record as this
// worker would have left it. Where the ledger has an estimate of it, or will have
// one, what it really used replaces that.
func (l ledger) correct(ctx context.Context, r *lifecycle.Record) {
	if l.w.o.Ledger == nil {
		return
	}
	for _, s := range r.Usage {
		if s.Session != r.Session || s.Estimated {
			continue
		}
		if err := l.replace(ctx, r, s); err != nil {
			l.log().Warn().Err(err).Int("session", s.Session).Str("connection_id", s.ConnectionID).
				Msg("could not write what a session used whose job was taken over: the ledger keeps the estimate")
		}
	}
}

func (l ledger) replace(ctx context.Context, r *lifecycle.Record, s usage.Session) error {
	exact := r.UsageOf(s, l.w.o.Ledger.Credits)
	if l.session.usage != nil {
		// Its id is the estimate's: where it was stored, that is not.
		fresh, err := l.session.usage(ctx)
		if err := l.used(exact, fresh, err); fresh && err == nil {
			return nil
		}
	}
	estimate, stored, err := l.w.o.Ledger.Find(ctx, exact, exact.ConfirmedAt)
	switch {
	case err != nil || stored != nil:
		return err
	case estimate != nil:
		return l.w.o.Ledger.Correct(ctx, *estimate, exact)
	}
	var now lifecycle.Record
	revision, err := l.w.store.Get(ctx, r.JobID, &now)
	if err != nil {
		return err
	}
	if revision != 0 && now.Run == r.Run {
		if e := now.Estimate(s.Session); e != nil { // it will be stored
			return l.w.o.Ledger.Correct(ctx, now.UsageOf(*e, l.w.o.Ledger.Credits), exact)
		}
	}
	return l.write(ctx, exact) // it was handed back without a crash
}

// budgetPause is about how long a job of a budget that is spent waits before it is
// looked at again: the budget may have been raised. reservedPause is for one that
// others may leave something of.
const (
	budgetPause   = 5 * time.Second
	reservedPause = time.Second
)

func budgeted(r *lifecycle.Record) budget.Job { return budget.Job{App: r.AppID, Labels: r.Labels} }

// peekBudget is the budget that keeps the job from starting as far as is known; nil:
// none.
func (w *Worker) peekBudget(r *lifecycle.Record) *budget.Refusal {
	if w.budgets == nil {
		return nil
	}
	return w.budgets.Peek(budgeted(r))
}

// heldByBudget makes a job wait for its budget.
func (w *Worker) heldByBudget(r *budget.Refusal) holdFor {
	pause := budgetPause
	if r.Spent < r.Credits {
		pause = reservedPause
	}
	return holdFor{reason: lifecycle.HeldBudget, wait: w.pace.Spread(pause), why: r.String(), crowd: "budget " + r.Key + " " + r.Value}
}

// afford reserves the session under the budgets of its job; false: there is not
// enough left, and the job is held.
func (a admission) afford(from, draft *lifecycle.Record) (bool, error) {
	if a.w.budgets == nil {
		return true, nil
	}
	ctx, cancel := a.settling()
	defer cancel()
	release, refusal, err := a.w.budgets.Reserve(ctx, budgeted(draft))
	if err != nil {
		return false, err
	}
	if refusal != nil {
		return false, a.settlement().hold(ctx, from, a.w.heldByBudget(refusal))
	}
	a.session.reserved = release
	return true, nil
}

// alarmBudget alerts when a share of a budget is spent. Every worker sees it; the id
// makes it one alert.
func (w *Worker) alarmBudget(b budget.Warning) {
	what, text := "warning", "jobs of it are held once it is"
	if b.Over {
		what, text = "spent", "jobs of it are held until then or until it is raised (avatarworker cost budget)"
	}
	alert := event.WorkerAlert{
		Kind: event.AlertBudget, What: what,
		Message: fmt.Sprintf("%d of the %d credits per %s for %s %q are spent, with the period ending at %s: %s",
			b.Spent, b.Credits, b.Per, b.Key, b.Value, b.Until.Format(time.RFC3339), text),
		Worker: w.o.Name, WorkerID: w.lastWorkerID(), Time: w.now(),
	}
	if b.Key == "app_id" {
		alert.AppID = b.Value
	}
	id := event.AlertID(alert.Kind, b.Since, what, topology.Token(b.Key), topology.Token(b.Value), b.Per, strconv.FormatInt(b.Credits, 10))
	w.sendAlarm(alert.Time, id, alert)
}

// totalsKey is the key in the bucket of job records that names the worker which adds
// usage records to the counters. No job id has a dot.
const totalsKey = "totals.worker"

// totalsEvery is how long usage records are gathered before they are added to the
// counters.
const totalsEvery = time.Second

// totalsTurn is the value of totalsKey.
type totalsTurn struct {
	WorkerID string `json:"worker_id"`
}

// adderOptions are those of what adds usage records to the counters.
func (w *Worker) adderOptions() usage.AdderOptions {
	return usage.AdderOptions{
		JS: w.o.JS, Names: w.o.Names, Labels: w.o.TotalLabels, Every: totalsEvery, Turn: w.addsTotals, TurnEvery: w.o.AckWait / 2, Own: w.o.Ledger.Own,
		Failed: func(err error) {
			w.o.Observer.TotalsAdded(err == nil)
			if err != nil {
				w.log.Warn().Err(err).Msg("can't add usage records to the counters; trying again. Sums are right all the same: they read what is missing from the records")
			}
		},
		Foreign: func(err error) {
			w.log.Warn().Err(err).Msg("a message in the stream of usage records is not one: it counts for nothing")
		},
	}
}

// addsTotals reports whether this worker adds usage records to the counters: one of
// the fleet does, for as long as its lease stands.
func (w *Worker) addsTotals(ctx context.Context) (bool, error) {
	own := w.currentWorkerID()
	if own == "" {
		return false, nil
	}
	var turn totalsTurn
	revision, err := w.store.Get(ctx, totalsKey, &turn)
	if err != nil || turn.WorkerID == own {
		return err == nil, err
	}
	if turn.WorkerID != "" {
		if stands, err := w.lease.Stands(ctx, turn.WorkerID); stands || err != nil {
			return false, err
		}
	}
	_, err = w.store.Put(ctx, totalsKey, totalsTurn{own}, revision)
	if errors.Is(err, kv.ErrConflict) {
		return false, nil // another worker was quicker
	}
	return err == nil, err
}
