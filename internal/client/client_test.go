package client

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/output"
	"avatarworker/internal/status"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) { natstest.Main(m) }

var names = topology.Names{}

func setup(t *testing.T) (*Client, jetstream.JetStream, topology.Handles) {
	t.Helper()
	js := natstest.JetStream(t)
	settings := topology.DefaultSettings()
	settings.Queues = []string{"default"}
	h, _, err := topology.Ensure(t.Context(), js, names, settings)
	if err != nil {
		t.Fatal(err)
	}
	return New(Options{JetStream: js}), js, h
}

func publish(t *testing.T, c *Client, id string) Published {
	t.Helper()
	p, err := c.Publish(t.Context(), "default", id, fmt.Appendf(nil, `{"id":%q}`, id))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// storeEvent stores a job's event as a worker does.
func storeEvent(t *testing.T, js jetstream.JetStream, kind, id string, body any) {
	t.Helper()
	data, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	msg := nats.NewMsg(names.Events(kind, id))
	msg.Data = data
	msg.Header.Set("ce-type", "avatar.job."+kind)
	msg.Header.Set("ce-subject", id)
	if _, err := js.PublishMsg(t.Context(), msg); err != nil {
		t.Fatal(err)
	}
}

func storeFrame(t *testing.T, js jetstream.JetStream, id string, session, utterance, seq int) {
	t.Helper()
	msg := nats.NewMsg(names.Frames(id))
	msg.Data = fmt.Appendf(nil, "%d.%d.%d", session, utterance, seq)
	for name, n := range map[string]int{output.HeaderRun: 1, output.HeaderSession: session, output.HeaderUtterance: utterance, output.HeaderSeq: seq} {
		msg.Header.Set(name, fmt.Sprint(n))
	}
	if _, err := js.PublishMsg(t.Context(), msg); err != nil {
		t.Fatal(err)
	}
}

func TestWaitHandsOverEventsAndFramesAndReturnsTheOutcome(t *testing.T) {
	t.Parallel()
	c, js, _ := setup(t)
	storeEvent(t, js, "completed", "j", map[string]any{"run": 1, "recording": "of an earlier job"})
	from, err := c.Position(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := publish(t, c, "j")
	frames, err := NewFrames(t.TempDir(), "frames", 1)
	if err != nil {
		t.Fatal(err)
	}
	defer frames.Close()
	var kinds []string
	started := make(chan struct{})
	go func() {
		storeEvent(t, js, "started", "j", map[string]any{"run": 1})
		storeFrame(t, js, "j", 1, 1, 1)
		<-started
		storeEvent(t, js, "completed", "j", map[string]any{"run": 1, "recording": "r", "utterances_total": 2})
	}()
	end, err := c.Wait(t.Context(), p, WaitOptions{
		From: from, Frames: frames,
		OnEvent: func(e status.Event) { kinds = append(kinds, e.Type); close(started) },
	})
	if err != nil || end.State != lifecycle.StateCompleted || end.Recording != "r" || end.UtterancesTotal != 2 || end.Event == nil {
		t.Fatalf("%+v, %v", end, err)
	}
	if len(kinds) != 1 || kinds[0] != "avatar.job.started" {
		t.Errorf("events: %v", kinds)
	}
	if err := c.RestOfFrames(t.Context(), "j", from, frames); err != nil || frames.Count() != 1 {
		t.Errorf("%d frames, %v", frames.Count(), err)
	}
}

func TestWaitSaysThatTheIDWasUsedBefore(t *testing.T) {
	t.Parallel()
	c, js, _ := setup(t)
	p := publish(t, c, "j")
	storeEvent(t, js, "duplicate", "j", map[string]any{"stream_seq": p.Seq + 1}) // another message's
	storeEvent(t, js, "duplicate", "j", map[string]any{"stream_seq": p.Seq})
	if _, err := c.Wait(t.Context(), p, WaitOptions{}); !errors.Is(err, ErrDropped) {
		t.Errorf("got %v", err)
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	t.Parallel()
	c, _, _ := setup(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Wait(ctx, publish(t, c, "j"), WaitOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestALaterSessionReplacesTheFramesOfAnUtterance(t *testing.T) {
	t.Parallel()
	frames, err := NewFrames(t.TempDir(), "frames", 1)
	if err != nil {
		t.Fatal(err)
	}
	defer frames.Close()
	add := func(run, session, utterance, seq int) {
		header := nats.Header{}
		for name, n := range map[string]int{output.HeaderRun: run, output.HeaderSession: session, output.HeaderUtterance: utterance, output.HeaderSeq: seq} {
			header.Set(name, fmt.Sprint(n))
		}
		if err := frames.Add(header, fmt.Appendf(nil, "%d.%d.%d;", session, utterance, seq), 1); err != nil {
			t.Fatal(err)
		}
	}
	add(1, 1, 1, 1)
	add(1, 1, 2, 2)
	add(1, 1, 2, 2) // twice
	add(2, 1, 1, 3) // another run's
	add(1, 2, 2, 1)
	add(1, 1, 2, 3) // of the session that was replaced
	var recording bytes.Buffer
	if _, err := frames.WriteTo(&recording); err != nil {
		t.Fatal(err)
	}
	got := recording.String()
	if frames.Count() != 2 || !strings.Contains(got, "1.1.1;") || !strings.Contains(got, "2.2.1;") || strings.Contains(got, "1.2.2;") {
		t.Errorf("%d frames: %q", frames.Count(), got)
	}
}

func TestUploadStoresAllFilesOrNone(t *testing.T) {
	t.Parallel()
	c, _, h := setup(t)
	file := filepath.Join(t.TempDir(), "a b.wav")
	if err := os.WriteFile(file, []byte("speech"), 0o600); err != nil {
		t.Fatal(err)
	}
	there, gone := NewUpload(file), NewUpload(file+".gone")
	if !strings.HasSuffix(there.Object, "-a_b.wav") || there.Object == NewUpload(file).Object {
		t.Errorf("object %q", there.Object)
	}
	if err := c.Upload(t.Context(), []Upload{there, gone}); err == nil || !strings.Contains(err.Error(), gone.File) {
		t.Errorf("got %v", err)
	}
	if _, err := h.AudioFiles.GetInfo(t.Context(), there.Object); !errors.Is(err, jetstream.ErrObjectNotFound) {
		t.Errorf("the first is still there: %v", err)
	}
	if err := c.Upload(t.Context(), []Upload{there}); err != nil {
		t.Fatal(err)
	}
	if data, err := h.AudioFiles.GetBytes(t.Context(), there.Object); err != nil || string(data) != "speech" {
		t.Errorf("%q, %v", data, err)
	}
}

func TestPublishSaysWhyAJobIsNotStored(t *testing.T) {
	t.Parallel()
	c, js, _ := setup(t)
	other := New(Options{JetStream: js, Names: topology.Names{Prefix: "other"}})
	if _, err := other.Publish(t.Context(), "default", "j", nil); err == nil || !strings.Contains(err.Error(), "no stream takes jobs on other.jobs.default") {
		t.Errorf("without a stream: %v", err)
	}
	large := make([]byte, js.Conn().MaxPayload()+1)
	if _, err := c.Publish(t.Context(), "default", "j", large); err == nil || !strings.Contains(err.Error(), "upload its speech") {
		t.Errorf("too large: %v", err)
	}
	publish(t, c, "j")
	if p := publish(t, c, "j"); !p.Duplicate {
		t.Errorf("published twice: %+v", p)
	}
}

func TestWorkersAreThoseThatServeTheQueueNow(t *testing.T) {
	t.Parallel()
	c, _, h := setup(t)
	for id, p := range map[string]fleet.Presence{
		"serves":    {Queues: map[string]int{"default": 1}},
		"drains":    {Queues: map[string]int{"default": 1}, Draining: true},
		"elsewhere": {Queues: map[string]int{"vip": 1}},
	} {
		p.WorkerID = id
		data, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Fleet.Put(t.Context(), fleet.Key(id), data); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Fleet.Put(t.Context(), fleet.Key("unreadable"), []byte("[")); err != nil {
		t.Fatal(err)
	}
	workers, err := c.Workers(t.Context(), "default")
	if err != nil || len(workers) != 1 || workers[0].WorkerID != "serves" {
		t.Errorf("%+v, %v", workers, err)
	}
	c.now = func() time.Time { return time.Now().Add(time.Hour) }
	if workers, err := c.Workers(t.Context(), "default"); err != nil || len(workers) != 0 {
		t.Errorf("an hour later: %+v, %v", workers, err)
	}
}

// speech gives its chunks and then err.
type speech struct {
	chunks []string
	err    error
}

func (s *speech) Next(context.Context) ([]byte, time.Duration, error) {
	if len(s.chunks) == 0 {
		return nil, 0, s.err
	}
	chunk := s.chunks[0]
	s.chunks = s.chunks[1:]
	return []byte(chunk), time.Millisecond, nil
}

func TestLiveSpeechHasItsEndAlsoAfterAnError(t *testing.T) {
	t.Parallel()
	c, js, _ := setup(t)
	broken := errors.New("broken")
	for id, failure := range map[string]error{"whole": io.EOF, "broken": broken} {
		err := c.Speak(t.Context(), id, &speech{[]string{"a", "b"}, failure}, true)
		if (failure == broken) != errors.Is(err, broken) || failure == io.EOF && err != nil {
			t.Errorf("%s: %v", id, err)
		}
		stream, err := js.Stream(t.Context(), names.AudioStream())
		if err != nil {
			t.Fatal(err)
		}
		msg, err := stream.GetLastMsgForSubject(t.Context(), names.Audio(id))
		if err != nil || msg.Header.Get(audio.HeaderClose) != "true" || len(msg.Data) != 0 {
			t.Errorf("%s: %+v, %v", id, msg, err)
		}
	}
}
