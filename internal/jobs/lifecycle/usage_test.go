package lifecycle

import (
	"testing"
	"time"

	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/usage"
)

var began = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func runningRecord(session int) *Record {
	return &Record{JobID: "J", Run: 1, StreamSeq: 7, Session: session, Attempt: 1, State: StateRunning, AppID: "app", WorkerID: "w", StartedAt: began}
}

func TestOnlyASessionThatWasConfirmedIsOwedToTheLedger(t *testing.T) {
	r := runningRecord(1)
	r.Closed(0, "connectionFailed")
	if len(r.Usage) != 0 {
		t.Fatalf("a session that was never confirmed is owed: %+v", r.Usage)
	}
	r.Connected("c", "us-west", began.Add(time.Second))
	r.Closed(5*time.Second, "serverError")
	if len(r.Usage) != 1 || r.Usage[0].Connected != 5*time.Second || r.whole(r.Usage[0]).ConnectionID != "c" || r.Usage[0].Estimated || r.SessionTime != 5*time.Second {
		t.Fatalf("%+v", r.Usage)
	}
}

func TestALostSessionIsBoundFromItsConfirmOrElseFromItsStart(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Record)
		want   time.Duration
		id     string
	}{
		"confirmed":           {func(r *Record) { r.Connected("c", "", began.Add(2*time.Second)) }, 8 * time.Second, "c"},
		"not known":           {func(*Record) {}, 10 * time.Second, ""},
		"of an older version": {func(r *Record) { r.StartedAt, r.UpdatedAt = time.Time{}, began.Add(time.Second) }, 9 * time.Second, ""},
		"after its end":       {func(r *Record) { r.Connected("c", "", began.Add(20*time.Second)) }, 0, "c"},
	} {
		r := runningRecord(1)
		c.change(r)
		r.Lost(began.Add(10 * time.Second))
		if len(r.Usage) != 1 || !r.Usage[0].Estimated || r.Usage[0].Connected != c.want || r.Usage[0].ConnectionID != c.id {
			t.Errorf("%s: %+v", name, r.Usage)
		}
	}
}

func TestARecordKeepsWhatTheLedgerMayNotHave(t *testing.T) {
	job := &jobspec.Job{}
	waiting := runningRecord(1)
	waiting.Connected("c", "", began)
	waiting.Closed(time.Second, "serverError")
	waiting.Retry("serverError", began) // what follows from it is done before the job goes on
	if next := Start(waiting, job, "w2", Defaults{MaxAttempts: 5}, began); len(next.Usage) != 0 || !next.ConfirmedAt.IsZero() {
		t.Errorf("from one that waits: %+v", next.Usage)
	}
	lost := runningRecord(1)
	lost.Lost(began)
	next := Start(lost, job, "w2", Defaults{MaxAttempts: 5}, began)
	if len(next.Usage) != 1 || next.Usage[0].Stored || next.Estimate(1) == nil || next.Estimate(2) != nil {
		t.Errorf("from one whose worker died: %+v", next.Usage)
	}
	next.UsageStored()
	for n := range 40 {
		next.Session = n + 2
		next.State = StateRunning
		next.Lost(began)
		next.UsageStored()
		next = Start(next, job, "w2", Defaults{MaxAttempts: 5}, began)
	}
	if len(next.Usage) != maxEstimates || next.Usage[len(next.Usage)-1].Session != 41 {
		t.Errorf("%d estimates are kept, want the newest %d", len(next.Usage), maxEstimates)
	}
}

func TestAJobIsNotGivenUpForABudget(t *testing.T) {
	r := runningRecord(1)
	r.HoldBack(began, began.Add(time.Second), HeldBudget, "spent", "")
	if got := r.HeldTotal(began.Add(1000 * time.Hour)); got != 0 {
		t.Errorf("held for %s", got)
	}
	if r.HeldText() != "spent" {
		t.Errorf("held: %s", r.HeldText())
	}
}

func TestAUsageRecordSaysWhoseSessionItWas(t *testing.T) {
	r := runningRecord(3)
	r.Queue, r.AvatarID, r.Labels, r.Region = "vip", "a", map[string]string{"customer": "acme"}, "us-west"
	r.Connected("c", "eu-west", began)
	r.Closed(7*time.Second, usage.CodeCompleted)
	u := r.UsageOf(r.Usage[0], usage.Tariff{Minimum: 1}.Credits)
	if u.ID() != "J.run1.s3" || u.Credits != 2 || u.ConnectedMS != 7000 || u.Queue != "vip" || u.Labels["customer"] != "acme" || u.Region != "eu-west" || u.Failed() {
		t.Errorf("%+v", u)
	}
}
