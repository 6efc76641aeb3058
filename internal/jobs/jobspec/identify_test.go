package jobspec

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"avatarworker/internal/jobs/jobpb"
)

func valid(id string) string {
	return fmt.Sprintf(`{"id":%q,"avatar_id":"a","audio":{"object":"o"}}`, id)
}

func protobufJob(t *testing.T, id string) string {
	t.Helper()
	body, err := proto.Marshal(&jobpb.Job{Id: id, AvatarId: "a", Audio: &jobpb.Audio{Object: "o"}})
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func TestIdentityIsTheFirstThatFits(t *testing.T) {
	inProtobuf := nats.Header{"Content-Type": {ContentTypeProtobuf}}
	long := strings.Repeat("x", 65)
	rows := []struct {
		name    string
		subject string
		header  nats.Header
		body    string
		id      string
		run     int
		queue   string
	}{
		{name: "the header wins over all", header: nats.Header{"Avatar-Job-Id": {"H-1"}, "Nats-Msg-Id": {"M1"}, "Avatar-Run": {"3"}}, body: valid("B1"), id: "H-1", run: 3},
		{name: "a header in another case counts", header: nats.Header{"avatar-job-id": {"H1"}, "avatar-run": {"2"}}, body: `{}`, id: "H1", run: 2},
		{name: "a header that does not fit is passed over", header: nats.Header{"Avatar-Job-Id": {"a b"}}, body: valid("B1"), id: "B1"},
		{name: "the body wins over the message id", header: nats.Header{"Nats-Msg-Id": {"M2"}}, body: valid("B2"), id: "B2"},
		{name: "a job without an id", header: nats.Header{"Nats-Msg-Id": {"M3"}}, body: valid(""), id: "M3"},
		{name: "a body id that does not fit", header: nats.Header{"Nats-Msg-Id": {"M4"}}, body: valid("b.2"), id: "M4"},
		{name: "an id that is too long", header: nats.Header{"Nats-Msg-Id": {"M5"}}, body: valid(long), id: "M5"},
		{name: "a body id that is not a string", header: nats.Header{"Nats-Msg-Id": {"M6"}}, body: `{"id":7}`, id: "M6"},
		{name: "a body that is broken after its id", header: nats.Header{"Nats-Msg-Id": {"M7"}}, body: `{"id":"B7","audio":{`, id: "M7"},
		{name: "a body with an unknown field", header: nats.Header{"Nats-Msg-Id": {"M8"}}, body: `{"id":"B8","avatarid":"a","audio":{"object":"o"}}`, id: "M8"},
		{name: "a body with a wrong value", body: `{"id":"B9","avatar_id":"a","audio":{"object":"o"},"max_attempts":-1}`},
		{name: "protobuf", header: inProtobuf, body: protobufJob(t, "P1"), id: "P1"},
		{name: "protobuf that is broken after the id", header: inProtobuf, body: protobufJob(t, "P2") + "\xff\xff"},
		{name: "nothing fits", subject: "avatar.jobs.vip", header: nats.Header{"Nats-Msg-Id": {"m/13"}}, body: `not json`, queue: "vip"},
		{name: "an empty message", body: ""},
		{name: "an invalid run counts as the first", header: nats.Header{"Avatar-Run": {"0"}, "Avatar-Job-Id": {"H15"}}, id: "H15"},
		{name: "the last run", header: nats.Header{"Avatar-Run": {"1000000000"}, "Avatar-Job-Id": {"H17"}}, id: "H17", run: MaxRun},
		{name: "a run after the last counts as the first", header: nats.Header{"Avatar-Run": {"2147483647"}, "Avatar-Job-Id": {"H18"}}, id: "H18"},
		{name: "a run that is not a number counts as the first", header: nats.Header{"Avatar-Run": {"two"}, "Avatar-Job-Id": {"H16"}}, id: "H16"},
	}
	messages := make([]*nats.Msg, len(rows))
	for i, row := range rows {
		messages[i] = &nats.Msg{Subject: row.subject, Header: row.header, Data: []byte(row.body)}
	}
	for i, msg := range deliver(t, messages...) {
		row := rows[i]
		t.Run(row.name, func(t *testing.T) {
			want := Identity{ID: row.id, Run: max(row.run, 1), Queue: "default", Subject: msg.Subject(), StreamSeq: uint64(i + 1)}
			if row.queue != "" {
				want.Queue = row.queue
			}
			if want.ID == "" {
				meta, err := msg.Metadata()
				if err != nil {
					t.Fatal(err)
				}
				want.ID = StreamJobID(meta.Timestamp, meta.Sequence.Stream)
			}
			for range 2 {
				if got, _, _ := Read(msg); got != want {
					t.Errorf("got %+v, want %+v", got, want)
				}
			}
		})
	}
}

func TestMadeIdentityFitsThePatternAndDistinguishesMessages(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		created := rapid.Int64().Draw(t, "created")
		seq := rapid.Uint64().Draw(t, "seq")
		id := StreamJobID(time.Unix(0, created), seq)
		if !ValidID(id) {
			t.Fatalf("%q does not fit", id)
		}
		if other := StreamJobID(time.Unix(0, created), seq+1); other == id {
			t.Fatalf("two messages are %q", id)
		}
	})
}

func TestTraceContextIsCarriedAsPublishedOrIgnored(t *testing.T) {
	const good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	rows := []struct {
		name          string
		header        nats.Header
		parent, state string
	}{
		{"lower case", nats.Header{"traceparent": {good}, "tracestate": {"a=b"}}, good, "a=b"},
		{"spoiled case", nats.Header{"Traceparent": {good}}, good, ""},
		{"none", nil, "", ""},
		{"short", nats.Header{"traceparent": {"00-1-2-01"}, "tracestate": {"a=b"}}, "", ""},
		{"zero trace id", nats.Header{"traceparent": {"00-00000000000000000000000000000000-b7ad6b7169203331-01"}}, "", ""},
		{"upper-case hex", nats.Header{"traceparent": {strings.ToUpper(good)}}, "", ""},
		{"version ff", nats.Header{"traceparent": {"ff" + good[2:]}}, "", ""},
		{"version 00 with more", nats.Header{"traceparent": {good + "-x"}}, "", ""},
		{"a later version with more", nats.Header{"traceparent": {"01" + good[2:] + "-x"}}, "01" + good[2:] + "-x", ""},
		{"a state with a line break", nats.Header{"traceparent": {good}, "tracestate": {"a=b\nc"}}, good, ""},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			parent, state := TraceContext(row.header)
			if parent != row.parent || state != row.state {
				t.Errorf("got %q, %q", parent, state)
			}
		})
	}
}

func TestTraceCarrierKeepsNamesLowerCase(t *testing.T) {
	header := nats.Header{}
	carrier := TraceCarrier(header)
	carrier.Set("Traceparent", "x")
	if len(header["traceparent"]) != 1 || carrier.Get("TraceParent") != "x" || len(carrier.Keys()) != 1 {
		t.Errorf("got %v", header)
	}
}
