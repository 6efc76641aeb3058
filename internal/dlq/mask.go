package dlq

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
)

const (
	hidden = "[hidden]"
	// maxInline is how much of inline speech is shown, in characters of base64.
	maxInline = 48
	// maxBodyText is how much of a body that is not JSON is shown, in bytes.
	maxBodyText = 4096
)

// Masked is a dead letter that may be shown to anyone: without egress tokens and
// the queries of URLs, and with an explanation of its error.
type Masked struct {
	Entry
	Headers     map[string][]string `json:"headers"`
	Error       json.RawMessage     `json:"error"` // the error event's body
	Body        json.RawMessage     `json:"body"`  // the job; a JSON string where it is not JSON
	Explanation errors.Explanation  `json:"explanation"`
}

// Masked returns the letter with its secrets hidden.
func (l Letter) Masked() Masked {
	m := Masked{Entry: l.Entry.Masked(), Headers: make(map[string][]string), Explanation: errors.ExplainGivenUp(l.Code)}
	if len(l.Error) > 0 {
		m.Error = maskedBody(nil, l.Error)
	}
	for name, values := range l.Header {
		if name == HeaderError {
			continue
		}
		for _, value := range values {
			m.Headers[name] = append(m.Headers[name], errors.RedactText(value))
		}
	}
	m.Body = maskedBody(l.Header, l.Data)
	return m
}

// MaskJSON hides the secrets in JSON as Masked does: egress tokens and the queries of
// URLs. What is not JSON becomes a JSON string.
func MaskJSON(data json.RawMessage) json.RawMessage { return maskedBody(nil, data) }

// Masked returns the entry with the queries of URLs in its texts hidden.
func (e Entry) Masked() Entry {
	e.Message, e.ServerTitle, e.ServerDetail = errors.RedactText(e.Message), errors.RedactText(e.ServerTitle), errors.RedactText(e.ServerDetail)
	return e
}

// maskedBody returns a job's body as JSON with its secrets hidden.
func maskedBody(header nats.Header, data []byte) json.RawMessage {
	inProtobuf := jobspec.IsProtobuf(header)
	if inProtobuf {
		var job jobpb.Job
		if proto.Unmarshal(data, &job) == nil {
			if text, err := (protojson.MarshalOptions{UseProtoNames: true}).Marshal(&job); err == nil {
				data = text
			}
		}
	}
	var body any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&body); err != nil {
		body = fmt.Sprintf("%d bytes that are not JSON; --raw writes them", len(data))
		if !inProtobuf && mayBeShown(data) {
			body = errors.Cut(errors.RedactText(string(data)), maxBodyText)
		}
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(mask("", body)); err != nil {
		return json.RawMessage(`null`) // what was decoded can be encoded
	}
	return bytes.TrimSpace(b.Bytes())
}

// mayBeShown reports whether a body that is not JSON is text without a token. A
// job in protobuf without the header that says so has control characters, and no
// names that would show which of its texts is the token.
func mayBeShown(data []byte) bool {
	control := func(r rune) bool { return unicode.IsControl(r) && !unicode.IsSpace(r) }
	return utf8.Valid(data) && !bytes.ContainsFunc(data, control) && !bytes.Contains(bytes.ToLower(data), []byte("token"))
}

// mask hides egress tokens and the queries of URLs, and shortens inline speech,
// in the value of a field with that name. Names are compared in lower case and
// without underscores, since protobuf's JSON takes apiToken too.
func mask(name string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			v[key] = mask(key, value)
		}
		return v
	case []any:
		for i := range v {
			v[i] = mask(name, v[i])
		}
		return v
	case string:
		switch plainName := strings.ToLower(strings.ReplaceAll(name, "_", "")); {
		case strings.HasSuffix(plainName, "token") && v != "":
			return hidden
		case plainName == "inline" && len(v) > maxInline:
			return fmt.Sprintf("%s… (%d characters of base64)", v[:maxInline], len(v))
		}
		return errors.RedactText(v)
	default:
		return v
	}
}
