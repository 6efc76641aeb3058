package sniff

// legacyText names a file that is text in Latin-1 or Shift-JIS. It takes more words
// than UTF-8, for nearly any bytes are valid in both.
func legacyText(b []byte) (Kind, bool) {
	const least = 16
	if len(b) < least || !latin1(b) && !shiftJIS(b) {
		return Kind{}, false
	}
	return Kind{"text (not UTF-8)", remedyText}, true
}

// latin1 reports whether b is ASCII with some letters of Latin-1 in its words, and
// the quotation marks of Windows.
func latin1(b []byte) bool {
	const (
		share  = 8 // at most one byte in so many is not ASCII
		least  = 32
		varies = 10
	)
	high, different := 0, 0
	var seen [256]bool
	for _, c := range b {
		if isControl(c) || c >= 0x80 && c < 0xa0 && (c < 0x91 || c > 0x97) {
			return false
		}
		if c >= 0x80 {
			high++
		}
		if !seen[c] {
			seen[c] = true
			different++
		}
	}
	if high == 0 || high*share > len(b) || different < varies {
		return false
	}
	runes := make([]rune, len(b))
	for i, c := range b {
		runes[i] = rune(c)
		if c >= 0x91 && c <= 0x97 {
			runes[i] = '\''
		}
	}
	return words([]byte(string(runes)))-6*high >= least // 6: what words gives for one
}

// shiftJIS reports whether b is Shift-JIS with kana. Most pairs of bytes are a
// character of it, but few are kana.
func shiftJIS(b []byte) bool {
	const kanaLeast, kanaVaries = 5, 4
	kana := 0
	seen := make(map[[2]byte]bool)
	for i := 0; i < len(b); i++ {
		c := b[i]
		switch {
		case isControl(c):
			return false
		case c < 0x80, c >= 0xa1 && c <= 0xdf: // ASCII, katakana of half width
			continue
		case i+1 == len(b):
			continue
		}
		i++
		next := b[i]
		switch {
		case c == 0x82 && next >= 0x9f && next <= 0xf1, c == 0x83 && next >= 0x40 && next <= 0x96 && next != 0x7f:
			kana++
			seen[[2]byte{c, next}] = true
		case (c >= 0x81 && c <= 0x9f || c >= 0xe0 && c <= 0xea) && next >= 0x40 && next <= 0xfc && next != 0x7f:
		default:
			return false
		}
	}
	return kana >= kanaLeast && len(seen) >= kanaVaries
}
