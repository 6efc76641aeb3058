package simulator

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"

	"avatarworker/internal/session/avatarpb"
)

func FuzzDecodeClientAgreesWithTheProtobufLibrary(f *testing.F) {
	seed := func(m *avatarpb.Message) {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	seed(&avatarpb.Message{Type: 3, Data: &avatarpb.Message_ClientAudioInput{ClientAudioInput: &avatarpb.ClientAudioInput{
		ReqId: "r", End: true, Audio: []byte{1, 2}, TraceContext: &avatarpb.TraceContext{Traceparent: "t"},
	}}})
	seed(&avatarpb.Message{Type: 1, Data: &avatarpb.Message_ClientConfigureSession{
		ClientConfigureSession: &avatarpb.ClientConfigureSession{SampleRate: 16000},
	}})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decodeClient(b)
		var want avatarpb.Message
		if proto.Unmarshal(b, &want) != nil || err != nil {
			return // either may be stricter; neither may panic
		}
		a := want.GetClientAudioInput()
		if got.kind != want.GetType() || a == nil || got.audio == nil {
			if got.kind != want.GetType() {
				t.Errorf("type %v, not %v", got.kind, want.GetType())
			}
			return
		}
		if got.audio.reqID != a.GetReqId() || got.audio.end != a.GetEnd() || !bytes.Equal(got.audio.audio, a.GetAudio()) {
			t.Errorf("%+v, not %v", got.audio, a)
		}
	})
}

func FuzzOggIsMeasuredAlikeHoweverItIsCut(f *testing.F) {
	page := append([]byte("OggS\x00\x00\x80\xbb\x00\x00\x00\x00\x00\x00"), make([]byte, 12)...)
	page = append(page, 1, 19)
	page = append(page, "OpusHead\x01\x01\x38\x01\x00\x00\x00\x00\x00\x00\x00"...)
	f.Add(page, 3)
	f.Add([]byte("OggX"), 1)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		var whole, cutUp oggMeter
		wantErr := whole.write(b)
		var gotErr error
		size := max(1, cut%300)
		for i := 0; i < len(b) && gotErr == nil; i += size {
			gotErr = cutUp.write(b[i:min(len(b), i+size)])
		}
		if (wantErr == nil) != (gotErr == nil) {
			t.Fatalf("whole: %v; in pieces: %v", wantErr, gotErr)
		}
		if wantErr == nil && whole.keyFrames() != cutUp.keyFrames() {
			t.Fatalf("whole: %d; in pieces: %d", whole.keyFrames(), cutUp.keyFrames())
		}
		if n := whole.keyFrames(); n < 0 {
			t.Fatalf("%d key frames", n)
		}
	})
}

func FuzzAvatarIDsAreReadWithoutPanic(f *testing.F) {
	for _, id := range []string{"ok-1", "fail-status-503-2", "flaky-serverError-2-x", "drop-once-3", "egress-end"} {
		f.Add(id)
	}
	f.Fuzz(func(t *testing.T, id string) {
		b, ok := parseAvatar(id)
		if ok && (b.times < 0 || b.after < 0 || b.slow < 0) {
			t.Errorf("%q: %+v", id, b)
		}
	})
}

func FuzzExchangesThatParseCanBeReplayed(f *testing.F) {
	f.Add([]byte(`{"connection_id":"c","animation_messages_base64":["CAUyBBgBIgA="]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := ParseExchange(b)
		if err != nil {
			return
		}
		if frames, err := x.frames(); err == nil && len(frames) != len(x.Envelopes) {
			t.Errorf("%d of %d envelopes", len(frames), len(x.Envelopes))
		}
	})
}
