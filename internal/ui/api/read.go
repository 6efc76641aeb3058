package api

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strconv"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/output"
	"avatarworker/internal/status"
)

// overview is the state of the fleet, as 'status --json' has it, and more of what a page
// shows first.
type overview struct {
	*status.Fleet
	Failures status.Failures `json:"failures"` // over the last day
	Limits   []status.Limit  `json:"limits"`   // session limits in use
	freshness
}

// freshness is part of each answer that is kept in memory.
type freshness struct {
	Fresh *status.Freshness `json:"fresh,omitempty"` // how current this is, if it is kept in memory
}

type jobList struct {
	Jobs []status.Row `json:"jobs"`
	// Groups are instead of Jobs if the jobs are counted.
	Groups  []status.Group `json:"groups,omitempty"`
	More    bool           `json:"more"`    // there are more than limit
	Waiting status.Search  `json:"waiting"` // how many of the jobs that wait were looked at
	freshness
}

type queueList struct {
	Queues     []status.Queue `json:"queues"`
	CountedAll bool           `json:"counted_all"` // false: running, retrying, held and released are "at least"
	freshness
}

type workerList struct {
	Workers []status.Worker `json:"workers"`
	freshness
}

type circuitList struct {
	Circuits []circuit.Circuit `json:"circuits"` // those that are not closed
	freshness
}

type limitList struct {
	Limits []status.Limit `json:"limits"` // those of which a session is in use
	freshness
}

type storageList struct {
	Storage []status.Storage `json:"storage"`
	freshness
}

type letterList struct {
	DeadLetters []dlq.Entry `json:"dead_letters"`
	More        bool        `json:"more"` // there are more than limit
}

type alertList struct {
	Alerts []status.Event `json:"alerts"` // newest first
}

type codeList struct {
	Codes []errors.Row `json:"codes"`
}

type costSums struct {
	Rows    []cost.Row        `json:"rows"`    // as 'cost --json' has them: most credits first, days in order
	Budgets []budget.Spending `json:"budgets"` // at present, the largest share first
}

type recordingList struct {
	Recordings []output.Stored `json:"recordings"` // newest first
	More       bool            `json:"more"`       // there are more than limit
}

func (h *Handler) reads() []route {
	get := func(path string, do func(ctx context.Context, r *http.Request) (any, error)) route {
		return route{http.MethodGet, path, do}
	}
	// plain is a path without parameters.
	plain := func(path string, do func(ctx context.Context) (any, error)) route {
		return get(path, func(ctx context.Context, r *http.Request) (any, error) {
			if err := noQuery(r.URL.RawQuery); err != nil {
				return nil, err
			}
			return do(ctx)
		})
	}
	return []route{
		plain("/overview", h.overview),
		get("/jobs", h.jobs),
		get("/jobs/{id}", h.job),
		plain("/queues", h.queues),
		plain("/workers", h.workers),
		plain("/circuits", h.circuits),
		plain("/limits", h.limits),
		plain("/storage", h.storage),
		plain("/failures", func(ctx context.Context) (any, error) { return h.o.Reader.Failures(ctx) }),
		get("/dead-letters", h.letters),
		get("/dead-letters/{seq}", h.letter),
		get("/alerts", h.alerts),
		plain("/codes", func(context.Context) (any, error) { return codeList{h.o.Table.Rows()}, nil }),
		get("/recordings", h.recordings),
		get("/cost", h.cost),
	}
}

func (h *Handler) overview(ctx context.Context) (any, error) {
	fleet, err := h.o.Reader.Fleet(ctx)
	if err != nil {
		return nil, err
	}
	v := overview{Fleet: fleet}
	if v.Failures, err = h.o.Reader.Failures(ctx); err != nil {
		return nil, err
	}
	if v.Limits, err = h.o.Reader.Limits(ctx); err != nil {
		return nil, err
	}
	v.freshness = h.fresh()
	return v, nil
}

// fresh is how current the answers are; empty if they are read each time.
func (h *Handler) fresh() freshness {
	m, ok := h.o.Reader.(interface{ Freshness() status.Freshness })
	if !ok {
		return freshness{}
	}
	fresh := m.Freshness()
	fresh.Error = errors.RedactText(fresh.Error)
	return freshness{&fresh}
}

func (h *Handler) jobs(ctx context.Context, r *http.Request) (any, error) {
	q, err := jobsQuery(r.URL.RawQuery, h.o.Now())
	if err != nil {
		return nil, err
	}
	q.DefaultApp = h.o.DefaultApp
	list, err := h.o.Reader.Jobs(ctx, q)
	if err != nil {
		return nil, err
	}
	return jobList{list.Rows, list.Groups, list.More, list.Waiting, h.fresh()}, nil
}

// jobID returns the job id in the path.
func jobID(r *http.Request) (string, error) {
	id := r.PathValue("id")
	if !jobspec.ValidID(id) {
		return "", badRequest("%q is not a job id: want 1 to 64 of A-Z a-z 0-9 _ -", id)
	}
	return id, nil
}

func (h *Handler) job(ctx context.Context, r *http.Request) (any, error) {
	id, err := jobID(r)
	if err != nil {
		return nil, err
	}
	if err := noQuery(r.URL.RawQuery); err != nil {
		return nil, err
	}
	job, err := h.o.Reader.Job(ctx, id)
	if err != nil {
		return nil, err
	}
	masked := *job
	masked.History = maskEvents(job.History)
	return masked, nil
}

// maskEvents hides secrets in events: anyone who may publish events may put some into
// them.
func maskEvents(events []status.Event) []status.Event {
	masked := slices.Clone(events)
	for i := range masked {
		masked[i].Data = dlq.MaskJSON(masked[i].Data)
		if !json.Valid(masked[i].Data) {
			masked[i].Data = json.RawMessage("null")
		}
	}
	if masked == nil {
		return []status.Event{}
	}
	return masked
}

func (h *Handler) queues(ctx context.Context) (any, error) {
	f, err := h.o.Reader.Fleet(ctx)
	if err != nil {
		return nil, err
	}
	return queueList{f.Queues, f.CountedAll, h.fresh()}, nil
}

func (h *Handler) workers(ctx context.Context) (any, error) {
	list, err := h.o.Reader.Workers(ctx)
	if err != nil {
		return nil, err
	}
	return workerList{list, h.fresh()}, nil
}

func (h *Handler) circuits(ctx context.Context) (any, error) {
	f, err := h.o.Reader.Fleet(ctx)
	if err != nil {
		return nil, err
	}
	return circuitList{f.Circuits, h.fresh()}, nil
}

func (h *Handler) limits(ctx context.Context) (any, error) {
	list, err := h.o.Reader.Limits(ctx)
	if err != nil {
		return nil, err
	}
	return limitList{list, h.fresh()}, nil
}

func (h *Handler) storage(ctx context.Context) (any, error) {
	list, err := h.o.Reader.Storage(ctx)
	if err != nil {
		return nil, err
	}
	return storageList{list, h.fresh()}, nil
}

func (h *Handler) letters(ctx context.Context, r *http.Request) (any, error) {
	filter, limit, err := lettersQuery(r.URL.RawQuery, h.o.Now())
	if err != nil {
		return nil, err
	}
	list := letterList{DeadLetters: []dlq.Entry{}}
	for e, err := range h.o.Letters.List(ctx, filter, limit+1) { // one more says that there are more
		if err != nil {
			return nil, err
		}
		if len(list.DeadLetters) == limit {
			list.More = true
			break
		}
		list.DeadLetters = append(list.DeadLetters, e.Masked())
	}
	return list, nil
}

// letterSeq returns the sequence in the path.
func letterSeq(r *http.Request) (uint64, error) {
	seq, err := strconv.ParseUint(r.PathValue("seq"), 10, 64)
	if err != nil || seq == 0 {
		return 0, badRequest("%q is not a dead letter: want its seq, a number from 1", r.PathValue("seq"))
	}
	return seq, nil
}

func (h *Handler) letter(ctx context.Context, r *http.Request) (any, error) {
	seq, err := letterSeq(r)
	if err != nil {
		return nil, err
	}
	if err := noQuery(r.URL.RawQuery); err != nil {
		return nil, err
	}
	letter, err := h.o.Letters.Show(ctx, seq)
	if err != nil {
		return nil, err
	}
	return letter.Masked(), nil
}

func (h *Handler) alerts(ctx context.Context, r *http.Request) (any, error) {
	limit, err := limitQuery(r.URL.RawQuery)
	if err != nil {
		return nil, err
	}
	list, err := h.o.Reader.Alerts(ctx, limit)
	if err != nil {
		return nil, err
	}
	return alertList{maskEvents(list)}, nil
}

func (h *Handler) cost(ctx context.Context, r *http.Request) (any, error) {
	query, err := costQuery(r.URL.RawQuery, h.o.Now())
	if err != nil {
		return nil, err
	}
	select {
	case h.summing <- struct{}{}:
		defer func() { <-h.summing }()
	case <-ctx.Done():
		return nil, &failure{http.StatusServiceUnavailable, "other sums are still being made: ask again later"}
	}
	sums := costSums{Budgets: []budget.Spending{}}
	if sums.Rows, err = h.o.Costs.Sum(ctx, query); err != nil {
		if errors.Is(err, cost.ErrBy) {
			return nil, badRequest("by %q: %s", query.By, cost.ErrBy)
		}
		return nil, err
	}
	if h.o.Budgets != nil {
		list, err := h.o.Budgets(ctx)
		if err != nil {
			return nil, err
		}
		sums.Budgets = append(sums.Budgets, list...)
	}
	return sums, nil
}

func (h *Handler) recordings(ctx context.Context, r *http.Request) (any, error) {
	limit, err := limitQuery(r.URL.RawQuery)
	if err != nil {
		return nil, err
	}
	list, err := h.o.Recordings(ctx)
	if err != nil {
		return nil, err
	}
	more := len(list) > limit
	if more {
		list = list[:limit]
	}
	return recordingList{list, more}, nil
}
