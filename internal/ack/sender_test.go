package ack

import (
	"context"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
)

func (s *Sender) expected() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting)
}

func TestWhatWasSentIsAcknowledgedInAnyOrder(t *testing.T) {
	nc := connectToStream(t)
	s := NewSender(nc)
	var all []Sent
	for range 50 {
		sent, err := s.Send(&nats.Msg{Subject: "s"})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, sent)
	}
	for i := len(all) - 1; i >= 0; i-- {
		a, err := all[i].Wait(t.Context(), 10*time.Second)
		if err != nil || a.Sequence != uint64(i+1) {
			t.Errorf("message %d: %+v; %v", i+1, a, err)
		}
	}
	twice := &nats.Msg{Subject: "s", Header: nats.Header{jetstream.MsgIDHeader: {"1"}}}
	for _, duplicate := range []bool{false, true} {
		sent, err := s.Send(twice)
		if err != nil {
			t.Fatal(err)
		}
		if a, err := sent.Wait(t.Context(), 10*time.Second); err != nil || a.Duplicate != duplicate {
			t.Errorf("%+v; %v", a, err)
		}
	}
	sent, err := s.Send(&nats.Msg{Subject: "s", Header: nats.Header{jetstream.ExpectedLastSubjSeqHeader: {"7"}}})
	if err != nil {
		t.Fatal(err)
	}
	var api *jetstream.APIError
	if _, err := sent.Wait(t.Context(), 10*time.Second); !errors.As(err, &api) || api.ErrorCode != jetstream.JSErrCodeStreamWrongLastSequence {
		t.Errorf("a conflict is %v", err)
	}
	if sent, err = s.Send(&nats.Msg{Subject: "none"}); err != nil {
		t.Fatal(err)
	}
	if _, err := sent.Wait(t.Context(), 10*time.Second); !errors.Is(err, jetstream.ErrNoStreamResponse) {
		t.Errorf("without a stream: %v", err)
	}
	if n := s.expected(); n != 0 {
		t.Errorf("%d replies are still expected", n)
	}
}

func TestWaitingForAReplyThatIsMissingEnds(t *testing.T) {
	nc := natstest.Connect(t, natstest.Start(t))
	if _, err := nc.SubscribeSync("silent"); err != nil {
		t.Fatal(err)
	}
	s := NewSender(nc)
	ended, end := context.WithCancelCause(t.Context())
	end(errors.New("the end"))
	for _, c := range []struct {
		ctx   context.Context
		limit time.Duration
		want  error
	}{
		{t.Context(), 20 * time.Millisecond, context.DeadlineExceeded},
		{ended, time.Hour, context.Cause(ended)},
	} {
		sent, err := s.Send(&nats.Msg{Subject: "silent"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := sent.Wait(c.ctx, c.limit); !errors.Is(err, c.want) {
			t.Errorf("%v, want %v", err, c.want)
		}
	}
	if n := s.expected(); n != 0 {
		t.Errorf("%d replies are still expected", n)
	}
	nc.Close()
	if _, err := s.Send(&nats.Msg{Subject: "silent"}); !errors.Is(err, nats.ErrConnectionClosed) {
		t.Errorf("over a closed connection: %v", err)
	}
	if n := s.expected(); n != 0 {
		t.Errorf("%d replies are expected that can't come", n)
	}
}

// Replies that got lost, and for which nothing waits, are forgotten.
func TestLostRepliesDoNotPileUp(t *testing.T) {
	nc := natstest.Connect(t, natstest.Start(t))
	s := NewSender(nc)
	if _, err := nc.SubscribeSync("silent"); err != nil {
		t.Fatal(err)
	}
	for range 3 * mostWaiting {
		if _, _, err := s.expect(); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.expected(); n > 2*mostWaiting {
		t.Errorf("%d replies are expected", n)
	}
	// What comes late, or was never asked for, is of no use to anybody.
	for _, token := range []string{"1", "0", "x.y", strconv.FormatUint(s.serial, 36)} {
		if err := nc.Publish(s.prefix+token, []byte(`{"stream":"S","seq":1}`)); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
}
