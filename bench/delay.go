package main

import (
	"context"
	"net"
	"net/url"
	"sync"
	"time"
)

// delayed forwards TCP connections to a target as a network does whose packets
// take a while each way. Its client's connect returns at once, as a relay on the
// same machine can't delay that; so the first bytes of a connection wait for the
// round trip that connecting would have taken.
type delayed struct {
	listener net.Listener
	target   string
	delay    time.Duration // each way
	// sent is called when the client writes to a connection; n counts from 1. nil:
	// nothing is called.
	sent func(n int, at time.Time)

	wg    sync.WaitGroup
	mu    sync.Mutex
	conns []net.Conn
}

func startDelayed(target string, delay time.Duration, sent func(n int, at time.Time)) (*delayed, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	d := &delayed{listener: l, target: target, delay: delay, sent: sent}
	d.wg.Go(d.accept)
	return d, nil
}

// in returns the URL with this relay in place of its host.
func (d *delayed) in(address string) (string, error) {
	u, err := url.Parse(address)
	if err != nil {
		return "", err
	}
	u.Host = d.listener.Addr().String()
	return u.String(), nil
}

func (d *delayed) close() {
	_ = d.listener.Close() // it returns the reason that accept sees
	d.drop()
	d.wg.Wait()
}

// drop closes the connections that there are. What is under way is lost.
func (d *delayed) drop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.conns {
		_ = c.Close() // it returns the reason that pipe sees
	}
	d.conns = nil
}

func (d *delayed) accept() {
	for {
		client, err := d.listener.Accept()
		if err != nil {
			return // closed
		}
		begun := time.Now()
		server, err := new(net.Dialer).DialContext(context.Background(), "tcp", d.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		d.mu.Lock()
		d.conns = append(d.conns, client, server)
		d.mu.Unlock()
		d.wg.Go(func() { d.pipe(server, client, begun.Add(2*d.delay), d.sent) })
		d.wg.Go(func() { d.pipe(client, server, begun, nil) })
	}
}

// part is what one read returned, and when it arrives at the other side.
type part struct {
	data []byte
	due  time.Time
}

// pipe copies one direction. Nothing leaves before open.
func (d *delayed) pipe(to, from net.Conn, open time.Time, sent func(int, time.Time)) {
	parts := make(chan part, 1024)
	d.wg.Go(func() {
		defer func() { _ = to.Close() }() // the other direction ends too
		for p := range parts {
			time.Sleep(time.Until(p.due))
			if _, err := to.Write(p.data); err != nil {
				break
			}
		}
		for range parts { // so that the reader ends
		}
	})
	defer close(parts)
	buf := make([]byte, 64<<10)
	for n := 1; ; n++ {
		got, err := from.Read(buf)
		if err != nil {
			return
		}
		left := time.Now()
		if left.Before(open) {
			left = open
		}
		if sent != nil {
			sent(n, left)
		}
		parts <- part{append([]byte(nil), buf[:got]...), left.Add(d.delay)}
	}
}
