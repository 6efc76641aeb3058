package natsserver

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// link forwards TCP connections from its own port to a target, so that the
// connection between two nodes can be cut without telling either.
type link struct {
	listener net.Listener
	target   string
	wg       sync.WaitGroup

	mu     sync.Mutex
	cut    bool
	delays [2]time.Duration // how late bytes arrive, by way
	conns  map[net.Conn]struct{}
}

// direction is a direction of a link.
type direction int

const (
	forward direction = iota // from the dialling side to the target
	backward
)

func newLink(target string) (*link, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("link to %s: %w", target, err)
	}
	k := &link{listener: l, target: target, conns: map[net.Conn]struct{}{}}
	k.wg.Go(k.accept)
	return k, nil
}

func (k *link) address() string { return k.listener.Addr().String() }

func (k *link) accept() {
	for {
		c, err := k.listener.Accept()
		if err != nil {
			return // closed
		}
		k.wg.Go(func() { k.forward(c) })
	}
}

func (k *link) forward(from net.Conn) {
	if !k.track(from) {
		return
	}
	defer k.drop(from)
	to, err := new(net.Dialer).DialContext(context.Background(), "tcp", k.target)
	if err != nil || !k.track(to) {
		return // the node is down; the dialling one tries again
	}
	defer k.drop(to)
	var wg sync.WaitGroup
	wg.Go(func() { k.pipe(to, from, forward) })
	wg.Go(func() { k.pipe(from, to, backward) })
	wg.Wait()
}

// pipe copies in one direction, and closes both connections when that ends.
func (k *link) pipe(to, from net.Conn, w direction) {
	_, _ = io.Copy(&delayedWriter{k, to, w}, from) // ends when either side does
	k.drop(to)
	k.drop(from)
}

// delayedWriter writes one direction of a link with a delay. Data that arrives
// meanwhile goes out with the next write.
type delayedWriter struct {
	link      *link
	to        io.Writer
	direction direction
}

// Write implements io.Writer.
func (l *delayedWriter) Write(p []byte) (int, error) {
	if d := l.link.delay(l.direction); d > 0 {
		<-time.After(d)
	}
	return l.to.Write(p)
}

func (k *link) delay(w direction) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.delays[w]
}

func (k *link) setDelay(w direction, d time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.delays[w] = d
}

// track registers a connection. If the link is cut, it closes the connection and
// returns false.
func (k *link) track(c net.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.cut {
		_ = c.Close() // refused: nothing was written
		return false
	}
	k.conns[c] = struct{}{}
	return true
}

func (k *link) drop(c net.Conn) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.conns, c)
	_ = c.Close() // closed twice on purpose: by both ways of a pipe
}

// setCut cuts the link with all its connections, or restores it.
func (k *link) setCut(cut bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cut = cut
	if !cut {
		return
	}
	for c := range k.conns {
		_ = c.Close() // the point is to break it
	}
}

func (k *link) close() error {
	err := k.listener.Close()
	k.setCut(true)
	k.wg.Wait()
	return err
}
