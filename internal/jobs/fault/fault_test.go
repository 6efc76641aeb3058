package fault

import (
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
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

// Its job may have gone to another worker, which could do it.
func TestAFaultThatIsNotSeenAgainIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Set
		s.Note("dead letters can't be written", io.ErrClosedPipe)
		time.Sleep(life / 2) //nolint:forbidigo // fake clock
		s.Note("events can't be written", io.ErrClosedPipe)
		time.Sleep(life/2 + 1) //nolint:forbidigo // fake clock
		if s.Has("dead letters can't be written") || !s.Has("events can't be written") || !s.Any() || s.Err() == nil {
			t.Errorf("after the first one's time: %v", s.Err())
		}
		time.Sleep(life) //nolint:forbidigo // fake clock
		if s.Any() || s.Err() != nil {
			t.Errorf("after the time of both: %v", s.Err())
		}
	})
}
