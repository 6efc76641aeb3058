package natsconn_test

import (
	"net"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/natsconn"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

// stalling is a proxy between clients and a server. When it stalls it reads nothing
// any more from the connections that there are, as a network that is cut.
type stalling struct {
	server  *natsserver.Server
	stop    chan struct{}
	wg      sync.WaitGroup
	mu      sync.Mutex
	conns   []net.Conn
	stalled chan struct{}
	halted  chan struct{} // has one for each direction that came to a halt
}

func newStalling(t *testing.T) *stalling {
	t.Helper()
	s := &stalling{server: natstest.Start(t), stop: make(chan struct{}), stalled: make(chan struct{}), halted: make(chan struct{}, 16)}
	t.Cleanup(func() {
		close(s.stop)
		s.mu.Lock()
		for _, c := range s.conns {
			_ = c.Close() // nothing depends on it any more
		}
		s.mu.Unlock()
		s.wg.Wait()
	})
	return s
}

// listen takes connections over TCP, with all that the system buffers.
func (s *stalling) listen(t *testing.T) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if err := s.join(c); err != nil {
				_ = c.Close() // not served
			}
		}
	})
	t.Cleanup(func() { _ = l.Close() }) // ends the loop above, before it is waited for
	return "nats://" + l.Addr().String()
}

// InProcessConn returns a connection without any buffer: a write that is not read
// blocks.
func (s *stalling) InProcessConn() (net.Conn, error) {
	client, c := net.Pipe()
	return client, s.join(c)
}

// join forwards from here on.
func (s *stalling) join(c net.Conn) error {
	to, err := s.server.InProcessConn()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = append(s.conns, c, to)
	stalled := s.stalled
	s.wg.Go(func() { s.pipe(to, c, stalled) })
	s.wg.Go(func() { s.pipe(c, to, stalled) })
	return nil
}

// pipe leaves its connections open when it stalls, so neither side notices.
func (s *stalling) pipe(to, from net.Conn, stalled <-chan struct{}) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		select {
		case <-stalled:
			s.halted <- struct{}{}
			<-s.stop
			return
		default:
		}
		if n > 0 {
			_, err = to.Write(buf[:n])
		}
		if err != nil {
			_, _ = to.Close(), from.Close() // both ends, whichever closed first
			return
		}
	}
}

// stall stops the connections that there are; new ones work.
func (s *stalling) stall() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.stalled)
	s.stalled = make(chan struct{})
}

// In both ways of stalling: the write that times out has put out a part, or
// nothing at all, after which the library would go on with the connection.
func TestPublishOnALinkThatStallsFailsSoonAndTheConnectionIsReplaced(t *testing.T) {
	t.Parallel()
	t.Run("a part was written", func(t *testing.T) {
		t.Parallel()
		link := newStalling(t)
		stallOn(t, link, natsconn.Options{URLs: link.listen(t), Once: true})
	})
	t.Run("nothing was written", func(t *testing.T) {
		t.Parallel()
		link := newStalling(t)
		stallOn(t, link, natsconn.Options{InProcess: link, Once: true})
	})
}

func stallOn(t *testing.T, link *stalling, o natsconn.Options) {
	states := make(chan bool, 16)
	o.OnState = func(connected bool) { states <- connected }
	nc, _, err := natsconn.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	expect(t, states, true)
	link.stall()
	sub, err := nc.SubscribeSync("back") // on its way when the link stalls
	if err != nil {
		t.Fatal(err)
	}
	<-link.halted
	// Two writes may time out one after the other, on a slow machine.
	if took := publishUntilItFails(t, nc); took > 6*time.Second {
		t.Errorf("a publish took %s", took)
	}
	since := time.Now()
	expect(t, states, false)
	if took := time.Since(since); took > 6*time.Second {
		t.Errorf("the connection was given up %s after a publish failed", took)
	}
	expect(t, states, true)
	if err := nc.Publish("back", []byte("again")); err != nil {
		t.Fatal(err)
	}
	if msg, err := sub.NextMsg(10 * time.Second); err != nil || string(msg.Data) != "again" {
		t.Errorf("after the stall: %v, %v", msg, err)
	}
}

// publishUntilItFails returns how long the longest publish took.
func publishUntilItFails(t *testing.T, nc *nats.Conn) time.Duration {
	t.Helper()
	data := make([]byte, 10<<10)
	longest := time.Duration(0)
	for range 10_000 { // more than any socket buffers
		from := time.Now()
		err := nc.Publish("frames", data)
		longest = max(longest, time.Since(from))
		if err != nil {
			return longest
		}
	}
	t.Fatal("no publish failed on a link that takes nothing")
	return 0
}
