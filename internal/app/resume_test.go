package app_test

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"testing"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/output"
)

// five utterances of two envelopes each; the fifth envelope is the third's
// first.
func five() []any { return []any{speech(), speech(), speech(), speech(), speech()} }

const cutInTheThird = "drop-once-5"

// ends are the utterances whose last frame a listener gets, who drops lower
// sessions as the contract says, with the session that gave it.
func (f *fleet) ends(id string) []string {
	f.t.Helper()
	var out []string
	highest := 0
	for _, msg := range f.frames(id) {
		session := number(f.t, msg, "Avatar-Session")
		if session < highest {
			continue
		}
		highest = session
		if msg.Headers().Get("Avatar-End") == "true" {
			out = append(out, fmt.Sprintf("%d in %d", number(f.t, msg, "Avatar-Utterance"), session))
		}
	}
	return out
}

func TestAConversationGoesOnWhereTheConnectionWasCut(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("five", cutInTheThird, fields{"utterances": five()})
	done := f.completed("five")
	if done.Attempts != 2 || len(done.ConnectionIDs) != 2 || len(done.Utterances) != 5 {
		t.Errorf("%+v", done)
	}
	if got := f.ends("five"); !slices.Equal(got, []string{"1 in 1", "2 in 1", "3 in 2", "4 in 2", "5 in 2"}) {
		t.Errorf("delivered: %v", got)
	}
	sessions := f.sessions(cutInTheThird)
	// The cut may come before the third utterance's speech is all there.
	if len(sessions) != 2 || sessions[0].Utterances < 2 || sessions[1].Utterances != 3 {
		t.Errorf("sessions: %+v", sessions)
	}
	for _, msg := range f.frames("five") {
		if msg.Headers().Get("Avatar-Attempt") != msg.Headers().Get("Avatar-Session") {
			t.Errorf("%v", msg.Headers())
		}
	}
}

func TestARecordingHoldsEachUtteranceOnceAfterACut(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("five", cutInTheThird, fields{"utterances": five(), "output": fields{"object": fields{}}})
	done := f.completed("five")
	info, err := output.ReadRecording(bytes.NewReader(f.recording("five")))
	if err != nil || !info.Whole || len(info.Utterances) != 5 || info.Envelopes != 10 || done.Attempts != 2 {
		t.Errorf("%+v %v", info, err)
	}
	for i, u := range info.Utterances {
		if u.ReqID != done.Utterances[i].ReqID || u.KeyFrames != 83 {
			t.Errorf("utterance %d: %+v, want %+v", i+1, u, done.Utterances[i])
		}
	}
	if got := f.objects(); !slices.Equal(got, []string{"five"}) {
		t.Errorf("objects: %v", got)
	}
	if n := f.inRecordings(); n != 6 { // a chunk for each utterance, and the object's entry
		t.Errorf("%d messages in the bucket", n)
	}
}

func TestRestartSpeaksEverythingAgain(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("again", cutInTheThird, fields{"utterances": five(), "on_redelivery": "restart"})
	if done := f.completed("again"); done.Attempts != 2 {
		t.Errorf("%+v", done)
	}
	want := []string{"1 in 1", "2 in 1", "1 in 2", "2 in 2", "3 in 2", "4 in 2", "5 in 2"}
	if got := f.ends("again"); !slices.Equal(got, want) {
		t.Errorf("delivered: %v", got)
	}
	f.publish("film", cutInTheThird+"-b", fields{"utterances": five(), "on_redelivery": "restart", "output": fields{"object": fields{}}})
	f.completed("film")
	info, err := output.ReadRecording(bytes.NewReader(f.recording("film")))
	if err != nil || len(info.Utterances) != 5 || !info.Whole {
		t.Errorf("%+v %v", info, err)
	}
}

func TestGiveUpSpeaksNothingTwice(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	body := f.publish("once", cutInTheThird, fields{"utterances": five(), "on_redelivery": "give_up"})
	r := f.outcome("once")
	if r.State != lifecycle.StateDeadLettered || r.Reason != lifecycle.ReasonPermanent || r.Checkpoint != 2 || r.LastError.Code != errors.CodeConnectionClosed {
		t.Errorf("%s (%s) at %d: %+v", r.State, r.Reason, r.Checkpoint, r.LastError)
	}
	if letters := f.deadLetters("once"); len(letters) != 1 || !bytes.Equal(letters[0].Data(), body) {
		t.Errorf("%d dead letters", len(letters))
	}
	if n := len(f.sessions(cutInTheThird)); n != 1 {
		t.Errorf("%d sessions", n)
	}
}

func TestASessionThatEndsForItsDurationGoesOnAsLongAsItGetsFurther(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("long", "limit-2", fields{"utterances": five(), "max_attempts": 2})
	done := f.completed("long")
	if done.Attempts < 3 || len(done.Utterances) != 5 {
		t.Errorf("%+v", done)
	}
	if got := f.ends("long"); len(got) != 5 {
		t.Errorf("delivered: %v", got)
	}
}

// orphan makes a job of two utterances that a lost worker was
// running in its session number last, and of which done were delivered.
func (f *fleet) orphan(id string, last, done int) {
	f.t.Helper()
	job := fields{"id": id, "avatar_id": "ok-" + id, "utterances": []any{speech(), speech()}}
	f.orphanOf(id, job, func(r *lifecycle.Record) { r.Session, r.Checkpoint, r.UtterancesDone = last, done, done })
}

// frame stores one as a session left it.
func (f *fleet) frame(id string, session, utterance int, end bool) {
	f.t.Helper()
	h := nats.Header{
		"Avatar-Run": {"1"}, "Avatar-Session": {strconv.Itoa(session)}, "Avatar-Utterance": {strconv.Itoa(utterance)},
		"Avatar-Req-Id": {"req"},
	}
	if end {
		h["Avatar-End"] = []string{"true"}
	}
	f.publishRaw(&nats.Msg{Subject: f.names.Frames(id), Header: h, Data: []byte("frame")})
}

func TestAnUtteranceWhoseLastFrameIsStoredIsNotRepeatedAfterACrash(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{}).stop() // makes streams and buckets
	var checks []func()
	for _, c := range []struct {
		id     string
		last   int // session of the record
		done   int // its checkpoint
		frames [][3]int
		spoken int // by the session that takes over
	}{
		{"finished", 1, 0, [][3]int{{1, 1, 0}, {1, 1, 1}}, 1},
		{"unfinished", 1, 0, [][3]int{{1, 1, 0}}, 2},
		{"empty-between", 3, 0, [][3]int{{1, 1, 0}, {1, 1, 1}}, 1},
		{"superseded", 2, 0, [][3]int{{2, 1, 0}, {1, 1, 1}}, 2}, // no listener took the last one
		{"none", 1, 0, nil, 2},
		{"last", 1, 1, [][3]int{{1, 1, 1}, {1, 2, 1}}, 0},
	} {
		f.orphan(c.id, c.last, c.done)
		for _, fr := range c.frames {
			f.frame(c.id, fr[0], fr[1], fr[2] == 1)
		}
		checks = append(checks, func() {
			sessions := f.sessions("ok-" + c.id)
			spoken := 0
			for _, s := range sessions {
				spoken += s.Utterances
			}
			if len(sessions) != min(c.spoken, 1) || spoken != c.spoken {
				t.Errorf("%s: spoken after the crash: %+v, want %d utterances", c.id, sessions, c.spoken)
			}
		})
	}
	f.worker(worker{})
	for _, id := range []string{"finished", "unfinished", "empty-between", "superseded", "none", "last"} {
		if done := f.completed(id); done.UtterancesTotal != 2 {
			t.Errorf("%s: %+v", id, done)
		}
	}
	for _, check := range checks {
		check()
	}
}
