// Package natsconn connects to NATS with the setups that people use: several
// servers, credentials, nkeys, TLS, the nats tool's contexts, or a server in this
// process. A connection survives any outage. The package owns connection options
// and the redaction of logins, and must not know what is sent.
package natsconn

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/synadia-io/orbit.go/natscontext"

	"avatarworker/internal/errors"
)

const (
	dialTimeout   = 5 * time.Second
	reconnectWait = time.Second
	pingInterval  = 10 * time.Second
	drainTimeout  = 5 * time.Second
	// writeTimeout is how long a connection may accept no data before it counts
	// as broken. While one publish blocks, all others on the connection do. The
	// shortest time in which a caller must notice is the one between giving up a
	// lease and its expiry, 3 s.
	writeTimeout = 2 * time.Second
)

// TLS names PEM files. Each may be empty, but Cert and Key must be given
// together.
type TLS struct{ Cert, Key, CA string }

// Options configure a connection. At most one of Creds, NKey, User and Token is
// given.
type Options struct {
	URLs     string // comma-separated; empty: nats://127.0.0.1:4222
	Name     string // how the server lists this client
	Creds    string // file
	NKey     string // file with a user's seed
	TLS      TLS
	Context  string // of the nats tool, by name or absolute path; URLs, where given, win over its servers
	User     string
	Password string
	Token    string
	// Domain and APIPrefix locate JetStream's API; at most one is given. If both
	// are empty, the context decides, else it is $JS.API.
	Domain, APIPrefix string
	// InboxPrefix is the prefix of reply subjects. If empty, it is the context's,
	// else _INBOX.
	InboxPrefix string
	// TLSFirst starts with the TLS handshake; otherwise the context decides.
	TLSFirst bool
	// InProcess connects to a server in this process instead of URLs.
	InProcess nats.InProcessConnProvider
	// Once makes Open fail at once if the first connect fails, for commands
	// that a person waits for. Without it Open returns a connection that keeps
	// trying: a worker survives an absent NATS.
	Once   bool
	Logger zerolog.Logger // the zero value logs nothing
	// OnState is called for each change of state, from goroutines of the
	// connection, one at a time. May be nil.
	OnState func(connected bool)
	// OnDenied is called, from a goroutine of the connection, with what the server
	// does not permit, such as `Publish to "$JS.API.INFO"`. The request that it was
	// for gets no answer. May be nil.
	OnDenied func(operation string)
}

// Open connects, or (unless Once) keeps trying in the background while NATS is
// unreachable (WaitConnected waits for it), and opens JetStream with the API that
// the options or the context name. The error names the setting or file
// that is wrong, never a secret. It is a *SettingError if no connection was
// needed to find it.
//
// Nothing is buffered while disconnected: a publish fails at once, so that it
// can't be stored after it was reported as failed. On a stalled connection it
// fails within 2 s, and the connection is replaced.
func Open(ctx context.Context, o Options, opts ...jetstream.JetStreamOpt) (*nats.Conn, jetstream.JetStream, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	nc, api, err := o.connect()
	if err != nil {
		return nil, nil, err
	}
	js, err := api.open(nc, opts)
	if err != nil {
		nc.Close()
		return nil, nil, &SettingError{fmt.Errorf("JetStream: %w", err)}
	}
	return nc, js, nil
}

func (o Options) connect() (*nats.Conn, api, error) {
	urls, opts, err := o.settings()
	if err != nil {
		return nil, api{}, &SettingError{err}
	}
	if o.usesContext() {
		return o.connectContext(opts)
	}
	nc, err := nats.Connect(urls, opts...)
	if err != nil {
		return nil, api{}, fmt.Errorf("connecting to NATS at %s: %s%s", Redact(urls), Redact(err.Error()), o.hint(err))
	}
	return nc, o.api(), nil
}

// hint returns what to do about errors that do not say so themselves.
func (o Options) hint(err error) string {
	if o.TLSFirst && !errors.Is(err, nats.ErrNoServers) {
		return tlsFirstHint
	}
	return ""
}

const tlsFirstHint = " (nats.tls_first is set: does the server begin with the TLS handshake? It needs tls.handshake_first)"

// api locates JetStream's API; the zero value is $JS.API.
type api struct{ domain, prefix string }

func (o Options) api() api { return api{o.Domain, o.APIPrefix} }

func (a api) open(nc *nats.Conn, opts []jetstream.JetStreamOpt) (jetstream.JetStream, error) {
	switch {
	case a.domain != "":
		return jetstream.NewWithDomain(nc, a.domain, opts...)
	case a.prefix != "":
		return jetstream.NewWithAPIPrefix(nc, a.prefix, opts...)
	}
	return jetstream.New(nc, opts...)
}

// Check returns the *SettingError that Open would return before it connects,
// or nil.
func Check(o Options) error {
	_, opts, err := o.settings()
	if err != nil {
		return &SettingError{err}
	}
	if !o.usesContext() {
		return nil
	}
	errEnough := errors.New("not to be connected")
	enough := func(*nats.Options) error { return errEnough }
	if _, _, err = natscontext.Connect(o.Context, append(opts, readable, enough)...); errors.Is(err, errEnough) {
		return nil
	}
	return contextError(o.Context, err)
}

// SettingError is a setting with which connecting is pointless: it is invalid, or
// it names a file or context that can't be read.
type SettingError struct{ err error }

func (e *SettingError) Error() string { return e.err.Error() }
func (e *SettingError) Unwrap() error { return e.err }

// settings returns the servers and the library's options.
func (o Options) settings() (urls string, opts []nats.Option, err error) {
	if urls, err = serverURLs(o.URLs); err != nil {
		return "", nil, err
	}
	identity, err := o.identity()
	if err != nil {
		return "", nil, err
	}
	opts = append(o.connectionOptions(), identity...)
	if o.Domain != "" && o.APIPrefix != "" {
		return "", nil, errors.New("nats.domain and nats.api_prefix are given together: keep one (a domain is the prefix $JS.<domain>.API)")
	}
	if o.InboxPrefix != "" {
		prefix := nats.CustomInboxPrefix(o.InboxPrefix)
		if err := prefix(&nats.Options{}); err != nil {
			return "", nil, fmt.Errorf("nats.inbox_prefix %q: write tokens joined by dots without wildcards, such as _INBOX_worker", o.InboxPrefix)
		}
		opts = append(opts, prefix)
	}
	if o.TLSFirst {
		opts = append(opts, nats.TLSHandshakeFirst())
	}
	if o.usesContext() && strings.TrimSpace(o.URLs) != "" {
		opts = append(opts, servers(urls))
	}
	if o.InProcess != nil {
		opts = append(opts, nats.InProcessServer(o.InProcess))
	}
	return urls, append(opts, closeWhenStalled), nil // last, because it depends on the others
}

func (o Options) usesContext() bool { return o.Context != "" && o.InProcess == nil }

// servers replaces a context's servers.
func servers(urls string) nats.Option {
	return func(o *nats.Options) error {
		o.Url, o.Servers = "", strings.Split(urls, ",")
		return nil
	}
}

// connectContext uses the context's servers, identity and JetStream API. Our
// options come after them and take precedence.
func (o Options) connectContext(opts []nats.Option) (*nats.Conn, api, error) {
	name, settled := o.Context, false
	nc, settings, err := natscontext.Connect(name, append(opts, readable, func(*nats.Options) error { settled = true; return nil })...)
	switch {
	case err != nil && !settled:
		return nil, api{}, contextError(name, err)
	case err != nil:
		return nil, api{}, fmt.Errorf("nats.context %s: %s%s", name, Redact(err.Error()), o.hint(err))
	}
	if found := o.api(); found != (api{}) {
		return nc, found, nil
	}
	return nc, api{settings.JSDomain, settings.JSAPIPrefix}, nil
}

func contextError(name string, err error) error {
	if strings.Contains(err.Error(), "unknown context") {
		return &SettingError{fmt.Errorf("nats.context %s: there is no context of this name; 'nats context ls' lists them", name)}
	}
	return &SettingError{fmt.Errorf("nats.context %s: %s", name, Redact(err.Error()))}
}

func (o Options) connectionOptions() []nats.Option {
	w := &stateLogger{log: o.Logger, onState: o.OnState, onDenied: o.OnDenied}
	return []nats.Option{
		nats.Name(o.Name),
		nats.Timeout(dialTimeout),
		nats.RetryOnFailedConnect(!o.Once),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(reconnectWait),
		nats.ReconnectJitter(reconnectWait, reconnectWait),
		nats.ReconnectBufSize(-1),
		nats.PingInterval(pingInterval),
		nats.MaxPingsOutstanding(2),
		nats.DrainTimeout(drainTimeout),
		nats.IgnoreAuthErrorAbort(), // credentials may be rotated while we run
		nats.ConnectHandler(w.connected),
		nats.ReconnectHandler(w.connected),
		nats.ReconnectErrHandler(w.reconnectFailed),
		nats.DisconnectErrHandler(w.disconnected),
		nats.ClosedHandler(w.closed),
		nats.ErrorHandler(w.failed),
		nats.LameDuckModeHandler(w.lameDuck),
	}
}

// WaitConnected returns nil once connected. If ctx ends first, the error contains
// the servers' addresses and the last connection error.
func WaitConnected(ctx context.Context, nc *nats.Conn) error {
	changes := nc.StatusChanged(nats.CONNECTED, nats.CLOSED)
	defer nc.RemoveStatusListener(changes)
	for !nc.IsConnected() {
		if nc.IsClosed() {
			return fmt.Errorf("the connection to NATS is closed")
		}
		select {
		case <-changes:
		case <-ctx.Done():
			return fmt.Errorf("NATS at %s can't be reached: %s: %w", Redact(strings.Join(nc.Servers(), ",")), lastError(nc), ctx.Err())
		}
	}
	return nil
}

func lastError(nc *nats.Conn) string {
	if err := nc.LastError(); err != nil {
		return Redact(err.Error())
	}
	return "no answer"
}

// Close delivers what was received, sends what was published and closes the
// connection. If ctx ends first, it closes at once and returns an error. Closing
// a closed connection is allowed.
func Close(ctx context.Context, nc *nats.Conn) error {
	closed := nc.StatusChanged(nats.CLOSED)
	defer nc.RemoveStatusListener(closed)
	if err := nc.Drain(); err != nil {
		nc.Close() // not connected or already closed: nothing to drain
		return nil
	}
	for !nc.IsClosed() {
		select {
		case <-closed:
		case <-ctx.Done():
			nc.Close()
			return fmt.Errorf("closing the connection to NATS: not drained in time: %w", ctx.Err())
		}
	}
	return nil
}

var userInfo = regexp.MustCompile(`(^|[,\s"'/])([A-Za-z0-9+.-]+://)?[^\s"'/,]+@`)

// Redact replaces the login before an @ in URLs: user and password, or a token.
func Redact(text string) string {
	return userInfo.ReplaceAllString(text, "${1}${2}xxxxx@")
}
