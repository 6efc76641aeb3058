package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
)

// lines collects what a command prints and signals a line that is waited for.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
	news chan struct{}
}

func newLines() *lines { return &lines{news: make(chan struct{}, 1)} }

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.news <- struct{}{}:
	default:
	}
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *lines) await(t *testing.T, want string) {
	t.Helper()
	timeout := time.After(natstest.Patience)
	for !strings.Contains(l.String(), want) {
		select {
		case <-l.news:
		case <-timeout:
			t.Fatalf("no %q in\n%s", want, l)
		}
	}
}

// embedded starts `run --embedded` in dir against a simulated backend.
func embedded(t *testing.T, dir string, more ...string) (string, func() int) {
	t.Helper()
	backend := simulator.New(simulator.Options{Addr: "127.0.0.1:0"})
	if err := backend.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Stop)
	url := fmt.Sprintf("nats://127.0.0.1:%d", natstest.Port(t))
	ctx, cancel := context.WithCancel(t.Context())
	logs, code := newLines(), make(chan int, 1)
	go func() {
		code <- runContext(ctx, append([]string{
			"run", "--embedded", "--nats-url", url, "--admin-addr", "off", "--ui-addr", "off", "--log-format", "json",
			"--set", "nats.store_dir=" + dir, "--set", "app.id=app", "--set", "app.api_key=key-for-tests",
			"--set", "backend.console_url=" + backend.ConsoleURL(), "--set", "backend.ingress_url=" + backend.IngressURL(),
		}, more...), strings.NewReader(""), newLines(), logs)
	}()
	logs.await(t, "worker started")
	return url, func() int { cancel(); return <-code }
}

func TestEmbeddedWorkerKeepsRecordsAndDeadLettersOverARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	url, stop := embedded(t, dir)
	audio := "../../internal/audio/clip/hello.wav"
	call := func(args ...string) (int, string) {
		out, errs := newLines(), newLines()
		code := run(append(args, "--nats-url", url), strings.NewReader(""), out, errs)
		return code, out.String() + errs.String()
	}
	if code, out := call("submit", "--id", "good", "--avatar", "ok", "--audio", audio, "--wait"); code != exitDone {
		t.Fatalf("exit %d: %s", code, out)
	}
	if code, out := call("submit", "--id", "bad", "--avatar", "fail-avatarNotFound", "--audio", audio, "--wait"); code != exitFailed {
		t.Fatalf("exit %d: %s", code, out)
	}
	if code := stop(); code != exitDone {
		t.Fatalf("run ended with %d", code)
	}
	url, stop = embedded(t, dir)
	for job, want := range map[string]string{"good": "completed", "bad": "dead_lettered"} {
		if code, out := call("status", job); code != exitDone || !strings.Contains(out, want) {
			t.Errorf("status %s: exit %d\n%s", job, code, out)
		}
	}
	if code, out := call("dlq", "ls"); code != exitDone || !strings.Contains(out, "avatarNotFound") {
		t.Errorf("dlq ls: exit %d\n%s", code, out)
	}
	if code := stop(); code != exitDone {
		t.Errorf("run ended with %d", code)
	}
}

func TestEmbeddedAddressIsTakenFromTheURL(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]string{
		"nats://127.0.0.1:4333": "127.0.0.1 4333", "localhost": "localhost 4222", "nats://[::1]:5000": "::1 5000",
	} {
		host, port, err := listenAt(url)
		if got := host + " " + strconv.Itoa(port); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", url, got, err, want)
		}
	}
	for _, url := range []string{"tls://127.0.0.1:4222", "wss://127.0.0.1:4222", "ws://h:1", "nats://a:1,nats://b:2", "nats://u:p@127.0.0.1:4222", "nats://:x", ""} {
		if _, _, err := listenAt(url); err == nil || !strings.HasPrefix(err.Error(), "nats.url") {
			t.Errorf("%q: %v; want an error that names nats.url", url, err)
		}
	}
}

func TestAnEmptyLiveSessionHasAnEmptyRecording(t *testing.T) {
	t.Parallel()
	url, stop := embedded(t, t.TempDir())
	for _, output := range []string{"frames", "object"} {
		file := filepath.Join(t.TempDir(), "out.rec")
		out, errs := newLines(), newLines()
		code := run([]string{"submit", "--nats-url", url, "--avatar", "ok", "--live", "-", "--sample-rate", "16000", "--output", output, "--out", file}, strings.NewReader(""), out, errs)
		data, err := os.ReadFile(file)
		if code != exitDone || err != nil || len(data) != 0 {
			t.Errorf("%s: exit %d, %d bytes, %v\n%s", output, code, len(data), err, errs)
		}
	}
	if code := stop(); code != exitDone {
		t.Errorf("run ended with %d", code)
	}
}

func TestEmbeddedRefusesWhatItCanNotServe(t *testing.T) {
	t.Parallel()
	for text, args := range map[string][]string{
		"tls:// can't be served": {"--nats-url", "tls://127.0.0.1:4222"},
		"nats.tls.ca":            {"--set", "nats.tls.ca=ca.pem"},
		"nats.nkey":              {"--set", "nats.nkey=user.nk"},
		"nats.tls_first":         {"--set", "nats.tls_first=true"},
		"nats.api_prefix":        {"--set", "nats.api_prefix=hub.API"},
		"without a login":        {"--nats-url", "nats://0.0.0.0:4222"},
		"0.0.0.0":                {"--nats-url", "nats://[::ffff:0.0.0.0]:4222"},
	} {
		errs := newLines()
		code := run(append([]string{"run", "--embedded", "--admin-addr", "off", "--set", "app.id=a", "--set", "app.api_key=k"}, args...), strings.NewReader(""), newLines(), errs)
		if code != exitConfig || !strings.Contains(errs.String(), text) {
			t.Errorf("%v: exit %d: %s", args, code, errs)
		}
	}
}

func TestAnAddressThatIsTakenIsNamedOnce(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	errs := newLines()
	code := run([]string{"run", "--admin-addr", l.Addr().String(), "--set", "app.id=a", "--set", "app.api_key=k"}, strings.NewReader(""), newLines(), errs)
	if code != exitFailed || strings.Count(errs.String(), "admin.addr:") != 1 {
		t.Errorf("exit %d: %s", code, errs)
	}
}

func TestWorkerWithoutAnAppSaysWhatToSet(t *testing.T) {
	t.Parallel()
	errs := newLines()
	code := run([]string{"run", "--admin-addr", "off"}, strings.NewReader(""), newLines(), errs)
	if code != exitConfig || !strings.Contains(errs.String(), "SPATIUS_API_KEY") {
		t.Errorf("exit %d: %s", code, errs)
	}
}
