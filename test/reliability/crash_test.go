package reliability

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
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

// crashPoints are the named points between pulling a job and acknowledging it,
// with the kinds of jobs that pass each.
func crashPoints() map[string][]string {
	both := []string{completing, dying}
	return map[string][]string{
		"delivered":        both,
		"before_takeover":  both,
		"takeover":         both,
		"connected":        both,
		"first_frame":      both,
		"delivered_frames": {completing, recorded},
		"checkpoint":       {completing, recorded},
		"session_closed":   {completing, dying, retried, recorded},
		"before_failure":   {retried},
		"failure":          {retried},
		"before_nak":       {retried},
		"before_outcome":   {completing, dying, recorded},
		"outcome":          {completing, dying, recorded},
		"usage_record":     {completing, dying, retried, recorded},
		"usage":            {completing, dying, retried, recorded},
		"totals":           {completing, dying},
		"error_event":      {dying, retried},
		"dead_letter":      {dying},
		"event":            {completing, dying, retried},
		"before_ack":       both,
		"released":         {drained},

		"lease_acquired": {completing},
		"lease_removal":  {drained},
		"limit_taken":    {limited},
		"limit_removal":  {limited},
		"giving_up":      {cutOff},
		"given_up":       {cutOff},

		"recording_chunk":     {recorded},
		"recording_overtaken": {recorded},
		"recording_visible":   {recorded},
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

// crashRow is what was found at one point.
type crashRow struct {
	point, kind string
	report      invariant.Report
}

func TestAWorkerKilledAtAnyNamedPointLosesNothingAndSettlesNothingTwice(t *testing.T) {
	if testing.Short() {
		t.Skip("kills a worker process at each of the named points: not with -short")
	}
	t.Parallel()
	workerBinary(t)
	var mu sync.Mutex
	var rows []crashRow
	t.Run("points", func(t *testing.T) {
		for point, kinds := range crashPoints() {
			for _, kind := range kinds {
				t.Run(point+"/"+kind, func(t *testing.T) {
					t.Parallel()
					row := crashRow{point, kind, crashAt(t, point, kind)}
					mu.Lock()
					defer mu.Unlock()
					rows = append(rows, row)
				})
			}
		}
	})
	slices.SortFunc(rows, func(a, b crashRow) int { return strings.Compare(a.point+a.kind, b.point+b.kind) })
	var table strings.Builder
	for _, r := range rows {
		fmt.Fprintf(&table, "| `%s` | %s | %d | %d | %d | %d | %d | %d |\n", r.point, r.kind, r.report.Jobs,
			r.report.Sessions, r.report.Again, r.report.Crashes, r.report.Repeated, len(r.report.Violations))
	}
	t.Logf("point, jobs killed, jobs, sessions, run again, crashes counted, events repeated, violations:\n%s", table.String())
}

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
		f.await("running", 10*time.Second, 3, running)
		victim.signal(syscall.SIGTERM)
	case cutOff:
		f.await("running", 10*time.Second, 3, running)
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
	f.settle(30 * time.Second)
	for _, at := range heir.leasesLost() { // the lease is short, and the machine runs many workers
		f.fault(invariant.Fault{Kind: "lease lost on a busy machine", WorkerID: heir.workerID(), Start: at.Add(-f.lease), End: at})
	}
	report, _ := f.check()
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

func TestEveryNamedPointOfTheSourceIsInTheCrashTest(t *testing.T) {
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
	points := crashPoints()
	for _, name := range found {
		if points[name] == nil {
			t.Errorf("failpoint %q is not in the crash test's table: add it with the kinds of jobs that pass it", name)
		}
	}
	for name := range points {
		if !slices.Contains(found, name) {
			t.Errorf("the crash test's table names failpoint %q, which is not in the source", name)
		}
	}
}
