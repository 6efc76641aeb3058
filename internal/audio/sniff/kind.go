package audio

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// sniffed is how many bytes at the beginning of a file are looked at to find out
// what it is: many frames of MPEG audio, and a tenth of a second of speech.
const sniffed = 8 << 10

// remedy is what a user can do about a file that is not taken.
type remedy int

const (
	remedyConvert remedy = iota // ffmpeg reads it
	remedyUnpack                // an archive or a compressed file
	remedyText                  // likely the error message of another service
	remedyBody                  // what was sent over HTTP, and not only the file
	remedyNone                  // no speech is in it
)

// kindOfFile is what a file's first bytes say that it is.
type kindOfFile struct {
	name   string // with its article
	remedy remedy
}

// hint is a line that says what to do, for speech of that rate in Hz (0: not
// known).
func (k kindOfFile) hint(rate int) string {
	switch k.remedy {
	case remedyConvert:
		if rate == 0 {
			rate = 24000
		}
		return fmt.Sprintf("send a WAV, raw PCM or Ogg Opus; to convert it: ffmpeg -i FILE -ac 1 -ar %d -c:a pcm_s16le speech.wav", rate)
	case remedyUnpack:
		return "unpack it and send the WAV, raw PCM or Ogg Opus that is in it"
	case remedyText:
		return "send a WAV, raw PCM or Ogg Opus; it may be the error message of the service that should have made the speech"
	case remedyBody:
		return "send only the WAV, raw PCM or Ogg Opus that is in it"
	default:
		return "send a WAV, raw PCM or Ogg Opus"
	}
}

// detectKind finds out what a file is that begins with head, or is head. It is false
// for what may be raw PCM: a file is only called something else where far more
// than its first few bytes say so, for samples may have any value.
func detectKind(head []byte) (kindOfFile, bool) {
	if len(head) > 0 && strings.IndexByte(signatureStarts, head[0]) >= 0 {
		for _, s := range signatures() {
			if s.is(head) {
				return s.kindOfFile, true
			}
		}
	}
	if name := boxes(head); name != "" {
		return kindOfFile{name, remedyConvert}, true
	}
	if name := frames(head); name != "" {
		return kindOfFile{name, remedyConvert}, true
	}
	if len(head) >= tarMagic+5 && string(head[tarMagic:tarMagic+5]) == "ustar" && head[0] != 0 {
		return kindOfFile{"a tar archive", remedyUnpack}, true
	}
	if name := text(head); name != "" {
		return kindOfFile{name, remedyText}, true
	}
	if name := wideText(head); name != "" {
		return kindOfFile{name, remedyText}, true
	}
	return kindOfFile{}, false
}

// tarMagic is where a tar archive says that it is one.
const tarMagic = 257

// guessKind finds out what a file is by its first four bytes alone. A job that names
// its format is believed against them.
func guessKind(head []byte) (kindOfFile, bool) {
	for _, s := range []signature{
		{kindOfFile{"a FLAC file", remedyConvert}, "fLaC", nil},
		{kindOfFile{"an MP3 file (with an ID3 tag)", remedyConvert}, "ID3\x02", nil},
		{kindOfFile{"an MP3 file (with an ID3 tag)", remedyConvert}, "ID3\x03", nil},
		{kindOfFile{"an MP3 file (with an ID3 tag)", remedyConvert}, "ID3\x04", nil},
	} {
		if s.is(head) {
			return s.kindOfFile, true
		}
	}
	return kindOfFile{}, false
}

// signature is how a file begins: with magic, and then as check wants.
type signature struct {
	kindOfFile
	magic string
	check func(head []byte) bool // nil: the magic says enough
}

func (s signature) is(head []byte) bool {
	return bytes.HasPrefix(head, []byte(s.magic)) && (s.check == nil || s.check(head))
}

// signatureStarts are the first bytes of all signatures: most speech begins with
// none of them.
const signatureStarts = "RBrOfIF.c\x1a\x30#\x02wMTACND\x1f\xfd\x287P%\x89\xffG<H-"

// signatures lists the files that begin with fixed bytes.
func signatures() []signature {
	convert := func(name, magic string, check func([]byte) bool) signature {
		return signature{kindOfFile{name, remedyConvert}, magic, check}
	}
	unpack := func(name, magic string, check func([]byte) bool) signature {
		return signature{kindOfFile{name, remedyUnpack}, magic, check}
	}
	other := func(name, magic string, check func([]byte) bool) signature {
		return signature{kindOfFile{name, remedyNone}, magic, check}
	}
	return []signature{
		convert("a WAV file", "RIFF", func(h []byte) bool { return len(h) < 12 || string(h[8:12]) == "WAVE" }),
		convert("a RIFF file that is not a WAV", "RIFF", func(h []byte) bool { return len(h) >= 12 && printable(h[8:12]) }),
		convert("an RF64 file", "RF64", waveFollows),
		convert("a BW64 file", "BW64", waveFollows),
		convert("a big-endian WAV file (RIFX)", "RIFX", waveFollows),
		convert("a Wave64 file", "riff\x2e\x91\xcf\x11", nil),
		convert("an Ogg file with Vorbis", "OggS", oggHolds("\x01vorbis")),
		convert("an Ogg file with FLAC", "OggS", oggHolds("\x7fFLAC")),
		convert("an Ogg file with Speex", "OggS", oggHolds("Speex   ")),
		convert("an Ogg file with video (Theora)", "OggS", oggHolds("\x80theora")),
		convert("an Ogg file", "OggS", isOgg),
		convert("a FLAC file", "fLaC", func(h []byte) bool { return len(h) >= 8 && h[4]&0x7f == 0 && string(h[5:8]) == "\x00\x00\x22" }),
		convert("an MP3 file (with an ID3 tag)", "ID3", isID3),
		convert("an AIFF file", "FORM", func(h []byte) bool { return formIs(h, "AIFF", "AIFC") }),
		convert("an IFF file (8SVX)", "FORM", func(h []byte) bool { return formIs(h, "8SVX", "16SV", "MAUD") }),
		convert("an AU file", ".snd", func(h []byte) bool {
			return len(h) >= 16 && between(binary.BigEndian.Uint32(h[4:]), 24, 1<<20) && between(binary.BigEndian.Uint32(h[12:]), 1, 64)
		}),
		convert("a CAF file", "caff\x00\x01", nil),
		convert("a WebM or Matroska file", "\x1aE\xdf\xa3", func(h []byte) bool {
			start := h[:min(len(h), 128)]
			return bytes.Contains(start, []byte("webm")) || bytes.Contains(start, []byte("matroska"))
		}),
		convert("an ASF or WMA file", "\x30\x26\xb2\x75\x8e\x66\xcf\x11", nil),
		convert("an AMR file", "#!AMR", nil),
		convert("a SILK file", "#!SILK", nil),
		convert("a SILK file", "\x02#!SILK", nil),
		convert("a RealAudio file", ".ra\xfd\x00", nil),
		convert("a RealMedia file", ".RMF\x00\x00\x00", nil),
		convert("a WavPack file", "wvpk", func(h []byte) bool { return len(h) >= 10 && h[9] == 4 }),
		convert("a Monkey's Audio file", "MAC ", func(h []byte) bool {
			return len(h) >= 6 && between(uint32(binary.LittleEndian.Uint16(h[4:])), 3000, 5000)
		}),
		convert("a True Audio file", "TTA1\x01\x00", nil),
		convert("a Musepack file", "MPCKSH", nil),
		convert("an AAC file (ADIF)", "ADIF", func(h []byte) bool { return len(h) >= 8 }),
		convert("a VOC file", "Creative Voice File\x1a", nil),
		convert("a NIST SPHERE file", "NIST_1A\n", nil),
		convert("an FLV file", "FLV\x01", func(h []byte) bool { return len(h) >= 9 && string(h[5:9]) == "\x00\x00\x00\x09" }),
		convert("a DSD file", "DSD \x1c\x00\x00\x00", nil),
		convert("a DSD file", "FRM8", func(h []byte) bool { return len(h) >= 16 && string(h[12:16]) == "DSD " }),
		convert("an MP3 file (with an APE tag)", "APETAGEX", nil),
		other("a MIDI file, which holds no sound", "MThd\x00\x00\x00\x06", nil),
		unpack("gzip-compressed data", "\x1f\x8b\x08", isGzip),
		unpack("bzip2-compressed data", "BZh", func(h []byte) bool { return len(h) >= 10 && string(h[4:10]) == "1AY&SY" }),
		unpack("xz-compressed data", "\xfd7zXZ\x00", nil),
		unpack("zstd-compressed data", "\x28\xb5\x2f\xfd", func(h []byte) bool { return len(h) >= 8 && h[4]&0x08 == 0 && isZstd(h) }),
		unpack("a 7z archive", "7z\xbc\xaf\x27\x1c", nil),
		unpack("a zip archive", "PK\x03\x04", isZip),
		other("a PDF file", "%PDF-", nil),
		other("a PNG image", "\x89PNG\r\n\x1a\n", nil),
		other("a JPEG image", "\xff\xd8\xff", func(h []byte) bool {
			return len(h) >= 10 && slices.Contains([]string{"JFIF", "Exif", "ICC_"}, string(h[6:10]))
		}),
		other("a GIF image", "GIF87a", nil),
		other("a GIF image", "GIF89a", nil),
		{kindOfFile{"an XML document", remedyText}, "<?xml", nil},
		{kindOfFile{"an HTTP answer with its headers", remedyBody}, "HTTP/", func(h []byte) bool { return len(h) >= 12 && printable(h[5:12]) }},
		{kindOfFile{"the body of a form (multipart)", remedyBody}, "--", isMultipart},
	}
}

func between(n, least, most uint32) bool { return n >= least && n <= most }

// printable reports whether an identifier or a name is one, of ASCII characters.
func printable(id []byte) bool {
	return !slices.ContainsFunc(id, func(c byte) bool { return c < ' ' || c > '~' })
}

func waveFollows(h []byte) bool { return len(h) >= 12 && string(h[8:12]) == "WAVE" }

func formIs(h []byte, types ...string) bool {
	return len(h) >= 12 && slices.Contains(types, string(h[8:12]))
}

// isOgg looks at the version, the flags and the segments of the first page.
func isOgg(h []byte) bool {
	return (len(h) < 6 || h[4] == 0 && h[5] <= 7) && (len(h) < oggHeaderSize || h[26] > 0)
}

func oggHolds(codec string) func([]byte) bool {
	return func(h []byte) bool {
		if !isOgg(h) || len(h) < oggHeaderSize {
			return false
		}
		body := oggHeaderSize + int(h[26])
		return len(h) > body && bytes.HasPrefix(h[body:], []byte(codec))
	}
}

// isID3 looks at the version, the flags, the size (four times seven bits) and
// the first frame of an ID3v2 tag.
func isID3(h []byte) bool {
	if len(h) < 14 || h[3] < 2 || h[3] > 4 || h[4] == 0xff || h[5]&0x0f != 0 || (h[6]|h[7]|h[8]|h[9])&0x80 != 0 {
		return false
	}
	upper := func(c byte) bool { return c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' }
	first := h[10:13]
	return h[5]&0x40 != 0 || string(first) == "\x00\x00\x00" || upper(first[0]) && upper(first[1]) && upper(first[2])
}

// isGzip looks at the flags, the level and the system, and unpacks as much of the
// head as there is.
func isGzip(h []byte) bool {
	if len(h) < 18 || h[3] > 0x1f || h[8] != 0 && h[8] != 2 && h[8] != 4 || h[9] > 13 && h[9] != 255 {
		return false
	}
	// Soft noise can look like a block that is stored and not compressed.
	if h[3] == 0 && h[10]&0x06 == 0 {
		return false
	}
	r, err := gzip.NewReader(bytes.NewReader(h))
	if err != nil {
		return false
	}
	r.Multistream(false)
	n, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20))
	return n > 0 && (err == nil || err == io.ErrUnexpectedEOF)
}

// isZip looks at the version, the method and the name of the first entry.
func isZip(h []byte) bool {
	if len(h) < 30 || h[4] < 10 || h[4] > 63 || h[5] != 0 || h[8] > 99 || h[9] != 0 {
		return false
	}
	name := int(binary.LittleEndian.Uint16(h[26:]))
	return name > 0 && name <= len(h)-30 && printable(h[30:30+name])
}

// isZstd looks at the header of the first block, whose size is at most 128 KiB.
func isZstd(h []byte) bool {
	descriptor := h[4]
	size := 5 + []int{0, 1, 2, 4}[descriptor&3] + []int{0, 2, 4, 8}[descriptor>>6]
	if descriptor&0x20 == 0 {
		size++ // the window
	} else if descriptor>>6 == 0 {
		size++ // the content's size in one byte
	}
	if len(h) < size+3 {
		return false
	}
	block := uint32(h[size]) | uint32(h[size+1])<<8 | uint32(h[size+2])<<16
	return block>>1&3 != 3 && block>>3 <= 128<<10
}

// boxes names a file that is made of MP4's boxes: size, four letters, content.
func boxes(h []byte) string {
	if len(h) < 16 {
		return ""
	}
	size := binary.BigEndian.Uint32(h)
	switch string(h[4:8]) {
	case "ftyp", "styp":
		if between(size, 12, 1024) && size%4 == 0 && printable(h[8:12]) {
			return "an MP4 or M4A file"
		}
	case "moov", "moof", "mdat", "free", "skip", "wide", "sidx", "pnot":
		next := uint64(size)
		if size >= 8 && (next+8 > uint64(len(h)) || printable(h[next+4:next+8])) {
			return "a QuickTime or MP4 file"
		}
	}
	return ""
}

// frameFormat is a format whose files are frames one after the other, each with
// a header.
type frameFormat struct {
	name   string
	first  byte // of a frame
	header int  // bytes of a frame that parse looks at
	// parse gives a frame's size, and what all of its stream's headers have in
	// common; a size of 0: no frame begins here.
	parse func(b []byte) (size int, same uint32)
}

const (
	// A chain of frames from the first byte to the end of what is known is one
	// of this many at least; one that begins later has to be longer.
	chainLeast = 3
	chainLater = 6
	// latestFrame is where a stream that was cut out of another begins at the
	// latest: the longest frame of MP3 has 1,441 bytes.
	latestFrame = 1500
)

// frames names a file that is a chain of frames.
func frames(head []byte) string {
	for _, f := range []frameFormat{
		{"MPEG audio (MP3)", 0xff, 4, mpegFrame},
		{"AAC (ADTS)", 0xff, 7, adtsFrame},
		{"AAC (LATM)", 0x56, 3, latmFrame},
		{"AC-3", 0x0b, 6, ac3Frame},
	} {
		least := chainLeast
		for at := 0; at < max(1, min(len(head)/2, latestFrame)); at++ {
			next := bytes.IndexByte(head[at:], f.first)
			if next < 0 {
				break
			}
			if at += next; at > 0 {
				least = chainLater
			}
			if f.chain(head[at:], least) {
				return f.name
			}
		}
	}
	if transportStream(head) {
		return "an MPEG transport stream"
	}
	return ""
}

// chain reports whether b consists of frames of one stream, up to its end, least
// of them at the least. A wave whose period is a frame's length repeats whatever
// looks like a header: frames that are all the same don't count.
func (f frameFormat) chain(b []byte, least int) bool {
	first, common := f.next(b, 0)
	if first == 0 {
		return false
	}
	count, differ := 0, false
	for at := 0; at+f.header <= len(b); count++ {
		size, same := f.next(b, at)
		if size == 0 || same != common {
			// What follows the last frame may be a tag.
			return differ && count >= 2*chainLater
		}
		if end := at + size; end <= len(b) && !bytes.Equal(b[:min(first, size)], b[at:at+min(first, size)]) {
			differ = true
		}
		at += size
	}
	return count >= least && differ
}

func (f frameFormat) next(b []byte, at int) (size int, same uint32) {
	if at+f.header > len(b) {
		return 0, 0
	}
	size, same = f.parse(b[at:])
	if size < f.header {
		return 0, 0
	}
	return size, same
}

// mpegFrame reads the header of a frame of MPEG audio, layers 2 and 3 (ISO
// 11172-3, 2.4.2.3; 13818-3; version 2.5 as decoders know it).
func mpegFrame(b []byte) (size int, same uint32) {
	if b[0] != 0xff || b[1]&0xe0 != 0xe0 {
		return 0, 0
	}
	version, layer := b[1]>>3&3, 4-int(b[1]>>1&3) // version: 0 is 2.5, 2 is 2, 3 is 1
	rate, pad := int(b[2]>>2&3), int(b[2]>>1&1)
	index := int(b[2] >> 4)
	if version == 1 || layer != 2 && layer != 3 || rate == 3 || index == 0 || index == 15 {
		return 0, 0
	}
	hz := []int{44100, 48000, 32000}[rate]
	kbit := []int{0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160}[index]
	samples := 144
	switch {
	case version == 3 && layer == 2:
		kbit = []int{0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384}[index]
	case version == 3:
		kbit = []int{0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320}[index]
	default:
		hz /= []int{4, 1, 2}[version]
		if layer == 3 {
			samples = 72
		}
	}
	mono := uint32(0)
	if b[3]>>6 == 3 {
		mono = 1
	}
	return samples*kbit*1000/hz + pad, uint32(b[1])<<16 | uint32(rate)<<8 | mono
}

// adtsFrame reads the header of a frame of AAC (ISO 13818-7, 6.2).
func adtsFrame(b []byte) (size int, same uint32) {
	if b[0] != 0xff || b[1]&0xf6 != 0xf0 || b[2]>>2&0xf > 12 {
		return 0, 0
	}
	size = int(b[3]&3)<<11 | int(b[4])<<3 | int(b[5])>>5
	return size, uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3]&0xf0)
}

// latmFrame reads the header of a frame of LOAS (ISO 14496-3, 1.7.2).
func latmFrame(b []byte) (size int, same uint32) {
	if b[0] != 0x56 || b[1]&0xe0 != 0xe0 {
		return 0, 0
	}
	return 3 + int(b[1]&0x1f)<<8 | int(b[2]), 0
}

// ac3Frame reads the header of a frame of AC-3 (ETSI TS 102 366, 4.3 and E.1.2).
func ac3Frame(b []byte) (size int, same uint32) {
	if b[0] != 0x0b || b[1] != 0x77 {
		return 0, 0
	}
	id := b[5] >> 3
	if id > 10 && id <= 16 { // E-AC-3
		return 2 * (int(b[2]&7)<<8 + int(b[3]) + 1), uint32(id)<<8 | uint32(b[4]>>6)
	}
	rate, code := b[4]>>6, int(b[4]&0x3f)
	if id > 10 || rate == 3 || code > 37 {
		return 0, 0
	}
	kbit := []int{32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640}[code/2]
	words := []int{2 * kbit, 96000*kbit/44100 + code&1, 3 * kbit}[rate]
	return 2 * words, uint32(id)<<8 | uint32(rate)
}

// transportStream looks for packets of 188 bytes whose counters count.
func transportStream(head []byte) bool {
	const packet, least = 188, 5
	counters := make(map[uint16]byte)
	count, counted := 0, 0
	for at := 0; at+packet <= len(head); at += packet {
		b := head[at:]
		if b[0] != 0x47 || b[3]&0x30 == 0 {
			return false
		}
		pid, counter := binary.BigEndian.Uint16(b[1:])&0x1fff, b[3]&0x0f
		if before, seen := counters[pid]; seen && b[3]&0x10 != 0 && pid != 0x1fff {
			if counter != (before+1)&0x0f {
				return false
			}
			counted++
		}
		counters[pid] = counter
		count++
	}
	return count >= least && counted > 0
}

const (
	// textLeast is how much text there has to be to be known as such without
	// any structure, and jsonLeast how much JSON.
	textLeast = 32
	jsonLeast = 8
	// textVaries is how many different ASCII characters text has at least: a loud
	// square wave may be printable throughout, but has four bytes.
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
	return found && len(boundary) > 2 && len(boundary) <= 72 && printable(boundary) &&
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

// wavInside looks for the header of a WAV file in samples that come piece by
// piece: files that were joined without taking their headers off.
type wavInside struct {
	tail []byte // of the piece before: one byte less than a header's beginning
	read int64
}

// wavBegins is how many bytes of a header are looked for: RIFF, a size, WAVE and
// the name of a chunk.
const wavBegins = 16

// find gives the position of the first header that begins or ends in the next
// piece; -1: there is none.
func (w *wavInside) find(piece []byte) int64 {
	before := len(w.tail)
	w.tail = append(w.tail, piece[:min(len(piece), wavBegins-1)]...)
	at := headerIn(w.tail)
	start := w.read - int64(before)
	if at < 0 {
		at, start = headerIn(piece), w.read
	}
	w.read += int64(len(piece))
	if len(piece) >= wavBegins-1 {
		w.tail = append(w.tail[:0], piece[len(piece)-wavBegins+1:]...)
	} else if over := len(w.tail) - (wavBegins - 1); over > 0 {
		w.tail = append(w.tail[:0], w.tail[over:]...)
	}
	if at < 0 {
		return -1
	}
	return start + int64(at)
}

func headerIn(b []byte) int {
	for from := 0; ; {
		i := bytes.Index(b[from:], []byte("WAVE"))
		if i < 0 {
			return -1
		}
		i += from
		if riff := i - 8; riff >= 0 && i+8 <= len(b) && printable(b[i+4:i+8]) &&
			slices.Contains([]string{"RIFF", "RF64"}, string(b[riff:riff+4])) {
			return riff
		}
		from = i + 1
	}
}
