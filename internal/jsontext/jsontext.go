// Package jsontext appends JSON objects member by member, with the bytes that
// encoding/json writes for a struct of the same members, for the few values that a
// worker writes for each job. It owns quoting, numbers and times. It must not know
// what the members mean.
package jsontext

import (
	"bytes"
	"encoding/json"
	"slices"
	"strconv"
	"time"
)

// Escape says which characters of texts are escaped.
type Escape bool

const (
	// EscapeHTML escapes as json.Marshal does: also <, > and &.
	EscapeHTML Escape = true
	// EscapeNone escapes only what JSON requires, as an encoder with
	// SetEscapeHTML(false) does.
	EscapeNone Escape = false
)

// Object is a JSON object under construction. The methods append one member each;
// those that begin with Opt append nothing for a zero value.
type Object struct {
	b      []byte
	html   Escape
	filled bool // it has a member
	err    error
}

// Begin returns an object that is appended to b.
func Begin(b []byte, escape Escape) Object { return Object{b: append(b, '{'), html: escape} }

// End returns the bytes, or the first error of a member.
func (o *Object) End() ([]byte, error) {
	if o.err != nil {
		return nil, o.err
	}
	return append(o.b, '}'), nil
}

// name appends the name of a member, which needs no escapes.
func (o *Object) name(name string) {
	if o.filled {
		o.b = append(o.b, ',')
	}
	o.filled = true
	o.b = append(o.b, '"')
	o.b = append(o.b, name...)
	o.b = append(o.b, '"', ':')
}

// Text appends a string.
func (o *Object) Text(name, v string) {
	o.name(name)
	o.text(v)
}

func (o *Object) text(v string) {
	if !o.plain(v) {
		o.encode(v)
		return
	}
	o.b = append(o.b, '"')
	o.b = append(o.b, v...)
	o.b = append(o.b, '"')
}

// Texts appends an object of strings; a nil map is null.
func (o *Object) Texts(name string, v map[string]string) {
	o.name(name)
	if v == nil {
		o.b = append(o.b, "null"...)
		return
	}
	var few [8]string
	keys := few[:0]
	for key := range v {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	o.b = append(o.b, '{')
	for i, key := range keys {
		if i > 0 {
			o.b = append(o.b, ',')
		}
		o.text(key)
		o.b = append(o.b, ':')
		o.text(v[key])
	}
	o.b = append(o.b, '}')
}

// Members is a value that appends its members to an object.
type Members interface {
	AppendMembers(o *Object)
}

// List appends a list of objects; a nil list is null.
func List[T Members](o *Object, name string, list []T) {
	o.name(name)
	if list == nil {
		o.b = append(o.b, "null"...)
		return
	}
	o.b = append(o.b, '[')
	var element Object
	for i, v := range list {
		if i > 0 {
			o.b = append(o.b, ',')
		}
		element = Begin(o.b, o.html)
		v.AppendMembers(&element)
		b, err := element.End()
		if err != nil {
			o.fail(err)
			return
		}
		o.b = b
	}
	o.b = append(o.b, ']')
}

// TextList appends a list of strings; a nil list is null.
func (o *Object) TextList(name string, list []string) {
	o.name(name)
	if list == nil {
		o.b = append(o.b, "null"...)
		return
	}
	o.b = append(o.b, '[')
	for i, v := range list {
		if i > 0 {
			o.b = append(o.b, ',')
		}
		o.text(v)
	}
	o.b = append(o.b, ']')
}

// OptText appends a string.
func (o *Object) OptText(name, v string) {
	if v != "" {
		o.Text(name, v)
	}
}

// plain reports whether a text consists of ASCII that is written as it is.
func (o *Object) plain(v string) bool {
	for i := range len(v) {
		switch c := v[i]; {
		case c < ' ' || c > '~' || c == '"' || c == '\\':
			return false
		case bool(o.html) && (c == '<' || c == '>' || c == '&'):
			return false
		}
	}
	return true
}

// Int appends a number.
func (o *Object) Int(name string, v int64) {
	o.name(name)
	o.b = strconv.AppendInt(o.b, v, 10)
}

// OptInt appends a number.
func (o *Object) OptInt(name string, v int64) {
	if v != 0 {
		o.Int(name, v)
	}
}

// Uint appends a number.
func (o *Object) Uint(name string, v uint64) {
	o.name(name)
	o.b = strconv.AppendUint(o.b, v, 10)
}

// OptUint appends a number.
func (o *Object) OptUint(name string, v uint64) {
	if v != 0 {
		o.Uint(name, v)
	}
}

// Bool appends true or false.
func (o *Object) Bool(name string, v bool) {
	o.name(name)
	o.b = strconv.AppendBool(o.b, v)
}

// OptBool appends true.
func (o *Object) OptBool(name string, v bool) {
	if v {
		o.Bool(name, v)
	}
}

// Time appends a time in RFC 3339.
func (o *Object) Time(name string, v time.Time) {
	o.name(name)
	o.b = append(o.b, '"')
	b, err := v.AppendText(o.b)
	if err != nil {
		o.fail(err)
		return
	}
	o.b = append(b, '"')
}

// OptTime appends a time in RFC 3339.
func (o *Object) OptTime(name string, v time.Time) {
	if !v.IsZero() {
		o.Time(name, v)
	}
}

// Value appends any value, by encoding/json. Its caller decides whether the member
// is left out.
func (o *Object) Value(name string, v any) {
	o.name(name)
	o.encode(v)
}

func (o *Object) encode(v any) {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(bool(o.html))
	if err := e.Encode(v); err != nil {
		o.fail(err)
		return
	}
	o.b = append(o.b, bytes.TrimSuffix(text.Bytes(), []byte("\n"))...)
}

func (o *Object) fail(err error) {
	if o.err == nil {
		o.err = err
	}
}
