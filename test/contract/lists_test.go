package contract

import (
	"encoding/json"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/limit"
	"avatarworker/internal/jobs/usage"
)

// sameList compares a list of the code with one of a document or schema.
func sameList(t *testing.T, where string, got, want []string) {
	t.Helper()
	got, want = slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))
	if !slices.Equal(got, want) {
		t.Errorf("%s has %v, the code %v", where, got, want)
	}
}

// enum reads the values of the schema at a path such as $defs/action/enum; of an
// object with properties it reads their names.
func enum(t *testing.T, file, path string) []string {
	t.Helper()
	var at any
	if err := json.Unmarshal([]byte(read(t, filepath.Join(root, "schema", file))), &at); err != nil {
		t.Fatal(err)
	}
	for name := range strings.SplitSeq(path, "/") {
		object, ok := at.(map[string]any)
		if !ok {
			t.Fatalf("%s has no %s", file, path)
		}
		at = object[name]
	}
	var values []string
	switch at := at.(type) {
	case []any:
		for _, v := range at {
			values = append(values, v.(string))
		}
	case map[string]any:
		for name := range at {
			values = append(values, name)
		}
	default:
		t.Fatalf("%s has no %s", file, path)
	}
	return values
}

func asTexts[T ~string](list []T) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = string(v)
	}
	return out
}

func TestSchemasListWhatTheCodeLists(t *testing.T) {
	for _, l := range []struct {
		file, path string
		code       []string
	}{
		{"job.schema.json", "$defs/output/properties", jobspec.Outputs()},
		{"events/started.schema.json", "properties/output/enum", jobspec.Outputs()},
		{"events/common.schema.json", "$defs/action/enum", asTexts(errors.Actions())},
		{"events/common.schema.json", "$defs/code/enum", asTexts(errors.Codes())},
		{"usage.schema.json", "properties/outcome_code/enum", append(asTexts(errors.Codes()), usage.CodeCompleted, usage.CodeCancelled, usage.CodeReleased, usage.CodeStorage)},
		{"events/held.schema.json", "properties/reason/enum", lifecycle.HeldReasons()},
	} {
		sameList(t, l.file+" "+l.path, enum(t, l.file, l.path), l.code)
	}
}

func TestKeysOfSessionLimitsAreTheSameEverywhere(t *testing.T) {
	sameList(t, "config.LimitKeys", config.LimitKeys(), limit.Keys())
	patterns := regexp.MustCompile(`"pattern": "\^\(([a-z_|]+)\|label`).FindAllStringSubmatch(read(t, filepath.Join(root, "deploy/helm/avatarworker/values.schema.json")), -1)
	patterns = slices.DeleteFunc(patterns, func(p []string) bool { return p[1] == "app_id" }) // of budgets
	if len(patterns) != 2 {
		t.Fatalf("the chart's schema has %d patterns of the keys, want 2", len(patterns))
	}
	for _, p := range patterns {
		sameList(t, "the chart's schema", strings.Split(p[1], "|"), limit.Keys())
	}
	for _, file := range []string{"README.md", "config.yaml", "docs/decisions/0011-session-limits-as-keys.md"} {
		text := read(t, filepath.Join(root, file))
		for _, key := range limit.Keys() {
			if !strings.Contains(text, key) {
				t.Errorf("%s does not name the key %s", file, key)
			}
		}
	}
}

func TestPeriodsOfBudgetsAreTheSameEverywhere(t *testing.T) {
	sameList(t, "config.BudgetPeriods", config.BudgetPeriods(), budget.Periods())
	schema := read(t, filepath.Join(root, "deploy/helm/avatarworker/values.schema.json"))
	for _, list := range []string{
		`"per": {"enum": ["` + strings.Join(budget.Periods(), `", "`) + `"]}`, `/(` + strings.Join(budget.Periods(), "|") + `)(@`,
	} {
		if !strings.Contains(schema, list) {
			t.Errorf("the chart's schema has no %s", list)
		}
	}
	if text := "a " + strings.Join(budget.Periods(), " or a ") + " (UTC)"; !strings.Contains(read(t, filepath.Join(root, "config.yaml")), text) {
		t.Errorf("config.yaml does not say %q", text)
	}
}

func TestDocumentsNameEachReasonOfAHold(t *testing.T) {
	text := read(t, filepath.Join(root, "docs/jobs.md"))
	for _, reason := range lifecycle.HeldReasons() {
		if !strings.Contains(text, "\n| `"+reason+"` |") {
			t.Errorf("docs/jobs.md has no row for the reason %s", reason)
		}
	}
}

func TestDocumentsNameEachOutput(t *testing.T) {
	job, publishing := read(t, filepath.Join(root, "docs/job.md")), read(t, filepath.Join(root, "docs/publishing.md"))
	for _, kind := range jobspec.Outputs() {
		if !regexp.MustCompile("\n\\| `" + kind + "`[^|]*\\|").MatchString(job) {
			t.Errorf("docs/job.md has no row for the output %s", kind)
		}
		if !strings.Contains(publishing, "`"+kind+"`") {
			t.Errorf("docs/publishing.md does not name the output %s", kind)
		}
	}
}
