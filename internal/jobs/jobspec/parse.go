package jobspec

import (
	"encoding/json"
	"fmt"
	"mime"
	"regexp"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"avatarworker/internal/errors"
	"avatarworker/internal/header"
	"avatarworker/internal/jobs/jobpb"
)

// ContentTypeProtobuf marks a job in protobuf; every other job is JSON.
const ContentTypeProtobuf = "application/protobuf"

// Read returns the identity of a message and the job in it. The ID is "" if the
// message names none. The error is nil or says, with code invalidJob and phase
// job, which fields are wrong, what is wrong with them and what to do; it never
// quotes a token or a URL. With an error, the job is nil.
func Read(msg jetstream.Msg) (Identity, *Job, *errors.Error) {
	headers := msg.Headers()
	body, err := Decode(headers, msg.Data())
	ident := identify(msg, body)
	if wrong := checkHeaders(headers); wrong != nil {
		err = wrong
	}
	if err != nil {
		return ident, nil, err
	}
	job := &Job{
		Job:       body,
		ID:        ident.ID,
		Run:       ident.Run,
		Queue:     ident.Queue,
		Subject:   ident.Subject,
		StreamSeq: ident.StreamSeq,
	}
	// Without metadata the message did not come from a stream and has no time.
	if meta, err := msg.Metadata(); err == nil {
		job.Published = meta.Timestamp
	}
	job.TraceParent, job.TraceState = TraceContext(headers)
	return ident, job, nil
}

// Decode decodes and validates a job's bytes: JSON, or protobuf if the header
// Content-Type says so. The error is as Read's.
func Decode(header nats.Header, data []byte) (*jobpb.Job, *errors.Error) {
	decode := decodeJSON
	if IsProtobuf(header) {
		decode = decodeProtobuf
	}
	job, problems := decode(data)
	if len(problems) > 0 {
		return nil, invalidJob(problems)
	}
	if Validate(job) == nil {
		return job, nil
	}
	return nil, validate(job, sync.OnceValue(func() map[string]bool { return emptySources(header, data) }))
}

// emptySources returns the fields of a job in JSON that name an object or a URL and
// are empty: in the job itself they look as if they were not given.
func emptySources(header nats.Header, data []byte) map[string]bool {
	type audio struct {
		Object *string `json:"object"`
		URL    *string `json:"url"`
	}
	var job struct {
		Audio      audio   `json:"audio"`
		Utterances []audio `json:"utterances"`
	}
	if IsProtobuf(header) || json.Unmarshal(data, &job) != nil {
		return nil
	}
	empty := make(map[string]bool)
	note := func(a audio, path string) {
		if a.Object != nil && *a.Object == "" {
			empty[path+".object"] = true
		}
		if a.URL != nil && *a.URL == "" {
			empty[path+".url"] = true
		}
	}
	note(job.Audio, "audio")
	for i, a := range job.Utterances[:min(len(job.Utterances), maxUtterances)] {
		note(a, fmt.Sprintf("utterances[%d]", i))
	}
	return empty
}

// CheckJSON checks a job that may still lack fields: that it is JSON, with line
// and column if it is not, and that its fields are those of a job. The error is
// as Decode's.
func CheckJSON(data []byte) *errors.Error {
	_, problems := decodeJSON(data)
	if len(problems) == 0 {
		return nil
	}
	err := invalidJob(problems)
	err.Message = strings.TrimSuffix(err.Message, protobufAdvice)
	return err
}

// IsProtobuf reports whether the header of a message or of its dead letter says
// that the body is a job in protobuf: application/protobuf or
// application/x-protobuf, however Content-Type is spelled.
func IsProtobuf(header nats.Header) bool {
	mediaType, _, err := mime.ParseMediaType(HeaderValue(header, "Content-Type"))
	return err == nil && (mediaType == ContentTypeProtobuf || mediaType == "application/x-protobuf")
}

// checkHeaders refuses invalid headers of ours: a job must not run under another
// ID, as another run, or under another rule than requested.
func checkHeaders(h nats.Header) *errors.Error {
	var p problems
	if id := HeaderValue(h, HeaderJobID); id != "" && !ValidID(id) {
		p.add("header "+HeaderJobID, "want %s, got %s", idWanted, quote(id))
	}
	if _, ok := runOf(h); !ok {
		p.add("header "+HeaderRun, "want a whole number from 1 to %d, got %s", MaxRun, quote(HeaderValue(h, HeaderRun)))
	}
	if _, err := header.Flag(h, HeaderIgnoreDeadline); err != nil {
		p.add("", "%s", err)
	}
	if len(p) > 0 {
		return invalidJob(p)
	}
	return nil
}

func decodeJSON(data []byte) (*jobpb.Job, problems) {
	job := &jobpb.Job{}
	err := protojson.Unmarshal(data, job)
	if err == nil && (job.GetDeadline() == nil || plainDeadline(data)) {
		return job, nil
	}
	// protojson stops at the first fault and says little about it, so the body is
	// read a second time to explain it. protojson also accepts deadlines that are
	// not RFC 3339, and refuses small letters in others and some kinds of base64 with
	// line breaks.
	if p := explainJSON(data); len(p) > 0 {
		return nil, p
	}
	if err == nil {
		return job, nil
	}
	if plain, plainErr := forProtojson(data); plainErr == nil {
		job = &jobpb.Job{}
		if protojson.Unmarshal(plain, job) == nil {
			return job, nil
		}
	}
	return nil, problems{"not a valid job: protobuf's JSON format does not allow it" + protoPosition(err)}
}

// protoHead is the start of protojson's error texts. The rest may quote the body,
// and with it a token or a URL's query.
var protoHead = regexp.MustCompile(`^proto:[\s\x{00a0}]*(?:syntax error )?\(line (\d+):(\d+)\):`)

// protoPosition returns the safe part of an error of protojson: its position, if
// it has one.
func protoPosition(err error) string {
	at := protoHead.FindStringSubmatch(err.Error())
	if at == nil {
		return ""
	}
	return fmt.Sprintf(" (line %s, column %s)", at[1], at[2])
}

func decodeProtobuf(data []byte) (*jobpb.Job, problems) {
	if len(data) == 0 {
		return nil, problems{"the message has no body: want a job in protobuf"}
	}
	job := &jobpb.Job{}
	if err := proto.Unmarshal(data, job); err != nil {
		return nil, problems{"not a job in protobuf (avatarworker.v1.Job), though the header Content-Type says so: " + cleanProtoError(err)}
	}
	var p problems
	refuseUnknown(job.ProtoReflect(), "", &p)
	return job, p
}

// refuseUnknown finds protobuf fields that are not in the schema, at any depth.
func refuseUnknown(m protoreflect.Message, path string, p *problems) {
	if unknown := m.GetUnknown(); len(unknown) > 0 {
		num, _, _ := protowire.ConsumeTag(unknown)
		p.add(path, "protobuf field number %d is not known; does the publisher use a newer job.proto?", num)
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		field := joinPath(path, string(fd.Name()))
		switch {
		case fd.Message() == nil || fd.IsMap():
		case fd.IsList():
			for i := range v.List().Len() {
				refuseUnknown(v.List().Get(i).Message(), fmt.Sprintf("%s[%d]", field, i), p)
			}
		default:
			refuseUnknown(v.Message(), field, p)
		}
		return true
	})
}

// protoNoise is what the protobuf library puts before its texts; it varies the
// spaces on purpose.
var protoNoise = regexp.MustCompile(`proto:[\s\x{00a0}]*|[\x{00a0}]`)

// cleanProtoError returns the text of an error of proto.Unmarshal, which quotes
// nothing of the message. Never pass it an error of protojson, which does.
func cleanProtoError(err error) string {
	text := protoNoise.ReplaceAllString(err.Error(), "")
	return errors.Cut(strings.ToValidUTF8(text, "\uFFFD"), 200)
}

// problems lists the faults of a job, one text for each.
type problems []string

// Bounds of an error text, which must fit into headers.
const (
	maxProblems     = 8
	maxProblemBytes = 300
)

func (p *problems) add(path, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if path != "" {
		text = path + ": " + text
	}
	*p = append(*p, errors.Cut(text, maxProblemBytes))
}

func invalidJob(p problems) *errors.Error {
	more := ""
	if len(p) > maxProblems {
		more = "; and more"
		p = p[:maxProblems]
	}
	return &errors.Error{
		Code:    errors.CodeInvalidJob,
		Phase:   errors.PhaseJob,
		Message: strings.Join(p, "; ") + more,
	}
}

func joinPath(path, field string) string {
	if path == "" {
		return field
	}
	return path + "." + field
}

// quote shows a value of the job in an error text. Never give it a secret.
func quote(s string) string { return fmt.Sprintf("%q", errors.Cut(s, 64)) }
