package audio

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/errors"
)

// publicAddr is of a host on the public internet; internet leads there.
var publicAddr = netip.MustParseAddr("93.184.216.34")

// names is a Resolver whose answers can change from one look to the next.
type names struct {
	looks atomic.Int32
	at    func(look int, host string) []netip.Addr
}

func (n *names) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	addrs := n.at(int(n.looks.Add(1)), host)
	if addrs == nil {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return addrs, nil
}

func everywhere(addrs ...netip.Addr) *names {
	return &names{at: func(int, string) []netip.Addr { return addrs }}
}

// internet is a dialer that reaches the test's server at publicAddr, and notes
// every address that it is asked for.
type internet struct {
	server *httptest.Server
	dialed chan string
}

func serve(t testing.TB, handler http.HandlerFunc) *internet {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return &internet{server: server, dialed: make(chan string, 1000)}
}

func (i *internet) dial(ctx context.Context, network, address string) (net.Conn, error) {
	i.dialed <- address
	if !strings.HasPrefix(address, publicAddr.String()+":") {
		return nil, fmt.Errorf("%s was dialled", address)
	}
	return (&net.Dialer{}).DialContext(ctx, network, i.server.Listener.Addr().String())
}

func (i *internet) opener(t testing.TB, opts Options) *Opener {
	opts.Dial = i.dial
	if opts.Resolver == nil {
		opts.Resolver = everywhere(publicAddr)
	}
	return newOpener(t, opts)
}

func at(url string) Spec { return Spec{URL: url, Field: "audio"} }

func write(t testing.TB, w io.Writer, data []byte) {
	if _, err := w.Write(data); err != nil {
		t.Logf("the client went away: %v", err)
	}
}

func TestURLIsStreamed(t *testing.T) {
	net := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Referer") != "" || r.Header.Get("Accept-Encoding") != "identity" {
			t.Errorf("headers %v", r.Header)
		}
		if r.URL.Path == "/moved" {
			http.Redirect(w, r, "/clip.wav", http.StatusFound)
			return
		}
		write(t, w, clip.WAV)
	})
	o := net.opener(t, Options{})
	for _, url := range []string{"http://example.com/clip.wav?sig=sesame", "http://example.com/moved?sig=sesame"} {
		h, _ := mustRead(t, o, at(url))
		if !bytes.Equal(h.data, clip.WAV[44:]) {
			t.Error("the samples are not the file's")
		}
	}
}

func TestOpusFromAURLComesThroughUnchanged(t *testing.T) {
	net := serve(t, func(w http.ResponseWriter, _ *http.Request) { write(t, w, clip.Opus) })
	h, s := mustRead(t, net.opener(t, Options{}), at("http://example.com/hello.opus"))
	if !bytes.Equal(h.data, clip.Opus) || s.Format() != OggOpus {
		t.Error("the file's bytes were changed")
	}
}

func TestPrivateAddressesAreNeverDialled(t *testing.T) {
	net := serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, r.URL.Query().Get("to"), http.StatusFound)
	})
	rebinding := &names{at: func(look int, host string) []netip.Addr {
		if host == "rebind.example.com" && look > 1 {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}
		}
		return []netip.Addr{publicAddr}
	}}
	inside := everywhere(netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7"))
	for name, c := range map[string]struct {
		url      string
		resolver Resolver
	}{
		"loopback":             {"http://127.0.0.1/a", nil},
		"loopback 6":           {"http://[::1]:8080/a", nil},
		"mapped":               {"http://[::ffff:127.0.0.1]/a", nil},
		"zone":                 {"http://[fe80::1%25eth0]/a", nil},
		"metadata":             {"http://169.254.169.254/latest", nil},
		"name":                 {"http://inside.example.com/a", inside},
		"redirect":             {"http://example.com/a?to=http://127.0.0.1:9/secret", nil},
		"redirect to a name":   {"http://rebind.example.com/a?to=http://rebind.example.com:81/b", rebinding},
		"redirect to loopback": {"http://example.com/a?to=http://[::1]/secret", nil},
	} {
		t.Run(name, func(t *testing.T) {
			o := net.opener(t, Options{Resolver: c.resolver})
			e := wantError(t, openAndRead(t, o, at(c.url)), errors.CodeAudioUnavailable, errors.PhaseAudio,
				"audio.url", "private or special address", "audio.allow_private_urls")
			if e.Network || e.HTTPStatus != 0 {
				t.Error("a forbidden address would be tried again")
			}
			for len(net.dialed) > 0 {
				if address := <-net.dialed; !strings.HasPrefix(address, publicAddr.String()) {
					t.Errorf("%s was dialled", address)
				}
			}
		})
	}
}

// The name leads to a public address when it is looked up, and would lead
// inside the second time: the address that was checked is the one dialled.
func TestNameIsLookedUpOnceForCheckAndDial(t *testing.T) {
	net := serve(t, func(w http.ResponseWriter, _ *http.Request) { write(t, w, clip.WAV) })
	rebinding := &names{at: func(look int, _ string) []netip.Addr {
		if look > 1 {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}
		}
		return []netip.Addr{publicAddr}
	}}
	mustRead(t, net.opener(t, Options{Resolver: rebinding}), at("http://rebind.example.com/a"))
	if looks := rebinding.looks.Load(); looks != 1 {
		t.Errorf("looked up %d times", looks)
	}
	if address := <-net.dialed; address != publicAddr.String()+":80" {
		t.Errorf("dialled %s", address)
	}
}

func TestPublicAddressBesidesAPrivateOneIsTheOneDialled(t *testing.T) {
	net := serve(t, func(w http.ResponseWriter, _ *http.Request) { write(t, w, clip.WAV) })
	mustRead(t, net.opener(t, Options{Resolver: everywhere(netip.MustParseAddr("10.1.2.3"), publicAddr)}), at("http://example.com/a"))
}

func TestPrivateAddressIsReachedWhereAllowed(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { write(t, w, clip.WAV) }))
	t.Cleanup(server.Close)
	mustRead(t, newOpener(t, Options{AllowPrivateURLs: true}), at(server.URL))
	wantError(t, openAndRead(t, newOpener(t, Options{}), at(server.URL)), errors.CodeAudioUnavailable, errors.PhaseAudio, "127.0.0.1")
}

func TestOnlyPublicAddressesArePublic(t *testing.T) {
	for addr, want := range map[string]bool{
		"93.184.216.34": true, "8.8.8.8": true, "2606:2800:220:1::1": true, "64:ff9b::808:808": true, "2002:808:808::1": true, "::ffff:8.8.8.8": true,
		"127.0.0.1": false, "127.255.0.1": false, "0.0.0.0": false, "0.1.2.3": false, "10.0.0.1": false, "172.16.0.1": false, "172.31.255.255": false, "192.168.1.1": false,
		"169.254.169.254": false, "100.64.0.1": false, "100.127.255.255": false, "192.0.0.1": false, "192.0.2.1": false, "198.18.0.1": false, "198.51.100.1": false, "203.0.113.1": false,
		"224.0.0.1": false, "239.1.1.1": false, "240.0.0.1": false, "255.255.255.255": false,
		"::": false, "::1": false, "::ffff:127.0.0.1": false, "::ffff:10.0.0.1": false, "::127.0.0.1": false, "fe80::1": false, "fec0::1": false, "fc00::1": false, "fd12::1": false, "ff02::1": false,
		"64:ff9b::7f00:1": false, "64:ff9b::a00:1": false, "64:ff9b:1::808:808": false, "2002:7f00:1::": false, "2002:a00:1::1": false, "2001:db8::1": false, "2001::1": false, "100::1": false,
	} {
		if got := isPublic(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: public is %t, want %t", addr, got, want)
		}
	}
}

func TestRedirectsAreCheckedAndCounted(t *testing.T) {
	net := serve(t, func(w http.ResponseWriter, r *http.Request) {
		to := r.URL.Query().Get("to")
		if to == "" {
			to = r.URL.String()
		}
		w.Header().Set("Location", to)
		w.WriteHeader(http.StatusFound)
	})
	o := net.opener(t, Options{})
	for url, word := range map[string]string{
		"http://example.com/loop?sesame":                          "more than 5 redirects",
		"http://example.com/?to=file:///etc/passwd":               "not http or https",
		"http://example.com/?to=http://user:sesame@example.com/b": "password",
		"http://example.com/?to=http://example.com/%2525zz%25%25": "",
		"http://example.com/?to=%68ttp://[sesame/?sesame":         "",
	} {
		e := wantError(t, openAndRead(t, o, at(url)), errors.CodeAudioUnavailable, errors.PhaseAudio, word)
		if strings.Contains(e.Error(), "sesame") {
			t.Errorf("a secret shows: %s", e)
		}
	}
}

func TestStatusSaysWhetherToTryAgain(t *testing.T) {
	var calls atomic.Int32
	net := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/recovers" && calls.Add(1) > 1:
			write(t, w, clip.WAV)
		case r.URL.Path == "/recovers":
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.URL.Path == "/partial":
			w.WriteHeader(http.StatusPartialContent)
		default:
			http.NotFound(w, r)
		}
	})
	o := net.opener(t, Options{})
	for path, want := range map[string]int{"/gone?sesame": 404, "/partial": 206} {
		e := wantError(t, openAndRead(t, o, at("http://example.com"+path)), errors.CodeAudioUnavailable, errors.PhaseAudio, fmt.Sprint(want))
		if e.HTTPStatus != want || e.Network || strings.Contains(e.Error(), "sesame") {
			t.Errorf("got %+v", e)
		}
	}
	spec := at("http://example.com/recovers")
	e := wantError(t, openAndRead(t, o, spec), errors.CodeAudioUnavailable, errors.PhaseAudio, "503")
	if e.HTTPStatus != 503 || e.RetryAfter != 7*time.Second {
		t.Errorf("got %+v", e)
	}
	mustRead(t, o, spec)
}

func TestRetryAfterIsSecondsOrADate(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "12": 12 * time.Second, "-3": 0, "soon": 0, "99999999999999": 0,
		now.Add(time.Minute).Format(http.TimeFormat):  time.Minute,
		now.Add(-time.Minute).Format(http.TimeFormat): 0,
	} {
		if got := retryAfter(value, now); got != want {
			t.Errorf("%q: %s, want %s", value, got, want)
		}
	}
}

func TestTooLargeIsRefusedWhateverTheServerSays(t *testing.T) {
	endless := plainWAV(nil)
	endless.dataSize, endless.riffSize = 0xFFFFFFFF, 0xFFFFFFFF
	header := endless.bytes()
	var sent atomic.Int64
	net := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/said" {
			w.Header().Set("Content-Length", "5000000")
			w.WriteHeader(http.StatusOK)
			return
		}
		write(t, w, header)
		zeros := make([]byte, 10000)
		for {
			n, err := w.Write(zeros)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	o := net.opener(t, Options{MaxBytes: 1_000_000})
	for _, path := range []string{"/said", "/endless"} {
		e := wantError(t, openAndRead(t, o, at("http://example.com"+path)), errors.CodeAudioUnavailable, errors.PhaseAudio, "1000000 bytes", "audio.max_bytes")
		if e.Network || e.HTTPStatus != 0 {
			t.Errorf("%s would be tried again", path)
		}
	}
}

func TestSourceOfExactlyTheLimitIsTaken(t *testing.T) {
	net := serve(t, func(w http.ResponseWriter, _ *http.Request) { write(t, w, clip.WAV) })
	mustRead(t, net.opener(t, Options{MaxBytes: int64(len(clip.WAV))}), at("http://example.com/a"))
	wantError(t, openAndRead(t, net.opener(t, Options{MaxBytes: int64(len(clip.WAV)) - 1}), at("http://example.com/a")),
		errors.CodeAudioUnavailable, errors.PhaseAudio, "audio.max_bytes")
}

func TestSlowServerIsANetworkFault(t *testing.T) {
	gone := make(chan struct{})
	net := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/body" {
			write(t, w, clip.WAV[:1000])
			w.(http.Flusher).Flush()
		}
		select {
		case <-r.Context().Done():
		case <-gone:
		}
	})
	defer close(gone)
	o := net.opener(t, Options{FetchTimeout: 100 * time.Millisecond})
	for _, path := range []string{"/answer", "/body"} {
		e := wantError(t, openAndRead(t, o, at("http://example.com"+path)), errors.CodeAudioUnavailable, errors.PhaseAudio, "too slow", "100ms")
		if !e.Network {
			t.Errorf("%s would not be tried again", path)
		}
	}
}

// A drip of bytes keeps each single wait short; all of them together count.
func TestDrippingServerIsCutOff(t *testing.T) {
	net := serve(t, func(w http.ResponseWriter, r *http.Request) {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for i := range clip.WAV {
			select {
			case <-r.Context().Done():
				return
			case <-tick.C:
			}
			write(t, w, clip.WAV[i:i+1])
			w.(http.Flusher).Flush()
		}
	})
	o := net.opener(t, Options{FetchTimeout: 200 * time.Millisecond})
	e := wantError(t, openAndRead(t, o, at("http://example.com/")), errors.CodeAudioUnavailable, errors.PhaseAudio, "too slow")
	if !e.Network {
		t.Error("it would not be tried again")
	}
}

// Time between two calls of Next does not count against the source.
func TestSlowSessionIsNotCutOff(t *testing.T) {
	long := plainWAV(make([]byte, 4<<20)).bytes()
	net := serve(t, func(w http.ResponseWriter, _ *http.Request) { write(t, w, long) })
	s, err := net.opener(t, Options{FetchTimeout: 250 * time.Millisecond}).Open(t.Context(), at("http://example.com/"))
	if err != nil {
		t.Fatal(err)
	}
	<-time.After(300 * time.Millisecond) // longer than the limit: the thing under test
	if h, err := listen(t, s); err != nil || len(h.data) != 4<<20 {
		t.Errorf("%d bytes, %v", len(h.data), err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestWrongLengthIsDistinguishedFromABrokenFile(t *testing.T) {
	net := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/file" { // the length is right, the file is cut
			write(t, w, clip.WAV[:50000])
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(clip.WAV)))
		write(t, w, clip.WAV[:50000])
		panic(http.ErrAbortHandler)
	})
	o := net.opener(t, Options{})
	e := wantError(t, openAndRead(t, o, at("http://example.com/length")), errors.CodeAudioUnavailable, errors.PhaseAudio, "connection ended")
	if !e.Network {
		t.Error("a wrong length would not be tried again")
	}
	wantError(t, openAndRead(t, o, at("http://example.com/file")), errors.CodeInvalidJob, errors.PhaseAudio, "cut short", "audio.url")
}

func TestUnreachableHostIsANetworkFaultWithoutSecrets(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	url := server.URL
	server.Close() // nothing listens there now
	refused := newOpener(t, Options{AllowPrivateURLs: true})
	unknown := newOpener(t, Options{Resolver: &names{at: func(int, string) []netip.Addr { return nil }}})
	for _, c := range []struct {
		o    *Opener
		url  string
		word string
	}{{refused, url + "/a?sesame", "refused"}, {unknown, "http://nowhere.example.com/a?sesame", "can't be resolved"}} {
		e := wantError(t, openAndRead(t, c.o, at(c.url)), errors.CodeAudioUnavailable, errors.PhaseAudio, c.word)
		if !e.Network || strings.Contains(e.Error(), "sesame") {
			t.Errorf("got %+v", e)
		}
	}
}

func TestProxyOfTheEnvironmentIsNotUsed(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("http_proxy", "http://127.0.0.1:1")
	net := serve(t, func(w http.ResponseWriter, _ *http.Request) { write(t, w, clip.WAV) })
	mustRead(t, net.opener(t, Options{}), at("http://example.com/"))
}

func TestCompressedAnswerIsRefused(t *testing.T) {
	net := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		write(t, w, []byte("\x1f\x8b"))
	})
	wantError(t, openAndRead(t, net.opener(t, Options{}), at("http://example.com/")), errors.CodeAudioUnavailable, errors.PhaseAudio, "gzip")
}

func TestCancelEndsAWaitingNextWithItsCause(t *testing.T) {
	started := make(chan struct{})
	net := serve(t, func(w http.ResponseWriter, r *http.Request) {
		write(t, w, clip.WAV[:3300])
		w.(http.Flusher).Flush()
		close(started)
		<-r.Context().Done()
	})
	s, err := net.opener(t, Options{}).Open(t.Context(), at("http://example.com/"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	drained := errors.New("drained")
	<-started
	if _, _, err := s.Next(ctx); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { cancel(drained) })
	if _, _, err := s.Next(ctx); !errors.Is(err, drained) {
		t.Errorf("got %v, want the context's cause", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestHTTPSIsSpokenAndItsCertificateChecked(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { write(t, w, clip.WAV) }))
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // it reports the refused handshake
	server.StartTLS()
	t.Cleanup(server.Close)
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	trusting := newOpener(t, Options{AllowPrivateURLs: true, TLS: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}})
	mustRead(t, trusting, at(server.URL))
	e := wantError(t, openAndRead(t, newOpener(t, Options{AllowPrivateURLs: true}), at(server.URL+"/?sesame")),
		errors.CodeAudioUnavailable, errors.PhaseAudio, "certificate")
	if strings.Contains(e.Error(), "sesame") {
		t.Errorf("a secret shows: %s", e)
	}
}

func TestServerThatDoesNotSpeakHTTPIsANetworkFault(t *testing.T) {
	server := serve(t, func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		if r.URL.Path == "/babble" {
			write(t, conn, []byte("sesame sesame\r\n\r\n"))
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	o := server.opener(t, Options{})
	for path, word := range map[string]string{"/babble": "can't be understood", "/hangup": "connection ended"} {
		e := wantError(t, openAndRead(t, o, at("http://example.com"+path)), errors.CodeAudioUnavailable, errors.PhaseAudio, word)
		if !e.Network || strings.Contains(e.Error(), "sesame") {
			t.Errorf("got %+v", e)
		}
	}
}

func TestAURLIsNamedAsItWasAskedFor(t *testing.T) {
	for text, want := range map[string]string{
		"https://s3.example/b/a%20b%2Fc+d%2B?X-Amz-Signature=sesame": "https://s3.example/b/a%20b%2Fc+d%2B",
		"http://s3.example/b/a b.wav#x":                              "http://s3.example/b/a%20b.wav",
	} {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := shownURL(u); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}
