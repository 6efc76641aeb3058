package dlq

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
)

// replayed is the job that a letter is replayed as.
type replayed struct {
	Letter
	header    nats.Header // of the job, without those of the replay
	body      []byte
	corrected string // digest of the letter's own bytes; "": they are published
}

// jobOf is the job that the letter is replayed as: its own, or the corrected one,
// which has to be valid.
func jobOf(l Letter, o ReplayOptions) (replayed, error) {
	job := replayed{Letter: l, header: restored(l.Header, l.Data), body: l.Data}
	if o.Correct == nil {
		return job, nil
	}
	body, err := o.Correct(l)
	if err != nil {
		return job, err
	}
	if bytes.Equal(body, l.Data) {
		return job, nil
	}
	job.header = restored(l.Header, body)
	for name := range job.header {
		if strings.EqualFold(name, headerContentType) {
			delete(job.header, name)
		}
	}
	decoded, invalid := jobspec.Decode(job.header, body)
	if invalid != nil {
		return job, fmt.Errorf("the corrected job is not valid, and nothing was published: %s", invalid.Message)
	}
	if id := decoded.GetId(); id != "" && id != l.JobID {
		return job, fmt.Errorf("the corrected job is not valid, and nothing was published: its id is %q, and a job that is replayed keeps its id %q; submit it as another job instead", id, l.JobID)
	}
	job.body, job.corrected = body, digest(l.Data)
	job.header[HeaderCorrected] = append(slices.Clone(job.header[HeaderCorrected]), job.corrected)
	return job, nil
}

// digest names the bytes of a job.
func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// correctedFrom is the digest of the bytes that a replayed job was corrected from;
// "": it was not.
func correctedFrom(h nats.Header) string {
	if values := h[HeaderCorrected]; len(values) > 0 {
		return values[len(values)-1]
	}
	return ""
}

// BodyJSON is the letter's job as JSON, to be corrected. A job in protobuf is
// turned into it.
func BodyJSON(l Letter) ([]byte, error) {
	switch {
	case l.Header.Get(HeaderOmitted) != "":
		return nil, fmt.Errorf("the job's bytes did not fit into the letter: give the whole job with --body FILE")
	case jobspec.IsProtobuf(l.Header):
		job := new(jobpb.Job)
		if err := proto.Unmarshal(l.Data, job); err != nil {
			return nil, fmt.Errorf("the job is protobuf that can't be read: give the whole job with --body FILE")
		}
		return protojson.MarshalOptions{UseProtoNames: true}.Marshal(job)
	case !json.Valid(l.Data):
		return nil, fmt.Errorf("the job is not JSON: correct it with --edit, or give the whole job with --body FILE")
	}
	return l.Data, nil
}

// Setting is one field of a job and its new value.
type Setting struct {
	Path  []string // field names, keys of maps, numbers of list entries from 0
	Value json.RawMessage
}

// ParseSetting reads PATH=VALUE. PATH is names with dots between them, as in
// audio.url, labels.customer or utterances.0.url; a dot in a name is written \\.
// VALUE is taken as it is where the field is a text, else as JSON; null removes the
// field.
func ParseSetting(text string) (Setting, error) {
	path, value, ok := strings.Cut(text, "=")
	if !ok || path == "" {
		return Setting{}, fmt.Errorf("%q: want PATH=VALUE, as in avatar_id=ID or audio.url=https://host/speech.wav", text)
	}
	s := Setting{Path: splitPath(path)}
	textual, err := fieldAt((*jobpb.Job)(nil).ProtoReflect().Descriptor(), s.Path)
	if err != nil {
		return s, fmt.Errorf("%s: %w", path, err)
	}
	switch {
	case value == "null" || json.Valid([]byte(value)) && (!textual || strings.HasPrefix(value, `"`)):
		s.Value = json.RawMessage(value)
	case textual:
		s.Value, err = json.Marshal(value)
	default:
		err = fmt.Errorf("%s: %q is not JSON, and the field is not a text", path, value)
	}
	return s, err
}

// splitPath splits at dots that have no backslash before them.
func splitPath(path string) []string {
	var parts []string
	var part strings.Builder
	for i := 0; i < len(path); i++ {
		switch {
		case path[i] == '\\' && i+1 < len(path):
			i++
			part.WriteByte(path[i])
		case path[i] == '.':
			parts = append(parts, part.String())
			part.Reset()
		default:
			part.WriteByte(path[i])
		}
	}
	return append(parts, part.String())
}

// fieldAt finds the field at a path and reports whether it is a text in JSON.
func fieldAt(message protoreflect.MessageDescriptor, path []string) (textual bool, err error) {
	field := message.Fields().ByName(protoreflect.Name(path[0]))
	if field == nil {
		return false, fmt.Errorf("there is no field %q%s; this sets fields of the job, not of the configuration", path[0], fieldsOf(message))
	}
	rest := path[1:]
	switch {
	case field.IsMap():
		if len(rest) == 0 {
			return false, nil
		}
		if len(rest) > 1 {
			return false, fmt.Errorf("%s has only names and texts; write \\. for a dot in a name", path[0])
		}
		return true, nil
	case field.IsList():
		if len(rest) == 0 {
			return false, nil
		}
		if _, err := strconv.ParseUint(rest[0], 10, 31); err != nil {
			return false, fmt.Errorf("%s is a list: want a number from 0 after it, got %q", path[0], rest[0])
		}
		rest = rest[1:]
	}
	if sub := field.Message(); sub != nil && sub.FullName().Parent() != "google.protobuf" {
		if len(rest) == 0 {
			return false, nil
		}
		return fieldAt(sub, rest)
	}
	if len(rest) > 0 {
		return false, fmt.Errorf("%s has no fields, got %q after it", path[0], strings.Join(rest, "."))
	}
	switch field.Kind() {
	case protoreflect.BoolKind, protoreflect.Int32Kind, protoreflect.Int64Kind, protoreflect.Uint32Kind, protoreflect.Uint64Kind,
		protoreflect.DoubleKind, protoreflect.FloatKind:
		return false, nil
	default: // texts, bytes, names of an enum, times and durations
		return true, nil
	}
}

func fieldsOf(message protoreflect.MessageDescriptor) string {
	var names []string
	for i := range message.Fields().Len() {
		names = append(names, string(message.Fields().Get(i).Name()))
	}
	slices.Sort(names)
	return " (it has " + strings.Join(names, ", ") + ")"
}

// Apply sets fields of a job that is JSON.
func Apply(body []byte, settings []Setting) ([]byte, error) {
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.UseNumber()
	var job any
	if err := decoder.Decode(&job); err != nil {
		return nil, fmt.Errorf("the job is not JSON: %w", err)
	}
	for _, s := range settings {
		var err error
		if job, err = set(job, s.Path, s.Value); err != nil {
			return nil, fmt.Errorf("%s: %w", strings.Join(s.Path, "."), err)
		}
	}
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(job); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

var errNotObject = errors.New("what is there is not an object: set it as a whole, as in NAME={…}")

// set returns in with the value at the path; what is missing on the way is made.
func set(in any, path []string, value json.RawMessage) (any, error) {
	if len(path) == 0 {
		decoder := json.NewDecoder(bytes.NewReader(value))
		decoder.UseNumber()
		var v any
		err := decoder.Decode(&v)
		return v, err
	}
	if list, ok := in.([]any); ok {
		i, err := strconv.Atoi(path[0])
		switch {
		case err != nil || i < 0 || i > len(list):
			return nil, fmt.Errorf("the list has %d entries, numbered from 0: there is no entry %s", len(list), path[0])
		case len(path) == 1 && string(value) == "null":
			if i == len(list) {
				return list, nil
			}
			return slices.Delete(list, i, i+1), nil
		case i == len(list):
			list = append(list, nil)
		}
		list[i], err = set(list[i], path[1:], value)
		return list, err
	}
	object, ok := in.(map[string]any)
	switch {
	case in == nil:
		object = make(map[string]any)
	case !ok:
		return nil, errNotObject
	}
	if len(path) == 1 && string(value) == "null" {
		delete(object, path[0])
		return object, nil
	}
	var err error
	object[path[0]], err = set(object[path[0]], path[1:], value)
	return object, err
}
