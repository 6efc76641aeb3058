package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protowire"

	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/output"
	"avatarworker/internal/terminal"
)

const helloWAV = "../../internal/audio/clip/hello.wav"

// envelope is an animation envelope with one key frame (docs/protocol.md,
// section 4).
func envelope(reqID string, end bool) []byte {
	var animation []byte
	animation = protowire.AppendTag(animation, 2, protowire.BytesType)
	animation = protowire.AppendString(animation, reqID)
	if end {
		animation = protowire.AppendTag(animation, 3, protowire.VarintType)
		animation = protowire.AppendVarint(animation, 1)
	}
	frame := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), []byte("motion"))
	animation = protowire.AppendBytes(protowire.AppendTag(animation, 4, protowire.BytesType), frame)
	return protowire.AppendBytes(protowire.AppendTag(nil, 6, protowire.BytesType), animation)
}

func (b *bench) frame(job string, run, session, utterance, seq int, data []byte) {
	b.t.Helper()
	b.publish(&nats.Msg{Subject: names.Frames(job), Data: data, Header: nats.Header{
		output.HeaderRun: {fmt.Sprint(run)}, output.HeaderSession: {fmt.Sprint(session)},
		output.HeaderUtterance: {fmt.Sprint(utterance)}, output.HeaderSeq: {fmt.Sprint(seq)},
	}})
}

func recordingOf(envelopes ...[]byte) []byte {
	var b bytes.Buffer
	for _, e := range envelopes {
		output.AppendEnvelope(&b, e)
	}
	return b.Bytes()
}

func (b *bench) lastJob() *jetstream.RawStreamMsg {
	b.t.Helper()
	info, err := b.h.Jobs.Info(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	msg, err := b.h.Jobs.GetMsg(b.t.Context(), info.State.LastSeq)
	if err != nil {
		b.t.Fatal(err)
	}
	return msg
}

func completed(id string) event.Body {
	return event.NewCompleted(event.JobFields{JobID: id, Run: 1, Queue: "default", Worker: "host"}, 1, nil,
		[]event.Utterance{{ReqID: "r1"}}, 1, time.Second, "")
}

func TestSubmitUploadsSpeechAndPublishesAValidJob(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	stdout := expect(t, 0, []string{"no worker serves queue default"}, b.args("submit", "--avatar", "ok", "--audio", helloWAV, "--audio", helloWAV,
		"--label", "order=17", "--extra", "k=v", "--deadline", "10m", "--max-attempts", "2", "--output", "object", "--output-name", "rec")...)
	msg := b.lastJob()
	id := strings.TrimSpace(stdout)
	if !jobspec.ValidID(id) || msg.Header.Get("Nats-Msg-Id") != id || msg.Subject != "avatar.jobs.default" {
		t.Errorf("id %q, message %s %v", id, msg.Subject, msg.Header)
	}
	job, invalid := jobspec.Decode(msg.Header, msg.Data)
	if invalid != nil {
		t.Fatal(invalid)
	}
	if job.GetId() != id || job.GetLabels()["order"] != "17" || job.GetExtraParams()["k"] != "v" || job.GetMaxAttempts() != 2 ||
		job.GetOutput().GetObject().GetName() != "rec" || time.Until(job.GetDeadline().AsTime()) > 10*time.Minute || len(job.GetUtterances()) != 2 {
		t.Errorf("got %s", msg.Data)
	}
	want, err := os.ReadFile(helloWAV)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, u := range job.GetUtterances() {
		got, err := b.h.AudioFiles.GetBytes(t.Context(), u.GetObject())
		if err != nil || !bytes.Equal(got, want) || seen[u.GetObject()] {
			t.Errorf("%s: %v, %d bytes", u.GetObject(), err, len(got))
		}
		seen[u.GetObject()] = true
	}
}

func TestSubmitTakesAFileAndFlagsWin(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	c := start(t, `{"id":"mine","avatar_id":"a","labels":{"x":"1","y":"2"},"audio":{"url":"http://h/a.wav"}}`,
		b.args("submit", "-f", "-", "--avatar", "other", "--label", "y=3", "--json")...)
	if code := c.wait(); code != 0 {
		t.Fatalf("exit %d: %s", code, c.stderr)
	}
	p := decode[published](t, c.out.String())
	job, invalid := jobspec.Decode(nil, b.lastJob().Data)
	if invalid != nil || p.JobID != "mine" || job.GetAvatarId() != "other" || job.GetLabels()["x"] != "1" || job.GetLabels()["y"] != "3" {
		t.Errorf("%v: %+v, %s", invalid, p, b.lastJob().Data)
	}
	stdout := expect(t, 0, []string{"was published before"}, b.args("submit", "--id", "mine", "--avatar", "a", "--audio-url", "http://h/a.wav", "--json")...)
	if again := decode[published](t, stdout); !again.Duplicate || again.Seq != p.Seq {
		t.Errorf("got %+v", again)
	}
}

func TestWhatAWorkerWouldRefuseIsNotPublished(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	broken := writeFile(t, "broken.wav", []byte("RIFF\x00\x00\x00\x00WAVE"))
	typo := writeFile(t, "typo.json", []byte(`{"avatar":"a"}`))
	junk := writeFile(t, "junk.json", []byte(`junk`))
	for _, tc := range []struct {
		text string
		args []string
	}{
		{"broken.wav", []string{"--avatar", "a", "--audio", broken}},
		{junk + ": --sample-rate: raw PCM needs", []string{"--avatar", "a", "--audio", junk}},
		{"--live " + junk + ": --sample-rate: raw PCM needs", []string{"--avatar", "a", "--live", junk}},
		{"but --format says wav", []string{"--avatar", "a", "--audio", junk, "--format", "wav"}},
		{"none/out.rec: there is no directory ", []string{"--avatar", "a", "--audio-url", "http://h/a", "--out", filepath.Join(t.TempDir(), "none", "out.rec")}},
		{"--audio no-such.wav: there is no such file\n", []string{"--avatar", "a", "--audio", "no-such.wav"}},
		{"not a regular file", []string{"--avatar", "a", "--audio-url", "http://h/a", "--out", t.TempDir()}},
		{"avatar", []string{"--file", typo}},
		{junk + ": not JSON: line 1, column 1:", []string{"--file", junk}},
		{"output.livekit.url", []string{"--avatar", "a", "--audio-url", "http://h/a", "--output", "livekit", "--egress-room", "r"}},
	} {
		expect(t, 1, []string{tc.text}, b.args(append([]string{"submit"}, tc.args...)...)...)
	}
	if n := b.jobsStored(); n != 0 {
		t.Errorf("%d jobs were published", n)
	}
	expect(t, 0, nil, b.args("submit", "--no-check", "--file", junk)...)
	if got := string(b.lastJob().Data); got != "junk" {
		t.Errorf("published %q", got)
	}
}

func TestSpeechIsCheckedByWhatTheFleetTakes(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	mono, err := os.ReadFile(helloWAV)
	if err != nil {
		t.Fatal(err)
	}
	stereo := bytes.Clone(mono) // the same bytes, said to be two channels
	stereo[22] = 2
	binary.LittleEndian.PutUint32(stereo[28:], 2*binary.LittleEndian.Uint32(stereo[28:]))
	stereo[32] = 4
	file := writeFile(t, "stereo.wav", stereo)
	submit := func(code int, texts ...string) {
		t.Helper()
		expect(t, code, texts, b.args("submit", "--avatar", "a", "--audio", file)...)
	}
	worker := func(id string, p fleet.Presence) {
		t.Helper()
		p.WorkerID, p.At = id, time.Now()
		if p.Queues == nil {
			p.Queues = map[string]int{"default": 1}
		}
		data, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.h.Fleet.Put(t.Context(), "worker."+id, data); err != nil {
			t.Fatal(err)
		}
	}
	submit(1, "would refuse", "as configured here") // without workers: the default does not convert
	expect(t, 0, []string{"as configured here"}, b.args("submit", "--avatar", "a", "--audio", file, "--set", "audio.convert=true")...)
	worker("old", fleet.Presence{})
	worker("elsewhere", fleet.Presence{Queues: map[string]int{"vip": 1}, AudioMaxBytes: 1 << 20})
	submit(1, "as configured here")
	worker("w1", fleet.Presence{AudioConvert: true, AudioMaxBytes: 1 << 20})
	submit(0)
	worker("w2", fleet.Presence{AudioMaxBytes: 1 << 30})
	submit(1, "would refuse")
	worker("w2", fleet.Presence{AudioConvert: true, AudioMaxBytes: 1000})
	submit(1, "more than audio.max_bytes (1000)")
}

func TestWithoutAStreamSubmitSaysSo(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	expect(t, 1, []string{"no stream takes jobs on other.jobs.default"},
		b.args("submit", "--prefix", "other", "--avatar", "a", "--audio-url", "http://h/a")...)
}

func TestWaitSavesEachUtteranceOnceFromTheHighestSession(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	out := filepath.Join(t.TempDir(), "out.rec")
	b.frame("j1", 1, 9, 1, 1, envelope("old", true)) // of an earlier job with this id
	c := start(t, "", b.args("submit", "--id", "j1", "--avatar", "a", "--audio-url", "http://h/a", "--out", out)...)
	c.out.await(t, "j1")
	first, second, again, last := envelope("a", false), envelope("a2", false), envelope("b", false), envelope("b", true)
	b.event("s", event.Started{JobFields: event.JobFields{JobID: "j1", Run: 1, Attempt: 1}})
	b.frame("j1", 1, 1, 1, 1, first)
	b.frame("j1", 1, 1, 1, 2, envelope("a", true))
	b.frame("j1", 1, 1, 2, 3, second)
	b.frame("j1", 1, 2, 2, 1, again)
	b.frame("j1", 1, 1, 2, 4, envelope("a2", true)) // of a session that was superseded
	b.frame("j1", 1, 2, 2, 2, last)
	b.frame("j1", 1, 2, 2, 2, last)
	b.frame("j1", 2, 1, 1, 1, envelope("x", true)) // of a replay
	b.event("c", completed("j1"))
	if code := c.wait(); code != 0 {
		t.Fatalf("exit %d: %s", code, c.stderr)
	}
	got, err := os.ReadFile(out)
	if err != nil || !bytes.Equal(got, recordingOf(first, envelope("a", true), again, last)) {
		t.Errorf("%v: the file has other envelopes: %q", err, got)
	}
	if !strings.Contains(c.stderr.String(), "started") || strings.TrimSpace(c.out.String()) != "j1" {
		t.Errorf("stdout %q, stderr %q", c.out, c.stderr)
	}
	if left, err := os.ReadDir(filepath.Dir(out)); err != nil || len(left) != 1 {
		t.Errorf("%v: other files stay: %v", err, left)
	}
	stdout := expect(t, 0, []string{"total"}, "recording", "info", out)
	if !strings.Contains(stdout, "yes") {
		t.Errorf("not whole:\n%s", stdout)
	}
}

func TestFramesAreSavedAsTheyCameAlsoThoseThatCannotBeRead(t *testing.T) {
	t.Parallel()
	for _, frames := range [][][]byte{
		{envelope("a", false), []byte("no envelope"), envelope("a", true)},
		{{0x32, 0x80}, {0xff}},
		{{}},
	} {
		b := newBench(t)
		out := filepath.Join(t.TempDir(), "out.rec")
		c := start(t, "", b.args("submit", "--id", "j1", "--avatar", "a", "--audio-url", "http://h/a", "--out", out)...)
		c.out.await(t, "j1")
		for i, frame := range frames {
			b.frame("j1", 1, 1, 1, i+1, frame)
		}
		done := event.NewCompleted(event.JobFields{JobID: "j1", Run: 1}, 1, nil, []event.Utterance{{ReqID: "a", Frames: len(frames)}}, 1, time.Second, "")
		b.event("c", done)
		if code := c.wait(); code != 0 || !strings.Contains(c.stderr.String(), "as they came") {
			t.Fatalf("exit %d: %s", code, c.stderr)
		}
		got, err := os.ReadFile(out)
		if err != nil || !bytes.Equal(got, recordingOf(frames...)) {
			t.Errorf("%v: the file has %q", err, got)
		}
		if saved := fmt.Sprintf(", %s, ", terminal.Count(len(frames), "frame")); !strings.Contains(c.stderr.String(), saved) || !strings.Contains(c.stderr.String(), fmt.Sprintf("%d bytes", len(got))) {
			t.Errorf("no %q in %s", saved, c.stderr)
		}
	}
}

const jobBody = `{"avatar_id":"a","audio":{"url":"http://h/a.wav"}`

func TestAFileOfSeveralJobsIsSubmittedWhole(t *testing.T) {
	t.Parallel()
	for name, file := range map[string]string{
		"array":    "[" + jobBody + "},\n " + jobBody + `,"id":"second"},` + jobBody + "}]\n",
		"NDJSON":   jobBody + "}\r\n\n" + jobBody + `,"id":"second"}` + "\n" + jobBody + "}",
		"in lines": strings.ReplaceAll(jobBody, ",", ",\n") + "}\n" + jobBody + `,"id":"second"}` + jobBody + "}\n\n",
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			path := writeFile(t, "jobs", []byte(file))
			stdout := expect(t, 0, []string{"published: 3 jobs"}, b.args("submit", path, "--label", "x=1")...)
			if ids := strings.Fields(stdout); len(ids) != 3 || ids[1] != "second" || b.jobsStored() != 3 {
				t.Errorf("ids %q, %d jobs", ids, b.jobsStored())
			}
			if job, invalid := jobspec.Decode(nil, b.lastJob().Data); invalid != nil || job.GetLabels()["x"] != "1" {
				t.Errorf("%v: %v", invalid, job)
			}
			lines := strings.Split(strings.TrimSpace(expect(t, 0, []string{"second was published before", "published: 2 jobs"}, b.args("submit", path, "--json")...)), "\n")
			if len(lines) != 3 || !decode[published](t, lines[1]).Duplicate {
				t.Errorf("got %q", lines)
			}
			expect(t, 2, []string{"are for one job"}, b.args("submit", path, "--id", "x")...)
		})
	}
}

func TestWaitFollowsEachJobOfAFile(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	path := writeFile(t, "jobs", []byte(jobBody+`,"id":"j1"}`+jobBody+`,"id":"j2"}`))
	c := start(t, "", b.args("submit", path, "--wait")...)
	c.out.await(t, "j2")
	b.event("2", completed("j2"))
	b.event("1", event.Cancelled{JobFields: event.JobFields{JobID: "j1", Run: 1}})
	if code := c.wait(); code != 1 || !strings.Contains(c.stderr.String(), "j1: cancelled") || !strings.Contains(c.stderr.String(), "j2: completed") {
		t.Errorf("exit %d: %s", code, c.stderr)
	}
}

func TestAFileThatIsNoJobIsAnsweredWithWhereAndWhy(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	wav, err := os.ReadFile(helloWAV)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ file, text string }{
		{"{\n  \"avatar_id\": \"a\",\n  \"audio\": {\"url\" \"http://h\"}\n}", "file: not JSON: line 3, column 19: "},
		{"{\"avatar_id\": \"a\",", "file: not JSON: line 1, column 18: unexpected end"},
		{"avatar_id: a", "file: not JSON: line 1, column 1: "},
		{"", "holds no job"},
		{"[]", "holds no job"},
		{"\xef\xbb\xbf{}", "byte order mark"},
		{"\xff\xfe{\x00}\x00", "is UTF-16 text: save it as UTF-8"},
		{"\xfe\xff\x00{\x00}", "is UTF-16 text: save it as UTF-8"},
		{`{"avatar_id":"a","avatar_id":"b"}`, `field "avatar_id" is given twice`},
		{`{"avatar_idd":"a"}`, `did you mean "avatar_id"?`},
		{"[{},\n{\"avatar_id\":}]", "file: not JSON: line 2, column 14: "},
		{"[{},\n 3, {\"x\":1}]", "job 2 (line 2): the job: want an object, got a number"},
		{jobBody + "}\n" + jobBody + "\n", "job 2 (line 2): not JSON: line 3, column 1: unexpected end"},
		{jobBody + "}\n{\"audio\":{\"object\":\"o\"}}", "job 2 (line 2): not a valid job: avatar_id: is required"},
		{jobBody + "}\n}", "file: not JSON: line 2, column 1: "},
		{jobBody + "},\n" + jobBody + "}", "not JSON: line 1, column 51: "},
		{string(wav), "did you mean --audio?"},
		{"OggS\x00\x02", "did you mean --audio?"},
		{"ID3\x04\x00", "did you mean --audio?"},
		{"\xff\xfb\x90\x64\x00", "did you mean --audio?"},
	} {
		path := writeFile(t, "file", []byte(tc.file))
		expect(t, 1, []string{tc.text, "Nothing was published"}, b.args("submit", path)...)
	}
	if n := b.jobsStored(); n != 0 {
		t.Errorf("%d jobs were published", n)
	}
}

func TestFramesOfAJobThatDidNotCompleteAreSavedAsTheyCame(t *testing.T) {
	fields := event.JobFields{JobID: "j1", Run: 1}
	frames := [][]byte{envelope("a", true), envelope("b", false), []byte("no envelope")}
	for name, end := range map[string]event.Body{
		"dead-lettered": event.DeadLettered{JobFields: fields, Code: "protocolError", Class: "protocol"},
		"cancelled":     event.Cancelled{JobFields: fields},
		"expired":       event.Expired{JobFields: fields},
		"interrupted":   nil,
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			out := filepath.Join(t.TempDir(), "out.rec")
			c := start(t, "", b.args("submit", "--id", "j1", "--avatar", "a", "--audio-url", "http://h/a", "--out", out)...)
			c.out.await(t, "j1")
			for i, frame := range frames {
				b.frame("j1", 1, 1, 1+i/2, i+1, frame)
			}
			if end != nil {
				b.event("end", end)
			} else {
				b.event("e", event.Started{JobFields: fields}) // whose line shows that it reads
				c.stderr.await(t, "started")
				awaitPart(t, out, len(recordingOf(frames...)))
				c.interrupt()
			}
			if code := c.wait(); code != 1 || !strings.Contains(c.stderr.String(), "saved "+out) || !strings.Contains(c.stderr.String(), "3 frames") {
				t.Errorf("exit %d: %s", code, c.stderr)
			}
			got, err := os.ReadFile(out)
			if err != nil || !bytes.Equal(got, recordingOf(frames...)) {
				t.Errorf("%v: the file has %q", err, got)
			}
		})
	}
}

// awaitPart returns when the unfinished file next to out has so many bytes.
func awaitPart(t *testing.T, out string, size int) {
	t.Helper()
	tick, late := time.NewTicker(5*time.Millisecond), time.After(natstest.Patience)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("the frames of %s did not come", out)
		}
		parts, err := filepath.Glob(filepath.Join(filepath.Dir(out), partName(out)))
		if err != nil || len(parts) != 1 {
			continue
		}
		if info, err := os.Stat(parts[0]); err == nil && info.Size() == int64(size) {
			return
		}
	}
}

func TestWaitFailsUnlessTheJobCompleted(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	out := filepath.Join(t.TempDir(), "out.rec")
	c := start(t, "", b.args("submit", "--id", "j1", "--avatar", "a", "--audio-url", "http://h/a", "--out", out, "--json")...)
	c.stderr.await(t, "no worker serves")
	b.event("d", event.DeadLettered{JobFields: event.JobFields{JobID: "j1", Run: 1}, Code: "avatarNotFound", Class: "config", Message: "no such avatar", ServerDetail: "it was deleted"})
	if code := c.wait(); code != 1 {
		t.Errorf("exit %d, want 1", code)
	}
	if said := c.stderr.String(); !strings.Contains(said, "j1: dead_lettered: avatarNotFound (config): no such avatar: it was deleted\n") {
		t.Errorf("the final line lacks what the backend said:\n%s", said)
	}
	if p := decode[published](t, c.out.String()); p.Outcome != lifecycle.StateDeadLettered || !strings.Contains(string(p.Event), "no such avatar") || p.Saved != nil {
		t.Errorf("got %+v", p)
	}
	if left, err := os.ReadDir(filepath.Dir(out)); err != nil || len(left) != 0 {
		t.Errorf("%v: files stay: %v", err, left)
	}
}

func TestWaitEndsWithTimeoutInterruptOrAnUsedID(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	job := []string{"submit", "--avatar", "a", "--audio-url", "http://h/a", "--wait"}
	expect(t, 1, []string{"no outcome within 50ms", "goes on"}, b.args(append(job, "--timeout", "50ms")...)...)
	c := start(t, "", b.args(append(job, "--id", "j2")...)...)
	c.stderr.await(t, "no worker serves")
	c.interrupt()
	if code := c.wait(); code != 1 || !strings.Contains(c.stderr.String(), "avatarworker cancel j2") {
		t.Errorf("exit %d: %s", code, c.stderr)
	}
	b.record(lifecycle.Record{JobID: "used", Run: 1, StreamSeq: 4711, State: lifecycle.StateCompleted, Queue: "default"})
	expect(t, 1, []string{"used before"}, b.args(append(job, "--id", "used")...)...)
}

func TestLiveSpeechIsPublishedToItsEnd(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	speech := bytes.Repeat([]byte{1, 2}, 16000/2)
	c := start(t, string(speech), b.args("submit", "--id", "l1", "--avatar", "a", "--live", "-", "--sample-rate", "16000")...)
	if code := c.wait(); code != 0 {
		t.Fatalf("exit %d: %s", code, c.stderr)
	}
	expect(t, 0, nil, b.args("submit", "--id", "l2", "--avatar", "a", "--live", helloWAV, "--pace", "fast")...)
	job, invalid := jobspec.Decode(nil, b.lastJob().Data)
	if invalid != nil || job.GetLive().GetSampleRate() != 16000 || job.GetLive().GetFormat() != "pcm_s16le" {
		t.Errorf("%v: %s", invalid, b.lastJob().Data)
	}
	info, err := b.h.Audio.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	closed := 0
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
		msg, err := b.h.Audio.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		if msg.Subject == "avatar.audio.l1" {
			got = append(got, msg.Data...)
		}
		if msg.Header.Get("Avatar-Close") == "true" && msg.Header.Get("Avatar-End") == "true" {
			closed++
		}
	}
	if !bytes.Equal(got, speech) || closed != 2 {
		t.Errorf("%d of %d bytes, %d ends", len(got), len(speech), closed)
	}
}

func TestLiveSessionIsClosedWhenThePublisherIsInterrupted(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	in, feed := io.Pipe()
	defer feed.Close() // never fails
	out := newScreen()
	sub, err := b.nc.SubscribeSync("avatar.audio.l1")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	code := make(chan int, 1)
	go func() {
		code <- runContext(ctx, b.args("submit", "--id", "l1", "--avatar", "a", "--live", "-", "--sample-rate", "16000"), in, out, out)
	}()
	if _, err := feed.Write(make([]byte, 6400)); err != nil {
		t.Fatal(err)
	}
	if _, err := sub.NextMsg(20 * time.Second); err != nil {
		t.Fatal(err)
	}
	cancel()
	for {
		msg, err := sub.NextMsg(20 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if msg.Header.Get("Avatar-Close") == "true" {
			break
		}
	}
	if got := <-code; got != 1 {
		t.Errorf("exit %d, want 1: %s", got, out)
	}
}

func TestRecordingInfoSaysWhatIsNotWhole(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	whole := recordingOf(envelope("a", false), envelope("a", true))
	if _, err := b.h.Recordings.PutBytes(t.Context(), "rec", whole); err != nil {
		t.Fatal(err)
	}
	info := decode[recordingView](t, expect(t, 0, nil, b.args("recording", "info", "rec", "--json")...))
	if !info.Whole || info.Frames != 2 || len(info.Utterances) != 1 || info.Utterances[0].Frames != 2 {
		t.Errorf("got %+v", info)
	}
	dir := t.TempDir()
	expect(t, 1, []string{dir + " is a directory"}, "recording", "info", dir)
	expect(t, 1, []string{"recording gone not found"}, b.args("recording", "info", "gone")...)
	expect(t, 1, []string{"not whole"}, "recording", "info", writeFile(t, "cut", whole[:len(whole)-3]))
	expect(t, 1, []string{"not whole"}, "recording", "info", writeFile(t, "open", recordingOf(envelope("a", false))))
}

func TestSimulatorPrintsItsURLsAndServesUntilInterrupted(t *testing.T) {
	t.Parallel()
	c := start(t, "", "simulator", "--addr", "127.0.0.1:0", "--json")
	c.out.await(t, "}")
	urls := decode[map[string]string](t, c.out.String())
	if !strings.HasSuffix(urls["console_url"], "/v1/console") || !strings.HasSuffix(urls["ingress_url"], "/v2/driveningress") {
		t.Errorf("got %v", urls)
	}
	answer, err := http.Get(urls["url"] + "/control")
	if err != nil {
		t.Fatal(err)
	}
	if err := answer.Body.Close(); err != nil || answer.StatusCode != http.StatusOK {
		t.Errorf("%v, %s", err, answer.Status)
	}
	http.DefaultClient.CloseIdleConnections()
	c.interrupt()
	if code := c.wait(); code != 0 {
		t.Errorf("exit %d: %s", code, c.stderr)
	}
}

func TestASimulatorWhosePortIsInUseSaysWhatToDo(t *testing.T) {
	t.Parallel()
	taken, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close() // nothing was sent
	addr := taken.Addr().String()
	expect(t, exitFailed, []string{"--addr " + addr + ": the port is in use, perhaps by another simulator: choose another one"}, "simulator", "--addr", addr)
}

func TestAFileWithoutAJobIsNotOfferedToBePublished(t *testing.T) {
	t.Parallel()
	for _, stdin := range []string{"", " \n", "[]"} {
		c := start(t, stdin, "submit", "-")
		if code := c.wait(); code != exitFailed || !strings.Contains(c.stderr.String(), "stdin holds no job: want a JSON object. Nothing was published\n") || strings.Contains(c.stderr.String(), "--no-check") {
			t.Errorf("%q: exit %d: %s", stdin, code, c.stderr)
		}
	}
}

func TestSimulatorServesTLSWithACertificateOfItsOwn(t *testing.T) {
	t.Parallel()
	c := start(t, "", "simulator", "--addr", "127.0.0.1:0", "--tls", "--json")
	c.out.await(t, "}")
	urls := decode[map[string]string](t, c.out.String())
	if !strings.HasPrefix(urls["console_url"], "https://") || !strings.HasPrefix(urls["ingress_url"], "wss://") {
		t.Errorf("got %v", urls)
	}
	authority, err := os.ReadFile(urls["ca_file"])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authority) {
		t.Fatalf("%s has no certificate", urls["ca_file"])
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	answer, err := (&http.Client{Transport: transport}).Get(urls["url"] + "/control")
	if err != nil {
		t.Fatal(err)
	}
	if err := answer.Body.Close(); err != nil || answer.StatusCode != http.StatusOK {
		t.Errorf("%v, %s", err, answer.Status)
	}
	transport.CloseIdleConnections()
	c.interrupt()
	if code := c.wait(); code != 0 {
		t.Errorf("exit %d: %s", code, c.stderr)
	}
	if _, err := os.Stat(urls["ca_file"]); err == nil {
		t.Error("the file of the certificate is left behind")
	}
}

// Not parallel: others would allocate meanwhile.
func TestWorkForAFileOfJobsGrowsWithItsLengthOnly(t *testing.T) {
	job := `{"avatar_id":"a","audio":{"object":"a.wav"}}`
	for name, data := range map[string]string{
		"lines": strings.Repeat(job+"\n", 2000),
		"list":  "[" + strings.Repeat(job+",", 1999) + job + "]",
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		parts, err := splitJobs(name, []byte(data))
		runtime.ReadMemStats(&after)
		if err != nil || len(parts) != 2000 {
			t.Fatalf("%s: %d jobs, %v", name, len(parts), err)
		}
		if spent := (after.TotalAlloc - before.TotalAlloc) / uint64(len(data)); spent > 200 {
			t.Errorf("%s: allocated %d bytes for each byte of the file", name, spent)
		}
	}
}

func TestAFileOfWrongJobsIsAnsweredWithTheFirstOfThem(t *testing.T) {
	t.Parallel()
	_, err := splitJobs("f", []byte(strings.Repeat("\n {\"x\":1}", 3*maxFaults)))
	if err == nil || strings.Count(err.Error(), "\n") != maxFaults-1 || !strings.HasPrefix(err.Error(), "f, job 1 (line 2): field \"x\"") {
		t.Errorf("%.300s", fmt.Sprint(err))
	}
}
