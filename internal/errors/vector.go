package errors

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Vector is a recorded failure: what `avatarworker errors classify`
// reads, one JSON object a line. Which fields count depends on Kind; a null
// field is an absent one, unknown fields are ignored.
type Vector struct {
	ID    string `json:"id"`
	Phase Phase  `json:"phase"`
	// Kind is http (HTTPStatus, Body), server_error (ServerCode, Detail), close
	// (CloseCode, CloseReason; without a code the connection was cut), transport
	// (TransportError), frame (FrameHex) or text_frame.
	Kind           string  `json:"kind"`
	HTTPStatus     *int    `json:"http_status"`
	Body           *string `json:"body"`
	ServerCode     *int32  `json:"server_code"`
	Detail         *string `json:"detail"`
	CloseCode      *int    `json:"close_code"`
	CloseReason    *string `json:"close_reason"`
	TransportError *string `json:"transport_error"`
	FrameHex       *string `json:"frame_hex"`
}

// ClassifyResult is what `avatarworker errors classify` prints for one failure. The
// server's fields are null where the backend did not give them.
type ClassifyResult struct {
	ID           string  `json:"id"`
	Code         Code    `json:"code"`
	Class        Class   `json:"class"`
	Action       Action  `json:"action"`
	ServerCode   *string `json:"server_code"`
	ServerTitle  *string `json:"server_title"`
	ServerDetail *string `json:"server_detail"`
}

// ParseVector reads one line.
func ParseVector(line []byte) (Vector, error) {
	var v Vector
	d := json.NewDecoder(bytes.NewReader(line))
	if err := d.Decode(&v); err != nil {
		return Vector{}, describeJSON(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return Vector{}, New("more than one JSON value on the line: write one object a line")
	}
	return v, v.validate()
}

func describeJSON(err error) error {
	var wrongType *json.UnmarshalTypeError
	switch {
	case As(err, &wrongType) && wrongType.Field == "":
		return fmt.Errorf("a failure is a JSON object, not a JSON %s", wrongType.Value)
	case As(err, &wrongType):
		return fmt.Errorf("field %s: want %s, got JSON %s", wrongType.Field, wrongType.Type, wrongType.Value)
	case err == io.EOF:
		return New("the line is empty: write one JSON object a line")
	}
	return fmt.Errorf("not a JSON object: %w", err)
}

func (v Vector) validate() error {
	if v.Phase == "" {
		return fmt.Errorf("field phase: missing; want one of %v", Phases())
	}
	if !slices.Contains(Phases(), v.Phase) {
		return fmt.Errorf("field phase: %q is not a phase; want one of %v", v.Phase, Phases())
	}
	needs := func(field string, present bool) error {
		if present {
			return nil
		}
		return fmt.Errorf("field %s: missing; kind %s needs it", field, v.Kind)
	}
	switch v.Kind {
	case "http":
		return needs("http_status", v.HTTPStatus != nil)
	case "server_error":
		return needs("server_code", v.ServerCode != nil)
	case "frame":
		return needs("frame_hex", v.FrameHex != nil)
	case "close", "transport", "text_frame":
		return nil
	case "":
		return New("field kind: missing; want http, server_error, close, transport, frame or text_frame")
	}
	return fmt.Errorf("field kind: %q is not a kind; want http, server_error, close, transport, frame or text_frame", v.Kind)
}

// Classify says which failure it is. The error says what is wrong with v.
func (v Vector) Classify() (*Error, error) {
	if err := v.validate(); err != nil {
		return nil, err
	}
	text := func(s *string) string {
		if s == nil {
			return ""
		}
		return *s
	}
	switch v.Kind {
	case "http":
		return v.classifyHTTP([]byte(text(v.Body)))
	case "server_error":
		return FromServerError(v.Phase, *v.ServerCode, text(v.Detail)), nil
	case "close":
		if v.CloseCode == nil {
			return fromCutClose(v.Phase, text(v.CloseReason)), nil
		}
		return FromClose(v.Phase, *v.CloseCode, text(v.CloseReason)), nil
	case "transport":
		return FromTransport(v.Phase, New(text(v.TransportError))), nil
	case "frame":
		return v.classifyFrame()
	}
	return FromTextFrame(v.Phase), nil
}

func (v Vector) classifyHTTP(body []byte) (*Error, error) {
	if v.Phase != PhaseToken {
		return FromHTTP(v.Phase, *v.HTTPStatus, nil, body), nil
	}
	_, e := ParseTokenAnswer(*v.HTTPStatus, nil, body)
	if e == nil {
		return nil, New("field body: the answer holds a usable session token; this is not a failure")
	}
	return e, nil
}

func (v Vector) classifyFrame() (*Error, error) {
	frame, err := hex.DecodeString(*v.FrameHex)
	if err != nil {
		return nil, fmt.Errorf("field frame_hex: not hexadecimal: %w", err)
	}
	if e := serverErrorFrame(v.Phase, frame); e != nil {
		return e, nil
	}
	return FromFrame(v.Phase, nil), nil
}

// The numbers of avatar.proto that a ServerError needs.
const (
	fieldType         = 1
	fieldError        = 5
	typeServerError   = 4
	fieldConnectionID = 1
	fieldReqID        = 2
	fieldCode         = 3
	fieldMessage      = 4
)

// serverErrorFrame reads an envelope that is a ServerError, or gives nil.
func serverErrorFrame(phase Phase, frame []byte) *Error {
	envelope, ok := fieldsOf(frame)
	if !ok || envelope[fieldType].number != typeServerError {
		return nil
	}
	inner, ok := fieldsOf(envelope[fieldError].bytes)
	if !ok {
		return nil
	}
	connection, req, message := inner[fieldConnectionID].bytes, inner[fieldReqID].bytes, inner[fieldMessage].bytes
	if !utf8.Valid(connection) || !utf8.Valid(req) || !utf8.Valid(message) {
		return nil
	}
	// Protobuf's int32 is the low half of its varint.
	e := FromServerError(phase, int32(inner[fieldCode].number), string(message))
	e.ConnectionID, e.ReqID = string(connection), string(req)
	return e
}

type wireField struct {
	number uint64
	bytes  []byte
}

// fieldsOf reads a message's varint and bytes fields, the last of each number.
func fieldsOf(message []byte) (map[protowire.Number]wireField, bool) {
	fields := map[protowire.Number]wireField{}
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return nil, false
		}
		message = message[n:]
		var f wireField
		switch kind {
		case protowire.VarintType:
			f.number, n = protowire.ConsumeVarint(message)
		case protowire.BytesType:
			f.bytes, n = protowire.ConsumeBytes(message)
		default:
			n = protowire.ConsumeFieldValue(number, kind, message)
		}
		if n < 0 {
			return nil, false
		}
		message = message[n:]
		fields[number] = f
	}
	return fields, true
}

// ClassifyLine reads one failure as ParseVector does and says what it is and
// what the worker does about it where no utterance was finished before.
func (t *Table) ClassifyLine(line []byte) (ClassifyResult, error) {
	v, err := ParseVector(line)
	if err != nil {
		return ClassifyResult{ID: v.ID}, err
	}
	e, err := v.Classify()
	if err != nil {
		return ClassifyResult{ID: v.ID}, err
	}
	d := t.Decide(e, false)
	return ClassifyResult{
		ID: v.ID, Code: d.Code, Class: d.Class, Action: d.Action,
		ServerCode: known(e.ServerCode), ServerTitle: known(e.ServerTitle), ServerDetail: known(e.ServerDetail),
	}, nil
}

func known(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}
