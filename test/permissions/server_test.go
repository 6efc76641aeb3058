// Package permissions_test runs each kind of client against a NATS server that
// grants just what deploy/nats/permissions.conf says, and then with one
// permission less at a time.
package permissions_test

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

const (
	// configFile has all roles in one account.
	configFile = "../../deploy/nats/one-account.conf"
	password   = "a-password-for-tests"
	// enough is for one scenario; most end in well under a second.
	enough = time.Minute
)

func TestMain(m *testing.M) {
	if url := os.Getenv(envURL); url != "" {
		if err := beWorker(url); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	for _, role := range []string{"WORKER", "PUBLISHER", "LISTENER", "OPERATOR", "VIEWER"} {
		if err := os.Setenv("AVATAR_"+role+"_PASSWORD", password); err != nil {
			panic(err)
		}
	}
	natstest.Parallel(24) // most cases wait three seconds for an answer that must not come
	natstest.Main(m)
}

// permission is one line of a role.
type permission struct {
	subject string
	kind    string // publish, subscribe or responses
}

// lines lists the permissions of a role.
func lines(t *testing.T, role string) []permission {
	t.Helper()
	p := user(t, load(t), role).Permissions
	var all []permission
	for _, s := range p.Publish.Allow {
		all = append(all, permission{s, "publish"})
	}
	for _, s := range p.Subscribe.Allow {
		all = append(all, permission{s, "subscribe"})
	}
	if p.Response != nil {
		all = append(all, permission{"", "responses"})
	}
	return all
}

func load(t *testing.T) *server.Options {
	t.Helper()
	opts, err := server.ProcessConfigFile(configFile)
	if err != nil {
		t.Fatal(err)
	}
	return opts
}

func user(t *testing.T, opts *server.Options, name string) *server.User {
	t.Helper()
	for _, u := range opts.Users {
		if u.Username == name {
			return u
		}
	}
	t.Fatalf("%s has no user %s", configFile, name)
	return nil
}

// start runs the server of the repository's configuration; the role lacks one
// permission, if one is given. An administrator is added, for what is around
// the client under test.
func start(t *testing.T, role string, without *permission) string {
	t.Helper()
	opts := load(t)
	if without != nil {
		remove(t, user(t, opts, role).Permissions, *without)
	}
	opts.Users = append(opts.Users, &server.User{Username: "admin", Password: password})
	return serve(t, opts)
}

func serve(t *testing.T, opts *server.Options) string {
	t.Helper()
	opts.Host, opts.Port, opts.StoreDir = "127.0.0.1", server.RANDOM_PORT, t.TempDir()
	opts.NoLog, opts.NoSigs = true, true
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(20 * time.Second) {
		t.Fatal("the server is not ready")
	}
	return s.ClientURL()
}

func remove(t *testing.T, p *server.Permissions, without permission) {
	t.Helper()
	drop := func(list []string) []string {
		i := slices.Index(list, without.subject)
		if i < 0 {
			t.Fatalf("there is no %v", without)
		}
		return slices.Delete(slices.Clone(list), i, i+1)
	}
	switch without.kind {
	case "publish":
		p.Publish.Allow = drop(p.Publish.Allow)
	case "subscribe":
		p.Subscribe.Allow = drop(p.Subscribe.Allow)
	default:
		p.Response = nil
	}
	if len(p.Subscribe.Allow) == 0 {
		p.Subscribe.Deny = []string{">"} // an empty list would allow everything
	}
}

var violation = regexp.MustCompile(`(?i)permissions violation for (publish|subscription) to "([^"]+)"`)

// refusals gathers what the server refused, as the client was informed.
type refusals struct {
	mu   sync.Mutex
	list []permission
	seen chan struct{} // closed at the first one that is waited for
	want *permission

	once  sync.Once
	begun chan struct{} // closed when the role connects: what is around it is there
}

func newRefusals(want *permission) *refusals {
	return &refusals{seen: make(chan struct{}), want: want, begun: make(chan struct{})}
}

// learn reads the server's refusals out of any text.
func (r *refusals) learn(text string) {
	for _, match := range violation.FindAllStringSubmatch(text, -1) {
		kind := "publish"
		if match[1] != "publish" && match[1] != "Publish" {
			kind = "subscribe"
		}
		r.mu.Lock()
		before := r.found()
		r.list = append(r.list, permission{match[2], kind})
		if !before && r.found() {
			close(r.seen)
		}
		r.mu.Unlock()
	}
}

// found reports whether the permission that is missing was named.
func (r *refusals) found() bool {
	return r.want != nil && slices.ContainsFunc(r.list, func(p permission) bool {
		if r.want.kind == "responses" {
			return p.kind == "publish"
		}
		return p.kind == r.want.kind && server.SubjectsCollide(p.subject, r.want.subject)
	})
}

func (r *refusals) all() []permission {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list)
}

// client is a connection with its JetStream.
type client struct {
	nc *nats.Conn
	js jetstream.JetStream
}

func connect(t *testing.T, url, name string, refused *refusals) client {
	t.Helper()
	nc := natstest.ConnectURL(t, url, nats.UserInfo(name, password), nats.CustomInboxPrefix("_INBOX_"+name), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		if refused != nil {
			refused.learn(err.Error())
		}
	}))
	if refused != nil {
		refused.once.Do(func() { close(refused.begun) })
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return client{nc, js}
}

// prepare makes what workers make.
func prepare(ctx context.Context, t *testing.T, admin client) topology.Handles {
	t.Helper()
	settings := topology.DefaultSettings()
	settings.AckWait, settings.Storage = 3*time.Second, jetstream.MemoryStorage
	handles, _, err := topology.Ensure(ctx, admin.js, topology.Names{}, settings)
	if err != nil {
		t.Fatal(err)
	}
	return handles
}

// scenario does everything that a role does. It ends early when ctx does.
type scenario func(ctx context.Context, t *testing.T, url string, refused *refusals) error

// withAll runs a scenario with all permissions of the role.
func withAll(t *testing.T, role string, run scenario) {
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()
	refused := newRefusals(nil)
	if err := run(ctx, t, start(t, role, nil), refused); err != nil {
		t.Error(err)
	}
	if got := refused.all(); len(got) > 0 {
		t.Errorf("the server refused %v", got)
	}
}

// withOneLess runs a scenario without one permission: the client must be told
// which it is.
func withOneLess(t *testing.T, role string, without permission, run scenario) {
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()
	refused := newRefusals(&without)
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-refused.seen:
			cancel()
		case <-ended:
		}
	}()
	err := run(ctx, t, start(t, role, &without), refused)
	select {
	case <-refused.seen:
	case <-time.After(20 * time.Second): // the client learns it from a goroutine of its own
		t.Errorf("without %s %q nothing names it: is it needed? Refused: %v; the scenario ended with %v", without.kind, without.subject, refused.all(), err)
	}
}

// firstOf returns the error of the first step that fails.
func firstOf(ctx context.Context, steps ...func(context.Context) error) error {
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

func must(err error, what string) error {
	if err == nil {
		return nil
	}
	return errors.Join(errors.New(what), err)
}
