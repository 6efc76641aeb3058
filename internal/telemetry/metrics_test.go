package telemetry

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"avatarworker/internal/errors"
)

func newMetrics(t *testing.T) (*Metrics, *prometheus.Registry) {
	t.Helper()
	reg := prometheus.NewRegistry()
	return NewMetrics(reg, Labels{Queues: []string{"default", "vip"}, Apps: []string{"a"}, Outputs: []string{"frames", "object"}, Version: "v1.2.3"}, Readings{
		Ready:   func() bool { return true },
		Waiting: func() (retrying, held int) { return 4, 6 },
	}), reg
}

// use calls every method with values that are known.
func use(m *Metrics) {
	m.JobDone("default", "completed")
	m.Attempt(errors.CodeUpstreamError, errors.ClassServer, errors.PhaseRuntime)
	m.Attempt("", "", "")
	m.TakeOver("new")
	m.TakeOver("held")
	m.LeaseExtension("ok")
	m.DeadLetter(errors.CodeAvatarNotFound)
	m.Alert("recurring", string(errors.CodeServerError))
	m.Alert("storage", "object")
	m.Alert("worker_key", string(errors.CodeSessionTokenExpired))
	m.Alert("unsettled", "sessions")
	m.Alert("budget", "spent")
	m.Frames("frames", 1, 49868)
	m.SessionStarted("a")
	m.SessionStarted("a")
	m.SessionEnded("a", 20*time.Second)
	m.FirstFrame(120 * time.Millisecond)
	m.Utterance(3 * time.Second)
	m.SetSlots(3, 13)
	m.SetQueue("vip", QueueState{Runnable: 5, Waiting: 2, Oldest: 1500 * time.Millisecond})
	m.SetCircuit("a", "us-west", true)
	m.SetNATSConnected(true)
}

func TestMetricsFollowPrometheusConventions(t *testing.T) {
	m, reg := newMetrics(t)
	use(m)
	problems, err := testutil.GatherAndLint(reg)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestEveryMethodMovesItsMetric(t *testing.T) {
	m, reg := newMetrics(t)
	use(m)
	got := gather(t, reg)
	for series, want := range map[string]float64{
		`jobs_total{outcome="completed",queue="default"}`:                               1,
		`jobs_total{outcome="expired",queue="vip"}`:                                     0,
		`attempts_total{class="server",code="upstreamError",phase="websocket_runtime"}`: 1,
		`attempts_total{class="none",code="ok",phase="none"}`:                           1,
		`takeovers_total{reason="new"}`:                                                 1,
		`takeovers_total{reason="held"}`:                                                1,
		`lease_extensions_total{result="ok"}`:                                           1,
		`dead_letters_total{code="avatarNotFound"}`:                                     1,
		`alerts_total{code="serverError",kind="recurring"}`:                             1,
		`alerts_total{code="sessions",kind="unsettled"}`:                                1,
		`alerts_total{code="spent",kind="budget"}`:                                      1,
		`frames_total{output="frames"}`:                                                 1,
		`frame_bytes_total{output="frames"}`:                                            49868,
		`sessions_running{app="a"}`:                                                     1,
		`first_frame_seconds`:                                                           1,
		`session_seconds`:                                                               1,
		`utterance_seconds`:                                                             1,
		`slots{state="busy"}`:                                                           3,
		`slots{state="free"}`:                                                           13,
		`jobs_runnable{queue="vip"}`:                                                    5,
		`jobs_waiting{queue="vip"}`:                                                     2,
		`oldest_waiting_seconds{queue="vip"}`:                                           1.5,
		`retries_waiting`:                                                               4,
		`jobs_held`:                                                                     6,
		`circuit_open{app="a",region="us-west"}`:                                        1,
		`nats_connected`:                                                                1,
		`ready`:                                                                         1,
	} {
		if v, ok := got["avatar_worker_"+series]; !ok || v != want {
			t.Errorf("%s is %v (there: %v), want %v", series, v, ok, want)
		}
	}
	for _, name := range []string{"go_goroutines", "process_start_time_seconds"} {
		if _, ok := got[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
	if n := testutil.CollectAndCount(reg, "avatar_worker_build_info"); n != 1 {
		t.Errorf("%d build_info series", n)
	}
}

// gather gives every series by name and labels; of a histogram the count.
func gather(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	series := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			name := f.GetName()
			if len(labels) > 0 {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			series[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return series
}

func TestNoLabelTakesAnUnboundedValue(t *testing.T) {
	m, reg := newMetrics(t)
	for i := range 500 {
		outside := fmt.Sprintf("job-%d", i)
		m.JobDone(outside, outside)
		m.Attempt(errors.Code(outside), errors.Class(outside), errors.Phase(outside))
		m.TakeOver(outside)
		m.LeaseExtension(outside)
		m.DeadLetter(errors.Code(outside))
		m.Alert(outside, outside)
		m.Alert("storage", outside)
		m.Alert("unsettled", outside)
		m.Alert("budget", outside)
		m.Frames(outside, 1, 1)
		m.SessionStarted(outside)
		m.SetQueue(outside, QueueState{})
		m.SetCircuit(outside, outside, true)
	}
	count := 0
	for series := range gather(t, reg) {
		if strings.Contains(series, "job-") {
			count++
			if !strings.HasPrefix(series, "avatar_worker_circuit_open") {
				t.Errorf("%s has a value from outside", series)
			}
		}
	}
	if count != maxRegions {
		t.Errorf("%d regions are distinguished, want %d", count, maxRegions)
	}
}

func TestSessionsThatWereNeverConfirmedAreNotBilled(t *testing.T) {
	m, reg := newMetrics(t)
	m.SessionStarted("a")
	m.SessionEnded("a", 0)
	if got := gather(t, reg); got["avatar_worker_session_seconds"] != 0 || got[`avatar_worker_sessions_running{app="a"}`] != 0 {
		t.Errorf("got %v", got)
	}
}

func BenchmarkFrame(b *testing.B) {
	m := NewMetrics(prometheus.NewRegistry(), Labels{Outputs: []string{"frames"}}, Readings{})
	b.ReportAllocs()
	for b.Loop() {
		m.Frames("frames", 1, 49868)
	}
}
