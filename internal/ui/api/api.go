// Package api serves what the pages show as JSON, under /api/v1, and what they change if
// that is allowed. It owns the paths, the parameters and the OpenAPI document that
// describes them. It must not know who asks: authentication and the check of the Host
// header are the server's that mounts it.
package api

import (
	"context"
	_ "embed" // the OpenAPI document
	"encoding/json"
	"fmt"
	"iter"
	"mime"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/operate"
	"avatarworker/internal/output"
	"avatarworker/internal/status"
)

// Prefix begins the path of everything that a Handler serves.
const Prefix = "/api/v1"

// Reader answers questions about jobs and the fleet: a *status.Model, or a *status.Store.
type Reader interface {
	Fleet(ctx context.Context) (*status.Fleet, error)
	Jobs(ctx context.Context, q status.Query) (status.List, error)
	Job(ctx context.Context, id string) (*status.Job, error)
	Workers(ctx context.Context) ([]status.Worker, error)
	Storage(ctx context.Context) ([]status.Storage, error)
	Limits(ctx context.Context) ([]status.Limit, error)
	Failures(ctx context.Context) (status.Failures, error)
	Alerts(ctx context.Context, limit int) ([]status.Event, error)
}

var (
	_ Reader  = (*status.Model)(nil)
	_ Reader  = (*status.Store)(nil)
	_ Costs   = (*cost.Store)(nil)
	_ Letters = (*dlq.Store)(nil)
	_ Changes = (*operate.Operator)(nil)
)

// Costs sums what sessions cost: a *cost.Store.
type Costs interface {
	Sum(ctx context.Context, q cost.Query) ([]cost.Row, error)
}

// Letters lists and changes dead letters: a *dlq.Store.
type Letters interface {
	List(ctx context.Context, f dlq.Filter, limit int) iter.Seq2[dlq.Entry, error]
	Show(ctx context.Context, seq uint64) (dlq.Letter, error)
	Replay(ctx context.Context, seq uint64, o dlq.ReplayOptions) (dlq.Result, error)
	Remove(ctx context.Context, seq uint64) error
}

// Changes changes jobs, queues, circuits and workers: a *operate.Operator.
type Changes interface {
	Cancel(ctx context.Context, jobID string, ifUnknown bool) (control.Reply, error)
	Retry(ctx context.Context, jobID string, probe bool) (operate.Retried, error)
	Pause(ctx context.Context, queue string, d time.Duration) (time.Time, error)
	Resume(ctx context.Context, queue string) (was bool, err error)
	Drain(ctx context.Context, workerID string) (operate.Draining, error)
	OpenCircuits(ctx context.Context, app string, region *string) ([]circuit.Circuit, error)
	ProbeCircuit(ctx context.Context, c circuit.Circuit) (circuit.Circuit, string, error)
	CloseCircuit(ctx context.Context, app, region string) (circuit.Circuit, error)
}

// Options configure a Handler. All fields are required, except where stated otherwise.
type Options struct {
	Reader     Reader
	Letters    Letters
	Recordings func(ctx context.Context) ([]output.Stored, error)
	Costs      Costs
	// Budgets returns what is spent of each budget of the configuration in its period
	// that now lies in.
	Budgets status.Budgets
	// Changes opens what changes things. It is called for each change.
	Changes func(ctx context.Context) (Changes, error)
	// Permitted begins a change: its context ends early if NATS refuses what the change
	// needs, and explain turns the change's error into one that says so; may be nil.
	Permitted func(ctx context.Context) (_ context.Context, explain func(error) error)
	// Write allows changes. Without it they are refused with 403.
	Write bool
	// Refresh is called after a change, so that the next answer shows it; may be nil. A
	// *status.Model has it.
	Refresh    func(ctx context.Context) error
	DefaultApp string        // of jobs that name none: app.id of the configuration
	Table      *errors.Table // of error codes; nil: without a policy
	Now        func() time.Time
	Log        zerolog.Logger
}

// Handler serves the API. It is safe for concurrent use.
type Handler struct {
	o   Options
	mux *http.ServeMux
	// summing bounds the sums at a time: some read every usage record.
	summing chan struct{}
}

// maxSums is how many sums are made at a time.
const maxSums = 2

//go:embed openapi.json
var document []byte

// Times that bound one request.
const (
	readTimeout   = 30 * time.Second
	changeTimeout = time.Minute
)

// New returns the Handler of everything under Prefix.
func New(o Options) (*Handler, error) {
	if o.Table == nil {
		table, err := errors.NewTable(nil)
		if err != nil {
			return nil, err
		}
		o.Table = table
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	h := &Handler{o: o, mux: http.NewServeMux(), summing: make(chan struct{}, maxSums)}
	for _, r := range h.routes() {
		h.mux.HandleFunc(r.method+" "+Prefix+r.path, h.serve(r))
	}
	h.mux.HandleFunc("GET "+Prefix+"/openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		write(w, http.StatusOK, document)
	})
	h.mux.HandleFunc(Prefix+"/", func(w http.ResponseWriter, r *http.Request) {
		if allowed := h.methods(r); len(allowed) > 0 {
			w.Header().Set("Allow", strings.Join(allowed, ", "))
			writeError(w, http.StatusMethodNotAllowed, fmt.Sprintf("%s is not for %s, but for %s", r.URL.Path, r.Method, strings.Join(allowed, " and ")))
			return
		}
		writeError(w, http.StatusNotFound, fmt.Sprintf("there is no %s: %s/openapi.json lists the paths", r.URL.Path, Prefix))
	})
	return h, nil
}

// ServeHTTP serves requests whose path begins with Prefix.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) { h.mux.ServeHTTP(w, r) }

// methods lists the methods that the request's path has.
func (h *Handler) methods(r *http.Request) (list []string) {
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		other := r.Clone(r.Context())
		other.Method = method
		if _, pattern := h.mux.Handler(other); strings.HasPrefix(pattern, method+" ") {
			list = append(list, method)
		}
	}
	return list
}

// route is one operation.
type route struct {
	method, path string
	// do returns what is answered, as JSON.
	do func(ctx context.Context, r *http.Request) (any, error)
}

func (h *Handler) routes() []route {
	return append(h.reads(), h.changes()...)
}

// serve runs a route and writes its answer.
func (h *Handler) serve(route route) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if v := recover(); v != nil {
				h.o.Log.Error().Str("path", r.URL.Path).Str("panic", errors.RedactText(fmt.Sprint(v))).Bytes("stack", debug.Stack()).Msg("API request failed")
				writeError(w, http.StatusInternalServerError, "internal error; see the log")
			}
		}()
		timeout := readTimeout
		if route.method == http.MethodPost {
			timeout = changeTimeout
			if err := h.mayChange(r); err != nil {
				h.fail(w, r, err)
				return
			}
		}
		ctx, cancel := context.WithTimeout(r.Context(), timeout)
		defer cancel()
		explain := func(err error) error { return err }
		if route.method == http.MethodPost && h.o.Permitted != nil {
			ctx, explain = h.o.Permitted(ctx)
		}
		v, err := route.do(ctx, r)
		if err = explain(err); err != nil {
			h.fail(w, r, err)
			return
		}
		code := http.StatusOK
		if c, ok := v.(coded); ok {
			code = c.code()
		}
		data, err := json.Marshal(v)
		if err != nil {
			h.fail(w, r, err)
			return
		}
		if route.method == http.MethodPost && h.o.Refresh != nil {
			h.refresh(r.Context())
		}
		write(w, code, data)
	}
}

// refreshTimeout bounds the wait until what was changed can be seen.
const refreshTimeout = 2 * time.Second

func (h *Handler) refresh(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	if err := h.o.Refresh(ctx); err != nil {
		h.o.Log.Debug().Err(err).Msg("reading what an API request changed")
	}
}

// coded is an answer with a status other than 200.
type coded interface{ code() int }

// mayChange returns an error if changes are not allowed, or if the request could be a
// form of another site: a browser sends this content type for no form.
func (h *Handler) mayChange(r *http.Request) error {
	if !h.o.Write {
		return &failure{http.StatusForbidden, "changes are switched off: set ui.write"}
	}
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return &failure{http.StatusUnsupportedMediaType, "want Content-Type: application/json, also without a body"}
	}
	return nil
}

// failure is an error with its HTTP status.
type failure struct {
	status int
	text   string
}

func (f *failure) Error() string { return f.text }

func badRequest(format string, args ...any) error {
	return &failure{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

func (h *Handler) fail(w http.ResponseWriter, r *http.Request, err error) {
	var f *failure
	code := http.StatusServiceUnavailable
	switch {
	case errors.As(err, &f):
		code = f.status
	case errors.Is(err, status.ErrNoJob), errors.Is(err, dlq.ErrNoLetter), errors.Is(err, operate.ErrNoQueue),
		errors.Is(err, operate.ErrNoWorker), errors.Is(err, circuit.ErrNone):
		code = http.StatusNotFound
	case errors.Is(err, jetstream.ErrStreamNotFound), errors.Is(err, jetstream.ErrBucketNotFound):
		err = fmt.Errorf("no worker has run here yet: %w", err)
	case r.Context().Err() != nil: // the client has gone
	default:
		h.o.Log.Warn().Err(err).Str("path", r.URL.Path).Msg("API request failed")
	}
	writeError(w, code, errors.RedactText(err.Error()))
}

// problem is the body of every answer that is an error.
type problem struct {
	Error string `json:"error"` // what was wrong, and what to do
}

func writeError(w http.ResponseWriter, code int, text string) {
	data, err := json.Marshal(problem{text})
	if err != nil {
		data = []byte(`{"error":"internal error"}`) // a string can always be encoded
	}
	write(w, code, data)
}

func write(w http.ResponseWriter, code int, data []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	for _, part := range [][]byte{data, {'\n'}} {
		_, _ = w.Write(part) // if it fails the client has gone
	}
}
