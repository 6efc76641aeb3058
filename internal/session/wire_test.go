package session

import (
	"bytes"
	"encoding/hex"
	"regexp"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"avatarworker/internal/session/avatarpb"
)

func unhex(t testing.TB, s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestKnownAnswers has the bytes of docs/protocol.md, section 4.
func TestKnownAnswers(t *testing.T) {
	e, err := decodeEnvelope(unhex(t, "08021a100a0e707974686f6e2d636f6e6669726d"))
	if err != nil || e.kind != 2 || string(e.connectionID) != "python-confirm" {
		t.Errorf("confirm: %+v, %v", e, err)
	}
	e, err = decodeEnvelope(unhex(t, "08042a200a03636964120372696418a21f22116475726174696f6e206578636565646564"))
	if err != nil || e.kind != 4 || string(e.connectionID) != "cid" || string(e.reqID) != "rid" || e.code != 4002 || e.message != "duration exceeded" {
		t.Errorf("error: %+v, %v", e, err)
	}
}

func TestHandWrittenMessagesAreWhatTheLibraryWrites(t *testing.T) {
	for _, tc := range []struct {
		end   bool
		audio []byte
		tc    traceContext
	}{
		{false, []byte{1, 2}, traceContext{}},
		{true, nil, traceContext{}},
		{true, bytes.Repeat([]byte{7}, 70_000), traceContext{"00-aa-bb-01", ""}},
		{false, nil, traceContext{"00-aa-bb-01", "k=v"}},
	} {
		in := &avatarpb.ClientAudioInput{ReqId: "r", End: tc.end, Audio: tc.audio}
		if tc.tc.parent != "" {
			in.TraceContext = &avatarpb.TraceContext{Traceparent: tc.tc.parent, Tracestate: tc.tc.state}
		}
		want := &avatarpb.Message{
			Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_AUDIO_INPUT,
			Data: &avatarpb.Message_ClientAudioInput{ClientAudioInput: in},
		}
		var got avatarpb.Message
		if err := proto.Unmarshal(appendAudio(nil, "r", tc.end, tc.audio, tc.tc), &got); err != nil || !proto.Equal(&got, want) {
			t.Errorf("end %v, %d bytes: %v, %v", tc.end, len(tc.audio), &got, err)
		}
	}
	want := encode(t, &avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_INTERRUPT,
		Data: &avatarpb.Message_ClientInterrupt{ClientInterrupt: &avatarpb.ClientInterrupt{ReqId: "r"}},
	})
	if got := appendInterrupt(nil, "r"); !bytes.Equal(got, want) {
		t.Errorf("interrupt %x, want %x", got, want)
	}
}

func TestRequestIDsHaveTheBackendsLook(t *testing.T) {
	at := time.Date(2025, 12, 23, 5, 27, 42, 0, time.FixedZone("", 3600))
	pattern := regexp.MustCompile(`^20251223042742_[A-Za-z0-9_-]{12}$`)
	seen := map[string]bool{}
	for range 1000 {
		id := newReqID(at)
		if !pattern.MatchString(id) || seen[id] {
			t.Fatalf("id %q", id)
		}
		seen[id] = true
	}
}

func FuzzLookAgreesWithTheLibrary(f *testing.F) {
	f.Add(unhex(f, "08021a100a0e707974686f6e2d636f6e6669726d"))
	f.Add(unhex(f, "08042a200a03636964120372696418a21f22116475726174696f6e206578636565646564"))
	f.Add(frame(f, "20250101000000_abcdefghijkl", true, "data"))
	f.Add(append(frame(f, "one", false, "data"), frame(f, "two", true, "data")...))
	f.Add(append(frame(f, "one", true, "data"), encode(f, confirmMessage("c"))...))
	f.Add([]byte{0x0b, 0x08, 0x01, 0x0c, 0x32, 0x02, 0x18, 0x7f})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decodeEnvelope(b)
		var m avatarpb.Message
		if proto.Unmarshal(b, &m) != nil {
			return // look may be more patient: it does not check what it does not read
		}
		if err != nil {
			t.Fatalf("look refuses what the library reads: %v", err)
		}
		var conn, req string
		var end bool
		switch d := m.GetData().(type) {
		case *avatarpb.Message_ServerConfirmSession:
			conn = d.ServerConfirmSession.GetConnectionId()
		case *avatarpb.Message_ServerError:
			conn, req = d.ServerError.GetConnectionId(), d.ServerError.GetReqId()
		case *avatarpb.Message_ServerResponseAnimation:
			conn, req, end = d.ServerResponseAnimation.GetConnectionId(), d.ServerResponseAnimation.GetReqId(), d.ServerResponseAnimation.GetEnd()
		}
		if got.kind != m.GetType() || string(got.connectionID) != conn || string(got.reqID) != req || got.end != end {
			t.Fatalf("look reads %+v, the library %v", got, &m)
		}
	})
}

func TestMessagesOfAnySizeAreReadWhole(t *testing.T) {
	p := newBufferPool()
	for _, size := range []int{0, 1, 4095, 4096, 4097, 49_868, 65_536, 1 << 20, readLimit} {
		want := bytes.Repeat([]byte{3}, size)
		buf, n, err := p.readMessage(bytes.NewReader(want), 0)
		if err != nil || !bytes.Equal(buf.b[:n], want) {
			t.Errorf("%d bytes: read %d, %v", size, n, err)
		}
		p.put(buf)
	}
}
