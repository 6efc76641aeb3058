package contract

import (
	"encoding/json"
	"maps"
	"path/filepath"
	"regexp"
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
