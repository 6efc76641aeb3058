package config

import (
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"avatarworker/internal/errors"
)

// decoder puts one YAML document into a Config and collects everything that is
// wrong with it. The library's own strict decoding stops short of that: it
// knows no key paths.
type decoder struct {
	source   string // file or variable, for messages
	isFile   bool   // only a file has lines to report
	set      map[string]origin
	problems []Problem
}

// decode reads one document from r into v, which is at path.
func (d *decoder) decode(r io.Reader, v reflect.Value, path string) {
	loader, err := yaml.NewLoader(r)
	if err != nil {
		d.syntax(err, path)
		return
	}
	var doc, more yaml.Node
	switch err := loader.Load(&doc); {
	case errors.Is(err, io.EOF):
		return // no document: nothing set
	case err != nil:
		d.syntax(err, path)
		return
	}
	if err := loader.Load(&more); !errors.Is(err, io.EOF) {
		d.problems = append(d.problems, Problem{Source: d.source, Key: path,
			Message: "holds more than one YAML document: keep one"})
		return
	}
	d.value(doc.Content[0], v, path)
}

// quoted is what the library's messages cite from the file, an anchor's name:
// possibly a secret that begins with an asterisk.
var quoted = regexp.MustCompile(`'[^'\s]{2,}' ?`)

func (d *decoder) syntax(err error, path string) {
	p := Problem{Source: d.source, Key: path, Message: "is not valid YAML"}
	var load *yaml.LoadError
	if errors.As(err, &load) {
		p.Message += ": " + quoted.ReplaceAllString(load.Message, "")
		if d.isFile {
			p.Line = load.Mark.Line
		}
	}
	d.problems = append(d.problems, p)
}

func (d *decoder) fail(n *yaml.Node, path, format string, args ...any) {
	p := Problem{Source: d.source, Key: path, Message: fmt.Sprintf(format, args...)}
	if d.isFile {
		p.Line = n.Line
	}
	d.problems = append(d.problems, p)
}

func (d *decoder) record(n *yaml.Node, path string) {
	o := origin{source: d.source}
	if d.isFile {
		o.line = n.Line
	}
	d.set[path] = o
}

func (d *decoder) value(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	switch {
	case hasShortForm(v.Type()) && n.Kind == yaml.ScalarNode:
		d.scalar(n, v, path)
	case v.Kind() == reflect.Struct:
		d.section(n, v, path)
	case v.Kind() == reflect.Map:
		d.entries(n, v, path)
	case v.Kind() == reflect.Slice:
		d.list(n, v, path)
	default:
		d.scalar(n, v, path)
	}
}

// hasShortForm reports whether a section of this type may also be written as one
// text, as the environment gives it.
func hasShortForm(t reflect.Type) bool {
	return t == reflect.TypeFor[Queue]() || t == reflect.TypeFor[SessionLimit]() || t == reflect.TypeFor[Budget]()
}

// section reads a mapping into a struct. An empty section is one whose keys
// are all commented out: nothing set.
func (d *decoder) section(n *yaml.Node, v reflect.Value, path string) {
	fields := map[string]reflect.Value{}
	var names []string
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("yaml")
		if name != "" && !isAppID(path, name) {
			fields[name] = v.Field(i)
			names = append(names, name)
		}
	}
	d.pairs(n, path, func(key *yaml.Node, value *yaml.Node) {
		field, ok := fields[key.Value]
		if !ok {
			d.fail(key, join(path, key.Value), "is not a known key%s", suggest(key.Value, names))
			return
		}
		d.value(value, field, join(path, key.Value))
	})
}

func suggest(name string, names []string) string {
	if best := near(name, names); best != "" {
		return fmt.Sprintf(": did you mean %s?", best)
	}
	return ": known here are " + strings.Join(names, ", ")
}

// entries reads a mapping into a map of struct pointers, over the entries that
// are there.
func (d *decoder) entries(n *yaml.Node, v reflect.Value, path string) {
	d.record(n, path)
	d.pairs(n, path, func(key *yaml.Node, value *yaml.Node) {
		name := reflect.ValueOf(key.Value)
		entry := v.MapIndex(name)
		if !entry.IsValid() {
			entry = reflect.New(v.Type().Elem().Elem())
			v.SetMapIndex(name, entry)
		}
		d.record(key, join(path, key.Value))
		d.value(value, entry.Elem(), join(path, key.Value))
	})
}

// pairs calls each for every key of a mapping, and refuses what is none and
// what comes twice.
func (d *decoder) pairs(n *yaml.Node, path string, each func(key, value *yaml.Node)) {
	if isNull(n) {
		return
	}
	if n.Kind != yaml.MappingNode {
		d.fail(n, path, "must be a section with keys, not %s", kindName(n))
		return
	}
	var seen []string
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		switch {
		case key.Kind != yaml.ScalarNode:
			d.fail(key, path, "has a key that is %s: keys are texts", kindName(key))
		case slices.Contains(seen, key.Value):
			d.fail(key, join(path, key.Value), "is there twice: keep one")
		default:
			seen = append(seen, key.Value)
			each(key, n.Content[i+1])
		}
	}
}

func (d *decoder) list(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.SequenceNode {
		d.fail(n, path, "must be a list such as [a, b], not %s", kindName(n))
		return
	}
	before := len(d.problems)
	items := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, item := range n.Content {
		switch entry := items.Index(i).Addr().Interface().(type) {
		case *Queue:
			entry.Weight = 1
		case *Budget:
			entry.Per, entry.Warn = "month", defaultWarn
		}
		at := fmt.Sprintf("%s[%d]", path, i)
		d.record(item, at) // for what is missing in it
		d.value(item, items.Index(i), at)
	}
	if len(d.problems) > before {
		return // half a list would break rules that the whole one may keep
	}
	if len(n.Content) == 0 {
		items = reflect.Zero(v.Type()) // [] and a key left out are the same
	}
	v.Set(items)
	d.record(n, path)
}

func (d *decoder) scalar(n *yaml.Node, v reflect.Value, path string) {
	switch {
	case isNull(n):
		d.fail(n, path, `has no value: give one, write "" for an empty text, or leave the key out`)
		return
	case n.Kind != yaml.ScalarNode:
		d.fail(n, path, "must be one value, not %s", kindName(n))
		return
	}
	value, err := parseText(v.Type(), n.Value)
	if err != nil {
		d.fail(n, path, "%s", err)
		return
	}
	v.Set(reflect.ValueOf(value))
	d.record(n, path)
}

func isNull(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

func kindName(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a section"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	return "a single value"
}

func sortedKeys(m reflect.Value) []string {
	keys := make([]string, 0, m.Len())
	for _, k := range m.MapKeys() {
		keys = append(keys, k.String())
	}
	slices.Sort(keys)
	return keys
}
