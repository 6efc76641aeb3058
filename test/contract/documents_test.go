package contract

import (
	"encoding/json"
	"io/fs"
	"maps"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"avatarworker/internal/jobs/jobspec"
)

// jsonBlock is a JSON example of a document.
var jsonBlock = regexp.MustCompile("(?s)```json\n(.*?)```")

// Examples that are copied must work. One that shows only a part of a job is
// completed here.
func TestTheJobsInTheDocumentsAreValid(t *testing.T) {
	for _, file := range []string{"docs/job.md", "docs/publishing.md"} {
		blocks := jsonBlock.FindAllStringSubmatch(read(t, filepath.Join(root, file)), -1)
		if len(blocks) == 0 {
			t.Errorf("%s: no examples found", file)
		}
		for _, block := range blocks {
			var part map[string]any
			if err := json.Unmarshal([]byte(block[1]), &part); err != nil {
				t.Errorf("%s: %v\n%s", file, err, block[1])
				continue
			}
			job := map[string]any{"avatar_id": "a", "audio": map[string]any{"object": "a.wav"}}
			if part["utterances"] != nil || part["live"] != nil {
				delete(job, "audio")
			}
			maps.Copy(job, part)
			data, err := json.Marshal(job)
			if err != nil {
				t.Fatal(err)
			}
			if _, invalid := jobspec.Decode(nil, data); invalid != nil {
				t.Errorf("%s: %v\n%s", file, invalid, block[1])
			}
		}
	}
}

// sourceName is what a document names of the source: a file, or a function or a field by
// a name that no other text has.
var sourceName = regexp.MustCompile("`([a-z_]+\\.go|[a-z]+[A-Z][A-Za-z]*|Test[A-Z][A-Za-z0-9]*)`")

func TestTheGuidesNameOnlyWhatTheSourceHas(t *testing.T) {
	words, files := map[string]bool{}, map[string]bool{}
	word := regexp.MustCompile(`[A-Za-z][A-Za-z0-9]*`)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "bin" || d.Name() == ".git" || d.Name() == "node_modules"):
			return filepath.SkipDir
		case !strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, ".yaml"):
			return nil
		}
		files[d.Name()] = true
		for _, w := range word.FindAllString(read(t, path), -1) {
			words[w] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range []string{"CONTRIBUTING.md", "docs/architecture.md", "docs/jobs.md", "docs/reliability.md"} {
		names := sourceName.FindAllStringSubmatch(read(t, filepath.Join(root, doc)), -1)
		if len(names) < 5 {
			t.Errorf("%s names only %d things of the source", doc, len(names))
		}
		for _, m := range names {
			if !words[m[1]] && !files[m[1]] {
				t.Errorf("%s names %s, which the source does not have", doc, m[1])
			}
		}
	}
}
