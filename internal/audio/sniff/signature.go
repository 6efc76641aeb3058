package sniff

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"io"
	"slices"
)

// signature is how a file begins: with magic, and then as check wants.
type signature struct {
	Kind
	magic string
	check func(head []byte) bool // nil: the magic says enough
}

func (s signature) is(head []byte) bool {
	return bytes.HasPrefix(head, []byte(s.magic)) && (s.check == nil || s.check(head))
}

// signatureStarts are the first bytes of all signatures: most speech begins with
// none of them.
const signatureStarts = "RBrOfIF.dc\x1a\x30#\x02wMTACND\x1f\xfd\x287P%\x89\xffG<H-"

// signatures lists the files that begin with fixed bytes.
func signatures() []signature {
	convert := func(name, magic string, check func([]byte) bool) signature {
		return signature{Kind{name, remedyConvert}, magic, check}
	}
	unpack := func(name, magic string, check func([]byte) bool) signature {
		return signature{Kind{name, remedyUnpack}, magic, check}
	}
	other := func(name, magic string, check func([]byte) bool) signature {
		return signature{Kind{name, remedyNone}, magic, check}
	}
	return []signature{
		convert("a WAV file", "RIFF", func(h []byte) bool { return len(h) < 12 || string(h[8:12]) == "WAVE" }),
		convert("a RIFF file that is not a WAV", "RIFF", func(h []byte) bool { return len(h) >= 12 && Printable(h[8:12]) }),
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
		convert("an AU file", ".snd", isAU(binary.BigEndian)),
		convert("a little-endian AU file", "dns.", isAU(binary.LittleEndian)),
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
		{Kind{"an XML document", remedyText}, "<?xml", nil},
		{Kind{"an HTTP answer with its headers", remedyBody}, "HTTP/", func(h []byte) bool { return len(h) >= 12 && h[5] >= '0' && h[5] <= '9' && Printable(h[5:12]) }},
		{Kind{"the body of a form (multipart)", remedyBody}, "--", isMultipart},
	}
}

func between(n, least, most uint32) bool { return n >= least && n <= most }

// Printable reports whether an identifier or a name is one, of ASCII characters.
func Printable(id []byte) bool {
	return !slices.ContainsFunc(id, func(c byte) bool { return c < ' ' || c > '~' })
}

func waveFollows(h []byte) bool { return len(h) >= 12 && string(h[8:12]) == "WAVE" }

func formIs(h []byte, types ...string) bool {
	return len(h) >= 12 && slices.Contains(types, string(h[8:12]))
}

// isAU looks at where the samples begin and at their encoding.
func isAU(order binary.ByteOrder) func(h []byte) bool {
	return func(h []byte) bool {
		return len(h) >= 16 && between(order.Uint32(h[4:]), 24, 1<<20) && between(order.Uint32(h[12:]), 1, 64)
	}
}

// oggHeader is the size of a page's header without its segments.
const oggHeader = 27

// isOgg looks at the version, the flags and the segments of the first page.
func isOgg(h []byte) bool {
	return (len(h) < 6 || h[4] == 0 && h[5] <= 7) && (len(h) < oggHeader || h[26] > 0)
}

func oggHolds(codec string) func([]byte) bool {
	return func(h []byte) bool {
		if !isOgg(h) || len(h) < oggHeader {
			return false
		}
		body := oggHeader + int(h[26])
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
	return name > 0 && name <= len(h)-30 && Printable(h[30:30+name])
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

// boxes names a file that is made of MP4's boxes: size, four letters, content. A size
// of 1 means one of 64 bits behind the letters, 0 the rest of the file.
func boxes(h []byte) string {
	if len(h) < 16 {
		return ""
	}
	size := binary.BigEndian.Uint32(h)
	switch string(h[4:8]) {
	case "ftyp", "styp":
		if between(size, 12, 1024) && size%4 == 0 && Printable(h[8:12]) {
			return "an MP4 or M4A file"
		}
	case "moov", "moof", "mdat", "free", "skip", "wide", "sidx", "pnot", "ssix", "prft", "emsg", "uuid", "pdin":
		next := uint64(size)
		if size <= 1 || between(size, 8, 1<<24) || next+8 > uint64(len(h)) || Printable(h[next+4:next+8]) {
			return "a QuickTime or MP4 file"
		}
	}
	return ""
}
