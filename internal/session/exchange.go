package session

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"time"
)

// maxAnswerHead bounds the status line and headers of a reply, in bytes.
const maxAnswerHead = 64 << 10

// refusalLimit is how much of a refusal's body is read, and refusalWait how long
// that may take.
const (
	refusalLimit = 64 << 10
	refusalWait  = 3 * time.Second
)

// exchange is one request and its reply on its own connection.
type exchange struct {
	conn     net.Conn
	br       *bufio.Reader // holds what was read beyond the reply's headers
	answered bool          // at least one byte of a reply came
	refusal  []byte        // the first bytes of a reply that is not an upgrade
}

var _ http.RoundTripper = (*exchange)(nil)

// RoundTrip sends an upgrade request. The body of a reply 101 is the connection.
// After any other reply the connection is closed and the body is in x.refusal.
func (x *exchange) RoundTrip(req *http.Request) (*http.Response, error) {
	ended := x.watch(req.Context())
	resp, err := x.head(req)
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		_ = x.conn.SetReadDeadline(time.Now().Add(refusalWait)) // a closed one fails by itself
		// Use whatever part of the body arrived.
		x.refusal, _ = io.ReadAll(io.LimitReader(resp.Body, refusalLimit))
		resp.Body = http.NoBody
		ended()
		_ = x.conn.Close() // it can't be used again
		return resp, nil
	}
	if ended() {
		err = context.Cause(req.Context())
	}
	if err != nil {
		_ = x.conn.Close() // the error says more
		return nil, err
	}
	resp.Body = x.upgraded()
	return resp, nil
}

// ask sends a request and returns its reply without the body.
func (x *exchange) ask(ctx context.Context, req *http.Request) (*http.Response, error) {
	ended := x.watch(ctx)
	resp, err := x.head(req)
	if ended() {
		return nil, context.Cause(ctx)
	}
	return resp, err
}

// watch makes the connection's reads and writes fail once ctx ends. The returned
// function stops that, and reports whether ctx has ended.
func (x *exchange) watch(ctx context.Context) (ended func() bool) {
	done := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = x.conn.SetDeadline(time.Unix(1, 0)) // a closed one fails by itself
	})
	return func() bool {
		if cancel() {
			return false
		}
		<-done
		return true
	}
}

// head sends a request and reads the status line and headers of the final reply.
func (x *exchange) head(req *http.Request) (*http.Response, error) {
	if err := req.Write(x.conn); err != nil {
		return nil, err
	}
	limited := &limitedReader{r: x.conn, left: maxAnswerHead}
	x.br = bufio.NewReader(limited)
	if _, err := x.br.Peek(1); err != nil {
		return nil, err
	}
	x.answered = true
	for {
		resp, err := http.ReadResponse(x.br, req)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode == http.StatusSwitchingProtocols || resp.StatusCode < 100 || resp.StatusCode >= 200 {
			limited.left = math.MaxInt
			return resp, nil
		}
	}
}

// limitedReader fails after left bytes.
type limitedReader struct {
	r    io.Reader
	left int
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("the answer's headers have more than %d KiB", maxAnswerHead>>10)
	}
	n, err := l.r.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}

// upgraded returns the connection behind a reply 101. It keeps the buffer only if
// that holds data.
func (x *exchange) upgraded() io.ReadWriteCloser {
	n := x.br.Buffered()
	if n == 0 {
		x.br = nil
		return x.conn
	}
	rest, _ := x.br.Peek(n) // they are buffered
	return &readAhead{x.conn, bytes.NewReader(rest)}
}

// readAhead is a connection some of whose bytes were already read.
type readAhead struct {
	net.Conn
	rest *bytes.Reader
}

func (r *readAhead) Read(p []byte) (int, error) {
	if r.rest.Len() > 0 {
		return r.rest.Read(p)
	}
	return r.Conn.Read(p)
}
