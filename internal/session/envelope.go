package session

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/session/avatarpb"
)

// envelope holds the fields of a received message that routing needs. Its byte
// slices point into the message.
type envelope struct {
	kind         avatarpb.MessageType
	connectionID []byte
	reqID        []byte
	end          bool
	code         int32  // of a ServerError
	message      string // of a ServerError
}

// decodeEnvelope reads an envelope's few fields without touching the animation
// data, which is most of the message and not part of the public schema
// (docs/protocol.md, section 4). It gives the same result as proto.Unmarshal for
// every message that proto.Unmarshal accepts.
func decodeEnvelope(b []byte) (envelope, error) {
	var e envelope
	for rest := b; len(rest) > 0; {
		num, typ, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return envelope{}, protowire.ParseError(n)
		}
		rest = rest[n:]
		switch {
		case num == fieldType && typ == protowire.VarintType:
			v, n := protowire.ConsumeVarint(rest)
			if n < 0 {
				return envelope{}, protowire.ParseError(n)
			}
			e.kind = avatarpb.MessageType(v)
			rest = rest[n:]
		case num == fieldAnimation && typ == protowire.BytesType:
			v, n := protowire.ConsumeBytes(rest)
			if n < 0 {
				return envelope{}, protowire.ParseError(n)
			}
			if err := e.decodeAnimation(v); err != nil {
				return envelope{}, err
			}
			rest = rest[n:]
		case isOtherBody(num) && typ == protowire.BytesType:
			// Rare and small, but with the rules of a oneof: leave it to the
			// library.
			return unmarshal(b)
		default:
			n := protowire.ConsumeFieldValue(num, typ, rest)
			if n < 0 {
				return envelope{}, protowire.ParseError(n)
			}
			rest = rest[n:]
		}
	}
	return e, nil
}

func isOtherBody(num protowire.Number) bool {
	return num >= 2 && num <= 5 || num == fieldInterrupt
}

func (e *envelope) decodeAnimation(b []byte) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		switch {
		case (num == 1 || num == 2) && typ == protowire.BytesType:
			v, m := protowire.ConsumeBytes(b)
			if n = m; n < 0 {
				return protowire.ParseError(n)
			}
			if num == 1 {
				e.connectionID = v
			} else {
				e.reqID = v
			}
		case num == 3 && typ == protowire.VarintType:
			v, m := protowire.ConsumeVarint(b)
			if n = m; n < 0 {
				return protowire.ParseError(n)
			}
			e.end = protowire.DecodeBool(v)
		default:
			if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
				return protowire.ParseError(n)
			}
		}
		b = b[n:]
	}
	return nil
}

func unmarshal(b []byte) (envelope, error) {
	var m avatarpb.Message
	if err := proto.Unmarshal(b, &m); err != nil {
		return envelope{}, err
	}
	e := envelope{kind: m.GetType()}
	switch d := m.GetData().(type) {
	case *avatarpb.Message_ServerConfirmSession:
		e.connectionID = []byte(d.ServerConfirmSession.GetConnectionId())
	case *avatarpb.Message_ServerError:
		e.connectionID = []byte(d.ServerError.GetConnectionId())
		e.reqID = []byte(d.ServerError.GetReqId())
		e.code = d.ServerError.GetCode()
		e.message = d.ServerError.GetMessage()
	case *avatarpb.Message_ServerResponseAnimation:
		e.connectionID = []byte(d.ServerResponseAnimation.GetConnectionId())
		e.reqID = []byte(d.ServerResponseAnimation.GetReqId())
		e.end = d.ServerResponseAnimation.GetEnd()
	}
	return e, nil
}
