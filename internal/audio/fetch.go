package audio

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"avatarworker/internal/errors"
)

// maxRedirects is how many redirects a fetch follows.
const maxRedirects = 5

// newTransport uses HTTP/1.1 only. The streams of one HTTP/2 connection share a
// window, so a session at real-time pace would delay the others, and each may
// buffer 4 MiB. It uses no proxy from the environment, which would dial in the
// worker's place, unchecked.
func newTransport(opts Options) *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Transport{
		DialContext:            guardedDial(opts),
		TLSClientConfig:        opts.TLS.Clone(),
		TLSHandshakeTimeout:    10 * time.Second,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		ReadBufferSize:         readBuffer,
		DisableCompression:     true,
		Protocols:              &protocols,
	}
}

// redirectError refuses a redirect, with a text that is safe to show.
type redirectError string

func (e redirectError) Error() string { return string(e) }

func newClient(transport *http.Transport) *http.Client {
	return &http.Client{
		Transport: transport,
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			// It would send the first URL's query, often a signature, to another
			// host.
			req.Header.Del("Referer")
			if len(via) > maxRedirects {
				return redirectError("more than " + strconv.Itoa(maxRedirects) + " redirects")
			}
			if wrong := checkURL(req.URL); wrong != "" {
				return redirectError("redirected to a URL that " + wrong)
			}
			return nil
		},
	}
}

func parseURL(in *input) (*url.URL, error) {
	u, err := url.Parse(in.URL)
	if err != nil {
		// The parser's own text repeats parts of the URL, secrets included.
		return nil, invalid("%s.url: can't be read as a URL: give an absolute http or https URL", in.Field)
	}
	if wrong := checkURL(u); wrong != "" {
		return nil, invalid("%s.url: the URL %s", in.Field, wrong)
	}
	return u, nil
}

// checkURL returns why a URL is not fetched, or "" if it is.
func checkURL(u *url.URL) string {
	port, err := strconv.Atoi(u.Port())
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return "is not http or https"
	case u.Hostname() == "":
		return "names no host"
	case u.User != nil:
		return "carries a user name or password: none is sent"
	case u.Port() != "" && (err != nil || port < 1 || port > 65535):
		return "has no valid port"
	}
	return ""
}

// shownURL returns a URL without its secret parts.
func shownURL(u *url.URL) string {
	return shorten((&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String())
}

func (o *Opener) openURL(ctx context.Context, in *input) (*Speech, error) {
	u, err := parseURL(in)
	if err != nil {
		return nil, err
	}
	src := o.remoteSource(ctx, in, shownURL(u))
	src.fault = func(err error) error { return in.fetchFault(src.name, err) }
	res, err := o.get(src, u) //nolint:bodyclose // src closes it
	if err != nil {
		src.cancel(errClosed)
		return nil, err
	}
	src.body = res.Body
	src.size = res.ContentLength
	if err := in.checkResponse(src.name, res); err != nil {
		if cerr := src.close(); cerr != nil {
			return nil, err // the reply's error matters
		}
		return nil, err
	}
	return o.newSpeech(in, src)
}

func (o *Opener) get(src *source, u *url.URL) (*http.Response, error) {
	req, err := http.NewRequestWithContext(src.ctx, http.MethodGet, u.String(), http.NoBody)
	if err != nil {
		return nil, src.in.unavailable("%s: can't be asked for", src.name)
	}
	req.Header.Set("User-Agent", "avatarworker")
	req.Header.Set("Accept", "audio/*, application/octet-stream, */*")
	req.Header.Set("Accept-Encoding", "identity")
	var res *http.Response
	err = src.wait(func() (err error) {
		res, err = o.client.Do(req) //nolint:bodyclose // the caller's, or closed by source
		return err
	})
	switch {
	case err == nil:
		return res, nil
	case src.ctx.Err() != nil:
		return nil, err
	default:
		return nil, src.fault(err)
	}
}

// checkResponse accepts only status 200. The table of codes says what the others
// mean.
func (in *input) checkResponse(name string, res *http.Response) error {
	encoding := res.Header.Get("Content-Encoding")
	switch {
	case res.StatusCode != http.StatusOK:
		e := in.unavailable("%s: the server answered %d %s", name, res.StatusCode, http.StatusText(res.StatusCode))
		e.HTTPStatus = res.StatusCode
		e.RetryAfter = retryAfter(res.Header.Get("Retry-After"), time.Now())
		return e
	case encoding != "" && !strings.EqualFold(encoding, "identity"):
		return in.unavailable("%s: the server sent it in the encoding %q without being asked", name, shorten(encoding))
	}
	return nil
}

// retryAfter parses seconds or a date. It returns 0 if there is none, or if it is
// not in the future.
func retryAfter(value string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseInt(value, 10, 32); err == nil {
		return time.Duration(max(seconds, 0)) * time.Second
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return max(at.Sub(now), 0)
}

// fetchFault returns the error of a failed request or read. It quotes only errors
// known not to contain the URL; net/http's own contain all of it.
func (in *input) fetchFault(name string, err error) error {
	var (
		forbidden *forbiddenError
		redirect  redirectError
		dns       *net.DNSError
		op        *net.OpError
		cert      *tls.CertificateVerificationError
		hostname  x509.HostnameError
		late      net.Error
	)
	switch {
	case errors.As(err, &forbidden):
		return in.unavailable("%s: %s; audio.allow_private_urls is off", name, forbidden)
	case errors.As(err, &redirect):
		return in.unavailable("%s: %s", name, redirect)
	case errors.As(err, &dns):
		return in.unreachable(dns, "%s: the host can't be resolved: %s", name, dns.Err)
	case errors.As(err, &hostname):
		return in.unreachable(hostname, "%s: %s", name, hostname)
	case errors.As(err, &cert):
		return in.unreachable(cert, "%s: %s", name, cert)
	case errors.As(err, &op):
		return in.unreachable(op, "%s: %s", name, op)
	case errors.As(err, &late) && late.Timeout():
		return in.unreachable(nil, "%s: connecting took too long", name)
	case endOfFile(err):
		return in.unreachable(io.ErrUnexpectedEOF, "%s: the connection ended before all bytes were there", name)
	}
	return in.unreachable(nil, "%s: the server's answer can't be understood", name)
}
