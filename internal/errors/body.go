package errors

import (
	"encoding/json"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// serverFields are what an error body says. "" is absent.
type serverFields struct{ code, title, detail string }

// payload is a parsed body: a value as parseJSON makes them. The oracle of
// docs/protocol.md, section 9, is written in Python, so what is false, what is
// empty and how a value prints follow Python here.
type payload struct{ value any }

// fieldsOfText reads an upgrade's answer: JSON, or else a text that is all
// detail (the oracle treats null as not JSON). Other JSON that is not an object says
// nothing.
func fieldsOfText(text string) serverFields {
	p, ok := parseJSON(text)
	return p.fieldsOr(text, ok)
}

// fieldsOr are the fields of an upgrade's answer whose text gave p, if it is
// JSON.
func (p payload) fieldsOr(text string, isJSON bool) serverFields {
	if !isJSON || p.value == nil {
		return serverFields{detail: strip(text)}
	}
	if _, isText := p.value.(string); isText {
		return serverFields{}
	}
	return p.serverFields()
}

// serverFields reads the first of the list "errors" where that is an object,
// else the flat object. A JSON string is read as a separate text.
func (p payload) serverFields() serverFields {
	switch v := p.value.(type) {
	case string:
		return fieldsOfText(v)
	case *object:
		if first := v.firstError(); first != nil {
			return first.fields("id")
		}
		return v.fields("error")
	}
	return serverFields{}
}

// reportsErrors reports whether an answer with HTTP 200 is a failure.
func (p payload) reportsErrors() bool {
	o, ok := p.value.(*object)
	return ok && truthy(o.get("errors"))
}

// effectiveStatus is the status that the errors name (errors[0] where that is
// an object, else the flat object) where it is a whole number, else status.
func (p payload) effectiveStatus(status int) int {
	o, ok := p.value.(*object)
	if !ok {
		return status
	}
	if first := o.firstError(); first != nil {
		o = first
	}
	n, err := strconv.Atoi(strip(pyString(o.get("status"))))
	if err != nil {
		return status
	}
	return n
}

// requestID is what the backend calls the request: in the object that is
// "error" (the Open API's form), in errors[0], or in the flat object; "" if
// it is not a text there.
func (p payload) requestID() string {
	o, ok := p.value.(*object)
	if !ok {
		return ""
	}
	inner, _ := o.get("error").(*object)
	for _, in := range []*object{inner, o.firstError(), o} {
		if in == nil {
			continue
		}
		if id, _ := in.get("request_id").(string); id != "" {
			return id
		}
	}
	return ""
}

// sessionToken is the usable token of a token answer, or "".
func (p payload) sessionToken() string {
	o, ok := p.value.(*object)
	if !ok {
		return ""
	}
	switch v := o.get("sessionToken").(type) {
	case string:
		return strip(v)
	case json.Number:
		if truthy(v) {
			return pyString(v)
		}
	}
	return ""
}

// object is a JSON object in the order of its keys; of a repeated key the last
// value counts.
type object struct {
	keys   []string
	values map[string]any
}

func (o *object) get(key string) any { return o.values[key] }

func (o *object) firstError() *object {
	list, ok := o.get("errors").([]any)
	if !ok || len(list) == 0 {
		return nil
	}
	first, _ := list[0].(*object)
	return first
}

// fields takes the code from "code" or, where that is false, from the other
// key; the detail from "detail" or, where that prints as nothing, "message".
func (o *object) fields(otherCode string) serverFields {
	code := o.get("code")
	if !truthy(code) {
		code = o.get(otherCode)
	}
	f := serverFields{
		code: pyString(code), title: pyString(o.get("title")), detail: pyString(o.get("detail")),
	}
	if f.detail == "" {
		f.detail = pyString(o.get("message"))
	}
	return f
}

// parseJSON reads text as one JSON value: nil, bool, string, json.Number,
// []any or *object. false: it is none.
func parseJSON(text string) (payload, bool) {
	if !json.Valid([]byte(text)) {
		text = quoteNonFinite(text)
		if !json.Valid([]byte(text)) {
			return payload{}, false
		}
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	value, err := decodeValue(d)
	return payload{value}, err == nil
}

func decodeValue(d *json.Decoder) (any, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch token {
	case json.Delim('['):
		list := []any{}
		for d.More() {
			v, err := decodeValue(d)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err := d.Token()
		return list, err
	case json.Delim('{'):
		return decodeObject(d)
	}
	return token, nil
}

func decodeObject(d *json.Decoder) (any, error) {
	o := &object{values: map[string]any{}}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return nil, err
		}
		key, _ := token.(string) // json.Valid has seen to it
		value, err := decodeValue(d)
		if err != nil {
			return nil, err
		}
		if _, again := o.values[key]; !again {
			o.keys = append(o.keys, key)
		}
		o.values[key] = value
	}
	_, err := d.Token()
	return o, err
}

// quoteNonFinite turns the numbers that Python reads and JSON does not have
// into strings that print the same.
func quoteNonFinite(text string) string {
	var b strings.Builder
	inString := false
	for i := 0; i < len(text); {
		if !inString {
			if word, prints := nonFinite(text[i:]); word > 0 {
				b.WriteString(`"` + prints + `"`)
				i += word
				continue
			}
		}
		switch {
		case text[i] == '"':
			inString = !inString
		case text[i] == '\\' && inString && i+1 < len(text):
			b.WriteByte(text[i])
			i++
		}
		b.WriteByte(text[i])
		i++
	}
	return b.String()
}

func nonFinite(text string) (length int, prints string) {
	switch {
	case strings.HasPrefix(text, "NaN"):
		return len("NaN"), "nan"
	case strings.HasPrefix(text, "Infinity"):
		return len("Infinity"), "inf"
	case strings.HasPrefix(text, "-Infinity"):
		return len("-Infinity"), "-inf"
	}
	return 0, ""
}

// truthy is what Python takes for true.
func truthy(v any) bool {
	switch v := v.(type) {
	case nil:
		return false
	case bool:
		return v
	case string:
		return v != ""
	case json.Number:
		f, err := strconv.ParseFloat(v.String(), 64)
		return err != nil || f != 0
	case []any:
		return len(v) > 0
	case *object:
		return len(v.keys) > 0
	}
	return true
}

// pyString is Python's str(v), and "" for null.
func pyString(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		return v
	}
	var b strings.Builder
	writeRepr(&b, v)
	return b.String()
}

// writeRepr appends Python's repr(v). All levels write to one builder, so that
// the time is linear in the length of the text, however deep v is nested.
func writeRepr(b *strings.Builder, v any) {
	switch v := v.(type) {
	case nil:
		b.WriteString("None")
	case bool:
		if v {
			b.WriteString("True")
		} else {
			b.WriteString("False")
		}
	case string:
		writeQuoted(b, v)
	case json.Number:
		b.WriteString(pyNumber(v.String()))
	case []any:
		b.WriteByte('[')
		for i, item := range v {
			if i > 0 {
				b.WriteString(", ")
			}
			writeRepr(b, item)
		}
		b.WriteByte(']')
	case *object:
		b.WriteByte('{')
		for i, key := range v.keys {
			if i > 0 {
				b.WriteString(", ")
			}
			writeQuoted(b, key)
			b.WriteString(": ")
			writeRepr(b, v.values[key])
		}
		b.WriteByte('}')
	}
}

func writeQuoted(b *strings.Builder, text string) {
	quote := '\''
	if strings.Contains(text, "'") && !strings.Contains(text, `"`) {
		quote = '"'
	}
	b.WriteRune(quote)
	for _, r := range text {
		switch {
		case r == quote || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == ' ' || unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			escaped := strconv.QuoteRuneToASCII(r)
			b.WriteString(escaped[1 : len(escaped)-1])
		}
	}
	b.WriteRune(quote)
}

// pyNumber prints a JSON number: a whole one digit for digit, another as
// Python's shortest float.
func pyNumber(text string) string {
	if !strings.ContainsAny(text, ".eE") {
		if text == "-0" {
			return "0"
		}
		return text
	}
	f, _ := strconv.ParseFloat(text, 64) // out of range gives an infinity, as in Python
	switch size := math.Abs(f); {
	case math.IsInf(f, 1):
		return "inf"
	case math.IsInf(f, -1):
		return "-inf"
	case size != 0 && (size < 1e-4 || size >= 1e16):
		return strconv.FormatFloat(f, 'e', -1, 64)
	}
	out := strconv.FormatFloat(f, 'f', -1, 64)
	if !strings.Contains(out, ".") {
		out += ".0"
	}
	return out
}

// strip is Python's str.strip: its white space has four separators more than
// Go's.
func strip(text string) string {
	return strings.TrimFunc(text, func(r rune) bool {
		return unicode.IsSpace(r) || slices.Contains([]rune{0x1c, 0x1d, 0x1e, 0x1f}, r)
	})
}
