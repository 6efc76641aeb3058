package session

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/coder/websocket"
	"go.opentelemetry.io/otel/attribute"

	"avatarworker/internal/errors"
)

// opening is one call of Open.
type opening struct {
	c      *Client
	p      *Params
	red    redactor
	config func() (AudioConfig, error) // waits for Params.Config
}

// Open mints a token, dials, configures the session and waits for the
// confirmation. If the WebSocket refuses the token, it mints one more and tries
// again. If a connection can't be made, it tries the next fallback region. Its
// error is an *errors.Error, Config's own, or has context.Cause(ctx) in its
// chain.
//
// ctx bounds the whole session, not only its opening: when ctx ends, the session
// is closed. A session that the backend confirmed is returned even if it has ended
// since: it is billed.
func (c *Client) Open(ctx context.Context, p Params) (*Session, error) {
	if err := c.beginOpen(); err != nil {
		return nil, err
	}
	defer c.wg.Done()
	if ctx.Err() != nil {
		return nil, cancelled(ctx, "opening the session")
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	o := &opening{c: c, p: &p, red: redactor{secrets: p.secrets()}}
	spanCtx := remoteParent(ctx, p.TraceParent, p.TraceState)
	regions, err := o.regions(spanCtx)
	if err != nil {
		return nil, err
	}
	prepareCtx, stop := context.WithCancel(spanCtx)
	defer stop()
	prepared := o.prepare(prepareCtx)
	// Config is the caller's code: it must have ended before Open returns.
	defer func() { stop(); <-prepared }()
	return o.inRegions(ctx, spanCtx, regions)
}

// prepare runs Params.Config concurrently with the token call.
func (o *opening) prepare(ctx context.Context) <-chan struct{} {
	var (
		audio AudioConfig
		err   error
		done  = make(chan struct{})
	)
	go func() {
		defer close(done)
		defer errors.Recover(&err, errors.PhaseAudio)
		audio, err = o.p.Config(ctx)
	}()
	o.config = func() (AudioConfig, error) {
		<-done
		return audio, err
	}
	return done
}

// regions returns the regions to try, in order.
func (o *opening) regions(ctx context.Context) ([]string, error) {
	region := orDefault(o.p.Region, o.c.o.DefaultRegion)
	explicit := o.c.o.Endpoints.explicit()
	switch {
	case region == AutoRegion && explicit:
		// The region does not matter: both addresses are configured.
		return []string{DefaultRegion}, nil
	case region == AutoRegion && (o.c.o.Endpoints.ConsoleURL != "" || o.c.o.Endpoints.IngressURL != ""):
		// The address that is not configured is derived from the default region.
		region = DefaultRegion
	case region == AutoRegion:
		var err error
		if region, err = o.c.bootstrap.region(ctx, o.p.AppID, o.c.o.Logger); err != nil {
			return nil, err
		}
	}
	regions := []string{region}
	if o.c.o.Endpoints.ConsoleURL == "" && o.c.o.Endpoints.IngressURL == "" {
		for _, r := range o.c.o.Fallback {
			if !slices.Contains(regions, r) {
				regions = append(regions, r)
			}
		}
	}
	for _, r := range regions {
		if err := checkRegion(r); err != nil {
			return nil, err
		}
	}
	return regions, nil
}

func (o *opening) inRegions(ctx, spanCtx context.Context, regions []string) (*Session, error) {
	for i, region := range regions {
		o.red.region = region
		s, err := o.inRegion(ctx, spanCtx, region)
		if err == nil {
			return s, nil
		}
		if i == len(regions)-1 || !unreachableRegion(err) || ctx.Err() != nil {
			return nil, err
		}
		o.c.o.Logger.Warn().Err(err).Str("region", region).Str("next_region", regions[i+1]).
			Msg("could not connect; trying the next region")
	}
	return nil, errors.Newf(errors.CodeInternal, errors.PhaseConnect, "no region to try")
}

// unreachableRegion reports whether a region could not be reached, as opposed to
// one that refused.
func unreachableRegion(err error) bool {
	var e *errors.Error
	return errors.As(err, &e) && e.Code == errors.CodeConnectionFailed &&
		(e.Phase == errors.PhaseToken || e.Phase == errors.PhaseConnect)
}

func (o *opening) inRegion(ctx, spanCtx context.Context, region string) (*Session, error) {
	s, err := o.once(ctx, spanCtx, region, false)
	if err == nil || !tokenRefused(err) || ctx.Err() != nil {
		return s, err
	}
	o.c.o.Logger.Debug().Err(err).Msg("the WebSocket refused the session token; minting another")
	return o.once(ctx, spanCtx, region, true)
}

// tokenRefused reports whether a new token may help. It can't if the API key was
// refused.
func tokenRefused(err error) bool {
	var e *errors.Error
	if !errors.As(err, &e) || e.Phase != errors.PhaseConnect && e.Phase != errors.PhaseHandshake {
		return false
	}
	return e.Code == errors.CodeSessionTokenExpired || e.Code == errors.CodeSessionTokenInvalid ||
		e.HTTPStatus == http.StatusUnauthorized // whatever code its text gave
}

// once makes one attempt. refused means that the backend has just refused a
// token. The connection to the ingress is opened while the token is minted.
func (o *opening) once(ctx, spanCtx context.Context, region string, refused bool) (*Session, error) {
	u, err := o.c.o.Endpoints.socketURL(region, o.p.AvatarID)
	if err != nil {
		return nil, err
	}
	ahead := o.c.connectEarly(spanCtx, u)
	defer ahead.stop()
	token, err := o.mint(spanCtx, region, refused)
	if err != nil {
		return nil, err
	}
	audio, err := o.config()
	if ctx.Err() != nil {
		return nil, cancelled(ctx, "preparing the speech")
	}
	if err != nil {
		return nil, err
	}
	configure, err := o.p.configure(audio)
	if err != nil {
		return nil, o.red.clean(err, "", "")
	}
	d, err := o.dial(spanCtx, region, u, token, ahead)
	if err != nil {
		return nil, err
	}
	return o.handshake(ctx, spanCtx, region, d, configure)
}

// dialled is an upgraded connection and the raw connection beneath it.
type dialled struct {
	conn   *websocket.Conn
	stream *stream // beneath conn
	raw    net.Conn
	replay string // see replayHeader
}

// replayHeader is a header by which a simulated backend that replays a recorded
// exchange names the recorded req_id in its upgrade reply. The real backend does
// not send it, and a client chooses its own req_ids, so it counts only if an
// address other than the vendor's is configured (docs/protocol.md, section 3).
const replayHeader = "Avatar-Replay-Req-Id"

// staleAfter is how long a connection may wait for its request before a server is
// assumed to have dropped it.
const staleAfter = 2 * time.Second

func (o *opening) dial(parent context.Context, region string, u *url.URL, token string, ahead *earlyConn) (d dialled, err error) {
	spanCtx, span := o.c.span(parent, spanConnect, region)
	defer func() { endSpan(span, err) }()
	o.red.add(token)
	header := http.Header{}
	if o.c.o.Auth == AuthQuery {
		q := u.Query()
		q.Set("appId", o.p.AppID)
		q.Set("sessionKey", token)
		login := *u // ahead may still read u
		login.RawQuery = q.Encode()
		u = &login
	} else {
		header.Set("X-App-ID", o.p.AppID)
		header.Set("X-Session-Key", token)
	}
	raw, err := ahead.take(spanCtx) // it has its own timeouts
	if err != nil {
		return dialled{}, o.red.clean(o.refusal(spanCtx, parent, nil, nil, err), "", "")
	}
	waited := time.Since(ahead.since)
	timeout := o.c.o.ConnectTimeout
	ctx, cancel := context.WithTimeoutCause(spanCtx, timeout, fmt.Errorf("no answer to the upgrade within %s", timeout))
	defer cancel()
	conn, resp, x, err := o.c.upgrade(ctx, raw, u, header)
	if err != nil && !x.answered && waited >= staleAfter && ctx.Err() == nil {
		if raw, err = o.c.connect(ctx, u); err == nil {
			conn, resp, x, err = o.c.upgrade(ctx, raw, u, header)
		}
	}
	if err != nil {
		return dialled{}, o.red.clean(o.refusal(ctx, parent, x, resp, err), "", "")
	}
	if t, ok := raw.(*tls.Conn); ok {
		raw = t.NetConn() // closing the TLS layer may wait for close_notify
	}
	conn.SetReadLimit(readLimit)
	d = dialled{conn: conn, stream: x.stream, raw: raw}
	if id := resp.Header.Get(replayHeader); len(id) <= maxID && o.c.mayReplay {
		d.replay = id
	}
	return d, nil
}

// upgrade upgrades a connection to a WebSocket, and closes it if that fails.
func (c *Client) upgrade(ctx context.Context, raw net.Conn, u *url.URL, header http.Header) (*websocket.Conn, *http.Response, *exchange, error) {
	x := &exchange{conn: raw, bufs: c.bufs}
	conn, resp, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{
		HTTPHeader: header,
		HTTPClient: &http.Client{
			Transport:     x,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	})
	if err != nil {
		_ = raw.Close() // the error says more
	}
	return conn, resp, x, err
}

// refusal returns the error of a failed upgrade.
func (o *opening) refusal(ctx, parent context.Context, x *exchange, resp *http.Response, err error) error {
	if parent.Err() != nil {
		return cancelled(parent, "dialling the WebSocket")
	}
	if resp == nil {
		return unreachable(ctx, errors.PhaseConnect, err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return errors.Wrap(errors.CodeProtocolError, errors.PhaseConnect, withoutURL(err), "the reply to the upgrade is not a WebSocket's")
	}
	body := x.refusal
	if len(body) == refusalLimit {
		body = o.red.trimCut(body)
	}
	return errors.FromHTTP(errors.PhaseConnect, resp.StatusCode, resp.Header, body)
}

func (o *opening) handshake(ctx, parent context.Context, region string, d dialled, configure []byte) (_ *Session, err error) {
	_, span := o.c.span(parent, spanHandshake, region)
	defer func() { endSpan(span, err) }()

	s := newSession(o, region, d)
	if !o.c.register(s) {
		_ = d.conn.CloseNow() // the client is closed; the result does not matter
		return nil, errors.Newf(errors.CodeInternal, errors.PhaseConnect, "the session client is closed")
	}
	s.watch(ctx)
	go s.readLoop()
	timeout := o.c.o.HandshakeTimeout
	limit := time.AfterFunc(timeout, func() {
		if s.crossed() { // after a freeze it may have come, unread
			return
		}
		s.kill(errors.Newf(errors.CodeConnectionFailed, errors.PhaseHandshake, "the backend did not confirm the session within %s", timeout))
	})
	defer limit.Stop()
	if err := d.conn.Write(context.Background(), websocket.MessageBinary, configure); err != nil {
		s.sendFailed(errors.PhaseHandshake, err)
	}
	select {
	case <-s.confirmed:
	case <-s.ended:
	}
	if err := s.failure(""); err != nil {
		s.kill(err)
		<-s.readDone
		if s.connectionIDIfConfirmed() == "" {
			return nil, err
		}
		// Its end came with the confirmation: it is billed, and its owner has to know.
	}
	span.SetAttributes(attribute.String("avatar.connection_id", s.connectionID))
	o.c.pinger.add(s)
	return s, nil
}
