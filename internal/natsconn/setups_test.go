package natsconn_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/natsconn"
	"avatarworker/internal/natsserver/natstest"
)

// hub starts a hub with JetStream in the domain "hub" and returns the URL of a
// leaf node without JetStream.
func hub(t *testing.T) (leaf string) {
	t.Helper()
	port := natstest.Ports(t, 1)[0]
	natstest.Configured(t, fmt.Sprintf(`
		listen: 127.0.0.1:-1
		server_name: hub
		jetstream { domain: hub }
		leafnodes { listen: "127.0.0.1:%d" }`, port))
	return natstest.Configured(t, fmt.Sprintf(`
		listen: 127.0.0.1:-1
		server_name: leaf
		leafnodes { remotes: [{url: "nats://127.0.0.1:%d"}] }`, port))
}

func contextFile(t *testing.T, text string) string { return write(t, "ctx.json", text) }

func TestDomainAndPrefixLeadToJetStreamByConfigurationAndByContext(t *testing.T) {
	t.Parallel()
	leaf := hub(t)
	for name, o := range map[string]natsconn.Options{
		"domain":                 {URLs: leaf, Domain: "hub"},
		"prefix":                 {URLs: leaf, APIPrefix: "$JS.hub.API"},
		"context's domain":       {Context: contextFile(t, `{"url":"`+leaf+`","jetstream_domain":"hub"}`)},
		"context's prefix":       {Context: contextFile(t, `{"url":"`+leaf+`","jetstream_api_prefix":"$JS.hub.API"}`)},
		"over the context's":     {Context: contextFile(t, `{"url":"`+leaf+`","jetstream_domain":"other"}`), Domain: "hub"},
		"url over the context's": {URLs: leaf, Context: contextFile(t, `{"url":"nats://127.0.0.1:1","jetstream_domain":"hub"}`)},
	} {
		t.Run(name, func(t *testing.T) {
			o.Once = true
			nc, js, err := natsconn.Open(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			if _, err := js.CreateOrUpdateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "B"}); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestInboxPrefixComesFromConfigurationOrContext(t *testing.T) {
	t.Parallel()
	url := natstest.Configured(t, `
		listen: 127.0.0.1:-1
		jetstream: enabled
		authorization { users: [{user: u, password: p, permissions: {publish: ">", subscribe: "_INBOX_me.>"}}] }`)
	login := natsconn.Options{URLs: url, User: "u", Password: "p", Once: true}
	configured := login
	configured.InboxPrefix = "_INBOX_me"
	byContext := natsconn.Options{Once: true, Context: contextFile(t, `{"url":"`+url+`","user":"u","password":"p","inbox_prefix":"_INBOX_me"}`)}
	over := natsconn.Options{Once: true, InboxPrefix: "_INBOX_me", Context: contextFile(t, `{"url":"`+url+`","user":"u","password":"p","inbox_prefix":"_INBOX_you"}`)}
	for name, o := range map[string]natsconn.Options{"configuration": configured, "context": byContext, "over the context's": over} {
		t.Run(name, func(t *testing.T) {
			nc, js, err := natsconn.Open(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			if _, err := js.AccountInfo(t.Context()); err != nil {
				t.Error(err)
			}
			if !strings.HasPrefix(nc.NewInbox(), "_INBOX_me.") {
				t.Errorf("inbox %s", nc.NewInbox())
			}
		})
	}
}

func TestTLSFirstComesFromConfigurationOrContext(t *testing.T) {
	t.Parallel()
	cert, key := certificate(t)
	url := natstest.Configured(t, `
		listen: 127.0.0.1:-1
		tls { cert_file: "`+cert+`", key_file: "`+key+`", handshake_first: true }`)
	for name, o := range map[string]natsconn.Options{
		"configuration": {URLs: url, TLSFirst: true, TLS: natsconn.TLS{CA: cert}},
		"context":       {Context: contextFile(t, `{"url":"`+url+`","tls_first":true,"ca":"`+cert+`"}`)},
	} {
		o.Once = true
		nc, _, err := natsconn.Open(t.Context(), o)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if state, err := nc.TLSConnectionState(); err != nil || !state.HandshakeComplete {
			t.Errorf("%s: %+v, %v", name, state, err)
		}
		nc.Close()
	}
}

func TestTLSFirstAgainstAServerThatSpeaksFirstIsNamed(t *testing.T) {
	t.Parallel()
	nc, _, err := natsconn.Open(t.Context(), natsconn.Options{URLs: natstest.Start(t).ClientURL(), TLSFirst: true, Once: true})
	if err == nil {
		nc.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "nats.tls_first") {
		t.Errorf("got %v", err)
	}
}

func TestTheLogNamesTLSFirstWhereTheServerSpeaksFirst(t *testing.T) {
	t.Parallel()
	said := make(chan string, 1)
	log := zerolog.New(firstLine(said))
	nc, _, err := natsconn.Open(t.Context(), natsconn.Options{URLs: natstest.Start(t).ClientURL(), TLSFirst: true, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	select {
	case line := <-said:
		if !strings.Contains(line, "nats.tls_first") {
			t.Errorf("got %s", line)
		}
	case <-time.After(natstest.Patience):
		t.Error("nothing was logged")
	}
}

// firstLine keeps the first line of a log.
type firstLine chan string

func (l firstLine) Write(line []byte) (int, error) {
	select {
	case l <- string(line):
	default:
	}
	return len(line), nil
}

// certificate makes one for 127.0.0.1 that is its own authority.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}
