package jobs_test

import (
	"bytes"
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// What the core may grow to. Past it, something in it is a package of its own.
const (
	maxLines    = 2900 // without tests
	maxExported = 40
	maxFields   = 20 // of a struct
	maxMethods  = 45 // of a type
)

const (
	module     = "avatarworker/"
	core       = module + "internal/jobs"
	recordPath = core + "/lifecycle"
)

// program type-checks the module's packages from their files. Those of others are
// empty in it: it knows the module's types and no more, which takes no build.
type program struct {
	t        *testing.T
	root     string
	fset     *token.FileSet
	files    map[string][]*ast.File
	packages map[string]*types.Package
	info     types.Info
}

func newProgram(t *testing.T) *program {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	return &program{
		t: t, root: root, fset: token.NewFileSet(),
		files: make(map[string][]*ast.File), packages: make(map[string]*types.Package),
		info: types.Info{Selections: make(map[*ast.SelectorExpr]*types.Selection)},
	}
}

func (p *program) dir(path string) string {
	return filepath.Join(p.root, filepath.FromSlash(strings.TrimPrefix(path, module)))
}

// Import is what the type checker calls for each import.
func (p *program) Import(importPath string) (*types.Package, error) {
	if pkg := p.packages[importPath]; pkg != nil {
		return pkg, nil
	}
	if !strings.HasPrefix(importPath, module) {
		pkg := types.NewPackage(importPath, path.Base(importPath))
		pkg.MarkComplete()
		p.packages[importPath] = pkg
		return pkg, nil
	}
	listed, err := build.ImportDir(p.dir(importPath), 0)
	if err != nil {
		return nil, err
	}
	for _, name := range listed.GoFiles {
		file, err := parser.ParseFile(p.fset, filepath.Join(listed.Dir, name), nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		p.files[importPath] = append(p.files[importPath], file)
	}
	config := types.Config{Importer: p, Error: func(error) {}} // what others' packages have is unknown
	pkg, _ := config.Check(importPath, p.fset, p.files[importPath], &p.info)
	p.packages[importPath] = pkg
	return pkg, nil
}

func (p *program) check(importPath string) *types.Package {
	p.t.Helper()
	pkg, err := p.Import(importPath)
	if err != nil {
		p.t.Fatal(err)
	}
	return pkg
}

func TestTheCoreStaysSmall(t *testing.T) {
	p := newProgram(t)
	pkg := p.check(core)
	lines := 0
	for _, file := range p.files[core] {
		data, err := os.ReadFile(p.fset.File(file.Pos()).Name())
		if err != nil {
			t.Fatal(err)
		}
		lines += bytes.Count(data, []byte("\n"))
	}
	exported := 0
	for _, name := range pkg.Scope().Names() {
		object := pkg.Scope().Lookup(name)
		if object.Exported() {
			exported++
		}
		named, ok := object.Type().(*types.Named)
		if _, isType := object.(*types.TypeName); !ok || !isType {
			continue
		}
		if n := named.NumMethods(); n > maxMethods {
			t.Errorf("%s has %d methods, want at most %d", name, n, maxMethods)
		}
		if s, ok := named.Underlying().(*types.Struct); ok && s.NumFields() > maxFields {
			t.Errorf("%s has %d fields, want at most %d", name, s.NumFields(), maxFields)
		}
	}
	t.Logf("%d lines, %d exported identifiers", lines, exported)
	if lines > maxLines {
		t.Errorf("%s has %d lines, want at most %d: move a subject to a package of its own", core, lines, maxLines)
	}
	if exported > maxExported {
		t.Errorf("%s exports %d identifiers, want at most %d", core, exported, maxExported)
	}
}

func TestOnlyTransitionsWriteRecords(t *testing.T) {
	t.Parallel()
	p := newProgram(t)
	reads := 0
	for _, importPath := range p.packagesWithRecords() {
		p.check(importPath)
		for _, file := range p.files[importPath] {
			ast.Inspect(file, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok && p.recordField(s) != "" {
					reads++
				}
				for _, target := range targets(n) {
					if field := p.recordField(target); field != "" {
						t.Errorf("%s writes Record.%s: make it a transition in lifecycle", p.fset.Position(target.Pos()), field)
					}
				}
				return true
			})
		}
	}
	if reads < 100 {
		t.Errorf("only %d uses of a Record's fields found: the test no longer sees its types", reads)
	}
}

// packagesWithRecords are those that import lifecycle.
func (p *program) packagesWithRecords() (list []string) {
	p.t.Helper()
	for _, top := range []string{"cmd", "internal"} {
		err := filepath.WalkDir(filepath.Join(p.root, top), func(dir string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return err
			}
			if listed, err := build.ImportDir(dir, 0); err == nil && slices.Contains(listed.Imports, recordPath) { // an error: no Go files
				below, err := filepath.Rel(p.root, dir)
				if err != nil {
					return err
				}
				list = append(list, module+filepath.ToSlash(below))
			}
			return nil
		})
		if err != nil {
			p.t.Fatal(err)
		}
	}
	return list
}

// targets are the expressions that a statement writes to, or may let others write
// to.
func targets(n ast.Node) []ast.Expr {
	switch n := n.(type) {
	case *ast.AssignStmt:
		if n.Tok != token.DEFINE {
			return n.Lhs
		}
	case *ast.IncDecStmt:
		return []ast.Expr{n.X}
	case *ast.UnaryExpr:
		if n.Op == token.AND {
			return []ast.Expr{n.X}
		}
	}
	return nil
}

// recordField is the field of a Record that an expression is, or is within; "":
// none.
func (p *program) recordField(e ast.Expr) string {
	for {
		switch x := e.(type) {
		case *ast.SelectorExpr:
			if s := p.info.Selections[x]; s != nil && s.Kind() == types.FieldVal && isRecord(s.Recv()) {
				return x.Sel.Name
			}
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		default:
			return ""
		}
	}
}

func isRecord(t types.Type) bool {
	if p, ok := t.(*types.Pointer); ok {
		t = p.Elem()
	}
	named, ok := t.(*types.Named)
	return ok && named.Obj().Name() == "Record" && named.Obj().Pkg().Path() == recordPath
}
