package reliability

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/test/reliability/invariant"
)

// The kinds of jobs that the crash test breaks.
const (
	completing = "completing"
	dying      = "dead-lettered"
	retried    = "retried"
	drained    = "drained"
	recorded   = "recorded"
	limited    = "limited" // by max_sessions
	cutOff     = "cut off" // with their worker from NATS, past its lease
)

// crashPoint is a named point between pulling a job and acknowledging it.
type crashPoint struct {
	name     string
	happened string   // just before it, as docs/reliability.md says it
	kinds    []string // of the jobs that pass it
}

// crashPoints are the named points, in the order in which a worker and its jobs pass
// them.
func crashPoints() []crashPoint {
	both := []string{completing, dying}
	recordings := []string{recorded}
	settled := []string{completing, dying, recorded}
	ended := []string{completing, dying, retried, recorded}
	return []crashPoint{
		{"lease_acquired", "the worker has its lease, and no job yet", []string{completing}},
		{"delivered", "the message is here; its record is not read", both},
		{"limit_taken", "a key of a session limit is the job's", []string{limited}},
		{"before_takeover", "the job is admitted; nothing of that is written", both},
		{"takeover", "the record says `running`; there is no connection", both},
		{"connected", "the backend has confirmed the session; the record does not say so", both},
		{"first_frame", "the first frame has come, and the circuit knows that a session works", both},
		{"recording_chunk", "a chunk of the recording is stored", recordings},
		{"recording_overtaken", "the first chunk of a later session is stored; those of the session before, past its checkpoint, are still there", recordings},
		{"delivered_frames", "all frames of an utterance are out; the checkpoint has not moved", []string{completing, recorded}},
		{"checkpoint", "the checkpoint has moved", []string{completing, recorded}},
		{"session_closed", "the session is closed; nothing of that is written", ended},
		{"usage_record", "the same; the usage record is about to be sent", ended},

		{"before_outcome", "the usage record is sent, perhaps not stored; the outcome is not written", settled},
		{"outcome", "the outcome is written; nothing that follows is done", settled},
		{"before_failure", "as `before_outcome`, of a failed attempt that will be retried", []string{retried}},
		{"failure", "`retrying` is written; nothing that follows is done", []string{retried}},
		{"released", "`released` is written, as the drain time was up; nothing that follows is done", []string{drained}},
		{"giving_up", "the lease was lost, so the session is closed; nothing is written", []string{cutOff}},
		{"given_up", "the same; the worker has tried to write the release and the usage record, which may or may not be stored", []string{cutOff}},
		{"limit_removal", "the outcome is written; the key of the session limit is still the job's", []string{limited}},

		{"usage", "the usage record is stored", ended},
		{"totals", "the counters of the ledger have it, in the background", both},
		{"recording_visible", "the recording can be read under its name; what it replaces is still there", recordings},
		{"error_event", "the error event is stored", []string{dying, retried}},
		{"dead_letter", "the dead letter is stored", []string{dying}},
		{"event", "the job event is stored: nothing is left to be done", []string{completing, dying, retried}},
		{"before_nak", "the same; the message is not handed back for its wait", []string{retried}},
		{"before_ack", "the same; the message is not acknowledged", both},
		{"lease_removal", "a worker that stops has settled its jobs; its lease is still there", []string{drained}},
	}
}

// crashJob makes one job of a kind. All but the drained ones open a session and
// have frames. Of a recorded one's utterance a chunk is stored when the
// connection is cut.
func crashJob(kind, id string) map[string]any {
	switch kind {
	case dying:
		j := withFrames(job(id, "fail-serverError", 2))
		j["max_attempts"] = 1
		j["utterances"] = []any{silence(3)} // fails after its first frame
		return j
	case retried:
		return withFrames(job(id, "flaky-serverError-1-"+id, 2))
	case recorded:
		j := job(id, "drop-once-5-"+id, 1)
		j["utterances"] = []any{silence(20)}
		j["output"] = map[string]any{"object": map[string]any{}}
		return j
	case drained, cutOff:
		return withFrames(job(id, "slow-1500", 2))
	default:
		return withFrames(job(id, "ok", 2))
	}
}

func TestAWorkerKilledAtAnyNamedPointLosesNothingAndSettlesNothingTwice(t *testing.T) {
	if testing.Short() {
		t.Skip("kills a worker process at each of the named points: not with -short")
	}
	t.Parallel()
	workerBinary(t)
	points := crashPoints()
	again := make([][]int, len(points)) // by point and kind
	t.Run("points", func(t *testing.T) {
		for i, p := range points {
			again[i] = make([]int, len(p.kinds))
			for k, kind := range p.kinds {
				t.Run(p.name+"/"+kind, func(t *testing.T) {
					t.Parallel()
					again[i][k] = crashAt(t, p.name, kind).Again
				})
			}
		}
	})
	var table strings.Builder
	for i, p := range points {
		fmt.Fprintf(&table, "%s ", p.row())
		for k, kind := range p.kinds {
			if k > 0 {
				table.WriteString(", ")
			}
			fmt.Fprintf(&table, "%d %s", again[i][k], kind)
		}
		table.WriteString(" |\n")
	}
	t.Logf("point, what has just happened, jobs run again:\n%s", table.String())
}

// row is the beginning of the point's row in docs/reliability.md.
func (p crashPoint) row() string { return fmt.Sprintf("| `%s` | %s |", p.name, p.happened) }

// crashAt kills a worker with jobs of one kind at a point, and lets another
// one finish.
func crashAt(t *testing.T, point, kind string) invariant.Report {
	f := newFleet(t, "", 2*time.Second)
	if kind == limited {
		f.env["AVATAR_APP_MAX_SESSIONS"] = "2"
	}
	var way *toxiproxy.Proxy // to NATS
	env := []string{"AVATAR_FAILPOINT=" + point, "AVATAR_WORKER_CONCURRENCY=4", "AVATAR_WORKER_DRAIN_TIMEOUT=200ms"}
	if kind == cutOff {
		way = f.proxy("nats", strings.TrimPrefix(f.env["NATS_URL"], "nats://"))
		env = append(env, "NATS_URL=nats://"+way.Listen)
	}
	victim := f.launch("victim", env...)
	if point != "lease_acquired" {
		victim.waitReady()
	}
	start := time.Now()
	for i := range 3 {
		f.publish(crashJob(kind, fmt.Sprintf("%s-%d", strings.NewReplacer("-", "", " ", "").Replace(kind), i)))
	}
	switch kind {
	case drained:
		f.await("running", 3, running)
		victim.signal(syscall.SIGTERM)
	case cutOff:
		f.await("running", 3, running)
		way.Stop()
		if !victim.waitEnd(f.lease + 500*time.Millisecond) {
			if err := way.Start(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !victim.waitEnd(15*time.Second) || !victim.killed() {
		t.Fatalf("the worker did not die at %q: no %s job passes a failpoint of that name; was it renamed?", point, kind)
	}
	f.fault(invariant.Fault{Kind: "kill at " + point, WorkerID: victim.workerID(), Start: start, End: time.Now()})
	for _, other := range []string{completing, dying, retried} {
		f.publish(crashJob(other, "later-"+strings.ReplaceAll(other, "-", "")))
	}
	if way != nil {
		way.Stop()
	}
	heir := f.worker("heir")
	f.settle()
	for _, p := range []*process{victim, heir} { // the lease is short, and the machine runs many workers
		for _, at := range p.leasesLost() {
			f.fault(invariant.Fault{Kind: "lease lost", WorkerID: p.workerID(), Start: at.Add(-f.lease), End: at})
		}
	}
	report, _ := f.check()
	if report.Repeated != 0 {
		t.Errorf("%d events are stored twice under one id", report.Repeated)
	}
	want := map[lifecycle.State]int{lifecycle.StateCompleted: 5, lifecycle.StateDeadLettered: 1}
	if kind == dying {
		want = map[lifecycle.State]int{lifecycle.StateCompleted: 2, lifecycle.StateDeadLettered: 4}
	}
	for outcome, n := range want {
		if report.Outcomes[outcome] != n {
			t.Errorf("%d jobs %s, want %d", report.Outcomes[outcome], outcome, n)
		}
	}
	return report
}

func TestEveryNamedPointOfTheSourceIsTriedAndExplained(t *testing.T) {
	call := regexp.MustCompile(`failpoint\.Here\("([^"]*)"\)`)
	var found []string
	root := filepath.Join("..", "..", "internal")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, m := range call.FindAllSubmatch(source, -1) {
			found = append(found, string(m[1]))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var names, rows []string
	for _, p := range crashPoints() {
		names, rows = append(names, p.name), append(rows, p.row())
	}
	for _, name := range found {
		if !slices.Contains(names, name) {
			t.Errorf("failpoint %q is not in the crash test's table: add it with the kinds of jobs that pass it", name)
		}
	}
	for _, name := range names {
		if !slices.Contains(found, name) {
			t.Errorf("the crash test's table names failpoint %q, which is not in the source", name)
		}
	}
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "reliability.md"))
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `[a-z_]+` \\| [^|]* \\|").FindAll(page, -1) {
		documented = append(documented, string(m))
	}
	if !slices.Equal(documented, rows) {
		t.Errorf("docs/reliability.md has other points, or in another order, than the crash test's table:\n%s\nwant\n%s", strings.Join(documented, "\n"), strings.Join(rows, "\n"))
	}
}
