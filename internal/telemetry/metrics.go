package telemetry

import (
	"runtime"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"avatarworker/internal/errors"
)

// Labels says which values the labels queue, app and output may take, so that a
// job can't make new ones; any other is counted as "other".
type Labels struct {
	Queues  []string
	Apps    []string
	Outputs []string // kinds of output
	Region  string   // where sessions start by default; others are added as they come
	Version string   // of the worker, for build_info
}

// Readings are called at each scrape, from any goroutine. One that is nil
// reads as 0.
type Readings struct {
	Ready   func() bool                 // what /readyz says
	Waiting func() (retrying, held int) // jobs handed back whose time has not come
}

// Metrics are the worker's. Every method may be called by several goroutines
// at once.
type Metrics struct {
	labels  Labels
	regions *firstSeen

	jobs            *prometheus.CounterVec
	attempts        *prometheus.CounterVec
	takeovers       *prometheus.CounterVec
	leaseExtensions *prometheus.CounterVec
	deadLetters     *prometheus.CounterVec
	alerts          *prometheus.CounterVec
	connected       *prometheus.CounterVec
	credits         *prometheus.CounterVec
	totals          *prometheus.CounterVec
	frames          map[string]frameCounters // by output; looked up once a frame

	sessions      *prometheus.GaugeVec
	slots         *prometheus.GaugeVec
	runnable      *prometheus.GaugeVec
	waiting       *prometheus.GaugeVec
	oldest        *prometheus.GaugeVec
	paused        *prometheus.GaugeVec
	storageBytes  *prometheus.GaugeVec
	storageLimit  *prometheus.GaugeVec
	circuit       *prometheus.GaugeVec
	natsConnected prometheus.Gauge
	leaseHeld     prometheus.Gauge

	start      *prometheus.HistogramVec
	firstFrame prometheus.Histogram
	session    prometheus.Histogram
	utterance  prometheus.Histogram
}

type frameCounters struct{ frames, bytes prometheus.Counter }

const (
	namespace  = "avatar_worker"
	maxRegions = 32
)

// NewMetrics registers every metric, and those of Go and of the process, with
// reg, which must not have them yet.
func NewMetrics(reg *prometheus.Registry, labels Labels, readings Readings) *Metrics {
	r := registrar{reg}
	m := &Metrics{labels: labels, regions: newFirstSeen(maxRegions)}
	m.counters(r)
	m.gauges(r)
	readings.gauges(r)
	m.histograms(r)
	build := r.gauges("build_info", "Always 1; the labels say what runs.", "version", "go_version")
	build.WithLabelValues(labels.Version, runtime.Version()).Set(1)
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.zero()
	return m
}

func (m *Metrics) counters(r registrar) {
	m.jobs = r.counters("jobs_total", "Jobs that ended, by queue and outcome.", "queue", "outcome")
	m.attempts = r.counters("attempts_total", `Attempts that ended; code "ok" where nothing failed.`, "code", "class", "phase")
	m.takeovers = r.counters("takeovers_total", "Sessions started, by why the job had none: new, retry, held, crash (its worker died), released (handed back).", "reason")
	m.leaseExtensions = r.counters("lease_extensions_total", "Renewals of the worker's lease, by result: ok, lost.", "result")
	m.deadLetters = r.counters("dead_letters_total", "Jobs given up, by error code.", "code")
	for _, code := range errors.Codes() {
		m.deadLetters.WithLabelValues(string(code)) // from 0, so that the first ones count as an increase
	}
	m.connected = r.counters("connected_seconds_total", "Connected time of sessions that are in the ledger: what is billed.", "app", "queue")
	m.credits = r.counters("credits_total", "Credits of sessions that are in the ledger.", "app", "queue")
	m.totals = r.counters("totals_updates_total", "Times that usage records were added to the cost counters, by result: ok, failed (it is tried again).", "result")
	m.alerts = r.counters("alerts_total", "Alerts published, by kind and by error code (kind storage: by output; unsettled: sessions; budget: warning or spent).", "kind", "code")
	frames := r.counters("frames_total", "Frame envelopes received, by the kind of output they went to.", "output")
	frameBytes := r.counters("frame_bytes_total", "Bytes of frame envelopes received, by the kind of output they went to.", "output")
	m.frames = map[string]frameCounters{}
	for _, output := range append(slices.Clone(m.labels.Outputs), other) {
		m.frames[output] = frameCounters{frames.WithLabelValues(output), frameBytes.WithLabelValues(output)}
	}
}

func (m *Metrics) gauges(r registrar) {
	m.sessions = r.gauges("sessions_running", "Sessions that this worker runs, by app.", "app")
	m.slots = r.gauges("slots", "Slots of this worker, each for one session: busy and free.", "state")
	m.runnable = r.gauges("jobs_runnable", "Jobs of the queue that run or could run now, in the whole fleet: neither in backoff nor held. For autoscaling.", "queue")
	m.waiting = r.gauges("jobs_waiting", "Jobs of the queue that no worker has yet, in the whole fleet.", "queue")
	m.oldest = r.gauges("oldest_waiting_seconds", "Age of the oldest job of the queue that no worker has yet; 0 where none waits.", "queue")
	m.paused = r.gauges("queue_paused", "1 while an operator has paused the queue, in the whole fleet.", "queue")
	m.storageBytes = r.gauges("storage_bytes", "Bytes that a stream or bucket holds.", "store")
	m.storageLimit = r.gauges("storage_limit_bytes", "Bytes that a stream or bucket may hold; absent where it has no limit.", "store")
	m.circuit = r.gauges("circuit_open", "1 while the circuit of the app in the region is open.", "app", "region")
	m.natsConnected = r.gauge("nats_connected", "1 while connected to NATS.")
	m.leaseHeld = r.gauge("lease_held", "1 while the worker renews its lease, without which it starts no session. A new lease counts from its first renewal, a quarter of lease.ack_wait later.")
}

func (rd Readings) gauges(r registrar) {
	if rd.Ready == nil {
		rd.Ready = func() bool { return false }
	}
	if rd.Waiting == nil {
		rd.Waiting = func() (retrying, held int) { return 0, 0 }
	}
	r.reading("retries_waiting", "Jobs that this worker handed back for a later attempt and whose time has not come.",
		func() float64 { retrying, _ := rd.Waiting(); return float64(retrying) })
	r.reading("jobs_held", "Held jobs that this worker handed back and whose time has not come: for a circuit, storage or another reason.",
		func() float64 { _, held := rd.Waiting(); return float64(held) })
	r.reading("ready", "1 while the worker takes jobs, as /readyz says.",
		func() float64 { return oneIf(rd.Ready()) })
}

func (m *Metrics) histograms(r registrar) {
	m.start = r.histograms("start_wait_seconds", "From a job's publication to the start of its first session, by queue.", []string{"queue"},
		.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14400)
	m.firstFrame = r.histogram("first_frame_seconds", "From an utterance's first speech sent to its first frame.",
		.025, .05, .1, .2, .3, .5, .75, 1, 1.5, 2, 3, 5, 10, 20, 30)
	m.session = r.histogram("session_seconds", "Connected time of sessions: what is billed.",
		1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)
	m.utterance = r.histogram("utterance_seconds", "From an utterance's first speech sent to its last frame.",
		.25, .5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300, 600)
}

func outcomes() []string { return []string{"completed", "dead_lettered", "expired", "cancelled"} }
func reasons() []string  { return []string{"new", "retry", "held", "crash", "released"} }
func results() []string  { return []string{"ok", "lost"} }
func kinds() []string {
	return []string{"recurring", "circuit_opened", "circuit_closed", "storage", "worker_key", "unsettled", "budget"}
}

// zero makes the series that are known beforehand: a rate needs its first
// value, and an absent series looks like a worker that does not count.
func (m *Metrics) zero() {
	for _, queue := range m.labels.Queues {
		for _, outcome := range outcomes() {
			m.jobs.WithLabelValues(queue, outcome)
		}
		m.start.WithLabelValues(queue)
	}
	for _, reason := range reasons() {
		m.takeovers.WithLabelValues(reason)
	}
	for _, result := range results() {
		m.leaseExtensions.WithLabelValues(result)
	}
	for _, app := range m.labels.Apps {
		m.sessions.WithLabelValues(app)
		if m.labels.Region != "" {
			m.SetCircuit(app, m.labels.Region, false)
		}
		for _, queue := range m.labels.Queues {
			m.connected.WithLabelValues(app, queue)
			m.credits.WithLabelValues(app, queue)
		}
	}
	for _, code := range errors.Codes() {
		m.alerts.WithLabelValues("recurring", string(code))
		m.alerts.WithLabelValues("worker_key", string(code))
	}
	for _, output := range m.labels.Outputs {
		m.alerts.WithLabelValues("storage", output)
	}
	m.alerts.WithLabelValues("unsettled", "sessions")
	m.alerts.WithLabelValues("budget", "warning")
	m.alerts.WithLabelValues("budget", "spent")
	for _, result := range []string{"ok", "failed"} {
		m.totals.WithLabelValues(result)
	}
	m.SetSlots(0, 0)
}

// JobDone counts a job's outcome.
func (m *Metrics) JobDone(queue, outcome string) {
	m.jobs.WithLabelValues(known(queue, m.labels.Queues), known(outcome, outcomes())).Inc()
}

// Attempt counts an attempt that ended; code "" where nothing failed.
func (m *Metrics) Attempt(code errors.Code, class errors.Class, phase errors.Phase) {
	m.attempts.WithLabelValues(codeLabel(code), classLabel(class), phaseLabel(phase)).Inc()
}

// TakeOver counts a session that a worker starts; reason is new, retry, held,
// crash or released.
func (m *Metrics) TakeOver(reason string) {
	m.takeovers.WithLabelValues(known(reason, reasons())).Inc()
}

// StartWait observes the time from a job's publication to the start of its first
// session.
func (m *Metrics) StartWait(queue string, d time.Duration) {
	m.start.WithLabelValues(known(queue, m.labels.Queues)).Observe(max(d, 0).Seconds())
}

// SetStorage sets how many bytes a stream or bucket holds, and how many it may hold
// (0: no limit). The stores are the few that a worker needs.
func (m *Metrics) SetStorage(store string, bytes, limit int64) {
	m.storageBytes.WithLabelValues(store).Set(float64(bytes))
	if limit > 0 {
		m.storageLimit.WithLabelValues(store).Set(float64(limit))
	} else {
		m.storageLimit.DeleteLabelValues(store)
	}
}

// LeaseExtension counts a renewal of the worker's lease; result is ok or lost. The
// worker holds its lease after ok, and does not after lost.
func (m *Metrics) LeaseExtension(result string) {
	m.leaseExtensions.WithLabelValues(known(result, results())).Inc()
	switch result {
	case "ok":
		m.leaseHeld.Set(1)
	case "lost":
		m.leaseHeld.Set(0)
	}
}

// DeadLetter counts a job given up.
func (m *Metrics) DeadLetter(code errors.Code) {
	m.deadLetters.WithLabelValues(codeLabel(code)).Inc()
}

// Alert counts an alert published. kind is recurring, circuit_opened,
// circuit_closed, storage, worker_key, unsettled or budget. about is the last token of its
// subject: an error code, with storage the kind of an output, with unsettled
// "sessions".
func (m *Metrics) Alert(kind, about string) {
	label := codeLabel(errors.Code(about))
	switch kind {
	case "storage":
		label = known(about, m.labels.Outputs)
	case "unsettled":
		label = known(about, []string{"sessions"})
	case "budget":
		label = known(about, []string{"warning", "spent"})
	}
	m.alerts.WithLabelValues(known(kind, kinds()), label).Inc()
}

// Frames counts envelopes of so many bytes in all; output is the kind that they
// went to, one of Labels.Outputs.
func (m *Metrics) Frames(output string, frames int, bytes int64) {
	counters, ok := m.frames[output]
	if !ok {
		counters = m.frames[other]
	}
	counters.frames.Add(float64(frames))
	counters.bytes.Add(float64(bytes))
}

// SessionStarted counts a running session of the app until SessionEnded.
func (m *Metrics) SessionStarted(app string) {
	m.sessions.WithLabelValues(known(app, m.labels.Apps)).Inc()
}

// SessionEnded takes back one SessionStarted. connected is the billed time; 0
// where the backend never confirmed.
func (m *Metrics) SessionEnded(app string, connected time.Duration) {
	m.sessions.WithLabelValues(known(app, m.labels.Apps)).Dec()
	if connected > 0 {
		m.session.Observe(connected.Seconds())
	}
}

// Used counts a session that the ledger has taken.
func (m *Metrics) Used(app, queue string, connected time.Duration, credits int64) {
	app, queue = known(app, m.labels.Apps), known(queue, m.labels.Queues)
	m.connected.WithLabelValues(app, queue).Add(max(connected, 0).Seconds())
	m.credits.WithLabelValues(app, queue).Add(float64(max(credits, 0)))
}

// TotalsAdded counts a time that usage records were added to the counters.
func (m *Metrics) TotalsAdded(ok bool) {
	if ok {
		m.totals.WithLabelValues("ok").Inc()
	} else {
		m.totals.WithLabelValues("failed").Inc()
	}
}

// FirstFrame takes the time from an utterance's first speech to its first frame.
func (m *Metrics) FirstFrame(d time.Duration) { m.firstFrame.Observe(d.Seconds()) }

// Utterance takes the time from an utterance's first speech to its last frame.
func (m *Metrics) Utterance(d time.Duration) { m.utterance.Observe(d.Seconds()) }

// SetSlots says how many places for sessions are taken and free.
func (m *Metrics) SetSlots(busy, free int) {
	m.slots.WithLabelValues("busy").Set(float64(busy))
	m.slots.WithLabelValues("free").Set(float64(free))
}

// QueueState is the state of a queue in the whole fleet.
type QueueState struct {
	Runnable int           // waiting and running, neither in backoff nor held
	Waiting  int           // no worker has them yet
	Oldest   time.Duration // age of the oldest of those; 0: none waits
	Paused   bool          // an operator has paused it
}

// SetQueue sets the state of a queue.
func (m *Metrics) SetQueue(queue string, state QueueState) {
	label := known(queue, m.labels.Queues)
	m.runnable.WithLabelValues(label).Set(float64(state.Runnable))
	m.waiting.WithLabelValues(label).Set(float64(state.Waiting))
	m.oldest.WithLabelValues(label).Set(state.Oldest.Seconds())
	m.paused.WithLabelValues(label).Set(oneIf(state.Paused))
}

// SetCircuit sets whether the circuit of an app and region is open.
func (m *Metrics) SetCircuit(app, region string, open bool) {
	m.circuit.WithLabelValues(known(app, m.labels.Apps), m.regions.label(region)).Set(oneIf(open))
}

// SetNATSConnected sets whether NATS can be reached.
func (m *Metrics) SetNATSConnected(connected bool) { m.natsConnected.Set(oneIf(connected)) }

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// registrar makes metrics under our namespace and registers them.
type registrar struct{ reg prometheus.Registerer }

func (r registrar) counters(name, help string, labels ...string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, labels)
	r.reg.MustRegister(c)
	return c
}

func (r registrar) gauges(name, help string, labels ...string) *prometheus.GaugeVec {
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help}, labels)
	r.reg.MustRegister(g)
	return g
}

func (r registrar) gauge(name, help string) prometheus.Gauge {
	g := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help})
	r.reg.MustRegister(g)
	return g
}

// reading is a gauge whose value is read at each scrape.
func (r registrar) reading(name, help string, read func() float64) {
	r.reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help}, read))
}

func (r registrar) histogram(name, help string, buckets ...float64) prometheus.Histogram {
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: namespace, Name: name, Help: help, Buckets: buckets})
	r.reg.MustRegister(h)
	return h
}

func (r registrar) histograms(name, help string, labels []string, buckets ...float64) *prometheus.HistogramVec {
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: namespace, Name: name, Help: help, Buckets: buckets}, labels)
	r.reg.MustRegister(h)
	return h
}
