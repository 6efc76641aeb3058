package contract

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// counts are the fields of log lines whose numbers are counts or ordinals. Every
// other number has its unit in its name.
var counts = []string{
	"attempt", "attempts", "checkpoint", "concurrency", "conflicts", "count", "crashes", "current_run", "kept_seq",
	"done", "max_attempts", "not_done", "run", "running", "session", "stream_seq", "utterances",
}

// units end the names of numbers.
var units = []string{"_ms", "_seconds", "_bytes", "_credits", "_percent", "_hz"}

// levels begin a log line.
var levels = []string{"Trace", "Debug", "Info", "Warn", "Error", "Err", "Fatal", "Log", "WithLevel", "With"}

// numbers are the methods of a log line that write a number.
var numbers = []string{
	"Int", "Int8", "Int16", "Int32", "Int64", "Uint", "Uint8", "Uint16", "Uint32", "Uint64", "Float32", "Float64",
	"Ints", "Ints64", "Uints", "Uints64", "Floats32", "Floats64",
}

// bare are methods that write a duration as a number whose unit is a setting, or
// whatever a value is made of. Stringer writes a duration with its unit.
var bare = []string{"Dur", "Durs", "TimeDiff", "Any", "Interface", "Fields"}

func TestLogLinesHaveUnits(t *testing.T) {
	found := 0
	for _, dir := range []string{"internal", "cmd"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			set := token.NewFileSet()
			file, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			for _, f := range logFields(file) {
				found++
				if fault := f.fault(); fault != "" {
					t.Errorf("%s: log field %q: %s", set.Position(f.pos), f.name, fault)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 20 {
		t.Errorf("only %d numbers found in log lines: the test no longer knows how they are written", found)
	}
}

func TestUnitsOfLogFieldsAreSeen(t *testing.T) {
	for line, ok := range map[string]bool{
		`log.Info().Int("attempt", n).Msg("")`:                       true,
		`log.Info().Int64("took_ms", d.Milliseconds()).Msg("")`:      true,
		`log.Info().Stringer("took", d).Msg("")`:                     true,
		`log.Info().Dur("took", d).Msg("")`:                          false,
		`s.log().Warn().Str("a", b).Int64("took", d.Milliseconds())`: false,
		`e := log.Info(); e.Int("size", len(data)); e.Send()`:        false,
		`log.Error().Interface("wait", d).Send()`:                    false,
		`log = log.With().Float64("limit", d.Seconds()).Logger()`:    false,
		`w.log.WithLevel(l).Int(name, n).Send()`:                     false,
		`o.Int("size", n)`:                                           true, // not a log line
	} {
		file, err := parser.ParseFile(token.NewFileSet(), "x.go", "package x\nfunc f() { "+line+" }", 0)
		if err != nil {
			t.Fatal(err)
		}
		got := true
		for _, f := range logFields(file) {
			got = got && f.fault() == ""
		}
		if got != ok {
			t.Errorf("%s: taken: %v, want %v", line, got, ok)
		}
	}
}

// logField is a number in a log line.
type logField struct {
	method, name string // name is "" where it is not a literal
	pos          token.Pos
}

func (f logField) fault() string {
	hasUnit := slices.ContainsFunc(units, func(unit string) bool { return strings.HasSuffix(f.name, unit) })
	switch {
	case slices.Contains(bare, f.method):
		return f.method + " writes a number without its unit: write a duration with Stringer, other values by their type"
	case f.name == "":
		return "its name is not a literal, so its unit is not known"
	case !hasUnit && !slices.Contains(counts, f.name):
		return "a number without a unit: end its name with one of " + strings.Join(units, ", ") + ", write a duration with Stringer, or add a count to counts"
	}
	return ""
}

// logFields finds the numbers in a file's log lines. A line is a chain of calls
// that begins with a level, or with a variable that was assigned such a chain.
func logFields(file *ast.File) (fields []logField) {
	lines := make(map[string]bool) // variables
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			for i, right := range n.Rhs {
				if name, ok := n.Lhs[min(i, len(n.Lhs)-1)].(*ast.Ident); ok && isLogLine(right, lines) {
					lines[name.Name] = true
				}
			}
		case *ast.CallExpr:
			method, ok := n.Fun.(*ast.SelectorExpr)
			if !ok || !slices.Contains(numbers, method.Sel.Name) && !slices.Contains(bare, method.Sel.Name) || !isLogLine(method.X, lines) {
				return true
			}
			f := logField{method: method.Sel.Name, pos: n.Pos()}
			if len(n.Args) > 0 {
				if lit, ok := n.Args[0].(*ast.BasicLit); ok {
					f.name, _ = strconv.Unquote(lit.Value)
				}
			}
			fields = append(fields, f)
		}
		return true
	})
	return fields
}

func isLogLine(x ast.Expr, lines map[string]bool) bool {
	switch x := x.(type) {
	case *ast.Ident:
		return lines[x.Name]
	case *ast.CallExpr:
		method, ok := x.Fun.(*ast.SelectorExpr)
		if !ok {
			return false
		}
		ends := method.Sel.Name == "Msg" || method.Sel.Name == "Send" || method.Sel.Name == "Logger"
		return !ends && (slices.Contains(levels, method.Sel.Name) || isLogLine(method.X, lines))
	}
	return false
}
