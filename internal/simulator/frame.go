package simulator

import (
	"encoding/binary"
	"math"

	"google.golang.org/protobuf/encoding/protowire"

	"avatarworker/internal/session/avatarpb"
)

// The shape of the real animation (docs/protocol.md, section 4).
const (
	keyFrameRate  = 25  // key frames a second
	keyFrameSize  = 498 // 495 bytes with their tag and length
	firstFrameLen = 50  // key frames in an utterance's first envelope: 2 s
	frameLen      = 100 // and in those after it: 4 s
	motionLen     = 1000
)

// motion is a loop of key frames, encoded once and shared by all sessions. The
// first frameLen are repeated at the end, so that any envelope's key frames are
// one slice.
type motion []byte

func newMotion() motion {
	m := make(motion, 0, (motionLen+frameLen)*keyFrameSize)
	for i := range motionLen + frameLen {
		m = appendKeyFrame(m, i%motionLen)
	}
	return m
}

// slice returns n key frames from number first on, in the encoding of field 4.
func (m motion) slice(first, n int) []byte {
	first %= motionLen
	return m[first*keyFrameSize : (first+n)*keyFrameSize]
}

// appendKeyFrame appends one key frame: seven packed lists of floats that move
// like a speaking face. All waves fit the loop, so it has no seam.
func appendKeyFrame(b []byte, i int) []byte {
	wave := func(cycles int, size, offset float64) float32 {
		return float32(offset + size*math.Sin(2*math.Pi*float64(i*cycles)/motionLen))
	}
	groups := [][]float32{
		{-0.0014, 0.0037, -0.0012},
		make([]float32, 3),
		{wave(7, 0.02, 0.07), wave(5, 0.003, 0), wave(3, 0.01, 0.04)},
		{wave(80, 0.012, 0.018), wave(40, 0.001, -0.005), wave(20, 0.001, 0.002)},
		{wave(4, 0.0001, 0), 0, 0, wave(4, 0.0001, 0), 0, 0},
		make([]float32, 2),
		make([]float32, 100),
	}
	for k := range 50 {
		groups[6][k] = wave(10+3*k%70, 1.7/float64(1+k/4), 0)
	}
	var body []byte
	for g, floats := range groups {
		body = protowire.AppendTag(body, protowire.Number(g+1), protowire.BytesType)
		body = protowire.AppendVarint(body, uint64(4*len(floats)))
		for _, f := range floats {
			body = binary.LittleEndian.AppendUint32(body, math.Float32bits(f))
		}
	}
	b = protowire.AppendTag(b, 1, protowire.BytesType)
	return protowire.AppendBytes(b, body)
}

// appendAnimation appends an envelope with a ServerResponseAnimation. data is its
// field 4, omitted if nil.
func appendAnimation(b []byte, connectionID, reqID string, end bool, data []byte) []byte {
	size := protowire.SizeTag(1) + protowire.SizeBytes(len(connectionID)) +
		protowire.SizeTag(2) + protowire.SizeBytes(len(reqID))
	if end {
		size += 2
	}
	if data != nil {
		size += protowire.SizeTag(4) + protowire.SizeBytes(len(data))
	}
	b = protowire.AppendTag(b, 1, protowire.VarintType)
	b = protowire.AppendVarint(b, uint64(avatarpb.MessageType_MESSAGE_TYPE_SERVER_RESPONSE_ANIMATION))
	b = protowire.AppendTag(b, 6, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	b = protowire.AppendTag(b, 1, protowire.BytesType)
	b = protowire.AppendString(b, connectionID)
	b = protowire.AppendTag(b, 2, protowire.BytesType)
	b = protowire.AppendString(b, reqID)
	if end {
		b = protowire.AppendTag(b, 3, protowire.VarintType)
		b = protowire.AppendVarint(b, 1)
	}
	if data != nil {
		b = protowire.AppendTag(b, 4, protowire.BytesType)
		b = protowire.AppendBytes(b, data)
	}
	return b
}
