package jobspec

import (
	"slices"
	"testing"

	"avatarworker/internal/jobs/jobpb"
)

// A field of the message Output that is not in the list would be a job with the
// default output, frames.
func TestEveryFieldOfTheMessageOutputIsAnOutput(t *testing.T) {
	fields := (&jobpb.Output{}).ProtoReflect().Descriptor().Fields()
	if fields.Len() != len(Outputs()) {
		t.Errorf("the message has %d fields, and there are the outputs %v", fields.Len(), Outputs())
	}
	for i := range fields.Len() {
		field := fields.Get(i)
		o := &jobpb.Output{}
		o.ProtoReflect().Mutable(field)
		if got := outputKinds(o); !slices.Equal(got, []string{string(field.Name())}) {
			t.Errorf("a job with output.%s has the outputs %v", field.Name(), got)
		}
	}
}
