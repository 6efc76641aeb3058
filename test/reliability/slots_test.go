package reliability

import (
	"fmt"
	"testing"
	"time"

	"avatarworker/internal/jobs/lifecycle"
)

func TestTheFleetHoldsNoMoreSessionsThanThePlanAndWastesNoTime(t *testing.T) {
	t.Parallel()
	const (
		total    = 120
		sessions = 4
		lasts    = 300 * time.Millisecond // a session
	)
	f := newFleet(t, "", 3*time.Second)
	f.env["AVATAR_APP_MAX_SESSIONS"] = fmt.Sprint(sessions)
	for i := range total {
		f.publish(job(fmt.Sprintf("j-%d", i), fmt.Sprintf("slow-%d", lasts.Milliseconds()), 1))
	}
	victim := f.launch("w0")
	others := []*process{f.launch("w1"), f.launch("w2")}
	f.await("running", 1, running)
	start := time.Now()
	f.await("a third of the jobs", total/3, final)
	f.kill(victim)
	f.settle()
	took := time.Since(start)
	for _, w := range others {
		w.alive()
	}
	report, _ := f.check()
	var open time.Duration // as long as this machine took for them
	for _, s := range f.backend.SessionLog() {
		open += s.Closed.Sub(s.Opened)
	}
	ideal := open / sessions
	t.Logf("%d jobs in %s, without a pause %s; %d sessions at most", total, took.Round(time.Millisecond), ideal, f.backend.PeakSessions("app"))
	if peak := f.backend.PeakSessions("app"); peak > sessions {
		t.Errorf("%d sessions at once, the plan allows %d", peak, sessions)
	}
	late := f.late(start, start.Add(took))
	if limit := ideal*3/2 + f.lease + late; took > limit {
		t.Errorf("it took %s, more than %s, of which the machine was late for %s", took, limit, late)
	}
	if report.Outcomes[lifecycle.StateCompleted] != total || report.Failures != 0 {
		t.Errorf("want all completed at the first attempt: %s", report)
	}
}
