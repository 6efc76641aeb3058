package session

import (
	"crypto/rand"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"avatarworker/internal/session/avatarpb"
)

// Field numbers of the envelope (docs/protocol.md, section 4).
const (
	fieldType      = 1
	fieldAudio     = 4
	fieldAnimation = 6
	fieldInterrupt = 8
)

const nanoidAlphabet = "useandom-26T198340PX75pxJACKVERYMINDBUSHWOLF_GQZbfghjklqvwyzrict"

// newReqID returns an utterance's ID: its second in UTC, `_`, and 12 nanoid
// characters (docs/protocol.md, section 5).
func newReqID(now time.Time) string {
	var b [12]byte
	// It never fails: crypto/rand ends the program instead.
	_, _ = rand.Read(b[:])
	for i, v := range b {
		b[i] = nanoidAlphabet[v&63]
	}
	return now.UTC().Format("20060102150405_") + string(b[:])
}

// traceContext is the trace context in an utterance's first message.
type traceContext struct{ parent, state string }

// appendAudio appends an envelope with ClientAudioInput to b. It is hand-written
// so that a chunk of speech is copied only once, into a pooled buffer.
func appendAudio(b []byte, reqID string, end bool, audio []byte, tc traceContext) []byte {
	tcSize := 0
	if tc.parent != "" {
		tcSize = stringSize(1, tc.parent) + stringSize(2, tc.state)
	}
	size := stringSize(1, reqID)
	if end {
		size += 2
	}
	if len(audio) > 0 {
		size += protowire.SizeTag(3) + protowire.SizeBytes(len(audio))
	}
	if tcSize > 0 {
		size += protowire.SizeTag(4) + protowire.SizeBytes(tcSize)
	}

	b = appendType(b, avatarpb.MessageType_MESSAGE_TYPE_CLIENT_AUDIO_INPUT)
	b = protowire.AppendTag(b, fieldAudio, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	b = appendString(b, 1, reqID)
	if end {
		b = protowire.AppendTag(b, 2, protowire.VarintType)
		b = protowire.AppendVarint(b, 1)
	}
	if len(audio) > 0 {
		b = protowire.AppendTag(b, 3, protowire.BytesType)
		b = protowire.AppendBytes(b, audio)
	}
	if tcSize > 0 {
		b = protowire.AppendTag(b, 4, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(tcSize))
		b = appendString(b, 1, tc.parent)
		b = appendString(b, 2, tc.state)
	}
	return b
}

// appendInterrupt appends an envelope with ClientInterrupt to b.
func appendInterrupt(b []byte, reqID string) []byte {
	b = appendType(b, avatarpb.MessageType_MESSAGE_TYPE_CLIENT_INTERRUPT)
	b = protowire.AppendTag(b, fieldInterrupt, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(stringSize(1, reqID)))
	return appendString(b, 1, reqID)
}

func appendType(b []byte, t avatarpb.MessageType) []byte {
	b = protowire.AppendTag(b, fieldType, protowire.VarintType)
	return protowire.AppendVarint(b, uint64(t))
}

// stringSize is the encoded size of a string field; empty ones are left out.
func stringSize(num protowire.Number, s string) int {
	if s == "" {
		return 0
	}
	return protowire.SizeTag(num) + protowire.SizeBytes(len(s))
}

func appendString(b []byte, num protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	b = protowire.AppendTag(b, num, protowire.BytesType)
	return protowire.AppendString(b, s)
}
