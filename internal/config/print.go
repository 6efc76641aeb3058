package config

import (
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
)

// Print writes the whole configuration as YAML, every key, secrets as
// "[hidden]" and URLs without user and password. What it writes can be loaded
// again.
func (c *Config) Print(w io.Writer) error {
	text, err := yaml.Dump(node(reflect.ValueOf(c).Elem(), ""))
	if err != nil {
		return fmt.Errorf("print the configuration: %w", err)
	}
	if _, err := w.Write(text); err != nil {
		return fmt.Errorf("print the configuration: %w", err)
	}
	return nil
}

func node(v reflect.Value, path string) *yaml.Node {
	switch {
	case v.Kind() == reflect.Struct:
		return sectionNode(v, path)
	case v.Kind() == reflect.Map:
		n := &yaml.Node{Kind: yaml.MappingNode}
		for _, key := range sortedKeys(v) {
			n.Content = append(n.Content, textNode(key),
				node(v.MapIndex(reflect.ValueOf(key)).Elem(), join(path, key)))
		}
		return emptyInline(n)
	case v.Kind() == reflect.Slice:
		n := &yaml.Node{Kind: yaml.SequenceNode}
		for i := range v.Len() {
			n.Content = append(n.Content, node(v.Index(i), path))
		}
		return emptyInline(n)
	case v.Kind() == reflect.String:
		return textNode(shown(path, formatText(v)))
	default: // numbers, sizes, durations, booleans: plain, and never ambiguous
		return &yaml.Node{Kind: yaml.ScalarNode, Value: formatText(v)}
	}
}

func sectionNode(v reflect.Value, path string) *yaml.Node {
	n := &yaml.Node{Kind: yaml.MappingNode}
	for i := range v.NumField() {
		field := v.Field(i)
		name := v.Type().Field(i).Tag.Get("yaml")
		unset := field.Kind() == reflect.Pointer && field.IsNil()
		if name == "" || isAppID(path, name) || unset || (isPolicyDefault(path, field)) {
			continue
		}
		n.Content = append(n.Content, textNode(name), node(field, join(path, name)))
	}
	return emptyInline(n)
}

// isPolicyDefault leaves out what a policy does not say: an empty action is
// not an action.
func isPolicyDefault(path string, field reflect.Value) bool {
	return strings.HasPrefix(path, "policy.") && field.IsZero()
}

// shown is a text as it may be seen.
func shown(path, text string) string {
	if !strings.HasSuffix(path, "url") {
		return text
	}
	urls := strings.Split(text, ",")
	for i, u := range urls {
		urls[i] = redact(u)
	}
	return strings.Join(urls, ",")
}

func textNode(text string) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: text}
}

func emptyInline(n *yaml.Node) *yaml.Node {
	if len(n.Content) == 0 {
		n.Style = yaml.FlowStyle
	}
	return n
}

// formatText is a value as the environment would give it; secrets are hidden.
func formatText(v reflect.Value) string {
	switch value := v.Interface().(type) {
	case time.Duration:
		return formatDuration(value)
	case *bool:
		if value == nil {
			return ""
		}
		return fmt.Sprint(*value)
	case []string:
		return strings.Join(value, ",")
	case []Budget:
		texts := make([]string, len(value))
		for i, b := range value {
			texts[i] = b.String()
		}
		return strings.Join(texts, ",")
	case []Queue:
		return joinTexts(value)
	case []SessionLimit:
		return joinTexts(value)
	default: // Secret and Size print themselves
		return fmt.Sprint(value)
	}
}

func joinTexts[T fmt.Stringer](list []T) string {
	texts := make([]string, len(list))
	for i, item := range list {
		texts[i] = item.String()
	}
	return strings.Join(texts, ",")
}

func sortedNames[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }
