package sniff

import (
	"bytes"
	"encoding/binary"
	"strings"
)

// TagSize is how many bytes of a tag Tag wants to see: all of an ID3v1 tag.
const TagSize = 128

// tagFrames are the frames with which ID3v2 tags begin: four letters, and three in
// version 2.
const tagFrames = "TIT1 TIT2 TIT3 TALB TPE1 TPE2 TPE3 TPE4 TSSE TXXX TYER TDRC TDAT TDEN TDTG TDRL TORY TDOR TCON TRCK TPOS TCOM TENC TLEN TLAN TCOP TPUB TSRC TMED TBPM TKEY TSIZ TSOP TSOA TSOT TEXT TOPE TOAL TFLT TDLY " +
	"COMM APIC PRIV GEOB UFID USLT SYLT MCDI PCNT POPM WXXX WOAF WCOM WCOP WOAS CHAP CTOC " +
	"TT1 TT2 TT3 TP1 TP2 TAL TEN TSS TXX TYE TCO TRK TPA TCM TLE COM PIC UFI "

// Tag returns where in b something begins that programs put behind samples, and that
// would be played if they have no known end: an ID3 or APE tag, or a chunk with a
// title. It is -1 if there is nothing of the kind. last: the file ends with b.
func Tag(b []byte, last bool) int {
	first := -1
	for _, mark := range []struct {
		magic  string
		before int // bytes of the tag before the magic
		is     func(tag []byte) bool
	}{
		{"ID3", 0, isTag},
		{"INFO", 8, func(tag []byte) bool { return string(tag[:4]) == "LIST" }},
		{"APETAGEX", 0, func(tag []byte) bool {
			return len(tag) >= 12 && between(binary.LittleEndian.Uint32(tag[8:]), 1000, 2000)
		}},
	} {
		for from := 0; ; {
			at := bytes.Index(b[from:], []byte(mark.magic))
			if at < 0 {
				break
			}
			begin := from + at - mark.before
			if from += at + 1; begin < 0 || !mark.is(b[begin:]) {
				continue
			}
			if begin >= 8 && mark.magic == "ID3" && strings.EqualFold(string(b[begin-8:begin-4]), "id3 ") {
				begin -= 8 // the chunk around it
			}
			if first < 0 || begin < first {
				first = begin
			}
			break
		}
	}
	if at := len(b) - TagSize; first < 0 && last && at >= 0 && isTag1(b[at:]) {
		return at
	}
	return first
}

// isTag looks at the version, the size and the first frame of an ID3v2 tag.
func isTag(b []byte) bool {
	if !isID3(b) || b[5]&0x40 != 0 {
		return false
	}
	frame := string(b[10:14]) + " "
	if b[3] == 2 {
		frame = string(b[10:13]) + " "
	}
	return strings.Contains(" "+tagFrames, " "+frame)
}

// isTag1 looks at the five texts of an ID3v1 tag, which end with zeros or spaces.
func isTag1(b []byte) bool {
	if string(b[:3]) != "TAG" {
		return false
	}
	for _, c := range b[3:125] {
		if c > 0 && c < ' ' {
			return false
		}
	}
	for _, c := range b[93:97] { // the year
		if c != 0 && c != ' ' && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}
