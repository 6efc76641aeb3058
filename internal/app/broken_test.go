package app_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
)

// wav is a file of that shape; its header says size bytes of samples.
func wav(channels, bits uint16, rate uint32, size uint32, samples []byte) string {
	h := []byte("RIFF\x00\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00")
	h = binary.LittleEndian.AppendUint16(h, channels)
	h = binary.LittleEndian.AppendUint32(h, rate)
	h = binary.LittleEndian.AppendUint32(h, rate*uint32(channels*bits/8))
	h = binary.LittleEndian.AppendUint16(h, channels*bits/8)
	h = binary.LittleEndian.AppendUint16(h, bits)
	h = append(h, "data"...)
	h = binary.LittleEndian.AppendUint32(h, size)
	h = append(h, samples...)
	binary.LittleEndian.PutUint32(h[4:], uint32(len(h)-8-len(samples))+size)
	return base64.StdEncoding.EncodeToString(h)
}

// audioJob is a job with that audio.
func audioJob(audio string) string { return `{"avatar_id":"ok","audio":` + audio + `}` }

func inline(data string, more string) string {
	return audioJob(`{"inline":"` + data + `"` + more + `}`)
}

func TestBrokenJobsAreGivenUpAtOnceByNameAndTheWorkerGoesOn(t *testing.T) {
	t.Parallel()
	second := make([]byte, 32000)
	odd := base64.StdEncoding.EncodeToString(second[:2001])
	good := base64.StdEncoding.EncodeToString(clip.WAV)
	cases := []struct{ name, body, names string }{
		{"not JSON", `hello`, "JSON"},
		{"cut JSON", `{"avatar_id":"ok",`, "JSON"},
		{"empty", ``, "no body"},
		{"a list", `[1]`, "object"},
		{"a typing error", `{"avatar_id":"ok","adio":{}}`, "adio"},
		{"a typing error inside", audioJob(`{"inline":"` + good + `","sample_rte":16000}`), "sample_rte"},
		{"no avatar", `{"audio":{"inline":"` + good + `"}}`, "avatar_id"},
		{"no speech", `{"avatar_id":"ok"}`, "audio, utterances, live"},
		{"two kinds of speech", `{"avatar_id":"ok","audio":{"inline":"` + good + `"},"live":{"sample_rate":16000}}`, "audio and live"},
		{"two sources", audioJob(`{"inline":"` + good + `","object":"x"}`), "audio"},
		{"no source", audioJob(`{"format":"wav"}`), "audio"},
		{"bad base64", inline("!!!!", ""), "audio.inline"},
		{"an unknown format", inline(good, `,"format":"mp3"`), "audio.format"},
		{"a file URL", audioJob(`{"url":"file:///etc/passwd"}`), "audio.url"},
		{"two outputs", `{"avatar_id":"ok","audio":{"inline":"` + good + `"},"output":{"frames":{},"discard":{}}}`, "output"},
		{"a room without a token", `{"avatar_id":"ok","audio":{"inline":"` + good + `"},"output":{"livekit":{"url":"wss://x.example","room_name":"r"}}}`, "output.livekit.api_token"},
		{"a bad deadline", `{"avatar_id":"ok","audio":{"inline":"` + good + `"},"deadline":"tomorrow"}`, "deadline"},
		{"a negative limit", `{"avatar_id":"ok","audio":{"inline":"` + good + `"},"max_attempts":-1}`, "max_attempts"},
		{"an app without credentials", `{"avatar_id":"ok","app_id":"stranger","audio":{"inline":"` + good + `"}}`, "app_id"},
		{"a wrong redelivery", `{"avatar_id":"ok","audio":{"inline":"` + good + `"},"on_redelivery":"maybe"}`, "on_redelivery"},
		{"a raw rate that is not said", inline(base64.StdEncoding.EncodeToString(second), `,"format":"pcm_s16le"`), "audio.sample_rate"},
		{"odd PCM", inline(odd, `,"format":"pcm_s16le","sample_rate":16000`), "audio"},
		{"stereo", inline(wav(2, 16, 16000, 32000, second), ""), "audio"},
		{"8 bit", inline(wav(1, 8, 16000, 32000, second), ""), "audio"},
		{"truncated", inline(wav(1, 16, 16000, 64000, second), ""), "audio"},
		{"without samples", inline(wav(1, 16, 16000, 0, nil), ""), "audio"},
		{"another rate than said", inline(wav(1, 16, 16000, 32000, second), `,"sample_rate":48000`), "audio"},
		{"a WAV that is none", inline(base64.StdEncoding.EncodeToString(second), `,"format":"wav"`), "audio"},
		{"an Ogg that is none", inline(base64.StdEncoding.EncodeToString(second), `,"format":"ogg_opus"`), "audio"},
		{"rates that differ", `{"avatar_id":"ok","utterances":[{"inline":"` + good + `"},{"inline":"` + wav(1, 16, 48000, 32000, second) + `"}]}`, "utterances[1]"},
	}
	f := newFleet(t, nil)
	f.worker(worker{})
	for i, c := range cases {
		f.publishRaw(&nats.Msg{Subject: f.names.Jobs("default"), Data: []byte(c.body), Header: nats.Header{"Nats-Msg-Id": {"broken" + strconv.Itoa(i)}}})
	}
	for i, c := range cases {
		id := "broken" + strconv.Itoa(i)
		r := f.outcome(id)
		e := r.LastError
		if r.State != lifecycle.StateDeadLettered || r.Reason != lifecycle.ReasonInvalidJob || e.Code != errors.CodeInvalidJob || e.Class != errors.ClassJob {
			t.Errorf("%s: %s (%s): %+v", c.name, r.State, r.Reason, e)
			continue
		}
		if !strings.Contains(e.Message, c.names) || len(e.Message) > 1000 {
			t.Errorf("%s: %q does not name %q", c.name, e.Message, c.names)
		}
		if n := len(f.errorEvents(id)); n != 1 {
			t.Errorf("%s: %d error events", c.name, n)
		}
		letters := f.deadLetters(id)
		if len(letters) != 1 || !bytes.Equal(letters[0].Data(), []byte(c.body)) {
			t.Errorf("%s: %d dead letters, or not its own bytes", c.name, len(letters))
			continue
		}
		h := letters[0].Headers()
		if h.Get("Avatar-Msg-Id") != id || h.Get("Avatar-Reason") != "invalid_job" || !json.Valid([]byte(h.Get("Avatar-Error"))) {
			t.Errorf("%s: %v", c.name, h)
		}
	}
	if n := len(f.backend.SessionLog()); n != 0 {
		t.Errorf("%d sessions were opened for broken jobs", n)
	}
	f.publish("healthy", "ok", nil)
	f.completed("healthy")
}

func TestARateThatTheBackendDoesNotTakeIsRefusedBeforeAnySession(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("inline", "ok", fields{"audio": fields{"inline": wav(1, 16, 11025, 32000, make([]byte, 32000))}})
	odd := f.uploaded(time.Second)
	odd["sample_rate"] = 11025
	f.publish("object", "ok", fields{"audio": odd})
	f.publish("live", "ok", fields{"live": fields{"sample_rate": 11025}})
	f.publish("second", "ok", fields{"utterances": []any{f.uploaded(time.Second), f.stored("odd.wav", wav(1, 16, 11025, 32000, make([]byte, 32000)))}})
	for _, id := range []string{"inline", "object", "live", "second"} {
		r := f.outcome(id)
		if r.State != lifecycle.StateDeadLettered || r.LastError.Code != errors.CodeUnsupportedSampleRate || r.LastError.Phase != errors.PhaseAudio || r.Attempt != 1 {
			t.Errorf("%s: %+v", id, r.LastError)
		}
	}
	if n := len(f.backend.SessionLog()); n != 0 {
		t.Errorf("%d sessions", n)
	}
}

func TestAudioThatIsNotThereIsGivenUp(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("second", "ok", fields{"utterances": []any{f.uploaded(time.Second), fields{"object": "missing"}}})
	f.publish("first", "ok", fields{"audio": fields{"object": "missing"}})
	for _, id := range []string{"second", "first"} {
		r := f.outcome(id)
		if r.State != lifecycle.StateDeadLettered || r.LastError.Code != errors.CodeAudioUnavailable || r.LastError.Class != errors.ClassJob || r.Attempt != 1 || r.Checkpoint != 0 {
			t.Errorf("%s at %d: %+v", id, r.Checkpoint, r.LastError)
		}
	}
	if n := len(f.backend.SessionLog()); n != 0 {
		t.Errorf("%d sessions were paid for", n)
	}
}

// stored uploads a file, given in base64.
func (f *fleet) stored(name, file string) fields {
	f.t.Helper()
	data, err := base64.StdEncoding.DecodeString(file)
	if err != nil {
		f.t.Fatal(err)
	}
	store, err := f.js.ObjectStore(f.ctx, f.names.AudioFilesBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	if _, err := store.PutBytes(f.ctx, name, data); err != nil {
		f.t.Fatal(err)
	}
	return fields{"object": name}
}
