package contract

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/telemetry"
)

var update = flag.Bool("update", false, "write the generated parts of the documents")

// Marks around what is generated. A document explains around them.
const (
	begin = "<!-- generated: begin; go test ./test/contract -update -->\n"
	end   = "<!-- generated: end -->"
)

// upToDate compares the generated part of a document with want, or writes it.
func upToDate(t *testing.T, file, want string) {
	t.Helper()
	path := filepath.Join(root, file)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, found := strings.Cut(string(data), begin)
	_, after, ended := strings.Cut(rest, end)
	if !found || !ended {
		t.Fatalf("%s: the marks of the generated part are missing", file)
	}
	whole := []byte(before + begin + "\n" + want + "\n" + end + after)
	if bytes.Equal(whole, data) {
		return
	}
	if !*update {
		t.Fatalf("%s is not what the code says: go test ./test/contract -update", file)
	}
	if err := os.WriteFile(path, whole, 0o644); err != nil {
		t.Fatal(err)
	}
}

func rows(t *testing.T) []errors.Row {
	t.Helper()
	table, err := errors.NewTable(nil)
	if err != nil {
		t.Fatal(err)
	}
	return table.Rows()
}

func TestTheTableOfCodesIsTheWorkers(t *testing.T) {
	var b strings.Builder
	b.WriteString("| code | class | action | attempts | alert | owner |\n|---|---|---|---|---|---|\n")
	for _, r := range rows(t) {
		fmt.Fprintf(&b, "| [%s](#%s) | %s | %s | %s | %s | %s |\n", r.Code, strings.ToLower(string(r.Code)), r.Class, action(r), attempts(r), yes(r.Alert), r.Owner)
	}
	for _, r := range rows(t) {
		fmt.Fprintf(&b, "\n### %s\n\n%s\n\n", r.Code, cell(r.Meaning))
		if r.Exception != "" {
			fmt.Fprintf(&b, "Exception: %s.\n\n", cell(r.Exception))
		}
		fmt.Fprintf(&b, "**What to do.** %s\n", cell(r.Remedy))
	}
	upToDate(t, "docs/codes.md", b.String())
}

// The README has one row for each class and action; docs/codes.md has every code.
func TestTheShortTableOfCodesInTheReadmeIsTheWorkers(t *testing.T) {
	type group struct{ class, does string }
	var order []group
	names, owners := map[group][]string{}, map[group][]string{}
	for _, r := range rows(t) {
		g := group{string(r.Class), action(r)}
		if r.Attempts > 0 {
			g.does += fmt.Sprintf(", %d attempts in all", r.Attempts)
		}
		if names[g] == nil {
			order = append(order, g)
		}
		names[g] = append(names[g], fmt.Sprintf("[%s](docs/codes.md#%s)", r.Code, strings.ToLower(string(r.Code))))
		if !slices.Contains(owners[g], r.Owner) {
			owners[g] = append(owners[g], r.Owner)
		}
	}
	var b strings.Builder
	b.WriteString("| class | codes | the worker's action | owner |\n|---|---|---|---|\n")
	for _, g := range order {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", g.class, strings.Join(names[g], ", "), g.does, strings.Join(owners[g], ", "))
	}
	upToDate(t, "README.md", b.String())
}

func TestTheTableOfKeysIsTheConfigurations(t *testing.T) {
	var b strings.Builder
	b.WriteString("| key | default | kind | environment |\n|---|---|---|---|\n")
	for _, k := range config.Keys() {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", k.Path, code(k.Default), k.Type, code(k.Env...))
	}
	upToDate(t, "docs/configuration.md", b.String())
}

func TestTheTableOfMetricsIsTheWorkers(t *testing.T) {
	reg := prometheus.NewRegistry()
	telemetry.NewMetrics(reg, telemetry.Labels{Queues: []string{"default"}, Apps: []string{"app"}}, telemetry.Readings{})
	var b strings.Builder
	b.WriteString("| metric | type | labels | what it is |\n|---|---|---|---|\n")
	for _, m := range metrics(t, reg) {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.name, m.kind, code(m.labels...), cell(m.help))
	}
	upToDate(t, "docs/metrics.md", b.String())
}

type metric struct {
	name, kind, help string
	labels           []string
}

// metricDesc is what a Desc of Prometheus says of itself: its name, its help, quoted,
// and the names of its labels.
var metricDesc = regexp.MustCompile(`^Desc\{fqName: "([^"]*)", help: ("(?:[^"\\]|\\.)*"), .*variableLabels: \{([^}]*)\}\}$`)

// metrics are the worker's own of a registry, by name.
func metrics(t *testing.T, reg *prometheus.Registry) []metric {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	histograms := map[string]bool{}
	for _, f := range families {
		histograms[f.GetName()] = f.GetMetric()[0].GetHistogram() != nil
	}
	descs := make(chan *prometheus.Desc)
	go func() {
		reg.Describe(descs)
		close(descs)
	}()
	var list []metric
	for d := range descs {
		parts := metricDesc.FindStringSubmatch(d.String())
		if parts == nil {
			t.Errorf("can't read %s", d)
			continue
		}
		if !strings.HasPrefix(parts[1], "avatar_worker_") {
			continue
		}
		help, err := strconv.Unquote(parts[2])
		if err != nil {
			t.Fatal(err)
		}
		m := metric{name: parts[1], kind: "gauge", help: help, labels: strings.FieldsFunc(parts[3], func(r rune) bool { return r == ',' })}
		switch {
		case histograms[m.name]:
			m.kind = "histogram"
		case strings.HasSuffix(m.name, "_total"):
			m.kind = "counter"
		}
		list = append(list, m)
	}
	slices.SortFunc(list, func(a, b metric) int { return strings.Compare(a.name, b.name) })
	return list
}

func action(r errors.Row) string { return string(r.Action) }

func attempts(r errors.Row) string {
	switch {
	case r.Attempts > 0:
		return fmt.Sprint(r.Attempts)
	case r.Action == errors.ActionRetry:
		return "the job's"
	default:
		return "–"
	}
}

func yes(on bool) string {
	if on {
		return "yes"
	}
	return ""
}

// cell keeps a text from ending a table's cell or becoming a tag.
func cell(text string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;", "\n", " ").Replace(text)
}

func code(texts ...string) string {
	var quoted []string
	for _, text := range texts {
		if text != "" {
			quoted = append(quoted, "`"+text+"`")
		}
	}
	return strings.Join(quoted, ", ")
}

// Links between documents rot silently otherwise.
func TestLinksOfTheDocumentsLeadSomewhere(t *testing.T) {
	for _, file := range documents(t) {
		for _, link := range links(read(t, file)) {
			if strings.Contains(link, "://") {
				continue
			}
			path, anchor, _ := strings.Cut(link, "#")
			target := file
			if path != "" {
				target = filepath.Join(filepath.Dir(file), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %v", file, err)
			} else if anchor != "" && !slices.Contains(anchors(read(t, target)), anchor) {
				t.Errorf("%s: %s has no heading #%s", file, target, anchor)
			}
		}
	}
}

func TestSectionsOfTheProtocolThatTheCodeCitesAreThere(t *testing.T) {
	protocol := read(t, filepath.Join(root, "docs/protocol.md"))
	// The citation may be broken by the comment's next line.
	cited := regexp.MustCompile(`docs/protocol\.md,(?:\s|//)+sections? ([0-9]+)(?: and ([0-9]+))?`)
	found := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" {
			return err
		}
		for _, m := range cited.FindAllStringSubmatch(read(t, path), -1) {
			for _, number := range m[1:] {
				if number == "" {
					continue
				}
				found++
				if !strings.Contains(protocol, "\n## "+number+". ") {
					t.Errorf("%s cites section %s of docs/protocol.md, which is not there", path, number)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if found < 20 {
		t.Errorf("only %d citations found: are they still read right?", found)
	}
}

// documents are all of the repository's.
func documents(t *testing.T) []string {
	t.Helper()
	var files []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md", "deploy/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	return files
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// anchors are those of a document's headings, as GitHub makes them.
func anchors(text string) []string {
	var found []string
	for line := range strings.Lines(text) {
		title := strings.TrimLeft(line, "#")
		if title == line || !strings.HasPrefix(title, " ") {
			continue
		}
		found = append(found, strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
				return unicode.ToLower(r)
			}
			return -1
		}, strings.TrimSpace(title)))
	}
	return found
}

// links lists the targets of a document's links.
func links(text string) []string {
	var found []string
	for {
		_, rest, ok := strings.Cut(text, "](")
		if !ok {
			return found
		}
		link, after, _ := strings.Cut(rest, ")")
		found = append(found, link)
		text = after
	}
}
