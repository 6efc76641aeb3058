package fault

import (
	"io"
	"strings"
	"testing"
)

func TestTheFirstFaultByNameIsReportedUntilItsWriteWorks(t *testing.T) {
	var s Set
	if s.Any() || s.Err() != nil {
		t.Errorf("faults at first: %v", s.Err())
	}
	s.Note("recordings", io.ErrShortWrite)
	s.Note("dead letters", io.ErrClosedPipe)
	if err := s.Err(); !s.Has("recordings") || !strings.HasPrefix(err.Error(), "dead letters can't be written") {
		t.Errorf("got %v", err)
	}
	s.Note("dead letters", nil)
	if err := s.Err(); s.Has("dead letters") || !strings.HasPrefix(err.Error(), "recordings can't be written") {
		t.Errorf("got %v", err)
	}
	s.Note("recordings", nil)
	if s.Any() || s.Err() != nil {
		t.Errorf("faults that are over: %v", s.Err())
	}
}
