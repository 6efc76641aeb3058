package config

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"

	"avatarworker/internal/errors"
)

// Source is where a configuration comes from. The zero value gives the
// defaults.
type Source struct {
	File      string            // YAML; "": none
	FileNamed bool              // File was named explicitly: it must exist
	Environ   []string          // NAME=value, as os.Environ gives it
	Overrides map[string]string // flags by key path; the strongest
	Secrets   bool              // check also what the files of secrets hold now
}

// Load reads and checks a configuration: flag over environment over file over
// default. The error is an *Error with every problem. Warnings name
// environment variables that look like ours and are not, and keys that change
// less than they seem to.
//
// An empty environment variable counts as not set.
func Load(src Source) (*Config, []Warning, error) {
	l := &loading{c: Defaults()}
	l.file(src)
	warnings := l.environment(src.Environ)
	l.flags(src.Overrides)
	for id, app := range l.c.Apps {
		app.ID = id
	}
	for _, addr := range []*string{&l.c.Admin.Addr, &l.c.UI.Addr} {
		if *addr == "off" {
			*addr = ""
		}
	}
	// The rules are checked also where something could not be read, so that
	// all problems show at once; a key that could not be read keeps what it
	// had, which is valid or already reported.
	problems := append(l.problems, l.c.problems()...)
	if src.Secrets {
		v := &validator{c: l.c}
		v.secrets()
		problems = append(problems, v.found...)
	}
	warnings = append(warnings, l.c.ineffectivePolicies()...)
	if err := asError(problems); err != nil {
		return nil, warnings, err
	}
	return l.c, warnings, nil
}

type loading struct {
	c        *Config
	problems []Problem
}

// layer is what one source set; the sources follow each other from the weakest
// to the strongest.
func (l *loading) layer(set map[string]origin) {
	maps.DeleteFunc(l.c.origins, func(path string, _ origin) bool {
		list, _, isEntry := strings.Cut(path, "[")
		_, replaced := set[list]
		return isEntry && replaced
	})
	maps.Copy(l.c.origins, set)
	for path, o := range set {
		partner, ok := strings.CutSuffix(path, "_file")
		if !ok {
			partner = path + "_file"
		}
		l.onlyOne(path, partner, o, set)
	}
}

// onlyOne drops a secret or its file, whichever comes from the weaker source.
func (l *loading) onlyOne(path, other string, o origin, set map[string]origin) {
	byPath := map[string]leaf{}
	for _, leaf := range leaves(l.c) {
		byPath[leaf.path] = leaf
	}
	mine, theirs := byPath[path], byPath[other]
	if !theirs.v.IsValid() || (!mine.secret() && !theirs.secret()) || mine.v.IsZero() || theirs.v.IsZero() {
		return
	}
	if _, both := set[other]; !both {
		theirs.v.SetZero()
		delete(l.c.origins, other)
		return
	}
	if mine.secret() {
		l.problems = append(l.problems, Problem{Source: o.source, Line: o.line, Key: path,
			Message: "is set, and " + other + " too: keep one of them"})
	}
}

func (l *loading) file(src Source) {
	if src.File == "" {
		return
	}
	data, err := os.ReadFile(src.File)
	if errors.Is(err, os.ErrNotExist) && !src.FileNamed {
		return
	}
	if err != nil {
		l.problems = append(l.problems, Problem{Source: src.File, Message: "can't be read: " + reason(err)})
		return
	}
	d := &decoder{source: src.File, isFile: true, set: map[string]origin{}}
	d.decode(bytes.NewReader(data), reflect.ValueOf(l.c).Elem(), "")
	l.problems = append(l.problems, d.problems...)
	l.layer(d.set)
}

// reason is a file error without the path, which the message has already.
func reason(err error) string {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Err.Error()
	}
	return err.Error()
}

// environment applies the older names, then AVATAR_APPS and AVATAR_POLICY
// (whole sections in YAML or JSON), then every other AVATAR_ variable.
func (l *loading) environment(environ []string) []Warning {
	env := map[string]string{}
	for _, pair := range environ {
		if name, value, ok := strings.Cut(pair, "="); ok && value != "" {
			env[name] = value
		}
	}
	older := map[string]origin{}
	for _, a := range aliases() {
		if text, ok := env[a.name]; ok {
			l.setText(a.path, text, a.name, older)
		}
	}
	l.layer(older)

	ours := map[string]origin{}
	l.sections(env, ours)
	l.addPolicies()
	byName := l.byEnvName()
	var warnings []Warning
	for _, name := range slices.Sorted(maps.Keys(env)) {
		if !strings.HasPrefix(name, "AVATAR_") {
			continue
		}
		switch found, known := byName[name]; {
		case known && found == nil:
		case !known:
			warnings = append(warnings, Warning{name, unknownVariable(name)})
		case len(found) > 1:
			l.problems = append(l.problems, Problem{Source: name, Message: fmt.Sprintf(
				"stands for %s: set them in the file or in AVATAR_APPS", strings.Join(found, " and "))})
		default:
			l.setText(found[0], env[name], name, ours)
		}
	}
	l.layer(ours)
	l.dropPolicies()
	return warnings
}

// sections reads the maps from their variables.
func (l *loading) sections(env map[string]string, set map[string]origin) {
	for _, path := range []string{"apps", "policy"} {
		if text, ok := env[envName(path)]; ok {
			l.setText(path, text, envName(path), set)
		}
	}
}

// addPolicies makes an entry for every code, so that the environment can set
// it; dropPolicies takes away the ones that still say nothing.
func (l *loading) addPolicies() {
	for _, code := range codes() {
		if l.c.Policy[code] == nil {
			l.c.Policy[code] = &Policy{}
		}
	}
}

func (l *loading) dropPolicies() {
	for _, code := range codes() { // an unknown code stays, for Validate to refuse
		if p := l.c.Policy[code]; p != nil && *p == (Policy{}) {
			delete(l.c.Policy, code)
		}
	}
}

func (l *loading) byEnvName() map[string][]string {
	byName := map[string][]string{}
	for _, leaf := range leaves(l.c) {
		name := envName(leaf.path)
		if leaf.isMap() {
			byName[name] = nil // known, and read before
			continue
		}
		byName[name] = append(byName[name], leaf.path)
	}
	return byName
}

func unknownVariable(name string) string {
	var names []string
	path := map[string]string{}
	for _, k := range Keys() {
		names = append(names, k.Env[0])
		path[k.Env[0]] = k.Path
	}
	const apps = "; apps that are not in the file come in AVATAR_APPS"
	// What all names have in common must not make one of them look near.
	const prefix = "AVATAR_"
	short := make([]string, len(names))
	for i := range names {
		short[i] = strings.TrimPrefix(names[i], prefix)
	}
	best := near(strings.TrimPrefix(name, prefix), short)
	switch {
	case strings.HasPrefix(name, "AVATAR_APPS_"):
		return "sets nothing" + apps
	case best == "":
		return "sets nothing: 'avatarworker check-config' prints every key, and docs/configuration.md its variable"
	}
	best = names[slices.Index(short, best)]
	return fmt.Sprintf("sets nothing; the nearest is %s (%s)", best, path[best])
}

func (l *loading) flags(overrides map[string]string) {
	l.addPolicies()
	set := map[string]origin{}
	for _, path := range slices.Sorted(maps.Keys(overrides)) {
		l.setText(path, overrides[path], "flag", set)
	}
	l.layer(set)
	l.dropPolicies()
}

// setText gives one key its value from text; apps and policy take theirs as
// YAML or JSON.
func (l *loading) setText(path, text, source string, set map[string]origin) {
	all := leaves(l.c)
	i := slices.IndexFunc(all, func(leaf leaf) bool { return leaf.path == path })
	if i < 0 {
		names := make([]string, len(all))
		for i, leaf := range all {
			names[i] = leaf.path
		}
		message := "is not a known key: docs/configuration.md lists them"
		if best := near(path, names); best != "" {
			message = "is not a known key: the nearest is " + best
		}
		l.problems = append(l.problems, Problem{Source: source, Key: path, Message: message})
		return
	}
	if all[i].isMap() {
		d := &decoder{source: source, set: set}
		d.decode(strings.NewReader(text), all[i].v, path)
		l.problems = append(l.problems, d.problems...)
		return
	}
	value, err := parseText(all[i].v.Type(), text)
	if err != nil {
		l.problems = append(l.problems, Problem{Source: source, Key: path, Message: err.Error()})
		return
	}
	all[i].v.Set(reflect.ValueOf(value))
	set[path] = origin{source: source}
}
