package output_test

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/output"
)

// atOnce is how many are made right after what they are made of was stored. One
// direct read in three is answered by the replica that lags.
const atOnce = 16

// A worker may be connected to a replica that does not know yet what the worker
// itself knows to be stored.
func TestWhatAReplicaDoesNotKnowYetIsStoredAllTheSame(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	c := natstest.Cluster(t, 3)
	js, err := jetstream.New(natstest.ConnectURL(t, c.ClientURLs()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "R", Replicas: 3, Storage: jetstream.MemoryStorage}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{
		Name: "F", Subjects: []string{"f.*"}, Replicas: 3, Storage: jetstream.MemoryStorage, AllowDirect: true,
	}); err != nil {
		t.Fatal(err)
	}
	t.Run("recordings", func(t *testing.T) { laggingRecordings(ctx, t, c) })
	t.Run("frames", func(t *testing.T) { laggingFrames(ctx, t, c) })
}

func laggingRecordings(ctx context.Context, t *testing.T, c *natsserver.Cluster) {
	js := natstest.Lagging(t, c, "OBJ_R")
	store, err := js.ObjectStore(ctx, "R")
	if err != nil {
		t.Fatal(err)
	}
	natstest.UntilStale(ctx, t,
		func(n int) {
			if _, err := store.PutBytes(ctx, fmt.Sprintf("probe%d", n), []byte("x")); err != nil {
				t.Fatal(err)
			}
		},
		func(n int) error { _, err := store.GetInfo(ctx, fmt.Sprintf("probe%d", n)); return err },
		jetstream.ErrObjectNotFound)

	recordings := output.NewRecordings(js, "R")
	natstest.Together(atOnce, func(i int) {
		r := film(i + 1)
		r.Name = fmt.Sprintf("film%d", i)
		var at *output.Checkpoint
		for session := 1; session <= 2; session++ {
			o := recordings.Sink(r, session, session-1, at)
			err := o.Open(ctx)
			if err == nil {
				err = o.Write(ctx, output.Envelope{Utterance: session, Data: fmt.Append(nil, session)})
			}
			if err == nil {
				err = o.Finish(ctx, session)
			}
			if err == nil {
				at, err = o.Checkpoint()
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
		// A third session has nothing to say. A worker that finds the job settled but
		// not acknowledged repeats what follows.
		for range 2 {
			if err := recordings.Publish(ctx, r, 3, 2, *at); err != nil {
				t.Error(err)
			}
		}
	})

	for i := range atOnce {
		info, err := leader.ObjectInfo(ctx, js, "R", fmt.Sprintf("film%d", i))
		if err != nil || info.Size != 4 || info.Chunks != 2 { // two envelopes of one byte
			t.Errorf("recording %d: %+v %v", i, info, err)
			continue
		}
		body, err := leader.OpenObject(ctx, js, info)
		if err != nil {
			t.Fatal(err)
		}
		if data, err := io.ReadAll(body); err != nil || string(data) != "\x011\x012" {
			t.Errorf("recording %d: %q %v", i, data, err)
		}
	}
}

func laggingFrames(ctx context.Context, t *testing.T, c *natsserver.Cluster) {
	js := natstest.Lagging(t, c, "F")
	stream, err := js.Stream(ctx, "F")
	if err != nil {
		t.Fatal(err)
	}
	f := output.NewFrames(js, "f.job", output.SessionID{JobID: "job", Run: 1, Session: 1})
	say := func(utterance int) {
		t.Helper()
		if err := f.Write(ctx, output.Envelope{Utterance: utterance, ReqID: "r", End: true, Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	stale := errors.New("not the last frame")
	natstest.UntilStale(ctx, t,
		func(n int) { say(n + 1) },
		func(n int) error {
			msg, err := stream.GetLastMsgForSubject(ctx, "f.job")
			if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && msg.Header.Get(output.HeaderUtterance) != fmt.Sprint(n+1) {
				return stale
			}
			return err
		}, stale)
	say(1000)
	natstest.Together(atOnce, func(int) {
		if last, found, err := output.Last(ctx, js, "F", "f.job"); err != nil || !found || last.Utterance != 1000 || !last.End {
			t.Errorf("%+v %t %v", last, found, err)
		}
	})
}

// The client never fails a request that was lost: it waits until its context ends.
func TestARequestThatWasLostHoldsUpNoLookAtTheFrames(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
	defer cancel()
	js := natstest.Losing(t, natstest.Start(t).ClientURL(), "CONSUMER.CREATE")
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "F", Subjects: []string{"f.*"}, Storage: jetstream.MemoryStorage}); err != nil {
		t.Fatal(err)
	}
	for session := 2; session >= 1; session-- {
		f := output.NewFrames(js, "f.job", output.SessionID{JobID: "job", Run: 1, Session: session})
		if err := f.Write(ctx, output.Envelope{Utterance: 1, ReqID: "r", End: true, Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	last, _, err := output.Last(ctx, js, "F", "f.job")
	if err != nil {
		t.Fatal(err)
	}
	if superseded, err := output.Superseded(ctx, js, "F", "f.job", last); err != nil || !superseded {
		t.Errorf("superseded: %t %v", superseded, err)
	}
}
