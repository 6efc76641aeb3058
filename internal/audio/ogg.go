package audio

import (
	"bufio"
	"encoding/binary"
	"io"
)

const (
	oggHeaderSize = 27
	oggMaxPage    = oggHeaderSize + 255 + 255*255

	oggGoesOn = 0x01 // header flag: begins inside a packet
	oggFirst  = 0x02 // begins a logical stream
	oggLast   = 0x04 // ends it

	oggNoGranule = -1 // no packet ends on the page
)

// oggPage is one page as it came; its slices are valid until the next.
type oggPage struct {
	raw      []byte // all of it
	segments []byte // the lacing values: each packet's length in base 255
	body     []byte
	flags    byte
	granule  int64 // samples at 48 kHz up to the page's last finished packet
	serial   uint32
	number   uint32
}

// oggReader takes a file apart into pages (RFC 3533) and holds one at a time.
type oggReader struct {
	in   *input
	r    *bufio.Reader
	buf  []byte
	crc  *[256]uint32
	read int64
}

func newOggReader(in *input, r *bufio.Reader) *oggReader {
	return &oggReader{in: in, r: r, buf: make([]byte, 0, 8<<10), crc: crcTable()}
}

// next returns io.EOF alone at the end of the file.
func (o *oggReader) next() (*oggPage, error) {
	if _, err := o.r.Peek(1); err != nil && endOfFile(err) {
		return nil, io.EOF
	}
	o.buf = o.buf[:0]
	if err := o.more(oggHeaderSize); err != nil {
		return nil, err
	}
	if string(o.buf[:4]) != "OggS" {
		return nil, o.in.broken("Ogg is corrupt: no page begins at byte %d", o.read-oggHeaderSize)
	}
	if version := o.buf[4]; version != 0 {
		return nil, o.in.broken("Ogg has version %d: only 0 is known", version)
	}
	segments := int(o.buf[26])
	if err := o.more(segments); err != nil {
		return nil, err
	}
	body := 0
	for _, s := range o.buf[oggHeaderSize:] {
		body += int(s)
	}
	if err := o.more(body); err != nil {
		return nil, err
	}
	return o.page(segments)
}

func (o *oggReader) page(segments int) (*oggPage, error) {
	b := o.buf
	if binary.LittleEndian.Uint32(b[22:]) != o.checksum() {
		return nil, o.in.broken("Ogg is corrupt: wrong checksum of the page at byte %d", o.read-int64(len(b)))
	}
	return pageOf(b, segments), nil
}

func pageOf(b []byte, segments int) *oggPage {
	return &oggPage{
		raw:      b,
		segments: b[oggHeaderSize : oggHeaderSize+segments],
		body:     b[oggHeaderSize+segments:],
		flags:    b[5],
		granule:  int64(binary.LittleEndian.Uint64(b[6:])),
		serial:   binary.LittleEndian.Uint32(b[14:]),
		number:   binary.LittleEndian.Uint32(b[18:]),
	}
}

// cutPage takes the page off that b begins with; nil: not all of it is there.
func cutPage(b []byte) *oggPage {
	if len(b) < oggHeaderSize {
		return nil
	}
	segments := int(b[26])
	size := oggHeaderSize + segments
	if len(b) < size {
		return nil
	}
	for _, s := range b[oggHeaderSize:size] {
		size += int(s)
	}
	if len(b) < size {
		return nil
	}
	return pageOf(b[:size], segments)
}

// more reads n more bytes of the page.
func (o *oggReader) more(n int) error {
	have := len(o.buf)
	if cap(o.buf) < have+n {
		grown := make([]byte, have, min(oggMaxPage, 2*(have+n)))
		copy(grown, o.buf)
		o.buf = grown
	}
	o.buf = o.buf[:have+n]
	got, err := io.ReadFull(o.r, o.buf[have:])
	o.read += int64(got)
	if endOfFile(err) {
		return o.in.broken("Ogg is cut short: it ends after %d bytes, inside a page", o.read)
	}
	return err
}

// checksum is the page's CRC-32 (polynomial 0x04c11db7, not reflected, unlike
// hash/crc32's), with zeros in place of the field itself.
func (o *oggReader) checksum() uint32 {
	var crc uint32
	for i, c := range o.buf {
		if i >= 22 && i < 26 {
			c = 0
		}
		crc = crc<<8 ^ o.crc[byte(crc>>24)^c]
	}
	return crc
}

func crcTable() *[256]uint32 {
	var table [256]uint32
	for i := range table {
		crc := uint32(i) << 24
		for range 8 {
			if crc&(1<<31) != 0 {
				crc = crc<<1 ^ 0x04c11db7
			} else {
				crc <<= 1
			}
		}
		table[i] = crc
	}
	return &table
}

// packets calls do with the part on this page of each packet that begins on it,
// and reports whether the page's last packet goes on on the next.
func (p *oggPage) packets(continued bool, do func(part []byte)) (open bool) {
	start, end := 0, 0
	for _, s := range p.segments {
		end += int(s)
		open = s == 255
		if open {
			continue
		}
		if !continued {
			do(p.body[start:end])
		}
		continued, start = false, end
	}
	if open && !continued {
		do(p.body[start:end])
	}
	return open
}
