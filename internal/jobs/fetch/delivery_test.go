package fetch

import (
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

func TestAckSubjectsAreRead(t *testing.T) {
	t.Parallel()
	want := jetstream.MsgMetadata{
		Sequence: jetstream.SequencePair{Stream: 20, Consumer: 31}, NumDelivered: 4, NumPending: 5,
		Timestamp: time.Unix(0, 1764336576000000001), Stream: "S", Consumer: "q",
	}
	inDomain := want
	inDomain.Domain = "hub"
	for reply, want := range map[string]*jetstream.MsgMetadata{
		"$JS.ACK.S.q.4.20.31.1764336576000000001.5":                   &want,
		"$JS.ACK._.HASH.S.q.4.20.31.1764336576000000001.5":            &want,
		"$JS.ACK.hub.HASH.S.q.4.20.31.1764336576000000001.5":          &inDomain,
		"$JS.ACK.hub.HASH.S.q.4.20.31.1764336576000000001.5.token":    &inDomain,
		"$JS.ACK.hub.HASH.S.q.4.20.31.1764336576000000001.5.more.yet": &inDomain,
		"$JS.ACK.S.q.4.20.31.1764336576000000001":                     nil,
		"$JS.ACK.x.S.q.4.20.31.1764336576000000001.5":                 nil,
		"$JS.ACK.S.q.four.20.31.1764336576000000001.5":                nil,
		"$JS.ACK.S.q.4.20.31.99999999999999999999.5":                  nil,
		"$JS.ACK.S.q.-4.20.31.1764336576000000001.5":                  nil,
		"$JS.ACK.": nil,
	} {
		got, err := parseAck(reply)
		switch {
		case want == nil:
			if err == nil {
				t.Errorf("%s: %+v", reply, got)
			}
		case err != nil || *got != *want:
			t.Errorf("%s: %+v %v", reply, got, err)
		}
	}
}

func FuzzAckSubject(f *testing.F) {
	f.Add("S.q.4.20.31.1764336576000000001.5")
	f.Add("hub.HASH.S.q.4.20.31.1764336576000000001.5.token")
	f.Add("......")
	f.Fuzz(func(t *testing.T, rest string) {
		meta, err := parseAck(ackPrefix + rest)
		if err == nil && (strings.Contains(meta.Consumer, ".") || meta.Timestamp.UnixNano() < 0) {
			t.Errorf("%+v", meta)
		}
	})
}

func TestTheServersStatusesEndARequestAsTheyShould(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		status, text string
		over, moved  bool
		err          string
	}{
		{"", "", false, false, ""},
		{"100", "Idle Heartbeat", false, false, ""},
		{"404", "No Messages", true, false, ""},
		{"408", "Request Timeout", true, false, ""},
		{"408", "Requests Pending", true, false, ""},
		{"409", "Leadership Change", true, true, ""},
		{"409", "Server Shutdown", true, true, ""},
		{"409", "Consumer Deleted", true, false, "consumer deleted"},
		{"409", "Exceeded MaxWaiting", true, false, "409 Exceeded MaxWaiting"},
		{"409", "Exceeded MaxRequestBatch of many", true, false, "MaxRequestBatch"},
		{"409", "Message Size Exceeds MaxBytes", true, false, "Message Size"},
		{"400", "Bad Request", true, false, "400 Bad Request"},
		{"503", "", true, false, nats.ErrNoResponders.Error()},
	} {
		e, over := readStatus(nats.Header{"Status": {c.status}, "Description": {c.text}})
		if over != c.over || e.moved != c.moved || (e.err == nil) != (c.err == "") || e.err != nil && !strings.Contains(e.err.Error(), c.err) {
			t.Errorf("%s %s: %+v, over %v", c.status, c.text, e, over)
		}
	}
	if e, _ := readStatus(nats.Header{"Status": {"409"}, "Description": {"Consumer Deleted"}}); !errors.Is(e.err, jetstream.ErrConsumerDeleted) {
		t.Error(e.err)
	}
}
