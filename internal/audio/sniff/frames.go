package sniff

import (
	"bytes"
	"encoding/binary"
)

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
