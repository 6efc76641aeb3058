package jobs

import (
	"testing"

	"avatarworker/internal/jobs/control"
)

// Its record is written after others can find the job here.
func TestInterruptOfAJobThatIsJustBeingTakenOverFindsNothingToInterrupt(t *testing.T) {
	if reply := new(execution).Interrupt(t.Context()); reply.Status != control.StatusNotRunning || reply.State != "" {
		t.Errorf("%+v", reply)
	}
}
