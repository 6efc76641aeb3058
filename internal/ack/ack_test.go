package ack

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// decode reads a reply with encoding/json alone.
func decode(reply []byte) (jetstream.PubAck, error) {
	var a struct {
		Error *jetstream.APIError `json:"error"`
		*jetstream.PubAck
	}
	if json.Unmarshal(reply, &a) != nil || a.Error == nil && (a.PubAck == nil || a.Stream == "") {
		return jetstream.PubAck{}, jetstream.ErrInvalidJSAck
	}
	if a.Error != nil {
		return jetstream.PubAck{}, a.Error
	}
	return *a.PubAck, nil
}

// plain are replies that need no decoder.
var plain = []string{
	`{"stream":"AVATAR_JOBS","seq":1}`,
	`{"stream":"S","seq":0}`,
	`{"stream":"S","seq":18446744073709551615,"duplicate": true}`,
	`{"stream":"S","domain":"hub","seq":12}`,
	`{"stream":"S","domain":"","seq":12,"duplicate": true}`,
}

var unusual = []string{
	``, `{}`, `null`, `[]`, `+OK`, `{"stream":"","seq":1}`, `{"stream":"S"}`, `{"stream":"S","seq":01}`, `{"stream":"S","seq":}`,
	`{"stream":"S","seq":18446744073709551616}`, `{"stream":"S","seq":-1}`, `{"stream":"S","seq":1}}`, `{"stream":"S","seq":1} `,
	`{"stream":"S","seq":1,"duplicate": false}`, `{"stream":"S","seq":1,"duplicate":true}`, `{"stream": "S", "seq": 7}`,
	`{"seq":7,"stream":"S"}`, `{"stream":"a\"b","seq":1}`, "{\"stream\":\"a\xffb\",\"seq\":1}", "{\"stream\":\"a\nb\",\"seq\":1}",
	`{"stream":"ü","seq":1}`, `{"stream":"S","seq":1,"val":"5"}`, `{"stream":"S","seq":1,"batch":"b","count":3}`,
	`{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 5"},"stream":"S","seq":0}`,
	`{"stream":"S","seq":0,"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"}}`,
	`{"type":"io.nats.jetstream.api.v1.pub_ack","error":{"code":400}}`,
}

func check(t *testing.T, reply []byte) {
	t.Helper()
	want, wantErr := decode(reply)
	got, err := Parse(reply)
	if got != want || (err == nil) != (wantErr == nil) {
		t.Fatalf("%q is read as %+v, %v; a JSON decoder reads %+v, %v", reply, got, err, want, wantErr)
	}
	var gotAPI, wantAPI *jetstream.APIError
	if errors.As(err, &gotAPI) != errors.As(wantErr, &wantAPI) || gotAPI != nil && *gotAPI != *wantAPI {
		t.Fatalf("%q is read as %v, not %v", reply, err, wantErr)
	}
}

func TestRepliesAreReadAsByAJSONDecoder(t *testing.T) {
	for _, reply := range plain {
		check(t, []byte(reply))
		if _, ok := parsePlain([]byte(reply)); !ok {
			t.Errorf("%s needs a decoder", reply)
		}
	}
	for _, reply := range unusual {
		check(t, []byte(reply))
		if _, ok := parsePlain([]byte(reply)); ok {
			t.Errorf("%q is taken for a plain acknowledgement", reply)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, reply := range append(plain, unusual...) {
		f.Add([]byte(reply))
	}
	f.Fuzz(func(t *testing.T, reply []byte) { check(t, reply) })
}

// connectToStream connects to a server with a stream S of the subject s.
func connectToStream(t *testing.T) *nats.Conn {
	t.Helper()
	js := natstest.JetStream(t)
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Storage: jetstream.MemoryStorage}); err != nil {
		t.Fatal(err)
	}
	return js.Conn()
}

// The server's own replies have the plain form, also in a domain.
func TestTheServersAcknowledgementsArePlain(t *testing.T) {
	nc := connectToStream(t)
	for _, duplicate := range []bool{false, true} {
		reply, err := nc.RequestMsg(&nats.Msg{Subject: "s", Header: nats.Header{jetstream.MsgIDHeader: {"1"}}}, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if a, ok := parsePlain(reply.Data); !ok || a.Stream != "S" || a.Sequence != 1 || a.Duplicate != duplicate {
			t.Errorf("%s is read as %+v", reply.Data, a)
		}
	}
}

func TestARefusedMessageIsTheServersError(t *testing.T) {
	nc := natstest.Connect(t, natstest.Start(t))
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Storage: jetstream.MemoryStorage}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	wrong := nats.Header{jetstream.ExpectedLastSubjSeqHeader: {"7"}}
	var api *jetstream.APIError
	if _, err := Publish(ctx, nc, &nats.Msg{Subject: "s", Header: wrong}); !errors.As(err, &api) || api.ErrorCode != jetstream.JSErrCodeStreamWrongLastSequence {
		t.Errorf("a conflict is %v", err)
	}
	if _, err := Publish(ctx, nc, &nats.Msg{Subject: "none"}); !errors.Is(err, jetstream.ErrNoStreamResponse) {
		t.Errorf("without a stream: %v", err)
	}
	if _, err := Publish(ctx, nc, &nats.Msg{Subject: "s", Data: []byte(strings.Repeat("x", int(nc.MaxPayload())+1))}); !errors.Is(err, nats.ErrMaxPayload) {
		t.Errorf("too large: %v", err)
	}
	if a, err := Publish(ctx, nc, &nats.Msg{Subject: "s"}); err != nil || a.Sequence != 1 {
		t.Errorf("%+v; %v", a, err)
	}
}

func TestAMissingReplyEndsWithTheContext(t *testing.T) {
	nc := natstest.Connect(t, natstest.Start(t))
	if _, err := nc.SubscribeSync("silent"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Publish(ctx, nc, &nats.Msg{Subject: "silent"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}
