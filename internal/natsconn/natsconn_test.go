package natsconn_test

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsconn"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestBadSettingsAreNamedAndNoSecretIsShown(t *testing.T) {
	t.Parallel()
	missing := filepath.Join(t.TempDir(), "gone")
	junk := write(t, "junk", "secret")
	inContext := func(key, file string) string {
		return write(t, "ctx.json", `{"url":"127.0.0.1:1","`+key+`":"`+file+`"}`)
	}
	for name, tc := range map[string]struct {
		o    natsconn.Options
		text string
	}{
		"scheme":            {natsconn.Options{URLs: "http://u:secret@h"}, `address 1: unknown scheme "http"`},
		"second address":    {natsconn.Options{URLs: "nats://h, nats://u:secret@"}, "address 2: no host"},
		"password unquoted": {natsconn.Options{URLs: "nats://u:secret%@h"}, "address 1: not a URL"},
		"password cut":      {natsconn.Options{URLs: "nats://u:secret,x@h"}, "address 1: not a URL"},
		"nothing":           {natsconn.Options{URLs: " , "}, "names no server"},
		"creds missing":     {natsconn.Options{Creds: missing}, "nats.creds (NATS_CREDS): there is no file " + missing + ": correct the path"},
		"creds junk":        {natsconn.Options{Creds: junk}, "nats.creds " + junk},
		"nkey missing":      {natsconn.Options{NKey: missing}, "nats.nkey (NATS_NKEY): there is no file " + missing},
		"nkey junk":         {natsconn.Options{NKey: junk}, "nats.nkey " + junk},
		"ca missing":        {natsconn.Options{TLS: natsconn.TLS{CA: missing}}, "nats.tls.ca (NATS_CA): there is no file " + missing},
		"ca junk":           {natsconn.Options{TLS: natsconn.TLS{CA: junk}}, "nats.tls.ca " + junk},
		"cert alone":        {natsconn.Options{TLS: natsconn.TLS{Cert: junk}}, "without nats.tls.key"},
		"cert junk":         {natsconn.Options{TLS: natsconn.TLS{Cert: junk, Key: junk}}, "nats.tls.cert " + junk},
		"domain and prefix": {natsconn.Options{Domain: "a", APIPrefix: "b"}, "nats.domain and nats.api_prefix"},
		"inbox prefix":      {natsconn.Options{InboxPrefix: "a.>"}, "nats.inbox_prefix"},
		"creds a directory": {natsconn.Options{Creds: t.TempDir()}, "nats.creds: "},
		"a pipe for creds":  {natsconn.Options{Creds: fifo(t)}, "is not a regular file"},
		"a pipe for a nkey": {natsconn.Options{NKey: fifo(t)}, "is not a regular file"},
		"a pipe for the ca": {natsconn.Options{TLS: natsconn.TLS{CA: fifo(t)}}, "is not a regular file"},
		"a pipe for a key":  {natsconn.Options{TLS: natsconn.TLS{Cert: junk, Key: fifo(t)}}, "is not a regular file"},
		"two ways":          {natsconn.Options{Creds: junk, Token: "secret"}, "nats.creds and a token"},
		"context unknown":   {natsconn.Options{Context: "nobody-has-this"}, "nats.context nobody-has-this: there is no context of this name; 'nats context ls' lists them"},
		"context's creds":   {natsconn.Options{Context: inContext("creds", missing)}, missing},
		"context's junk":    {natsconn.Options{Context: inContext("creds", junk)}, "nats.context"},
		"context's nkey":    {natsconn.Options{Context: inContext("nkey", missing)}, missing},
		"context's ca":      {natsconn.Options{Context: inContext("ca", missing)}, missing},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := natsconn.Open(t.Context(), tc.o)
			var wrong *natsconn.SettingError
			if !errors.As(err, &wrong) || !strings.Contains(err.Error(), tc.text) {
				t.Fatalf("got %v, want %q", err, tc.text)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Fatalf("the secret is in %v", err)
			}
			if unconnected := natsconn.Check(tc.o); !errors.As(unconnected, &wrong) || unconnected.Error() != err.Error() {
				t.Fatalf("checked, %v; connecting, %v", unconnected, err)
			}
		})
	}
}

// fifo makes a named pipe that has no writer: opening it for reading waits.
func fifo(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRedactHidesUsersAndTokens(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"nats://u:p@h:1,nats://tok@h2": "nats://xxxxx@h:1,nats://xxxxx@h2",
		"u:p@h":                        "xxxxx@h",
		`parse "tls://u:p@ss@h": bad`:  `parse "tls://xxxxx@h": bad`,
		"nats://h:4222":                "nats://h:4222",
	} {
		if got := natsconn.Redact(text); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestWorkerOutlivesAnAbsentServerAndLearnsOfIt(t *testing.T) {
	t.Parallel()
	first := natstest.Start(t)
	u, err := url.Parse(first.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(u.Port())
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Shutdown(); err != nil {
		t.Fatal(err)
	}
	states := make(chan bool, 16)
	nc, _, err := natsconn.Open(t.Context(), natsconn.Options{
		URLs:    first.ClientURL(),
		OnState: func(connected bool) { states <- connected },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if err := nc.Publish("s", nil); err == nil {
		t.Error("a publish without a connection did not fail")
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := natsconn.WaitConnected(short, nc); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), first.ClientURL()) {
		t.Errorf("waiting: %v", err)
	}
	second := natstest.StartWith(t, natsserver.Options{Port: port})
	if err := natsconn.WaitConnected(t.Context(), nc); err != nil {
		t.Fatal(err)
	}
	expect(t, states, true)
	if err := second.Shutdown(); err != nil {
		t.Fatal(err)
	}
	expect(t, states, false)
	natstest.StartWith(t, natsserver.Options{Port: port})
	expect(t, states, true)
}

func expect(t *testing.T, states <-chan bool, want bool) {
	t.Helper()
	select {
	case got := <-states:
		if got != want {
			t.Fatalf("state %t, want %t", got, want)
		}
	case <-time.After(natstest.Patience):
		t.Fatalf("no state, want %t", want)
	}
}

func TestOnceFailsAtOnceWithoutTheSecret(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	gone := s.ClientURL()
	if err := s.Shutdown(); err != nil {
		t.Fatal(err)
	}
	_, _, err := natsconn.Open(t.Context(), natsconn.Options{URLs: strings.Replace(gone, "//", "//u:secret@", 1), Once: true})
	if err == nil || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "connecting to NATS at nats://xxxxx@127.0.0.1") {
		t.Fatalf("got %v", err)
	}
}

func TestCloseSendsWhatWasPublishedAndCanBeRepeated(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	nc, _, err := natsconn.Open(t.Context(), natsconn.Options{InProcess: s})
	if err != nil {
		t.Fatal(err)
	}
	other := natstest.Connect(t, s)
	sub, err := other.SubscribeSync("s")
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := nc.Publish("s", []byte("last")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := natsconn.Close(t.Context(), nc); err != nil {
			t.Fatal(err)
		}
	}
	if msg, err := sub.NextMsg(5 * time.Second); err != nil || string(msg.Data) != "last" {
		t.Fatalf("got %v, %v", msg, err)
	}
}

func TestLoginByNKeyAndByContext(t *testing.T) {
	t.Parallel()
	key, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := key.Seed()
	if err != nil {
		t.Fatal(err)
	}
	public, err := key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	address := nkeyServer(t, public)
	seedFile := write(t, "user.nk", string(seed))
	contextFile := write(t, "ctx.json", `{"url":"`+address+`","nkey":"`+seedFile+`"}`)
	for name, o := range map[string]natsconn.Options{
		"nkey":    {URLs: address, NKey: seedFile, Once: true},
		"context": {Context: contextFile, Once: true},
	} {
		nc, _, err := natsconn.Open(t.Context(), o)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		nc.Close()
	}
	if nc, _, err := natsconn.Open(t.Context(), natsconn.Options{URLs: address, Once: true}); err == nil {
		nc.Close()
		t.Error("connected without a key")
	}
}

func nkeyServer(t *testing.T, public string) string {
	t.Helper()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: -1, NoSigs: true, NoLog: true, Nkeys: []*server.NkeyUser{{Nkey: public}}})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("the server is not ready")
	}
	return s.ClientURL()
}

func TestAServerThatIsAwayIsNoFaultOfTheSettings(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]natsconn.Options{
		"url":     {URLs: "nats://127.0.0.1:1"},
		"context": {Context: write(t, "ctx.json", `{"url":"nats://127.0.0.1:1"}`)},
	} {
		if err := natsconn.Check(o); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		o.Once = true
		_, _, err := natsconn.Open(t.Context(), o)
		var wrong *natsconn.SettingError
		if err == nil || errors.As(err, &wrong) {
			t.Errorf("%s: connecting: %v", name, err)
		}
	}
}
