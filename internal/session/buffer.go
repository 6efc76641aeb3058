package session

import (
	"io"
	"sync"
)

// Buffers come in these sizes. A real frame of 49,868 bytes fits the third.
var bufferSizes = [...]int{4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, readLimit + 1}

// buffer is a pooled buffer; b keeps its full length.
type buffer struct {
	b     []byte
	class int
}

// bufferPool provides buffers for messages. A session holds none between
// messages, so that an idle session uses no buffer memory.
type bufferPool struct{ classes [len(bufferSizes)]sync.Pool }

func newBufferPool() *bufferPool {
	p := &bufferPool{}
	for i := range p.classes {
		p.classes[i].New = func() any { return &buffer{b: make([]byte, bufferSizes[i]), class: i} }
	}
	return p
}

func (p *bufferPool) get(class int) *buffer { return p.classes[class].Get().(*buffer) }
func (p *bufferPool) put(b *buffer)         { p.classes[b.class].Put(b) }

// classOf returns the smallest class with room for n bytes and one more, which
// shows the end of a message without another buffer.
func classOf(n int) int {
	for i, size := range bufferSizes {
		if n < size {
			return i
		}
	}
	return len(bufferSizes) - 1
}

// readMessage reads r to its end into a buffer of class hint, or a larger one if
// needed. The caller returns the buffer to the pool, even after an error.
func (p *bufferPool) readMessage(r io.Reader, hint int) (*buffer, int, error) {
	buf, n := p.get(hint), 0
	for {
		if n == len(buf.b) {
			if buf.class == len(bufferSizes)-1 {
				return buf, n, errTooBig
			}
			larger := p.get(buf.class + 1)
			copy(larger.b, buf.b)
			p.put(buf)
			buf = larger
		}
		m, err := r.Read(buf.b[n:])
		n += m
		if err == io.EOF {
			return buf, n, nil
		}
		if err != nil {
			return buf, n, err
		}
	}
}
