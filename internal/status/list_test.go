package status_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/status"
	"avatarworker/internal/topology"
)

func list(t *testing.T, js jetstream.JetStream, q status.Query) status.List {
	t.Helper()
	l, err := status.NewStore(js, names, nil, time.Minute).Jobs(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func ids(rows []status.Row) string {
	var texts []string
	for _, r := range rows {
		texts = append(texts, r.ID)
	}
	return strings.Join(texts, " ")
}

func ago(d time.Duration) time.Time { return time.Now().Add(-d).UTC() }

func submit(t *testing.T, js jetstream.JetStream, queue, id, body string, header nats.Header) {
	t.Helper()
	if header == nil {
		header = nats.Header{}
	}
	if id != "" {
		header.Set("Avatar-Job-Id", id)
	}
	waits := func() uint64 {
		consumer, err := js.Consumer(t.Context(), names.JobsStream(), queue)
		if errors.Is(err, jetstream.ErrConsumerNotFound) {
			return math.MaxUint64
		}
		if err != nil {
			t.Fatal(err)
		}
		return consumer.CachedInfo().NumPending
	}
	before := waits()
	if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: names.Jobs(queue), Header: header, Data: []byte(body)}); err != nil {
		t.Fatal(err)
	}
	for before != math.MaxUint64 && waits() <= before { // a consumer counts a job a moment after it is stored
	}
}

// What a list has to say of many jobs is how many there are of each kind: it says the
// same when it is read from NATS and when it is kept in memory.
func TestJobsAreCountedByWhatTheyHaveInCommon(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	several(t, h)
	submit(t, js, "vip", "waits", `{"app_id":"a","avatar_id":"x","audio":{"url":"https://h/a.wav"},"labels":{"customer":"2"}}`, nil)
	submit(t, js, "default", "waits-too", `no JSON`, nil)
	m := follow(t, js, names, time.Hour)
	refresh(t, m)
	for _, c := range []struct {
		by   status.By
		q    status.Query
		want string
		more bool
	}{
		{by: "label:customer", want: ":3 2:2 c<1>:1"},
		{by: "label:customer", q: status.Query{Limit: 1}, want: ":3", more: true},
		{by: "app", q: status.Query{DefaultApp: "mine"}, want: "a:4 b:1 mine:1"},
		{by: "queue", want: "default:4 vip:2"},
		{by: "avatar", want: "x:4 :1 y:1"},
		{by: "code", q: status.Query{Filter: status.Filter{States: []lifecycle.State{lifecycle.StateDeadLettered, lifecycle.StateHeld}}}, want: "avatarNotFound:1 creditsExhausted:1"},
		{by: "label:absent", want: ":6"},
	} {
		c.q.By = c.by
		fromModel, err := m.Jobs(t.Context(), c.q)
		if err != nil {
			t.Fatal(err)
		}
		for from, l := range map[string]status.List{"store": list(t, js, c.q), "model": fromModel} {
			var texts []string
			for _, g := range l.Groups {
				texts = append(texts, fmt.Sprintf("%s:%d", g.Key, g.Jobs))
			}
			if got := strings.Join(texts, " "); got != c.want || l.More != c.more || len(l.Rows) != 0 {
				t.Errorf("by %s from the %s: %q, more %t, %d rows; want %q", c.by, from, got, l.More, len(l.Rows), c.want)
			}
		}
	}
	counted := list(t, js, status.Query{By: "label:customer"}).Groups[1].States
	if counted[lifecycle.StateCompleted] != 1 || counted[status.StateWaiting] != 1 || len(counted) != 2 {
		t.Errorf("customer 2: %v", counted)
	}
	for _, text := range []string{"label:", "state", "Queue", "label"} {
		if _, err := status.ParseBy(text); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}

// Jobs that were taken over within a millisecond keep their places from one look to the
// next.
func TestTheOrdersAreOfExactTimes(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	began := ago(time.Hour).Truncate(time.Millisecond)
	for i, id := range []string{"c", "a", "b"} { // the longest first, by either order, and otherwise the newest
		put(t, h, lifecycle.Record{
			JobID: id, Run: 1, StreamSeq: uint64(i + 1), Queue: "default", State: lifecycle.StateRunning, ConnectionID: "c",
			PublishedAt: ago(time.Duration(5-i) * time.Hour), StartedAt: began.Add(time.Duration(i) * time.Microsecond),
		})
	}
	m := follow(t, js, names, time.Hour)
	for _, order := range []status.Order{status.ByRunning, status.ByCost} {
		for range 20 {
			q := status.Query{Order: order}
			fromModel, err := m.Jobs(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			if store, model := ids(list(t, js, q).Rows), ids(fromModel.Rows); store != "c a b" || model != "c a b" {
				t.Fatalf("by %s: the store says %q, the model %q", order, store, model)
			}
		}
	}
}

// several puts one job of each kind.
func several(t *testing.T, h topology.Handles) {
	t.Helper()
	later := time.Now().Add(time.Hour).UTC()
	put(t, h, lifecycle.Record{
		JobID: "runs", Run: 1, StreamSeq: 1, Queue: "default", AppID: "a", AvatarID: "x", State: lifecycle.StateRunning, Attempt: 1,
		PublishedAt: ago(4 * time.Hour), StartedAt: ago(time.Minute), ConnectionID: "c", SessionTime: time.Second, WorkerID: "w-1",
	})
	put(t, h, lifecycle.Record{
		JobID: "held", Run: 2, StreamSeq: 2, Queue: "default", AppID: "b", AvatarID: "x", State: lifecycle.StateHeld, HeldCode: errors.CodeCreditsExhausted,
		PublishedAt: ago(3 * time.Hour), NextAttemptAt: &later, Labels: map[string]string{"customer": "c<1>"},
	})
	put(t, h, lifecycle.Record{
		JobID: "dead", Run: 1, StreamSeq: 3, Queue: "vip", AppID: "a", AvatarID: "y", State: lifecycle.StateDeadLettered, Outcome: lifecycle.StateDeadLettered,
		PublishedAt: ago(2 * time.Hour), LastError: &event.Error{Code: errors.CodeAvatarNotFound}, SessionTime: time.Hour, Crashes: 1,
	})
	put(t, h, lifecycle.Record{
		JobID: "done", Run: 1, StreamSeq: 4, Queue: "default", AppID: "a", AvatarID: "x", State: lifecycle.StateCompleted, Outcome: lifecycle.StateCompleted,
		PublishedAt: ago(time.Hour), LastError: &event.Error{Code: errors.CodeServerError}, Labels: map[string]string{"customer": "2"},
	})
	put(t, h, lifecycle.Record{JobID: "cancelled-before-it-came", Run: 1, State: lifecycle.StateReleased})
	if _, err := h.State.Put(t.Context(), "lease.w-1", []byte(`{"job_id":"no-job","stream_seq":1,"state":"running"}`)); err != nil {
		t.Fatal(err)
	}
}

func TestExpiredJobsHaveTheCodeOfTheirEvent(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	for i, last := range []*event.Error{nil, {Code: errors.CodeServerError}} {
		put(t, h, lifecycle.Record{
			JobID: fmt.Sprintf("late%d", i), Run: 1, StreamSeq: uint64(i + 1), Queue: "default", AppID: "a", AvatarID: "x",
			State: lifecycle.StateExpired, Outcome: lifecycle.StateExpired, PublishedAt: ago(time.Hour), LastError: last,
		})
	}
	rows := list(t, js, status.Query{Filter: status.Filter{Codes: []errors.Code{errors.CodeDeadlineExceeded}}}).Rows
	if len(rows) != 2 || rows[0].Code != errors.CodeDeadlineExceeded {
		t.Errorf("%+v", rows)
	}
}

func TestJobsAreListedByFilterNewestFirst(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	several(t, h)
	submit(t, js, "vip", "waits", `{"app_id":"a","avatar_id":"x","audio":{"url":"https://h/a.wav"},"labels":{"customer":"2"}}`, nil)
	submit(t, js, "default", "waits-too", `no JSON`, nil)
	for _, c := range []struct {
		name string
		q    status.Query
		want string
	}{
		{"states", status.Query{Filter: status.Filter{States: []lifecycle.State{lifecycle.StateHeld, status.StateWaiting}, Queues: []string{"default", "vip"}, Apps: []string{"a", "b"}}}, "waits held"},
		{"queue", status.Query{Filter: status.Filter{Queues: []string{"vip"}}}, "waits dead"},
		{"app", status.Query{Filter: status.Filter{Apps: []string{"a"}}}, "waits done dead runs"},
		{"avatar", status.Query{Filter: status.Filter{Avatars: []string{"y"}}}, "dead"},
		{"label that JSON escapes", status.Query{Filter: status.Filter{Labels: map[string]string{"customer": "c<1>"}}}, "held"},
		{"label", status.Query{Filter: status.Filter{Labels: map[string]string{"customer": "2"}}}, "waits done"},
		{"code of what holds", status.Query{Filter: status.Filter{Codes: []errors.Code{errors.CodeCreditsExhausted, errors.CodeAvatarNotFound}}}, "dead held"},
		{"code of a failure before it completed", status.Query{Filter: status.Filter{Codes: []errors.Code{errors.CodeServerError}}}, "done"},
		{"older", status.Query{Filter: status.Filter{Before: ago(150 * time.Minute)}}, "held runs"},
		{"newer", status.Query{Filter: status.Filter{After: ago(150 * time.Minute), Apps: []string{"a"}}}, "waits done dead"},
		{"app of the configuration", status.Query{DefaultApp: "mine", Filter: status.Filter{Apps: []string{"mine"}}}, "waits-too"},
		{"by running", status.Query{Filter: status.Filter{Apps: []string{"a"}}, Order: status.ByRunning}, "runs waits done dead"},
		{"by cost", status.Query{Filter: status.Filter{Apps: []string{"a"}}, Order: status.ByCost}, "dead runs waits done"},
	} {
		if got := ids(list(t, js, c.q).Rows); got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
	all := list(t, js, status.Query{})
	if len(all.Rows) != 6 || !all.Waiting.All || all.Waiting.Looked != 2 || all.More {
		t.Errorf("%d jobs (%s), waiting %+v", len(all.Rows), ids(all.Rows), all.Waiting)
	}
	for limit := 1; limit <= 6; limit++ {
		some := list(t, js, status.Query{Limit: limit})
		if ids(some.Rows) != ids(all.Rows[:limit]) || some.More != (limit < 6) {
			t.Errorf("limit %d: %s, more %t", limit, ids(some.Rows), some.More)
		}
	}
}

func TestARowHasExactlyItsFields(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	several(t, h)
	submit(t, js, "default", "waits", `{}`, nil)
	want := strings.Fields("id run state queue app_id avatar_id labels attempt crashes code age_ms running_ms next_attempt_at worker_id session_ms")
	for _, row := range list(t, js, status.Query{}).Rows {
		data, err := json.Marshal(row)
		if err != nil {
			t.Fatal(err)
		}
		var order []string
		decoder := json.NewDecoder(bytes.NewReader(data))
		for depth := 0; ; {
			token, err := decoder.Token()
			if err != nil {
				break
			}
			switch d, isDelim := token.(json.Delim); {
			case isDelim && (d == '{' || d == '['):
				depth++
			case isDelim:
				depth--
			case depth == 1:
				order = append(order, fmt.Sprint(token))
				if err := decoder.Decode(new(json.RawMessage)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if !slices.Equal(order, want) {
			t.Errorf("fields %q of %s", order, data)
		}
		if row.ID == "runs" && (row.RunningMS < 59_000 || row.SessionMS < 60_000 || row.AgeMS < 4*3600_000 || row.WorkerID != "w-1") {
			t.Errorf("got %s", data)
		}
	}
}

// The record of a job that was just taken may be there while its message was
// still seen as waiting.
func TestAJobIsListedOnceAsItsLatestRun(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	put(t, h, lifecycle.Record{JobID: "taken", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateRunning, PublishedAt: ago(0)})
	put(t, h, lifecycle.Record{JobID: "replayed", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateDeadLettered, PublishedAt: ago(time.Hour)})
	submit(t, js, "default", "taken", `{}`, nil)
	submit(t, js, "default", "replayed", `{}`, nats.Header{"Avatar-Run": {"2"}})
	for _, limit := range []int{0, 2, 5} {
		rows := list(t, js, status.Query{Limit: limit}).Rows
		states := map[string]lifecycle.State{}
		for _, r := range rows {
			states[r.ID] = r.State
		}
		if len(rows) != 2 || states["taken"] != lifecycle.StateRunning || states["replayed"] != status.StateWaiting {
			t.Errorf("limit %d: %v", limit, states)
		}
	}
}

func TestWaitingJobsAreListedWithoutBeingConsumed(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	const all = 700
	for i := range all {
		header := nats.Header{}
		if i == 300 { // looks like the end of the server's answer
			header = nats.Header{"Status": {"204"}, "Nats-Stream": {""}, "Nats-Sequence": {"7"}, "Nats-Num-Pending": {"0"}}
		}
		submit(t, js, "default", fmt.Sprint("w", i), "", header)
	}
	for _, direct := range []bool{true, false} {
		cfg := h.Jobs.CachedInfo().Config
		cfg.AllowDirect = direct
		if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		l := list(t, js, status.Query{Filter: status.Filter{States: []lifecycle.State{status.StateWaiting}}})
		if len(l.Rows) != all || l.Rows[0].ID != fmt.Sprint("w", all-1) || l.Rows[all-1].ID != "w0" || l.Waiting.Looked != all {
			t.Fatalf("direct %t: %d jobs, waiting %+v", direct, len(l.Rows), l.Waiting)
		}
		few := list(t, js, status.Query{Filter: status.Filter{States: []lifecycle.State{status.StateWaiting}}, Limit: 10})
		if ids(few.Rows) != ids(l.Rows[:10]) || few.Waiting.Looked > all/2 {
			t.Errorf("direct %t: %s after %d looks", direct, ids(few.Rows), few.Waiting.Looked)
		}
		found, looked, err := status.NewStore(js, names, nil, time.Minute).Waiting(t.Context(), "w300")
		if err != nil || found == nil || !looked.All || looked.Looked == 0 {
			t.Errorf("direct %t: %+v, looked %+v, %v", direct, found, looked, err)
		}
	}
	info, err := h.Consumers["default"].Info(t.Context())
	if err != nil || info.NumPending != all || info.NumAckPending != 0 {
		t.Errorf("pending %d, unacknowledged %d, %v", info.NumPending, info.NumAckPending, err)
	}
}

// handBack has n jobs of the queue delivered and handed back.
func handBack(t *testing.T, h topology.Handles, n int) {
	t.Helper()
	for n > 0 {
		batch, err := h.Consumers["default"].Fetch(min(n, 1000))
		if err != nil {
			t.Fatal(err)
		}
		before := n
		for msg := range batch.Messages() {
			if err := msg.NakWithDelay(time.Hour); err != nil {
				t.Fatal(err)
			}
			n--
		}
		if err := batch.Error(); err != nil || n == before {
			t.Fatalf("%d were not delivered: %v", n, err)
		}
	}
}

// A job behind a full session limit was delivered and has no record. It is open like any
// other: a command that lists, counts or cancels jobs must not miss it.
func TestJobsHandedBackWithoutARecordWaitAndAreCountedOnce(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	body := `{"app_id":"lim","avatar_id":"x","audio":{"url":"https://h/a.wav"},"labels":{"batch":"1"}}`
	for _, id := range []string{"runs", "back1", "ended", "noted", "back2"} {
		submit(t, js, "default", id, body, nil)
	}
	submit(t, js, "default", "again", body, nats.Header{"Avatar-Run": {"2"}})
	m := follow(t, js, names, time.Hour)
	refresh(t, m)
	handBack(t, h, 6)
	submit(t, js, "default", "new", body, nil)
	put(t, h, lifecycle.Record{JobID: "runs", Run: 1, StreamSeq: 1, Queue: "default", AppID: "lim", State: lifecycle.StateRunning, PublishedAt: ago(0)})
	put(t, h, lifecycle.Record{JobID: "ended", Run: 1, StreamSeq: 3, Queue: "default", AppID: "lim", State: lifecycle.StateCompleted, Outcome: lifecycle.StateCompleted, PublishedAt: ago(0)})
	put(t, h, lifecycle.Record{JobID: "noted", Run: 1, State: lifecycle.StateReleased, CancelRequested: true})
	put(t, h, lifecycle.Record{JobID: "again", Run: 1, StreamSeq: 6, Queue: "default", AppID: "lim", State: lifecycle.StateDeadLettered, Outcome: lifecycle.StateDeadLettered, PublishedAt: ago(0)})
	if err := h.Jobs.DeleteMsg(t.Context(), 3); err != nil { // acknowledged
		t.Fatal(err)
	}
	refresh(t, m)
	store := status.NewStore(js, names, nil, time.Minute)
	for from, r := range map[string]reader{"store": store, "model": m} {
		waiting, err := r.Jobs(t.Context(), status.Query{Filter: status.Filter{States: []lifecycle.State{status.StateWaiting}, Labels: map[string]string{"batch": "1"}}})
		if err != nil || ids(waiting.Rows) != "new again back2 noted back1" {
			t.Errorf("the %s has waiting %q, %v", from, ids(waiting.Rows), err)
		}
		all, err := r.Jobs(t.Context(), status.Query{By: "app"})
		if err != nil || len(all.Groups) != 1 || all.Groups[0].Jobs != 7 {
			t.Errorf("the %s counts %+v, %v", from, all.Groups, err)
		}
		f, err := r.Fleet(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if q := f.Queues[0]; q.Waiting != 5 || q.Running != 1 || q.Open() != 6 || q.Taken != 5 || !q.OldestWaiting.Equal(published(t, h, 2)) {
			t.Errorf("the %s says of the queue %+v", from, q)
		}
	}
}

func published(t *testing.T, h topology.Handles, seq uint64) time.Time {
	t.Helper()
	msg, err := h.Jobs.GetMsg(t.Context(), seq)
	if err != nil {
		t.Fatal(err)
	}
	return msg.Time
}

// A publisher has its acknowledgement before the server counts the job for the
// queue's consumer.
func TestAJobIsListedThatItsConsumerHasNotCountedYet(t *testing.T) {
	t.Parallel()
	direct, _ := setup(t)
	submit(t, direct, "default", "w", `{}`, nil)
	js := notCounting(t, direct)
	waiting := status.Query{Filter: status.Filter{States: []lifecycle.State{status.StateWaiting}}}
	if l := list(t, js, waiting); ids(l.Rows) != "w" || l.Waiting != (status.Search{Looked: 1, Of: 1, All: true}) {
		t.Errorf("the store lists %+v", l)
	}
	m := follow(t, js, names, time.Hour)
	l, err := m.Jobs(t.Context(), waiting)
	if err != nil || ids(l.Rows) != "w" || l.Waiting != (status.Search{Looked: 1, Of: 1, All: true}) {
		t.Errorf("the model lists %+v, %v", l, err)
	}
}

// notCounting is a client to which every consumer seems to have counted no job.
func notCounting(t *testing.T, js jetstream.JetStream) jetstream.JetStream {
	t.Helper()
	nc := js.Conn()
	_, err := nc.Subscribe("behind.>", func(m *nats.Msg) {
		onward := &nats.Msg{Subject: jetstream.DefaultAPIPrefix + strings.TrimPrefix(m.Subject, "behind."), Reply: m.Reply, Header: m.Header, Data: m.Data}
		if !strings.HasPrefix(m.Subject, "behind.CONSUMER.LIST.") {
			if err := nc.PublishMsg(onward); err != nil {
				t.Error(err)
			}
			return
		}
		reply, err := nc.RequestMsg(onward, time.Minute)
		if err == nil {
			err = m.Respond(regexp.MustCompile(`"num_pending":\d+`).ReplaceAll(reply.Data, []byte(`"num_pending":0`)))
		}
		if err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	behind, err := jetstream.NewWithAPIPrefix(nc, "behind")
	if err != nil {
		t.Fatal(err)
	}
	return behind
}

func TestLookingAtWaitingJobsSaysHowFarItCame(t *testing.T) {
	t.Parallel()
	js, _ := setup(t)
	for i := range 20 {
		submit(t, js, "default", fmt.Sprint("w", i), `{}`, nil)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := status.NewStore(js, names, nil, time.Minute).Jobs(ended, status.Query{}); err == nil {
		t.Error("an interrupted list did not fail")
	}
	l, err := status.NewStore(js, names, nil, time.Nanosecond).Jobs(t.Context(), status.Query{})
	if err != nil || l.Waiting.All {
		t.Errorf("%+v, %v", l.Waiting, err)
	}
}

func TestNewestJobsAreFoundWithoutReadingAllRecords(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	// The records of jobs published long ago that changed lately come first in
	// the stream's order backwards.
	for i := range 3000 {
		put(t, h, lifecycle.Record{JobID: fmt.Sprint("r", i), Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateCompleted, PublishedAt: ago(time.Duration(i) * time.Minute)})
	}
	if got := ids(list(t, js, status.Query{Limit: 3}).Rows); got != "r0 r1 r2" {
		t.Errorf("got %s", got)
	}
}

func TestTheCostOfAJobHasTheSessionsThatWereLostWithTheirWorkers(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	put(t, h, lifecycle.Record{
		JobID: "j", Run: 1, StreamSeq: 9, Queue: "default", State: lifecycle.StateCompleted, CreatedAt: ago(time.Minute),
		SessionTime: 7 * time.Second, ConnectionIDs: []string{"lost", "c2"},
		Usage: []usage.Session{
			{Session: 1, Connected: 13 * time.Second, OutcomeCode: "workerLost", ConnectionID: "lost", Estimated: true, Stored: true},
			{Session: 2, Connected: 7 * time.Second, OutcomeCode: "completed"},
		},
	})
	j, err := status.NewStore(js, names, nil, 0).Job(t.Context(), "j")
	if want := (status.Cost{Sessions: 1, SessionMS: 7000, Credits: 2, Estimated: 1, EstimatedMS: 13_000, EstimatedCredits: 3}); err != nil || j.Cost != want {
		t.Errorf("%+v, %v, want %+v", j, err, want)
	}
}

func TestCostCountsByTheConfiguredTariff(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	put(t, h, lifecycle.Record{
		JobID: "j", Run: 2, StreamSeq: 9, Queue: "default", State: lifecycle.StateCancelled, CreatedAt: ago(time.Minute),
		SessionTime: 13 * time.Second, ConnectionIDs: []string{"c3", "c4"},
	})
	for _, body := range []event.Body{
		event.Error{JobID: "j", Run: 1, Code: errors.CodeServerError, Class: errors.ClassServer, ConnectionID: "c1"},
		event.NewCompleted(event.JobFields{JobID: "j", Run: 1}, 2, []string{"c1", "c2"}, nil, 0, 7*time.Second, ""),
	} {
		msg, err := event.Event{ID: fmt.Sprintf("%T", body), Time: time.Now(), Body: body}.Message(names, "s")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := js.PublishMsg(t.Context(), msg); err != nil {
			t.Fatal(err)
		}
	}
	j, err := status.NewStore(js, names, nil, 0).Job(t.Context(), "j")
	if err != nil || j.Cost != (status.Cost{Sessions: 4, SessionMS: 20_000, Credits: 4}) {
		t.Errorf("%+v, %v", j.Cost, err)
	}
	j, err = status.NewStore(js, names, nil, 0).WithTariff(usage.Tariff{Credit: 3 * time.Second, Minimum: 1}).Job(t.Context(), "j")
	if err != nil || j.Cost.Credits != 7 {
		t.Errorf("at 3 s a credit: %+v, %v", j.Cost, err)
	}
}
