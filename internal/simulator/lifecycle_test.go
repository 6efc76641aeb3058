package simulator_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/coder/websocket"
	"google.golang.org/protobuf/encoding/protowire"

	"avatarworker/internal/session/avatarpb"
	"avatarworker/internal/simulator"
)

func get(t *testing.T, url string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	a, err := do(t, req)
	if err != nil || a.status != http.StatusOK {
		t.Fatalf("GET %s: %+v %v", url, a, err)
	}
	return a
}

func TestStopClosesSessionsAndStartGoesOnAtTheSameAddress(t *testing.T) {
	s := start(t, simulator.Options{})
	url, tok := s.URL(), token(t, s)
	c := open(t, s, "hang")
	stopped := make(chan struct{})
	go func() { defer close(stopped); s.Stop() }()
	if _, _, err := c.tryReceive(); websocket.CloseStatus(err) != websocket.StatusGoingAway {
		t.Errorf("the session ended with %v", err)
	}
	<-stopped
	s.Stop() // a second time: nothing
	if s.OpenSessions() != 0 || s.SessionLog()[0].CloseCode != 1001 || s.SessionLog()[0].ClosedBy != "server" {
		t.Errorf("the session log says %+v", s.SessionLog())
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s.URL() != url {
		t.Errorf("now at %s, before at %s", s.URL(), url)
	}
	if _, a, err := dialAs(t, s, "ok", app, tok); err != nil {
		t.Errorf("with the old token: %+v %v", a, err)
	}
	if err := s.Start(t.Context()); err == nil {
		t.Error("started twice")
	}
}

func TestStopDoesNotWaitForAClientThatDoesNotAnswer(t *testing.T) {
	s := start(t, simulator.Options{})
	c := open(t, s, "ok")
	c.say(reqID, pcm(16000, 600000), true) // the answer is not read
	s.Stop()
}

func TestMaxSessionsRefusesOneTooManyForEachApp(t *testing.T) {
	s := start(t, simulator.Options{MaxSessions: 2})
	first := open(t, s, "ok")
	open(t, s, "ok")
	_, a, err := dial(t, s, "ok")
	if err == nil || a.status != 402 || a.body != `{"message":"session denied: concurrency"}`+"\n" {
		t.Fatalf("the third: %+v %v", a, err)
	}
	if _, a, err := dialAs(t, s, "ok", "app-2", token(t, s)); err != nil {
		t.Errorf("another app: %+v %v", a, err)
	}
	first.close()
	settled(t, s, 2)
	open(t, s, "ok")
	if s.PeakSessions(app) != 2 || s.PeakSessions("") != 3 || s.PeakSessions("none") != 0 {
		t.Errorf("peaks %d and %d", s.PeakSessions(app), s.PeakSessions(""))
	}
}

func TestTheSessionLogDropsTheOldestClosedSessionsBeyondItsLimit(t *testing.T) {
	s := start(t, simulator.Options{SessionLogLimit: 10})
	live := open(t, s, "ok-live")
	for i := range 150 {
		c := open(t, s, fmt.Sprintf("ok-%d", i))
		c.close()
		if i%50 == 49 {
			settled(t, s, 1)
		}
	}
	log, totals := s.SessionLog(), s.Totals()
	if len(log) > 10+2+64+1 || len(log)+totals.Dropped != 151 || totals.Sessions != 151 {
		t.Errorf("%d in the session log, totals %+v", len(log), totals)
	}
	if log[0].AvatarID != "ok-live" || log[len(log)-1].AvatarID != "ok-149" {
		t.Errorf("the session log begins with %s and ends with %s", log[0].AvatarID, log[len(log)-1].AvatarID)
	}
	live.close()
	closed(t, s)
	s.ResetSessionLog()
	if len(s.SessionLog()) != 0 || s.Totals().Sessions != 0 {
		t.Errorf("after the reset %+v", s.Totals())
	}
}

func TestManySessionsAtOnceGetEachTheirOwnAnswer(t *testing.T) {
	s := start(t, simulator.Options{Speed: 100})
	var wg sync.WaitGroup
	for i := range 200 {
		c := open(t, s, "ok")
		id := fmt.Sprintf("req-%d", i)
		wg.Go(func() {
			defer c.conn.CloseNow()
			c.say(id, pcm(16000, 8000), true)
			if got := sizes(c.answerTo(id)); len(got) != 3 {
				t.Errorf("%s: %v", id, got)
			}
		})
	}
	wg.Wait()
	for _, rec := range closed(t, s) {
		if rec.Frames != 3 || rec.Ends != 1 {
			t.Errorf("the session log says %+v", rec)
		}
	}
}

// exchange is a recorded exchange of n envelopes.
func exchange(n int) *simulator.Exchange {
	x := &simulator.Exchange{
		SampleRate: 16000, ConnectionID: "20250101000000_recordedconn", ReqID: "20250101000000_recordedreq1",
	}
	for i := range n {
		anim := protowire.AppendString(protowire.AppendTag(nil, 1, 2), x.ConnectionID)
		anim = protowire.AppendString(protowire.AppendTag(anim, 2, 2), x.ReqID)
		if i == n-1 {
			anim = protowire.AppendVarint(protowire.AppendTag(anim, 3, 0), 1)
		}
		data := protowire.AppendString(protowire.AppendTag(nil, 1, 2), fmt.Sprint("key frame ", i))
		anim = protowire.AppendBytes(protowire.AppendTag(anim, 4, 2), data)
		env := protowire.AppendVarint(protowire.AppendTag(nil, 1, 0), 5)
		x.Envelopes = append(x.Envelopes, protowire.AppendBytes(protowire.AppendTag(env, 6, 2), anim))
	}
	return x
}

func TestReplayAnswersEachUtteranceByteForByte(t *testing.T) {
	x := exchange(3)
	s := start(t, simulator.Options{Replay: x})
	replays(t, s, x)
}

// The worker gets the recorded req_id, and says every utterance under it.
func TestReplayAnswersEachUtteranceThatIsSaidUnderTheRecordedReqID(t *testing.T) {
	x := exchange(3)
	s := start(t, simulator.Options{Replay: x})
	c := replayed(t, s, x)
	for i := range 3 {
		c.say(x.ReqID, pcm(16000, 100), false)
		c.say(x.ReqID, pcm(16000, 100), true)
		if got := c.answerTo(x.ReqID); !sameBytes(got, x.Envelopes) {
			t.Errorf("utterance %d: the envelopes differ", i+1)
		}
	}
	c.close()
	if rec := closed(t, s)[0]; rec.Utterances != 3 || rec.Ends != 3 {
		t.Errorf("the session log says %+v", rec)
	}
}

func TestReplayAnswersWhatFollowsAnInterruptedUtterance(t *testing.T) {
	x := exchange(3)
	s := start(t, simulator.Options{Replay: x})
	c := replayed(t, s, x)
	c.say(x.ReqID, pcm(16000, 100), false)
	c.interrupt(x.ReqID)
	c.say(x.ReqID, pcm(16000, 100), true)
	if got := c.answerTo(x.ReqID); len(got) < 3 || !sameBytes(got[len(got)-3:], x.Envelopes) {
		t.Errorf("%d envelopes, which don't end with the recorded ones", len(got))
	}
	c.close()
}

func TestReplayOfTheRealCaptureIsByteForByte(t *testing.T) {
	path := os.Getenv("AVATAR_CAPTURE")
	if path == "" {
		t.Skip("AVATAR_CAPTURE is not set: give the path of a recorded exchange")
	}
	x, err := simulator.LoadExchange(path)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, simulator.Options{Replay: x})
	replays(t, s, x)
}

// replays speaks twice and compares what comes back with the recording.
func replays(t *testing.T, s *simulator.Server, x *simulator.Exchange) {
	t.Helper()
	c := replayed(t, s, x)
	for i := range 2 {
		c.say(fmt.Sprintf("own-id-%d", i), append(x.Audio, 0, 0), true)
		if got := c.answerTo(x.ReqID); !sameBytes(got, x.Envelopes) {
			t.Errorf("utterance %d: the envelopes differ", i+1)
		}
	}
	c.close()
}

// replayed opens a session that is confirmed as the recorded one was.
func replayed(t *testing.T, s *simulator.Server, x *simulator.Exchange) *client {
	t.Helper()
	c, _, err := dial(t, s, "ok")
	if err != nil {
		t.Fatal(err)
	}
	c.configure(&avatarpb.ClientConfigureSession{SampleRate: int32(x.SampleRate)})
	if m, _ := c.receive(); m.GetServerConfirmSession().GetConnectionId() != x.ConnectionID {
		t.Fatalf("confirmed as %v", m)
	}
	return c
}

func TestReplayWithPatchedIDsDiffersInNothingElse(t *testing.T) {
	x := exchange(3)
	s := start(t, simulator.Options{Replay: x, ReplayPatch: true})
	c := open(t, s, "ok")
	connection := s.SessionLog()[0].ConnectionID
	c.say(reqID, pcm(16000, 100), true)
	got := c.answerTo(reqID)
	for i := range got {
		back := bytes.ReplaceAll(got[i], []byte(reqID), []byte(x.ReqID))
		back = bytes.ReplaceAll(back, []byte(connection), []byte(x.ConnectionID))
		if !bytes.Equal(back, x.Envelopes[i]) {
			t.Errorf("envelope %d: %q", i, got[i])
		}
	}
	if len(got) != 3 {
		t.Errorf("%d envelopes", len(got))
	}
}

func TestARecordingThatCannotBeReplayedIsRefusedByName(t *testing.T) {
	noEnd, early := exchange(2), exchange(2)
	noEnd.Envelopes = noEnd.Envelopes[:1]
	slices.Reverse(early.Envelopes)
	noID := exchange(1)
	noID.ConnectionID = ""
	garbage := exchange(1)
	garbage.Envelopes[0] = []byte{0xff}
	tests := map[string]struct {
		x    *simulator.Exchange
		says string
	}{
		"without an end":        {noEnd, "animation_messages_base64[0]"},
		"with an early end":     {early, "animation_messages_base64[0]"},
		"without envelopes":     {&simulator.Exchange{ConnectionID: "c"}, "no envelopes"},
		"without connection id": {noID, "connection_id"},
		"with garbage":          {garbage, "animation_messages_base64[0]"},
	}
	for name, tc := range tests {
		data, err := json.Marshal(tc.x)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "x.json")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := simulator.LoadExchange(path); err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := simulator.LoadExchange(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a missing file was loaded")
	}
}
