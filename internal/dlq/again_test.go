package dlq_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
	"avatarworker/internal/leader"
	"avatarworker/internal/natsserver/natstest"
)

// twins writes letters of n jobs that had the same id one after the other.
func twins(t *testing.T, b bench, n int) {
	t.Helper()
	for i := range n {
		d := letter("greeting", 1)
		d.Job.StreamSeq, d.Data = uint64(i+1), fmt.Appendf(nil, `{"avatar_id":"%d"}`, i+1)
		if i > 0 {
			d.LettersBefore = newest(t, b)
		}
		write(t, b, d)
	}
	record(t, b, "greeting", 1, uint64(n), "dead_lettered")
}

func record(t *testing.T, b bench, job string, run int, seq uint64, state string) {
	t.Helper()
	value, err := json.Marshal(map[string]any{"job_id": job, "run": run, "stream_seq": seq, "state": state})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.h.State.Put(t.Context(), job, value); err != nil {
		t.Fatal(err)
	}
}

// take does what a worker does with the job that was published last: it runs
// it, and the message is gone.
func take(t *testing.T, b bench) (run, body string) {
	t.Helper()
	info, err := b.h.Jobs.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m, err := b.h.Jobs.GetMsg(t.Context(), info.State.LastSeq)
	if err != nil {
		t.Fatal(err)
	}
	run = m.Header.Get(dlq.HeaderRun)
	if after := m.Header.Get(dlq.HeaderAfterSeq); after != "" {
		t.Errorf("it waits for message %s, which is gone", after)
	}
	n := 0
	if _, err := fmt.Sscan(run, &n); err != nil {
		t.Fatal(err)
	}
	record(t, b, m.Header.Get(dlq.HeaderJobID), n, m.Sequence, "completed")
	if err := b.h.Jobs.DeleteMsg(t.Context(), m.Sequence); err != nil {
		t.Fatal(err)
	}
	return run, string(m.Data)
}

func TestLettersOfOneJobIDAreReplayedAsOneRunEach(t *testing.T) {
	t.Parallel()
	for name, each := range map[string]func(t *testing.T, b bench) string{
		"while the others wait": func(t *testing.T, b bench) string {
			info, err := b.h.Jobs.Info(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			m, err := b.h.Jobs.GetMsg(t.Context(), info.State.LastSeq)
			if err != nil {
				t.Fatal(err)
			}
			after := ""
			if info.State.LastSeq > 1 {
				after = fmt.Sprint(info.State.LastSeq - 1)
			}
			if got := m.Header.Get(dlq.HeaderAfterSeq); got != after {
				t.Errorf("it runs after message %q, want %q", got, after)
			}
			return m.Header.Get(dlq.HeaderRun) + string(m.Data)
		},
		"after the one before has run": func(t *testing.T, b bench) string {
			run, body := take(t, b)
			return run + body
		},
	} {
		for _, order := range [][]uint64{{1, 2, 3}, {3, 1, 2}} {
			t.Run(fmt.Sprint(name, order), func(t *testing.T) {
				b := setup(t)
				twins(t, b, 3)
				for i, seq := range order {
					r := replay(t, b, seq, dlq.ReplayOptions{})
					if r.Status != dlq.StatusReplayed || r.Run != i+2 {
						t.Fatalf("letter %d: %+v", seq, r)
					}
					if got, want := each(t, b), fmt.Sprintf(`%d{"avatar_id":"%d"}`, i+2, seq); got != want {
						t.Errorf("published %s, want %s", got, want)
					}
				}
				if letters, _ := lettersAndJobs(t, b); letters != 0 {
					t.Errorf("%d letters left", letters)
				}
			})
		}
	}
}

// The duplicate window of the jobs stream may be over while the first one still
// waits: its run is taken all the same.
func TestALetterTakesNoRunOfOneThatWaitsPastTheDuplicateWindow(t *testing.T) {
	t.Parallel()
	b := setup(t)
	cfg := b.h.Jobs.CachedInfo().Config
	cfg.Duplicates = 100 * time.Millisecond
	if _, err := b.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	twins(t, b, 2)
	replay(t, b, 1, dlq.ReplayOptions{})
	natstest.ForgetIDs(t, b.js, names.JobsStream(), names.Jobs("probe"))
	if r := replay(t, b, 2, dlq.ReplayOptions{}); r.Status != dlq.StatusReplayed || r.Run != 3 {
		t.Errorf("got %+v", r)
	}
}

func TestReplayWhoseLetterCantBeRemovedIsRepeatedWithoutASecondRun(t *testing.T) {
	t.Parallel()
	for name, between := range map[string]func(t *testing.T, b bench){
		"its job waits":      func(*testing.T, bench) {},
		"its job has run":    func(t *testing.T, b bench) { take(t, b) },
		"its record is gone": func(t *testing.T, b bench) { take(t, b); purge(t, b, "greeting") },
		"another letter was replayed and has run": func(t *testing.T, b bench) {
			take(t, b)
			_, err := b.store.Replay(t.Context(), 2, dlq.ReplayOptions{})
			if err == nil || !strings.Contains(err.Error(), "its letter stays") {
				t.Fatal(err)
			}
			if run, body := take(t, b); run != "3" || body != `{"avatar_id":"2"}` {
				t.Errorf("run %s is %s", run, body)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := setup(t)
			twins(t, b, 2)
			// A stream that permits no removal, and refuses it at once.
			cfg := b.h.DLQ.CachedInfo().Config
			cfg.DenyDelete = true
			sealed := replaceStream(t, b, cfg)
			if r, err := sealed.store.Replay(t.Context(), 1, dlq.ReplayOptions{}); err == nil || r.Status != dlq.StatusReplayed || !strings.Contains(err.Error(), "its letter stays") {
				t.Fatalf("%+v, %v", r, err)
			}
			between(t, sealed)
			_, before := lettersAndJobs(t, sealed)
			for range 2 {
				r, err := sealed.store.Replay(t.Context(), 1, dlq.ReplayOptions{})
				if err == nil || r.Status != dlq.StatusAlready || r.Run != 2 {
					t.Fatalf("%+v, %v", r, err)
				}
			}
			if _, after := lettersAndJobs(t, sealed); after != before {
				t.Errorf("%d jobs published again", after-before)
			}
		})
	}
}

func purge(t *testing.T, b bench, key string) {
	t.Helper()
	if err := b.h.State.Purge(t.Context(), key); err != nil {
		t.Fatal(err)
	}
}

// replaceStream makes the dead letter stream again with that configuration, and
// the letters that it held: DenyDelete can only be given at the start.
func replaceStream(t *testing.T, b bench, cfg jetstream.StreamConfig) bench {
	t.Helper()
	info, err := b.h.DLQ.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var kept []*nats.Msg
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
		m, err := b.h.DLQ.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, &nats.Msg{Subject: m.Subject, Header: m.Header, Data: m.Data})
	}
	if err := b.js.DeleteStream(t.Context(), cfg.Name); err != nil {
		t.Fatal(err)
	}
	if b.h.DLQ, err = b.js.CreateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	for _, m := range kept {
		if _, err := b.js.PublishMsg(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// claimOnly replays the first letter into a queue that is full: its run is claimed, and
// not published.
func claimOnly(t *testing.T, b bench) {
	t.Helper()
	cfg := b.h.Jobs.CachedInfo().Config
	full := cfg
	full.MaxMsgs = 1
	if _, err := b.js.UpdateStream(t.Context(), full); err != nil {
		t.Fatal(err)
	}
	if _, err := b.js.Publish(t.Context(), "avatar.jobs.default", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.store.Replay(t.Context(), 1, dlq.ReplayOptions{}); err == nil || !strings.Contains(err.Error(), "is full") {
		t.Fatal(err)
	}
	if _, err := b.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
}

// What stopped between its claim and its publish comes first: a later run that
// is taken before it would make it a duplicate.
func TestALetterWaitsForTheReplayOfAnotherThatWasInterrupted(t *testing.T) {
	t.Parallel()
	b := setup(t)
	twins(t, b, 2)
	claimOnly(t, b)
	if _, err := b.store.Replay(t.Context(), 2, dlq.ReplayOptions{}); err == nil || !strings.Contains(err.Error(), "replay or remove that one first") {
		t.Fatal(err)
	}
	if r := replay(t, b, 1, dlq.ReplayOptions{}); r.Status != dlq.StatusReplayed || r.Run != 2 {
		t.Fatalf("got %+v", r)
	}
	if r := replay(t, b, 2, dlq.ReplayOptions{}); r.Status != dlq.StatusReplayed || r.Run != 3 {
		t.Fatalf("got %+v", r)
	}
}

// A cancel ends the run that was claimed, also if it was not published. Who replays the
// letter after that wants the job to run.
func TestAReplayThatWasCancelledBeforeItWasPublishedIsALaterRun(t *testing.T) {
	t.Parallel()
	b := setup(t)
	twins(t, b, 1)
	claimOnly(t, b)
	records := kv.NewStore(b.js, b.h.State, time.Minute)
	for range 2 {
		if state, err := lifecycle.NoteCancel(t.Context(), records, "greeting", time.Now()); err != nil || state != lifecycle.StateReleased {
			t.Fatalf("%s, %v", state, err)
		}
	}
	if r := replay(t, b, 1, dlq.ReplayOptions{DryRun: true}); r.Status != dlq.StatusWouldReplay || r.Run != 3 {
		t.Fatalf("got %+v", r)
	}
	if r := replay(t, b, 1, dlq.ReplayOptions{}); r.Status != dlq.StatusReplayed || r.Run != 3 {
		t.Fatalf("got %+v", r)
	}
	var claims lifecycle.Claims
	if _, err := records.Get(t.Context(), lifecycle.ClaimPrefix+"greeting", &claims); err != nil || len(claims.Claims) != 1 || claims.Claims[0].Run != 3 || claims.Claims[0].StreamSeq == 0 {
		t.Errorf("%+v, %v", claims, err)
	}
}

func TestAnotherJobsMessageUnderTheIDOfAReplayIsNotTheReplay(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		taken  bool
		header nats.Header
	}{
		"waits":               {false, nil},
		"was run":             {true, nil},
		"names the job too":   {false, nats.Header{dlq.HeaderJobID: {"greeting"}, dlq.HeaderRun: {"2"}}},
		"is of the next run ": {false, nats.Header{dlq.HeaderJobID: {"greeting"}, dlq.HeaderRun: {"3"}}},
	} {
		t.Run(name, func(t *testing.T) {
			b := setup(t)
			twins(t, b, 1)
			ack, err := b.js.PublishMsg(t.Context(), &nats.Msg{
				Subject: "avatar.jobs.default", Data: []byte(`{"id":"other","avatar_id":"ok"}`), Header: c.header,
			}, jetstream.WithMsgID("greeting.run2"))
			if err != nil {
				t.Fatal(err)
			}
			if c.taken {
				if err := b.h.Jobs.DeleteMsg(t.Context(), ack.Sequence); err != nil {
					t.Fatal(err)
				}
			}
			if r := replay(t, b, 1, dlq.ReplayOptions{}); r.Status != dlq.StatusReplayed || r.Run != 3 {
				t.Fatalf("got %+v", r)
			}
			if run, body := take(t, b); run != "3" || body != `{"avatar_id":"1"}` {
				t.Errorf("run %s is %s", run, body)
			}
		})
	}
}

func TestLettersReplayedByManyAtOnceAreOneRunEach(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const n = 8
	twins(t, b, n)
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			for left := n; left > 0; {
				left = 0
				for seq := range uint64(n) {
					// One that another has in hand is left to the next round.
					if _, err := b.store.Replay(t.Context(), seq+1, dlq.ReplayOptions{}); err == nil || !strings.Contains(err.Error(), "not found") {
						left++
					}
				}
			}
		})
	}
	all.Wait()
	expectCounts(t, b, 0, n)
	info, err := b.h.Jobs.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	runs, bodies := map[string]bool{}, map[string]bool{}
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
		m, err := b.h.Jobs.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		runs[m.Header.Get(dlq.HeaderRun)], bodies[string(m.Data)] = true, true
	}
	if len(runs) != n || len(bodies) != n {
		t.Errorf("%d runs of %d jobs, want %d", len(runs), len(bodies), n)
	}
}

func TestAnOldLetterWhoseJobIsAtALaterRunIsKept(t *testing.T) {
	t.Parallel()
	b := setup(t)
	twins(t, b, 1)
	record(t, b, "greeting", 2, 9, "completed")
	later := dlq.NewStore(b.js, names, func() time.Time { return time.Now().Add(8 * 24 * time.Hour) })
	if _, err := later.Replay(t.Context(), 1, dlq.ReplayOptions{}); err == nil || !strings.Contains(err.Error(), "not known any more") {
		t.Fatal(err)
	}
	expectCounts(t, b, 1, 0)
}

// The client takes a message without a body that has a Status for an answer of
// the server, and a list asks for letters without their bodies.
func TestALetterThatLooksLikeTheServersIsALetter(t *testing.T) {
	t.Parallel()
	b := setup(t)
	statuses := []string{"100", "400", "404", "408", "409", "423", "503", "x"}
	for i, status := range statuses {
		d := letter(fmt.Sprintf("j%d", 2*i), 1)
		d.Header["Status"], d.Header["Description"] = []string{status}, []string{"Consumer Deleted"}
		if i%2 == 0 {
			d.Data = nil
		}
		write(t, b, d)
		// As any publisher may, who is permitted to.
		if _, err := b.js.PublishMsg(t.Context(), &nats.Msg{
			Subject: "avatar.dlq.a.b", Header: nats.Header{"Status": {status}, dlq.HeaderJobID: {fmt.Sprintf("j%d", 2*i+1)}},
		}); err != nil {
			t.Fatal(err)
		}
	}
	var want []string
	for i := range 2 * len(statuses) {
		want = append(want, fmt.Sprintf("j%d", i))
	}
	if got := list(t, b, dlq.Filter{}, 0); !slices.Equal(got, want) {
		t.Errorf("listed %v", got)
	}
	slices.Reverse(want)
	if got := list(t, b, dlq.Filter{Newest: true}, 0); !slices.Equal(got, want) {
		t.Errorf("newest first: listed %v", got)
	}
	for seq := range uint64(2 * len(statuses)) {
		l, err := b.store.Show(t.Context(), seq+1)
		if err != nil {
			t.Errorf("show %d: %v", seq+1, err)
		}
		if seq%2 == 0 && (l.Header.Get("Status") != "" || l.Header.Get("Avatar-Orig-Status") != statuses[seq/2]) {
			t.Errorf("letter %d: %v", seq+1, l.Header)
		}
	}
	for seq := range uint64(2 * len(statuses)) {
		if seq%2 != 0 {
			if err := b.store.Remove(t.Context(), seq+1); err != nil {
				t.Error(err)
			}
			continue
		}
		if r := replay(t, b, seq+1, dlq.ReplayOptions{}); r.Status != dlq.StatusReplayed {
			t.Errorf("got %+v", r)
		}
		m, err := b.h.Jobs.GetMsg(t.Context(), seq/2+1)
		if err != nil {
			t.Fatal(err)
		}
		wanted := ""
		if len(m.Data) > 0 {
			wanted = statuses[seq/2]
		}
		if got := m.Header.Get("Status"); got != wanted {
			t.Errorf("the job with %d bytes has status %q again, want %q", len(m.Data), got, wanted)
		}
	}
}

func TestNoHeaderOfAJobActsOnItsLetterOrItsReplay(t *testing.T) {
	t.Parallel()
	b := setup(t)
	d := letter("j1", 1)
	for _, name := range []string{
		"Nats-TTL", "nats-ttl", "Nats-Rollup", "Nats-Expected-Last-Sequence", "Nats-Expected-Last-Subject-Sequence", "Nats-Expected-Stream",
		"Nats-Schedule", "Nats-Schedule-Target", "Nats-Incr", "Nats-Batch-Id", "Nats-Msg-Size", "Nats-Stream", "Nats-Sequence", "Nats-Trace-Dest",
		"Nats-Required-Api-Level", "Nats-Marker-Reason", "status", "Description", "STATUS",
	} {
		d.Header[name] = []string{"1"}
	}
	write(t, b, d)
	m := last(t, b)
	for name := range d.Header {
		if name == "Content-Type" || name == "traceparent" || name == "X-Mine" || name == "Nats-Msg-Id" {
			continue
		}
		if len(m.Header["Avatar-Orig-"+name]) != 1 || name != "Nats-Expected-Stream" && name != "Nats-Stream" && name != "Nats-Sequence" && len(m.Header[name]) != 0 {
			t.Errorf("%s: %v", name, m.Header)
		}
	}
	replay(t, b, m.Sequence, dlq.ReplayOptions{})
	job, err := leader.Last(t.Context(), b.js, names.JobsStream(), "avatar.jobs.default")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for name := range job.Header {
		got = append(got, name)
	}
	slices.Sort(got)
	want := []string{
		"Avatar-Job-Id", "Avatar-Run", "Content-Type", "Description", "Nats-Expected-Stream", "Nats-Msg-Id", "STATUS", "X-Mine", "status", "traceparent",
	}
	if !slices.Equal(got, want) {
		t.Errorf("the replay has %v, want %v", got, want)
	}
}
