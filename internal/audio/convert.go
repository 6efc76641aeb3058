package audio

import (
	"encoding/binary"
	"math"
)

// converter converts mono or stereo samples of any depth to 16-bit mono. It
// computes with 32 bits, so that a mix is rounded once.
func converter(h *wavHeader) func(out, in []byte) {
	sample, width := sampleReader(h), h.bits/8
	if h.channels == 1 {
		return func(out, in []byte) {
			for i := 0; i*width < len(in); i++ {
				put16(out[i*2:], int64(sample(in[i*width:])))
			}
		}
	}
	return func(out, in []byte) {
		for i := 0; i*width*2 < len(in); i++ {
			left, right := sample(in[i*width*2:]), sample(in[i*width*2+width:])
			put16(out[i*2:], (int64(left)+int64(right))/2)
		}
	}
}

// sampleReader reads one sample as 32 bits of full scale.
func sampleReader(h *wavHeader) func(b []byte) int32 {
	if h.tag == wavFloat {
		if h.bits == 64 {
			return func(b []byte) int32 { return fromFloat(math.Float64frombits(binary.LittleEndian.Uint64(b))) }
		}
		return func(b []byte) int32 {
			return fromFloat(float64(math.Float32frombits(binary.LittleEndian.Uint32(b))))
		}
	}
	switch h.bits {
	case 8: // the one depth that is unsigned
		return func(b []byte) int32 { return (int32(b[0]) - 128) << 24 }
	case 16:
		return func(b []byte) int32 { return int32(binary.LittleEndian.Uint16(b)) << 16 }
	case 24:
		return func(b []byte) int32 { return int32(b[0])<<8 | int32(b[1])<<16 | int32(b[2])<<24 }
	default:
		return func(b []byte) int32 { return int32(binary.LittleEndian.Uint32(b)) }
	}
}

// fromFloat treats -1 to 1 as full scale. It clips louder samples, and returns
// silence for NaN.
func fromFloat(f float64) int32 {
	f = math.Round(f * (1 << 31))
	switch {
	case f >= math.MaxInt32:
		return math.MaxInt32
	case f <= math.MinInt32:
		return math.MinInt32
	case math.IsNaN(f):
		return 0
	}
	return int32(f)
}

func put16(out []byte, sample int64) {
	rounded := min((sample+1<<15)>>16, math.MaxInt16)
	binary.LittleEndian.PutUint16(out, uint16(int16(rounded)))
}
