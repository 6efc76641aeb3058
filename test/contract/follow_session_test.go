package contract

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"testing"
	"time"

	"avatarworker/internal/audio/clip"
	"avatarworker/test/contract/follower"
)

func TestAPublisherThatFollowsOnlyTheDocumentGetsASession(t *testing.T) {
	t.Parallel()
	for _, message := range []string{"Job", "JobProtobuf"} {
		f := follow(limited(t), t, true)
		examples := f.message("takeJob", "Job").Examples
		if len(examples) < 5 {
			t.Errorf("only %d examples of a job were found", len(examples))
		}
		for _, e := range examples {
			t.Run(message+"/"+e.Name, func(t *testing.T) {
				in := *f
				in.t = t
				in.session(limited(t), message, in.job(e.Name, "ok-avatar"))
			})
		}
	}
}

// session publishes a job and listens to its end.
func (f *following) session(ctx context.Context, message string, job follower.Example) {
	f.t.Helper()
	id := f.id(job)
	events, frames := f.listen("tellEvent", id), f.listen("sendFrame", id)
	f.upload(ctx, job)
	f.store(ctx, "takeJob", message, nil, job)
	fields, _ := job.Payload.(map[string]any)
	if live, ok := fields["live"].(map[string]any); ok {
		f.speak(ctx, id)
		var cancel context.CancelFunc
		ctx, cancel = f.beforeSilence(ctx, live)
		defer cancel()
	}
	received := f.until(ctx, events, "Completed")
	if received[0].Message.Name != "Started" {
		f.t.Fatalf("events are %v", names(received))
	}
	f.until(ctx, f.late(ctx, "tellEvent", id), "Completed")
	completed := received[len(received)-1]
	switch output := received[0].Field("output"); output {
	case "frames":
		f.wantFrames(ctx, id, frames, completed)
	case "object":
		f.wantRecording(ctx, completed)
	}
}

// upload puts speech under each name that the job gives.
func (f *following) upload(ctx context.Context, job follower.Example) {
	f.t.Helper()
	objects, err := f.message("takeJob", "Job").Objects(job.Payload)
	if err != nil {
		f.t.Fatal(err)
	}
	for _, o := range objects {
		if err := f.Upload(ctx, o, clip.WAV); err != nil {
			f.t.Fatal(err)
		}
	}
}

// speak says one utterance: a second of raw PCM in chunks, then its end and the
// session's.
func (f *following) speak(ctx context.Context, id map[string]string) {
	f.t.Helper()
	const wavHeader, tenth = 44, 3200 // bytes
	for chunk := range slices.Chunk(clip.WAV[wavHeader:wavHeader+10*tenth], tenth) {
		f.store(ctx, "takeLiveAudio", "LiveAudio", id, follower.Example{Payload: chunk})
	}
	for _, end := range []string{"endOfUtterance", "endOfSession"} {
		f.store(ctx, "takeLiveAudio", "LiveAudio", id, f.example("takeLiveAudio", "LiveAudio", end))
	}
}

// beforeSilence ends before the live session would have ended by itself.
func (f *following) beforeSilence(ctx context.Context, live map[string]any) (context.Context, context.CancelFunc) {
	f.t.Helper()
	limit, err := time.ParseDuration(fmt.Sprint(live["max_silence"]))
	if err != nil {
		f.t.Fatal(err)
	}
	return context.WithTimeout(ctx, limit)
}

// wantFrames checks that as many frames came as the outcome says, the last one
// marked as the document marks it; and that who comes late finds the same.
func (f *following) wantFrames(ctx context.Context, id map[string]string, frames *follower.Feed, completed *follower.Received) {
	f.t.Helper()
	count, err := strconv.Atoi(completed.Field("utterances", "0", "frames"))
	if err != nil || count == 0 {
		f.t.Fatalf("no frames: %s", completed.Body)
	}
	late := f.late(ctx, "sendFrame", id)
	marks := slices.Sorted(maps.Keys(f.example("sendFrame", "Frame", "lastOfAnUtterance").Headers))
	for i := range count {
		frame, err := frames.Next(ctx)
		if err != nil {
			f.t.Fatalf("frame %d of %d: %v", i+1, count, err)
		}
		kept, err := late.Next(ctx)
		if err != nil || !bytes.Equal(frame.Body, kept.Body) {
			f.t.Errorf("frame %d is another one in the stream: %v", i+1, err)
		}
		last := true
		for _, name := range marks {
			last = last && frame.Headers[name] != ""
		}
		if last != (i == count-1) {
			f.t.Errorf("frame %d of %d has %v", i+1, count, frame.Headers)
		}
	}
}

// wantRecording checks that the recording is envelopes behind their lengths.
func (f *following) wantRecording(ctx context.Context, completed *follower.Received) {
	f.t.Helper()
	objects, err := completed.Message.Objects(completed.JSON)
	if err != nil || len(objects) != 1 {
		f.t.Fatalf("the recording is not said: %v, %v: %s", objects, err, completed.Body)
	}
	data, err := f.Download(ctx, objects[0])
	if err != nil || len(data) == 0 {
		f.t.Fatalf("%v has %d bytes: %v", objects[0], len(data), err)
	}
	for len(data) > 0 {
		size, n := binary.Uvarint(data)
		if n <= 0 || size > uint64(len(data)-n) {
			f.t.Fatal("no length before an envelope")
		}
		if err := f.message("sendFrame", "Frame").Decode(data[n:][:size]); err != nil {
			f.t.Fatal(err)
		}
		data = data[uint64(n)+size:]
	}
}
