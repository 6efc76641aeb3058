package jobspec

import (
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/jobpb"
)

// Headers that give a message its identity; replays carry both.
const (
	HeaderJobID = "Avatar-Job-Id"
	HeaderRun   = "Avatar-Run"
)

// Headers of replays.
const (
	// HeaderIgnoreDeadline is set on a replay whose deadline does not count.
	HeaderIgnoreDeadline = "Avatar-Ignore-Deadline"
	// HeaderAfterSeq is set on a replay that waits for another one of the same
	// job: the sequence of that one in the jobs stream.
	HeaderAfterSeq = "Avatar-After-Seq"
)

// MaxRun is the highest run of a job: far more than anyone replays, and small
// enough for readers that use 32 bits.
const MaxRun = 1_000_000_000

// maxJobID is the length of the longest job id.
const maxJobID = 64

// ValidID reports whether id may be a job's ID: [A-Za-z0-9_-]{1,64}. It is used
// as one token of a NATS subject and as a key of a bucket.
func ValidID(id string) bool {
	if id == "" || len(id) > maxJobID {
		return false
	}
	for i := range len(id) {
		switch c := id[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		default:
			return false
		}
	}
	return true
}

// identify returns the job and run of a message. The ID is the first valid one of
// these: the header Avatar-Job-Id, the ID in the body (nil: the body is not a
// valid job), Nats-Msg-Id, and else one made from the message's place in the
// stream. A message that is not a valid job does not get the ID in its body,
// because it would replace the job that it was meant to be.
func identify(msg jetstream.Msg, body *jobpb.Job) Identity {
	ident := Identity{Run: 1, Subject: msg.Subject()}
	ident.Queue = ident.Subject[strings.LastIndexByte(ident.Subject, '.')+1:]
	// A message that JetStream did not deliver has no metadata, and so the
	// sequence 0, which no stored message has.
	var stored time.Time
	if meta, err := msg.Metadata(); err == nil {
		ident.StreamSeq, stored = meta.Sequence.Stream, meta.Timestamp
	}
	header := msg.Headers()
	if run, ok := runOf(header); ok {
		ident.Run = run
	}
	if ident.ID = JobIDOf(header, body); ident.ID == "" {
		ident.ID = StreamJobID(stored, ident.StreamSeq)
	}
	return ident
}

// JobIDOf returns the ID that the message names, or "".
func JobIDOf(header nats.Header, body *jobpb.Job) string {
	for _, id := range []string{HeaderValue(header, HeaderJobID), body.GetId(), HeaderValue(header, jetstream.MsgIDHeader)} {
		if ValidID(id) {
			return id
		}
	}
	return ""
}

// StreamJobID returns the ID of a message that names none, made from the time at
// which the stream stored it and its sequence. Every delivery of the message gets
// the same ID, and no message of a recreated or restored stream does.
func StreamJobID(stored time.Time, seq uint64) string {
	// A time before 1970 has no place in the pattern; the sign would still fit.
	return "j" + strconv.FormatInt(stored.UnixNano(), 36) + "-" + strconv.FormatUint(seq, 10)
}

// runOf returns the run that the header names, or 1 without the header. It
// returns false if the header is not a whole number from 1 to MaxRun.
func runOf(header nats.Header) (int, bool) {
	text := HeaderValue(header, HeaderRun)
	if text == "" {
		return 1, true
	}
	run, err := strconv.ParseInt(text, 10, 32)
	if err != nil || run < 1 || run > MaxRun {
		return 0, false
	}
	return int(run), true
}

// AfterSeq returns the sequence of the message that a replay waits for, or 0.
func AfterSeq(header nats.Header) uint64 {
	seq, err := strconv.ParseUint(HeaderValue(header, HeaderAfterSeq), 10, 64)
	if err != nil {
		return 0
	}
	return seq
}
