package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/terminal"
)

// demoJob is a job of the show and how it is announced to end.
type demoJob struct {
	id       string
	about    string
	body     []byte
	expected lifecycle.State
	code     errors.Code // of the dead letter
	attempts int

	got    lifecycle.Record
	frames int
	bytes  int64
	letter string // subject of its dead letter
	wrong  string // what is not as announced
}

// demoJobs are jobs that complete, expire or become dead letters.
func demoJobs(now time.Time) []*demoJob {
	speech := map[string]any{"inline": base64.StdEncoding.EncodeToString(clip.WAV)}
	job := func(id, about, avatar string, expected lifecycle.State, code errors.Code, attempts int, extra map[string]any) *demoJob {
		body := map[string]any{"id": id, "avatar_id": avatar, "audio": speech, "labels": map[string]string{"demo": "true"}}
		for k, v := range extra {
			body[k] = v
		}
		if body["utterances"] != nil {
			delete(body, "audio")
		}
		data, err := json.Marshal(body)
		if err != nil {
			data = nil // maps of strings always encode
		}
		return &demoJob{id: id, about: about, body: data, expected: expected, code: code, attempts: attempts}
	}
	room := map[string]any{"url": "wss://room.example.com", "room_name": "lobby", "publisher_id": "avatar", "api_token": "demo-room-token"}
	return []*demoJob{
		job("demo-frames", "frames on a NATS subject", "ok", lifecycle.StateCompleted, "", 1, nil),
		job("demo-object", "frames recorded in an object", "ok", lifecycle.StateCompleted, "", 1, map[string]any{"output": map[string]any{"object": map[string]any{}}}),
		job("demo-egress", "the backend publishes into a LiveKit room", "ok", lifecycle.StateCompleted, "", 1, map[string]any{"output": map[string]any{"livekit": room}}),
		job("demo-talk", "two utterances in one session", "ok", lifecycle.StateCompleted, "", 1, map[string]any{"utterances": []any{speech, speech}}),
		job("demo-flaky", "the connection breaks twice, then holds", "flaky-connectionClosed-2", lifecycle.StateCompleted, "", 3, nil),
		job("demo-unknown-avatar", "a mistake that no retry corrects", "fail-avatarNotFound", lifecycle.StateDeadLettered, errors.CodeAvatarNotFound, 1, nil),
		job("demo-typo", "a field that is not known", "ok", lifecycle.StateDeadLettered, errors.CodeInvalidJob, 0, map[string]any{"avatar_idd": "ok"}),
		job("demo-late", "its deadline has passed", "ok", lifecycle.StateExpired, "", 0, map[string]any{"deadline": now.Add(-time.Minute).UTC().Format(time.RFC3339)}),
	}
}

// show publishes the jobs, prints what happens to them and checks how they end.
type show struct {
	stage   *stage
	started time.Time
	jobs    []*demoJob
}

func (s *show) run(ctx context.Context) (ok bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, demoTimeout, fmt.Errorf("not all jobs ended within %s", demoTimeout))
	defer cancel()
	s.stage.printf("NATS at %s, a simulated backend at %s, one worker. Eight jobs:\n", s.stage.server.ClientURL(), s.stage.backend.URL())
	news := make(chan *nats.Msg, 1024)
	for _, subject := range []string{s.stage.names.AllEvents(), s.stage.names.AllErrors(), s.stage.names.AllAlerts()} {
		if _, err := s.stage.nc.ChanSubscribe(subject, news); err != nil { // until the connection closes
			return false, err
		}
	}
	for _, j := range s.jobs {
		msg := &nats.Msg{Subject: s.stage.names.Jobs("default"), Data: j.body, Header: nats.Header{jetstream.MsgIDHeader: {j.id}}}
		if _, err := s.stage.js.PublishMsg(ctx, msg); err != nil {
			return false, fmt.Errorf("publish %s: %w", j.id, err)
		}
		s.stage.printf("  %-20s %s", j.id, j.about)
	}
	s.stage.printf("")
	if err := s.follow(ctx, news); err != nil {
		return false, err
	}
	return s.check(ctx)
}

// follow prints what happens until every job has its outcome.
func (s *show) follow(ctx context.Context, news <-chan *nats.Msg) error {
	open := make(map[string]bool, len(s.jobs))
	for _, j := range s.jobs {
		open[j.id] = true
	}
	for len(open) > 0 {
		select {
		case msg := <-news:
			s.printEvent(msg)
			if lifecycle.State(token(msg.Subject, 2)).Final() {
				delete(open, token(msg.Subject, 3))
			}
		case err := <-s.stage.failed:
			return errors.Join(errors.New("the worker ended"), err)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// token is the nth token of a subject, from 0.
func token(subject string, n int) string {
	parts := bytes.Split([]byte(subject), []byte("."))
	if n >= len(parts) {
		return ""
	}
	return string(parts[n])
}

// printEvent prints an event in a line.
func (s *show) printEvent(msg *nats.Msg) {
	var e struct {
		JobID   string     `json:"job_id"`
		AppID   string     `json:"app_id"`
		Code    string     `json:"code"`
		Phase   string     `json:"phase"`
		Message string     `json:"message"`
		Attempt int        `json:"attempt"`
		RetryAt *time.Time `json:"retry_at"`
		Reason  string     `json:"reason"`
		Action  string     `json:"action"`
	}
	if err := json.Unmarshal(msg.Data, &e); err != nil {
		return // not a worker's
	}
	kind := token(msg.Subject, 2)
	var what string
	switch token(msg.Subject, 1) {
	case "errors":
		kind = "error"
		what = fmt.Sprintf("%s in %s: %s (%s)", e.Code, e.Phase, terminal.Short(e.Message, 90), e.Action)
	case "alerts":
		what = e.Message
	default:
		switch {
		case e.RetryAt != nil:
			what = fmt.Sprintf("attempt %d failed; again in %s", e.Attempt, max(0, time.Until(*e.RetryAt)).Round(time.Millisecond))
		case kind == event.TypeStarted:
			what = "attempt " + strconv.Itoa(e.Attempt)
		default:
			what = e.Reason
		}
	}
	s.stage.printf("%6.2fs  %-20s %s  %s", time.Since(s.started).Seconds(), terminal.Plain(e.JobID),
		s.stage.c.colour(s.stage.c.stdout, kindColour(kind), fmt.Sprintf("%-13s", kind)), terminal.Plain(what))
}

func kindColour(kind string) terminal.Colour {
	switch kind {
	case "error", event.TypeDeadLettered:
		return terminal.Red
	case event.TypeCompleted:
		return terminal.Green
	case event.TypeRetrying, event.TypeHeld, event.TypeExpired:
		return terminal.Yellow
	default:
		return terminal.Default
	}
}

// check compares what is stored of each job with what was announced.
func (s *show) check(ctx context.Context) (ok bool, err error) {
	ok = true
	for _, j := range s.jobs {
		if err := s.inspect(ctx, j); err != nil {
			return false, fmt.Errorf("%s: %w", j.id, err)
		}
		ok = ok && j.wrong == ""
	}
	return ok, nil
}

func (s *show) inspect(ctx context.Context, j *demoJob) error {
	kv, err := s.stage.js.KeyValue(ctx, s.stage.names.StateBucket())
	if err != nil {
		return err
	}
	entry, err := kv.Get(ctx, j.id)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(entry.Value(), &j.got); err != nil {
		return err
	}
	for _, u := range j.got.Utterances {
		j.frames += u.Frames
		j.bytes += u.Bytes
	}
	switch {
	case j.got.State != j.expected:
		j.wrong = fmt.Sprintf("%s instead of %s", j.got.State, j.expected)
	case j.got.Attempt != j.attempts && j.expected == lifecycle.StateCompleted:
		j.wrong = fmt.Sprintf("%d attempts instead of %d", j.got.Attempt, j.attempts)
	case j.code != "" && (j.got.LastError == nil || j.got.LastError.Code != j.code):
		j.wrong = fmt.Sprintf("not dead-lettered for %s", j.code)
	}
	if j.expected == lifecycle.StateDeadLettered && j.got.LastError != nil {
		return s.inspectLetter(ctx, j)
	}
	return nil
}

// inspectLetter checks that the dead letter has the job's own bytes.
func (s *show) inspectLetter(ctx context.Context, j *demoJob) error {
	stream, err := s.stage.js.Stream(ctx, s.stage.names.DLQStream())
	if err != nil {
		return err
	}
	j.letter = s.stage.names.DLQ(string(j.got.LastError.Class), string(j.got.LastError.Code))
	msg, err := stream.GetLastMsgForSubject(ctx, j.letter)
	if err != nil {
		return fmt.Errorf("dead letter on %s: %w", j.letter, err)
	}
	if !bytes.Equal(msg.Data, j.body) {
		j.wrong = "the dead letter does not have the job's own bytes"
	}
	return nil
}

// demoSummary is what --json prints.
type demoSummary struct {
	OK   bool            `json:"ok"`
	Jobs []demoJobResult `json:"jobs"`
}

type demoJobResult struct {
	ID         string          `json:"id"`
	Expected   lifecycle.State `json:"expected"`
	Outcome    lifecycle.State `json:"outcome"`
	Code       errors.Code     `json:"code"`
	Class      errors.Class    `json:"class"`
	Attempts   int             `json:"attempts"`
	Frames     int             `json:"frames"`
	Bytes      int64           `json:"bytes"`
	DeadLetter string          `json:"dead_letter"` // its subject; "" if there is none
}

func (s *show) summary(ok bool) demoSummary {
	out := demoSummary{OK: ok, Jobs: []demoJobResult{}}
	for _, j := range s.jobs {
		r := demoJobResult{
			ID: j.id, Expected: j.expected, Outcome: j.got.Outcome, Attempts: j.got.Attempt,
			Frames: j.frames, Bytes: j.bytes, DeadLetter: j.letter,
		}
		switch {
		case j.got.Outcome == lifecycle.StateExpired: // as its event says
			r.Code, r.Class = errors.CodeDeadlineExceeded, errors.ClassJob
		case j.got.LastError != nil:
			r.Code, r.Class = j.got.LastError.Code, j.got.LastError.Class
		}
		out.Jobs = append(out.Jobs, r)
	}
	return out
}

func (s *show) printSummary(ok bool) error {
	s.stage.printf("")
	t := terminal.NewTable(s.stage.c.stdout, "JOB", "OUTCOME", "LAST ERROR", "ATTEMPTS", "FRAMES", "BYTES", "DEAD LETTER")
	for _, r := range s.summary(ok).Jobs {
		t.Row(r.ID, r.Outcome, terminal.OrDash(string(r.Code)), r.Attempts, r.Frames, r.Bytes, terminal.OrDash(r.DeadLetter))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	s.stage.printf("")
	for _, j := range s.jobs {
		if j.wrong != "" {
			s.stage.printf("%s: %s", j.id, j.wrong)
		}
	}
	if ok {
		s.stage.printf("Every job ended as announced.")
	}
	return nil
}
