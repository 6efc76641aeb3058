package session

import (
	"context"
	"crypto/tls"
	"net/http"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"avatarworker/internal/errors"
)

// DefaultRegion is the region of sessions when neither the job nor the
// configuration names one.
const DefaultRegion = "us-west"

// AutoRegion asks the bootstrap call which region is nearest.
const AutoRegion = "auto"

const (
	// readLimit bounds one message. Real envelopes have about 50 kB, which is
	// already more than the library's own limit of 32 KiB.
	readLimit = 16 << 20

	// closeWait is how long a peer may take to answer our close frame before the
	// connection is cut. It is below the second that Close promises.
	closeWait = 800 * time.Millisecond
	// crossingWait is how long a session that is cancelled waits for a confirmation
	// that may be on its way. With closeWait it is less than a second.
	crossingWait = 150 * time.Millisecond

	// defaultTimeout is the timeout of a connection, of the token call's reply
	// and of the handshake.
	defaultTimeout = 10 * time.Second
)

// Auth is how the upgrade request carries the app ID and session token.
type Auth string

const (
	AuthHeader Auth = "header" // X-App-ID and X-Session-Key
	AuthQuery  Auth = "query"  // appId and sessionKey, as browsers must
)

// Pace is how fast speech is sent.
type Pace string

const (
	PaceFast     Pace = "fast"     // back to back
	PaceRealtime Pace = "realtime" // each chunk once the ones before it have been played
)

// Options configure a Client. The zero value of a field means the default named
// here.
type Options struct {
	// HTTPClient makes the calls to console and bootstrap; nil: one like
	// NewHTTPClient's, with ConnectTimeout. Its Transport is an *http.Transport,
	// whose proxy, dial functions and TLS settings hold for the ingress too.
	HTTPClient *http.Client
	Logger     zerolog.Logger
	Tracer     trace.Tracer // records nothing

	Endpoints     Endpoints
	DefaultRegion string   // DefaultRegion
	Fallback      []string // regions tried, in order, when a connection can't be made

	TokenTTL     time.Duration // 1h; the backend takes less than 24h
	TokenTimeout time.Duration // 10s, from the connection to the whole answer
	TokenPool    int           // tokens minted ahead for each app and region; 0: none
	Auth         Auth          // AuthHeader

	ConnectTimeout   time.Duration // 10s; of each dial, of each TLS handshake, and of the upgrade's answer
	HandshakeTimeout time.Duration // 10s, from upgrade to confirm
	StallTimeout     time.Duration // 30s without a frame while speech is owed
	PingInterval     time.Duration // 20s
	PingTimeout      time.Duration // 20s

	Pace         Pace          // PaceFast
	EgressMargin time.Duration // 5s; below zero: none
}

// Client opens sessions. It is safe for concurrent use. Close ends its sessions.
type Client struct {
	o         Options
	http      *http.Client
	transport *http.Transport // of http
	// tls is the configuration for connections to the ingress. transport modifies
	// its own while it works.
	tls        *tls.Config
	handshakes *handshakes // of those through a proxy
	ownHTTP    bool
	tracer     trace.Tracer
	mayReplay  bool // see replayHeader
	bootstrap  *bootstrap
	bufs       *bufferPool
	pinger     *pinger
	tokens     *tokenPool
	life       context.Context // of tokens minted ahead; ends with Close
	endLife    context.CancelFunc

	mu       sync.Mutex
	closed   bool
	sessions map[*Session]struct{}
	wg       sync.WaitGroup // opens in progress and reader goroutines
}

// NewHTTPClient returns an HTTP client for many sessions against one backend: it
// keeps connections for token calls and resumes TLS sessions. Each dial and each
// TLS handshake has 10 s.
func NewHTTPClient() *http.Client {
	return &http.Client{Transport: newTransport(defaultTimeout)}
}

// New returns a client. It opens no connection and starts no goroutine before
// the first session.
func New(o Options) *Client {
	c := &Client{ownHTTP: o.HTTPClient == nil, sessions: make(map[*Session]struct{})}
	c.o = withDefaults(o)
	// A redirect would send the API key, in a header that net/http does not treat
	// as secret, to any host the reply names.
	hc := *c.o.HTTPClient
	hc.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	c.http = &hc
	transport, ok := hc.Transport.(*http.Transport)
	if !ok {
		transport = newTransport(c.o.ConnectTimeout)
	}
	c.transport, c.tls = transport, &tls.Config{MinVersion: tls.VersionTLS12}
	if transport.TLSClientConfig != nil {
		c.tls = transport.TLSClientConfig.Clone()
	}
	c.handshakes = newHandshakes(c.o.ConnectTimeout)
	c.tls.NextProtos = []string{"http/1.1"} // an upgrade is HTTP/1.1's
	c.tracer = c.o.Tracer
	c.mayReplay = c.o.Endpoints.mayReplay()
	c.bootstrap = newBootstrap(c.http, c.o.Endpoints.BootstrapURL)
	c.bufs = newBufferPool()
	c.pinger = newPinger(c.o.PingInterval, c.o.PingTimeout)
	c.tokens = newTokenPool(c.o.TokenPool, c.o.TokenTTL)
	c.life, c.endLife = context.WithCancel(context.Background())
	return c
}

func withDefaults(o Options) Options {
	if o.Tracer == nil {
		o.Tracer = noop.NewTracerProvider().Tracer("")
	}
	o.DefaultRegion = orDefault(o.DefaultRegion, DefaultRegion)
	o.Endpoints.BootstrapURL = orDefault(o.Endpoints.BootstrapURL, defaultBootstrapURL)
	o.Auth = orDefault(o.Auth, AuthHeader)
	o.Pace = orDefault(o.Pace, PaceFast)
	o.TokenTTL = orDefault(o.TokenTTL, time.Hour)
	o.TokenTimeout = orDefault(o.TokenTimeout, defaultTimeout)
	o.ConnectTimeout = orDefault(o.ConnectTimeout, defaultTimeout)
	if o.HTTPClient == nil {
		o.HTTPClient = &http.Client{Transport: newTransport(o.ConnectTimeout)}
	}
	o.HandshakeTimeout = orDefault(o.HandshakeTimeout, defaultTimeout)
	o.StallTimeout = orDefault(o.StallTimeout, 30*time.Second)
	o.PingInterval = orDefault(o.PingInterval, 20*time.Second)
	o.PingTimeout = orDefault(o.PingTimeout, 20*time.Second)
	o.EgressMargin = max(orDefault(o.EgressMargin, 5*time.Second), 0)
	return o
}

func orDefault[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}

// Close ends every session with close code 1000, waits until they and their
// goroutines have ended, and is idempotent. It waits for an OnFrame that does not
// return.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	open := make([]*Session, 0, len(c.sessions))
	for s := range c.sessions {
		open = append(open, s)
	}
	c.mu.Unlock()

	var closing sync.WaitGroup
	for _, s := range open {
		closing.Go(func() { s.cancel(closedByOwner()) })
	}
	closing.Wait()
	c.endLife()
	c.wg.Wait()
	c.pinger.stop()
	if c.ownHTTP {
		c.http.CloseIdleConnections()
	}
	return nil
}

// beginOpen counts an Open in progress, so that Close waits for it.
func (c *Client) beginOpen() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return errors.Newf(errors.CodeInternal, errors.PhaseConnect, "the session client is closed")
	}
	c.wg.Add(1)
	return nil
}

// register adds a dialled session. It returns false if the client was closed
// meanwhile.
func (c *Client) register(s *Session) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.sessions[s] = struct{}{}
	c.wg.Add(1) // the reader goroutine's
	return true
}

func (c *Client) unregister(s *Session) {
	c.pinger.remove(s)
	c.mu.Lock()
	delete(c.sessions, s)
	c.mu.Unlock()
}

// remoteParent makes the job's own trace the parent if ctx carries none.
func remoteParent(ctx context.Context, traceParent, traceState string) context.Context {
	if traceParent == "" || trace.SpanContextFromContext(ctx).IsValid() {
		return ctx
	}
	return extractTrace(ctx, traceParent, traceState)
}
