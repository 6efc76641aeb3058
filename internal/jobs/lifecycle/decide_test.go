package lifecycle

import (
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
)

func TestRecordDecidesWhatBecomesOfADelivery(t *testing.T) {
	now := time.Unix(1000, 0)
	soon, before := now.Add(3*time.Second), now.Add(-time.Second)
	me := jobspec.Identity{ID: "j", Run: 2, StreamSeq: 7}
	at := func(state State, change ...func(*Record)) *Record {
		r := &Record{JobID: "j", Run: 2, StreamSeq: 7, State: state, NextAttemptAt: &before}
		for _, f := range change {
			f(r)
		}
		return r
	}
	run := func(n int) func(*Record) { return func(r *Record) { r.Run = n } }
	later := func(r *Record) { r.NextAttemptAt, r.UpdatedAt = &soon, before }
	other := func(r *Record) { r.StreamSeq = 6 }
	for name, c := range map[string]struct {
		record *Record
		want   Step
		wait   time.Duration
	}{
		"no record":                        {nil, StepProceed, 0},
		"made by a cancel":                 {&Record{Run: 1, State: StateReleased, CancelRequested: true}, StepProceed, 0},
		"run before, on its way":           {at(StateRunning, run(1)), StepWait, WaitForOutcome},
		"run before, over":                 {at(StateDeadLettered, run(1)), StepProceed, 0},
		"later run":                        {at(StateRunning, run(3)), StepDuplicate, 0},
		"other message":                    {at(StateRunning, other), StepContend, 0},
		"other message, over":              {at(StateCompleted, other), StepDuplicate, 0},
		"completed":                        {at(StateCompleted), StepEffects, 0},
		"dead-lettered":                    {at(StateDeadLettered), StepEffects, 0},
		"expired":                          {at(StateExpired), StepEffects, 0},
		"cancelled":                        {at(StateCancelled), StepEffects, 0},
		"running":                          {at(StateRunning), StepRunning, 0},
		"retrying, in time":                {at(StateRetrying), StepProceed, 0},
		"retrying, too early":              {at(StateRetrying, later), StepWait, 3 * time.Second},
		"held, in time":                    {at(StateHeld), StepProceed, 0},
		"held, too early":                  {at(StateHeld, later), StepWait, 3 * time.Second},
		"released":                         {at(StateReleased), StepProceed, 0},
		"suspect after a crash, too early": {at(StateReleased, later), StepWait, 3 * time.Second},
		"retrying, too early but unwanted": {at(StateRetrying, later, func(r *Record) { r.CancelRequested = true }), StepProceed, 0},
	} {
		if got, wait := Decide(c.record, me, now); got != c.want || wait != c.wait {
			t.Errorf("%s: step %d after %s, want %d after %s", name, got, wait, c.want, c.wait)
		}
	}
}

// whole is a record with nothing spent.
func whole(attempt, limit int) *Record { return &Record{Attempt: attempt, MaxAttempts: limit} }

func TestEveryCodeIsPlannedAsTheTableSays(t *testing.T) {
	table, err := errors.NewTable(nil)
	if err != nil {
		t.Fatal(err)
	}
	policy := RetryPolicy{MaxAttempts: 5, Initial: time.Second, Max: time.Minute}
	half := func() float64 { return 0.5 }
	// What happens after attempts 1, 2, 3, … that all fail with the code.
	const retries, twice, dead, holds = "retry retry retry retry dead_letter", "retry dead_letter", "dead_letter", "hold hold hold hold hold"
	want := map[errors.Code]string{
		errors.CodeConnectionFailed: retries, errors.CodeConnectionClosed: retries, errors.CodeIdleTimeout: retries,
		errors.CodeEgressUnavailable: retries, errors.CodeUpstreamError: retries, errors.CodeServerError: retries,
		errors.CodeProtocolError: twice, errors.CodeUnknown: twice, errors.CodeInternal: twice,
		errors.CodeSessionTokenExpired: dead, errors.CodeSessionTokenInvalid: dead, errors.CodeAppIDMismatch: dead,
		errors.CodeAppIDUnrecognized: dead, errors.CodeAvatarNotFound: dead, errors.CodeUnsupportedSampleRate: dead,
		errors.CodeInvalidEgressConfig: dead, errors.CodeInvalidRequest: dead,
		errors.CodeBillingRequired: holds, errors.CodeCreditsExhausted: holds, errors.CodeSessionDurationExceeded: dead,
		errors.CodeInvalidJob: dead, errors.CodeAudioUnavailable: dead, errors.CodeWorkerLost: dead,
		errors.CodeDeadlineExceeded: "expire",
	}
	for _, code := range errors.Codes() {
		r := whole(0, 5)
		r.Failures = map[errors.Code]int{}
		got := ""
		for r.Attempt < 5 {
			r.Attempt++
			d := table.Decide(errors.Newf(code, errors.PhaseRuntime, "scripted"), false)
			plan, err := policy.Plan(Failure{Decision: d, Record: r, Now: time.Unix(0, 0), CircuitOpen: d.OpensCircuit, Wait: time.Second}, half)
			if err != nil {
				t.Fatal(err)
			}
			got += " " + string(plan.Action)
			r.Failures[code]++
			if plan.Action == errors.ActionDeadLetter || plan.Action == errors.ActionExpire {
				break
			}
			if plan.Delay <= 0 {
				t.Errorf("%s: %s without a wait", code, plan.Action)
			}
		}
		if got != " "+want[code] {
			t.Errorf("%s:%s, want %s", code, got, want[code])
		}
	}
}

func TestBackoffIsFullJitterWithinItsBounds(t *testing.T) {
	p := RetryPolicy{Initial: time.Second, Max: time.Minute}
	for n, bound := range map[int]time.Duration{
		1: time.Second, 2: 2 * time.Second, 3: 4 * time.Second, 6: 32 * time.Second, 7: time.Minute, 40: time.Minute, 1000: time.Minute,
	} {
		for _, rnd := range []float64{0, 0.25, 0.999999} {
			want := time.Duration(rnd * float64(bound))
			if got := p.backoff(n, func() float64 { return rnd }); got != want {
				t.Errorf("before attempt %d at %v: %s, want %s", n+1, rnd, got, want)
			}
		}
	}
}

// raised is a failure whose code the policy gives so many attempts.
func raised(attempts int) errors.Decision {
	return errors.Decision{Code: errors.CodeServerError, Action: errors.ActionRetry, Attempts: attempts, Raises: true}
}

func TestPlanKeepsToDeadlineRetryAfterAndCircuit(t *testing.T) {
	p := RetryPolicy{MaxAttempts: 5, Initial: time.Second, Max: time.Minute}
	now := time.Unix(1000, 0)
	retry := errors.Decision{Code: errors.CodeServerError, Action: errors.ActionRetry}
	asked := retry
	asked.NotBefore = time.Minute
	blocked := errors.Decision{Code: errors.CodeConnectionFailed, Action: errors.ActionRetry, Proxy: true}
	dead := errors.Decision{Code: errors.CodeAppIDMismatch, Action: errors.ActionDeadLetter}
	hold := errors.Decision{Code: errors.CodeBillingRequired, Action: errors.ActionHold}
	for name, c := range map[string]struct {
		f    Failure
		want Plan
	}{
		"retry":                          {Failure{Decision: retry, Record: whole(2, 5)}, Plan{Action: errors.ActionRetry, Delay: time.Second}},
		"not before Retry-After":         {Failure{Decision: asked, Record: whole(1, 5)}, Plan{Action: errors.ActionRetry, Delay: time.Minute + time.Second/2}},
		"Retry-After past the deadline":  {Failure{Decision: asked, Record: whole(1, 5), Deadline: now.Add(time.Second)}, Plan{Action: errors.ActionExpire}},
		"exhausted":                      {Failure{Decision: retry, Record: whole(5, 5)}, Plan{Action: errors.ActionDeadLetter, Reason: ReasonAttemptsExhausted}},
		"the policy's limit is higher":   {Failure{Decision: raised(7), Record: whole(6, 5)}, Plan{Action: errors.ActionRetry, Delay: 16 * time.Second}},
		"and ends too":                   {Failure{Decision: raised(7), Record: whole(7, 5)}, Plan{Action: errors.ActionDeadLetter, Reason: ReasonAttemptsExhausted}},
		"not for a job that asks less":   {Failure{Decision: raised(7), Record: whole(3, 3)}, Plan{Action: errors.ActionDeadLetter, Reason: ReasonAttemptsExhausted}},
		"progress gave the budget back":  {Failure{Decision: retry, Record: &Record{Attempt: 7, BudgetFrom: 6, MaxAttempts: 5}}, Plan{Action: errors.ActionRetry, Delay: time.Second / 2}},
		"permanent":                      {Failure{Decision: dead, Record: whole(1, 5)}, Plan{Action: errors.ActionDeadLetter, Reason: ReasonPermanent}},
		"permanent under open circuit":   {Failure{Decision: dead, Record: whole(5, 5), CircuitOpen: true, Wait: 3 * time.Second}, Plan{Action: errors.ActionHold, Delay: 3 * time.Second}},
		"exhausted under open circuit":   {Failure{Decision: retry, Record: whole(5, 5), CircuitOpen: true, Wait: 3 * time.Second}, Plan{Action: errors.ActionHold, Delay: 3 * time.Second}},
		"open circuit and Retry-After":   {Failure{Decision: asked, Record: whole(1, 5), CircuitOpen: true, Wait: time.Second}, Plan{Action: errors.ActionHold, Delay: time.Minute}},
		"one session too many":           {Failure{Decision: hold, Record: &Record{Attempt: 1, MaxAttempts: 5, Refusals: 2}, Refused: true}, Plan{Action: errors.ActionHold, Delay: 2 * time.Second}},
		"a proxy refuses the last one":   {Failure{Decision: blocked, Record: whole(5, 5)}, Plan{Action: errors.ActionHold, Delay: time.Second / 2}},
		"held past the deadline expires": {Failure{Decision: hold, Record: whole(1, 5), CircuitOpen: true, Wait: time.Hour, Deadline: now.Add(time.Minute)}, Plan{Action: errors.ActionExpire}},
	} {
		c.f.Now = now
		if got, err := p.Plan(c.f, func() float64 { return 0.5 }); err != nil || got != c.want {
			t.Errorf("%s: %+v (%v), want %+v", name, got, err, c.want)
		}
	}
}

func TestTakeOverKeepsWhatCounts(t *testing.T) {
	now := time.Unix(1000, 0)
	l := Defaults{AppID: "app", Region: "us-west", MaxAttempts: 5}
	id := jobspec.Identity{ID: "j", Run: 1, StreamSeq: 7}
	job, invalid := parseForTest(id)
	if invalid != nil {
		t.Fatal(invalid)
	}
	for name, c := range map[string]struct {
		from    *Record
		crashed bool
		want    string // session, attempt, crashes
	}{
		"first":    {nil, false, "1 1 0"},
		"retry":    {&Record{Run: 1, StreamSeq: 7, State: StateRetrying, Session: 1, Attempt: 1}, false, "2 2 0"},
		"released": {&Record{Run: 1, StreamSeq: 7, State: StateReleased, Session: 1, Attempt: 1}, false, "2 1 0"},
		"held":     {&Record{Run: 1, StreamSeq: 7, State: StateHeld, Session: 3, Attempt: 2}, false, "4 2 0"},
		"crash":    {&Record{Run: 1, StreamSeq: 7, State: StateRunning, Session: 1, Attempt: 1}, true, "2 1 1"},
		"given up": {&Record{Run: 1, StreamSeq: 7, State: StateRunning, Session: 1, Attempt: 1}, false, "2 1 0"},
		"replay":   {&Record{Run: 0, StreamSeq: 5, State: StateDeadLettered, Session: 9, Attempt: 5, Crashes: 2}, false, "1 1 0"},
	} {
		r := Start(ContinueFrom(c.from, id, c.crashed, now), job, "w", l, now)
		if got := fmt.Sprint(r.Session, r.Attempt, r.Crashes); got != c.want || r.State != StateRunning || r.WorkerID != "w" || r.Run != 1 {
			t.Errorf("%s: %s, want %s (%+v)", name, got, c.want, r)
		}
	}
}

func TestATakeOverIsCountedByWhatItFollowed(t *testing.T) {
	id, now := jobspec.Identity{ID: "j", Run: 1, StreamSeq: 7}, time.Now()
	for name, tc := range map[string]struct {
		was     *Record
		crashed bool
		want    string
	}{
		"first delivery":        {nil, false, "new"},
		"cancel made a record":  {&Record{}, false, "new"},
		"held before a session": {&Record{State: StateHeld}, false, "new"},
		"failed":                {&Record{State: StateRetrying, Session: 1}, false, "retry"},
		"failed after a crash":  {&Record{State: StateRetrying, Session: 2, Crashes: 1}, false, "retry"},
		"held":                  {&Record{State: StateHeld, Session: 1, Attempt: 1}, false, "held"},
		"held after a crash":    {&Record{State: StateHeld, Session: 2, Crashes: 1}, false, "held"},
		"drained":               {&Record{State: StateReleased, Session: 3, Attempt: 2, Crashes: 1}, false, "released"},
		"given up":              {&Record{State: StateRunning, Session: 1, Attempt: 1}, false, "released"},
		"worker gone":           {&Record{State: StateRunning, Session: 1, Attempt: 2}, true, "crash"},
	} {
		if tc.was != nil {
			tc.was.Run, tc.was.StreamSeq = id.Run, id.StreamSeq
		}
		if got := StartedAs(tc.was, ContinueFrom(tc.was, id, tc.crashed, now)); got != tc.want {
			t.Errorf("%s: %s, want %s", name, got, tc.want)
		}
	}
	if got := StartedAs(&Record{Run: 1, StreamSeq: 3, Session: 4, State: StateDeadLettered}, nil); got != "new" {
		t.Errorf("a replay: %s", got)
	}
}

func parseForTest(id jobspec.Identity) (*jobspec.Job, *errors.Error) {
	_, job, err := jobspec.Read(bareMsg{data: `{"id":"j","avatar_id":"a","audio":{"inline":"AAAA","format":"pcm_s16le","sample_rate":16000}}`})
	if job != nil {
		job.ID, job.Run, job.StreamSeq, job.Queue = id.ID, id.Run, id.StreamSeq, id.Queue
	}
	return job, err
}

// bareMsg is as much of a message as Parse reads.
type bareMsg struct {
	jetstream.Msg
	data string
}

func (m bareMsg) Data() []byte         { return []byte(m.data) }
func (m bareMsg) Headers() nats.Header { return nil }
func (m bareMsg) Subject() string      { return "avatar.jobs.default" }
func (m bareMsg) Metadata() (*jetstream.MsgMetadata, error) {
	return nil, errors.New("not delivered by a stream")
}
