package natstest

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// Way returns a JetStream context whose requests and writes go through pass. It gets
// each as the server would, and publishes it, later or changed or not at all. Without
// its Reply a write lands, and its answer is lost.
func Way(t testing.TB, nc *nats.Conn, pass func(m *nats.Msg, publish func(*nats.Msg))) jetstream.JetStream {
	t.Helper()
	publish := func(m *nats.Msg) {
		if err := nc.PublishMsg(m); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
			t.Error(err)
		}
	}
	const prefix = "way"
	if _, err := nc.Subscribe(prefix+".>", func(m *nats.Msg) {
		subject := strings.TrimPrefix(m.Subject, prefix+".")
		if !strings.HasPrefix(subject, "$KV.") {
			subject = jetstream.DefaultAPIPrefix + subject
		}
		pass(&nats.Msg{Subject: subject, Reply: m.Reply, Header: m.Header, Data: m.Data}, publish)
	}); err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.NewWithAPIPrefix(nc, prefix)
	if err != nil {
		t.Fatal(err)
	}
	return js
}
