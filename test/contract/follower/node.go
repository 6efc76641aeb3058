package follower

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v4"
)

// files are the document and what it refers to, parsed, by path.
type files map[string]any

func (f files) load(path string) (any, error) {
	if v, ok := f[path]; ok {
		return v, nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if filepath.Ext(path) != ".json" {
		var v any
		if err := yaml.Unmarshal(data, &v); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if data, err = json.Marshal(v); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	v, err := jsonschema.UnmarshalJSON(strings.NewReader(string(data)))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	f[path] = v
	return v, nil
}

// node is a place in one of the files, behind any reference. Its value is nil
// where there is nothing.
type node struct {
	files   files
	file    string
	pointer string // JSON pointer within the file
	value   any
}

// get walks down, through references.
func (n node) get(keys ...string) (node, error) {
	for _, key := range keys {
		next := node{files: n.files, file: n.file, pointer: n.pointer + "/" + escape(key)}
		switch v := n.value.(type) {
		case map[string]any:
			next.value = v[key]
		case []any:
			if i, err := strconv.Atoi(key); err == nil && i >= 0 && i < len(v) {
				next.value = v[i]
			}
		}
		var err error
		if n, err = next.follow(); err != nil {
			return node{}, err
		}
	}
	return n, nil
}

// follow goes where a reference leads.
func (n node) follow() (node, error) {
	object, _ := n.value.(map[string]any)
	ref, ok := object["$ref"].(string)
	if !ok {
		return n, nil
	}
	path, pointer, _ := strings.Cut(ref, "#")
	file := n.file
	if path != "" {
		file = filepath.Join(filepath.Dir(n.file), filepath.FromSlash(path))
	}
	root, err := n.files.load(file)
	if err != nil {
		return node{}, err
	}
	to := node{files: n.files, file: file, value: root}
	for key := range strings.SplitSeq(strings.TrimPrefix(pointer, "/"), "/") {
		if key == "" {
			continue
		}
		if to, err = to.get(unescape(key)); err != nil {
			return node{}, err
		}
	}
	if to.value == nil {
		return node{}, fmt.Errorf("%s: %s leads nowhere", n, ref)
	}
	return to, nil
}

// text is the text of the node, "" for none.
func (n node) text(keys ...string) (string, error) {
	at, err := n.get(keys...)
	if err != nil {
		return "", err
	}
	s, _ := at.value.(string)
	return s, nil
}

// keys are those of an object, sorted, or the indices of a list.
func (n node) keys() []string {
	switch v := n.value.(type) {
	case map[string]any:
		return slices.Sorted(maps.Keys(v))
	case []any:
		keys := make([]string, len(v))
		for i := range v {
			keys[i] = strconv.Itoa(i)
		}
		return keys
	}
	return nil
}

// list is a list of texts.
func (n node) list() []string {
	items, _ := n.value.([]any)
	texts := make([]string, 0, len(items))
	for _, item := range items {
		if s, ok := item.(string); ok {
			texts = append(texts, s)
		}
	}
	return texts
}

func (n node) String() string { return filepath.Base(n.file) + "#" + n.pointer }

func escape(key string) string   { return strings.NewReplacer("~", "~0", "/", "~1").Replace(key) }
func unescape(key string) string { return strings.NewReplacer("~1", "/", "~0", "~").Replace(key) }
