package app_test

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
)

// how a live message ends.
type ending int

const (
	going ending = iota
	end
	closing
)

// say publishes one chunk of live speech, and returns its sequence.
func (f *fleet) say(id string, chunk []byte, how ending) uint64 {
	f.t.Helper()
	h := nats.Header{}
	switch how {
	case going:
	case end:
		h["Avatar-End"] = []string{"true"}
	case closing:
		h["Avatar-Close"] = []string{"true"}
	}
	ack, err := f.js.PublishMsg(f.ctx, &nats.Msg{Subject: f.names.Audio(id), Header: h, Data: chunk})
	if err != nil {
		f.t.Fatal(err)
	}
	return ack.Sequence
}

func live(maxSilence string) fields {
	return fields{"live": fields{"sample_rate": 16000, "max_silence": maxSilence}}
}

func TestShortLiveUtterancesAtThePaceOfSpeechAreAllDelivered(t *testing.T) {
	t.Parallel()
	utterances := 20
	if os.Getenv("AVATAR_LONG") != "" {
		utterances = 200
	}
	const chunk = 100 * time.Millisecond
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("talk", "ok", live("10s"))
	pace := time.NewTicker(chunk)
	defer pace.Stop()
	for i := range utterances {
		f.say("talk", silence(chunk), going)
		<-pace.C
		how := end
		if i == utterances-1 {
			how = closing
		}
		f.say("talk", silence(chunk), how)
		<-pace.C
	}
	done := f.completed("talk")
	if done.UtterancesTotal != utterances || len(f.ends("talk")) != utterances {
		t.Errorf("%d utterances, %d ends", done.UtterancesTotal, len(f.ends("talk")))
	}
	var slowest int64
	for i, u := range done.Utterances {
		slowest = max(slowest, u.FirstFrameMS)
		if u.AudioMS != 200 || u.Frames != 1 || u.DurationMS < u.FirstFrameMS {
			t.Errorf("utterance %d: %+v", i+1, u)
		}
	}
	if done.Attempts != 1 || len(done.ConnectionIDs) != 1 {
		t.Errorf("%+v", done)
	}
	t.Logf("slowest first frame %d ms after the first chunk", slowest)
}

func TestAPublisherThatStartsBeforeAnyWorkerLosesNothing(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{}).stop() // makes the streams
	f.publish("early", "ok", live("5s"))
	for range 30 { // more than is fetched ahead
		f.say("early", silence(100*time.Millisecond), going)
		f.say("early", silence(100*time.Millisecond), end)
	}
	f.say("early", nil, closing)
	f.worker(worker{})
	if done := f.completed("early"); done.UtterancesTotal != 30 {
		t.Errorf("%d utterances", done.UtterancesTotal)
	}
	if s := f.sessions("ok"); len(s) != 1 || s[0].AudioBytes != int64(len(silence(6*time.Second))) {
		t.Errorf("%+v", s)
	}
}

func TestALiveSessionWithoutAnEndIsClosedBySilence(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("mute", "ok-mute", live("1s"))
	f.publish("half", "ok-half", live("1s"))
	f.say("half", silence(time.Second), going)
	if done := f.completed("mute"); len(done.Utterances) != 0 {
		t.Errorf("%+v", done)
	}
	if done := f.completed("half"); len(done.Utterances) != 1 || done.Utterances[0].AudioMS != 1000 {
		t.Errorf("%+v", done)
	}
	for _, avatar := range []string{"ok-mute", "ok-half"} {
		if s := f.sessions(avatar); len(s) != 1 || s[0].CloseCode != 1000 || s[0].ClosedBy != "client" {
			t.Errorf("%+v", s)
		}
	}
}

func TestEmptyLiveMessagesEndAndCloseOnly(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("empty", "ok", live("10s"))
	f.say("empty", nil, going)
	f.say("empty", nil, end) // nothing to end
	f.say("empty", silence(time.Second), going)
	f.say("empty", nil, going)
	f.say("empty", nil, end)
	f.say("empty", nil, closing)
	if done := f.completed("empty"); len(done.Utterances) != 1 || done.Utterances[0].AudioMS != 1000 {
		t.Errorf("%+v", done)
	}
}

func TestLiveSpeechOfAnOddNumberOfBytesIsRefusedByName(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("odd", "ok", live("10s"))
	f.say("odd", silence(time.Second), end)
	f.say("odd", []byte{1, 2, 3}, going)
	r := f.outcome("odd")
	if r.State != lifecycle.StateDeadLettered || r.LastError.Code != errors.CodeInvalidJob || r.Attempt != 1 || !strings.Contains(r.LastError.Message, "live: message 2 on avatar.audio.odd has 3 bytes") {
		t.Errorf("%+v", r.LastError)
	}
}

func TestARedeliveredLiveJobGoesOnWithTheFirstChunkOfTheUnfinishedUtterance(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("cut", "drop-once-3", live("10s"))
	f.say("cut", silence(3*time.Second), end) // two envelopes
	for range 6 {
		f.say("cut", silence(500*time.Millisecond), going)
	}
	f.event("cut", "retrying") // cut after the first envelope of the second
	f.say("cut", silence(500*time.Millisecond), end)
	f.say("cut", silence(time.Second), closing)
	done := f.completed("cut")
	if done.UtterancesTotal != 3 || done.Attempts != 2 || done.Utterances[1].AudioMS != 3500 {
		t.Errorf("%+v", done)
	}
	if s := f.sessions("drop-once-3"); len(s) != 2 || s[1].AudioBytes != int64(len(silence(4500*time.Millisecond))) {
		t.Errorf("%+v", s)
	}
	if got := f.ends("cut"); !slices.Equal(got, []string{"1 in 1", "2 in 2", "3 in 2"}) {
		t.Errorf("delivered: %v", got)
	}
}

// orphanLive makes a live job that a lost worker was running.
func (f *fleet) orphanLive(id string, change func(*lifecycle.Record)) {
	f.t.Helper()
	job := live("2s")
	job["id"], job["avatar_id"] = id, "ok-"+id
	f.orphanOf(id, job, change)
}

func TestLiveSpeechThatHasAgedOutIsNotSpokenFromItsMiddle(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{}).stop()
	first := f.say("old", silence(time.Second), going)
	f.say("old", silence(time.Second), end)
	stream, err := f.js.Stream(f.ctx, f.names.AudioStream())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.DeleteMsg(f.ctx, first); err != nil {
		t.Fatal(err)
	}
	f.orphanLive("old", func(r *lifecycle.Record) { r.LiveBegun = first })
	f.worker(worker{})
	r := f.outcome("old")
	if r.State != lifecycle.StateDeadLettered || r.LastError.Code != errors.CodeAudioUnavailable || r.LastError.Class != errors.ClassJob ||
		r.Reason != lifecycle.ReasonPermanent || !strings.Contains(r.LastError.Message, "aged out") {
		t.Errorf("%s %s: %+v", r.State, r.Reason, r.LastError)
	}
	if n := len(f.sessions("ok-old")); n != 0 {
		t.Errorf("%d sessions were opened for it", n)
	}
}

func TestALiveSessionThatItsPublisherClosedIsNotOpenedAgainAfterACrash(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{}).stop()
	last := f.say("closed", silence(time.Second), closing)
	f.orphanLive("closed", func(r *lifecycle.Record) { r.LiveSeq, r.Checkpoint, r.UtterancesDone = last, 1, 1 })
	f.worker(worker{})
	if r := f.outcome("closed"); r.State != lifecycle.StateCompleted || r.Checkpoint != 1 {
		t.Errorf("%+v", r)
	}
	if n := len(f.sessions("ok-closed")); n != 0 {
		t.Errorf("%d sessions were opened to wait for nothing", n)
	}
}

func TestALiveUtteranceWhoseLastFrameIsStoredIsNotRepeatedAfterACrash(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{}).stop()
	first := f.say("spoken", silence(time.Second), going)
	f.say("spoken", silence(time.Second), end)
	f.say("spoken", silence(3*time.Second), closing)
	f.frame("spoken", 1, 1, true)
	f.orphanLive("spoken", func(r *lifecycle.Record) { r.LiveBegun = first })
	f.worker(worker{})
	if done := f.completed("spoken"); done.UtterancesTotal != 2 || done.Utterances[1].AudioMS != 3000 {
		t.Errorf("%+v", done)
	}
	if s := f.sessions("ok-spoken"); len(s) != 1 || s[0].Utterances != 1 || s[0].AudioBytes != int64(len(silence(3*time.Second))) {
		t.Errorf("%+v", s)
	}
}

// interrupted is an utterance that a reply says was interrupted.
type interrupted struct {
	reqID   string
	lastSeq int
}

// checkInterrupted looks for frames of an interrupted utterance after the reply.
func (f *fleet) checkInterrupted(id string, list ...interrupted) {
	f.t.Helper()
	frames := f.frames(id)
	for _, i := range list {
		for _, msg := range frames {
			if msg.Headers().Get("Avatar-Req-Id") == i.reqID && number(f.t, msg, "Avatar-Seq") > i.lastSeq {
				f.t.Errorf("frame %v of an utterance whose interrupt was answered with %d", msg.Headers(), i.lastSeq)
			}
		}
	}
}

func TestNoFrameOfAnInterruptedUtteranceIsStoredAfterTheReplysLast(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("stop", "slow-20", fields{"utterances": []any{f.uploaded(5 * time.Minute), f.uploaded(3 * time.Second)}})
	f.watch(f.names.FramesStream(), f.names.Frames("stop"), func(msg jetstream.Msg) bool { return number(t, msg, "Avatar-Seq") == 3 })
	got := f.control("stop", "interrupt")
	if got.Status != control.StatusInterrupted || got.LastSeq < 3 || got.ReqID == "" {
		t.Errorf("%+v", got)
	}
	done := f.completed("stop")
	f.checkInterrupted("stop", interrupted{got.ReqID, int(got.LastSeq)})
	if len(done.Utterances) != 2 || !done.Utterances[0].Interrupted || done.Utterances[0].ReqID != got.ReqID || done.Utterances[1].Interrupted || done.Utterances[1].AudioMS != 3000 {
		t.Errorf("%+v", done)
	}
	if ends := f.ends("stop"); !slices.Equal(ends, []string{"2 in 1"}) {
		t.Errorf("whole: %v", ends)
	}
	if s := f.sessions("slow-20"); len(s) != 1 || s[0].Interrupts != 1 {
		t.Errorf("%+v", s)
	}
}

func TestAnInterruptPassesOverTheRestOfALiveUtterance(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	// At the pace of speech most of it has been published and not yet sent.
	f.worker(worker{config: func(c *config.Config) { c.Audio.Pace = "realtime" }})
	f.publish("barge", "ok", live("10s"))
	for range 25 {
		f.say("barge", silence(700*time.Millisecond), going)
	}
	f.watch(f.names.FramesStream(), f.names.Frames("barge"), func(jetstream.Msg) bool { return true })
	got := f.control("barge", "interrupt")
	if got.Status != control.StatusInterrupted {
		t.Errorf("%+v", got)
	}
	f.state("barge", func(r lifecycle.Record) bool { return r.Checkpoint == 1 })
	f.say("barge", silence(3*time.Second), closing)
	done := f.completed("barge")
	if done.UtterancesTotal != 2 || !done.Utterances[0].Interrupted || done.Utterances[1].Interrupted || done.Utterances[1].AudioMS != 3000 {
		t.Errorf("%+v", done)
	}
	f.checkInterrupted("barge", interrupted{got.ReqID, int(got.LastSeq)})
	if ends := f.ends("barge"); !slices.Equal(ends, []string{"2 in 1"}) {
		t.Errorf("whole: %v", ends)
	}
}

func TestLiveOpusInARoomHasTimeToBePlayed(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("room", "ok", fields{"live": fields{"sample_rate": 24000, "format": "ogg_opus", "max_silence": "10s"}, "output": livekit("good-token")})
	f.say("room", clip.Opus, closing) // at once, as speech that was synthesised
	done := f.completed("room")
	if u := done.Utterances[0]; u.AudioMS < 3000 || done.SessionMS < u.AudioMS {
		t.Errorf("%d ms of speech, and the session was closed after %d ms", u.AudioMS, done.SessionMS)
	}
}

func TestInterruptsThatRaceWithTheEndOfAnUtteranceReportTheTruth(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	utterances := make([]any, 60)
	for i := range utterances {
		utterances[i] = f.uploaded(5 * time.Second)
	}
	f.publish("race", "slow-1", fields{"utterances": utterances})
	f.state("race", func(r lifecycle.Record) bool { return r.State == lifecycle.StateRunning })
	var interrupts []interrupted
	running := true
	for running {
		got := f.control("race", "interrupt")
		switch got.Status {
		case control.StatusInterrupted:
			interrupts = append(interrupts, interrupted{got.ReqID, int(got.LastSeq)})
		default:
			running = !f.record("race").State.Final()
		}
	}
	done := f.completed("race")
	f.checkInterrupted("race", interrupts...)
	marked := 0
	for i, u := range done.Utterances {
		if u.Interrupted {
			marked++
		} else if u.Frames != 2 {
			t.Errorf("utterance %d: %+v", i+1, u)
		}
	}
	if len(done.Utterances) != len(utterances) || len(interrupts) != marked {
		t.Errorf("%d utterances, %d marked as interrupted, %d interrupts answered", len(done.Utterances), marked, len(interrupts))
	}
	t.Logf("%d of %d utterances were interrupted", len(interrupts), len(utterances))
}

// bargeIn runs jobs whose open utterance is interrupted, each by a publisher
// that has new speech as soon as the reply is there.
func bargeIn(t *testing.T, count int) {
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) {
		c.Worker.Concurrency = count
		// A busy machine may stand still for seconds.
		c.Lease.AckWait, c.Backend.StallTimeout = time.Minute, time.Minute
	}})
	const chunk, old, fresh = 100 * time.Millisecond, 45, 7 // chunks; frames come for 2 s of speech and more
	var all sync.WaitGroup
	for i := range count {
		all.Go(func() {
			id := "barge" + strconv.Itoa(i)
			f.publish(id, "ok-"+id, live("2m"))
			var before uint64
			for range old {
				before = f.say(id, silence(chunk), going)
			}
			f.watch(f.names.FramesStream(), f.names.Frames(id), func(jetstream.Msg) bool { return true })
			got := f.control(id, "interrupt")
			for n := range fresh {
				how := going
				if n == fresh-1 {
					how = closing
				}
				f.say(id, silence(chunk), how)
			}
			if got.Status != control.StatusInterrupted {
				t.Errorf("%s: %+v", id, got)
				return
			}
			f.checkBargeIn(id, before, int64(fresh*chunk/time.Millisecond))
		})
	}
	all.Wait()
}

// checkBargeIn checks that a job spoke one utterance that was interrupted, and
// all of the speech after it.
func (f *fleet) checkBargeIn(id string, before uint64, fresh int64) {
	f.t.Helper()
	done := f.completed(id)
	if len(done.Utterances) != 2 || !done.Utterances[0].Interrupted || done.Utterances[1].Interrupted || done.Utterances[1].AudioMS != fresh {
		f.t.Errorf("%s: the old speech ends with message %d: %+v", id, before, done.Utterances)
		return
	}
	speechBytes := int64(len(silence(time.Duration(done.Utterances[0].AudioMS+fresh) * time.Millisecond)))
	if s := f.sessions("ok-" + id); len(s) != 1 || s[0].AudioBytes != speechBytes || s[0].Interrupts != 1 {
		f.t.Errorf("%s: want %d bytes of speech at the backend: %+v", id, speechBytes, s)
	}
}

func TestEveryByteOfSpeechAfterTheReplyToAnInterruptIsSpoken(t *testing.T) {
	t.Parallel()
	count, rounds := 12, 1
	if os.Getenv("AVATAR_LONG") != "" {
		count, rounds = 60, 20
	}
	for round := range rounds {
		t.Run(strconv.Itoa(round+1), func(t *testing.T) { bargeIn(t, count) })
	}
}

func TestTheReplyToAnInterruptIsGivenWhenTheLineBetweenOldAndNewIsWrittenDown(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) { c.Audio.Pace = "realtime" }})
	f.publish("line", "ok", live("20s"))
	for round := 1; round <= 3; round++ {
		var last uint64
		for range 25 { // most of it is not sent yet
			last = f.say("line", silence(700*time.Millisecond), going)
		}
		f.watch(f.names.FramesStream(), f.names.Frames("line"), func(m jetstream.Msg) bool { return number(t, m, "Avatar-Utterance") == round })
		if got := f.control("line", "interrupt"); got.Status != control.StatusInterrupted {
			t.Fatalf("%+v", got)
		}
		// A worker that dies now leaves this to the next one.
		if r := f.record("line"); r.LiveSeq != last || r.LiveBegun != 0 || r.Checkpoint != round {
			t.Errorf("after the reply the record says %d from %d, at utterance %d; the old speech ends with %d", r.LiveSeq, r.LiveBegun, r.Checkpoint, last)
		}
	}
	f.say("line", silence(time.Second), closing)
	if done := f.completed("line"); done.UtterancesTotal != 4 || done.Utterances[3].AudioMS != 1000 {
		t.Errorf("%+v", done)
	}
}

func TestAnInterruptLeavesTheUtterancesThatFollowInTheStream(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) { c.Audio.Pace = "realtime" }})
	f.publish("queue", "ok", live("20s"))
	for range 25 {
		f.say("queue", silence(700*time.Millisecond), going)
	}
	f.say("queue", nil, end)
	f.say("queue", silence(300*time.Millisecond), end)
	f.watch(f.names.FramesStream(), f.names.Frames("queue"), func(jetstream.Msg) bool { return true })
	f.control("queue", "interrupt")
	f.say("queue", silence(400*time.Millisecond), closing)
	if done := f.completed("queue"); len(done.Utterances) != 3 || done.Utterances[1].AudioMS != 300 || done.Utterances[2].AudioMS != 400 {
		t.Errorf("%+v", done)
	}
}

func TestSpeechIsSpokenAfterAnInterruptOfAnUtteranceThatSilenceHadEnded(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("pause", "slow-2500", live("1s"))
	f.say("pause", silence(5*time.Second), going) // silence ends it while its frames come
	f.watch(f.names.FramesStream(), f.names.Frames("pause"), func(jetstream.Msg) bool { return true })
	if got := f.control("pause", "interrupt"); got.Status != control.StatusInterrupted {
		t.Fatalf("%+v", got)
	}
	f.say("pause", silence(time.Second), closing)
	if done := f.completed("pause"); len(done.Utterances) != 2 || done.Utterances[1].AudioMS != 1000 {
		t.Errorf("%+v", done)
	}
}

func TestSpeechThatItsPublisherRemovedBeforeAnInterruptIsNotSpokenAfterIt(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) { c.Audio.Pace = "realtime" }})
	f.publish("purge", "ok", live("20s"))
	for range 10 {
		f.say("purge", silence(700*time.Millisecond), going)
	}
	f.watch(f.names.FramesStream(), f.names.Frames("purge"), func(jetstream.Msg) bool { return true })
	stream, err := f.js.Stream(f.ctx, f.names.AudioStream())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(f.ctx, jetstream.WithPurgeSubject(f.names.Audio("purge"))); err != nil {
		t.Fatal(err)
	}
	if got := f.control("purge", "interrupt"); got.Status != control.StatusInterrupted {
		t.Fatalf("%+v", got)
	}
	f.say("purge", silence(300*time.Millisecond), closing)
	if done := f.completed("purge"); len(done.Utterances) != 2 || done.Utterances[1].AudioMS != 300 {
		t.Errorf("%+v", done)
	}
}

func TestLiveMessagesThatLookLikeTheServersAreReadAsWhatTheyAre(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("status", "ok", live("10s"))
	f.say("status", silence(time.Second), going)
	for _, status := range []string{"404", "408", "409", "503", "100", "400"} {
		for _, text := range []string{"", "Consumer Deleted", "Idle Heartbeat", "FlowControl Request"} {
			f.must(f.js.PublishMsg(f.ctx, &nats.Msg{Subject: f.names.Audio("status"), Header: nats.Header{
				"Status": {status}, "Description": {text}, "Nats-Last-Consumer": {"99"}, "Nats-Pending-Messages": {"7"},
			}}))
		}
	}
	f.say("status", silence(time.Second), end)
	f.must(f.js.PublishMsg(f.ctx, &nats.Msg{Subject: f.names.Audio("status"), Header: nats.Header{"Status": {"404"}, "Avatar-Close": {"true"}}}))
	before := f.apiCalls()
	done := f.completed("status")
	if len(done.Utterances) != 1 || done.Utterances[0].AudioMS != 2000 {
		t.Errorf("%+v", done.Utterances)
	}
	if calls := f.apiCalls() - before; calls > 200 {
		t.Errorf("%d calls of the API", calls)
	}
}

func (f *fleet) must(_ *jetstream.PubAck, err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fleet) apiCalls() uint64 {
	f.t.Helper()
	info, err := f.js.AccountInfo(f.ctx)
	if err != nil {
		f.t.Fatal(err)
	}
	return info.API.Total
}

func TestLiveSpeechThatIsAFileIsRefusedBeforeItIsSent(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	for name, c := range map[string]struct {
		chunks [][]byte
		format string
		word   string
	}{
		"wav":   {[][]byte{clip.WAV[:6400]}, "pcm_s16le", "is a WAV file"},
		"later": {[][]byte{silence(time.Second), clip.WAV[:6400]}, "pcm_s16le", "is a WAV file"},
		"amid":  {[][]byte{silence(time.Second), append(silence(time.Second), clip.WAV[:6400]...)}, "pcm_s16le", "the header of a WAV file"},
		"cuts":  {[][]byte{silence(time.Second), append(silence(time.Second), clip.WAV[:6]...), clip.WAV[6:100]}, "pcm_s16le", "the header of a WAV file"},
		"late":  {[][]byte{silence(time.Second), []byte(`{"error":{"message":"quota exceeded"}}`)}, "pcm_s16le", "is JSON"},
		"cut":   {[][]byte{clip.WAV[:6], clip.WAV[6:100]}, "pcm_s16le", "is a WAV file"},
		"opus":  {[][]byte{clip.Opus[:2000]}, "pcm_s16le", "is an Ogg file"},
		"error": {[][]byte{[]byte(`{"error":"quota exceeded"}`)}, "pcm_s16le", "is JSON"},
		"noogg": {[][]byte{clip.WAV[:6400]}, "ogg_opus", "is a WAV file"},
		"rate":  {[][]byte{clip.Opus[:2000]}, "ogg_opus", "24000 Hz"},
	} {
		id := "file-" + name
		f.publish(id, "ok-"+id, fields{"live": fields{"sample_rate": 16000, "format": c.format, "max_silence": "10s"}})
		for _, chunk := range c.chunks {
			f.say(id, chunk, going)
		}
		f.say(id, nil, closing)
		r := f.outcome(id)
		if r.State != lifecycle.StateDeadLettered || r.LastError.Code != errors.CodeInvalidJob || !strings.Contains(r.LastError.Message, c.word) {
			t.Errorf("%s: %s: %+v", name, r.State, r.LastError)
		}
	}
}
