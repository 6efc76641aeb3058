package dlq_test

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/leader"
	"avatarworker/internal/natsserver/natstest"
)

func list(t testing.TB, b bench, f dlq.Filter, limit int) []string {
	t.Helper()
	ids := []string{}
	for e, err := range b.store.List(t.Context(), f, limit) {
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, e.JobID)
	}
	return ids
}

func TestListFiltersInBothDirections(t *testing.T) {
	t.Parallel()
	b := setup(t)
	if got := list(t, b, dlq.Filter{}, 0); len(got) != 0 {
		t.Fatalf("an empty stream lists %v", got)
	}
	for i, code := range []errors.Code{errors.CodeAvatarNotFound, errors.CodeInvalidJob, errors.CodeAvatarNotFound, errors.CodeInternal} {
		d := letter(fmt.Sprintf("j%d", i), 1)
		d.Error.Code, d.Error.AppID, d.FailedAt = code, fmt.Sprintf("app%d", i%2), failedAt.Add(time.Duration(i)*time.Minute)
		if code == errors.CodeInvalidJob {
			d.Error.Class = errors.ClassJob
		}
		write(t, b, d)
	}
	for name, tc := range map[string]struct {
		f     dlq.Filter
		limit int
		want  string
	}{
		"all":           {dlq.Filter{}, 0, "j0 j1 j2 j3"},
		"limited":       {dlq.Filter{}, 2, "j0 j1"},
		"code":          {dlq.Filter{Codes: []errors.Code{errors.CodeAvatarNotFound}}, 0, "j0 j2"},
		"codes":         {dlq.Filter{Codes: []errors.Code{errors.CodeInternal, errors.CodeInvalidJob, errors.CodeInternal}}, 0, "j1 j3"},
		"class":         {dlq.Filter{Classes: []errors.Class{errors.ClassJob}}, 0, "j1"},
		"class, code":   {dlq.Filter{Classes: []errors.Class{errors.ClassJob}, Codes: []errors.Code{errors.CodeInternal}}, 0, ""},
		"app":           {dlq.Filter{Apps: []string{"app1"}}, 0, "j1 j3"},
		"app, limited":  {dlq.Filter{Apps: []string{"app1"}}, 1, "j1"},
		"jobs":          {dlq.Filter{Jobs: []string{"j3", "j0"}}, 0, "j0 j3"},
		"before":        {dlq.Filter{Before: failedAt.Add(time.Minute)}, 0, "j0"},
		"after":         {dlq.Filter{After: failedAt.Add(2 * time.Minute)}, 0, "j2 j3"},
		"wildcard code": {dlq.Filter{Codes: []errors.Code{">"}}, 0, ""},
	} {
		want := strings.Fields(tc.want)
		if got := list(t, b, tc.f, tc.limit); !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
		if tc.limit > 0 {
			continue
		}
		tc.f.Newest = true
		slices.Reverse(want)
		if got := list(t, b, tc.f, 0); !slices.Equal(got, want) {
			t.Errorf("%s, newest first: got %v, want %v", name, got, want)
		}
	}
	counts, err := b.store.CountByCode(t.Context())
	if got := fmt.Sprint(counts); err != nil || got != "[{config avatarNotFound 2} {config internal 1} {job invalidJob 1}]" {
		t.Errorf("counts: %s, %v", got, err)
	}
}

func TestForeignMessageInTheStreamIsListedAndCanBeRemovedButNotReplayed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ack, err := b.js.Publish(t.Context(), "avatar.dlq.a.b", []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	for e, err := range b.store.List(t.Context(), dlq.Filter{}, 0) {
		if err != nil || e.Class != "a" || e.Code != "b" || e.Size != 5 || e.FailedAt.IsZero() {
			t.Fatalf("got %+v, %v", e, err)
		}
	}
	if _, err := b.store.Replay(t.Context(), ack.Sequence, dlq.ReplayOptions{}); err == nil || !strings.Contains(err.Error(), "not written by a worker") {
		t.Fatalf("got %v", err)
	}
	if err := b.store.Remove(t.Context(), ack.Sequence); err != nil {
		t.Fatal(err)
	}
	for _, seq := range []uint64{ack.Sequence, 999} {
		if err := b.store.Remove(t.Context(), seq); !errors.Is(err, dlq.ErrNoLetter) {
			t.Errorf("removing %d: %v", seq, err)
		}
		if _, err := b.store.Show(t.Context(), seq); !errors.Is(err, dlq.ErrNoLetter) {
			t.Errorf("showing %d: %v", seq, err)
		}
	}
}

func TestAMissingStreamIsNamed(t *testing.T) {
	t.Parallel()
	store := dlq.NewStore(natstest.JetStream(t), names, nil)
	for _, err := range store.List(t.Context(), dlq.Filter{}, 0) {
		if err == nil || !strings.Contains(err.Error(), "stream AVATAR_DLQ not found") {
			t.Fatalf("got %v", err)
		}
	}
}

func replay(t *testing.T, b bench, seq uint64, o dlq.ReplayOptions) dlq.Result {
	t.Helper()
	r, err := b.store.Replay(t.Context(), seq, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func lettersAndJobs(t *testing.T, b bench) (uint64, uint64) {
	t.Helper()
	d, err := b.h.DLQ.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	j, err := b.h.Jobs.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return d.State.Msgs, j.State.Msgs
}

func expectCounts(t *testing.T, b bench, letters, queued uint64) {
	t.Helper()
	if l, j := lettersAndJobs(t, b); l != letters || j != queued {
		t.Fatalf("%d letters and %d jobs, want %d and %d", l, j, letters, queued)
	}
}

func TestReplayPublishesTheJobAsItsNextRunAndRemovesTheLetter(t *testing.T) {
	t.Parallel()
	b := setup(t)
	d := letter("j1", 3)
	d.Header["Nats-TTL"] = []string{"60s"}
	write(t, b, d)
	if r := replay(t, b, 1, dlq.ReplayOptions{DryRun: true}); r.Status != dlq.StatusWouldReplay || r.Run != 4 {
		t.Fatalf("dry run: %+v", r)
	}
	expectCounts(t, b, 1, 0)
	if r := replay(t, b, 1, dlq.ReplayOptions{}); r.Status != dlq.StatusReplayed || r.JobID != "j1" || r.Run != 4 {
		t.Fatalf("got %+v", r)
	}
	expectCounts(t, b, 0, 1)
	m, err := leader.Last(t.Context(), b.js, names.JobsStream(), "avatar.jobs.default")
	if err != nil {
		t.Fatal(err)
	}
	want := nats.Header{
		"Avatar-Job-Id": {"j1"}, "Avatar-Run": {"4"}, "Nats-Msg-Id": {"j1.run4"}, "Nats-Expected-Stream": {"AVATAR_JOBS"},
		"Content-Type": {"application/json"}, "X-Mine": {"a", "b"}, "traceparent": {"00-ab"},
	}
	if fmt.Sprint(m.Header) != fmt.Sprint(want) || string(m.Data) != string(d.Data) {
		t.Fatalf("got  %v %s\nwant %v", m.Header, m.Data, want)
	}
	if _, err := b.store.Replay(t.Context(), 1, dlq.ReplayOptions{}); !errors.Is(err, dlq.ErrNoLetter) {
		t.Fatalf("again: %v", err)
	}
}

func TestReplayInterruptedBeforeTheRemovalIsFinishedNotRepeated(t *testing.T) {
	t.Parallel()
	t.Run("the job still waits", func(t *testing.T) {
		b := setup(t)
		write(t, b, letter("j1", 1))
		// What the interrupted replay left: its publish.
		left := &nats.Msg{
			Subject: "avatar.jobs.default", Data: []byte(`{"avatar_id":"ok"}`),
			Header: nats.Header{dlq.HeaderJobID: {"j1"}, dlq.HeaderRun: {"2"}},
		}
		if _, err := b.js.PublishMsg(t.Context(), left, jetstream.WithMsgID("j1.run2")); err != nil {
			t.Fatal(err)
		}
		if r := replay(t, b, 1, dlq.ReplayOptions{}); r.Status != dlq.StatusAlready {
			t.Fatalf("got %+v", r)
		}
		expectCounts(t, b, 0, 1)
	})
	t.Run("the job was taken", func(t *testing.T) {
		b := setup(t)
		write(t, b, letter("j1", 1))
		if _, err := b.h.State.Put(t.Context(), "j1", []byte(`{"job_id":"j1","run":2,"state":"running"}`)); err != nil {
			t.Fatal(err)
		}
		if r := replay(t, b, 1, dlq.ReplayOptions{DryRun: true}); r.Status != dlq.StatusAlready {
			t.Fatalf("dry run: %+v", r)
		}
		expectCounts(t, b, 1, 0)
		if r := replay(t, b, 1, dlq.ReplayOptions{}); r.Status != dlq.StatusAlready {
			t.Fatalf("got %+v", r)
		}
		expectCounts(t, b, 0, 0)
	})
	t.Run("the record is of this run", func(t *testing.T) {
		b := setup(t)
		write(t, b, letter("j1", 1))
		if _, err := b.h.State.Put(t.Context(), "j1", []byte(`{"run":1,"state":"dead_lettered","outcome":"dead_lettered"}`)); err != nil {
			t.Fatal(err)
		}
		if r := replay(t, b, 1, dlq.ReplayOptions{}); r.Status != dlq.StatusReplayed {
			t.Fatalf("got %+v", r)
		}
	})
}

func TestJobPastItsDeadlineIsSkippedUnlessIgnored(t *testing.T) {
	t.Parallel()
	inPB, err := proto.Marshal(&jobpb.Job{AvatarId: "ok", Deadline: timestamppb.New(failedAt)})
	if err != nil {
		t.Fatal(err)
	}
	const contentType = "Content-Type"
	for name, tc := range map[string]struct {
		header, contentType string
		data                []byte
		passed              bool
	}{
		"JSON":                   {contentType, "", []byte(`{"avatar_id":"ok","deadline":"2026-03-01T12:30:00+00:00"}`), true},
		"protobuf":               {contentType, "application/protobuf; v=1", inPB, true},
		"protobuf in lower case": {"content-type", "Application/Protobuf", inPB, true},
		"protobuf by its x-name": {"CONTENT-TYPE", "application/x-protobuf", inPB, true},
		"in time":                {contentType, "", []byte(`{"deadline":"2026-03-01T13:30:00Z"}`), false},
		"none":                   {contentType, "", []byte(`{}`), false},
		"no valid job":           {contentType, "", []byte(`{"deadline":"soon"`), false},
		"no protobuf":            {contentType, "application/protobuf", []byte("{}{}"), false},
	} {
		t.Run(name, func(t *testing.T) {
			b := setup(t)
			d := letter("j1", 1)
			d.Header = map[string][]string{tc.header: {tc.contentType}, dlq.HeaderIgnoreDeadline: {"true"}}
			d.Data = tc.data
			write(t, b, d)
			r := replay(t, b, 1, dlq.ReplayOptions{DryRun: true})
			if passed := r.Status == dlq.StatusDeadlinePassed; passed != tc.passed {
				t.Fatalf("got %+v", r)
			}
			if tc.passed {
				replay(t, b, 1, dlq.ReplayOptions{})
				expectCounts(t, b, 1, 0)
			}
			if r := replay(t, b, 1, dlq.ReplayOptions{IgnoreDeadline: tc.passed}); r.Status != dlq.StatusReplayed {
				t.Fatalf("got %+v", r)
			}
			m, err := leader.Last(t.Context(), b.js, names.JobsStream(), "avatar.jobs.default")
			if err != nil {
				t.Fatal(err)
			}
			if ignored := m.Header.Get(dlq.HeaderIgnoreDeadline) == "true"; ignored != tc.passed {
				t.Fatalf("headers: %v", m.Header)
			}
		})
	}
}

func TestLetterOfTheLastRunIsKeptNotReplayed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	write(t, b, letter("j1", jobspec.MaxRun))
	write(t, b, letter("j2", math.MaxInt32))
	for seq := range uint64(2) {
		if _, err := b.store.Replay(t.Context(), seq+1, dlq.ReplayOptions{}); err == nil || !strings.Contains(err.Error(), "publish the job again under another id") {
			t.Errorf("got %v", err)
		}
	}
	expectCounts(t, b, 2, 0)
	write(t, b, letter("j3", jobspec.MaxRun-1))
	if r := replay(t, b, 3, dlq.ReplayOptions{}); r.Status != dlq.StatusReplayed || r.Run != jobspec.MaxRun {
		t.Errorf("got %+v", r)
	}
}

func TestFullJobsStreamKeepsTheLetter(t *testing.T) {
	t.Parallel()
	b := setup(t)
	write(t, b, letter("j1", 1))
	cfg := b.h.Jobs.CachedInfo().Config
	cfg.MaxMsgs = 1
	if _, err := b.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := b.js.Publish(t.Context(), "avatar.jobs.default", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.store.Replay(t.Context(), 1, dlq.ReplayOptions{}); err == nil || !strings.Contains(err.Error(), "AVATAR_JOBS is full") {
		t.Fatalf("got %v", err)
	}
	expectCounts(t, b, 1, 1)
}

func TestReplayingWhileListingReachesEveryLetter(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const n = 1200
	fill(t, b, n)
	seen := 0
	for e, err := range b.store.List(t.Context(), dlq.Filter{}, 0) {
		if err != nil {
			t.Fatal(err)
		}
		seen++
		if err := b.store.Remove(t.Context(), e.Seq); err != nil {
			t.Fatal(err)
		}
	}
	if l, _ := lettersAndJobs(t, b); seen != n || l != 0 {
		t.Fatalf("saw %d of %d, %d left", seen, n, l)
	}
}

// The server forgets an idle consumer after a while: what is done with one letter may
// take that long.
func TestAListGoesOnAfterTheServerForgotItsConsumers(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const n = 600 // more than a batch
	fill(t, b, n)
	for name, f := range map[string]dlq.Filter{"oldest first": {}, "newest first": {Newest: true}} {
		seen := 0
		for _, err := range b.store.List(t.Context(), f, 0) {
			if err != nil {
				t.Fatalf("%s: after %d of %d letters: %v", name, seen, n, err)
			}
			if seen++; seen%100 == 1 {
				forgetConsumers(t, b.h.DLQ)
			}
		}
		if seen != n {
			t.Errorf("%s: saw %d of %d", name, seen, n)
		}
	}
}

func forgetConsumers(t *testing.T, stream jetstream.Stream) {
	t.Helper()
	list := stream.ConsumerNames(t.Context())
	for name := range list.Name() {
		if err := stream.DeleteConsumer(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	if err := list.Err(); err != nil {
		t.Error(err)
	}
}

// fill writes n letters with a 2 kB job each, as fast as the server takes them.
func fill(t testing.TB, b bench, n int) {
	t.Helper()
	body := []byte(strings.Repeat("x", 2000))
	write(t, b, letter("template", 1))
	template := last(t, b)
	for i := range n - 1 {
		msg := nats.NewMsg(template.Subject)
		for name, values := range template.Header {
			msg.Header[name] = values
		}
		msg.Header.Set("Nats-Msg-Id", fmt.Sprint(i))
		msg.Header.Set(dlq.HeaderJobID, fmt.Sprintf("j%d", i))
		if i%1000 == 0 {
			msg.Subject = "avatar.dlq.job.rare"
		}
		msg.Data = body
		if _, err := b.js.PublishMsgAsync(msg, jetstream.WithStallWait(time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-b.js.PublishAsyncComplete():
	case <-time.After(2 * time.Minute):
		t.Fatal("the letters were not acknowledged")
	}
}

// manyCases are looks into a stream of n letters.
func manyCases(n int) map[string]struct {
	f     dlq.Filter
	limit int
	want  int
} {
	return map[string]struct {
		f     dlq.Filter
		limit int
		want  int
	}{
		"oldest":           {dlq.Filter{}, 20, 20},
		"newest":           {dlq.Filter{Newest: true}, 20, 20},
		"rare":             {dlq.Filter{Codes: []errors.Code{"rare"}}, 5, 5},
		"last job":         {dlq.Filter{Newest: true, Jobs: []string{fmt.Sprintf("j%d", n-2)}}, 1, 1},
		"all":              {dlq.Filter{}, 0, n},
		"rare, to the end": {dlq.Filter{Newest: true, Classes: []errors.Class{"job"}}, 0, n / 1000},
	}
}

func TestListFindsWhatIsWantedAmongManyLetters(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const n = 10_000
	fill(t, b, n)
	for name, tc := range manyCases(n) {
		if got := list(t, b, tc.f, tc.limit); len(got) != tc.want {
			t.Errorf("%s: %d letters, want %d", name, len(got), tc.want)
		}
	}
}

// BenchmarkList looks into 100,000 letters.
func BenchmarkList(b *testing.B) {
	bench := setup(b)
	const n = 100_000
	fill(b, bench, n)
	for name, tc := range manyCases(n) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if got := list(b, bench, tc.f, tc.limit); len(got) != tc.want {
					b.Fatalf("%d letters, want %d", len(got), tc.want)
				}
			}
		})
	}
}
