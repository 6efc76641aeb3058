package config

import (
	"reflect"
	"strings"

	"avatarworker/internal/errors"
)

// leaf is one key of a Config: a value that text can set.
type leaf struct {
	path string
	v    reflect.Value // addressable: points into the Config
}

func (l leaf) secret() bool { return l.v.Type() == reflect.TypeFor[Secret]() }

// isMap reports whether a key holds sections by id: apps and policy.
func (l leaf) isMap() bool { return l.v.Kind() == reflect.Map }

// leaves lists every key of c in the order of the file, with the entries that
// apps and policy have now.
func leaves(c *Config) []leaf {
	var found []leaf
	collect(reflect.ValueOf(c).Elem(), "", &found)
	return found
}

func collect(v reflect.Value, path string, found *[]leaf) {
	switch {
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			name := v.Type().Field(i).Tag.Get("yaml")
			if name == "" || isAppID(path, name) {
				continue
			}
			collect(v.Field(i), join(path, name), found)
		}
	case v.Kind() == reflect.Map:
		*found = append(*found, leaf{path, v})
		for _, key := range sortedKeys(v) {
			collect(v.MapIndex(reflect.ValueOf(key)).Elem(), join(path, key), found)
		}
	default:
		*found = append(*found, leaf{path, v})
	}
}

// isAppID reports whether a field is the id of an entry of apps, which has no key:
// it is the entry's name.
func isAppID(path, name string) bool {
	return name == "id" && strings.HasPrefix(path, "apps.")
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// envName is the environment variable of a key.
func envName(path string) string {
	return "AVATAR_" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		default:
			return '_'
		}
	}, path)
}

// alias is a variable that people have already.
type alias struct{ name, path string }

func aliases() []alias {
	return []alias{
		{"NATS_URL", "nats.url"},
		{"NATS_CREDS", "nats.creds"},
		{"NATS_NKEY", "nats.nkey"},
		{"NATS_CERT", "nats.tls.cert"},
		{"NATS_KEY", "nats.tls.key"},
		{"NATS_CA", "nats.tls.ca"},
		{"NATS_CONTEXT", "nats.context"},
		{"SPATIUS_API_KEY", "app.api_key"},
		{"SPATIUS_API_KEY_FILE", "app.api_key_file"},
		{"SPATIUS_APP_ID", "app.id"},
		{"SPATIUS_REGION", "backend.region"},
		{"SPATIUS_CONSOLE_ENDPOINT", "backend.console_url"},
		{"SPATIUS_INGRESS_ENDPOINT", "backend.ingress_url"},
	}
}

// Key describes one key of the configuration, for documents and hints.
type Key struct {
	Path    string   // such as nats.prefix; apps.<id>.api_key and policy.<code>.action stand for many
	Env     []string // the variables that set it, the strongest first
	Type    string   // text, secret, true/false, whole number, duration, size, list, map
	Default string   // as it would be written in the environment; "" is empty
}

// Keys lists every key in the order of config.yaml.
func Keys() []Key {
	c := Defaults()
	c.Apps["<id>"] = &App{}
	c.Policy["<code>"] = &Policy{}
	var keys []Key
	for _, l := range leaves(c) {
		k := Key{Path: l.path, Env: []string{placeholderEnv(l.path)}, Type: typeName(l.v.Type())}
		if !l.isMap() {
			k.Default = formatText(l.v)
		}
		for _, a := range aliases() {
			if a.path == l.path {
				k.Env = append(k.Env, a.name)
			}
		}
		keys = append(keys, k)
	}
	return keys
}

// placeholderEnv keeps <ID> and <CODE> readable.
func placeholderEnv(path string) string {
	name := envName(path)
	name = strings.Replace(name, "__ID_", "_<ID>", 1)
	return strings.Replace(name, "__CODE_", "_<CODE>", 1)
}

func typeName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Map:
		return "map"
	case reflect.Slice:
		return "list"
	case reflect.Bool, reflect.Pointer:
		return "true/false"
	case reflect.Int:
		return "whole number"
	case reflect.Float64:
		return "number"
	}
	switch t {
	case reflect.TypeFor[Secret]():
		return "secret"
	case reflect.TypeFor[Size]():
		return "size"
	case reflect.TypeFor[string]():
		return "text"
	}
	return "duration"
}

// codes lists the error codes that policy may name.
func codes() []string {
	var names []string
	for _, code := range errors.Codes() {
		names = append(names, string(code))
	}
	return names
}

// actions are what a policy may do about a code.
func actions() []string {
	var names []string
	for _, action := range errors.PolicyActions() {
		names = append(names, string(action))
	}
	return names
}

// nearest returns the candidate with the fewest edits from name; "" where
// candidates is empty.
func nearest(name string, candidates []string) (best string, edits int) {
	for _, c := range candidates {
		if d := distance(name, c); best == "" || d < edits {
			best, edits = c, d
		}
	}
	return best, edits
}

// near is the nearest candidate if it is near enough to be what was meant, else "".
func near(name string, candidates []string) string {
	if best, edits := nearest(name, candidates); edits <= max(2, len(name)/3) {
		return best
	}
	return ""
}

// distance is Levenshtein's, over bytes: keys are ASCII.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replace := diagonal
			if a[i] != b[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
