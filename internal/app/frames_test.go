package app_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/output"
	"avatarworker/internal/session/avatarpb"
	"avatarworker/internal/simulator"
)

// animation takes an envelope apart.
func animation(t testing.TB, envelope []byte) *avatarpb.ServerResponseAnimation {
	t.Helper()
	var m avatarpb.Message
	if err := proto.Unmarshal(envelope, &m); err != nil {
		t.Fatal(err)
	}
	return m.GetServerResponseAnimation()
}

func TestEachFrameCarriesTheHeadersOfTheContractAndNoOthers(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("h", "ok", fields{"utterances": []any{speech(), speech()}})
	done := f.completed("h")
	frames := f.frames("h")
	if len(frames) != 4 || len(done.Utterances) != 2 {
		t.Fatalf("%d frames, %+v", len(frames), done)
	}
	for i, msg := range frames {
		a := animation(t, msg.Data())
		want := nats.Header{
			"Avatar-Run": {"1"}, "Avatar-Session": {"1"}, "Avatar-Attempt": {"1"},
			"Avatar-Utterance": {strconv.Itoa(i/2 + 1)}, "Avatar-Req-Id": {done.Utterances[i/2].ReqID},
			"Avatar-Seq": {strconv.Itoa(i + 1)}, "Nats-Msg-Id": {"h.run1.s1.frame" + strconv.Itoa(i+1)},
		}
		if i%2 == 1 {
			want["Avatar-End"] = []string{"true"}
		}
		if fmt.Sprint(want) != fmt.Sprint(msg.Headers()) {
			t.Errorf("frame %d: %v, want %v", i+1, msg.Headers(), want)
		}
		if a.GetReqId() != done.Utterances[i/2].ReqID || a.GetConnectionId() != done.ConnectionIDs[0] || a.GetEnd() != (i%2 == 1) {
			t.Errorf("frame %d: %v", i+1, a)
		}
	}
	u := done.Utterances[0]
	if u.Frames != 2 || u.Bytes != int64(len(frames[0].Data())+len(frames[1].Data())) || u.AudioMS != 3354 || u.FirstFrameMS < 0 || u.DurationMS < u.FirstFrameMS {
		t.Errorf("utterance %+v", u)
	}
}

// exchange makes one as a recording of a session of this fleet's backend.
func (f *fleet) exchange() *simulator.Exchange {
	f.t.Helper()
	f.publish("made", "ok", fields{"audio": pcm(11 * time.Second), "output": fields{"object": fields{}}})
	done := f.completed("made")
	x := &simulator.Exchange{
		SampleRate: 16000, AudioFormat: "pcm_s16le_mono", Audio: silence(11 * time.Second),
		ConnectionID: done.ConnectionIDs[0], ReqID: done.Utterances[0].ReqID,
	}
	x.Envelopes = envelopes(f.t, f.recording("made"))
	if len(x.Envelopes) != 4 {
		f.t.Fatalf("%d envelopes of 11 s of speech", len(x.Envelopes))
	}
	return x
}

func TestAnExchangeComesBackByteForByteThroughTheWholeWorker(t *testing.T) {
	t.Parallel()
	first := newFleet(t, nil)
	first.worker(worker{})
	x := first.exchange()
	f := newFleet(t, func(o *simulator.Options) { o.Replay = x })
	f.worker(worker{})
	f.checkReplay(x)
}

func TestTheCaptureComesBackByteForByteAndHas507KeyFrames(t *testing.T) {
	path := os.Getenv("AVATAR_CAPTURE")
	if path == "" {
		t.Skip("AVATAR_CAPTURE names no recorded exchange")
	}
	t.Parallel()
	x, err := simulator.LoadExchange(path)
	if err != nil {
		t.Fatal(err)
	}
	f := newFleet(t, func(o *simulator.Options) { o.Replay = x })
	f.worker(worker{})
	info := f.checkReplay(x)
	if info.KeyFrames != 507 || info.Envelopes != 6 || info.Seconds != 507/25.0 || !info.Whole {
		t.Errorf("recording of the capture: %+v", info)
	}
}

// checkReplay runs the exchange's speech to frames and to a recording.
func (f *fleet) checkReplay(x *simulator.Exchange) output.RecordingInfo {
	f.t.Helper()
	audio := fields{"inline": base64.StdEncoding.EncodeToString(x.Audio), "sample_rate": x.SampleRate, "format": "pcm_s16le"}
	f.publish("frames", "ok", fields{"audio": audio})
	f.publish("object", "ok", fields{"audio": audio, "output": fields{"object": fields{"name": "films/one"}}})
	f.completed("frames")
	var got [][]byte
	for _, msg := range f.frames("frames") {
		got = append(got, msg.Data())
	}
	if !slices.EqualFunc(got, x.Envelopes, bytes.Equal) {
		f.t.Errorf("the %d frames differ from the %d envelopes of the exchange", len(got), len(x.Envelopes))
	}
	if done := f.completed("object"); done.Recording != "films/one" {
		f.t.Errorf("%+v", done)
	}
	recording := f.recording("films/one")
	if !slices.EqualFunc(envelopes(f.t, recording), x.Envelopes, bytes.Equal) {
		f.t.Error("the recording differs from the exchange")
	}
	info, err := output.ReadRecording(bytes.NewReader(recording))
	if err != nil || !info.Whole {
		f.t.Errorf("%+v %v", info, err)
	}
	return info
}

// bigEnvelope is one of so many bytes and a few.
func bigEnvelope(connection, req string, size int) []byte {
	inner := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), connection)
	inner = protowire.AppendString(protowire.AppendTag(inner, 2, protowire.BytesType), req)
	inner = protowire.AppendVarint(protowire.AppendTag(inner, 3, protowire.VarintType), 1)
	frame := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), make([]byte, size))
	inner = protowire.AppendBytes(protowire.AppendTag(inner, 4, protowire.BytesType), frame)
	envelope := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 5)
	return protowire.AppendBytes(protowire.AppendTag(envelope, 6, protowire.BytesType), inner)
}

func TestAnEnvelopeAboveThePayloadLimitIsAProtocolError(t *testing.T) {
	t.Parallel()
	const limit = 128 << 10
	x := &simulator.Exchange{SampleRate: 16000, ConnectionID: "c", ReqID: "r", Envelopes: [][]byte{bigEnvelope("c", "r", limit)}}
	f := newFleetWith(t, natsserver.Options{StoreDir: t.TempDir(), Port: natsserver.RandomPort, MaxPayload: limit},
		func(o *simulator.Options) { o.Replay = x })
	f.worker(worker{})
	f.publish("big", "ok", fields{"audio": pcm(time.Second)})
	r := f.outcome("big")
	if r.State != lifecycle.StateDeadLettered || r.LastError.Code != errors.CodeProtocolError || r.Attempt != 2 || r.LastError.ReqID != "r" {
		t.Errorf("%s after %d attempts: %+v", r.State, r.Attempt, r.LastError)
	}
	if n := len(f.frames("big")); n != 0 {
		t.Errorf("%d frames are stored", n)
	}
	// Where no message is needed it may be as large as it likes.
	f.publish("object", "ok", fields{"audio": pcm(time.Second), "output": fields{"object": fields{}}})
	if r := f.outcome("object"); r.State != lifecycle.StateCompleted || !bytes.Contains(f.recording("object"), x.Envelopes[0]) {
		t.Errorf("%+v", r)
	}
}

func TestARecordingIsVisibleOnlyOnceItsJobCompleted(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("rec", "ok", fields{"live": fields{"sample_rate": 16000}, "output": fields{"object": fields{"name": "final"}}})
	f.say("rec", silence(time.Second), end)
	f.state("rec", func(r lifecycle.Record) bool { return r.Checkpoint == 1 })
	if got := f.objects(); len(got) != 0 {
		t.Errorf("objects after the first utterance: %v", got)
	}
	f.say("rec", silence(time.Second), closing)
	if done := f.completed("rec"); done.Recording != "final" || len(done.Utterances) != 2 {
		t.Errorf("%+v", done)
	}
	if got := f.objects(); !slices.Equal(got, []string{"final"}) {
		t.Errorf("objects after completion: %v", got)
	}
	info, err := output.ReadRecording(bytes.NewReader(f.recording("final")))
	if err != nil || len(info.Utterances) != 2 || !info.Whole {
		t.Errorf("%+v %v", info, err)
	}
}

func TestARecordingThatIsNotCompletedLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("cancelled", "ok", fields{"live": fields{"sample_rate": 16000}, "output": fields{"object": fields{}}})
	f.say("cancelled", silence(time.Second), end)
	f.state("cancelled", func(r lifecycle.Record) bool { return r.Checkpoint == 1 })
	if got := f.control("cancelled", "cancel"); got.Status != control.StatusCancelled {
		t.Errorf("%+v", got)
	}
	// Each session gives one envelope: two utterances are finished, not three.
	f.publish("given-up", "limit-1", fields{
		"utterances": []any{pcm(time.Second), pcm(time.Second), pcm(9 * time.Second)}, "output": fields{"object": fields{}},
	})
	if r := f.outcome("given-up"); r.State != lifecycle.StateDeadLettered || r.Checkpoint != 2 || r.LastError.Code != errors.CodeSessionDurationExceeded {
		t.Errorf("%s at %d: %+v", r.State, r.Checkpoint, r.LastError)
	}
	f.outcome("cancelled")
	if n := f.inRecordings(); n != 0 {
		t.Errorf("%d messages are left behind", n)
	}
}

func TestAJobReplacesNoRecordingButItsOwn(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("first", "ok", fields{"output": fields{"object": fields{"name": "film"}}})
	f.completed("first")
	film := f.recording("film")
	f.publish("second", "ok", fields{"output": fields{"object": fields{"name": "film"}}})
	r := f.outcome("second")
	if r.State != lifecycle.StateDeadLettered || r.LastError.Code != errors.CodeInvalidJob || r.LastError.ConnectionID != "" ||
		!strings.Contains(r.LastError.Message, `output.object.name: "film" is the recording of job first`) {
		t.Errorf("%s: %+v", r.State, r.LastError)
	}
	if got := f.recording("film"); !bytes.Equal(got, film) {
		t.Error("the recording has changed")
	}
	// Once its owner has removed it the name is free.
	store, err := f.js.ObjectStore(f.ctx, f.names.RecordingsBucket())
	if err == nil {
		err = store.Delete(f.ctx, "film")
	}
	if err != nil {
		t.Fatal(err)
	}
	f.publish("third", "ok", fields{"output": fields{"object": fields{"name": "film"}}})
	f.completed("third")
	if got := f.recording("film"); len(got) == 0 {
		t.Error("an empty recording")
	}
}

func TestFramesOfAJobWithoutThemAreNotKept(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("nothing", "ok", fields{"output": fields{"discard": fields{}}})
	if done := f.completed("nothing"); done.Utterances[0].Frames != 2 || done.Utterances[0].Bytes == 0 {
		t.Errorf("%+v", done)
	}
	if n := len(f.frames("nothing")) + len(f.objects()); n != 0 {
		t.Errorf("%d frames or objects", n)
	}
}

// number is a header of a frame.
func number(t testing.TB, msg jetstream.Msg, header string) int {
	t.Helper()
	n, err := strconv.Atoi(msg.Headers().Get(header))
	if err != nil {
		t.Fatalf("%s: %v", header, msg.Headers())
	}
	return n
}
