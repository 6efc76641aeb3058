package audio

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
)

// Live speech is whatever a publisher sends: an utterance is read to its end or
// refused, and no more comes out of it than went in.
func FuzzLiveChunksAreReadOrRefused(f *testing.F) {
	f.Add([]byte{1, 0, 2, 0}, []byte{}, "true", "", false)
	f.Add([]byte{1}, []byte{2}, "True", "1", false)
	f.Add(clip.WAV[:100], []byte{0, 0}, "", "true", false)
	f.Add(clip.Opus[:200], clip.Opus[200:400], "yes", "\x01", true)
	ctx := context.Background()
	js, err := jetstream.New(natstest.Connect(f, natstest.Start(f)))
	if err != nil {
		f.Fatal(err)
	}
	n := 0
	f.Fuzz(func(t *testing.T, first, second []byte, end, closes string, ogg bool) {
		if n%100 == 0 { // consumers that are over stay for a while
			_ = js.DeleteStream(ctx, "LIVE") // the first time there is none
			if _, err := js.CreateStream(ctx, jetstream.StreamConfig{
				Name: "LIVE", Subjects: []string{"live.*"}, Storage: jetstream.MemoryStorage, AllowDirect: true,
			}); err != nil {
				t.Fatal(err)
			}
		}
		n++
		subject := fmt.Sprintf("live.job%d", n)
		spec := LiveSpec{Stream: "LIVE", Subject: subject, SampleRate: 16000, MaxSilence: patience}
		if ogg {
			spec.Format = OggOpus
		}
		header := nats.Header{}
		header.Set(HeaderEnd, end)
		header.Set(HeaderClose, closes)
		for _, msg := range []*nats.Msg{
			{Subject: subject, Data: first}, {Subject: subject, Header: header, Data: second},
			{Subject: subject, Header: nats.Header{HeaderEnd: {"true"}}}, {Subject: subject, Header: nats.Header{HeaderClose: {"true"}}},
		} {
			if _, err := js.PublishMsg(ctx, msg); err != nil {
				return // a message that NATS does not take
			}
		}
		l, err := OpenLive(ctx, js, spec)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		begunAt := time.Now()
		defer func() {
			if took := time.Since(begunAt); took >= patience {
				t.Errorf("the end was waited for for %s", took)
			}
		}()
		read := 0
		for {
			begun, err := l.Begin(ctx)
			if err == nil && begun {
				read, err = readUtterance(ctx, t, l, read)
			}
			if err != nil {
				var e *errors.Error
				if !errors.As(err, &e) || e.Code != errors.CodeInvalidJob || len(e.Message) > 1024 {
					t.Fatalf("refused with %v", err)
				}
				return
			}
			if !begun || l.Closed() {
				break
			}
		}
		if read > len(first)+len(second) {
			t.Fatalf("%d bytes of %d", read, len(first)+len(second))
		}
	})
}

// patience is how long silence may last in a test that has none.
const patience = 20 * time.Second

func readUtterance(ctx context.Context, t *testing.T, l *Live, read int) (int, error) {
	t.Helper()
	for {
		data, length, err := l.Next(ctx)
		if read += len(data); length < 0 {
			t.Fatalf("a chunk of %s", length)
		}
		if err == io.EOF {
			return read, nil
		}
		if err != nil {
			return read, err
		}
	}
}
