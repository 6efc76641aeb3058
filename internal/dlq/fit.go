package dlq

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/jobs/event"
)

const (
	maxHeaders      = 64<<10 - 1 // what the server takes, in bytes
	maxDropped      = 1 << 10    // bytes of the note about headers left out
	maxContentType  = 256        // a longer one names no format that we know
	maxUnzippedBody = 64 << 20   // the server's highest payload limit
)

// room is how much a message may hold.
type room struct{ headers, total int }

func (r room) takes(m *nats.Msg) bool {
	h := headerSize(m.Header)
	return h <= r.headers && h+len(m.Data) <= r.total
}

// fit makes the letter small enough for the server, removing first what is
// needed least: the job's own headers (the largest first, its content type
// last), details of the error, the plain form of its bytes, and only then its
// bytes. Where the jobs stream has the size limit that the worker gives it,
// bytes are never touched.
func (w *Writer) fit(m *nats.Msg, event event.Error) error {
	r := room{headers: maxHeaders, total: int(w.js.Conn().MaxPayload())}
	dropHeaders(m, r)
	if r.takes(m) {
		return nil
	}
	lean, err := eventJSON(event, leanError)
	if err != nil {
		return err
	}
	m.Header.Set(HeaderError, lean)
	if r.takes(m) {
		return nil
	}
	if err := compress(m); err != nil {
		return err
	}
	if r.takes(m) {
		return nil
	}
	m.Header.Del(HeaderEncoding)
	m.Header.Set(HeaderOmitted, strconv.Itoa(len(m.Data))+" bytes")
	m.Data = nil
	if !r.takes(m) {
		return fmt.Errorf("its headers alone do not fit the server's max_payload of %d bytes", r.total)
	}
	return nil
}

func dropHeaders(m *nats.Msg, r room) {
	var dropped []string
	for !r.takes(m) {
		name := leastNeeded(m.Header)
		if name == "" {
			return
		}
		dropped = append(dropped, fmt.Sprintf("%s (%d bytes)", cut(name, maxText), wireSize(name, m.Header[name])))
		delete(m.Header, name)
		m.Header.Set(HeaderDropped, cut(strings.Join(dropped, ", "), maxDropped))
	}
}

// leastNeeded is the largest of the job's own headers; empty if none is left.
func leastNeeded(h nats.Header) string {
	name, size := "", 0
	for n, values := range h {
		own := n == HeaderMsgID || hasPrefixFold(n, origPrefix) || !isOurs(n) && !hasPrefixFold(n, natsPrefix)
		s := wireSize(n, values)
		if strings.EqualFold(n, headerContentType) && s <= maxContentType {
			s = 1 // the bytes can't be read without it
		}
		if own && (s > size || s == size && n < name) {
			name, size = n, s
		}
	}
	return name
}

func compress(m *nats.Msg) error {
	var small bytes.Buffer
	z := gzip.NewWriter(&small)
	if _, err := z.Write(m.Data); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	if small.Len() < len(m.Data) {
		m.Data = small.Bytes()
		m.Header.Set(HeaderEncoding, "gzip")
	}
	return nil
}

// body gives the job's bytes back as they were published.
func body(h nats.Header, data []byte) ([]byte, error) {
	switch encoding := h.Get(HeaderEncoding); encoding {
	case "":
		return data, nil
	case "gzip":
		z, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			return nil, fmt.Errorf("unpacking the job's bytes: %w", err)
		}
		plain, err := io.ReadAll(io.LimitReader(z, maxUnzippedBody+1))
		if err != nil {
			return nil, fmt.Errorf("unpacking the job's bytes: %w", err)
		}
		if len(plain) > maxUnzippedBody {
			return nil, fmt.Errorf("unpacking the job's bytes: they have more than %d MiB, which no job has", maxUnzippedBody>>20)
		}
		return plain, z.Close()
	default:
		return nil, fmt.Errorf("header %s is %q: only gzip is known", HeaderEncoding, cut(encoding, 40))
	}
}
