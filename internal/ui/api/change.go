package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/operate"
	"avatarworker/internal/topology"
)

// Requests. A body may be left out where every field may.
type (
	cancelRequest struct {
		IfUnknown bool `json:"if_unknown,omitempty"` // also cancel a job that has not been published yet
	}
	retryRequest struct {
		Probe bool `json:"probe,omitempty"` // let one job of an open circuit through
	}
	replayRequest struct {
		Set            []string        `json:"set,omitempty"`             // corrections, PATH=VALUE, as 'dlq replay --set' takes them
		Body           json.RawMessage `json:"body,omitempty"`            // the job to publish instead
		IgnoreDeadline bool            `json:"ignore_deadline,omitempty"` // replay it past its deadline, too
		DryRun         bool            `json:"dry_run,omitempty"`         // say what would be done, change nothing
	}
	removeRequest struct{}
	pauseRequest  struct {
		For string `json:"for,omitempty"` // how long, such as 30m; without it, until it is resumed
	}
	resumeRequest  struct{}
	drainRequest   struct{}
	circuitRequest struct {
		App    string  `json:"app_id"`
		Region *string `json:"region,omitempty"` // without it, all circuits of the app
	}
)

// jobChange is the outcome of a change of a job. The HTTP status is 404 if it is
// unknown, and 409 if it could not be done.
type jobChange struct {
	JobID   string `json:"job_id"`
	Status  string `json:"status"`
	Outcome string `json:"outcome,omitempty"` // with finished
	State   string `json:"state,omitempty"`   // of its record
	Message string `json:"message,omitempty"`

	done bool
}

func (c jobChange) code() int {
	switch {
	case c.done:
		return http.StatusOK
	case c.Status == operate.StatusUnknown:
		return http.StatusNotFound
	default:
		return http.StatusConflict
	}
}

type removed struct {
	Seq    uint64 `json:"seq"`
	Status string `json:"status"` // removed
}

type queueChange struct {
	Queue  string    `json:"queue"`
	Status string    `json:"status"` // paused, resumed or not_paused
	Until  time.Time `json:"until,omitzero"`
}

type drained struct {
	operate.Draining
	Status string `json:"status"` // draining
}

type circuitChange struct {
	App    string `json:"app_id"`
	Region string `json:"region"`
	Status string `json:"status"`           // probing or closed
	JobID  string `json:"job_id,omitempty"` // the job that was woken
}

type circuitChanges struct {
	Circuits []circuitChange `json:"circuits"`
}

func (h *Handler) changes() []route {
	post := func(path string, do func(ctx context.Context, r *http.Request) (any, error)) route {
		return route{http.MethodPost, path, do}
	}
	return []route{
		post("/jobs/{id}/cancel", h.cancel),
		post("/jobs/{id}/retry", h.retry),
		post("/dead-letters/{seq}/replay", h.replay),
		post("/dead-letters/{seq}/remove", h.remove),
		post("/queues/{name}/pause", h.pause),
		post("/queues/{name}/resume", h.resume),
		post("/workers/{id}/drain", h.drain),
		post("/circuits/probe", h.probe),
		post("/circuits/close", h.close),
	}
}

// maxBody is the size of the largest request, in bytes: a job is at most as large as a
// message.
const maxBody = 8 << 20

// decode reads a request's body into v. No body is an empty request.
func decode(r *http.Request, v any) error {
	if err := noQuery(r.URL.RawQuery); err != nil {
		return err
	}
	data, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return &failure{http.StatusRequestEntityTooLarge, fmt.Sprintf("the body is larger than %d bytes", large.Limit)}
	}
	if err != nil {
		return badRequest("the body can't be read: %s", err)
	}
	if len(data) > maxBody {
		return &failure{http.StatusRequestEntityTooLarge, "the body is larger than 8 MiB"}
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		var mistyped *json.UnmarshalTypeError
		switch {
		case !errors.As(err, &mistyped):
			return badRequest("the body is not what is wanted here: %s", err)
		case mistyped.Field == "":
			return badRequest("the body is a JSON %s: want an object", mistyped.Value)
		default:
			return badRequest("%s is a JSON %s: /api/v1/openapi.json says what is wanted", mistyped.Field, mistyped.Value)
		}
	}
	if d.More() {
		return badRequest("the body has something after its JSON object")
	}
	return nil
}

func (h *Handler) cancel(ctx context.Context, r *http.Request) (any, error) {
	id, err := jobID(r)
	if err != nil {
		return nil, err
	}
	var request cancelRequest
	if err := decode(r, &request); err != nil {
		return nil, err
	}
	c, err := h.o.Changes(ctx)
	if err != nil {
		return nil, err
	}
	reply, err := c.Cancel(ctx, id, request.IfUnknown)
	if err != nil {
		return nil, err
	}
	change := jobChange{JobID: id, Status: reply.Status, Message: errors.RedactText(reply.Message)}
	if reply.Status == control.StatusFinished {
		change.Outcome = reply.Outcome
	}
	change.done = reply.Status == control.StatusCancelled || reply.Status == control.StatusRequested
	return change, nil
}

func (h *Handler) retry(ctx context.Context, r *http.Request) (any, error) {
	id, err := jobID(r)
	if err != nil {
		return nil, err
	}
	var request retryRequest
	if err := decode(r, &request); err != nil {
		return nil, err
	}
	c, err := h.o.Changes(ctx)
	if err != nil {
		return nil, err
	}
	retried, err := c.Retry(ctx, id, request.Probe)
	if err != nil {
		return nil, err
	}
	return jobChange{
		JobID: id, Status: retried.Status, State: string(retried.State), Message: errors.RedactText(retried.Message), done: retried.Done(),
	}, nil
}

func (h *Handler) replay(ctx context.Context, r *http.Request) (any, error) {
	seq, err := letterSeq(r)
	if err != nil {
		return nil, err
	}
	var request replayRequest
	if err := decode(r, &request); err != nil {
		return nil, err
	}
	o := dlq.ReplayOptions{IgnoreDeadline: request.IgnoreDeadline, DryRun: request.DryRun}
	if o.Correct, err = correction(request); err != nil {
		return nil, err
	}
	result, err := h.o.Letters.Replay(ctx, seq, o)
	if err != nil {
		return nil, replayError(err)
	}
	return result, nil
}

// replayError is a 400 if the letter, or the correction, can't be replayed as it is: to
// try again would not help.
func replayError(err error) error {
	var invalid *dlq.InvalidError
	if errors.As(err, &invalid) {
		return badRequest("%s", errors.RedactText(err.Error()))
	}
	return err
}

// correction returns what corrects a letter; nil: its own bytes are replayed.
func correction(request replayRequest) (func(dlq.Letter) ([]byte, error), error) {
	switch {
	case len(request.Set) > 0 && len(request.Body) > 0:
		return nil, badRequest("give set, or body: not both")
	case len(request.Body) > 0:
		if _, invalid := jobspec.Decode(nil, request.Body); invalid != nil {
			return nil, badRequest("body is not a valid job: %s", errors.RedactText(invalid.Message))
		}
		return func(dlq.Letter) ([]byte, error) { return request.Body, nil }, nil
	case len(request.Set) == 0:
		return nil, nil //nolint:nilnil // the letter's own bytes
	}
	var settings []dlq.Setting
	for _, text := range request.Set {
		s, err := dlq.ParseSetting(text)
		if err != nil {
			return nil, badRequest("set: %s", errors.RedactText(err.Error()))
		}
		settings = append(settings, s)
	}
	return func(l dlq.Letter) ([]byte, error) {
		body, err := dlq.BodyJSON(l)
		if err != nil {
			return nil, err
		}
		return dlq.Apply(body, settings)
	}, nil
}

func (h *Handler) remove(ctx context.Context, r *http.Request) (any, error) {
	seq, err := letterSeq(r)
	if err != nil {
		return nil, err
	}
	if err := decode(r, &removeRequest{}); err != nil {
		return nil, err
	}
	if err := h.o.Letters.Remove(ctx, seq); err != nil {
		return nil, err
	}
	return removed{seq, "removed"}, nil
}

// queueName returns the queue in the path.
func queueName(r *http.Request) (string, error) {
	name := r.PathValue("name")
	if err := topology.ValidQueue(name); err != nil {
		return "", badRequest("%s", err)
	}
	return name, nil
}

func (h *Handler) pause(ctx context.Context, r *http.Request) (any, error) {
	queue, err := queueName(r)
	if err != nil {
		return nil, err
	}
	var request pauseRequest
	if err := decode(r, &request); err != nil {
		return nil, err
	}
	length := operate.Forever
	if request.For != "" {
		if length, err = time.ParseDuration(request.For); err != nil || length <= 0 || length > operate.Forever {
			return nil, badRequest("for %q: want a duration such as 30m", request.For)
		}
	}
	c, err := h.o.Changes(ctx)
	if err != nil {
		return nil, err
	}
	until, err := c.Pause(ctx, queue, length)
	if err != nil {
		return nil, err
	}
	return queueChange{queue, "paused", until.Truncate(time.Second)}, nil
}

func (h *Handler) resume(ctx context.Context, r *http.Request) (any, error) {
	queue, err := queueName(r)
	if err != nil {
		return nil, err
	}
	if err := decode(r, &resumeRequest{}); err != nil {
		return nil, err
	}
	c, err := h.o.Changes(ctx)
	if err != nil {
		return nil, err
	}
	was, err := c.Resume(ctx, queue)
	if err != nil {
		return nil, err
	}
	change := queueChange{Queue: queue, Status: "resumed"}
	if !was {
		change.Status = "not_paused"
	}
	return change, nil
}

func (h *Handler) drain(ctx context.Context, r *http.Request) (any, error) {
	if err := decode(r, &drainRequest{}); err != nil {
		return nil, err
	}
	c, err := h.o.Changes(ctx)
	if err != nil {
		return nil, err
	}
	d, err := c.Drain(ctx, r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	return drained{d, "draining"}, nil
}

func (h *Handler) probe(ctx context.Context, r *http.Request) (any, error) {
	return h.eachCircuit(ctx, r, func(c Changes, cc circuit.Circuit) (circuitChange, error) {
		_, id, err := c.ProbeCircuit(ctx, cc)
		return circuitChange{Status: "probing", JobID: id}, err
	})
}

func (h *Handler) close(ctx context.Context, r *http.Request) (any, error) {
	return h.eachCircuit(ctx, r, func(c Changes, cc circuit.Circuit) (circuitChange, error) {
		_, err := c.CloseCircuit(ctx, cc.App, cc.Region)
		return circuitChange{Status: "closed"}, err
	})
}

// eachCircuit changes the open circuits that a request names.
func (h *Handler) eachCircuit(ctx context.Context, r *http.Request, change func(Changes, circuit.Circuit) (circuitChange, error)) (any, error) {
	var request circuitRequest
	if err := decode(r, &request); err != nil {
		return nil, err
	}
	if request.App == "" {
		return nil, badRequest("app_id: want the app whose circuit is meant")
	}
	c, err := h.o.Changes(ctx)
	if err != nil {
		return nil, err
	}
	open, err := c.OpenCircuits(ctx, request.App, request.Region)
	if err != nil {
		return nil, err
	}
	if len(open) == 0 {
		return nil, fmt.Errorf("app %s: %w: GET circuits lists the open ones", request.App, circuit.ErrNone)
	}
	changed := circuitChanges{Circuits: []circuitChange{}}
	for _, cc := range open {
		done, err := change(c, cc)
		switch {
		case errors.Is(err, circuit.ErrNone): // closed by a probe, or another operator
			done = circuitChange{Status: "closed"}
		case err != nil:
			return nil, err
		}
		done.App, done.Region = cc.App, cc.Region
		changed.Circuits = append(changed.Circuits, done)
	}
	return changed, nil
}
