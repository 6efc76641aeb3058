package audio

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
)

// liveOf publishes messages of two bytes with these headers and opens them.
func liveOf(t *testing.T, headers ...nats.Header) (jetstream.JetStream, *Live) {
	t.Helper()
	js, err := jetstream.New(natstest.Connect(t, natstest.Start(t)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "LIVE", Subjects: []string{"live.*"}, Storage: jetstream.MemoryStorage}); err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: "live.job", Header: h, Data: []byte{1, 0}}); err != nil {
			t.Fatal(err)
		}
	}
	l, err := OpenLive(t.Context(), js, LiveSpec{Stream: "LIVE", Subject: "live.job", Format: PCM, SampleRate: 16000, MaxSilence: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return js, l
}

func TestTheEndOfLiveSpeechIsSeenHoweverItIsSpelled(t *testing.T) {
	js, l := liveOf(t,
		nats.Header{"avatar-end": {"false"}}, nats.Header{"Avatar-End": {"True"}},
		nats.Header{"AVATAR-END": {"1"}},
		nats.Header{"avatar-close": {"yes"}},
	)
	for i, chunks := range []int{2, 1, 1} {
		if begun, err := l.Begin(t.Context()); err != nil || !begun {
			t.Fatalf("utterance %d: begun: %t %v", i+1, begun, err)
		}
		n := 1
		for ; ; n++ {
			if _, _, err := l.Next(t.Context()); err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if n != chunks || l.Closed() != (i == 2) {
			t.Errorf("utterance %d: %d chunks, closed %t", i+1, n, l.Closed())
		}
	}
	if closes, err := Closes(t.Context(), js, "LIVE", 4); err != nil || !closes {
		t.Errorf("closes: %t %v", closes, err)
	}
}

func TestAnEndThatIsNeitherTrueNorFalseIsSeen(t *testing.T) {
	for _, h := range []nats.Header{{"Avatar-End": {"maybe"}}, {"avatar-close": {""}}} {
		_, l := liveOf(t, nats.Header{}, h)
		if begun, err := l.Begin(t.Context()); err != nil || !begun {
			t.Fatalf("begun: %t %v", begun, err)
		}
		if _, _, err := l.Next(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, _, err := l.Next(t.Context())
		if e := errors.Of(err); err == nil || e.Code != errors.CodeInvalidJob || !strings.Contains(e.Message, "message 2 on live.job: header Avatar-") {
			t.Errorf("%v: got %v", h, err)
		}
	}
}
