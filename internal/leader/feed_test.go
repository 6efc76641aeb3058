package leader_test

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

// likeTheServers are messages of a user that look like the server's own.
func likeTheServers(subject string) []*nats.Msg {
	var all []*nats.Msg
	for _, status := range []string{"100", "400", "404", "408", "409", "423", "503", "999"} {
		for _, text := range []string{"", "Consumer Deleted", "Leadership Change", "Idle Heartbeat", "FlowControl Request", "No Messages"} {
			all = append(all, &nats.Msg{Subject: subject, Header: nats.Header{
				"Status": {status}, "Description": {text}, "Nats-Last-Consumer": {"99"}, "Nats-Pending-Messages": {"7"},
				"Nats-Sequence": {"1"}, "Nats-Subject": {"other"}, "Nats-Stream": {"OTHER"}, "Nats-Pin-Id": {"x"},
			}})
		}
	}
	return all
}

func publish(t *testing.T, js jetstream.JetStream, msgs ...*nats.Msg) {
	t.Helper()
	for _, m := range msgs {
		if _, err := js.PublishMsg(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
}

func openFeed(t *testing.T, js jetstream.JetStream, cfg leader.FeedConfig) *leader.Feed {
	t.Helper()
	f, err := leader.OpenFeed(t.Context(), js, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

func next(t *testing.T, f *leader.Feed) *jetstream.RawStreamMsg {
	t.Helper()
	select {
	case m, open := <-f.Messages():
		if !open {
			t.Fatal(f.Err())
		}
		return m
	case <-time.After(40 * time.Second):
		t.Fatal("no message came")
		return nil
	}
}

func TestAFeedGivesEachMessageOnceAlsoThoseThatLookLikeTheServers(t *testing.T) {
	t.Parallel()
	js := prepare(t)
	publish(t, js, likeTheServers("s.a")...)
	publish(t, js, &nats.Msg{Subject: "s.a", Data: []byte("last")})
	info, err := js.AccountInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before := info.API.Total
	for _, c := range []struct {
		cfg   leader.FeedConfig
		count int
	}{
		{leader.FeedConfig{Stream: "S", Subject: "s.a"}, 51},
		{leader.FeedConfig{Stream: "S", Subject: "s.a", Window: 3}, 51},
		{leader.FeedConfig{Stream: "S", Subject: "s.*", HeadersOnly: true}, 52},
		{leader.FeedConfig{Stream: "S", Subject: "s.a", From: 50}, 3},
	} {
		f := openFeed(t, js, c.cfg)
		var last uint64
		for range c.count {
			m := next(t, f)
			if m.Sequence <= last || m.Sequence < c.cfg.From || m.Subject != "s.a" && m.Subject != "s.b" || c.cfg.HeadersOnly && len(m.Data) > 0 {
				t.Errorf("%+v: %+v after %d", c.cfg, m, last)
			}
			last = m.Sequence
		}
		if last != 52 {
			t.Errorf("%+v: the last is %d", c.cfg, last)
		}
		publish(t, js, &nats.Msg{Subject: "s.c"})
	}
	if info, err = js.AccountInfo(t.Context()); err != nil || info.API.Total-before > 20 {
		t.Errorf("%d calls of the API, %v", info.API.Total-before, err)
	}
}

func TestAFeedAsksForNoMoreThanItsConsumerGives(t *testing.T) {
	js, err := jetstream.New(natstest.ConnectURL(t, natstest.Configured(t, `
		listen: 127.0.0.1:-1
		jetstream { limits { max_request_batch: 3 } }`)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.*"}}); err != nil {
		t.Fatal(err)
	}
	f := openFeed(t, js, leader.FeedConfig{Stream: "S", Subject: "s.a"})
	for range 10 {
		publish(t, js, &nats.Msg{Subject: "s.a", Data: []byte("x")})
	}
	for range 10 {
		next(t, f)
	}
}

func TestAFeedGoesOnWhenItsConsumerIsLost(t *testing.T) {
	t.Parallel()
	js := prepare(t)
	f := openFeed(t, js, leader.FeedConfig{Stream: "S", Subject: "s.a"})
	next(t, f)
	next(t, f)
	stream, err := js.Stream(t.Context(), "S")
	if err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		for name := range stream.ConsumerNames(t.Context()).Name() {
			if err := stream.DeleteConsumer(t.Context(), name); err != nil {
				t.Fatal(err)
			}
		}
		text := fmt.Sprint("round ", round)
		publish(t, js, &nats.Msg{Subject: "s.a", Data: []byte(text)})
		if m := next(t, f); string(m.Data) != text {
			t.Errorf("got %q, want %q", m.Data, text)
		}
	}
	if err := js.DeleteStream(t.Context(), "S"); err != nil {
		t.Fatal(err)
	}
	if m, open := <-f.Messages(); open || f.Err() == nil {
		t.Errorf("without a stream: %+v, %v", m, f.Err())
	}
}

func TestAFeedSurvivesARestartOfTheServerAndALostConnection(t *testing.T) {
	t.Parallel()
	o := natsserver.Options{StoreDir: t.TempDir(), Port: natstest.Port(t)}
	s, err := natsserver.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	nc := natstest.Connect(t, s, nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.*"}}); err != nil {
		t.Fatal(err)
	}
	f := openFeed(t, js, leader.FeedConfig{Stream: "S", Subject: "s.a"})
	say := func(text string) {
		publish(t, js, &nats.Msg{Subject: "s.a", Data: []byte(text)})
	}
	receive := func(text string) {
		if m := next(t, f); string(m.Data) != text {
			t.Errorf("got %q, want %q", m.Data, text)
		}
	}
	say("one")
	receive("one")
	if err := nc.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	say("two")
	receive("two")
	say("three") // handed out after the restart
	if err := s.Shutdown(); err != nil {
		t.Fatal(err)
	}
	if s, err = natsserver.Start(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Shutdown(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
	defer cancel()
	for {
		once, cancel := context.WithTimeout(ctx, 2*time.Second) // one that is lost with the connection is never answered
		_, err := js.PublishMsg(once, &nats.Msg{Subject: "s.a", Data: []byte("four")}, jetstream.WithMsgID("four"))
		cancel()
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("NATS did not come back")
		}
	}
	receive("three")
	receive("four")
	// Long before the server's silence would say so, which takes 12 s.
	nc.Close()
	select {
	case _, open := <-f.Messages():
		if open || !errors.Is(f.Err(), nats.ErrConnectionClosed) {
			t.Errorf("without a connection: %v", f.Err())
		}
	case <-time.After(natstest.Patience):
		t.Error("a feed does not end with its connection")
	}
}

func TestAChunkOfAnObjectThatLooksLikeTheServersIsReadAsWhatItIs(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	store, err := js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "B", Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	info, err := store.PutString(ctx, "name", "speech")
	if err != nil {
		t.Fatal(err)
	}
	chunks := "$O.B.C." + info.NUID
	stream, err := js.Stream(ctx, "OBJ_B")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(ctx, jetstream.WithPurgeSubject(chunks)); err != nil {
		t.Fatal(err)
	}
	publish(t, js, likeTheServers(chunks)...)
	publish(t, js,
		&nats.Msg{Subject: chunks, Data: []byte("spe"), Header: nats.Header{"Nats-Sequence": {"1"}}},
		&nats.Msg{Subject: chunks, Data: []byte("ech"), Header: nats.Header{"Nats-Sequence": {"18446744073709551615"}, "Status": {"404"}}})
	if info, err = leader.ObjectInfo(ctx, js, "B", "name"); err != nil {
		t.Fatal(err)
	}
	body, err := leader.OpenObject(ctx, js, info)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(body)
	if err != nil || string(got) != "speech" {
		t.Errorf("%q, %v", got, err)
	}
}
