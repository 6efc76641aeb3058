package natsserver_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

func start(t *testing.T, o natsserver.Options) *natsserver.Server {
	t.Helper()
	return natstest.StartWith(t, o)
}

func TestJobsSurviveARestartOnTheSameStoreDir(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "made", "here")
	first := start(t, natsserver.Options{StoreDir: dir, Port: natsserver.RandomPort})
	put(t, first, "kept")
	if err := first.Shutdown(); err != nil {
		t.Fatal(err)
	}
	second := start(t, natsserver.Options{StoreDir: dir, Port: natsserver.RandomPort})
	nc := natstest.Connect(t, second)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), "S")
	if err != nil {
		t.Fatal(err)
	}
	msg, err := s.GetMsg(t.Context(), 1)
	if err != nil || string(msg.Data) != "kept" {
		t.Fatalf("got %v, %v", msg, err)
	}
}

func put(t *testing.T, s *natsserver.Server, data string) {
	t.Helper()
	nc := natstest.Connect(t, s)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "s", []byte(data)); err != nil {
		t.Fatal(err)
	}
}

func TestSecondStartOnAStoreDirInUseNamesItsHolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := start(t, natsserver.Options{StoreDir: dir, Port: natsserver.RandomPort})
	_, err := natsserver.Start(natsserver.Options{StoreDir: dir, Port: natsserver.RandomPort})
	if err == nil || !strings.Contains(err.Error(), "store_dir "+dir) || !strings.Contains(err.Error(), "another process") {
		t.Fatalf("got %v", err)
	}
	if err := first.Shutdown(); err != nil {
		t.Fatal(err)
	}
	start(t, natsserver.Options{StoreDir: dir, Port: natsserver.RandomPort})
}

func TestAddressInUseIsSaidClearly(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	dir := t.TempDir()
	_, err = natsserver.Start(natsserver.Options{StoreDir: dir, Port: l.Addr().(*net.TCPAddr).Port})
	if err == nil || !strings.Contains(err.Error(), "can't listen at "+l.Addr().String()) {
		t.Fatalf("got %v", err)
	}
	start(t, natsserver.Options{StoreDir: dir, Port: natsserver.RandomPort})
}

func TestUnwritableStoreDirIsNamed(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := natsserver.Start(natsserver.Options{StoreDir: filepath.Join(file, "sub"), Port: natsserver.RandomPort})
	if err == nil || !strings.Contains(err.Error(), "nats.store_dir "+file) {
		t.Fatalf("got %v", err)
	}
}

func TestShutdownTwiceIsFineAndInProcessClientsWork(t *testing.T) {
	t.Parallel()
	s, err := natsserver.Start(natsserver.Options{Port: natsserver.RandomPort})
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect("", nats.InProcessServer(s))
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.FlushTimeout(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	nc.Close()
	for range 2 {
		if err := s.Shutdown(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestClientsMustShowTheCredentials(t *testing.T) {
	t.Parallel()
	s := start(t, natsserver.Options{Port: natsserver.RandomPort, User: "u", Password: "p"})
	if nc, err := nats.Connect(s.ClientURL()); err == nil {
		nc.Close()
		t.Fatal("connected without credentials")
	}
	natstest.Connect(t, s, nats.UserInfo("u", "p"))
}

func TestServerLogsGoToOurLogger(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	s, err := natsserver.Start(natsserver.Options{Port: natsserver.RandomPort, Logger: zerolog.New(zerolog.SyncWriter(&log))})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Shutdown(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), `"component":"nats-server"`) || strings.Contains(log.String(), `"level":"info"`) {
		t.Fatalf("got %s", log.String())
	}
}

func TestClusterKeepsAcknowledgedMessagesWhenItsStreamLeaderIsKilled(t *testing.T) {
	t.Parallel()
	c := natstest.Cluster(t, 3)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	nc := natstest.ConnectURL(t, c.ClientURLs(), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Replicas: 3}); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if _, err := js.Publish(ctx, "s", nil); err != nil {
			t.Fatal(err)
		}
	}
	leader := c.StreamLeader("S")
	if err := c.Kill(leader); err != nil {
		t.Fatal(err)
	}
	publishUntilAcknowledged(ctx, t, js)
	if err := c.Start(leader); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(ctx, "S")
	if err != nil {
		t.Fatal(err)
	}
	if n := s.CachedInfo().State.Msgs; n < 101 {
		t.Fatalf("%d messages, 101 were acknowledged", n)
	}
}

func publishUntilAcknowledged(ctx context.Context, t *testing.T, js jetstream.JetStream) {
	t.Helper()
	for {
		once, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		_, err := js.Publish(once, "s", nil, jetstream.WithMsgID("after"))
		cancel()
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("the cluster did not come back: %v", err)
		}
	}
}

func TestIsolatedNodeComesBackWhenHealed(t *testing.T) {
	t.Parallel()
	c := natstest.Cluster(t, 3)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	leader := c.Leader()
	c.Isolate(leader)
	other := (leader + 1) % c.Size()
	nc := natstest.ConnectURL(t, c.ClientURL(other))
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	// The others elect a leader, mostly: now and then two nodes of a cluster that has
	// just begun do not, until the third is back. A new leader may still place a
	// stream on the node that is cut off, where it can't be made: each attempt is
	// another stream.
	elected := time.After(10 * time.Second) // longer than the longest election timeout
isolated:
	for n := 0; ; n++ {
		name := fmt.Sprintf("S%d", n)
		once, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := js.CreateStream(once, jetstream.StreamConfig{Name: name, Subjects: []string{name}, Replicas: 2})
		cancel()
		if err == nil {
			break
		}
		select { // an election needs the processor too
		case <-time.After(100 * time.Millisecond):
		case <-elected:
			t.Logf("no new leader: %v", err)
			break isolated
		}
	}
	c.Heal(leader)
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestNoServerIsOpenToOtherMachinesWithoutALogin(t *testing.T) {
	t.Parallel()
	for _, host := range []string{"0.0.0.0", "::", "::ffff:0.0.0.0", "192.0.2.7", "worker.example", "localhost.example"} {
		s, err := natsserver.Start(natsserver.Options{StoreDir: t.TempDir(), Host: host, Port: natsserver.RandomPort})
		if err == nil {
			t.Errorf("%s: started: %v", host, s.Shutdown())
		}
		if !errors.Is(err, natsserver.ErrOpen) || !strings.Contains(err.Error(), host) || !strings.Contains(err.Error(), "nats.user") {
			t.Errorf("%s: %v", host, err)
		}
	}
	for name, o := range map[string]natsserver.Options{
		"loopback":      {Host: "127.0.0.1"},
		"by name":       {Host: "localhost"},
		"with a user":   {Host: "0.0.0.0", User: "u", Password: "p"},
		"with a token":  {Host: "0.0.0.0", Token: "t"},
		"its own place": {},
	} {
		o.StoreDir, o.Port = t.TempDir(), natsserver.RandomPort
		s, err := natsserver.Start(o)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := s.Shutdown(); err != nil {
			t.Error(err)
		}
	}
}

func TestTheServerHasTheDomainItIsGiven(t *testing.T) {
	t.Parallel()
	js, err := jetstream.NewWithDomain(natstest.Connect(t, start(t, natsserver.Options{Port: natsserver.RandomPort, Domain: "hub"})), "hub")
	if err != nil {
		t.Fatal(err)
	}
	if info, err := js.AccountInfo(t.Context()); err != nil || info.Domain != "hub" {
		t.Errorf("got %+v, %v", info, err)
	}
}
