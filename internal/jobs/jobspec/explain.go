package jobspec

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobpb"
)

// explainJSON returns what is wrong with data, field by field. It finds nothing
// if only protojson knows the fault.
func explainJSON(data []byte) problems {
	if p := explainSyntax(data); p != nil {
		return p
	}
	var p problems
	p.object(data, (*jobpb.Job)(nil).ProtoReflect().Descriptor(), "")
	return p
}

// explainSyntax returns where data stops being JSON, or nil if it is JSON.
func explainSyntax(data []byte) problems {
	switch {
	case len(bytes.TrimSpace(data)) == 0:
		return problems{"the message has no body: want a job as a JSON object"}
	case bytes.HasPrefix(data, []byte("\xEF\xBB\xBF")):
		return problems{"not JSON: it starts with a byte order mark; publish UTF-8 without one"}
	case !utf8.Valid(data):
		return problems{"not JSON: it is not UTF-8" + protobufHint(data)}
	}
	var raw json.RawMessage
	err := json.Unmarshal(data, &raw)
	if err == nil {
		return nil
	}
	where := ""
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		line, column := position(data, syntax.Offset)
		where = fmt.Sprintf("line %d, column %d: ", line, column)
	}
	return problems{"not JSON: " + where + unquoted(err.Error()) + protobufHint(data)}
}

var (
	// quotedCharacter is how encoding/json names the wrong character.
	quotedCharacter = regexp.MustCompile(`^invalid character '.+?' `)
	// harmlessCharacter matches characters that tokens and URLs do not contain,
	// outside strings: JSON's own, a space, or a control character.
	harmlessCharacter = regexp.MustCompile(`^invalid character '(?:[][{}:,"]|\\'| |\\[abfnrtv]|\\x[01].)' (?:after|looking)`)
)

// unquoted removes the character from a text of encoding/json if it may be part
// of a token or a URL. Line and column still identify it.
func unquoted(text string) string {
	if harmlessCharacter.MatchString(text) {
		return text
	}
	return quotedCharacter.ReplaceAllLiteralString(text, "invalid character ")
}

func protobufHint(data []byte) string {
	if data[0] == '{' {
		return ""
	}
	return protobufAdvice
}

const protobufAdvice = " (a job in protobuf needs the header Content-Type: " + ContentTypeProtobuf + ")"

// position converts an offset into a line and column, both from 1.
func position(data []byte, offset int64) (line, column int) {
	read := data[:min(max(offset, 1), int64(len(data)))]
	return bytes.Count(read, []byte("\n")) + 1, max(1, len(read)-(bytes.LastIndexByte(read, '\n')+1))
}

// object checks a JSON object against a message's fields.
func (p *problems) object(raw json.RawMessage, md protoreflect.MessageDescriptor, path string) {
	if kind := jsonKind(raw); kind != "an object" {
		p.add(orJob(path), "want an object, got %s", kind)
		return
	}
	p.members(raw, path, func(key string, value json.RawMessage) {
		fd := md.Fields().ByName(protoreflect.Name(key))
		if fd == nil {
			p.add(path, "field %s is not known%s", quote(key), suggest(key, md))
			return
		}
		// null means absent, as everywhere in protobuf's JSON.
		if jsonKind(value) != "null" {
			p.field(value, fd, joinPath(path, key))
		}
	})
}

// members calls visit for the members of an object and reports keys that occur
// twice.
func (p *problems) members(raw json.RawMessage, path string, visit func(key string, value json.RawMessage)) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if _, err := dec.Token(); err != nil {
		return // explainSyntax has found raw to be JSON
	}
	seen := map[string]bool{}
	// Only maxProblems are reported.
	for dec.More() && len(*p) <= maxProblems {
		start := dec.InputOffset()
		token, err := dec.Token()
		if err != nil {
			return
		}
		key, _ := token.(string)
		rawKey := raw[start:dec.InputOffset()]
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return
		}
		if seen[key] {
			p.add(path, "field %s is given twice", quote(key))
			continue
		}
		seen[key] = true
		if hasLoneSurrogate(rawKey) {
			p.add(path, "field %s: the name %s", quote(key), loneSurrogate)
		}
		visit(key, value)
	}
}

func (p *problems) field(raw json.RawMessage, fd protoreflect.FieldDescriptor, path string) {
	switch {
	case fd.IsMap():
		p.stringMap(raw, path)
	case fd.IsList():
		p.list(raw, fd, path)
	case fd.Message() != nil && fd.Message().FullName() == "google.protobuf.Timestamp":
		p.timestamp(raw, path)
	case fd.Message() != nil:
		p.object(raw, fd.Message(), path)
	case fd.Kind() == protoreflect.BytesKind:
		p.base64(raw, fd, path)
	case fd.Kind() == protoreflect.StringKind:
		p.text(raw, path, "")
	default:
		p.integer(raw, fd, path)
	}
}

// text checks a string. It never quotes it, because it may be a token.
func (p *problems) text(raw json.RawMessage, path, hint string) {
	if kind := jsonKind(raw); kind != "a string" {
		p.add(path, "want a string, got %s%s", kind, hint)
		return
	}
	if hasLoneSurrogate(raw) {
		p.add(path, loneSurrogate)
	}
}

// stringMap checks an object whose values are strings.
func (p *problems) stringMap(raw json.RawMessage, path string) {
	if kind := jsonKind(raw); kind != "an object" {
		p.add(path, "want an object of strings, got %s", kind)
		return
	}
	p.members(raw, path, func(key string, value json.RawMessage) {
		p.text(value, path+"["+quote(key)+"]", "; put it in quotes")
	})
}

func (p *problems) list(raw json.RawMessage, fd protoreflect.FieldDescriptor, path string) {
	var items []json.RawMessage
	if kind := jsonKind(raw); kind != "an array" {
		p.add(path, "want an array, got %s", kind)
		return
	}
	if err := json.Unmarshal(raw, &items); err != nil {
		return // explainSyntax has found raw to be JSON
	}
	for i, item := range items {
		if len(*p) > maxProblems {
			return
		}
		p.object(item, fd.Message(), fmt.Sprintf("%s[%d]", path, i))
	}
}

func (p *problems) base64(raw json.RawMessage, fd protoreflect.FieldDescriptor, path string) {
	text, ok := jsonString(raw)
	if !ok {
		p.add(path, "want base64 in a string, got %s", jsonKind(raw))
		return
	}
	// Both alphabets are accepted, with or without padding, as protojson does,
	// and white space anywhere, because encoders wrap lines.
	text = withoutSpace(text)
	if len(text) >= len(dataURL) && strings.EqualFold(text[:len(dataURL)], dataURL) {
		p.add(path, "is a data: URL: want only the base64 after its comma")
		return
	}
	encoding := base64.RawStdEncoding
	if strings.ContainsAny(text, "-_") {
		encoding = base64.RawURLEncoding
	}
	if _, err := encoding.DecodeString(strings.TrimRight(text, "=")); err != nil {
		p.add(path, "not base64: %s (spaces and line breaks not counted)", strings.TrimPrefix(err.Error(), "illegal base64 data "))
		return
	}
	if !readable(fmt.Appendf(nil, "%q", text), fd) {
		p.add(path, "not base64: wrong padding")
	}
}

const dataURL = "data:"

// withoutSpace returns text without ASCII white space.
func withoutSpace(text string) string {
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune(" \t\r\n\v\f", r) {
			return -1
		}
		return r
	}, text)
}

// forProtojson returns a job in which explainJSON found no fault, with white space
// removed from inline speech and the deadline in capitals: protojson rejects some white
// space, and deadlines in small letters.
func forProtojson(data []byte) ([]byte, error) {
	var job map[string]json.RawMessage
	if err := json.Unmarshal(data, &job); err != nil {
		return nil, err
	}
	if text, ok := jsonString(job["deadline"]); ok {
		job["deadline"] = fmt.Appendf(nil, "%q", upperTime(text))
	}
	for _, field := range []string{"audio", "utterances"} {
		if job[field] == nil {
			continue
		}
		var list []map[string]json.RawMessage
		one := field == "audio"
		raw := job[field]
		if one {
			raw = fmt.Appendf(nil, "[%s]", raw)
		}
		if err := json.Unmarshal(raw, &list); err != nil {
			return nil, err
		}
		for _, audio := range list {
			if text, ok := jsonString(audio["inline"]); ok {
				audio["inline"] = fmt.Appendf(nil, "%q", withoutSpace(text))
			}
		}
		var again any = list
		if one {
			again = list[0]
		}
		encoded, err := json.Marshal(again)
		if err != nil {
			return nil, err
		}
		job[field] = encoded
	}
	return json.Marshal(job)
}

func (p *problems) integer(raw json.RawMessage, fd protoreflect.FieldDescriptor, path string) {
	lowest, highest := int64(-1<<31), int64(1<<31-1)
	if fd.Kind() == protoreflect.Uint32Kind {
		lowest, highest = 0, 1<<32-1
	}
	text := string(raw)
	if s, ok := jsonString(raw); ok {
		text = s // protobuf's JSON takes numbers in quotes
	}
	n, err := strconv.ParseFloat(text, 64)
	switch {
	case jsonKind(raw) != "a number" && jsonKind(raw) != "a string":
		p.add(path, "want a whole number, got %s", jsonKind(raw))
	case err != nil || n != float64(int64(n)):
		p.add(path, "want a whole number, got %s", errors.Cut(string(raw), 40))
	case n < float64(lowest) || n > float64(highest):
		p.add(path, "want a whole number from %d to %d, got %s", lowest, highest, errors.Cut(string(raw), 40))
	case !readable(raw, fd):
		// Numbers that Go knows and JSON does not, such as "+1".
		p.add(path, "want a whole number in plain digits, got %s", errors.Cut(string(raw), 40))
	}
}

// readable reports whether protojson accepts raw for the field, a scalar.
// protojson decides, so what it refuses needs an explanation.
func readable(raw json.RawMessage, fd protoreflect.FieldDescriptor) bool {
	message, err := protoregistry.GlobalTypes.FindMessageByName(fd.ContainingMessage().FullName())
	if err != nil {
		return true // all of a job's messages are registered
	}
	alone := fmt.Appendf(nil, `{"%s":%s}`, fd.JSONName(), raw)
	return protojson.Unmarshal(alone, message.New().Interface()) == nil
}

// jsonKind returns the kind of a JSON value, with its article.
func jsonKind(raw json.RawMessage) string {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 {
		return "nothing"
	}
	switch raw[0] {
	case '{':
		return "an object"
	case '[':
		return "an array"
	case '"':
		return "a string"
	case 't', 'f':
		return "a boolean"
	case 'n':
		return "null"
	}
	return "a number"
}

func jsonString(raw json.RawMessage) (string, bool) {
	var s string
	if jsonKind(raw) != "a string" || json.Unmarshal(raw, &s) != nil {
		return "", false
	}
	return s, true
}

func orJob(path string) string {
	if path == "" {
		return "the job"
	}
	return path
}

// suggest returns the field that was probably meant, or else all fields.
func suggest(key string, md protoreflect.MessageDescriptor) string {
	var names []string
	best, bestDistance := "", 3
	for i := range md.Fields().Len() {
		name := string(md.Fields().Get(i).Name())
		names = append(names, name)
		if d := distance(normalize(key), normalize(name)); d < bestDistance && d < len(name)-1 {
			best, bestDistance = name, d
		}
	}
	switch {
	case best != "":
		return fmt.Sprintf("; did you mean %q?", best)
	case len(names) == 0:
		return "; it has no fields"
	}
	slices.Sort(names)
	return "; known are " + strings.Join(names, ", ")
}

// normalize makes spellings such as avatarId, Avatar-ID and avatar_id equal.
func normalize(name string) string {
	return strings.NewReplacer("_", "", "-", "").Replace(strings.ToLower(name))
}

// distance returns the number of letters to change, add, remove or swap with
// their neighbour to get from a to b; 3 means 3 or more. Both have at most 64
// bytes.
func distance(a, b string) int {
	if len(a)-len(b) > 2 || len(b)-len(a) > 2 {
		return 3
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			d := min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d = min(d, rows[i-2][j-2]+1)
			}
			rows[i][j] = d
		}
	}
	return rows[len(a)][len(b)]
}
