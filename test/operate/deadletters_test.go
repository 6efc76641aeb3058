package operate_test

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
)

// control switches the fault of the whole account, as an operator does it.
func (s *site) control(body string) {
	s.t.Helper()
	resp, err := http.Post(strings.TrimSuffix(s.backend.ConsoleURL(), "/v1/console")+"/control", "application/json", bytes.NewReader([]byte(body)))
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close() // nothing is read of it
	if resp.StatusCode != http.StatusOK {
		s.t.Fatalf("/control %s: %s", body, resp.Status)
	}
}

func TestAThousandDeadLettersAreFoundExplainedAndReplayedOnce(t *testing.T) {
	t.Parallel()
	n := 1000
	if testing.Short() {
		n = 200
	}
	s := newSite(t, 0)
	s.run()
	s.connect()
	s.control(`{"fault":"avatarNotFound"}`)
	for i := range n {
		s.publish("default", fmt.Sprintf("job-%d", i), fmt.Sprintf("ok-%d", i))
	}
	s.publish("nobody", "lonely", "ok")
	s.awaitEvents("avatar.events.dead_lettered.*", n)

	call(t, s.env, 0, []string{
		fmt.Sprint(n), "avatarworker dlq show --code avatarNotFound", "publisher", "no worker serves queue nobody",
	}, "status")
	call(t, s.env, 0, []string{"There is no avatar", "publisher", "Correct avatar_id", "avatarworker dlq replay --code avatarNotFound"},
		"dlq", "show", "--code", "avatarNotFound")
	out, _ := call(t, s.env, 0, nil, "dlq", "ls", "--limit", "20", "--json")
	if letters := decode[[]map[string]any](t, out); len(letters) != 20 {
		t.Errorf("dlq ls --limit 20 shows %d", len(letters))
	}

	s.control(`{"fault":""}`)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		p := spawn(t, s.env, "dlq", "replay", "--code", "avatarNotFound", "--all")
		p.out.await(t, "replayed jobs", func(text string) bool { return strings.Count(text, "  replayed  ") >= n/10 })
		p.signal(sig)
		code := p.wait()
		if sig == syscall.SIGINT && (code != 1 || !strings.Contains(p.stderr.String(), "repeat the command")) {
			t.Errorf("after SIGINT: exit %d\n%s", code, p.stderr)
		}
	}
	if left := s.stored(s.names.DLQStream()); left == 0 {
		t.Log("the interrupts came after the last letter")
	}
	call(t, s.env, 0, nil, "dlq", "replay", "--code", "avatarNotFound", "--all")
	s.ranOnce(n)
	call(t, s.env, 0, []string{"0 dead letters"}, "dlq", "replay", "--code", "avatarNotFound", "--all")
}

// ranOnce: each job of the n completed its second run, in one session, and
// nothing of it is left.
func (s *site) ranOnce(n int) {
	s.t.Helper()
	completed := s.awaitEvents("avatar.events.completed.*", n)
	if len(completed) != n {
		s.t.Errorf("%d different jobs completed, want %d", len(completed), n)
	}
	spoken := make(map[string]int)
	for _, session := range s.backend.SessionLog() {
		if !session.Confirmed.IsZero() {
			spoken[session.AvatarID]++
		}
	}
	for i := range n {
		if avatar := fmt.Sprintf("ok-%d", i); spoken[avatar] != 1 {
			s.t.Errorf("avatar %s spoke in %d sessions, want 1", avatar, spoken[avatar])
		}
	}
	if left := s.stored(s.names.DLQStream()); left != 0 {
		s.t.Errorf("%d dead letters are left", left)
	}
	if run := s.record("job-0")["run"]; run != 2.0 {
		s.t.Errorf("job-0 is at run %v, want 2", run)
	}
}
