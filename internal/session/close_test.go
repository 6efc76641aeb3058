package session

import (
	"context"
	"net"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/errors"
)

func TestCloseTakesLessThanASecondEvenIfThePeerIsMute(t *testing.T) {
	for name, tc := range map[string]struct {
		session func(*peer)
		atMost  time.Duration
	}{
		"a peer that answers":       {nil, 0},
		"a peer that reads nothing": {func(p *peer) { p.confirm(); time.Sleep(time.Minute); p.sawClose = 1000 }, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			b := &backend{session: tc.session}
			inMemory(t, b, Options{}, func(c *Client) {
				s := mustOpen(t, c, params())
				for range 2 {
					start := time.Now()
					if err := s.Close(); err != nil {
						t.Error(err)
					}
					if took := time.Since(start); took > tc.atMost {
						t.Errorf("closing took %s", took)
					}
				}
				wantClosed1000(t, b, 1)
				if _, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)}); !errors.Is(err, ErrClosed) {
					t.Errorf("Speak after Close: %v", err)
				}
			})
		})
	}
}

func TestUnansweredPingEndsTheSession(t *testing.T) {
	b := &backend{session: func(p *peer) { p.confirm(); time.Sleep(3 * time.Minute); p.sawClose = 1000 }}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		start := time.Now()
		_, err := s.Speak(context.Background(), Utterance{Speech: make(liveSpeech)})
		wantError(t, err, errors.CodeConnectionClosed, errors.PhaseRuntime)
		if took := time.Since(start); took < 40*time.Second || took > 43*time.Second {
			t.Errorf("noticed after %s, want 20 s to the ping and 20 s for its answer", took)
		}
	})
}

func TestAnsweredPingsKeepAnIdleSession(t *testing.T) {
	pings := 0
	b := &backend{}
	inMemory(t, b, Options{}, func(c *Client) {
		b.accept = &websocket.AcceptOptions{OnPingReceived: func(context.Context, []byte) bool { pings++; return true }}
		s := mustOpen(t, c, params())
		time.Sleep(10 * time.Minute)
		if _, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)}); err != nil {
			t.Error(err)
		}
		if pings < 25 || pings > 30 {
			t.Errorf("%d pings in ten minutes", pings)
		}
	})
}

func TestPingUnansweredOnlyBecauseOurHandlerBlocksIsForgiven(t *testing.T) {
	inMemory(t, &backend{}, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		for range 2 {
			_, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0), OnFrame: func(Frame) error {
				time.Sleep(5 * time.Minute)
				return nil
			}})
			if err != nil {
				t.Error(err)
			}
		}
	})
}

// What is billed ends when the backend closes the connection, and not when a reader
// that our own storage holds up, or a process that was frozen, comes to notice.
func TestConnectedTimeEndsWhenThePeerClosesHoweverLateThatIsNoticed(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the system does not say when the peer closed")
	}
	for name, meanwhile := range map[string]func(s *Session){
		"nothing is written meanwhile": func(*Session) {},
		"a message is written meanwhile": func(s *Session) {
			_ = s.conn.Write(context.Background(), websocket.MessageBinary, []byte("more"))
			awaitReset(t, s)
		},
	} {
		t.Run(name, func(t *testing.T) {
			closed := make(chan time.Duration, 1)
			b := &backend{session: func(p *peer) {
				p.confirm()
				confirmed := time.Now()
				id, _, _ := p.speech()
				p.sendRaw(frame(p.t, id, false, "one"))
				p.sendRaw(frame(p.t, id, false, "two"))
				_ = p.c.CloseNow() // as a backend that is stopped
				closed <- time.Since(confirmed)
				p.sawClose = websocket.StatusGoingAway
			}}
			c := overTCP(t, b, Options{})
			s := mustOpen(t, c, params())
			var truth time.Duration
			_, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0), OnFrame: func(Frame) error {
				if truth == 0 {
					truth = <-closed
					time.Sleep(time.Second) // storage that is away
					meanwhile(s)
				}
				return nil
			}})
			wantError(t, err, errors.CodeConnectionClosed, errors.PhaseRuntime)
			if got := s.Connected(); (got - truth).Abs() > 250*time.Millisecond {
				t.Errorf("connected for %s, want %s", got, truth)
			}
		})
	}
}

// awaitReset waits until the peer has answered what was written to its closed end:
// writes fail from then on.
func awaitReset(t *testing.T, s *Session) {
	t.Helper()
	for range 1000 {
		if _, err := s.raw.Write([]byte{0}); err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Error("the peer did not reset the connection")
}

// lateConn is a connection whose reader comes late to what has come, as in a process
// that was frozen.
type lateConn struct {
	*net.TCPConn
	by *atomic.Int64 // a time.Duration
}

func (c lateConn) SyscallConn() (syscall.RawConn, error) {
	raw, err := c.TCPConn.SyscallConn()
	return lateRaw{raw, c.by}, err
}

type lateRaw struct {
	syscall.RawConn
	by *atomic.Int64
}

func (r lateRaw) Read(f func(fd uintptr) bool) error {
	time.Sleep(time.Duration(r.by.Load()))
	return r.RawConn.Read(f)
}

// lateFor makes the readers of a client's connections late.
func lateFor(c *Client, by time.Duration) *atomic.Int64 {
	late := new(atomic.Int64)
	late.Store(int64(by))
	dial := c.transport.DialContext
	c.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if tcp, ok := conn.(*net.TCPConn); ok {
			conn = lateConn{tcp, late}
		}
		return conn, err
	}
	return late
}

// A process may be frozen between its close frame and the peer's answer to it.
func TestConnectedTimeEndsWithTheAnswerToOurCloseHoweverLateItIsRead(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the system does not say when the peer closed")
	}
	closed := make(chan time.Time, 1)
	b := &backend{session: func(p *peer) {
		p.confirm()
		p.speakAll()
		_ = p.c.CloseNow()
		closed <- time.Now()
	}}
	c := overTCP(t, b, Options{PingInterval: 50 * time.Millisecond}) // a pong lets the lock below be taken
	late := lateFor(c, 0)
	s := mustOpen(t, c, params())
	confirmed := time.Now()
	late.Store(int64(500 * time.Millisecond)) // less than closeWait
	s.in.reading <- struct{}{}                // the reader comes late to the answer
	time.AfterFunc(500*time.Millisecond, s.in.release)
	_ = s.Close()
	<-s.closed
	if got, truth := s.Connected(), (<-closed).Sub(confirmed); (got - truth).Abs() > 250*time.Millisecond {
		t.Errorf("connected for %s, want %s", got, truth)
	}
}

// After a freeze the handshake's time is up although the confirm has come.
func TestAConfirmThatIsReadAfterTheHandshakesTimeCounts(t *testing.T) {
	t.Parallel()
	c := overTCP(t, &backend{}, Options{HandshakeTimeout: 300 * time.Millisecond}) // more than the backend takes
	lateFor(c, 400*time.Millisecond)
	s, err := c.Open(context.Background(), params())
	if err != nil {
		t.Fatalf("the session was confirmed, and is billed: %v", err)
	}
	_ = s.Close()
}

func TestConnectedTimeBeginsWithTheConfirmHoweverLateItIsRead(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the system does not say when bytes came")
	}
	confirmed := make(chan time.Time, 1)
	b := &backend{session: func(p *peer) {
		p.confirm()
		confirmed <- time.Now()
		p.speakAll()
	}}
	c := overTCP(t, b, Options{})
	lateFor(c, time.Second)
	s := mustOpen(t, c, params())
	got, truth := s.Connected(), time.Since(<-confirmed)
	if (got - truth).Abs() > 250*time.Millisecond {
		t.Errorf("connected for %s, want %s", got, truth)
	}
}

func TestPeerThatStopsReadingCantHoldASpeaker(t *testing.T) {
	// Over real sockets: their buffers fill, and Write blocks.
	b := &backend{session: func(p *peer) { p.confirm(); <-p.b.release; p.sawClose = 1000 }, release: make(chan struct{})}
	c := overTCP(t, b, Options{})
	s := mustOpen(t, c, params())
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	ended := make(chan time.Time, 1)
	context.AfterFunc(ctx, func() { ended <- time.Now() })
	_, err := s.Speak(ctx, Utterance{Speech: &chunks{data: [][]byte{make([]byte, 15<<20)}}})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if took := time.Since(<-ended); took > 1500*time.Millisecond {
		t.Errorf("returned %s after the cancellation", took)
	}
	close(b.release)
}

// A backend may close right after its confirm, and both times are rounded.
func TestConnectedTimeIsNeverNegative(t *testing.T) {
	s := &Session{closed: make(chan struct{}), confirmedAt: time.Now()}
	s.closedAt = s.confirmedAt.Add(-time.Millisecond)
	close(s.closed)
	if got := s.Connected(); got != 0 {
		t.Errorf("connected for %s", got)
	}
}
