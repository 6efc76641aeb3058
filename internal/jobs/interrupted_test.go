package jobs

import (
	"testing"

	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
)

// Its record is written after others can find the job here.
func TestInterruptOfAJobThatIsJustBeingTakenOverFindsNothingToInterrupt(t *testing.T) {
	if reply := (&execution{record: lifecycle.NewHandle(lifecycle.HandleOptions{})}).Interrupt(t.Context()); reply.Status != control.StatusNotRunning || reply.State != "" {
		t.Errorf("%+v", reply)
	}
}
