package simulator

import (
	"encoding/json"
	"fmt"
	"os"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/session/avatarpb"
)

// Exchange is a recorded exchange: one utterance and the envelopes of the
// backend's answer.
type Exchange struct {
	SampleRate   int      `json:"sample_rate"` // Hz
	AudioFormat  string   `json:"audio_format"`
	Audio        []byte   `json:"audio_base64"`
	ConnectionID string   `json:"connection_id"`
	ReqID        string   `json:"req_id"`
	Envelopes    [][]byte `json:"animation_messages_base64"`
}

// LoadExchange reads a recorded exchange and checks that its envelopes can be
// sent: each is an animation, and the last one ends the utterance.
func LoadExchange(path string) (*Exchange, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the recorded exchange: %w", err)
	}
	x, err := ParseExchange(data)
	if err != nil {
		return nil, fmt.Errorf("recorded exchange %s: %w", path, err)
	}
	return x, nil
}

// ParseExchange is LoadExchange for bytes in memory.
func ParseExchange(data []byte) (*Exchange, error) {
	var x Exchange
	if err := json.Unmarshal(data, &x); err != nil {
		return nil, fmt.Errorf("no JSON of the expected shape: %w", err)
	}
	if x.ConnectionID == "" {
		return nil, fmt.Errorf("connection_id: missing")
	}
	if len(x.Envelopes) == 0 {
		return nil, fmt.Errorf("animation_messages_base64: no envelopes")
	}
	for i, e := range x.Envelopes {
		a, err := decodeAnimation(e)
		if err != nil {
			return nil, fmt.Errorf("animation_messages_base64[%d]: %w", i, err)
		}
		if last := i == len(x.Envelopes)-1; a.GetEnd() != last {
			return nil, fmt.Errorf("animation_messages_base64[%d]: end is %t; only the last envelope has to end the utterance",
				i, a.GetEnd())
		}
	}
	return &x, nil
}

func decodeAnimation(b []byte) (*avatarpb.ServerResponseAnimation, error) {
	var env avatarpb.Message
	if err := proto.Unmarshal(b, &env); err != nil {
		return nil, fmt.Errorf("no envelope: %w", err)
	}
	a := env.GetServerResponseAnimation()
	if a == nil {
		return nil, fmt.Errorf("an envelope of type %s without an animation", env.GetType())
	}
	return a, nil
}

// replayFrame is one recorded envelope with the data for pacing and patching.
type replayFrame struct {
	envelope  []byte
	data      []byte // field 4, nil if it is absent
	keyFrames int
	end       bool
}

func (x *Exchange) frames() ([]replayFrame, error) {
	var out []replayFrame
	for _, e := range x.Envelopes {
		a, err := decodeAnimation(e)
		if err != nil {
			return nil, err
		}
		f := replayFrame{envelope: e, end: a.GetEnd()}
		// The public schema omits field 4, so it is among the unknown fields.
		err = fields(a.ProtoReflect().GetUnknown(), func(num protowire.Number, typ protowire.Type, value, _ []byte) error {
			if num == 4 && typ == protowire.BytesType {
				f.data = value
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		err = fields(f.data, func(num protowire.Number, _ protowire.Type, _, _ []byte) error {
			if num == 1 {
				f.keyFrames++
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("animation data: %w", err)
		}
		out = append(out, f)
	}
	return out, nil
}
