package ui

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/operate"
	"avatarworker/internal/status"
	"avatarworker/internal/topology"
)

var (
	_ Reader = (*Store)(nil)
	_ Actor  = (*Store)(nil)
)

// opener opens what changes jobs with the first change: at the start NATS may be
// away, and nothing may be there yet.
type opener struct {
	nc    *nats.Conn
	js    jetstream.JetStream
	names topology.Names

	budgets status.Budgets
	tariff  usage.Tariff

	mu       sync.Mutex
	operator *operate.Operator
}

func (o *opener) open(ctx context.Context) (*operate.Operator, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.operator != nil {
		return o.operator, nil
	}
	operator, err := operate.Open(ctx, o.nc, o.js, o.names)
	if err != nil {
		return nil, err
	}
	o.operator = operator.WithBudgets(o.budgets, o.tariff)
	return o.operator, nil
}

// Operator opens what changes things, for the API.
func (s *Store) Operator(ctx context.Context) (*operate.Operator, error) {
	o, err := s.operator.open(ctx)
	return o, s.explain("changing things", err)
}

// Cancel ends a job. One that is unknown is left alone.
func (s *Store) Cancel(ctx context.Context, jobID string) (_ Done, err error) {
	ctx, explain := s.Permitted(ctx)
	defer func() { err = explain(err) }()
	o, err := s.operator.open(ctx)
	if err != nil {
		return Done{}, s.explain("cancelling jobs", err)
	}
	reply, err := o.Cancel(ctx, jobID, false)
	if err != nil {
		return Done{}, s.explain("job "+jobID, err)
	}
	d := Done{Status: reply.Status, Message: reply.Message, OK: reply.Status == control.StatusCancelled || reply.Status == control.StatusRequested}
	if reply.Status == control.StatusFinished {
		d.Message = "too late: its outcome is " + reply.Outcome
	}
	if reply.Status == control.StatusRequested && d.Message == "" {
		d.Message = "it ends when a worker has it next"
	}
	return d, nil
}

// Retry delivers a job at once.
func (s *Store) Retry(ctx context.Context, jobID string, probe bool) (_ Done, err error) {
	ctx, explain := s.Permitted(ctx)
	defer func() { err = explain(err) }()
	o, err := s.operator.open(ctx)
	if err != nil {
		return Done{}, s.explain("retrying jobs", err)
	}
	r, err := o.Retry(ctx, jobID, probe)
	if err != nil {
		return Done{}, s.explain("retrying job "+jobID, err)
	}
	return Done{Status: r.Status, Message: r.Message, OK: r.Done()}, nil
}

// Replay publishes a dead letter's job again.
func (s *Store) Replay(ctx context.Context, seq uint64, o dlq.ReplayOptions) (_ dlq.Result, err error) {
	ctx, explain := s.Permitted(ctx)
	defer func() { err = explain(err) }()
	return s.letters.Replay(ctx, seq, o)
}

// Remove removes a dead letter for good.
func (s *Store) Remove(ctx context.Context, seq uint64) (err error) {
	ctx, explain := s.Permitted(ctx)
	defer func() { err = explain(err) }()
	return s.letters.Remove(ctx, seq)
}

// Pause stops the deliveries of a queue; 0 is until it is resumed.
func (s *Store) Pause(ctx context.Context, queue string, d time.Duration) (_ time.Time, err error) {
	ctx, explain := s.Permitted(ctx)
	defer func() { err = explain(err) }()
	o, err := s.operator.open(ctx)
	if err != nil {
		return time.Time{}, s.explain("pausing queues", err)
	}
	if d <= 0 {
		d = operate.Forever
	}
	until, err := o.Pause(ctx, queue, d)
	s.refresh(ctx)
	return until, s.explain("pausing queue "+queue, err)
}

// Resume ends a pause.
func (s *Store) Resume(ctx context.Context, queue string) (_ bool, err error) {
	ctx, explain := s.Permitted(ctx)
	defer func() { err = explain(err) }()
	o, err := s.operator.open(ctx)
	if err != nil {
		return false, s.explain("resuming queues", err)
	}
	was, err := o.Resume(ctx, queue)
	s.refresh(ctx)
	return was, s.explain("resuming queue "+queue, err)
}

// Probe lets one job through an open circuit.
func (s *Store) Probe(ctx context.Context, app, region string) (_ string, err error) {
	ctx, explain := s.Permitted(ctx)
	defer func() { err = explain(err) }()
	o, err := s.operator.open(ctx)
	if err != nil {
		return "", s.explain("circuits", err)
	}
	list, err := o.OpenCircuits(ctx, app, &region)
	if err == nil && len(list) == 0 {
		err = circuit.ErrNone
	}
	if err != nil {
		return "", s.circuitError(app, err)
	}
	_, job, err := o.ProbeCircuit(ctx, list[0])
	s.refresh(ctx)
	return job, s.circuitError(app, err)
}

// CloseCircuit closes an open circuit.
func (s *Store) CloseCircuit(ctx context.Context, app, region string) (err error) {
	ctx, explain := s.Permitted(ctx)
	defer func() { err = explain(err) }()
	o, err := s.operator.open(ctx)
	if err != nil {
		return s.explain("circuits", err)
	}
	_, err = o.CloseCircuit(ctx, app, region)
	s.refresh(ctx)
	return s.circuitError(app, err)
}

func (s *Store) circuitError(app string, err error) error {
	if errors.Is(err, circuit.ErrNone) {
		return fmt.Errorf("app %s: %w: a probe or another operator closed it", app, err)
	}
	return s.explain("circuit of app "+app, err)
}

// Drain asks a worker to drain.
func (s *Store) Drain(ctx context.Context, workerID string) (_ int, err error) {
	ctx, explain := s.Permitted(ctx)
	defer func() { err = explain(err) }()
	o, err := s.operator.open(ctx)
	if err != nil {
		return 0, s.explain("draining workers", err)
	}
	d, err := o.Drain(ctx, workerID)
	s.refresh(ctx)
	return d.Running, err
}

// refresh makes the next read of the fleet show what was changed.
func (s *Store) refresh(ctx context.Context) {
	if s.o.Refresh != nil {
		if err := s.o.Refresh(ctx); err != nil {
			s.o.Log.Debug().Err(err).Msg("looking at what was changed")
		}
	}
	s.fleet.expire()
}
