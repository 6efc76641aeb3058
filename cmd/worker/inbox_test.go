package main

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

// Each command asks JetStream, and gets its answers on an inbox that its user may
// subscribe.
func TestCommandsWorkWithAnInboxPrefix(t *testing.T) {
	url := natstest.Configured(t, `
		listen: 127.0.0.1:-1
		jetstream: enabled
		authorization { users: [
			{user: admin, password: p}
			{user: me, password: p, permissions: {publish: ">", subscribe: ["_INBOX_me.>", "avatar.>"]}}
		] }`)
	js, err := jetstream.New(natstest.ConnectURL(t, url, nats.UserInfo("admin", "p")))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AVATAR_NATS_INBOX_PREFIX", "_INBOX_me")
	t.Setenv("AVATAR_NATS_USER", "me")
	t.Setenv("AVATAR_NATS_PASSWORD", "p")
	for _, args := range [][]string{
		{"submit", "--avatar", "ok", "--audio", "../../internal/audio/clip/hello.wav", "--id", "J"},
		{"status"},
		{"events", "--since", "1h", "--no-follow"},
		{"dlq", "ls"},
		{"cancel", "J"},
		{"status", "J"},
	} {
		out, errs := newScreen(), newScreen()
		if code := run(append(args, "--nats-url", url), strings.NewReader(""), out, errs); code != exitDone {
			t.Errorf("%v: exit %d: %s%s", args, code, out, errs)
		}
	}
}

// A request that is not permitted gets no answer: without the subject the error
// would only say that time ran out.
func TestACommandWithoutPermissionNamesTheSubject(t *testing.T) {
	t.Parallel() // it mostly waits
	url := natstest.Configured(t, `
		listen: 127.0.0.1:-1
		jetstream: enabled
		authorization { users: [
			{user: admin, password: p}
			{user: me, password: p, permissions: {publish: {deny: ["$JS.API.STREAM.INFO.AVATAR_USAGE", "avatar.workers.>"]}}}
		] }`)
	js, err := jetstream.New(natstest.ConnectURL(t, url, nats.UserInfo("admin", "p")))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	for denied, args := range map[string][]string{
		"$JS.API.STREAM.INFO.AVATAR_USAGE": {"cost"},
		"avatar.workers.w-1.drain":         {"drain", "w-1"},
	} {
		expect(t, exitFailed, []string{`This NATS user is not permitted to: Publish to "` + denied + `"`, "docs/permissions.md"}, append(args, "--nats-url", strings.Replace(url, "nats://", "nats://me:p@", 1))...)
	}
}

func TestACommandOfAnAccountThatDoesNotImportJetStreamSaysSo(t *testing.T) {
	t.Parallel()
	url := natstest.Configured(t, `
		listen: 127.0.0.1:-1
		jetstream: enabled
		accounts {
			FLEET { jetstream: enabled, users: [{user: admin, password: p}] }
			OTHERS { users: [{user: me, password: p}], mappings { "$JS.API.>": "FLEET.API.>" } }
		}
		no_auth_user: me`)
	for _, args := range [][]string{
		{"status"}, {"status", "J"}, {"jobs", "ls"}, {"jobs", "show", "J"}, {"dlq", "ls"}, {"cost"}, {"cost", "budget"},
		{"events", "--since", "1h"}, {"queue", "ls"}, {"circuit", "ls"}, {"retry", "J"}, {"cancel", "-y", "--all"}, {"drain", "W"},
		{"recording", "ls"}, {"setup"}, {"setup", "--dry-run"}, {"submit", "--avatar", "a", "--audio", helloWAV, "--wait"},
	} {
		out, errs := newScreen(), newScreen()
		code := run(append(args, "--nats-url", url), strings.NewReader(""), out, errs)
		said := out.String() + errs.String()
		if code != exitFailed || !strings.Contains(said, "does not answer this NATS user") || !strings.Contains(said, "docs/permissions.md") || strings.Contains(said, "everything is") {
			t.Errorf("%v: exit %d: %s", args, code, said)
		}
	}
}
