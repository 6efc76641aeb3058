package errors

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func table(t testing.TB, policy Policy) *Table {
	t.Helper()
	out, err := NewTable(policy)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// The whole table of the codes, as users know it.
func TestEveryCodeHasItsAction(t *testing.T) {
	want := []struct {
		code     Code
		class    Class
		action   Action
		attempts int
		alert    bool
	}{
		{CodeConnectionFailed, ClassTransient, ActionRetry, 0, false},
		{CodeConnectionClosed, ClassTransient, ActionRetry, 0, false},
		{CodeIdleTimeout, ClassTransient, ActionRetry, 0, false},
		{CodeEgressUnavailable, ClassTransient, ActionRetry, 0, false},
		{CodeUpstreamError, ClassServer, ActionRetry, 0, true},
		{CodeServerError, ClassServer, ActionRetry, 0, true},
		{CodeProtocolError, ClassProtocol, ActionRetry, 2, true},
		{CodeUnknown, ClassUnknown, ActionRetry, 2, true},
		{CodeSessionTokenExpired, ClassAuth, ActionDeadLetter, 0, false},
		{CodeSessionTokenInvalid, ClassAuth, ActionDeadLetter, 0, false},
		{CodeAppIDMismatch, ClassAuth, ActionDeadLetter, 0, false},
		{CodeAppIDUnrecognized, ClassConfig, ActionDeadLetter, 0, false},
		{CodeAvatarNotFound, ClassConfig, ActionDeadLetter, 0, false},
		{CodeUnsupportedSampleRate, ClassConfig, ActionDeadLetter, 0, false},
		{CodeInvalidEgressConfig, ClassConfig, ActionDeadLetter, 0, false},
		{CodeInvalidRequest, ClassConfig, ActionDeadLetter, 0, false},
		{CodeBillingRequired, ClassBilling, ActionHold, 0, false},
		{CodeCreditsExhausted, ClassBilling, ActionHold, 0, false},
		{CodeSessionDurationExceeded, ClassBilling, ActionDeadLetter, 0, false},
		{CodeInvalidJob, ClassJob, ActionDeadLetter, 0, false},
		{CodeAudioUnavailable, ClassJob, ActionDeadLetter, 0, false},
		{CodeDeadlineExceeded, ClassJob, ActionExpire, 0, false},
		{CodeWorkerLost, ClassJob, ActionDeadLetter, 0, false},
		{CodeInternal, ClassInternal, ActionRetry, 2, true},
	}
	rows := table(t, nil).Rows()
	if len(rows) != len(want) || len(rows) != len(Codes()) {
		t.Fatalf("%d rows, %d codes, want %d", len(rows), len(Codes()), len(want))
	}
	for i, w := range want {
		d := table(t, nil).Decide(&Error{Code: w.code}, false)
		if d.Code != w.code || d.Class != w.class || d.Action != w.action || d.Attempts != w.attempts || d.Alert != w.alert {
			t.Errorf("%s: decided %+v", w.code, d)
		}
		r := rows[i]
		if r.Code != w.code || r.Class != w.class || r.Action != w.action || r.Attempts != w.attempts || r.Alert != w.alert || r.Overridden {
			t.Errorf("%s: row %+v", w.code, r)
		}
		if r.Meaning == "" || r.Owner == "" || r.Remedy == "" {
			t.Errorf("%s: not explained", w.code)
		}
		if w.code.Class() != w.class {
			t.Errorf("%s: class %s, want %s", w.code, w.code.Class(), w.class)
		}
	}
	if Code("x").Known() || Explain("x") != (Explanation{}) || Code("x").Class() != ClassInternal {
		t.Error("an unknown code is known")
	}
}

// Policy, then billing codes, then HTTP status, then text, then code.
func TestPrecedence(t *testing.T) {
	const notConfigured = "Egress client is NOT CONFIGURED on server"
	yes, no := true, false
	type want struct {
		class    Class
		action   Action
		attempts int
		alert    bool
	}
	for _, c := range []struct {
		name       string
		policy     Policy
		e          Error
		progressed bool
		want       want
	}{
		{"policy beats a billing code", Policy{CodeBillingRequired: {Action: ActionDeadLetter}},
			Error{Code: CodeBillingRequired}, false, want{ClassBilling, ActionDeadLetter, 0, false}},
		{"policy beats the HTTP status", Policy{CodeInvalidRequest: {Action: ActionHold}},
			Error{Code: CodeInvalidRequest, HTTPStatus: 429}, false, want{ClassTransient, ActionHold, 0, false}},
		{"policy beats the text", Policy{CodeEgressUnavailable: {Action: ActionRetry}},
			Error{Code: CodeEgressUnavailable, ServerDetail: notConfigured}, false, want{ClassConfig, ActionRetry, 0, false}},
		{"policy beats progress", Policy{CodeSessionDurationExceeded: {Action: ActionDeadLetter}},
			Error{Code: CodeSessionDurationExceeded}, true, want{ClassBilling, ActionDeadLetter, 0, false}},
		{"policy's attempts leave the action", Policy{CodeUnknown: {Attempts: 4}},
			Error{Code: CodeUnknown}, false, want{ClassUnknown, ActionRetry, 4, true}},
		{"policy's attempts hold under a passing status", Policy{CodeServerError: {Attempts: 3}},
			Error{Code: CodeServerError, HTTPStatus: 503}, false, want{ClassTransient, ActionRetry, 3, true}},
		{"policy's alert off", Policy{CodeServerError: {Alert: &no}},
			Error{Code: CodeServerError}, false, want{ClassServer, ActionRetry, 0, false}},
		{"policy's alert on", Policy{CodeAvatarNotFound: {Alert: &yes}},
			Error{Code: CodeAvatarNotFound}, false, want{ClassConfig, ActionDeadLetter, 0, true}},
		{"policy of another code changes nothing", Policy{CodeAvatarNotFound: {Action: ActionRetry}},
			Error{Code: CodeAppIDMismatch}, false, want{ClassAuth, ActionDeadLetter, 0, false}},

		{"billing beats the HTTP status", nil,
			Error{Code: CodeBillingRequired, HTTPStatus: 429}, false, want{ClassBilling, ActionHold, 0, false}},
		{"credits beat the HTTP status", nil,
			Error{Code: CodeCreditsExhausted, HTTPStatus: 503}, false, want{ClassBilling, ActionHold, 0, false}},
		{"duration beats the HTTP status", nil,
			Error{Code: CodeSessionDurationExceeded, HTTPStatus: 503}, false, want{ClassBilling, ActionDeadLetter, 0, false}},
		{"duration with progress", nil,
			Error{Code: CodeSessionDurationExceeded}, true, want{ClassBilling, ActionRetry, 0, false}},
		{"progress changes no other code", nil,
			Error{Code: CodeAvatarNotFound}, true, want{ClassConfig, ActionDeadLetter, 0, false}},

		{"HTTP 503 beats the text", nil,
			Error{Code: CodeEgressUnavailable, HTTPStatus: 503, ServerDetail: notConfigured}, false, want{ClassTransient, ActionRetry, 0, false}},
		{"HTTP 408", nil, Error{Code: CodeInvalidRequest, HTTPStatus: 408}, false, want{ClassTransient, ActionRetry, 0, false}},
		{"HTTP 425", nil, Error{Code: CodeInvalidRequest, HTTPStatus: 425}, false, want{ClassTransient, ActionRetry, 0, false}},
		{"HTTP 429", nil, Error{Code: CodeSessionTokenInvalid, HTTPStatus: 429}, false, want{ClassTransient, ActionRetry, 0, false}},
		{"HTTP 503", nil, Error{Code: CodeUnknown, HTTPStatus: 503}, false, want{ClassTransient, ActionRetry, 0, true}},
		{"HTTP 409 is the code's", nil, Error{Code: CodeInvalidRequest, HTTPStatus: 409}, false, want{ClassConfig, ActionDeadLetter, 0, false}},
		{"HTTP 500 is the code's", nil, Error{Code: CodeServerError, HTTPStatus: 500}, false, want{ClassServer, ActionRetry, 0, true}},
		{"a status does not revive an expired job", nil,
			Error{Code: CodeDeadlineExceeded, HTTPStatus: 503}, false, want{ClassJob, ActionExpire, 0, false}},
		{"nor an invalid one", nil, Error{Code: CodeInvalidJob, HTTPStatus: 503}, false, want{ClassJob, ActionDeadLetter, 0, false}},
		{"nor one that lost its workers", nil, Error{Code: CodeWorkerLost, HTTPStatus: 429}, false, want{ClassJob, ActionDeadLetter, 0, false}},

		{"text in the detail", nil,
			Error{Code: CodeEgressUnavailable, ServerDetail: notConfigured}, false, want{ClassConfig, ActionDeadLetter, 0, false}},
		{"text in the code", nil,
			Error{Code: CodeEgressUnavailable, ServerCode: notConfigured}, false, want{ClassConfig, ActionDeadLetter, 0, false}},
		{"text in the title", nil,
			Error{Code: CodeEgressUnavailable, ServerTitle: notConfigured}, false, want{ClassConfig, ActionDeadLetter, 0, false}},
		{"other text", nil,
			Error{Code: CodeEgressUnavailable, ServerDetail: "failed to create egress connection"}, false, want{ClassTransient, ActionRetry, 0, false}},
		{"the text of another code", nil,
			Error{Code: CodeServerError, ServerDetail: notConfigured}, false, want{ClassServer, ActionRetry, 0, true}},

		{"audio: network", nil, Error{Code: CodeAudioUnavailable, Network: true}, false, want{ClassTransient, ActionRetry, 0, false}},
		{"audio: 500", nil, Error{Code: CodeAudioUnavailable, HTTPStatus: 500}, false, want{ClassTransient, ActionRetry, 0, false}},
		{"audio: 408", nil, Error{Code: CodeAudioUnavailable, HTTPStatus: 408}, false, want{ClassTransient, ActionRetry, 0, false}},
		{"audio: 425", nil, Error{Code: CodeAudioUnavailable, HTTPStatus: 425}, false, want{ClassTransient, ActionRetry, 0, false}},
		{"audio: 429", nil, Error{Code: CodeAudioUnavailable, HTTPStatus: 429}, false, want{ClassTransient, ActionRetry, 0, false}},
		{"audio: 404", nil, Error{Code: CodeAudioUnavailable, HTTPStatus: 404}, false, want{ClassJob, ActionDeadLetter, 0, false}},
		{"network counts for audio only", nil, Error{Code: CodeAvatarNotFound, Network: true}, false, want{ClassConfig, ActionDeadLetter, 0, false}},
		{"an unknown code", nil, Error{Code: "other"}, false, want{ClassInternal, ActionRetry, 2, true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := table(t, c.policy).Decide(&c.e, c.progressed)
			if got := (want{d.Class, d.Action, d.Attempts, d.Alert}); got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
	if d := table(t, nil).Decide(nil, false); d.Code != CodeInternal {
		t.Errorf("no error: %+v", d)
	}
}

func TestRetryAfterCountsUpToAnHourAndOnlyForWhatIsTriedAgain(t *testing.T) {
	for _, c := range []struct {
		e    Error
		want time.Duration
	}{
		{Error{Code: CodeServerError, HTTPStatus: 503, RetryAfter: time.Minute}, time.Minute},
		{Error{Code: CodeInvalidRequest, HTTPStatus: 429, RetryAfter: 2 * time.Hour}, time.Hour},
		{Error{Code: CodeServerError, HTTPStatus: 502, RetryAfter: time.Minute}, time.Minute},
		{Error{Code: CodeBillingRequired, HTTPStatus: 402, RetryAfter: time.Minute}, time.Minute},
		{Error{Code: CodeInvalidRequest, HTTPStatus: 400, RetryAfter: time.Minute}, 0},
		{Error{Code: CodeServerError, HTTPStatus: 503, RetryAfter: -1}, 0},
	} {
		if d := table(t, nil).Decide(&c.e, false); d.NotBefore != c.want {
			t.Errorf("%v: not before %v, want %v", &c.e, d.NotBefore, c.want)
		}
	}
}

func TestWhatCountsForTheCircuit(t *testing.T) {
	early := []Phase{PhaseToken, PhaseConnect, PhaseHandshake}
	always := []Code{CodeSessionTokenExpired, CodeSessionTokenInvalid, CodeAppIDMismatch, CodeAppIDUnrecognized}
	untilConfirmed := []Code{CodeConnectionFailed, CodeConnectionClosed, CodeIdleTimeout, CodeEgressUnavailable,
		CodeUpstreamError, CodeServerError}
	for _, code := range Codes() {
		for _, phase := range Phases() {
			want := slices.Contains(always, code) || slices.Contains(untilConfirmed, code) && slices.Contains(early, phase)
			d := table(t, nil).Decide(&Error{Code: code, Phase: phase}, false)
			if d.AppWide != want {
				t.Errorf("%s in %s: AppWide %v, want %v", code, phase, d.AppWide, want)
			}
			opens := code == CodeBillingRequired || code == CodeCreditsExhausted
			if d.OpensCircuit != opens {
				t.Errorf("%s in %s: OpensCircuit %v, want %v", code, phase, d.OpensCircuit, opens)
			}
		}
	}
	limited := &Error{Code: CodeInvalidRequest, Phase: PhaseToken, HTTPStatus: 429}
	if !table(t, nil).Decide(limited, false).AppWide {
		t.Error("a token request refused with 429 concerns the whole app")
	}
	revoked := FromHTTP(PhaseToken, 401, nil, []byte(`{"message":"Unauthorized"}`))
	if d := table(t, nil).Decide(revoked, false); d.Code != CodeInvalidEgressConfig || !d.AppWide {
		t.Errorf("a revoked API key concerns the whole app: %+v", d)
	}
	room := FromHTTP(PhaseConnect, 401, nil, []byte(`{"message":"Unauthorized"}`))
	if table(t, nil).Decide(room, false).AppWide {
		t.Error("a job's egress token does not concern the whole app")
	}
	policy := Policy{CodeBillingRequired: {Action: ActionRetry}}
	if table(t, policy).Decide(&Error{Code: CodeBillingRequired}, false).OpensCircuit {
		t.Error("a policy that does not hold must not open the circuit")
	}
}

func TestPolicyIsRefusedByName(t *testing.T) {
	_, err := NewTable(Policy{
		"avatarNotfound": {Action: ActionRetry},
		CodeUnknown:      {Action: "explode"},
		CodeInternal:     {Attempts: -1, Action: ActionExpire},
		CodeServerError:  {Action: ActionHold, Attempts: 3},
	})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"policy.avatarNotfound", "avatarNotFound", `policy.unknown.action: "explode"`,
		"policy.internal.attempts: -1", "policy.internal.action", "retry, dead_letter or hold"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	if strings.Contains(err.Error(), "policy.serverError") {
		t.Errorf("%q names what is right", err)
	}
}

func TestTableKeepsItsPolicyWhateverTheCallerDoesLater(t *testing.T) {
	alert := true
	policy := Policy{CodeAvatarNotFound: {Alert: &alert}}
	tab := table(t, policy)
	alert = false
	policy[CodeUnknown] = Override{Action: ActionHold}
	if !tab.Decide(&Error{Code: CodeAvatarNotFound}, false).Alert || tab.Decide(&Error{Code: CodeUnknown}, false).Action != ActionRetry {
		t.Error("the table changed")
	}
}

func TestRowsShowThePolicy(t *testing.T) {
	alert := true
	rows := table(t, Policy{CodeEgressUnavailable: {Action: ActionHold, Attempts: 7, Alert: &alert}, CodeUnknown: {}}).Rows()
	for _, r := range rows {
		switch {
		case r.Code == CodeEgressUnavailable:
			if r.Action != ActionHold || r.Attempts != 7 || !r.Alert || !r.Overridden || r.Exception != "" {
				t.Errorf("%+v", r)
			}
		case r.Overridden:
			t.Errorf("%s is not overridden", r.Code)
		}
	}
}

func TestNoRemedyOfAJobThatWasGivenUpSaysThatItGoesOnByItself(t *testing.T) {
	for _, code := range Codes() {
		e := ExplainGivenUp(code)
		if e.Meaning != Explain(code).Meaning || e.Remedy == "" {
			t.Errorf("%s: %+v", code, e)
		}
		for _, text := range []string{"by themselves", "Nothing, if", "jobs wait"} {
			if strings.Contains(e.Remedy, text) {
				t.Errorf("%s, given up: %q", code, e.Remedy)
			}
		}
	}
	if e := ExplainGivenUp(CodeCreditsExhausted); !strings.Contains(e.Remedy, "replay its dead letter") {
		t.Error(e.Remedy)
	}
}
