package contract

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "avatarworker/"

// mayImport reads the table of docs/architecture.md: by package, which others it
// may import; nil: not limited.
func mayImport(t *testing.T) map[string][]string {
	t.Helper()
	table := make(map[string][]string)
	names := regexp.MustCompile("`([a-z0-9/]+)`")
	for line := range strings.Lines(read(t, filepath.Join(root, "docs/architecture.md"))) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || !strings.HasPrefix(strings.TrimSpace(cells[1]), "`") {
			continue
		}
		var allowed []string
		if text := cells[3]; !strings.Contains(text, "anything") && !strings.Contains(text, "every internal package") {
			allowed = []string{}
			if strings.Contains(text, "all packages under it") {
				allowed = append(allowed, "jobs/*")
			}
			if strings.Contains(text, "`jobs` and the packages under it") {
				allowed = append(allowed, "jobs", "jobs/*")
			}
			if before, after, found := strings.Cut(text, "the packages under `jobs`"); found { // and not jobs itself
				allowed, text = append(allowed, "jobs/*"), before+after
			}
			for _, m := range names.FindAllStringSubmatch(text, -1) {
				allowed = append(allowed, m[1])
			}
		}
		for _, m := range names.FindAllStringSubmatch(cells[1], -1) {
			table[m[1]] = allowed
		}
	}
	return table
}

// covers reports whether a list of the table has the package: by its path or its
// last name.
func covers(allowed []string, imported string) bool {
	name := strings.TrimPrefix(imported, "internal/")
	return slices.Contains(allowed, name) || slices.Contains(allowed, filepath.Base(name)) ||
		slices.Contains(allowed, "jobs/*") && strings.HasPrefix(name, "jobs/")
}

func TestThePackagesImportWhatTheArchitectureSays(t *testing.T) {
	table := mayImport(t)
	if len(table) < 25 {
		t.Fatalf("only %d packages found in docs/architecture.md: is the table still read right?", len(table))
	}
	readme := read(t, filepath.Join(root, "README.md"))
	// Packages that belong to the one above them, and have no row.
	parts := []string{"internal/jobs/jobpb", "internal/session/avatarpb", "internal/natsserver/natstest", "internal/audio/clip"}
	seen := make(map[string]bool)
	err := filepath.WalkDir(filepath.Join(root, "internal"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil || slices.Contains(parts, filepath.ToSlash(dir)) {
			return err
		}
		pkg := filepath.ToSlash(dir)
		allowed, known := table[pkg]
		if first := !seen[pkg]; first {
			seen[pkg] = true
			if !known {
				t.Errorf("docs/architecture.md has no row for %s", pkg)
			}
			if !strings.HasPrefix(pkg, "internal/jobs/") && !strings.Contains(readme, "`"+pkg+"`") {
				t.Errorf("the README's table of packages does not name %s", pkg)
			}
		}
		if !known || allowed == nil {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			imported, ours := strings.CutPrefix(imported, module)
			if ours && !strings.HasPrefix(imported, pkg+"/") && !covers(allowed, imported) {
				t.Errorf("%s imports %s, which docs/architecture.md does not allow to %s", path, imported, pkg)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range table {
		if strings.HasPrefix(pkg, "internal/") && !seen[pkg] {
			t.Errorf("docs/architecture.md has a row for %s, which is not there", pkg)
		}
	}
}
