package dlq

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/topology"
)

func FuzzEventIsValidJSONWithinItsLimit(f *testing.F) {
	f.Add("message", "detail", "label", uint16(10))
	f.Add("ä\xff\x00", "\"\\<>&", "", uint16(9000))
	f.Fuzz(func(t *testing.T, message, detail, label string, repeat uint16) {
		n := int(repeat)%2000 + 1
		e := event.Error{
			JobID: "j", Code: errors.CodeUnknown, Message: strings.Repeat(message, n), ServerDetail: strings.Repeat(detail, n),
			AvatarID: detail, Labels: map[string]string{label: strings.Repeat(label, n), "b": message},
		}
		for _, limit := range []int{maxError, leanError} {
			text, err := eventJSON(e, limit)
			if err != nil || len(text) > limit {
				t.Fatalf("%d bytes of at most %d, %v", len(text), limit, err)
			}
			var back event.Error
			if err := json.Unmarshal([]byte(text), &back); err != nil || back.JobID != "j" || back.Code != e.Code {
				t.Fatalf("%v: %s", err, text)
			}
		}
	})
}

func FuzzCutKeepsWholeCharacters(f *testing.F) {
	f.Add("ä€😀", 4)
	f.Fuzz(func(t *testing.T, text string, limit int) {
		limit = max(limit%200, len("…"))
		got := cut(text, limit)
		if len(got) > limit || !utf8.ValidString(got) {
			t.Fatalf("%q, at most %d", got, limit)
		}
		if utf8.ValidString(text) && len(text) <= limit && got != text {
			t.Fatalf("%q became %q", text, got)
		}
	})
}

// What others put into the stream must not stop an operator's list or replay.
func FuzzForeignLetterIsRead(f *testing.F) {
	f.Add("application/protobuf", "{}", "gzip", "-1", []byte("\x52\x02\x08\x01"))
	f.Add("application/json", "[]", "", "2026-01-01T00:00:00Z", []byte(`{"deadline":"2026-01-01T00:00:00Z"}`))
	f.Fuzz(func(t *testing.T, contentType, event, encoding, value string, data []byte) {
		h := nats.Header{}
		for name, v := range map[string]string{
			headerContentType: contentType, HeaderError: event, HeaderEncoding: encoding,
			HeaderRun: value, HeaderFailedAt: value, HeaderStreamSeq: value,
		} {
			h.Set(name, v)
		}
		at := time.Unix(1, 0)
		e := entry(topology.Names{}, stored{seq: 1, subject: value, header: h, time: at})
		if e.Run < 0 || e.FailedAt.IsZero() && value == "" {
			t.Fatalf("%+v", e)
		}
		if plain, err := body(h, data); err == nil {
			deadline(replayed{Letter: Letter{Entry: e}, header: h, body: plain})
		}
	})
}

// A packed letter may be anybody's, and a small one may unpack to a large one.
func FuzzPackedLetterIsUnpackedOrRefused(f *testing.F) {
	f.Add([]byte(`{"avatar_id":"ok"}`), 0, byte(0), uint16(1))
	f.Add([]byte(`{}`), 12, byte(0xff), uint16(3000))
	f.Fuzz(func(t *testing.T, data []byte, at int, flip byte, repeat uint16) {
		plain := bytes.Repeat(data, int(repeat)%4000+1)
		if len(plain) > 1<<20 {
			return
		}
		m := &nats.Msg{Header: nats.Header{}, Data: plain}
		if err := compress(m); err != nil {
			t.Fatal(err)
		}
		got, err := body(m.Header, m.Data)
		if err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("%d bytes became %d, %v", len(plain), len(got), err)
		}
		if m.Header.Get(HeaderEncoding) == "" || at < 0 || at >= len(m.Data) {
			return
		}
		broken := bytes.Clone(m.Data)
		broken[at] ^= flip
		if got, err := body(m.Header, broken); err == nil && len(got) > maxUnzippedBody {
			t.Fatalf("%d bytes", len(got))
		}
		if got, err := body(m.Header, m.Data[:at]); err == nil {
			t.Fatalf("a letter cut short became %d bytes", len(got))
		}
	})
}

func TestPackedLetterThatIsLargerThanAnyJobIsRefused(t *testing.T) {
	t.Parallel()
	m := &nats.Msg{Header: nats.Header{}, Data: make([]byte, maxUnzippedBody+1)}
	if err := compress(m); err != nil {
		t.Fatal(err)
	}
	if got, err := body(m.Header, m.Data); err == nil {
		t.Errorf("%d bytes were unpacked", len(got))
	}
}
