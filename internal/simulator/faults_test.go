package simulator_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/session/avatarpb"
	"avatarworker/internal/simulator"
)

func contextWithin(t *testing.T, d time.Duration) (context.Context, context.CancelFunc) {
	t.Helper()
	return context.WithTimeout(t.Context(), d)
}

// failure is what a bare client saw of a session that failed.
type failure struct {
	phase   string
	http    *answer
	err     *avatarpb.ServerError
	garbage bool
	close   int // -1: the connection ended without a close frame
	frames  int
	text    string
}

// fail runs a session as far as it goes.
func fail(t *testing.T, s *simulator.Server, avatar string) (f failure) {
	t.Helper()
	return failWith(t, s, avatar, token(t, s))
}

func failWith(t *testing.T, s *simulator.Server, avatar, tok string) (f failure) {
	t.Helper()
	c, a, err := dialAs(t, s, avatar, app, tok)
	if err != nil {
		return failure{phase: "websocket_connect", http: a, close: -1}
	}
	f.phase = "websocket_handshake"
	c.configure(&avatarpb.ClientConfigureSession{SampleRate: 16000})
	for {
		m, b, err := c.tryReceive()
		switch {
		case err != nil:
			f.close = int(websocket.CloseStatus(err))
			return f
		case m == nil:
			f.garbage, f.text = true, string(b)
			c.close()
			return f
		case m.GetServerConfirmSession() != nil:
			f.phase = "websocket_runtime"
			c.say(reqID, pcm(16000, 9000), true)
		case m.GetServerError() != nil:
			f.err = m.GetServerError()
		case m.GetServerResponseAnimation() != nil:
			f.frames++
			if m.GetServerResponseAnimation().GetEnd() {
				c.close()
				f.phase = "completed"
				return f
			}
		}
	}
}

func TestEachCodeFailsInItsPhase(t *testing.T) {
	phases := map[string]string{
		"connectionFailed": "websocket_connect", "unknown": "websocket_connect",
		"sessionTokenExpired": "websocket_connect", "sessionTokenInvalid": "websocket_connect",
		"appIDMismatch": "websocket_connect", "appIDUnrecognized": "websocket_connect",
		"avatarNotFound": "websocket_connect", "billingRequired": "websocket_connect",
		"creditsExhausted": "websocket_connect", "egressUnavailable": "websocket_handshake",
		"unsupportedSampleRate": "websocket_handshake", "invalidEgressConfig": "websocket_handshake",
		"invalidRequest": "websocket_handshake", "connectionClosed": "websocket_runtime",
		"idleTimeout": "websocket_runtime", "upstreamError": "websocket_runtime",
		"serverError": "websocket_runtime", "protocolError": "websocket_runtime",
		"sessionDurationExceeded": "websocket_runtime",
	}
	if len(simulator.Codes()) != 19 || len(phases) != 19 {
		t.Fatalf("%d codes in the simulator, %d here", len(simulator.Codes()), len(phases))
	}
	s := start(t, simulator.Options{})
	for _, code := range simulator.Codes() {
		for i := range 2 { // each session, not just the first
			if f := fail(t, s, fmt.Sprintf("fail-%s-%d", code, i)); f.phase != phases[code] {
				t.Errorf("fail-%s: failed in %q, not %q: %+v", code, f.phase, phases[code], f)
			}
		}
	}
	closed(t, s)
}

func TestRejectionsThatWereObservedAreGivenToTheLetter(t *testing.T) {
	s := start(t, simulator.Options{})
	tests := map[string]struct {
		status int
		body   string
	}{
		"fail-sessionTokenInvalid": {400, `{"message":"Invalid session token"}` + "\n"},
		"fail-creditsExhausted":    {402, `{"message":"session denied: credits exhausted"}` + "\n"},
		"no-such-avatar":           {404, `{"message":"Avatar not found: no-such-avatar"}` + "\n"},
		"fail-noSuchCode":          {404, `{"message":"Avatar not found: fail-noSuchCode"}` + "\n"},
		"flaky-serverError":        {404, `{"message":"Avatar not found: flaky-serverError"}` + "\n"},
	}
	for avatar, want := range tests {
		f := fail(t, s, avatar)
		if f.http == nil || f.http.status != want.status || f.http.body != want.body {
			t.Errorf("%s: %+v", avatar, f.http)
		}
	}
	if s.Refused() != len(tests) || len(s.SessionLog()) != 0 {
		t.Errorf("refused %d of %d, %d in the session log", s.Refused(), len(tests), len(s.SessionLog()))
	}
}

func TestFlakyFailsItsSessionsThenRuns(t *testing.T) {
	s := start(t, simulator.Options{})
	for _, avatar := range []string{"flaky-connectionClosed-2", "flaky-connectionClosed-2-b", "flaky-billingRequired-2"} {
		for i := range 4 {
			if f := fail(t, s, avatar); (f.phase == "completed") != (i >= 2) {
				t.Errorf("%s, session %d: %+v", avatar, i+1, f)
			}
		}
	}
	s.ResetSessionLog()
	if f := fail(t, s, "flaky-billingRequired-2"); f.phase == "completed" {
		t.Error("a reset did not restart the count")
	}
}

func TestDropCutsTheConnectionAfterSoManyFrames(t *testing.T) {
	s := start(t, simulator.Options{})
	for avatar, want := range map[string]int{"drop-0": 0, "drop-1-x": 1, "drop-2": 2, "drop-once-1": 1} {
		f := fail(t, s, avatar)
		if f.phase != "websocket_runtime" || f.close != -1 || f.frames != want {
			t.Errorf("%s: %+v", avatar, f)
		}
	}
	if f := fail(t, s, "drop-2"); f.phase == "completed" {
		t.Error("drop-2 let the second session through")
	}
	if f := fail(t, s, "drop-once-1"); f.phase != "completed" {
		t.Errorf("drop-once-1 cut the second session: %+v", f)
	}
	for _, rec := range closed(t, s) {
		if rec.Fault == "drop" && (rec.CloseCode != 1006 || rec.ClosedBy != "server") {
			t.Errorf("the session log says %+v", rec)
		}
	}
}

func TestLimitEndsTheSessionWithItsTimeUp(t *testing.T) {
	s := start(t, simulator.Options{})
	f := fail(t, s, "limit-2")
	if f.err.GetCode() != 4002 || f.close != 4002 || f.frames != 2 || f.err.GetReqId() != reqID {
		t.Errorf("limit-2: %+v", f)
	}
}

func TestSlowDelaysEachFrame(t *testing.T) {
	s := start(t, simulator.Options{})
	began := time.Now()
	if f := fail(t, s, "slow-50"); f.frames != 3 || time.Since(began) < 150*time.Millisecond {
		t.Errorf("%d frames in %s", f.frames, time.Since(began))
	}
}

func TestMuteNeverConfirmsAndHangSaysNothingAfterIt(t *testing.T) {
	s := start(t, simulator.Options{})
	hang := open(t, s, "hang-1")
	hang.say(reqID, pcm(16000, 5000), true)
	mute, _, err := dial(t, s, "mute-1")
	if err != nil {
		t.Fatal(err)
	}
	mute.configure(&avatarpb.ClientConfigureSession{SampleRate: 16000})
	for _, c := range []*client{hang, mute} {
		ctx, cancel := contextWithin(t, 100*time.Millisecond)
		if _, b, err := c.conn.Read(ctx); err == nil {
			t.Errorf("received %d bytes", len(b))
		}
		cancel()
	}
	closed(t, s)
}

func TestTokenCallsAreChecked(t *testing.T) {
	s := start(t, simulator.Options{})
	now := time.Now()
	tests := map[string]struct {
		key, body, header string
		status            int
	}{
		"good":             {"k", tokenBody(time.Hour), "", 200},
		"23 h 59 min":      {"k", tokenBody(24*time.Hour - time.Minute), "", 200},
		"no key":           {"", tokenBody(time.Hour), "", 401},
		"no JSON":          {"k", "expireAt=1", "", 400},
		"no expiry":        {"k", "{}", "", 400},
		"past":             {"k", fmt.Sprintf(`{"expireAt":%d}`, now.Unix()-1), "", 400},
		"a day":            {"k", tokenBody(24*time.Hour + time.Minute), "", 400},
		"expiry as text":   {"k", `{"expireAt":"soon"}`, "", 400},
		"status key":       {"status-503", tokenBody(time.Hour), "", 503},
		"status and wait":  {"status-429-7", tokenBody(time.Hour), "7", 429},
		"revoked":          {"fail-sessionTokenExpired", tokenBody(time.Hour), "", 401},
		"unpaid":           {"fail-billingRequired", tokenBody(time.Hour), "", 402},
		"no usable token":  {"fail-protocolError", tokenBody(time.Hour), "", 200},
		"no such failure":  {"fail-noSuchCode", tokenBody(time.Hour), "", 401},
		"no such status":   {"status-99", tokenBody(time.Hour), "", 401},
		"a word like fail": {"failure", tokenBody(time.Hour), "", 200},
	}
	for name, tc := range tests {
		a, err := post(t, s.ConsoleURL()+"/session-tokens", tc.key, tc.body)
		if err != nil || a.status != tc.status || a.header.Get("Retry-After") != tc.header {
			t.Errorf("%s: %+v %v", name, a, err)
		}
		if a.status >= 300 && !strings.Contains(a.body, `"errors":[{`) {
			t.Errorf("%s: body %s", name, a.body)
		}
	}
	for _, key := range []string{"fail-connectionFailed", "fail-connectionClosed"} {
		if a, err := post(t, s.ConsoleURL()+"/session-tokens", key, tokenBody(time.Hour)); err == nil {
			t.Errorf("%s answered %+v", key, a)
		}
	}
	if got := s.Totals(); got.TokenCalls != len(tests)+2 || got.TokenRefused != len(tests)+2-3 {
		t.Errorf("counted %d token calls, %d refused", got.TokenCalls, got.TokenRefused)
	}
}

func TestTokensAreCheckedAtTheUpgrade(t *testing.T) {
	now := time.Now()
	s := start(t, simulator.Options{SingleUseTokens: true, Now: func() time.Time { return now }})
	once, late := token(t, s), token(t, s)
	if _, a, err := dialAs(t, s, "ok", app, once); err != nil {
		t.Fatalf("%v %+v", err, a)
	}
	refused := func(what, tok string, status int) {
		t.Helper()
		if _, a, err := dialAs(t, s, "ok", app, tok); err == nil || a == nil || a.status != status {
			t.Errorf("%s: %+v %v", what, a, err)
		}
	}
	refused("a token used twice", once, http.StatusBadRequest)
	refused("no token", "", http.StatusBadRequest)
	refused("another backend's token", "1893456000.abc.def", http.StatusBadRequest)
	now = now.Add(2 * time.Hour)
	refused("an old token", late, http.StatusUnauthorized)
}
