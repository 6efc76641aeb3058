package simulator_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/simulator"
)

// classified is what the worker makes of a failure.
func (f failure) classified() errors.Code {
	phase := errors.Phase(f.phase)
	switch {
	case f.http != nil:
		return errors.FromHTTP(phase, f.http.status, f.http.header, []byte(f.http.body)).Code
	case f.garbage:
		return errors.FromFrame(phase, errors.New("no envelope")).Code
	case f.err != nil:
		return errors.FromServerError(phase, f.err.GetCode(), f.err.GetMessage()).Code
	case f.phase == "websocket_connect":
		return errors.FromTransport(phase, errors.New("cut")).Code
	case f.close > 0:
		return errors.FromClose(phase, f.close, "").Code
	}
	return ""
}

func TestEachFailingAvatarIsClassifiedAsItsCode(t *testing.T) {
	s := start(t, simulator.Options{})
	for _, code := range simulator.Codes() {
		if f := fail(t, s, "fail-"+code); f.classified() != errors.Code(code) {
			t.Errorf("fail-%s is read as %q: %+v", code, f.classified(), f)
		}
	}
}

func TestEachFailingAPIKeyIsClassifiedAsItsCode(t *testing.T) {
	s := start(t, simulator.Options{})
	for _, code := range simulator.Codes() {
		want := errors.Code(code)
		if code == "connectionClosed" {
			want = errors.CodeConnectionFailed // a call has nothing to close
		}
		a, err := post(t, s.ConsoleURL()+"/session-tokens", "fail-"+code, tokenBody(time.Hour))
		if got := classifiedToken(a, err); got != want {
			t.Errorf("key fail-%s is read as %q: %+v %v", code, got, a, err)
		}
	}
	for key, want := range map[string]errors.Code{
		"status-401": errors.CodeSessionTokenExpired, "status-402": errors.CodeBillingRequired,
		"status-404": errors.CodeAppIDUnrecognized, "status-429-3": errors.CodeInvalidRequest,
		"status-503": errors.CodeServerError,
	} {
		a, err := post(t, s.ConsoleURL()+"/session-tokens", key, tokenBody(time.Hour))
		if got := classifiedToken(a, err); got != want {
			t.Errorf("key %s is read as %q: %+v %v", key, got, a, err)
		}
	}
}

func classifiedToken(a answer, err error) errors.Code {
	if err != nil {
		return errors.FromTransport(errors.PhaseToken, err).Code
	}
	if _, failure := errors.ParseTokenAnswer(a.status, a.header, []byte(a.body)); failure != nil {
		return failure.Code
	}
	return ""
}

// The test gives each fault in all phases in which it can occur.
func TestEachFaultOfTheAccountIsClassifiedAsItsCodeInEveryPhase(t *testing.T) {
	s := start(t, simulator.Options{})
	tok := token(t, s)
	given := 0
	for _, code := range simulator.Codes() {
		for _, phase := range []string{"", "session_token", "websocket_connect", "websocket_handshake", "websocket_runtime"} {
			if err := s.SetFault(simulator.Control{Fault: code, Phase: phase}); err != nil {
				continue // it has no form in that phase
			}
			given++
			a, err := post(t, s.ConsoleURL()+"/session-tokens", "k", tokenBody(time.Hour))
			got := classifiedToken(a, err)
			atToken := phase == "session_token" || (phase == "" && (code == "sessionTokenExpired" || code == "connectionFailed"))
			if !atToken {
				if got != "" {
					t.Errorf("%s in %q: the token call failed with %q", code, phase, got)
				}
				f := failWith(t, s, "ok", tok)
				got = f.classified()
				if phase != "" && f.phase != phase {
					t.Errorf("%s in %q came in %q", code, phase, f.phase)
				}
			}
			if got != errors.Code(code) {
				t.Errorf("%s in %q is read as %q", code, phase, got)
			}
		}
	}
	if given < 80 {
		t.Errorf("only %d pairs of code and phase were given", given)
	}
	if err := s.SetFault(simulator.Control{}); err != nil {
		t.Fatal(err)
	}
	if f := fail(t, s, "ok"); f.phase != "completed" {
		t.Errorf("after the fault was cleared: %+v", f)
	}
}

func TestControlSwitchesTheAccountsFault(t *testing.T) {
	s := start(t, simulator.Options{})
	control := func(body string, status int) {
		t.Helper()
		a, err := post(t, s.URL()+"/control", "", body)
		if err != nil || a.status != status {
			t.Errorf("%s: %+v %v", body, a, err)
		}
	}
	control(`{"fault":"creditsExhausted"}`, 200)
	if a := get(t, s.URL()+"/control"); a.body != `{"fault":"creditsExhausted"}`+"\n" {
		t.Errorf("GET /control: %s", a.body)
	}
	if f := fail(t, s, "ok"); f.classified() != errors.CodeCreditsExhausted {
		t.Errorf("%+v", f)
	}
	control(`{"fault":"billingRequired","app_id":"another"}`, 200)
	if f := fail(t, s, "ok"); f.phase != "completed" {
		t.Errorf("another app's fault hit this one: %+v", f)
	}
	control(`{"fault":"status-503-9"}`, 200)
	if a, err := post(t, s.ConsoleURL()+"/session-tokens", "k", tokenBody(time.Hour)); err != nil ||
		a.status != 503 || a.header.Get("Retry-After") != "9" {
		t.Errorf("%+v %v", a, err)
	}
	for _, bad := range []string{`{"fault":"noSuchCode"}`, `{"fault":"serverError","phase":"x"}`, `{"flaut":""}`,
		`{"fault":"serverError-1"}`, `{"fault":"unknown","phase":"websocket_runtime"}`, `{`} {
		control(bad, 400)
	}
	control(`{"fault":""}`, 200)
	if f := fail(t, s, "ok"); f.phase != "completed" {
		t.Errorf("%+v", f)
	}
}

func TestAFaultOfOneAppsKeyShowsWhereTheAppDoes(t *testing.T) {
	s := start(t, simulator.Options{})
	if err := s.SetFault(simulator.Control{Fault: "sessionTokenExpired", AppID: app}); err != nil {
		t.Fatal(err)
	}
	body := strings.Replace(tokenBody(time.Hour), "{", `{"appId":"`+app+`",`, 1)
	if a, err := post(t, s.ConsoleURL()+"/session-tokens", "k", body); err != nil || a.status != 401 {
		t.Errorf("token call that names the app: %+v %v", a, err)
	}
	if f := fail(t, s, "ok"); f.http == nil || f.http.status != 401 {
		t.Errorf("token call that does not: %+v", f)
	}
}

func TestTheSessionLogCanBeReadFromAnotherProcess(t *testing.T) {
	s := start(t, simulator.Options{})
	fail(t, s, "ok")
	fail(t, s, "fail-billingRequired")
	closed(t, s)
	var page simulator.SessionLogPage
	if err := json.Unmarshal([]byte(get(t, s.URL()+"/book").body), &page); err != nil {
		t.Fatal(err)
	}
	if len(page.List) != 1 || page.List[0].AvatarID != "ok" || page.Sessions != 1 || page.Confirmed != 1 ||
		page.Refused != 1 || page.TokenCalls != 2 || page.Faults["billingRequired"] != 1 || page.PeakByApp[app] != 1 {
		t.Errorf("%+v", page)
	}
	if a := get(t, s.URL()+"/"); !strings.Contains(a.body, "flaky-<code>-<n>") {
		t.Errorf("GET / says %s", a.body)
	}
}
