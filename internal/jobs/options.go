package jobs

import (
	"context"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.opentelemetry.io/otel/trace"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/alert"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/fetch"
	"avatarworker/internal/jobs/ledger"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/limit"
	"avatarworker/internal/topology"
)

// Options configure a Worker. All fields are required, except where stated otherwise.
type Options struct {
	Stores
	Profile
	Accounts
	Policy
	Parts
}

// Stores are the connection to NATS and what the worker uses there.
type Stores struct {
	NC    *nats.Conn
	JS    jetstream.JetStream
	Names topology.Names

	Jobs   jetstream.Stream   // the jobs stream
	Events jetstream.Stream   // the events stream
	State  jetstream.KeyValue // job records
	Fleet  jetstream.KeyValue // what workers share
	// Consumer checks that the consumer of a queue exists, and creates it again if
	// it was deleted.
	Consumer func(ctx context.Context, queue string) error
}

// Profile is what the worker is called, what it takes and how long.
type Profile struct {
	Name        string // of the worker
	ID          string // its name and start: no two starts have the same
	Version     string
	Queues      []fetch.Queue
	Concurrency int           // sessions at a time
	InHand      int           // jobs that have a session or are being finished, at most; 0: twice Concurrency
	AckWait     time.Duration // of a message; a lease lasts as long
	Drain       time.Duration // how long sessions may go on after a drain begins
	// SettleTimeout bounds writing what became of a job, and what a session has
	// reached. 0: 30 s.
	SettleTimeout time.Duration

	// AudioConvert and AudioMaxBytes are what this worker takes as speech. Its
	// presence has them, for publishers.
	AudioConvert  bool
	AudioMaxBytes int64
}

// Accounts are the apps that jobs run under, and how much they may use.
type Accounts struct {
	DefaultApp    string
	DefaultRegion string
	KnownApp      func(app string) bool // has credentials
	Apps          []string              // that there are credentials for
	MaxSessions   map[string]int        // by app, over the fleet; absent: no limit
	Limits        []limit.Rule          // further session limits
	Budgets       []budget.Rule         // may be nil; they need a Ledger
	CostLeast     int64                 // credits that a session costs at least
	// CheckKey mints a token with this worker's own key of an app; nil: the keys
	// are not checked.
	CheckKey func(ctx context.Context, app string) error
	// Ledger makes what keeps what each session used, by the server's clock; nil:
	// nothing does.
	Ledger func(now func() time.Time) ledger.Ledger
	// Totals: there are counters to which usage records are added, by TotalLabels
	// too, which are sorted.
	Totals      bool
	TotalLabels []string
	// Storage checks our own streams and buckets; nil: they always take what jobs
	// make.
	Storage Storage
}

// Policy is what follows from a failure.
type Policy struct {
	Retry    lifecycle.RetryPolicy
	Circuit  circuit.Config
	PerApp   bool          // one circuit for all regions of an app
	MaxHold  time.Duration // a job held longer in all is given up
	Patience time.Duration // for the bucket that keeps the circuits; 0: 10 s
	Alerts   alert.Config
	Table    *errors.Table
}

// Parts are what the worker calls.
type Parts struct {
	// Started is called once, when the worker begins to take jobs. It may be nil.
	Started func()

	Runner      Runner
	DeadLetters DeadLetters
	Observer    Observer
	Tracer      trace.Tracer
	Logger      zerolog.Logger
	Now         func() time.Time
	Random      func() float64 // in [0, 1)
}
