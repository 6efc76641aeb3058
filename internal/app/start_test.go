package app_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/app"
	"avatarworker/internal/audio/clip"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

// away is a worker whose NATS is not there.
func away(t testing.TB, port int, ready func()) *app.App {
	t.Helper()
	c := config.Defaults()
	c.NATS.URL, c.NATS.Storage = fmt.Sprintf("nats://127.0.0.1:%d", port), "memory"
	c.App.ID, c.App.APIKey = "app", "key"
	c.Admin.Addr = ""
	small := config.Limits{MaxAge: time.Hour, MaxBytes: 16 << 20}
	c.Streams = config.Streams{
		Jobs: config.SizeLimit{MaxBytes: 16 << 20}, DLQ: small, Events: small, Frames: small, Audio: small, AudioFiles: small, Recordings: small,
	}
	a, err := app.New(app.Options{Config: c, Logger: zerolog.Nop(), OnReady: ready})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAWorkerThatStartsBeforeNATSWorksOnceItIsThere(t *testing.T) {
	t.Parallel()
	port, ready := natstest.Port(t), make(chan struct{})
	a := away(t, port, func() { close(ready) })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	if err := a.Ready(); err == nil || !strings.Contains(err.Error(), "NATS") {
		t.Errorf("ready without NATS: %v", err)
	}
	server := natstest.StartWith(t, natsserver.Options{StoreDir: t.TempDir(), Port: port})
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	nc := natstest.Connect(t, server)
	names := topology.Names{Prefix: "avatar"}
	for { // until the first fetch is out
		msg, err := nc.Request(names.WorkerState(a.ID()), nil, 5*time.Second)
		if errors.Is(err, nats.ErrNoResponders) && ctx.Err() == nil {
			continue // the server does not know the subscription yet
		}
		if err != nil {
			t.Fatal(err)
		}
		var state jobs.WorkerState
		if err := json.Unmarshal(msg.Data, &state); err != nil {
			t.Fatal(err)
		}
		if state.Ready {
			break
		}
	}
	if err := a.Ready(); err != nil {
		t.Errorf("not ready: %v", err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestTheLogSaysAtTheStartWhichProxiesAreOnTheWay(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "http://user:aPassword9@127.0.0.1:1")
	t.Setenv("NO_PROXY", "ingress.example")
	c := config.Defaults()
	c.NATS.URL, c.NATS.Storage = natstest.Start(t).ClientURL(), "memory"
	c.App.ID, c.App.APIKey, c.Admin.Addr = "app", "key", ""
	c.Backend.ConsoleURL, c.Backend.IngressURL = "https://console.example/v1/console", "wss://ingress.example/v2/driveningress"
	said := make(chan string, 1000)
	a, err := app.New(app.Options{Config: c, Logger: zerolog.New(lines(said))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	for ctx.Err() == nil {
		var line string
		select {
		case line = <-said:
		case <-ctx.Done():
			t.Error("it does not say it")
		}
		if strings.Contains(line, "aPassword9") {
			t.Errorf("the proxy's password is shown: %s", line)
		}
		if !strings.Contains(line, "console_proxy") {
			continue
		}
		if !strings.Contains(line, `"console_proxy":"http://127.0.0.1:1"`) || strings.Contains(line, `"ingress_proxy":"http`) {
			t.Errorf("it says %s", line)
		}
		break
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// lines hands each line of a log on, as long as there is room.
type lines chan string

func (l lines) Write(line []byte) (int, error) {
	select {
	case l <- string(line):
	default:
	}
	return len(line), nil
}

func TestAWorkerStoppedBeforeItCouldStartEndsWithoutAnError(t *testing.T) {
	t.Parallel()
	a := away(t, natstest.Port(t), nil)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("it does not end")
	}
}

func TestAJobsStreamThatCannotKeepThePromisesIsRefused(t *testing.T) {
	t.Parallel()
	server := natstest.Start(t)
	js, err := jetstream.New(natstest.Connect(t, server))
	if err != nil {
		t.Fatal(err)
	}
	names := topology.Names{Prefix: "avatar"}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: names.JobsStream(), Subjects: []string{names.AllJobs()}}); err != nil {
		t.Fatal(err)
	}
	a := away(t, natsPort(t, server), nil)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := a.Run(ctx); err == nil || !strings.Contains(err.Error(), names.JobsStream()) {
		t.Errorf("a stream that is not a work queue: %v", err)
	}
}

func natsPort(t testing.TB, s *natsserver.Server) int {
	t.Helper()
	addr, err := net.ResolveTCPAddr("tcp", strings.TrimPrefix(s.ClientURL(), "nats://"))
	if err != nil {
		t.Fatal(err)
	}
	return addr.Port
}

func TestWhatExistsWithOtherSettingsIsLeftAloneAndReportedOnce(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	if _, err := f.js.CreateStream(f.ctx, jetstream.StreamConfig{
		Name: f.names.FramesStream(), Subjects: []string{f.names.AllFrames()}, MaxAge: 7 * time.Minute, Storage: jetstream.MemoryStorage,
	}); err != nil {
		t.Fatal(err)
	}
	log := &buffer{}
	f.worker(worker{log: log})
	f.publish("works", "ok", nil)
	f.completed("works")
	stream, err := f.js.Stream(f.ctx, f.names.FramesStream())
	if err != nil {
		t.Fatal(err)
	}
	if age := stream.CachedInfo().Config.MaxAge; age != 7*time.Minute {
		t.Errorf("the stream was rewritten: max age %s", age)
	}
	if n := strings.Count(log.String(), "they are left unchanged"); n != 1 || !strings.Contains(log.String(), "7m0s") {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
}

func TestAWorkerSaysAtItsStartThatItCannotReachTheBackend(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	log := &buffer{}
	f.worker(worker{log: log, config: func(c *config.Config) {
		c.Backend.ConsoleURL = fmt.Sprintf("http://127.0.0.1:%d/v1/console", natstest.Port(t))
	}})
	if text := log.String(); !strings.Contains(text, "the API key could not be checked") || !strings.Contains(text, "connection refused") {
		t.Error(text)
	}
}

func TestOggOpusIsPassedThroughAsItIs(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("opus", "ok-opus", fields{"audio": fields{"inline": base64.StdEncoding.EncodeToString(clip.Opus)}})
	f.publish("live", "ok-live", fields{"live": fields{"sample_rate": 24000, "format": "ogg_opus", "max_silence": "10s"}})
	f.say("live", clip.Opus, closing)
	if done := f.completed("opus"); done.Utterances[0].AudioMS < 3000 || done.Utterances[0].Frames != 2 {
		t.Errorf("%+v", done)
	}
	if done := f.completed("live"); done.Utterances[0].Frames != 2 {
		t.Errorf("%+v", done)
	}
	for _, avatar := range []string{"ok-opus", "ok-live"} {
		s := f.sessions(avatar)
		if len(s) != 1 || s[0].AudioFormat != "ogg_opus" || s[0].SampleRate != 24000 || s[0].AudioBytes != int64(len(clip.Opus)) {
			t.Errorf("%s: %+v", avatar, s)
		}
	}
}
