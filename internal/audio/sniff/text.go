package sniff

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	// textLeast is how much text there has to be to be known as such without
	// any structure, and jsonLeast how much JSON.
	textLeast = 32
	jsonLeast = 8
	// textVaries is how many different ASCII characters text has at least: a loud
	// square wave may be Printable throughout, but has four bytes.
	textVaries = 8
)

// text names a file that is text throughout.
func text(head []byte) string {
	if !isText(head) {
		return ""
	}
	b := bytes.ToLower(bytes.TrimLeft(bytes.TrimPrefix(head, []byte("\xef\xbb\xbf")), " \t\r\n"))
	starts := func(prefix string) bool { return bytes.HasPrefix(b, []byte(prefix)) }
	if len(head) < textLeast {
		if len(head) >= jsonLeast && (starts("{") || starts("[")) && json.Valid(head) {
			return "JSON"
		}
		return ""
	}
	switch {
	case starts("{"), starts("["):
		return "JSON"
	case starts("<!doctype html"), starts("<html"):
		return "a web page"
	case starts("<"):
		return "an XML document"
	case starts("data:"):
		return "a data: URL"
	case starts("#extm3u"):
		return "a playlist"
	default:
		return "text"
	}
}

// wideText names a file that is text in UTF-16, with the mark of its byte order.
func wideText(head []byte) string {
	if len(head) < 2+2*textLeast {
		return ""
	}
	var order binary.ByteOrder = binary.LittleEndian
	if order.Uint16(head) != 0xfeff {
		order = binary.BigEndian
	}
	if order.Uint16(head) != 0xfeff {
		return ""
	}
	units := make([]uint16, 0, len(head)/2)
	for at := 2; at+2 <= len(head); at += 2 {
		units = append(units, order.Uint16(head[at:]))
	}
	if name := text([]byte(string(utf16.Decode(units)))); name != "" {
		return name + " (UTF-16)"
	}
	return ""
}

// isMultipart looks for the header of the first part behind its boundary.
func isMultipart(h []byte) bool {
	boundary, part, found := bytes.Cut(h[:min(len(h), 1024)], []byte("\r\n"))
	return found && len(boundary) > 2 && len(boundary) <= 72 && Printable(boundary) &&
		bytes.HasPrefix(bytes.ToLower(part), []byte("content-"))
}

// isText reports whether b is UTF-8 without control characters. A character
// that is cut off at the end is one.
func isText(b []byte) bool {
	var seen [utf8.RuneSelf]bool
	different := 0
	for _, c := range b {
		if c < ' ' && c != '\t' && c != '\n' && c != '\r' || c == 0x7f {
			return false
		}
		if c < utf8.RuneSelf && !seen[c] {
			seen[c] = true
			different++
		}
	}
	for cut := 0; cut < utf8.UTFMax && cut < len(b); cut++ {
		if utf8.Valid(b[:len(b)-cut]) {
			return different >= textVaries
		}
	}
	return false
}
