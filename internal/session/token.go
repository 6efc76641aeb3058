package session

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"sync/atomic"
	"time"

	"avatarworker/internal/errors"
)

// tokenLimit bounds the console's answer.
const tokenLimit = 1 << 20

// mint gets a session token for one connection: the documents call tokens
// single-use (docs/protocol.md, section 2). It may have been minted ahead, unless
// the backend has just refused one.
func (o *opening) mint(ctx context.Context, region string, refused bool) (token string, err error) {
	ctx, span := o.c.span(ctx, spanToken, region)
	defer func() { endSpan(span, err) }()

	key, err := o.apiKey()
	if err != nil {
		return "", err
	}
	use := tokenUse{o.p.AppID, region, key}
	if refused {
		o.c.tokens.drop(use)
	} else if token, ok := o.c.fromPool(use); ok {
		return token, nil
	}
	token, err = o.askToken(ctx, region, key)
	if err == nil {
		return token, nil
	}
	if status := errors.Of(err).HTTPStatus; status != http.StatusUnauthorized && status != http.StatusForbidden {
		return "", err
	}
	// The key file may have changed since it was read.
	fresh, keyErr := o.apiKey()
	if keyErr != nil || fresh == key {
		return "", err
	}
	return o.askToken(ctx, region, fresh)
}

func (o *opening) apiKey() (string, error) {
	key, err := o.p.APIKey()
	if err != nil {
		return "", o.red.clean(errors.Wrap(errors.CodeInternal, errors.PhaseToken, err, "the API key can't be read"), "", "")
	}
	if key == "" {
		return "", errors.Newf(errors.CodeInvalidJob, errors.PhaseToken, "app %q has no API key", o.p.AppID)
	}
	o.red.add(key)
	return key, nil
}

func (o *opening) askToken(ctx context.Context, region, key string) (string, error) {
	token, err := o.post(ctx, region, key)
	return token, o.red.clean(err, "", "")
}

func (o *opening) post(parent context.Context, region, key string) (string, error) {
	u, err := o.c.o.Endpoints.tokenURL(region)
	if err != nil {
		return "", err
	}
	via, err := o.c.proxyOf(u)
	if err != nil {
		e := errors.FromTransport(errors.PhaseToken, err)
		e.Proxy = true
		return "", e
	}
	ctx, call := o.c.limitCall(parent, via != nil)
	defer call.stop()

	body := append(strconv.AppendInt([]byte(`{"expireAt":`), time.Now().Add(o.c.o.TokenTTL).Unix(), 10), '}')
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), bytes.NewReader(body))
	if err != nil {
		return "", errors.Wrap(errors.CodeInvalidRequest, errors.PhaseToken, withoutURL(err), "the token request can't be made")
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Api-Key", key)
	resp, err := o.c.http.Do(req)
	if err != nil {
		switch err = withoutURL(err); {
		case via != nil && !call.reached(ctx, u.Scheme):
			err = &blockedError{via, err}
		case via != nil:
			err = fmt.Errorf("through the proxy %s: %w", proxyName(via), err)
		}
		return "", callFailed(parent, ctx, errors.PhaseToken, "minting the session token", err)
	}
	defer func() { _ = resp.Body.Close() }() // nothing is lost with a body that was read
	if fromProxy(via, resp) {
		return "", errors.FromProxy(errors.PhaseToken, proxyName(via), resp.StatusCode, resp.Header)
	}
	answer, err := io.ReadAll(io.LimitReader(resp.Body, tokenLimit+1))
	if err != nil {
		return "", callFailed(parent, ctx, errors.PhaseToken, "minting the session token", err)
	}
	if len(answer) > tokenLimit {
		return "", errors.Newf(errors.CodeProtocolError, errors.PhaseToken, "the console's answer has more than 1 MiB")
	}
	token, refused := errors.ParseTokenAnswer(resp.StatusCode, resp.Header, answer)
	if refused != nil {
		return "", refused
	}
	return token, nil
}

// limitCall bounds a token call: TokenTimeout from when it has a connection. Dial
// and handshake have their own limits, ConnectTimeout each. When many sessions
// start at once, their handshakes wait for one another, which is not the
// console's delay. The overall bound is there only for a transport or proxy
// without such limits.
func (c *Client) limitCall(parent context.Context, proxied bool) (context.Context, *tokenCall) {
	call := &tokenCall{}
	ctx, cancel := context.WithCancelCause(parent)
	connecting := 12 * c.o.ConnectTimeout
	if proxied {
		connecting = 3 * c.o.ConnectTimeout
	}
	limit := time.AfterFunc(connecting, func() {
		if call.connected.Load() {
			cancel(fmt.Errorf("no answer within %s", c.o.TokenTimeout))
			return
		}
		cancel(fmt.Errorf("not connected within %s", connecting))
	})
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) {
			call.connected.Store(true)
			limit.Reset(c.o.TokenTimeout)
		},
		TLSHandshakeStart: func() { call.tunnel.Store(true) },
	})
	call.stop = func() {
		limit.Stop()
		cancel(nil)
	}
	return ctx, call
}

// tokenCall is a token call under way.
type tokenCall struct {
	stop      func()
	connected atomic.Bool // to the backend, or to a proxy that forwards requests
	tunnel    atomic.Bool // a TLS handshake with the backend began in a proxy's tunnel
}

// reached reports whether the backend may have been reached through a proxy. If a
// proxy forwards requests without a tunnel, a broken connection is the proxy's.
func (c *tokenCall) reached(ctx context.Context, scheme string) bool {
	return c.tunnel.Load() || c.connected.Load() && (scheme == "https" || ctx.Err() != nil)
}

// callFailed returns the error of a request that got no complete reply: the
// caller's cause if its context ended, else connectionFailed.
func callFailed(parent, ctx context.Context, phase errors.Phase, what string, err error) error {
	if parent.Err() != nil {
		return cancelled(parent, what)
	}
	return unreachable(ctx, phase, err)
}
