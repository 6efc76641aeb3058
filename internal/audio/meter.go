package audio

import (
	"bytes"
	"encoding/binary"
	"time"
)

// maxOpusPacket is the maximum length of a packet (RFC 6716, 2.1.4), in samples
// at opusClock.
const maxOpusPacket = 120 * opusClock / 1000

// opusMeter measures live Ogg Opus as it passes, page by page, however it is
// divided into messages. It judges nothing: data that it can't read has no length
// and is sent on.
type opusMeter struct {
	rest []byte // of a page that is not whole yet; at most oggMaxPage
	skip int64  // samples at the beginning that are not heard (RFC 7845, 4.2)
}

// measure returns the length of the pages that data completes.
func (m *opusMeter) measure(data []byte) time.Duration {
	b := data
	if len(m.rest) > 0 {
		m.rest = append(m.rest, data...)
		b = m.rest
	}
	var samples int64
	b = fromPage(b)
	for page := cutPage(b); page != nil; page = cutPage(b) {
		samples += m.page(page)
		b = fromPage(b[len(page.raw):])
	}
	if len(b) != len(m.rest) { // or it is what is kept already
		m.rest = append(m.rest[:0], b...)
	}
	return pcmLength(samples, opusClock)
}

// fromPage skips data up to the next page. The start of a page may be at the end.
func fromPage(b []byte) []byte {
	const mark = "OggS"
	if i := bytes.Index(b, []byte(mark)); i >= 0 {
		return b[i:]
	}
	return b[max(len(b)-len(mark)+1, 0):]
}

// page counts the samples of the packets that begin on a page.
func (m *opusMeter) page(p *oggPage) int64 {
	var samples int64
	p.packets(p.flags&oggGoesOn != 0, func(packet []byte) {
		switch {
		case bytes.HasPrefix(packet, []byte("OpusHead")) && len(packet) >= opusHeadSize:
			m.skip = int64(binary.LittleEndian.Uint16(packet[10:]))
		case bytes.HasPrefix(packet, []byte("OpusTags")):
		default:
			samples += min(opusSamples(packet), maxOpusPacket)
		}
	})
	unheard := min(m.skip, samples)
	m.skip -= unheard
	return samples - unheard
}
