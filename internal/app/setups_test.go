package app_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
)

// setup is one way in which people run NATS.
type setup struct {
	start func(t *testing.T) (workers, publishers string) // URLs
	nats  func(*config.NATS)
}

// importedAPI lets one account use the JetStream of another, all of it, under
// the prefix hub.API.
const importedAPI = `
listen: 127.0.0.1:-1
jetstream: enabled
accounts {
  HUB {
    jetstream: enabled
    users: [{user: hub, password: p}]
    exports: [
      {service: "$JS.API.>", response_type: stream}
      {service: "$JS.ACK.>"}
      {service: "$JS.FC.>"}
      {service: "$KV.>"}
      {service: "$O.>"}
      {service: "avatar.>"}
      {stream: "_INBOX.>"}
    ]
  }
  EDGE {
    users: [{user: edge, password: p}]
    imports: [
      {service: {account: HUB, subject: "$JS.API.>"}, to: "hub.API.>"}
      {service: {account: HUB, subject: "$KV.>"}, to: "hub.API.$KV.>"}
      {service: {account: HUB, subject: "$JS.ACK.>"}}
      {service: {account: HUB, subject: "$JS.FC.>"}}
      {service: {account: HUB, subject: "$O.>"}}
      {service: {account: HUB, subject: "avatar.>"}}
      {stream: {account: HUB, subject: "_INBOX.>"}}
    ]
  }
}`

func setups() map[string]setup {
	// behindLeaf is a hub with JetStream in a domain, and a leaf node.
	behindLeaf := func(leafJetStream string) func(t *testing.T) (string, string) {
		return func(t *testing.T) (string, string) {
			port := natstest.Ports(t, 1)[0]
			hub := natstest.Configured(t, fmt.Sprintf(`
				listen: 127.0.0.1:-1
				server_name: hub
				jetstream { domain: hub }
				leafnodes { listen: "127.0.0.1:%d" }`, port))
			leaf := natstest.Configured(t, fmt.Sprintf(`
				listen: 127.0.0.1:-1
				server_name: leaf
				%s
				leafnodes { remotes: [{url: "nats://127.0.0.1:%d"}] }`, leafJetStream, port))
			return leaf, hub
		}
	}
	return map[string]setup{
		"a domain behind a leaf node": {
			start: behindLeaf(""),
			nats:  func(n *config.NATS) { n.Domain = "hub" },
		},
		"a domain behind a leaf node that has its own": {
			start: behindLeaf("jetstream { domain: leaf }"),
			nats:  func(n *config.NATS) { n.Domain = "hub" },
		},
		"the leaf node's own domain": {
			start: func(t *testing.T) (string, string) {
				leaf, _ := behindLeaf("jetstream { domain: leaf }")(t)
				return leaf, leaf
			},
			nats: func(n *config.NATS) { n.Domain = "leaf" },
		},
		"a domain by its prefix": {
			start: behindLeaf(""),
			nats:  func(n *config.NATS) { n.APIPrefix = "$JS.hub.API" },
		},
		"a server that gives few messages to a request": {
			start: func(t *testing.T) (string, string) {
				url := natstest.Configured(t, `
					listen: 127.0.0.1:-1
					jetstream { limits { max_request_batch: 3 } }`)
				return url, url
			},
			nats: func(*config.NATS) {},
		},
		"an API imported from another account": {
			start: func(t *testing.T) (string, string) {
				url := natstest.Configured(t, importedAPI)
				return withUser(url, "edge"), withUser(url, "hub")
			},
			nats: func(n *config.NATS) { n.APIPrefix = "hub.API." },
		},
		"a user with an inbox prefix": {
			start: func(t *testing.T) (string, string) {
				url := natstest.Configured(t, `
					listen: 127.0.0.1:-1
					jetstream: enabled
					authorization { users: [
						{user: worker, password: p, permissions: {publish: ">", subscribe: ["_INBOX_worker.>", "avatar.>", "$SRV.>"]}}
						{user: other, password: p}
					] }`)
				return withUser(url, "worker"), withUser(url, "other")
			},
			nats: func(n *config.NATS) { n.InboxPrefix = "_INBOX_worker" },
		},
	}
}

func withUser(url, user string) string {
	return "nats://" + user + ":p@" + url[len("nats://"):]
}

// A job with an upload and a recording, interrupted by nothing, goes all the way.
func TestJobsRunInEverySetUpOfNATS(t *testing.T) {
	t.Parallel()
	for name, s := range setups() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			forWorkers, forPublishers := s.start(t)
			c := setupConfig(t, forWorkers)
			s.nats(&c.NATS)
			stop := startApp(t, c)
			nc := natstest.ConnectURL(t, forPublishers)
			js, err := jetstream.New(nc)
			if err != nil {
				t.Fatal(err)
			}
			runOneJob(t, nc, js)
			stop()
			stream, err := js.Stream(t.Context(), topology.Names{}.JobsStream())
			if err != nil {
				t.Fatal(err)
			}
			if left := stream.CachedInfo().State.Msgs; left != 0 {
				t.Errorf("%d jobs are left, want none: it was acknowledged", left)
			}
		})
	}
}

func setupConfig(t *testing.T, url string) *config.Config {
	t.Helper()
	backend := simulator.New(simulator.Options{Addr: "127.0.0.1:0"})
	if err := backend.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Stop)
	c := (&fleet{t: t, backend: backend}).configAt(url)
	c.App.MaxSessions = 4
	return c
}

// startApp runs a worker and returns when it takes jobs; stop drains it.
func startApp(t *testing.T, c *config.Config) (stop func()) {
	t.Helper()
	ready, done := make(chan struct{}), make(chan struct{})
	a, err := app.New(app.Options{Config: c, Logger: zerolog.New(zerolog.NewTestWriter(t)).Level(zerolog.InfoLevel), OnReady: func() { close(ready) }})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var ended error
	go func() { defer close(done); ended = a.Run(ctx) }()
	stop = func() {
		cancel()
		if <-done; ended != nil {
			t.Errorf("worker: %v", ended)
		}
	}
	t.Cleanup(stop)
	select {
	case <-ready:
	case <-done:
		t.Fatalf("the worker ended: %v", ended)
	case <-time.After(patience):
		t.Fatalf("the worker did not become ready: %v", a.Ready())
	}
	return stop
}

func runOneJob(t *testing.T, nc *nats.Conn, js jetstream.JetStream) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	names := topology.Names{}
	files, err := js.ObjectStore(ctx, names.AudioFilesBucket())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := files.PutBytes(ctx, "speech", silence(time.Second)); err != nil {
		t.Fatal(err)
	}
	sub, err := nc.SubscribeSync(names.EventsFilter("", "J"))
	if err != nil {
		t.Fatal(err)
	}
	job, err := json.Marshal(fields{
		"id": "J", "avatar_id": "flaky-connectionClosed-1", "output": fields{"object": fields{}},
		"audio": fields{"object": "speech", "sample_rate": 16000, "format": "pcm_s16le"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(ctx, names.Jobs("default"), job); err != nil {
		t.Fatal(err)
	}
	for {
		msg, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			t.Fatalf("no outcome: %v", err)
		}
		if msg.Subject == names.Events("completed", "J") {
			break
		}
		t.Log(msg.Subject)
	}
	store, err := js.ObjectStore(ctx, names.RecordingsBucket())
	if err != nil {
		t.Fatal(err)
	}
	if data, err := store.GetBytes(ctx, "J"); err != nil || len(data) == 0 {
		t.Errorf("the recording: %d bytes, %v", len(data), err)
	}
}
