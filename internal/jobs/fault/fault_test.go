package fault

import (
	"io"
	"strings"
	"testing"
)

func TestTheFirstFaultByNameIsReportedUntilItsWriteWorks(t *testing.T) {
	const recordings, letters = "recordings can't be written", "dead letters can't be written"
	var s Set
	if s.Any() || s.Err() != nil {
		t.Errorf("faults at first: %v", s.Err())
	}
	s.Note(recordings, io.ErrShortWrite)
	s.Note(letters, io.ErrClosedPipe)
	if err := s.Err(); !s.Has(recordings) || !strings.HasPrefix(err.Error(), letters) {
		t.Errorf("got %v", err)
	}
	s.Note(letters, nil)
	if err := s.Err(); s.Has(letters) || !strings.HasPrefix(err.Error(), recordings) {
		t.Errorf("got %v", err)
	}
	s.Note(recordings, nil)
	if s.Any() || s.Err() != nil {
		t.Errorf("faults that are over: %v", s.Err())
	}
}
