package audio

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

// atOnce is how many reads are made right after what they read was stored. One
// direct read in three is answered by the replica that lags.
const atOnce = 16

// A session's worker may be connected to a replica that does not know yet what
// a publisher knows to be stored.
func TestWhatAReplicaDoesNotKnowYetIsThereAllTheSame(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	c := natstest.Cluster(t, 3)
	js, err := jetstream.New(natstest.ConnectURL(t, c.ClientURLs()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "SPEECH", Replicas: 3, Storage: jetstream.MemoryStorage}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{
		Name: "LIVE", Subjects: []string{"live.*"}, Replicas: 3, Storage: jetstream.MemoryStorage, AllowDirect: true,
	}); err != nil {
		t.Fatal(err)
	}
	t.Run("an object", func(t *testing.T) { laggingObjects(ctx, t, c) })
	t.Run("live speech", func(t *testing.T) { laggingLive(ctx, t, c) })
}

func laggingObjects(ctx context.Context, t *testing.T, c *natsserver.Cluster) {
	js := natstest.Lagging(t, c, "OBJ_SPEECH")
	store, err := js.ObjectStore(ctx, "SPEECH")
	if err != nil {
		t.Fatal(err)
	}
	natstest.UntilStale(ctx, t,
		func(n int) { put(t, store, fmt.Sprintf("probe%d", n), clip.WAV[:100]) },
		func(n int) error { _, err := store.GetInfo(ctx, fmt.Sprintf("probe%d", n)); return err },
		jetstream.ErrObjectNotFound)

	o := newOpener(t, Options{Objects: JetStreamObjects(js), DefaultBucket: "SPEECH"})
	for _, round := range []string{"just uploaded", "just replaced"} {
		speech := []byte(round + " ") // an even number of bytes
		natstest.Together(atOnce, func(i int) {
			name := fmt.Sprintf("%d.wav", i)
			if _, err := store.PutBytes(ctx, name, plainWAV(speech).bytes()); err != nil {
				t.Error(err)
				return
			}
			s, err := o.Open(ctx, object(name))
			if err != nil {
				t.Errorf("%s: %v", round, err)
				return
			}
			h, err := listen(t, s)
			if err != nil || !bytes.Equal(h.data, speech) {
				t.Errorf("%s: received %q, %v", round, h.data, err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}

	since := time.Now()
	e := wantError(t, openAndRead(t, o, object("none")), errors.CodeAudioUnavailable, errors.PhaseAudio, "no such object")
	if took := time.Since(since); e.Network || took > 5*time.Second {
		t.Errorf("not there: found out after %s, would be tried again: %t", took, e.Network)
	}
}

func laggingLive(ctx context.Context, t *testing.T, c *natsserver.Cluster) {
	js := natstest.Lagging(t, c, "LIVE")
	stream, err := js.Stream(ctx, "LIVE")
	if err != nil {
		t.Fatal(err)
	}
	var last uint64
	say := func(header nats.Header) {
		t.Helper()
		ack, err := js.PublishMsg(ctx, &nats.Msg{Subject: "live.job", Header: header, Data: []byte{1, 0}})
		if err != nil {
			t.Fatal(err)
		}
		last = ack.Sequence
	}
	natstest.UntilStale(ctx, t,
		func(int) { say(nil) },
		func(int) error { _, err := stream.GetMsg(ctx, last); return err },
		jetstream.ErrMsgNotFound)
	spec := LiveSpec{Stream: "LIVE", Subject: "live.job"}

	say(nil)
	spec.Begun = last
	natstest.Together(atOnce, func(int) {
		if err := checkBegun(ctx, js, spec); err != nil {
			t.Error(err)
		}
	})
	say(nil)
	natstest.Together(atOnce, func(int) {
		l := Live{js: js, spec: spec}
		if seq, err := l.published(ctx); err != nil || seq != last {
			t.Errorf("an interrupt would pass over %d messages of %d: %v", seq, last, err)
		}
	})
	say(nats.Header{HeaderClose: {"true"}})
	natstest.Together(atOnce, func(int) {
		if over, err := Closes(ctx, js, "LIVE", last); err != nil || !over {
			t.Errorf("the publisher closed the session: %t %v", over, err)
		}
	})

	spec.Begun = last + 1
	wantError(t, checkBegun(ctx, js, spec), errors.CodeAudioUnavailable, errors.PhaseAudio, "aged out")
}
