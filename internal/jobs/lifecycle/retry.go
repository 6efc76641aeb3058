package lifecycle

import (
	"fmt"
	"time"

	"avatarworker/internal/errors"
)

// RetryPolicy decides when a failed job runs again.
type RetryPolicy struct {
	MaxAttempts int           // the limit where the job names none, and the highest it may name
	Initial     time.Duration // bound of the wait before the second attempt
	Max         time.Duration // bound of every wait
}

// Failure is a failed attempt, as input to the retry policy.
type Failure struct {
	Decision errors.Decision
	Record   *Record
	Now      time.Time
	Deadline time.Time // zero: none
	// CircuitOpen means that starting sessions of the app is known to be
	// pointless, and that this failure is of that kind.
	CircuitOpen bool
	// Refused means that the backend refused one session too many, not the
	// account.
	Refused bool
	// Wait is how long a held job waits before it is checked again.
	Wait time.Duration
}

// HeldReason returns the reason of a hold after this failure.
func (f Failure) HeldReason() string {
	switch {
	case f.CircuitOpen:
		return HeldCircuit
	case f.Refused:
		return HeldRefused
	case f.Decision.Proxy:
		return HeldProxy
	default:
		return HeldPolicy
	}
}

// Plan is what happens to a job after a failure.
type Plan struct {
	Action errors.Action
	Delay  time.Duration // before the next attempt
	Reason string        // of a dead letter
}

// Plan decides what happens after a failure. rnd returns a number in [0, 1). It
// returns an error if it does not know the decision's action.
func (p RetryPolicy) Plan(f Failure, rnd func() float64) (Plan, error) {
	plan, err := p.plan(f, rnd)
	if err != nil {
		return Plan{}, err
	}
	again := plan.Action == errors.ActionRetry || plan.Action == errors.ActionHold
	if again && Past(f.Deadline, f.Now.Add(plan.Delay)) {
		return Plan{Action: errors.ActionExpire}, nil
	}
	return plan, nil
}

func (p RetryPolicy) plan(f Failure, rnd func() float64) (Plan, error) {
	switch f.Decision.Action {
	case errors.ActionHold:
		return p.hold(f, rnd), nil
	case errors.ActionRetry:
		if f.CircuitOpen || f.Decision.Proxy {
			return p.hold(f, rnd), nil
		}
		return p.again(f, rnd), nil
	case errors.ActionDeadLetter:
		if f.CircuitOpen {
			return p.hold(f, rnd), nil
		}
		return Plan{Action: errors.ActionDeadLetter, Reason: reasonOf(f.Decision.Code)}, nil
	case errors.ActionExpire:
		return Plan{Action: errors.ActionExpire}, nil
	default:
		return Plan{}, fmt.Errorf("no plan for the action %q of code %s; this is a fault of the worker: report it", f.Decision.Action, f.Decision.Code)
	}
}

// hold waits for the circuit. If none is open the wait grows: with the number of
// refusals in a row if the backend refused one session too many, otherwise (a proxy
// that refuses, or a policy that holds) with the number of holds.
func (p RetryPolicy) hold(f Failure, rnd func() float64) Plan {
	delay := f.Wait
	switch {
	case f.Refused:
		delay = p.backoff(f.Record.Refusals+1, rnd)
	case !f.CircuitOpen:
		delay = p.backoff(f.Record.Holds+1, rnd)
	}
	return Plan{Action: errors.ActionHold, Delay: max(delay, f.Decision.NotBefore)}
}

func (p RetryPolicy) again(f Failure, rnd func() float64) Plan {
	spent := f.Record.Spent()
	ofCode := f.Record.Failures[f.Decision.Code] + 1
	limit := f.Decision.Attempts
	if spent >= p.maxAttempts(f) || limit > 0 && ofCode >= limit {
		return Plan{Action: errors.ActionDeadLetter, Reason: ReasonAttemptsExhausted}
	}
	delay := p.backoff(max(spent, 1), rnd)
	if f.Decision.NotBefore > 0 {
		// Spread jobs that would otherwise all come back at the same moment.
		delay += f.Decision.NotBefore
	}
	return Plan{Action: errors.ActionRetry, Delay: delay}
}

// maxAttempts returns how many attempts the job has without progress. A policy may
// raise the number for its code, unless the job itself sets a lower one than
// retry.max_attempts.
func (p RetryPolicy) maxAttempts(f Failure) int {
	if f.Decision.Raises && f.Record.MaxAttempts == p.MaxAttempts {
		return max(f.Record.MaxAttempts, f.Decision.Attempts)
	}
	return f.Record.MaxAttempts
}

// backoff returns a random wait of at most Initial × 2^(n−1), and of at most Max.
func (p RetryPolicy) backoff(n int, rnd func() float64) time.Duration {
	bound := p.Max
	if shift := n - 1; shift < 32 && p.Initial<<shift < p.Max && p.Initial<<shift > 0 {
		bound = p.Initial << shift
	}
	return time.Duration(rnd() * float64(bound))
}

func reasonOf(code errors.Code) string {
	switch code {
	case errors.CodeInvalidJob:
		return ReasonInvalidJob
	case errors.CodeWorkerLost:
		return ReasonWorkerLost
	default:
		return ReasonPermanent
	}
}

// Past reports whether t is after a deadline that is set.
func Past(deadline, t time.Time) bool { return !deadline.IsZero() && t.After(deadline) }
