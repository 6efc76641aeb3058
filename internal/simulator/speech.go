package simulator

import (
	"encoding/binary"
	"fmt"
)

// meter measures an utterance's speech as it arrives.
type meter interface {
	// write adds the next bytes, divided anywhere.
	write(p []byte) error
	// keyFrames returns the number of whole key frames that the speech fills.
	keyFrames() int
	// empty reports whether there was no speech at all.
	empty() bool
}

// pcmMeter measures 16-bit mono samples.
type pcmMeter struct {
	rate  int64 // Hz
	bytes int64
}

func (m *pcmMeter) write(p []byte) error { m.bytes += int64(len(p)); return nil }
func (m *pcmMeter) keyFrames() int       { return int(m.bytes / 2 * keyFrameRate / m.rate) }
func (m *pcmMeter) empty() bool          { return m.bytes == 0 }

const (
	oggHeaderLen = 27
	oggMaxPage   = oggHeaderLen + 255 + 255*255
	opusClock    = 48000 // granule positions count at 48 kHz whatever the rate
)

// oggMeter measures Ogg Opus by the granule positions of its pages (RFC 3533,
// RFC 7845).
type oggMeter struct {
	buf     []byte // an incomplete page
	pages   int
	preSkip int64
	granule int64
}

func (m *oggMeter) write(p []byte) error {
	m.buf = append(m.buf, p...)
	for {
		n, err := m.page(m.buf)
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		m.buf = append(m.buf[:0], m.buf[n:]...)
	}
}

// page parses the page at the front of b and returns its length, or 0 if it is
// incomplete.
func (m *oggMeter) page(b []byte) (int, error) {
	if n := min(len(b), 4); string(b[:n]) != "OggS"[:n] {
		return 0, fmt.Errorf("page %d of the Ogg stream does not start with OggS", m.pages+1)
	}
	if len(b) < oggHeaderLen {
		return 0, nil
	}
	segments := int(b[26])
	if len(b) < oggHeaderLen+segments {
		return 0, nil
	}
	size := oggHeaderLen + segments
	body := size
	for _, s := range b[oggHeaderLen:body] {
		size += int(s)
	}
	if len(b) < size {
		return 0, nil
	}
	if m.pages == 0 {
		head := b[body:size]
		if len(head) < 12 || string(head[:8]) != "OpusHead" {
			return 0, fmt.Errorf("the first Ogg page has no OpusHead")
		}
		m.preSkip = int64(binary.LittleEndian.Uint16(head[10:]))
	}
	m.pages++
	// -1 means that no packet ends on the page.
	if g := int64(binary.LittleEndian.Uint64(b[6:])); g > m.granule {
		m.granule = g
	}
	return size, nil
}

func (m *oggMeter) keyFrames() int {
	samples := max(0, m.granule-m.preSkip)
	// Limit to a day of speech: a larger granule position is invalid.
	return int(min(samples, 24*3600*opusClock) * keyFrameRate / opusClock)
}

func (m *oggMeter) empty() bool { return m.granule <= m.preSkip }
