package simulator

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/session/avatarpb"
)

// clientMessage is a message from the client. Only the payload that the type
// names is set.
type clientMessage struct {
	kind      avatarpb.MessageType
	configure *avatarpb.ClientConfigureSession
	audio     *clientAudio
	interrupt string // req_id
}

// clientAudio is a ClientAudioInput whose audio is a slice of the message, so it
// is valid only until the next message is read.
type clientAudio struct {
	reqID       string
	end         bool
	audio       []byte
	traceParent string
}

// decodeClient decodes an envelope. Speech, which is most of what a client sends,
// bypasses the protobuf library to avoid a copy.
func decodeClient(b []byte) (clientMessage, error) {
	var m clientMessage
	var audio []byte
	hasAudio := false
	var rest []byte
	err := fields(b, func(num protowire.Number, typ protowire.Type, value, whole []byte) error {
		if num == 4 && typ == protowire.BytesType {
			if hasAudio {
				return fmt.Errorf("two speech payloads in one message")
			}
			hasAudio, audio = true, value
			return nil
		}
		rest = append(rest, whole...)
		return nil
	})
	if err != nil {
		return m, err
	}
	var env avatarpb.Message
	if err := proto.Unmarshal(rest, &env); err != nil {
		return m, fmt.Errorf("decode the message: %w", err)
	}
	m.kind = env.GetType()
	m.configure = env.GetClientConfigureSession()
	m.interrupt = env.GetClientInterrupt().GetReqId()
	if hasAudio {
		m.audio, err = decodeAudio(audio)
	}
	return m, err
}

func decodeAudio(b []byte) (*clientAudio, error) {
	a := &clientAudio{}
	err := fields(b, func(num protowire.Number, typ protowire.Type, value, _ []byte) error {
		switch {
		case num == 1 && typ == protowire.BytesType:
			a.reqID = string(value)
		case num == 2 && typ == protowire.VarintType:
			n, _ := protowire.ConsumeVarint(value)
			a.end = n != 0
		case num == 3 && typ == protowire.BytesType:
			a.audio = value
		case num == 4 && typ == protowire.BytesType:
			var t avatarpb.TraceContext
			if err := proto.Unmarshal(value, &t); err != nil {
				return fmt.Errorf("decode the trace context: %w", err)
			}
			a.traceParent = t.GetTraceparent()
		}
		return nil
	})
	return a, err
}

// fields calls f for each field of an encoded message, with its value (a bytes
// field's content, else the bytes after the tag) and the whole field.
func fields(b []byte, f func(num protowire.Number, typ protowire.Type, value, whole []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("decode a field's tag: %w", protowire.ParseError(n))
		}
		size := protowire.ConsumeFieldValue(num, typ, b[n:])
		if size < 0 {
			return fmt.Errorf("decode field %d: %w", num, protowire.ParseError(size))
		}
		value := b[n : n+size]
		if typ == protowire.BytesType {
			value, _ = protowire.ConsumeBytes(value)
		}
		if err := f(num, typ, value, b[:n+size]); err != nil {
			return err
		}
		b = b[n+size:]
	}
	return nil
}

func encodeConfirm(connectionID string) ([]byte, error) {
	return proto.Marshal(&avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_SERVER_CONFIRM_SESSION,
		Data: &avatarpb.Message_ServerConfirmSession{
			ServerConfirmSession: &avatarpb.ServerConfirmSession{ConnectionId: connectionID},
		},
	})
}

func encodeError(connectionID, reqID string, code int32, text string) ([]byte, error) {
	return proto.Marshal(&avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_SERVER_ERROR,
		Data: &avatarpb.Message_ServerError{
			ServerError: &avatarpb.ServerError{ConnectionId: connectionID, ReqId: reqID, Code: code, Message: text},
		},
	})
}
