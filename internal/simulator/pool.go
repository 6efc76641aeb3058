package simulator

import (
	"bytes"
	"sync"
)

// envelopePool provides buffers for one envelope each to running pumps.
type envelopePool struct{ pool sync.Pool }

func (p *envelopePool) get() []byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return *b
	}
	return make([]byte, 0, frameLen*keyFrameSize+256)
}

func (p *envelopePool) put(b []byte) { p.pool.Put(&b) }

// bufferPool provides buffers for one client message each, so that a silent
// session holds none.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) get() *bytes.Buffer {
	if b, ok := p.pool.Get().(*bytes.Buffer); ok {
		b.Reset()
		return b
	}
	return new(bytes.Buffer)
}

func (p *bufferPool) put(b *bytes.Buffer) { p.pool.Put(b) }
