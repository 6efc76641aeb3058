package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/operate"
	"avatarworker/internal/output"
	"avatarworker/internal/status"
)

// decodeLines decodes one value a line.
func decodeLines[T any](t *testing.T, text string) []T {
	t.Helper()
	var list []T
	for line := range strings.Lines(text) {
		list = append(list, decode[T](t, line))
	}
	return list
}

// take delivers the next n jobs of a queue and gives them back with a delay, as a
// worker does whose job waits for a retry.
func (b *bench) take(n int) []uint64 {
	b.t.Helper()
	messages, err := b.h.Consumers["default"].Fetch(n)
	if err != nil {
		b.t.Fatal(err)
	}
	var seqs []uint64
	for msg := range messages.Messages() {
		meta, err := msg.Metadata()
		if err != nil {
			b.t.Fatal(err)
		}
		seqs = append(seqs, meta.Sequence.Stream)
		if err := msg.NakWithDelay(time.Hour); err != nil {
			b.t.Fatal(err)
		}
	}
	if len(seqs) != n {
		b.t.Fatalf("%d of %d delivered: %v", len(seqs), n, messages.Error())
	}
	return seqs
}

// backoff makes jobs that wait for a retry for an hour.
func (b *bench) backoff(ids ...string) {
	b.t.Helper()
	later := time.Now().Add(time.Hour).UTC()
	for _, id := range ids {
		b.job("default", id)
	}
	for i, seq := range b.take(len(ids)) {
		b.record(lifecycle.Record{
			JobID: ids[i], Run: 1, StreamSeq: seq, Queue: "default", AppID: "app", AvatarID: "a", Region: "us-west", State: lifecycle.StateRetrying, Attempt: 1,
			NextAttemptAt: &later, PublishedAt: time.Now().UTC(), LastError: &event.Error{Code: errors.CodeServerError, Class: errors.ClassServer},
		})
	}
}

func (b *bench) get(id string) lifecycle.Record {
	b.t.Helper()
	entry, err := b.h.State.Get(b.t.Context(), id)
	if err != nil {
		b.t.Fatal(err)
	}
	var r lifecycle.Record
	if err := json.Unmarshal(entry.Value(), &r); err != nil {
		b.t.Fatal(err)
	}
	return r
}

func TestJobsAreListedOneObjectALine(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.backoff("r1", "r2")
	b.job("default", "w1")
	b.record(lifecycle.Record{JobID: "d1", Run: 1, StreamSeq: 9, Queue: "vip", State: lifecycle.StateDeadLettered, Labels: map[string]string{"customer": "acme"}, PublishedAt: time.Now().Add(-time.Hour)})
	list := func(args ...string) string {
		var ids []string
		for _, r := range decodeLines[status.Row](t, expect(t, 0, nil, b.args(append([]string{"jobs", "ls", "--json"}, args...)...)...)) {
			ids = append(ids, r.ID)
		}
		return strings.Join(ids, " ")
	}
	for _, c := range []struct{ want, flags string }{
		{"w1 r2 r1 d1", ""},
		{"w1", "--state waiting"},
		{"r2", "--state retrying --limit 1"},
		{"d1", "--label customer=acme"},
		{"d1", "--older 30m"},
		{"r2 r1", "--newer 30m --code serverError --app app --avatar a --queue default"},
		{"", "--queue none"},
	} {
		if got := list(strings.Fields(c.flags)...); got != c.want {
			t.Errorf("%s: got %q, want %q", c.flags, got, c.want)
		}
	}
	expect(t, 0, []string{"retrying", "serverError", "in 59m"}, b.args("jobs", "ls")...)
	expect(t, 0, []string{"no jobs"}, b.args("jobs", "ls", "--app", "none")...)
	expect(t, 0, []string{"no jobs"}, b.args("jobs", "ls", "--app", "none", "--by", "app")...)
	expect(t, 0, []string{"CODE", "JOBS", "RETRYING", "serverError"}, b.args("jobs", "ls", "--by", "code")...)
	counted := decodeLines[status.Group](t, expect(t, 0, nil, b.args("jobs", "ls", "--by", "code", "--code", "serverError", "--json")...))
	if len(counted) != 1 || counted[0].Key != "serverError" || counted[0].Jobs != 2 || counted[0].States[lifecycle.StateRetrying] != 2 {
		t.Errorf("%+v", counted)
	}
	for _, wrong := range [][]string{{"--state", "none"}, {"--label", "x"}, {"--label", "a=1", "--label", "a=2"}, {"--limit", "-1"}, {"--older", "soon"}, {"--sort", "name"}, {"--by", "name"}} {
		expect(t, 2, []string{wrong[0]}, b.args(append([]string{"jobs", "ls"}, wrong...)...)...)
	}
}

func TestAJobIsShownWithItsTimelineItsCostAndWhatToDo(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.record(lifecycle.Record{
		JobID: "h1", Run: 1, StreamSeq: 1, Queue: "default", AppID: "app", State: lifecycle.StateHeld, HeldReason: lifecycle.HeldCircuit,
		CreatedAt: time.Now(), SessionTime: 13 * time.Second, ConnectionIDs: []string{"c1"},
	})
	b.event("1", event.Started{JobFields: event.JobFields{JobID: "h1", Run: 1}})
	for _, command := range [][]string{{"jobs", "show", "h1"}, {"status", "h1"}} {
		expect(t, 0, []string{"held", "started", "1 session, 13s connected, at least 3 credits", "avatarworker retry h1 --probe"}, b.args(command...)...)
	}
	j := decode[status.Job](t, expect(t, 0, nil, b.args("jobs", "show", "h1", "--json")...))
	if j.Cost != (status.Cost{Sessions: 1, SessionMS: 13_000, Credits: 3}) {
		t.Errorf("%+v", j.Cost)
	}
	b.job("default", "w1")
	b.job("vip", "w2")
	expect(t, 0, nil, b.args("queue", "pause", "default")...)
	expect(t, 0, []string{"waiting: not delivered", "avatarworker queue resume default"}, b.args("jobs", "show", "w1")...)
	expect(t, 0, []string{"\n\nIts queue is paused until it is resumed, and it is not tried before: avatarworker queue resume default\nTo run it now"}, b.args("jobs", "show", "h1")...)
	expect(t, 0, []string{"no worker serves the queue"}, b.args("jobs", "show", "w2")...)
	expect(t, 1, []string{"unknown job"}, b.args("jobs", "show", "none")...)
	expect(t, 1, []string{"jobs in the queues could be read within the time", "--count-for"}, b.args("jobs", "show", "none", "--count-for", "1ns")...)
}

func TestJobsAreRetriedByNameAndByFilter(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.backoff("r1", "r2", "r3")
	expect(t, 2, []string{"which ones"}, b.args("retry")...)
	expect(t, 2, []string{"not both"}, b.args("retry", "r1", "--all")...)
	dry := decodeLines[outcome](t, expect(t, 0, nil, b.args("retry", "--all", "--dry-run", "--json")...))
	if len(dry) != 3 || dry[0].Status != statusWould || b.get("r1").NextAttemptAt.Before(time.Now()) {
		t.Fatalf("%+v", dry)
	}
	one := decode[outcome](t, expect(t, 0, nil, b.args("retry", "r1", "--json")...))
	if one.Status != operate.StatusDelivered || b.get("r1").NextAttemptAt.After(time.Now()) || !b.get("r2").NextAttemptAt.After(time.Now()) {
		t.Errorf("%+v", one)
	}
	expect(t, 0, []string{"r2  delivered", "r3  delivered", "3 jobs"}, b.args("retry", "--state", "retrying", "--code", "serverError")...)
	b.take(3) // they come at once
	b.job("default", "w1")
	expect(t, 0, []string{"waiting"}, b.args("retry", "w1")...)
	expect(t, 1, []string{"unknown", "no record and no waiting job"}, b.args("retry", "none")...)
	expect(t, 1, []string{"none  unknown", "r1  delivered", "1 of which not as asked"}, b.args("retry", "r1", "none")...)
}

// Jobs behind a full session limit, and those of an app whose key is refused, were
// delivered and have no record: nothing that is done to open jobs may pass them over.
func TestJobsHandedBackAreListedExplainedAndCancelled(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, id := range []string{"lim1", "lim2", "key1"} {
		body := fmt.Sprintf(`{"app_id":%q,"avatar_id":"x","audio":{"url":"https://h/a.wav"},"labels":{"batch":"17"}}`, id[:3])
		b.publish(&nats.Msg{Subject: names.Jobs("default"), Header: nats.Header{"Nats-Msg-Id": {id}}, Data: []byte(body)})
	}
	b.take(3)
	for key, value := range map[string]string{"lease.w-1": `{}`, "limit.app_id/lim.0": `{"worker_id":"w-1","job_id":"l0"}`} {
		if _, err := b.h.State.Put(t.Context(), key, []byte(value)); err != nil {
			t.Fatal(err)
		}
	}
	presence, err := json.Marshal(fleet.Presence{WorkerID: "w-1", At: time.Now(), Queues: map[string]int{"default": 1}, RefusedKeys: []string{"key"}})
	if err == nil {
		_, err = b.h.Fleet.Put(t.Context(), fleet.Key("w-1"), presence)
	}
	if err != nil {
		t.Fatal(err)
	}
	if rows := decodeLines[status.Row](t, expect(t, 0, nil, b.args("jobs", "ls", "--label", "batch=17", "--state", "waiting", "--json")...)); len(rows) != 3 {
		t.Errorf("listed: %+v", rows)
	}
	f := decode[status.Fleet](t, expect(t, 0, nil, b.args("status", "--json")...))
	if q := f.Queues[0]; q.Waiting != 3 || q.OldestWaiting.IsZero() {
		t.Errorf("%+v", q)
	}
	expect(t, 0, []string{"handed back", "a free session of limit app_id/lim (1 in use)", "batch"}, b.args("jobs", "show", "lim2")...)
	expect(t, 0, []string{"handed back", "API key of app key", "w-1"}, b.args("jobs", "show", "key1")...)
	expect(t, 0, []string{"waiting", "handed back", "app_id/lim"}, b.args("retry", "lim2")...)
	expect(t, 0, []string{"lim1", "lim2", "2 jobs"}, b.args("cancel", "--app", "lim", "-y", "--dry-run")...)
	expect(t, 0, []string{"lim1  requested", "lim2  requested", "2 jobs"}, b.args("cancel", "--app", "lim", "-y")...)
	if !b.get("lim1").CancelRequested || !b.get("lim2").CancelRequested {
		t.Error("a cancel is not noted")
	}
}

func TestJobsAreCancelledByFilter(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.backoff("r1", "r2")
	b.job("default", "w1")
	b.record(lifecycle.Record{JobID: "done", Run: 1, StreamSeq: 9, Queue: "default", State: lifecycle.StateCompleted, Outcome: lifecycle.StateCompleted})
	all := decodeLines[outcome](t, expect(t, 0, nil, b.args("cancel", "--queue", "default", "--json")...))
	if len(all) != 3 {
		t.Errorf("%+v", all)
	}
	for _, id := range []string{"r1", "r2", "w1"} {
		if !b.get(id).CancelRequested {
			t.Errorf("%s is not to be cancelled", id)
		}
	}
	if b.get("done").CancelRequested {
		t.Error("a job that has its outcome was meant")
	}
	expect(t, 0, nil, b.args("cancel", "--queue", "default")...)
}

func TestQueuesArePausedAndResumed(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.job("default", "w1")
	expect(t, 0, []string{"default  paused until it is resumed"}, b.args("queue", "pause", "default")...)
	expect(t, 0, []string{"until it is resumed"}, b.args("queue", "ls")...)
	q := decodeLines[changedQueue](t, expect(t, 0, nil, b.args("queue", "pause", "default", "--for", "1h", "--json")...))
	if len(q) != 1 || time.Until(q[0].Until) > time.Hour || time.Until(q[0].Until) < 59*time.Minute {
		t.Errorf("%+v", q)
	}
	f := decode[status.Fleet](t, expect(t, 0, nil, b.args("status", "--json")...))
	if !f.Queues[0].PausedUntil.Truncate(time.Second).Equal(q[0].Until) {
		t.Errorf("%+v", f.Queues)
	}
	expect(t, 0, []string{"default  resumed"}, b.args("queue", "resume", "default")...)
	expect(t, 0, []string{"default  not_paused"}, b.args("queue", "resume", "default")...)
	expect(t, 1, []string{"vip  failed", "no worker has served this queue yet"}, b.args("queue", "pause", "vip")...)
	expect(t, 2, []string{"--for"}, b.args("queue", "pause", "default", "--for", "-1h")...)
	if rows := decodeLines[status.Queue](t, expect(t, 0, nil, b.args("queue", "ls", "--json")...)); len(rows) != 1 || !rows[0].PausedUntil.IsZero() {
		t.Errorf("%+v", rows)
	}
}

func (b *bench) circuit(app, region string) {
	b.t.Helper()
	data, err := json.Marshal(circuit.Circuit{
		App: app, Region: region, State: circuit.Open, Code: errors.CodeCreditsExhausted, OpenedAt: time.Now(), RetryAt: time.Now().Add(time.Hour), Cooldown: time.Hour, LastProbe: "h1",
	})
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.h.Fleet.Put(b.t.Context(), "circuit."+app+"."+region, data); err != nil {
		b.t.Fatal(err)
	}
}

func TestCircuitsAreProbedAndClosed(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.circuit("app", "us-west")
	b.circuit("app", "eu-west")
	b.backoff("h1")
	r := b.get("h1")
	r.State, r.HeldReason, r.HeldCode = lifecycle.StateHeld, lifecycle.HeldCircuit, errors.CodeCreditsExhausted
	b.record(r)
	expect(t, 0, []string{"us-west", "eu-west", "creditsExhausted"}, b.args("circuit", "ls")...)
	expect(t, 1, []string{"h", "held", "--probe"}, b.args("retry", "h1")...)
	if !b.get("h1").NextAttemptAt.After(time.Now()) {
		t.Error("a job that its circuit holds was changed")
	}
	expect(t, 0, []string{"app app in us-west  probing with job h1"}, b.args("circuit", "probe", "app", "us-west")...)
	b.take(1)
	expect(t, 0, []string{"app app in eu-west  probing with its next job"}, b.args("circuit", "probe", "app", "eu-west")...)
	expect(t, 0, []string{"app app in eu-west  closed", "app app in us-west  closed"}, b.args("circuit", "close", "app")...)
	expect(t, 0, []string{"no circuit is open"}, b.args("circuit", "ls")...)
	expect(t, 0, []string{"no circuit of app app is open", "app app in all regions  not_open"}, b.args("circuit", "close", "app")...)
	expect(t, 0, []string{`"region":"eu-west","status":"not_open"`}, b.args("circuit", "close", "app", "eu-west", "--json")...)
	expect(t, 1, []string{"app app: no circuit of this app is open"}, b.args("circuit", "probe", "app")...)
}

func TestAWorkerThatIsNotThereCanNotDrain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	expect(t, 1, []string{"w-1  failed", "no worker of this id or name answers: 'avatarworker status' lists the workers\n"}, b.args("drain", "w-1")...)
}

func TestAWorkerDrainsByItsNameIfOnlyOneHasIt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for id, name := range map[string]string{"host-1": "host", "twin-1": "twin", "twin-2": "twin"} {
		presence, err := json.Marshal(fleet.Presence{Worker: name, WorkerID: id, At: time.Now(), Queues: map[string]int{"default": 1}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.h.Fleet.Put(t.Context(), fleet.Key(id), presence); err != nil {
			t.Fatal(err)
		}
		if _, err := b.nc.Subscribe(names.WorkerDrain(id), func(m *nats.Msg) {
			_ = m.Respond([]byte(`{"worker_id":"` + id + `","running":2}`)) // the command says if it did not
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	expect(t, 0, []string{"host-1  draining, 2 slots in use"}, b.args("drain", "host")...)
	expect(t, 0, []string{"twin-2  draining"}, b.args("drain", "twin-2")...)
	expect(t, exitUsage, []string{"2 workers have the name twin: give an id, one of twin-1, twin-2"}, b.args("drain", "twin")...)
}

func TestAPauseWithoutAnEndHasNoneInJSON(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	if out := expect(t, 0, nil, b.args("queue", "pause", "default", "--json")...); strings.Contains(out, "until") {
		t.Error(out)
	}
	expect(t, 0, []string{"default  paused until it is resumed"}, b.args("queue", "pause", "default")...)
	expect(t, 0, []string{`"until":"2`}, b.args("queue", "pause", "default", "--for", "1h", "--json")...)
}

func TestACodeIsExplainedWithTheCommandsThatHelp(t *testing.T) {
	t.Parallel()
	expect(t, 0, []string{"avatarNotFound", "There is no avatar", "publisher", "dlq replay --code avatarNotFound --set avatar_id=ID"}, "errors", "avatarnotfound")
	x := decode[explainedCode](t, expect(t, 0, nil, "errors", "creditsExhausted", "--json"))
	if x.Code != errors.CodeCreditsExhausted || x.Remedy == "" || len(x.Commands) < 3 {
		t.Errorf("%+v", x)
	}
	expect(t, 2, []string{"did you mean avatarNotFound"}, "errors", "avatarNotFond")
	for _, code := range errors.Codes() {
		expect(t, 0, nil, "errors", string(code))
	}
}

func TestRecordingsAreListedAndFetched(t *testing.T) {
	b := newBench(t)
	t.Chdir(t.TempDir())
	expect(t, 0, []string{"no recordings"}, b.args("recording", "ls")...)
	for i := range 3 {
		meta := jetstream.ObjectMeta{Name: fmt.Sprint("r", i), Metadata: map[string]string{"avatar-job-id": fmt.Sprint("j", i)}}
		if _, err := b.h.Recordings.Put(t.Context(), meta, strings.NewReader("frames")); err != nil {
			t.Fatal(err)
		}
	}
	if list := decodeLines[output.Stored](t, expect(t, 0, nil, b.args("recording", "ls", "--json", "--limit", "2")...)); len(list) != 2 || list[0].Name != "r2" || list[0].JobID != "j2" || list[0].Bytes != 6 {
		t.Errorf("%+v", list)
	}
	expect(t, 0, []string{"r1: 6 bytes"}, b.args("recording", "get", "r1")...)
	expect(t, 1, []string{"there is a file r1 already"}, b.args("recording", "get", "r1")...)
	if data, err := os.ReadFile("r1"); err != nil || string(data) != "frames" {
		t.Errorf("%q, %v", data, err)
	}
	if out := expect(t, 0, nil, b.args("recording", "get", "r0", "--out", "-")...); out != "frames" {
		t.Errorf("%q", out)
	}
	expect(t, 1, []string{"recording none not found"}, b.args("recording", "get", "none")...)
	expect(t, 2, []string{"--out"}, b.args("recording", "get", "../x")...)
	if left, err := filepath.Glob(".*"); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestStatusIsWatchedUntilItIsInterrupted(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	w := start(t, "", b.args("status", "--watch", "--every", "200ms")...)
	w.out.await(t, "Storage")
	b.publish(&nats.Msg{Subject: names.Jobs("later"), Data: []byte(`{}`)})
	w.out.await(t, "no worker serves queue later")
	w.interrupt()
	if code := w.wait(); code != 0 {
		t.Errorf("exit %d: %s", code, w.stderr)
	}
	if strings.Contains(w.out.String(), "\x1b") {
		t.Error("a file is not redrawn")
	}
}

func TestAStreamThatIsNearlyFullIsWarnedOf(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	cfg := b.h.Jobs.CachedInfo().Config
	cfg.MaxBytes = 4096
	if _, err := b.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	b.publish(&nats.Msg{Subject: names.Jobs("default"), Data: make([]byte, 3500)})
	expect(t, 0, []string{"warning: stream AVATAR_JOBS is 8", "refuses what is new"}, b.args("status")...)
	f := decode[status.Fleet](t, expect(t, 0, nil, b.args("status", "--json")...))
	if len(f.Storage) != len(names.Kept()) || f.Storage[0].Fill < .8 || f.Storage[0].MaxBytes != 4096 || f.Storage[0].Messages != 1 {
		t.Errorf("%+v", f.Storage)
	}
}

func TestALetterIsCorrectedAndReplayed(t *testing.T) {
	b := newBench(t)
	body := `{"avatar_id":"gone","audio":{"url":"https://h/a.wav"}}`
	for i := range 5 {
		b.letter(fmt.Sprint("j", i), errors.CodeAvatarNotFound, body, time.Now())
	}
	replay := func(want int, texts []string, args ...string) {
		t.Helper()
		expect(t, want, texts, b.args(append([]string{"dlq", "replay"}, args...)...)...)
	}
	replay(2, []string{"avatar_name", "avatar_id"}, "1", "--set", "avatar_name=ok")
	replay(2, []string{"nats", "not of the configuration"}, "1", "--set", "nats.prefix=x")
	replay(2, []string{"one SEQ"}, "--all", "--edit")
	replay(2, []string{"give one of"}, "1", "--set", "avatar_id=x", "--body", "f")
	replay(1, []string{"failed", "nothing was published", "avatar_id"}, "1", "--set", "avatar_id=")
	replay(0, []string{"would_replay", "corrected"}, "1", "--set", "avatar_id=ok", "--dry-run")
	if b.letters() != 5 || b.jobsStored() != 0 {
		t.Fatal("something was changed")
	}
	replay(0, []string{"j0  replayed  run 2", "corrected"}, "1", "--set", "avatar_id=ok")
	replay(0, nil, "2", "--body", writeFile(t, "job.json", []byte(`{"avatar_id":"ok","audio":{"object":"o"}}`)))
	editor := writeFile(t, "editor.sh", []byte("sed -i s/gone/ok/ \"$1\"\n"))
	t.Setenv("VISUAL", "sh "+editor)
	replay(0, []string{"j2  replayed"}, "3", "--edit")
	t.Setenv("VISUAL", "true")
	replay(1, []string{"left as it was"}, "4", "--edit")
	t.Setenv("VISUAL", "truncate -s 3")
	replay(1, []string{"not valid", "nothing was changed"}, "4", "--edit")
	t.Setenv("VISUAL", "")
	t.Setenv("EDITOR", "")
	replay(2, []string{"VISUAL nor EDITOR"}, "4", "--edit")
	if b.letters() != 2 || b.jobsStored() != 3 {
		t.Errorf("%d letters, %d jobs", b.letters(), b.jobsStored())
	}
	replay(0, []string{"2 dead letters, 2 replayed"}, "--code", "avatarNotFound", "--set", "avatar_id=ok")
	for seq := uint64(1); seq <= 5; seq++ {
		m, err := b.h.Jobs.GetMsg(t.Context(), seq)
		if err != nil || !strings.Contains(string(m.Data), `"ok"`) || m.Header.Get("Avatar-Run") != "2" || m.Header.Get("Avatar-Corrected") == "" {
			t.Errorf("%d: %s %v %v", seq, m.Data, m.Header, err)
		}
	}
}
