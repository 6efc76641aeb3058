package session

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/coder/websocket"

	"avatarworker/internal/errors"
)

var (
	errTooBig = errors.New("the message has more than 16 MiB")

	// ErrClosed is in the chain of an utterance's error if its session was closed
	// by its owner.
	ErrClosed = errors.New("the session was closed")

	// ErrNoUtterance is returned by Interrupt if no utterance is in flight.
	ErrNoUtterance = errors.New("no utterance is in flight")
)

// ownError marks an error of the caller's own code. It is returned as it is,
// except that an *errors.Error is redacted.
type ownError struct{ err error }

func (e *ownError) Error() string { return e.err.Error() }
func (e *ownError) Unwrap() error { return e.err }

// closedByOwner is the error of a session that its owner has closed.
func closedByOwner() error {
	return errors.Newf(errors.CodeInternal, errors.PhaseRuntime, "no speech can be sent: %w", ErrClosed)
}

// cancelError is the error of work that a context ended. The cause stays in the
// chain unchanged.
type cancelError struct {
	what  string
	cause error
}

func (e *cancelError) Error() string { return e.what + ": " + e.cause.Error() }
func (e *cancelError) Unwrap() error { return e.cause }

func cancelled(ctx context.Context, what string) error {
	return &cancelError{what, context.Cause(ctx)}
}

// withoutURL removes the URL that net/http puts before its errors: it contains
// the credentials if Options.Auth is AuthQuery.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// unreachable is the error of a request that got no reply. If one of our own
// limits ended it, the error names that limit.
func unreachable(ctx context.Context, phase errors.Phase, err error) error {
	var blocked *blockedError
	proxied := errors.As(err, &blocked)
	if ctx.Err() != nil {
		if err = context.Cause(ctx); proxied {
			err = &blockedError{blocked.proxy, err}
		}
	}
	var refused *proxyError
	if errors.As(err, &refused) {
		return errors.FromProxy(phase, proxyName(refused.proxy), refused.status, refused.header)
	}
	e := errors.FromTransport(phase, withoutURL(err))
	e.Proxy = proxied
	return e
}

// blockedError means that the proxy on the way gave no connection to the backend:
// it was not reached, refused without an HTTP status, or closed the connection.
type blockedError struct {
	proxy *url.URL
	err   error
}

func (b *blockedError) Error() string {
	return fmt.Sprintf("through the proxy %s: %s", proxyName(b.proxy), b.err)
}

func (b *blockedError) Unwrap() error { return b.err }

// fromProxy reports whether a reply to a request through the proxy via came from
// the proxy itself. Without TLS to the backend there is no certain sign: either
// the reply says so, or it has a status that proxies return and is not the JSON
// that the console writes.
func fromProxy(via *url.URL, resp *http.Response) bool {
	if via == nil || resp.Request.URL.Scheme != "http" || resp.StatusCode < 400 {
		return false
	}
	if resp.StatusCode == http.StatusProxyAuthRequired {
		return true
	}
	h := resp.Header
	if h.Get("Proxy-Authenticate") != "" || h.Get("X-Squid-Error") != "" || strings.Contains(h.Get("Proxy-Status"), "error=") {
		return true
	}
	switch resp.StatusCode {
	case http.StatusForbidden, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return !strings.Contains(h.Get("Content-Type"), "json")
	}
	return false
}

// readFailed converts the error that ended a connection while it was read.
func readFailed(phase errors.Phase, err error) error {
	var ce websocket.CloseError
	switch {
	case errors.As(err, &ce):
		return errors.FromClose(phase, int(ce.Code), ce.Reason)
	case errors.Is(err, websocket.ErrMessageTooBig), errors.Is(err, errTooBig):
		return errors.FromFrame(phase, err)
	}
	return errors.FromCut(phase, err)
}

// redactor adds what is known of the session to an error and removes the
// session's secrets.
type redactor struct {
	secrets []string
	region  string
}

func (r *redactor) add(secret string) {
	if secret != "" {
		r.secrets = append(r.secrets, secret)
	}
}

// clean returns err without secrets and with the IDs that it lacks. It leaves an
// error alone that is not an *errors.Error: that is the caller's own, or a
// cancellation cause.
func (r *redactor) clean(err error, connectionID, reqID string) error {
	var own *ownError
	if errors.As(err, &own) {
		err = own.err
	}
	var stopped *cancelError
	if err == nil || errors.As(err, &stopped) {
		return err
	}
	var e *errors.Error
	if !errors.As(err, &e) {
		return err
	}
	out := *e
	out.Region = orDefault(out.Region, r.region)
	out.ConnectionID = orDefault(out.ConnectionID, connectionID)
	out.ReqID = orDefault(out.ReqID, reqID)
	return out.Redact(r.secrets...)
}

// trimCut removes any beginning of a secret from the end of a truncated text:
// half a secret would not be recognised.
func (r *redactor) trimCut(b []byte) []byte {
	for _, secret := range r.secrets {
		for n := min(len(secret), len(b)); n > 0; n-- {
			if bytes.HasSuffix(b, []byte(secret[:n])) {
				b = b[:len(b)-n]
				break
			}
		}
	}
	return b
}
