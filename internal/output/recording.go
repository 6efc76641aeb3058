package output

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protowire"

	"avatarworker/internal/errors"
)

// framesPerSecond is the rate of the backend's key frames (docs/protocol.md,
// section 4).
const framesPerSecond = 25

// maxEnvelope is the size of the largest envelope in a recording. The session
// reads no larger ones.
const maxEnvelope = 16 << 20

// RecordedUtterance describes one utterance of a recording.
type RecordedUtterance struct {
	ReqID     string  `json:"req_id"`
	Envelopes int     `json:"envelopes"`
	KeyFrames int     `json:"key_frames"`
	Seconds   float64 `json:"seconds"` // of speech: key frames at 25 a second
	Bytes     int64   `json:"bytes"`
	Whole     bool    `json:"whole"` // its last envelope is there
}

// RecordingInfo describes the contents of a recording.
type RecordingInfo struct {
	Utterances []RecordedUtterance `json:"utterances"`
	Envelopes  int                 `json:"envelopes"`
	KeyFrames  int                 `json:"key_frames"`
	Seconds    float64             `json:"seconds"`
	Bytes      int64               `json:"bytes"`
	Whole      bool                `json:"whole"` // every utterance is, and nothing follows the last
}

// ReadRecording reads a recording to its end. If the recording is damaged, the
// error says where, and the info covers what was read before.
func ReadRecording(r io.Reader) (RecordingInfo, error) {
	info := RecordingInfo{Utterances: []RecordedUtterance{}}
	in := bufio.NewReader(r)
	for {
		envelope, err := readEnvelope(in)
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = info.add(envelope)
		}
		if err != nil {
			return info.summed(false), fmt.Errorf("envelope %d: %w", info.Envelopes+1, err)
		}
	}
	return info.summed(true), nil
}

func readEnvelope(in *bufio.Reader) ([]byte, error) {
	length, err := binary.ReadUvarint(in)
	if err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, errors.New("the recording ends within a length")
		}
		return nil, err
	}
	if length > maxEnvelope {
		return nil, fmt.Errorf("an envelope length of %d bytes: this is not a recording, or it is damaged", length)
	}
	envelope := make([]byte, length)
	if n, err := io.ReadFull(in, envelope); err != nil {
		return nil, fmt.Errorf("the recording ends after %d of %d bytes", n, length)
	}
	return envelope, nil
}

func (i *RecordingInfo) add(envelope []byte) error {
	reqID, end, frames, err := inspect(envelope)
	if err != nil {
		return err
	}
	last := len(i.Utterances) - 1
	if last < 0 || i.Utterances[last].ReqID != reqID || i.Utterances[last].Whole {
		i.Utterances = append(i.Utterances, RecordedUtterance{ReqID: reqID})
		last++
	}
	u := &i.Utterances[last]
	u.Envelopes++
	u.KeyFrames += frames
	u.Bytes += int64(len(envelope))
	u.Whole = end
	i.Envelopes++
	return nil
}

func (i RecordingInfo) summed(ended bool) RecordingInfo {
	i.Whole = ended && len(i.Utterances) > 0
	for n := range i.Utterances {
		u := &i.Utterances[n]
		u.Seconds = float64(u.KeyFrames) / framesPerSecond
		i.KeyFrames += u.KeyFrames
		i.Bytes += u.Bytes
		i.Whole = i.Whole && u.Whole
	}
	i.Seconds = float64(i.KeyFrames) / framesPerSecond
	return i
}

// inspect parses an animation envelope (docs/protocol.md, section 4): field 6 of
// the message contains req_id=2, end=3 and the animation data=4, which contains
// the repeated key frames=1.
func inspect(envelope []byte) (reqID string, end bool, frames int, err error) {
	animation, ok := field(envelope, 6)
	if !ok {
		return "", false, 0, errors.New("not an animation envelope of the backend")
	}
	id, _ := field(animation, 2)
	data, _ := field(animation, 4)
	for len(data) > 0 {
		num, typ, n := protowire.ConsumeTag(data)
		if n < 0 {
			return "", false, 0, errors.New("its animation data is damaged")
		}
		m := protowire.ConsumeFieldValue(num, typ, data[n:])
		if m < 0 {
			return "", false, 0, errors.New("its animation data is damaged")
		}
		if num == 1 && typ == protowire.BytesType {
			frames++
		}
		data = data[n+m:]
	}
	return string(id), flag(animation, 3), frames, nil
}

// field returns the last value of a length-delimited field.
func field(b []byte, want protowire.Number) (value []byte, found bool) {
	each(b, func(num protowire.Number, typ protowire.Type, raw []byte) {
		if num == want && typ == protowire.BytesType {
			if v, n := protowire.ConsumeBytes(raw); n >= 0 {
				value, found = v, true
			}
		}
	})
	return value, found
}

// flag returns the last value of a boolean field.
func flag(b []byte, want protowire.Number) (on bool) {
	each(b, func(num protowire.Number, typ protowire.Type, raw []byte) {
		if num == want && typ == protowire.VarintType {
			if v, n := protowire.ConsumeVarint(raw); n >= 0 {
				on = v != 0
			}
		}
	})
	return on
}

func each(b []byte, f func(protowire.Number, protowire.Type, []byte)) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return
		}
		m := protowire.ConsumeFieldValue(num, typ, b[n:])
		if m < 0 {
			return
		}
		f(num, typ, b[n:n+m])
		b = b[n+m:]
	}
}
