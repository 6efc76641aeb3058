package ui

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
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

	mu       sync.Mutex
	operator *operate.Operator
	records  *kv.Store
}

// storeTime bounds one round trip to a bucket.
const storeTime = 5 * time.Second

func (o *opener) open(ctx context.Context) (*operate.Operator, *kv.Store, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.operator != nil {
		return o.operator, o.records, nil
	}
	operator, err := operate.Open(ctx, o.nc, o.js, o.names)
	if err != nil {
		return nil, nil, err
	}
	bucket, err := o.js.KeyValue(ctx, o.names.StateBucket())
	if err != nil {
		return nil, nil, err
	}
	o.operator, o.records = operator, kv.NewStore(o.js, bucket, storeTime)
	return o.operator, o.records, nil
}

// statusUnknown is the answer for a job that has no record and waits in no queue.
const statusUnknown = "unknown"

// Cancel ends a job. One that is unknown is left alone.
func (s *Store) Cancel(ctx context.Context, jobID string) (Done, error) {
	_, records, err := s.operator.open(ctx)
	if err != nil {
		return Done{}, s.explain("cancelling jobs", err)
	}
	revision, err := records.Get(ctx, jobID, &lifecycle.Record{})
	if err != nil {
		return Done{}, s.explain("record of job "+jobID, err)
	}
	if revision == 0 {
		found, looked, err := s.waiting.Waiting(ctx, jobID)
		switch {
		case err != nil:
			return Done{}, s.explain("job "+jobID, err)
		case found == nil && looked.All:
			if revision, err = records.Get(ctx, jobID, &lifecycle.Record{}); err != nil {
				return Done{}, s.explain("record of job "+jobID, err)
			}
			if revision == 0 {
				return Done{Status: statusUnknown, Message: "no record and no waiting job has this id"}, nil
			}
		}
	}
	reply, err := jobs.RequestCancel(ctx, s.o.NC, records, s.o.Names.Control(jobID), jobID)
	if err != nil {
		return Done{}, s.explain("cancelling job "+jobID, err)
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
func (s *Store) Retry(ctx context.Context, jobID string, probe bool) (Done, error) {
	o, _, err := s.operator.open(ctx)
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
func (s *Store) Replay(ctx context.Context, seq uint64, o dlq.ReplayOptions) (dlq.Result, error) {
	return s.letters.Replay(ctx, seq, o)
}

// Remove removes a dead letter for good.
func (s *Store) Remove(ctx context.Context, seq uint64) error { return s.letters.Remove(ctx, seq) }

// Pause stops the deliveries of a queue; 0 is until it is resumed.
func (s *Store) Pause(ctx context.Context, queue string, d time.Duration) (time.Time, error) {
	o, _, err := s.operator.open(ctx)
	if err != nil {
		return time.Time{}, s.explain("pausing queues", err)
	}
	if d <= 0 {
		d = operate.Forever
	}
	until, err := o.Pause(ctx, queue, d)
	s.fleet.expire()
	return until, s.explain("pausing queue "+queue, err)
}

// Resume ends a pause.
func (s *Store) Resume(ctx context.Context, queue string) (bool, error) {
	o, _, err := s.operator.open(ctx)
	if err != nil {
		return false, s.explain("resuming queues", err)
	}
	was, err := o.Resume(ctx, queue)
	s.fleet.expire()
	return was, s.explain("resuming queue "+queue, err)
}

// probed is how many of the jobs that a circuit holds are tried to be woken.
const probed = 20

// Probe lets one job through an open circuit.
func (s *Store) Probe(ctx context.Context, app, region string) (string, error) {
	o, _, err := s.operator.open(ctx)
	if err != nil {
		return "", s.explain("circuits", err)
	}
	list, err := s.statuses.Jobs(ctx, status.Query{
		Filter: status.Filter{States: []lifecycle.State{lifecycle.StateHeld}, Apps: []string{app}}, Limit: probed,
	})
	if err != nil {
		return "", s.explain("held jobs of app "+app, err)
	}
	var held []string
	for _, row := range slices.Backward(list.Rows) {
		if region == "" || row.Region() == region {
			held = append(held, row.ID)
		}
	}
	_, job, err := o.ProbeCircuit(ctx, app, region, held)
	s.fleet.expire()
	return job, s.circuitError(app, err)
}

// CloseCircuit closes an open circuit.
func (s *Store) CloseCircuit(ctx context.Context, app, region string) error {
	o, _, err := s.operator.open(ctx)
	if err != nil {
		return s.explain("circuits", err)
	}
	circuits, err := o.Circuits(ctx)
	if err != nil {
		return s.explain("circuits", err)
	}
	_, err = circuits.Close(ctx, app, region)
	s.fleet.expire()
	return s.circuitError(app, err)
}

func (s *Store) circuitError(app string, err error) error {
	if errors.Is(err, circuit.ErrNone) {
		return fmt.Errorf("app %s: %w: a probe or another operator closed it", app, err)
	}
	return s.explain("circuit of app "+app, err)
}

// Drain asks a worker to drain.
func (s *Store) Drain(ctx context.Context, workerID string) (int, error) {
	o, _, err := s.operator.open(ctx)
	if err != nil {
		return 0, s.explain("draining workers", err)
	}
	d, err := o.Drain(ctx, workerID)
	s.fleet.expire()
	return d.Running, err
}
