package operate_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
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

// letterCount is how many there are; 100000 is what was promised.
var letterCount = flag.Int("letters", 20_000, "dead letters that are listed")

// maxResident is what a listing may take, in KiB.
const maxResident = 100 << 10

func TestListOfManyDeadLettersReadsOnlyWhatItShows(t *testing.T) {
	server := natstest.Start(t)
	nc := natstest.Connect(t, server)
	fill(t, nc, *letterCount)
	var read atomic.Int64
	tap, err := nc.Subscribe("_INBOX.>", func(m *nats.Msg) {
		if m.Header.Get(dlq.HeaderJobID) != "" {
			read.Add(1)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := tap.SetPendingLimits(-1, -1); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	env := []string{"NATS_URL=" + server.ClientURL()}
	for _, c := range []struct {
		args  []string
		shown int
		most  int64 // read
	}{
		{[]string{"--limit", "20"}, 20, 100},
		{[]string{"--limit", "20", "--newest"}, 20, 600},
		{[]string{"--limit", "20", "--code", "serverError"}, 20, 100},
		{[]string{"--limit", "20", "--code", "workerLost"}, 0, 0},
		{[]string{"--all"}, *letterCount, 2 * int64(*letterCount)},
	} {
		read.Store(0)
		began := time.Now()
		out, resident := callMeasured(t, env, append([]string{"dlq", "ls", "--json"}, c.args...)...)
		took := time.Since(began)
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		if shown := len(decode[[]any](t, out)); shown != c.shown {
			t.Errorf("%v: %d shown, want %d", c.args, shown, c.shown)
		}
		if read.Load() > c.most {
			t.Errorf("%v: read %d letters, want at most %d", c.args, read.Load(), c.most)
		}
		if resident > maxResident {
			t.Errorf("%v: %d KiB resident, want at most %d", c.args, resident, maxResident)
		}
		t.Logf("dlq ls %v on %d: %s, %d KiB resident, %d letters read", c.args, *letterCount, took.Round(time.Millisecond), resident, read.Load())
	}
}

// measureInto names the file that takes the resident memory of a program which
// this test program starts: measured in the tests' own process, a child would
// begin with the high mark of its parent.
const measureInto = "OPERATE_MEASURE_INTO"

func measured(file string) int {
	cmd := exec.Command(os.Args[1], os.Args[2:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return 1
	}
	if err := os.WriteFile(file, []byte(strconv.FormatInt(usage.Maxrss, 10)), 0o600); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// callMeasured returns what the program printed, and its resident memory in KiB.
func callMeasured(t *testing.T, env []string, args ...string) (stdout string, resident int64) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "resident")
	cmd := exec.Command(os.Args[0], append([]string{binary}, args...)...)
	cmd.Env = append([]string{measureInto + "=" + file}, env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("worker %v: %v\n%s", args, err, &stderr)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	resident, err = strconv.ParseInt(string(text), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return string(out), resident
}

// fill gives n jobs up, every tenth with another code.
func fill(t *testing.T, nc *nats.Conn, n int) {
	t.Helper()
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(n))
	if err != nil {
		t.Fatal(err)
	}
	names := topology.Names{Prefix: "avatar"}
	settings := topology.DefaultSettings()
	settings.Queues = []string{"default"}
	h, _, err := topology.Ensure(t.Context(), js, names, settings)
	if err != nil {
		t.Fatal(err)
	}
	var patterns []*jetstream.RawStreamMsg
	for i, code := range []errors.Code{errors.CodeAvatarNotFound, errors.CodeServerError} {
		err := dlq.NewWriter(js, names).Write(t.Context(), lifecycle.DeadLetter{
			Job:    jobspec.Identity{ID: fmt.Sprintf("first-%d", i), Run: 1, Queue: "default", Subject: names.Jobs("default"), StreamSeq: 1},
			Data:   []byte(`{"avatar_id":"a","audio":{"object":"speech"}}`),
			Reason: lifecycle.ReasonPermanent, Attempts: 1, FailedAt: time.Now(), Worker: "host",
			Error: event.Error{JobID: "first", Queue: "default", AppID: "app", AvatarID: "a", Code: code, Class: code.Class(), Phase: errors.PhaseConnect, Message: "refused"},
		})
		if err != nil {
			t.Fatal(err)
		}
		pattern, err := h.DLQ.GetMsg(t.Context(), uint64(i+1))
		if err != nil {
			t.Fatal(err)
		}
		patterns = append(patterns, pattern)
	}
	for i := 2; i < n; i++ {
		pattern := patterns[0]
		if i%10 == 0 {
			pattern = patterns[1]
		}
		msg := &nats.Msg{Subject: pattern.Subject, Data: pattern.Data, Header: nats.Header{}}
		for name, values := range pattern.Header {
			msg.Header[name] = values
		}
		id := fmt.Sprintf("job-%d", i)
		msg.Header.Set(dlq.HeaderJobID, id)
		msg.Header.Set("Nats-Msg-Id", id+".run1.dead")
		if _, err := js.PublishMsgAsync(msg); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-time.After(patience):
		t.Fatal("the dead letters are not stored")
	}
}
