package errors

import (
	"bufio"
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// expectation is the oracle's half of a row.
type expectation struct {
	ID           string  `json:"id"`
	Code         Code    `json:"expected_code"`
	Phase        Phase   `json:"expected_phase"`
	HTTPStatus   *int    `json:"expected_http_status"`
	ServerCode   *string `json:"expected_server_code"`
	ServerTitle  *string `json:"expected_server_title"`
	ServerDetail *string `json:"expected_server_detail"`
	CloseCode    *int    `json:"expected_close_code"`
	CloseReason  *string `json:"expected_close_reason"`
	PyRepr       bool    `json:"py_repr"`
}

func deref[T any](p *T) T {
	var zero T
	if p == nil {
		return zero
	}
	return *p
}

func vectorLines(t testing.TB) [][]byte {
	t.Helper()
	f, err := os.Open("testdata/errors.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var lines [][]byte
	s := bufio.NewScanner(f)
	s.Buffer(nil, 4<<20)
	for s.Scan() {
		lines = append(lines, []byte(s.Text()))
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestEveryVectorIsClassifiedAsTheOracleDoes(t *testing.T) {
	lines := vectorLines(t)
	if len(lines) != 658 {
		t.Fatalf("read %d vectors, want 658", len(lines))
	}
	for _, line := range lines {
		var want expectation
		if err := json.Unmarshal(line, &want); err != nil {
			t.Fatal(err)
		}
		v, err := ParseVector(line)
		if err != nil {
			t.Errorf("%s: %v", want.ID, err)
			continue
		}
		got, err := v.Classify()
		if err != nil {
			t.Errorf("%s: %v", want.ID, err)
			continue
		}
		checkVector(t, want, got)
	}
}

func checkVector(t *testing.T, want expectation, got *Error) {
	t.Helper()
	check := func(field string, got, expected any) {
		t.Helper()
		if got != expected {
			t.Errorf("%s: %s = %.200q, want %.200q", want.ID, field, got, expected)
		}
	}
	check("code", got.Code, want.Code)
	check("phase", got.Phase, want.Phase)
	check("http_status", got.HTTPStatus, deref(want.HTTPStatus))
	check("close_code", got.CloseCode, deref(want.CloseCode))
	check("close_reason", got.CloseReason, deref(want.CloseReason))
	if want.PyRepr {
		return
	}
	check("server_code", got.ServerCode, deref(want.ServerCode))
	check("server_title", got.ServerTitle, deref(want.ServerTitle))
	check("server_detail", got.ServerDetail, deref(want.ServerDetail))
}

func TestRetryAfterIsReadAsSecondsAndAsADate(t *testing.T) {
	const date = "Mon, 02 Jan 2006 15:04:05 GMT"
	for _, c := range []struct {
		name, value, date string
		want              time.Duration
	}{
		{"seconds", "120", "", 2 * time.Minute},
		{"spaces", " 7 ", "", 7 * time.Second},
		{"fraction", "0.5", "", 500 * time.Millisecond},
		{"negative", "-3", "", 0},
		{"absurd", "1e300", "", maxRetryAfter},
		{"not a number", "NaN", "", 0},
		{"nonsense", "soon", "", 0},
		{"absent", "", "", 0},
		{"date, from the answer's own clock", "Mon, 02 Jan 2006 15:05:05 GMT", date, time.Minute},
		{"date that has passed", "Mon, 02 Jan 2006 15:04:00 GMT", date, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			header := http.Header{"Retry-After": {c.value}, "Date": {c.date}}
			if got := FromHTTP(PhaseConnect, 503, header, nil).RetryAfter; got != c.want {
				t.Errorf("RetryAfter = %v, want %v", got, c.want)
			}
		})
	}
}

func TestRetryAfterDateWithoutTheAnswersDateUsesOurClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := time.Now().Add(90 * time.Second).UTC().Format(http.TimeFormat)
		header := http.Header{"Retry-After": {at}}
		if got := FromHTTP(PhaseToken, 429, header, nil).RetryAfter; got != 90*time.Second {
			t.Errorf("RetryAfter = %v, want 90s", got)
		}
	})
}

func TestTokenAnswer(t *testing.T) {
	for _, c := range []struct {
		name, body string
		status     int
		token      string
		code       Code
		effective  int
	}{
		{"token", `{"sessionToken":"tok"}`, 200, "tok", "", 0},
		{"token with an empty list of errors", `{"sessionToken":"tok","errors":[]}`, 200, "tok", "", 0},
		{"number", `{"sessionToken":12}`, 200, "12", "", 0},
		{"zero", `{"sessionToken":0}`, 200, "", CodeProtocolError, 0},
		{"blank", `{"sessionToken":"  "}`, 200, "", CodeProtocolError, 0},
		{"object", `{"sessionToken":{"a":1}}`, 200, "", CodeProtocolError, 0},
		{"other key", `{"token":"tok"}`, 200, "", CodeProtocolError, 0},
		{"no JSON", `<html>`, 200, "", CodeProtocolError, 0},
		{"list", `["tok"]`, 200, "", CodeProtocolError, 0},
		{"token under another status", `{"sessionToken":"tok"}`, 201, "", CodeUnknown, 201},
		{"errors beside a token", `{"sessionToken":"tok","errors":[{"status":402}]}`, 200, "", CodeBillingRequired, 402},
		{"errors, status as text", `{"errors":[{"status":" 429 "}]}`, 200, "", CodeInvalidRequest, 429},
		{"errors, status no whole number", `{"errors":[{"status":401.0}]}`, 200, "", CodeUnknown, 200},
		{"errors as text, flat status", `{"errors":"boom","status":503}`, 200, "", CodeServerError, 503},
		{"status in the body of a refusal", `{"errors":[{"status":402}]}`, 400, "", CodeInvalidRequest, 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			token, e := ParseTokenAnswer(c.status, nil, []byte(c.body))
			if token != c.token {
				t.Errorf("token = %q, want %q", token, c.token)
			}
			if e == nil {
				if c.code != "" {
					t.Errorf("no error, want %s", c.code)
				}
				return
			}
			if e.Code != c.code || e.HTTPStatus != c.effective || e.Phase != PhaseToken {
				t.Errorf("got %s, HTTP %d, %s; want %s, HTTP %d", e.Code, e.HTTPStatus, e.Phase, c.code, c.effective)
			}
		})
	}
}

func TestUpgradeBodyIsReadAsPythonReadsIt(t *testing.T) {
	for _, c := range []struct {
		name, body          string
		code, title, detail string
	}{
		{"false code falls to the other key", `{"code":0,"error":"x"}`, "x", "", ""},
		{"false code and false other key", `{"errors":[{"code":"","id":false}]}`, "False", "", ""},
		{"empty detail falls to message", `{"detail":"","message":"m"}`, "", "", "m"},
		{"zero detail does not", `{"detail":0,"message":"m"}`, "", "", "0"},
		{"null text", ` null `, "", "", "null"},
		{"number", `42`, "", "", ""},
		{"byte order mark", "\ufeff{\"message\":\"m\"}", "", "", "\ufeff{\"message\":\"m\"}"},
		{"separators are white space", "\x1c m \x1f", "", "", "m"},
		{"not a number", `{"code":NaN,"detail":-Infinity,"title":"NaN \" Infinity"}`, "nan", `NaN " Infinity`, "-inf"},
		{"numbers", `{"code":1e16,"title":0.00001,"detail":1e999}`, "1e+16", "1e-05", "inf"},
		{"small and whole numbers", `{"code":2.50,"title":-7,"detail":1e2}`, "2.5", "-7", "100.0"},
		{"nested, in order, quoted", `{"detail":{"b":"it's","a":[null,true,"\t\\"]}}`, "", "", `{'b': "it's", 'a': [None, True, '\t\\']}`},
		{"a repeated key keeps its place", `{"detail":{"a":1,"b":2,"a":3}}`, "", "", `{'a': 3, 'b': 2}`},
		{"invalid UTF-8", "caf\xe9", "", "", "caf\ufffd"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := FromHTTP(PhaseConnect, 500, nil, []byte(c.body))
			if e.ServerCode != c.code || e.ServerTitle != c.title || e.ServerDetail != c.detail {
				t.Errorf("got %q %q %q, want %q %q %q", e.ServerCode, e.ServerTitle, e.ServerDetail, c.code, c.title, c.detail)
			}
		})
	}
}

func TestDottedCapitalIDoesNotMatchAnI(t *testing.T) {
	if got := FromServerError(PhaseRuntime, 0, "SESS\u0130ON DENIED").Code; got != CodeServerError {
		t.Errorf("code = %s, want %s", got, CodeServerError)
	}
}

// What the worker detects by itself has a constructor for each.
func TestFaultsThatTheWorkerDetects(t *testing.T) {
	cause := New("read tcp: connection reset by peer")
	for _, c := range []struct {
		name  string
		got   *Error
		code  Code
		phase Phase
	}{
		{"unreachable", FromTransport(PhaseConnect, cause), CodeConnectionFailed, PhaseConnect},
		{"never confirmed", FromTransport(PhaseHandshake, cause), CodeConnectionFailed, PhaseHandshake},
		{"cut without a close frame, or no pong", FromCut(PhaseRuntime, cause), CodeConnectionClosed, PhaseRuntime},
		{"closed with 1000 while speech is owed", FromClose(PhaseRuntime, 1000, ""), CodeConnectionClosed, PhaseRuntime},
		{"closed with 1001 while speech is owed", FromClose(PhaseRuntime, 1001, "away"), CodeConnectionClosed, PhaseRuntime},
		{"no envelope", FromFrame(PhaseRuntime, cause), CodeProtocolError, PhaseRuntime},
		{"no envelope, no cause", FromFrame(PhaseHandshake, nil), CodeProtocolError, PhaseHandshake},
		{"text before the confirm", FromTextFrame(PhaseHandshake), CodeProtocolError, PhaseHandshake},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.got.Code != c.code || c.got.Phase != c.phase || c.got.Message == "" {
				t.Errorf("got %v, want code %s in %s with a message", c.got, c.code, c.phase)
			}
			if c.got.Err != nil && !strings.Contains(c.got.Message, "connection reset") {
				t.Errorf("message %q does not give the cause", c.got.Message)
			}
		})
	}
	if FromTransport(PhaseConnect, nil) != nil || FromCut(PhaseRuntime, nil) != nil {
		t.Error("no fault must be no error")
	}
}

func FuzzHTTPBody(f *testing.F) {
	for _, line := range vectorLines(f) {
		v, err := ParseVector(line)
		if err != nil {
			f.Fatal(err)
		}
		if v.Kind == "http" && v.Body != nil && len(*v.Body) < 4096 {
			f.Add(*v.HTTPStatus, "3", []byte(*v.Body))
		}
	}
	table, err := NewTable(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, status int, wait string, body []byte) {
		header := http.Header{"Retry-After": {wait}}
		for _, phase := range Phases() {
			e := FromHTTP(phase, status, header, body)
			if !e.Code.Known() || e.Phase != phase || e.Message == "" || e.RetryAfter < 0 {
				t.Fatalf("%+v", *e)
			}
			if d := table.Decide(e, false); d.Action == "" || d.Class == "" || d.NotBefore > time.Hour {
				t.Fatalf("%+v of %v", d, e)
			}
			if text := e.Error(); strings.ContainsAny(text, "\n\r") {
				t.Fatalf("more than one line: %q", text)
			}
		}
		if token, e := ParseTokenAnswer(status, header, body); (token == "") == (e == nil) {
			t.Fatalf("token %q, error %v", token, e)
		}
	})
}
