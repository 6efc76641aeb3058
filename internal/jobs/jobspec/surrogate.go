package jobspec

import (
	"bytes"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

const loneSurrogate = `holds half a surrogate pair: \ud800 to \udfff stand for a character only two by two`

// hasLoneSurrogate reports whether a JSON string has an escape \ud800 to \udfff
// without its other half. encoding/json turns it into U+FFFD; protojson refuses
// it.
func hasLoneSurrogate(raw []byte) bool {
	for i := bytes.IndexByte(raw, '\\'); i >= 0 && i < len(raw); i++ {
		if raw[i] != '\\' {
			continue
		}
		r, ok := escapedUnit(raw[i:])
		switch {
		case !ok:
			i++ // the character that is escaped may be a backslash itself
		case !utf16.IsSurrogate(r):
			i += unitLen - 1
		default:
			low, _ := escapedUnit(raw[i+unitLen:])
			if utf16.DecodeRune(r, low) == utf8.RuneError {
				return true
			}
			i += 2*unitLen - 1
		}
	}
	return false
}

// unitLen is the length of an escape such as \ud800.
const unitLen = len(`\ud800`)

// escapedUnit returns the UTF-16 unit of an escape at the start of raw.
func escapedUnit(raw []byte) (rune, bool) {
	if len(raw) < unitLen || raw[0] != '\\' || raw[1] != 'u' {
		return 0, false
	}
	unit, err := strconv.ParseUint(string(raw[2:unitLen]), 16, 16)
	return rune(unit), err == nil
}
