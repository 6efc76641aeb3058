package dlq_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) { natstest.Main(m) }

var (
	names    = topology.Names{}
	failedAt = time.Date(2026, 3, 1, 12, 0, 0, 5000, time.UTC)
)

type bench struct {
	js     jetstream.JetStream
	h      topology.Handles
	writer *dlq.Writer
	store  *dlq.Store
}

func setup(t testing.TB) bench {
	t.Helper()
	js := natstest.JetStream(t)
	h, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
	if err != nil {
		t.Fatal(err)
	}
	return bench{js: js, h: h, writer: dlq.NewWriter(js, names), store: dlq.NewStore(js, names, func() time.Time { return failedAt.Add(time.Hour) })}
}

func letter(id string, run int) lifecycle.DeadLetter {
	return lifecycle.DeadLetter{
		Job:    jobspec.Identity{ID: id, Run: run, Queue: "default", Subject: "avatar.jobs.default", StreamSeq: 7},
		Header: map[string][]string{"Nats-Msg-Id": {"mine"}, "Content-Type": {"application/json"}, "X-Mine": {"a", "b"}, "traceparent": {"00-ab"}},
		Data:   []byte(`{"avatar_id":"ok"}`),
		Reason: "permanent", Crashes: 1, Attempts: 2, FailedAt: failedAt, Worker: "host",
		Error: event.Error{
			JobID: id, Queue: "default", AppID: "app", AvatarID: "ok", Worker: "host", Run: run, Attempt: 2,
			Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Phase: errors.PhaseHandshake,
			Message: "no such avatar", Action: errors.ActionDeadLetter, Time: failedAt,
		},
	}
}

func write(t testing.TB, b bench, d lifecycle.DeadLetter) {
	t.Helper()
	if err := b.writer.Write(t.Context(), d); err != nil {
		t.Fatal(err)
	}
}

func last(t testing.TB, b bench) *jetstream.RawStreamMsg {
	t.Helper()
	info, err := b.h.DLQ.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	msg, err := b.h.DLQ.GetMsg(t.Context(), info.State.LastSeq)
	if err != nil {
		t.Fatal(err)
	}
	return msg
}

func TestDeadLetterHasTheContractsSubjectHeadersAndTheJobsOwnBytes(t *testing.T) {
	t.Parallel()
	b := setup(t)
	write(t, b, letter("j1", 3))
	m := last(t, b)
	if m.Subject != "avatar.dlq.config.avatarNotFound" || string(m.Data) != `{"avatar_id":"ok"}` {
		t.Errorf("got %s %s", m.Subject, m.Data)
	}
	for name, want := range map[string]string{
		"Nats-Msg-Id": "j1.run3.dead", "Avatar-Msg-Id": "mine", "Avatar-Job-Id": "j1", "Avatar-Run": "3", "Avatar-Crashes": "1",
		"Avatar-Queue": "default", "Avatar-Subject": "avatar.jobs.default", "Avatar-Stream-Seq": "7",
		"Avatar-Error-Code": "avatarNotFound", "Avatar-Error-Class": "config", "Avatar-Error-Phase": "websocket_handshake",
		"Avatar-Reason": "permanent", "Avatar-Attempts": "2", "Avatar-Failed-At": "2026-03-01T12:00:00.000005Z", "Avatar-Worker": "host",
		"Content-Type": "application/json", "traceparent": "00-ab", "X-Mine": "a",
	} {
		if got := m.Header.Get(name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	if len(m.Header["X-Mine"]) != 2 {
		t.Errorf("X-Mine: %v", m.Header["X-Mine"])
	}
	var event event.Error
	if err := json.Unmarshal([]byte(m.Header.Get("Avatar-Error")), &event); err != nil || event.Message != "no such avatar" {
		t.Errorf("Avatar-Error: %v, %+v", err, event)
	}
}

func TestSameLetterIsStoredOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	again := letter("j1", 1)
	again.Error.Code, again.Error.Class = errors.CodeInternal, errors.ClassInternal
	for _, d := range []lifecycle.DeadLetter{letter("j1", 1), letter("j1", 1), again, letter("j1", 2)} {
		write(t, b, d)
	}
	info, err := b.h.DLQ.Info(t.Context())
	if err != nil || info.State.Msgs != 2 {
		t.Fatalf("%d letters, %v; want one for each run", info.State.Msgs, err)
	}
}

func TestJobWhoseIDIsUsedAgainHasALetterOfItsOwn(t *testing.T) {
	t.Parallel()
	for name, removed := range map[string]bool{"the earlier job's is there": false, "the earlier job's was removed": true} {
		t.Run(name, func(t *testing.T) {
			b := setup(t)
			write(t, b, letter("j1", 1))
			if removed {
				remove(t, b, 1)
			}
			again := letter("j1", 1)
			again.Job.StreamSeq, again.Data, again.LettersBefore = 8, []byte("again"), newest(t, b)
			for range 2 {
				write(t, b, again)
			}
			m := last(t, b)
			if m.Sequence != 2 || string(m.Data) != "again" || m.Header.Get("Nats-Msg-Id") != "j1.run1.dead.8" {
				t.Errorf("letter %d is %s %v", m.Sequence, m.Data, m.Header)
			}
		})
	}
}

func TestLetterThatWasRemovedIsNotWrittenAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	first, again := letter("j1", 1), letter("j1", 1)
	write(t, b, first)
	again.Job.StreamSeq, again.LettersBefore = 8, newest(t, b)
	write(t, b, again)
	remove(t, b, 1)
	remove(t, b, 2)
	write(t, b, first)
	write(t, b, again)
	expectCounts(t, b, 0, 0)
}

func newest(t *testing.T, b bench) uint64 {
	t.Helper()
	seq, err := b.writer.Last(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return seq
}

func remove(t *testing.T, b bench, seq uint64) {
	t.Helper()
	if err := b.store.Remove(t.Context(), seq); err != nil {
		t.Fatal(err)
	}
}

func TestHeadersThatTheServerActsOnDoNotTakeEffect(t *testing.T) {
	t.Parallel()
	b := setup(t)
	write(t, b, letter("j0", 1))
	d := letter("j1", 1)
	d.Header = map[string][]string{
		"Nats-Expected-Last-Sequence": {"99"}, "Nats-Expected-Last-Msg-Id": {"x"}, "Nats-Expected-Stream": {"OTHER"},
		"Nats-TTL": {"1s"}, "Nats-Rollup": {"all"}, "Nats-Schedule": {"@at 2030-01-01T00:00:00Z"}, "nats-ttl": {"2s"},
		"Avatar-Reason": {"forged"}, "avatar-reason": {"forged"},
	}
	write(t, b, d)
	m := last(t, b)
	if m.Header.Get("Avatar-Orig-Nats-TTL") != "1s" || m.Header.Get("Nats-TTL") != "" || m.Header.Get("Avatar-Reason") != "permanent" || m.Header.Get("avatar-reason") != "" {
		t.Errorf("headers: %v", m.Header)
	}
	info, err := b.h.DLQ.Info(t.Context())
	if err != nil || info.State.Msgs != 2 {
		t.Fatalf("%d letters, %v", info.State.Msgs, err)
	}
}

func size(h nats.Header) (n int) {
	for name, values := range h {
		for _, v := range values {
			n += len(name) + len(v) + 4
		}
	}
	return n
}

func TestErrorIsValidJSONOfAtMost4KiBWhateverItSays(t *testing.T) {
	t.Parallel()
	b := setup(t)
	labels := map[string]string{}
	for i := range 16 {
		labels[fmt.Sprintf("%d%s", i, strings.Repeat("k", 250))] = strings.Repeat("\x01", 256)
	}
	for name, change := range map[string]func(*event.Error){
		"long message": func(e *event.Error) { e.Message = strings.Repeat("ä€", 50_000) },
		"all long": func(e *event.Error) {
			long := strings.Repeat("\x02\"", 10_000)
			e.Message, e.ServerCode, e.ServerTitle, e.ServerDetail, e.CloseReason, e.ReqID, e.Queue, e.AppID = long, long, long, long, long, long, long, long
			e.AvatarID, e.Region, e.Worker, e.WorkerID, e.ConnectionID = long, long, long, long, long
		},
		"many labels":    func(e *event.Error) { e.Labels = labels },
		"no valid UTF-8": func(e *event.Error) { e.Message = strings.Repeat("\xff\xfe", 9_000) },
	} {
		d := letter(strings.ReplaceAll(name, " ", "-"), 1)
		change(&d.Error)
		write(t, b, d)
		h := last(t, b).Header
		text := h.Get("Avatar-Error")
		var event event.Error
		if err := json.Unmarshal([]byte(text), &event); err != nil || len(text) > 4096 {
			t.Errorf("%s: %d bytes, %v", name, len(text), err)
		}
		if event.JobID != d.Job.ID || event.Code != errors.CodeAvatarNotFound || event.Message == "" {
			t.Errorf("%s: %s", name, text)
		}
		if n := size(h); n > 32<<10 {
			t.Errorf("%s: %d bytes of headers", name, n)
		}
	}
	if len(labels) != 16 || len(labels["0"+strings.Repeat("k", 250)]) != 256 {
		t.Error("the caller's labels were changed")
	}
}

// noise does not compress.
func noise(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func TestEveryJobCanBecomeADeadLetter(t *testing.T) {
	t.Parallel()
	b := setup(t)
	payload := int(b.js.Conn().MaxPayload())
	for name, tc := range map[string]struct {
		change func(*lifecycle.DeadLetter)
		check  func(h nats.Header) bool
	}{
		"largest that the jobs stream takes": {
			func(d *lifecycle.DeadLetter) {
				d.Data = noise(payload - 64<<10 - 200)
				d.Error.Message = strings.Repeat("m", 100_000)
			},
			func(h nats.Header) bool { return h.Get(dlq.HeaderDropped) == "" && h.Get(dlq.HeaderEncoding) == "" },
		},
		"headers as large as the server takes": {
			func(d *lifecycle.DeadLetter) {
				d.Header["X-Big"] = []string{strings.Repeat("b", 42<<10)}
				d.Header["Nats-Msg-Id"] = []string{strings.Repeat("i", 20<<10)}
				d.Error.Message = strings.Repeat("m", 100_000)
			},
			func(h nats.Header) bool {
				return h.Get("X-Big") == "" && strings.Contains(h.Get(dlq.HeaderDropped), "X-Big (430") && h.Get("Content-Type") != "" && h.Get("X-Mine") == "a"
			},
		},
		"thousands of headers": {
			func(d *lifecycle.DeadLetter) {
				for i := range 3000 {
					d.Header["X-"+strconv.Itoa(i)] = []string{"0123456789"}
				}
				d.Header["Nats-TTL"] = []string{"9s"}
			},
			func(h nats.Header) bool { return h.Get("Content-Type") != "" && len(h.Get(dlq.HeaderDropped)) <= 1<<10 },
		},
		"body of the payload limit": {
			func(d *lifecycle.DeadLetter) { d.Data = bytes.Repeat([]byte("{}  "), payload/4) },
			func(h nats.Header) bool { return h.Get(dlq.HeaderEncoding) == "gzip" },
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := letter(strings.ReplaceAll(name, " ", "-"), 1)
			tc.change(&d)
			write(t, b, d)
			m := last(t, b)
			if !tc.check(m.Header) {
				t.Errorf("dropped %q, encoding %q", m.Header.Get(dlq.HeaderDropped), m.Header.Get(dlq.HeaderEncoding))
			}
			l, err := b.store.Show(t.Context(), m.Sequence)
			if err != nil || !bytes.Equal(l.Data, d.Data) {
				t.Fatalf("the job's bytes are not its own: %d of %d, %v", len(l.Data), len(d.Data), err)
			}
			r, err := b.store.Replay(t.Context(), m.Sequence, dlq.ReplayOptions{DryRun: true})
			if err != nil || r.Status != dlq.StatusWouldReplay {
				t.Fatalf("got %+v, %v", r, err)
			}
		})
	}
}

func TestBytesThatCannotFitAreLeftOutWithANote(t *testing.T) {
	t.Parallel()
	b := setup(t)
	d := letter("j1", 1)
	d.Data = noise(int(b.js.Conn().MaxPayload()))
	write(t, b, d)
	m := last(t, b)
	if want := fmt.Sprintf("%d bytes", len(d.Data)); m.Header.Get(dlq.HeaderOmitted) != want || len(m.Data) != 0 {
		t.Fatalf("got %q, %d bytes", m.Header.Get(dlq.HeaderOmitted), len(m.Data))
	}
	if _, err := b.store.Replay(t.Context(), m.Sequence, dlq.ReplayOptions{}); err == nil || !strings.Contains(err.Error(), "--body FILE, or publish the job again") {
		t.Fatalf("got %v", err)
	}
}

func TestWriteWithoutAServerIsAnError(t *testing.T) {
	t.Parallel()
	srv := natstest.Start(t)
	js, err := jetstream.New(natstest.Connect(t, srv, nats.ReconnectBufSize(-1), nats.MaxReconnects(-1)))
	if err != nil {
		t.Fatal(err)
	}
	w := dlq.NewWriter(js, names)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := w.Write(ctx, letter("j1", 1)); err == nil || !strings.Contains(err.Error(), "dead letter of job j1") {
		t.Fatalf("without a stream: %v", err)
	}
	if err := srv.Shutdown(); err != nil {
		t.Fatal(err)
	}
	if err := w.Write(ctx, letter("j1", 1)); err == nil {
		t.Fatal("without a server: no error")
	}
}

func TestLetterIsWrittenAgainUntilItIsStored(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := b.js.DeleteStream(ctx, names.DLQStream()); err != nil {
		t.Fatal(err)
	}
	tries := make(chan *nats.Msg, 64)
	if _, err := b.js.Conn().ChanSubscribe(names.AllDLQ(), tries); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- b.writer.Write(ctx, letter("j1", 1)) }()
	for range 2 {
		select {
		case <-tries:
		case err := <-written:
			t.Fatalf("given up: %v", err)
		}
	}
	h, _, err := topology.Ensure(ctx, b.js, names, topology.DefaultSettings())
	if err != nil {
		t.Fatal(err)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if info, err := h.DLQ.Info(ctx); err != nil || info.State.Msgs != 1 {
		t.Errorf("%+v, %v: want one letter", info, err)
	}
}
