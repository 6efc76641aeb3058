package main

import (
	"os"
	"strings"
	"testing"

	"avatarworker/internal/errors"
)

func TestErrorsPrintsTheTableUnderThePolicy(t *testing.T) {
	t.Parallel()
	args := []string{"errors", "--set", "policy.upstreamError.action=hold", "--set", "policy.upstreamError.attempts=3"}
	expect(t, 0, []string{"upstreamError*", "hold", "changed by the configuration"}, args...)
	rows := decode[[]errors.Row](t, expect(t, 0, nil, append(args, "--json")...))
	if len(rows) != len(errors.Codes()) {
		t.Fatalf("%d rows, want %d", len(rows), len(errors.Codes()))
	}
	for _, r := range rows {
		if r.Code == errors.CodeUpstreamError && (r.Action != errors.ActionHold || r.Attempts != 3 || !r.Overridden) {
			t.Errorf("got %+v", r)
		}
	}
}

func TestErrorsShowsALimitOfAttemptsForRetriesOnly(t *testing.T) {
	t.Parallel()
	got := make(map[string]string)
	for line := range strings.Lines(expect(t, 0, nil, "errors")) {
		if fields := strings.Fields(line); len(fields) > 3 {
			got[fields[0]] = fields[3]
		}
	}
	want := map[string]string{"connectionFailed": "job's", "unknown": "2", "avatarNotFound": "-", "creditsExhausted": "-", "deadlineExceeded": "-"}
	for code, attempts := range want {
		if got[code] != attempts {
			t.Errorf("%s: %q attempts, want %q", code, got[code], attempts)
		}
	}
}

func TestClassifyAgreesWithEveryVector(t *testing.T) {
	t.Parallel()
	const file = "../../internal/errors/testdata/errors.jsonl"
	vectors, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	type vector struct {
		ID     string  `json:"id"`
		Code   string  `json:"expected_code"`
		Server *string `json:"expected_server_code"`
		Title  *string `json:"expected_server_title"`
		Detail *string `json:"expected_server_detail"`
		PyRepr bool    `json:"py_repr"`
	}
	want := strings.Split(strings.TrimSpace(string(vectors)), "\n")
	got := strings.Split(strings.TrimSpace(expect(t, 0, nil, "errors", "classify", file)), "\n")
	if len(want) != 658 || len(got) != len(want) {
		t.Fatalf("%d vectors, %d answers; want 658 of each", len(want), len(got))
	}
	for i := range want {
		w, g := decode[vector](t, want[i]), decode[errors.ClassifyResult](t, got[i])
		if w.ID != g.ID || w.Code == "" || w.Code != string(g.Code) {
			t.Errorf("%s: got %s %s, want %s", w.ID, g.ID, g.Code, w.Code)
		}
		if !w.PyRepr && (text(w.Server) != text(g.ServerCode) || text(w.Title) != text(g.ServerTitle) || text(w.Detail) != text(g.ServerDetail)) {
			t.Errorf("%s: server fields differ: %s", w.ID, got[i])
		}
	}
}

func text(s *string) string {
	if s == nil {
		return "<null>"
	}
	return *s
}

func TestClassifyNamesBadLinesAndGoesOn(t *testing.T) {
	t.Parallel()
	good := `{"id":"g","phase":"websocket_connect","kind":"http","http_status":404}`
	c := start(t, good+"\n\nnonsense\n"+good, "errors", "classify", "-")
	if code := c.wait(); code != 1 {
		t.Errorf("exit %d, want 1", code)
	}
	if n := strings.Count(c.out.String(), `"appIDUnrecognized"`); n != 2 {
		t.Errorf("%d answers, want 2:\n%s", n, c.out)
	}
	if !strings.Contains(c.stderr.String(), "stdin:3:") {
		t.Errorf("line 3 is not named: %s", c.stderr)
	}
}
