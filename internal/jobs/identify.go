package jobs

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protowire"
)

// Headers that give a message its identity; replays carry both.
const (
	HeaderJobID = "Avatar-Job-Id"
	HeaderRun   = "Avatar-Run"
)

// maxJobID is the length of the longest job id.
const maxJobID = 64

// ValidJobID reports whether id may name a job: [A-Za-z0-9_-]{1,64}. It is one
// token of a NATS subject and a key of a bucket, so nothing else may be in it.
func ValidJobID(id string) bool {
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

// StreamInfo is what Identify needs to know of the jobs stream.
type StreamInfo struct {
	Created time.Time // tells apart streams of one name that came one after the other
}

// Identify says which job and which run a message is, also where its body is no
// valid job. The id is the first of these that fits the pattern: the header
// Avatar-Job-Id, the body's id, Nats-Msg-Id; else it is made from the stream's
// creation time and the message's sequence, so that every delivery of the
// message has the same one.
func Identify(msg jetstream.Msg, stream StreamInfo) Identity {
	ident := identify(msg)
	if ident.ID == "" {
		ident.ID = streamJobID(stream, ident.StreamSeq)
	}
	return ident
}

// identify is Identify without the stream: the id is "" where the message gives
// itself none.
func identify(msg jetstream.Msg) Identity {
	ident := Identity{Run: 1, Subject: msg.Subject()}
	ident.Queue = ident.Subject[strings.LastIndexByte(ident.Subject, '.')+1:]
	// A message that JetStream did not deliver has no metadata, and so the
	// sequence 0, which no stored message has.
	if meta, err := msg.Metadata(); err == nil {
		ident.StreamSeq = meta.Sequence.Stream
	}
	header := msg.Headers()
	if run, ok := runOf(header); ok {
		ident.Run = run
	}
	ident.ID = jobIDOf(header, msg.Data())
	return ident
}

// jobIDOf returns the id that the message gives itself, or "".
func jobIDOf(header nats.Header, data []byte) string {
	if id := headerValue(header, HeaderJobID); ValidJobID(id) {
		return id
	}
	scan := scanJSONID
	if isProtobuf(header) {
		scan = scanProtobufID
	}
	if id := scan(data); ValidJobID(id) {
		return id
	}
	if id := headerValue(header, jetstream.MsgIDHeader); ValidJobID(id) {
		return id
	}
	return ""
}

func streamJobID(stream StreamInfo, seq uint64) string {
	// A time before 1970 has no place in the pattern; the sign would still fit.
	return "j" + strconv.FormatInt(stream.Created.UnixNano(), 36) + "-" + strconv.FormatUint(seq, 10)
}

// runOf returns the run that the header names, 1 where it names none. It is
// false where the header is no whole number from 1.
func runOf(header nats.Header) (int, bool) {
	text := headerValue(header, HeaderRun)
	if text == "" {
		return 1, true
	}
	run, err := strconv.ParseInt(text, 10, 32)
	if err != nil || run < 1 {
		return 0, false
	}
	return int(run), true
}

// scanJSONID reads the top-level "id" of a JSON object that need not be a valid
// job, nor whole: it is read as far as the id. "" if there is none. The values
// before it are stepped over and not decoded, for they may hold a MiB of speech.
func scanJSONID(data []byte) string {
	rest := jsonScan(data)
	if !rest.take('{') {
		return ""
	}
	for {
		key, ok := rest.text()
		if !ok || !rest.take(':') {
			return ""
		}
		if unquote(key) == "id" {
			value, _ := rest.text()
			return unquote(value)
		}
		if rest.skip(); !rest.take(',') {
			return ""
		}
	}
}

// unquote reads a JSON string; "" where it is none. One without escapes, as every
// id that fits the pattern, is what it looks like.
func unquote(quoted []byte) string {
	if len(quoted) >= 2 && bytes.IndexByte(quoted, '\\') < 0 {
		return string(quoted[1 : len(quoted)-1])
	}
	var s string
	if json.Unmarshal(quoted, &s) != nil {
		return ""
	}
	return s
}

// jsonScan is the rest of a JSON text that is being stepped through.
type jsonScan []byte

// take steps over white space and c, where c is what follows.
func (s *jsonScan) take(c byte) bool {
	*s = bytes.TrimLeft(*s, " \t\r\n")
	if len(*s) == 0 || (*s)[0] != c {
		return false
	}
	*s = (*s)[1:]
	return true
}

// text steps over a string and returns it, with its quotes.
func (s *jsonScan) text() ([]byte, bool) {
	*s = bytes.TrimLeft(*s, " \t\r\n")
	data := *s
	if len(data) == 0 || data[0] != '"' {
		return nil, false
	}
	for end := 1; ; end++ {
		quote := bytes.IndexByte(data[end:], '"')
		if quote < 0 {
			return nil, false
		}
		end += quote
		escapes := 0
		for data[end-1-escapes] == '\\' {
			escapes++
		}
		if escapes%2 == 0 {
			*s = data[end+1:]
			return data[:end+1], true
		}
	}
}

// skip steps over a value of any kind; over nothing where there is none.
func (s *jsonScan) skip() {
	for depth := 0; ; {
		if _, ok := s.text(); !ok {
			i := bytes.IndexAny(*s, `"{}[],`)
			if i < 0 {
				return
			}
			*s = (*s)[i:]
			switch c := (*s)[0]; {
			case c == '"' && i > 0 && depth > 0:
				continue // a string after something else: the next text
			case c == '"':
				return // a string that does not end, or that is out of place
			case c == '{' || c == '[':
				depth++
			case depth == 0:
				return // what follows a number or a word
			case c == '}' || c == ']':
				depth--
			}
			*s = (*s)[1:]
		}
		if depth == 0 {
			return
		}
	}
}

// scanProtobufID reads field 1 of a protobuf message, as far as it can be read;
// as in any protobuf message the last one counts.
func scanProtobufID(data []byte) string {
	var id string
	for len(data) > 0 {
		num, typ, n := protowire.ConsumeTag(data)
		if n < 0 {
			return id
		}
		data = data[n:]
		if num == 1 && typ == protowire.BytesType {
			value, n := protowire.ConsumeBytes(data)
			if n < 0 {
				return id
			}
			id, data = string(value), data[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(num, typ, data); n < 0 {
			return id
		}
		data = data[n:]
	}
	return id
}
