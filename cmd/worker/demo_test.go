package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

func TestDemoShowsJobsThatEndEachWay(t *testing.T) {
	t.Parallel()
	var stdout, stderr bytes.Buffer
	if code := run([]string{"demo", "--json"}, strings.NewReader(""), &stdout, &stderr); code != exitDone {
		t.Fatalf("exit %d\n%s\n%s", code, &stdout, &stderr)
	}
	var summary demoSummary
	if err := json.Unmarshal(stdout.Bytes(), &summary); err != nil {
		t.Fatalf("not one JSON object: %v\n%s", err, &stdout)
	}
	ways := map[string]bool{}
	for _, j := range summary.Jobs {
		if j.Outcome != j.Expected {
			t.Errorf("%s: %s instead of %s", j.ID, j.Outcome, j.Expected)
		}
		if (j.DeadLetter != "") != (j.Outcome == "dead_lettered") {
			t.Errorf("%s: %s, and its dead letter is %q", j.ID, j.Outcome, j.DeadLetter)
		}
		if j.Outcome == "expired" && (j.Code != "deadlineExceeded" || j.Class != "job") {
			t.Errorf("%s expired with %s (%s)", j.ID, j.Code, j.Class)
		}
		ways[string(j.Outcome)] = true
	}
	if !summary.OK || !ways["completed"] || !ways["dead_lettered"] || !ways["expired"] {
		t.Errorf("ok %v, outcomes %v", summary.OK, ways)
	}
}

func TestDemoForPeopleEndsWithASummary(t *testing.T) {
	t.Parallel()
	var stdout, stderr bytes.Buffer
	if code := run([]string{"demo"}, strings.NewReader(""), &stdout, &stderr); code != exitDone {
		t.Fatalf("exit %d\n%s\n%s", code, &stdout, &stderr)
	}
	for _, want := range []string{"demo-flaky", "retrying", "avatar.dlq.config.avatarNotFound", "Every job ended as announced."} {
		if !strings.Contains(stdout.String(), want) {
			t.Errorf("no %q in\n%s", want, &stdout)
		}
	}
}
