package config

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"avatarworker/internal/errors"
)

// Each file in testdata/bad breaks one rule, or a few together, and ends with
// the messages that it must give: all of them, each with line and key.
func TestEveryBadFileIsRefusedWithLineAndKey(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) < 60 {
		t.Fatalf("found %d bad files: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			want := wanted(t, file)
			_, _, err := Load(Source{File: file, FileNamed: true})
			var bad *Error
			if !errors.As(err, &bad) {
				t.Fatalf("Load gave %v, not an *Error", err)
			}
			var got []string
			for _, p := range bad.Problems {
				got = append(got, strings.TrimSpace(strings.TrimPrefix(p.String(), file+":")))
			}
			if !slices.Equal(got, want) {
				t.Errorf("got\n# want: %s\nwant\n# want: %s", strings.Join(got, "\n# want: "), strings.Join(want, "\n# want: "))
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error shows a secret: %v", err)
			}
		})
	}
}

func wanted(t *testing.T, file string) (want []string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if message, ok := strings.CutPrefix(line, "# want: "); ok {
			want = append(want, strings.TrimSpace(message))
		}
	}
	return want
}
