package sniff

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"io"
	"regexp"
	"slices"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	// textLeast is how much text there has to be to be known as such without
	// any structure or words; shortLeast is the least of what has either.
	textLeast  = 32
	shortLeast = 8
	// textVaries is how many different ASCII characters text has at least: a loud
	// square wave may be Printable throughout, but has four bytes.
	textVaries = 8
	// wordsLeast is how many points (see words and letters) make text.
	wordsLeast = 20

	utf8Mark = "\xef\xbb\xbf"
)

// text names a file that is text throughout, or the whole of a short JSON message.
func text(head []byte) (Kind, bool) {
	different, ok := printable(head)
	switch {
	case !ok:
		return Kind{}, false
	case len(head) < textLeast:
		return Kind{"JSON", remedyText}, len(head) >= shortLeast && isObject(trimmed(head))
	case different < textVaries && letters(head) < wordsLeast:
		return Kind{}, false
	}
	return textKind(head), true
}

// isObject reports whether b is one JSON object or array.
func isObject(b []byte) bool {
	return len(b) > 0 && (b[0] == '{' || b[0] == '[') && json.Valid(b)
}

// Short names a file of a few bytes: error messages are often shorter than what it
// takes to know the beginning of a long file by.
func Short(file []byte) (Kind, bool) {
	b := trimmed(file)
	if string(b) == "null" || string(b) == "true" || string(b) == "false" {
		return Kind{"JSON", remedyText}, true
	}
	const varies = 6 // characters: one or two samples, again and again, have four
	if different, ok := printable(file); !ok || different+letters(file) < varies || len(file) < shortLeast || len(file) >= textLeast {
		return Kind{}, false
	}
	switch {
	case isJSON(b), isXML(b), isCall(b), isEvents(b), words(file) >= wordsLeast:
		return textKind(file), true
	}
	return Kind{}, false
}

// Text is as Detect and Short, but for a file that can't be PCM: it has the wrong
// size. It may be text in any encoding that has ASCII's control characters.
func Text(head []byte) (Kind, bool) {
	const least = 3
	if len(head) < least || hasControls(head) {
		return Kind{}, false
	}
	switch {
	case utf8.Valid(head):
		return textKind(head), true
	case len(head) < shortLeast:
		return Kind{}, false
	}
	return Kind{"text (not UTF-8)", remedyText}, true
}

// textKind says what kind of text b is.
func textKind(head []byte) Kind {
	b := trimmed(head)
	low := bytes.ToLower(b[:min(len(b), 64)])
	starts := func(prefix string) bool { return bytes.HasPrefix(low, []byte(prefix)) }
	switch {
	case starts("{"), starts("["), isJSON(b):
		return Kind{"JSON", remedyText}
	case starts("<!doctype html"), starts("<html"):
		return Kind{"a web page", remedyText}
	case starts("<"):
		return Kind{"an XML document", remedyText}
	case dataURL.Match(low):
		return Kind{"a data: URL", remedyDecode}
	case isEvents(b):
		return Kind{"text (server-sent events)", remedyText}
	case isCall(b):
		return Kind{"JSON in a call (JSONP)", remedyText}
	case starts("#extm3u"):
		return Kind{"a playlist", remedyText}
	}
	if name := encoded(b); name != "" {
		return Kind{name, remedyDecode}
	}
	return Kind{"text", remedyText}
}

// trimmed is b without a byte order mark and white space.
func trimmed(b []byte) []byte {
	return bytes.TrimSpace(bytes.TrimPrefix(b, []byte(utf8Mark)))
}

// isJSON reports whether b is one JSON value other than a number, or several values.
func isJSON(b []byte) bool {
	if len(b) == 0 || bytes.IndexByte([]byte(`{["tfn`), b[0]) < 0 {
		return false
	}
	values := json.NewDecoder(bytes.NewReader(b))
	for n := 0; ; n++ {
		var value json.RawMessage
		if err := values.Decode(&value); err != nil {
			return err == io.EOF && n > 0
		}
	}
}

var (
	dataURL = regexp.MustCompile(`^data:(?:[a-z]+/[a-z0-9.+-]+)?(?:;[^,;\s]+)*,`)
	call    = regexp.MustCompile(`(?s)^[A-Za-z_$][\w$.]*\((.*)\);?$`)
	event   = regexp.MustCompile(`(?i)^(?:data:\s*[{["]|(?:data|event): )`)
)

// isXML reports whether b begins and ends as an element.
func isXML(b []byte) bool {
	return len(b) >= shortLeast-2 && b[0] == '<' && b[len(b)-1] == '>' &&
		(b[1] == '!' || b[1] == '?' || b[1] >= 'A' && b[1] <= 'Z' || b[1] >= 'a' && b[1] <= 'z')
}

// isCall reports whether b is JSONP.
func isCall(b []byte) bool {
	parts := call.FindSubmatch(b)
	return parts != nil && isJSON(bytes.TrimSpace(parts[1]))
}

// isEvents reports whether b begins as a stream of server-sent events does.
func isEvents(b []byte) bool { return event.Match(b) }

// encoded names a file that is base64; "" if it is not, or of nothing that is known.
func encoded(b []byte) string {
	plain := make([]byte, 0, len(b))
	for _, c := range b {
		switch {
		case c == '\r' || c == '\n' || c == '=':
		case c == '-':
			plain = append(plain, '+')
		case c == '_':
			plain = append(plain, '/')
		case c == '+' || c == '/' || c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z':
			plain = append(plain, c)
		default:
			return ""
		}
	}
	file, err := base64.RawStdEncoding.DecodeString(string(plain[:len(plain)&^3]))
	if err != nil {
		return ""
	}
	if kind, found := signed(file); found {
		return kind.Name + " in base64"
	}
	return ""
}

// wideText names a file that is text in UTF-16, with the mark of its byte order.
func wideText(head []byte) (Kind, bool) {
	if len(head) < 2+2*textLeast {
		return Kind{}, false
	}
	var order binary.ByteOrder = binary.LittleEndian
	if order.Uint16(head) != 0xfeff {
		order = binary.BigEndian
	}
	if order.Uint16(head) != 0xfeff {
		return Kind{}, false
	}
	units := make([]uint16, 0, len(head)/2)
	for at := 2; at+2 <= len(head); at += 2 {
		units = append(units, order.Uint16(head[at:]))
	}
	// Most samples are a character of some script: half of the text is ASCII.
	ascii := 0
	for _, unit := range units {
		if unit < utf8.RuneSelf {
			ascii++
		}
	}
	decoded := []byte(string(utf16.Decode(units)))
	different, ok := printable(decoded)
	if !ok || 2*ascii < len(units) || different < textVaries {
		return Kind{}, false
	}
	kind := textKind(decoded)
	kind.Name += " (UTF-16)"
	return kind, true
}

// isMultipart looks for the header of the first part behind its boundary.
func isMultipart(h []byte) bool {
	boundary, part, found := bytes.Cut(h[:min(len(h), 1024)], []byte("\r\n"))
	return found && len(boundary) > 2 && len(boundary) <= 72 && Printable(boundary) &&
		bytes.HasPrefix(bytes.ToLower(part), []byte("content-"))
}

func isControl(c byte) bool {
	return c < ' ' && c != '\t' && c != '\n' && c != '\r' || c == 0x7f
}

func hasControls(b []byte) bool { return slices.ContainsFunc(b, isControl) }

// printable reports whether b is UTF-8 without control characters, and how many
// different ASCII characters it has. A character that is cut off at the end is one.
func printable(b []byte) (different int, ok bool) {
	var seen [utf8.RuneSelf]bool
	for _, c := range b {
		if isControl(c) {
			return 0, false
		}
		if c < utf8.RuneSelf && !seen[c] {
			seen[c] = true
			different++
		}
	}
	for cut := 0; cut < utf8.UTFMax && cut < len(b); cut++ {
		if utf8.Valid(b[:len(b)-cut]) {
			return different, true
		}
	}
	return 0, false
}

// words scores how much printable text looks like words, in about as many points as bits
// that noise would have to get right. Letters in the case of their word, spaces between
// words and letters of another script give points. What does not occur in words takes
// points away.
func words(b []byte) int {
	points := letters(b)
	before := ' '
	for _, r := range string(b) {
		lower, upper := r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z'
		switch {
		case lower && unicode.IsLetter(before), upper && unicode.IsUpper(before):
			points += 3
		case upper && unicode.IsLower(before):
			points -= 3
		case (lower || upper) && unicode.IsSpace(before):
			points++
		case r == ' ' && !unicode.IsSpace(before):
			points += 2
		case r < utf8.RuneSelf && (r < '0' || r > '9'):
			points--
		}
		before = r
	}
	return points
}

// letters gives points to different letters that are not ASCII; 0 if they are of
// several scripts, for half of all pairs of bytes are a letter of some script.
func letters(b []byte) int {
	points, script := 0, 0
	seen := make(map[rune]bool)
	for _, r := range string(b) {
		if r < utf8.RuneSelf || seen[r] {
			continue
		}
		seen[r] = true
		if unicode.IsControl(r) {
			return 0
		}
		if !unicode.IsLetter(r) {
			continue
		}
		of := scriptOf(r)
		if script == 0 {
			script = of
		}
		if of != script {
			return 0
		}
		points += 2 + 2*utf8.RuneLen(r)
	}
	return points
}

// scriptOf is a number for the script of a letter that is not ASCII.
func scriptOf(r rune) int {
	switch {
	case r < 0x300, r>>8 == 0x1e:
		return 1 // Latin
	case r >= 0x3000 && r < 0xa000, r >= 0xac00 && r < 0xd7b0, r >= 0xff00:
		return 2 // Chinese, Japanese and Korean
	}
	return 3 + int(r>>8)
}
