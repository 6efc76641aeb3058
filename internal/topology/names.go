// Package topology owns the names and settings of everything that the worker keeps
// in NATS: subjects, streams, consumers and buckets. It makes what is missing and
// reports what exists with other settings, without changing it. It knows nothing
// of jobs.
package topology

import (
	"cmp"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// DefaultPrefix is the first token of every subject unless nats.prefix says
// otherwise.
const DefaultPrefix = "avatar"

// Names gives the names of subjects, streams and buckets under one prefix. An
// empty Prefix is DefaultPrefix.
//
// A token taken from outside (a job id, a code, a worker's name) is put into a
// subject as Token gives it, so that no name can address another subject.
type Names struct{ Prefix string }

var tokenPattern = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// Validate returns an error if the prefix can't be used in subjects and names of
// streams.
func (n Names) Validate() error {
	if !tokenPattern.MatchString(n.prefix()) {
		return fmt.Errorf("nats.prefix %q: only letters, digits, '-' and '_' are allowed", n.Prefix)
	}
	return nil
}

// ValidQueue returns an error if a queue's name can't be both a subject token and
// the name of a consumer.
func ValidQueue(queue string) error {
	if !tokenPattern.MatchString(queue) {
		return fmt.Errorf("queue %q: only letters, digits, '-' and '_' are allowed", queue)
	}
	return nil
}

func (n Names) prefix() string {
	return cmp.Or(n.Prefix, DefaultPrefix)
}

// Token makes one subject token (or one part of a bucket's key) of any text:
// letters, digits, '-' and '_' stay, any other byte becomes "=XX" in hex, and
// the empty text "=". Different texts give different tokens.
func Token(text string) string {
	if text == "" {
		return "="
	}
	if isPlain(text) {
		return text
	}
	var b strings.Builder
	for i := range len(text) {
		if c := text[i]; plain(c) {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "=%02X", c)
		}
	}
	return b.String()
}

// textOf gives the text back that Token was given.
func textOf(token string) (string, bool) {
	if token == "=" {
		return "", true
	}
	if !strings.Contains(token, "=") {
		return token, true
	}
	var b strings.Builder
	for i := 0; i < len(token); i++ {
		if token[i] != '=' {
			b.WriteByte(token[i])
			continue
		}
		if i+3 > len(token) {
			return "", false
		}
		c, err := strconv.ParseUint(token[i+1:i+3], 16, 8)
		if err != nil {
			return "", false
		}
		b.WriteByte(byte(c))
		i += 2
	}
	return b.String(), true
}

func isPlain(text string) bool {
	for i := range len(text) {
		if !plain(text[i]) {
			return false
		}
	}
	return true
}

func plain(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_'
}

func (n Names) subject(kind string, tokens ...string) string {
	var b strings.Builder
	b.WriteString(n.prefix())
	b.WriteByte('.')
	b.WriteString(kind)
	for _, t := range tokens {
		b.WriteByte('.')
		b.WriteString(t)
	}
	return b.String()
}

// wild is the token of a filter: empty text matches any.
func wild(text string) string {
	if text == "" {
		return "*"
	}
	return Token(text)
}

// Jobs is where a job for the queue is published.
func (n Names) Jobs(queue string) string { return n.subject("jobs", Token(queue)) }

// AllJobs matches the jobs of every queue.
func (n Names) AllJobs() string { return n.subject("jobs", "*") }

// QueueOf returns the queue of a job's subject, and false if the subject is not one
// that Jobs returns.
func (n Names) QueueOf(subject string) (string, bool) {
	queue, ok := strings.CutPrefix(subject, n.subject("jobs")+".")
	return queue, ok && tokenPattern.MatchString(queue)
}

// Errors is where the error event of a failed attempt goes.
func (n Names) Errors(class, code string) string {
	return n.subject("errors", Token(class), Token(code))
}

// AllErrors matches every error event.
func (n Names) AllErrors() string { return n.subject("errors", ">") }

// Alerts is where an alert goes: kind is recurring, circuit_opened, circuit_closed,
// storage, worker_key, unsettled or budget.
func (n Names) Alerts(kind, code string) string { return n.subject("alerts", Token(kind), Token(code)) }

// AllAlerts matches every alert.
func (n Names) AllAlerts() string { return n.subject("alerts", ">") }

// Events is where a job event goes: typ is started, retrying, completed, …
func (n Names) Events(typ, jobID string) string { return n.subject("events", Token(typ), Token(jobID)) }

// EventsFilter matches the job events of a type and a job; empty text matches
// any.
func (n Names) EventsFilter(typ, jobID string) string {
	return n.subject("events", wild(typ), wild(jobID))
}

// AllEvents matches every job event.
func (n Names) AllEvents() string { return n.subject("events", ">") }

// DLQ is where a dead letter goes.
func (n Names) DLQ(class, code string) string { return n.subject("dlq", Token(class), Token(code)) }

// DLQFilter matches the dead letters of a class and a code; empty text matches
// any.
func (n Names) DLQFilter(class, code string) string { return n.subject("dlq", wild(class), wild(code)) }

// AllDLQ matches every dead letter.
func (n Names) AllDLQ() string { return n.subject("dlq", ">") }

// DLQOf gives the class and code tokens of a dead letter's subject.
func (n Names) DLQOf(subject string) (class, code string, ok bool) {
	rest, ok := strings.CutPrefix(subject, n.subject("dlq")+".")
	if !ok {
		return "", "", false
	}
	class, code, ok = strings.Cut(rest, ".")
	return class, code, ok
}

// Frames is where the frames of a job go whose output is frames.
func (n Names) Frames(jobID string) string { return n.subject("frames", Token(jobID)) }

// AllFrames matches the frames of every job.
func (n Names) AllFrames() string { return n.subject("frames", "*") }

// Audio is where the speech of a live job comes from, chunk by chunk.
func (n Names) Audio(jobID string) string { return n.subject("audio", Token(jobID)) }

// allAudio matches the speech of every live job.
func (n Names) allAudio() string { return n.subject("audio", "*") }

// Control is where a running job is interrupted or cancelled (request/reply,
// kept nowhere).
func (n Names) Control(jobID string) string { return n.subject("control", Token(jobID)) }

// AllControl matches the control requests of every job.
func (n Names) AllControl() string { return n.subject("control", "*") }

// Usage is where the usage record of a session goes.
func (n Names) Usage(app, queue string) string { return n.subject("usage", Token(app), Token(queue)) }

// AllUsage matches every usage record.
func (n Names) AllUsage() string { return n.subject("usage", "*", "*") }

// Totals names a counter. family is one token that says what it adds up. It counts the
// sessions of a period (YYYY-MM-DD or YYYY-MM), an app and a queue; with labels, each
// "name=value", only those that have them.
func (n Names) Totals(family, period, app, queue string, labels ...string) string {
	tokens := make([]string, 0, 4+len(labels))
	tokens = append(tokens, family, period, Token(app), Token(queue))
	for _, l := range labels {
		tokens = append(tokens, Token(l))
	}
	return n.subject("totals", tokens...)
}

// TotalsOf gives back what Totals was given; false if the subject is not one that
// Totals gives.
func (n Names) TotalsOf(subject string) (family, period, app, queue string, labels []string, ok bool) {
	rest, ok := strings.CutPrefix(subject, n.prefix()+".totals.")
	tokens := strings.Split(rest, ".")
	if !ok || len(tokens) < 4 {
		return "", "", "", "", nil, false
	}
	texts := make([]string, len(tokens)-2)
	for i, t := range tokens[2:] {
		if texts[i], ok = textOf(t); !ok {
			return "", "", "", "", nil, false
		}
	}
	return tokens[0], tokens[1], texts[0], texts[1], texts[2:], true
}

// TotalsFilter matches the counters of a family and a period; an empty period
// matches any.
func (n Names) TotalsFilter(family, period string) string {
	if period == "" {
		return n.subject("totals", family, ">")
	}
	return n.subject("totals", family, period, ">")
}

// TotalsUpto is the counter whose header says up to which usage record all others of
// a set of labels are complete.
func (n Names) TotalsUpto(set string) string { return n.subject("totals", "upto", set) }

// AllTotals matches every counter.
func (n Names) AllTotals() string { return n.subject("totals", ">") }

// WorkerState is where a worker is asked for its state (request/reply, kept
// nowhere).
func (n Names) WorkerState(workerID string) string {
	return n.subject("workers", Token(workerID), "state")
}

// WorkerDrain is where a worker is asked to drain (request/reply, kept nowhere).
func (n Names) WorkerDrain(workerID string) string {
	return n.subject("workers", Token(workerID), "drain")
}

// AllWorkerDrains matches the requests to drain of every worker.
func (n Names) AllWorkerDrains() string { return n.subject("workers", "*", "drain") }

func (n Names) kept(name string) string { return strings.ToUpper(n.prefix()) + "_" + name }

// JobsStream is the work queue of jobs.
func (n Names) JobsStream() string { return n.kept("JOBS") }

// EventsStream keeps error events, alerts and job events.
func (n Names) EventsStream() string { return n.kept("EVENTS") }

// DLQStream keeps the dead letters.
func (n Names) DLQStream() string { return n.kept("DLQ") }

// FramesStream keeps frames until they age out.
func (n Names) FramesStream() string { return n.kept("FRAMES") }

// AudioStream keeps live speech until it ages out.
func (n Names) AudioStream() string { return n.kept("AUDIO") }

// UsageStream keeps one record for each session that was confirmed.
func (n Names) UsageStream() string { return n.kept("USAGE") }

// TotalsStream keeps the counters of each day's and month's sessions.
func (n Names) TotalsStream() string { return n.kept("TOTALS") }

// StateBucket is the key-value bucket of job records, by job id, and of the keys
// that workers hold: their leases and session limits.
func (n Names) StateBucket() string { return n.kept("STATE") }

// FleetBucket is the key-value bucket of what workers share.
func (n Names) FleetBucket() string { return n.kept("FLEET") }

// AudioFilesBucket is the object bucket of uploaded speech.
func (n Names) AudioFilesBucket() string { return n.kept("AUDIO_FILES") }

// RecordingsBucket is the object bucket of recorded frames.
func (n Names) RecordingsBucket() string { return n.kept("RECORDINGS") }

// Unavailable explains err, the failure to open what: "stream AVATAR_JOBS" or
// "bucket AVATAR_STATE". The error says what to do where it is missing, or
// JetStream is, or where the user does not reach it.
func (n Names) Unavailable(what string, err error) error {
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound), errors.Is(err, jetstream.ErrBucketNotFound):
		return fmt.Errorf("%s not found: no worker has run here with nats.prefix %q yet, or it was deleted; 'avatarworker setup' makes it", what, n.prefix())
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		return fmt.Errorf("%s: JetStream is not enabled on this NATS server, or not for this account", what)
	case errors.Is(err, nats.ErrNoResponders):
		return fmt.Errorf("%s: JetStream does not answer this NATS user: its account has to import it (docs/permissions.md says what each command needs)", what)
	}
	if strings.HasPrefix(err.Error(), what+": ") {
		return err
	}
	return fmt.Errorf("%s: %w", what, err)
}
