package simulator_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/session"
	"avatarworker/internal/simulator"
)

// oneChunk is an utterance of some silence.
type oneChunk struct{ data []byte }

func (o *oneChunk) Next(context.Context) ([]byte, time.Duration, error) {
	return o.data, time.Duration(len(o.data)) * time.Second / 32000, io.EOF
}

func TestSessionsRunOverTLSAndAreCutThereToo(t *testing.T) {
	cert, authority, err := simulator.NewCertificate()
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, simulator.Options{TLS: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}})
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authority) {
		t.Fatal("no certificate")
	}
	hc := session.NewHTTPClient()
	transport := hc.Transport.(*http.Transport)
	transport.TLSClientConfig.RootCAs = roots
	defer transport.CloseIdleConnections()
	c := session.New(session.Options{
		HTTPClient: hc, Endpoints: session.Endpoints{ConsoleURL: s.ConsoleURL(), IngressURL: s.IngressURL()},
	})
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	for avatar, want := range map[string]errors.Code{"ok": "", "drop-1": errors.CodeConnectionClosed, "fail-connectionFailed": errors.CodeConnectionFailed} {
		opened, err := c.Open(t.Context(), session.Params{
			AppID: "app", AvatarID: avatar, APIKey: func() (string, error) { return "any", nil },
			Config: func(context.Context) (session.AudioConfig, error) { return session.AudioConfig{SampleRate: 16000}, nil },
		})
		if err == nil {
			_, err = opened.Speak(t.Context(), session.Utterance{Speech: &oneChunk{make([]byte, 16000*2*5)}})
			_ = opened.Close() // it always returns nil
		}
		if want == "" && err != nil || want != "" && errors.Of(err).Code != want {
			t.Errorf("%s: %v, want %s", avatar, err, want)
		}
	}
}
