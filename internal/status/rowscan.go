package status

import (
	"bytes"
	"encoding/json"
	"strconv"
	"time"

	"avatarworker/internal/errors"
)

// decodeRow reads a record as encoding/json does. A list reads every record of the
// bucket, so what workers write is read without reflection, in a tenth of the time.
// What scanRow does not expect, encoding/json decides.
func decodeRow(data []byte, r *recordRow) error {
	if scanRow(data, r) {
		return nil
	}
	*r = recordRow{}
	return json.Unmarshal(data, r)
}

// scanRow reads the fields of a record. It returns false, with r in no particular
// state, for anything that it is not made for: unusual names, a field that is there
// twice, escaped or non-ASCII text in a field of the row, or what is not JSON.
func scanRow(data []byte, r *recordRow) bool {
	s := rowScanner{data: data}
	var seen uint32
	ok := s.object(func(name []byte) bool {
		bit, ok := s.field(name, r)
		twice := seen&bit != 0
		seen |= bit
		return ok && !twice && inLowerCase(name)
	})
	s.space()
	return ok && s.at == len(data)
}

// field reads the value of one field of a record. bit distinguishes the fields; 0 is
// a field that a row does not have.
func (s *rowScanner) field(name []byte, r *recordRow) (bit uint32, ok bool) {
	switch string(name) {
	case "job_id":
		return 1 << 0, s.text(&r.JobID)
	case "run":
		return 1 << 1, s.count(&r.Run)
	case "stream_seq":
		var n int
		ok := s.count(&n)
		r.StreamSeq = uint64(max(n, 0)) // #nosec G115 -- not negative
		return 1 << 2, ok && n >= 0
	case "state":
		return 1 << 3, s.text((*string)(&r.State))
	case "queue":
		return 1 << 4, s.text(&r.Queue)
	case "app_id":
		return 1 << 5, s.text(&r.AppID)
	case "avatar_id":
		return 1 << 6, s.text(&r.AvatarID)
	case "region":
		return 1 << 7, s.text(&r.Region)
	case "labels":
		return 1 << 8, s.labels(&r.Labels)
	case "attempt":
		return 1 << 9, s.count(&r.Attempt)
	case "crashes":
		return 1 << 10, s.count(&r.Crashes)
	case "worker_id":
		return 1 << 11, s.text(&r.WorkerID)
	case "connection_id":
		return 1 << 12, s.text(&r.ConnectionID)
	case "created_at":
		return 1 << 13, s.time(&r.CreatedAt)
	case "started_at":
		return 1 << 14, s.time(&r.StartedAt)
	case "published_at":
		return 1 << 15, s.time(&r.PublishedAt)
	case "next_attempt_at":
		r.NextAttemptAt = new(time.Time)
		return 1 << 16, s.time(r.NextAttemptAt)
	case "held_code":
		return 1 << 17, s.text((*string)(&r.HeldCode))
	case "session_ns":
		n := 0
		ok := s.count(&n)
		r.SessionTime = time.Duration(n)
		return 1 << 18, ok
	case "last_error":
		return 1 << 19, s.lastError(r)
	default:
		return 0, s.skip(0)
	}
}

func (s *rowScanner) lastError(r *recordRow) bool {
	var code string
	found := false
	ok := s.object(func(name []byte) bool {
		if string(name) != "code" {
			return inLowerCase(name) && s.skip(1)
		}
		twice := found
		found = true
		return s.text(&code) && !twice
	})
	r.LastError = &lastError{Code: errors.Code(code)}
	return ok
}

func (s *rowScanner) labels(labels *map[string]string) bool {
	found := make(map[string]string)
	*labels = found
	return s.object(func(name []byte) bool {
		label := string(name)
		_, twice := found[label]
		value := ""
		ok := s.text(&value)
		found[label] = value
		return ok && !twice
	})
}

// rowScanner walks over JSON. Each method reads one value and returns false if it is
// not of the kind that it reads.
type rowScanner struct {
	data []byte
	at   int
}

func (s *rowScanner) space() {
	for s.at < len(s.data) {
		switch s.data[s.at] {
		case ' ', '\t', '\n', '\r':
			s.at++
		default:
			return
		}
	}
}

// take steps over c.
func (s *rowScanner) take(c byte) bool {
	s.space()
	if s.at < len(s.data) && s.data[s.at] == c {
		s.at++
		return true
	}
	return false
}

// object calls value for each name, to read the value.
func (s *rowScanner) object(value func(name []byte) bool) bool {
	if !s.take('{') {
		return false
	}
	if s.take('}') {
		return true
	}
	for {
		name, ok := s.plain()
		if !ok || !s.take(':') || !value(name) {
			return false
		}
		if s.take('}') {
			return true
		}
		if !s.take(',') {
			return false
		}
	}
}

// inLowerCase reports whether a name has no capital letter: encoding/json ignores the
// case of a field's name.
func inLowerCase(name []byte) bool {
	for _, c := range name {
		if c >= 'A' && c <= 'Z' {
			return false
		}
	}
	return true
}

// plain reads a string that needs no decoding: ASCII, without an escape.
func (s *rowScanner) plain() ([]byte, bool) {
	if !s.take('"') {
		return nil, false
	}
	length := bytes.IndexByte(s.data[s.at:], '"')
	if length < 0 {
		return nil, false
	}
	text := s.data[s.at : s.at+length]
	for _, c := range text {
		if c < ' ' || c == '\\' || c >= 0x80 {
			return nil, false
		}
	}
	s.at += length + 1
	return text, true
}

func (s *rowScanner) text(v *string) bool {
	text, ok := s.plain()
	*v = string(text)
	return ok
}

func (s *rowScanner) time(v *time.Time) bool {
	text, ok := s.plain()
	return ok && v.UnmarshalText(text) == nil
}

// count reads a whole number.
func (s *rowScanner) count(v *int) bool {
	text, ok := s.number()
	if !ok {
		return false
	}
	n, err := strconv.Atoi(string(text))
	*v = n
	return err == nil
}

// number reads a number as JSON has it.
func (s *rowScanner) number() ([]byte, bool) {
	s.space()
	begin := s.at
	s.optional('-')
	switch {
	case s.optional('0'):
	case !s.digits():
		return nil, false
	}
	if s.optional('.') && !s.digits() {
		return nil, false
	}
	if s.optional('e') || s.optional('E') {
		if !s.optional('+') {
			s.optional('-')
		}
		if !s.digits() {
			return nil, false
		}
	}
	return s.data[begin:s.at], true
}

func (s *rowScanner) optional(c byte) bool {
	if s.at < len(s.data) && s.data[s.at] == c {
		s.at++
		return true
	}
	return false
}

func (s *rowScanner) digits() bool {
	begin := s.at
	for s.at < len(s.data) && s.data[s.at] >= '0' && s.data[s.at] <= '9' {
		s.at++
	}
	return s.at > begin
}

// maxNested is how deep a value may be nested that is not read.
const maxNested = 64

// skip steps over any value.
func (s *rowScanner) skip(depth int) bool {
	s.space()
	if s.at >= len(s.data) || depth > maxNested {
		return false
	}
	switch c := s.data[s.at]; c {
	case '"':
		return s.skipString()
	case '{', '[':
		return s.skipNested(c, depth)
	case 't':
		return s.literal("true")
	case 'f':
		return s.literal("false")
	case 'n':
		return s.literal("null")
	default:
		_, ok := s.number()
		return ok
	}
}

func (s *rowScanner) literal(text string) bool {
	if !bytes.HasPrefix(s.data[s.at:], []byte(text)) {
		return false
	}
	s.at += len(text)
	return true
}

func (s *rowScanner) skipNested(open byte, depth int) bool {
	end := open + 2 // '{' and '}', '[' and ']' are two apart
	s.at++
	if s.take(end) {
		return true
	}
	for {
		if open == '{' {
			if s.space(); s.at >= len(s.data) || s.data[s.at] != '"' || !s.skipString() || !s.take(':') {
				return false
			}
		}
		if !s.skip(depth + 1) {
			return false
		}
		if s.take(end) {
			return true
		}
		if !s.take(',') {
			return false
		}
	}
}

// skipString steps over a string. Of escapes it knows those of one letter, and leaves
// the others to encoding/json.
func (s *rowScanner) skipString() bool {
	for s.at++; s.at < len(s.data); s.at++ {
		switch c := s.data[s.at]; {
		case c == '"':
			s.at++
			return true
		case c < ' ':
			return false
		case c == '\\':
			s.at++
			if s.at >= len(s.data) || bytes.IndexByte([]byte(`"\/bfnrt`), s.data[s.at]) < 0 {
				return false
			}
		}
	}
	return false
}

// lastError is what a row has of a record's last failure.
type lastError struct {
	Code errors.Code `json:"code"`
}
