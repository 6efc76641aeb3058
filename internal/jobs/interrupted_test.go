package jobs

import "testing"

// Its record is written after others can find the job here.
func TestInterruptOfAJobThatIsJustBeingTakenOverFindsNothingToInterrupt(t *testing.T) {
	if reply := new(execution).interrupted(t.Context()); reply.Status != StatusNotRunning || reply.State != "" {
		t.Errorf("%+v", reply)
	}
}
