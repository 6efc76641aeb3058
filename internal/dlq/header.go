// Package dlq stores the jobs that failed for good, and lets operators list, show,
// count, replay and remove them. It owns the dead letter stream and what may be
// shown of a letter. It knows nothing of sessions.
package dlq

import (
	"slices"
	"strings"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/jobs/jobspec"
)

// Headers of a dead letter.
const (
	HeaderJobID     = jobspec.HeaderJobID
	HeaderRun       = jobspec.HeaderRun
	HeaderCrashes   = "Avatar-Crashes"
	HeaderQueue     = "Avatar-Queue"
	HeaderSubject   = "Avatar-Subject"
	HeaderStreamSeq = "Avatar-Stream-Seq"
	HeaderCode      = "Avatar-Error-Code"
	HeaderClass     = "Avatar-Error-Class"
	HeaderPhase     = "Avatar-Error-Phase"
	HeaderReason    = "Avatar-Reason"
	HeaderAttempts  = "Avatar-Attempts"
	HeaderFailedAt  = "Avatar-Failed-At" // RFC 3339, UTC
	HeaderWorker    = "Avatar-Worker"
	HeaderError     = "Avatar-Error"  // the error event's body
	HeaderMsgID     = "Avatar-Msg-Id" // the job's own Nats-Msg-Id

	// HeaderDropped names headers of the job that did not fit.
	HeaderDropped = "Avatar-Headers-Dropped"
	// HeaderEncoding is "gzip" where the job's bytes had to be compressed to
	// fit. Show and Replay give them back as they were.
	HeaderEncoding = "Avatar-Body-Encoding"
	// HeaderOmitted is the number of the job's bytes where not even that was
	// enough; it can't be replayed then.
	HeaderOmitted = "Avatar-Body-Omitted"

	// HeaderIgnoreDeadline on a replayed job makes the worker run it although
	// its deadline has passed. The value is "true".
	HeaderIgnoreDeadline = jobspec.HeaderIgnoreDeadline

	// HeaderAfterSeq on a replayed job is the sequence in the jobs stream of the
	// run before it, which was replayed from another letter with the same id and
	// had not ended. A worker lets the job wait while that message is there: a
	// run that begins drops the earlier ones that have not.
	HeaderAfterSeq = jobspec.HeaderAfterSeq

	// HeaderCorrected on a replayed job is the digest of the bytes that the dead
	// letter had, where the job was corrected: once for each correction, the last
	// one last. It stays with the job.
	HeaderCorrected = "Avatar-Corrected"

	// origPrefix precedes the name of a header that the NATS server or its
	// clients act on, and that must not take effect for the dead letter.
	origPrefix = "Avatar-Orig-"
	natsPrefix = "nats-"

	headerContentType = "Content-Type"
)

// ours are the headers that a dead letter adds, and a replay removes.
var ours = []string{
	HeaderJobID, HeaderRun, HeaderCrashes, HeaderQueue, HeaderSubject, HeaderStreamSeq,
	HeaderCode, HeaderClass, HeaderPhase, HeaderReason, HeaderAttempts, HeaderFailedAt,
	HeaderWorker, HeaderError, HeaderMsgID, HeaderDropped, HeaderEncoding, HeaderOmitted,
	HeaderIgnoreDeadline, HeaderAfterSeq,
}

// statusHeaders make clients take a message without a body for an answer of the
// server. A list asks for letters without their bodies, so any letter with a
// Status would look like one.
var statusHeaders = []string{"Status", "Description"}

func hasPrefixFold(text, prefix string) bool {
	return len(text) >= len(prefix) && strings.EqualFold(text[:len(prefix)], prefix)
}

func containsFold(names []string, name string) bool {
	return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, name) })
}

func isOurs(name string) bool {
	return hasPrefixFold(name, origPrefix) || containsFold(ours, name)
}

// carried are the job's own headers as its dead letter has them. What the
// server or a client would act on is renamed: Nats-TTL would delete the letter,
// Nats-Rollup all the others, Nats-Expected-… refuse it, and Status end a list.
func carried(job map[string][]string) nats.Header {
	h := make(nats.Header, len(job)+len(ours))
	for name, values := range job {
		switch {
		case strings.EqualFold(name, nats.MsgIdHdr):
			h[HeaderMsgID] = slices.Clone(values)
		case hasPrefixFold(name, natsPrefix) || containsFold(statusHeaders, name):
			h[origPrefix+name] = slices.Clone(values)
		case !isOurs(name):
			h[name] = slices.Clone(values)
		}
	}
	return h
}

// restored are the job's own headers as they were published, without those
// that the server acted on then: its duplicate window, expectations, life. A
// Status comes back only with a body: without one the job would be taken for an
// answer of the server again.
func restored(letter nats.Header, body []byte) nats.Header {
	h := make(nats.Header, len(letter))
	for name, values := range letter {
		switch {
		case hasPrefixFold(name, origPrefix):
			name = name[len(origPrefix):]
			if len(body) == 0 || !containsFold(statusHeaders, name) {
				continue
			}
		case isOurs(name) || hasPrefixFold(name, natsPrefix) || containsFold(statusHeaders, name):
			continue
		}
		h[name] = slices.Clone(values)
	}
	return h
}

// wireSize is how many bytes one header takes.
func wireSize(name string, values []string) int {
	n := 0
	for _, v := range values {
		n += len(name) + len(": ") + len(v) + len("\r\n")
	}
	return n
}

// headerSize is how many bytes the headers take.
func headerSize(h nats.Header) int {
	n := len("NATS/1.0\r\n") + len("\r\n")
	for name, values := range h {
		n += wireSize(name, values)
	}
	return n
}
