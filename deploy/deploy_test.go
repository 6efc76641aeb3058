// Package deploy_test holds what is deployed against the program: metrics that
// exist, runbooks that can be read, times that fit each other.
package deploy_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v4"

	"avatarworker/internal/config"
	"avatarworker/internal/telemetry"
)

type rule struct {
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

func TestEveryMetricInTheRulesIsExported(t *testing.T) {
	exported := exportedMetrics(t)
	for _, r := range rules(t) {
		checkQuery(t, exported, r.Alert, r.Expr)
	}
}

func TestEveryMetricInTheDashboardIsExported(t *testing.T) {
	exported := exportedMetrics(t)
	queries := dashboardQueries(t)
	if len(queries) < 20 {
		t.Fatalf("found %d queries in the dashboard: is it still read right?", len(queries))
	}
	for _, q := range queries {
		checkQuery(t, exported, q.panel, q.expr)
	}
}

// The check itself must be able to fail.
func TestQueryCheckFindsWrongNamesAndLabels(t *testing.T) {
	exported := exportedMetrics(t)
	for _, expr := range []string{
		`rate(avatar_worker_job_total[5m])`,
		`sum by (colour) (avatar_worker_jobs_total)`,
		`avatar_worker_jobs_total{colour="red"}`,
		`avatar_worker_ready_bucket`,
		`up == 0`,
	} {
		if problems := queryProblems(exported, expr); len(problems) == 0 {
			t.Errorf("%s: no problem found", expr)
		}
	}
	good := `histogram_quantile(0.9, sum by (le, instance) (rate(avatar_worker_first_frame_seconds_bucket{job=~"a|b"}[5m])))`
	if problems := queryProblems(exported, good); len(problems) > 0 {
		t.Errorf("%s: %v", good, problems)
	}
}

func TestEveryAlertSaysWhatItMeansAndWhatToDo(t *testing.T) {
	pages := map[string]bool{}
	for _, r := range rules(t) {
		for _, key := range []string{"summary", "description"} {
			if r.Annotations[key] == "" {
				t.Errorf("%s has no %s", r.Alert, key)
			}
		}
		if !slices.Contains([]string{"warning", "critical"}, r.Labels["severity"]) {
			t.Errorf("%s: severity %q", r.Alert, r.Labels["severity"])
		}
		want := "docs/runbooks/" + r.Alert + ".md"
		if got := r.Annotations["runbook_url"]; got != want {
			t.Errorf("%s: runbook_url %q, want %q", r.Alert, got, want)
		}
		pages[r.Alert+".md"] = true
		page := read(t, "../"+want)
		for _, heading := range []string{"# " + r.Alert + "\n", "## What it means\n", "## Where the cause is\n", "## What to look at\n", "## What to do\n"} {
			if !strings.Contains(page, heading) {
				t.Errorf("%s has no heading %q", want, strings.TrimSpace(heading))
			}
		}
		if !strings.Contains(page, "avatarworker status") {
			t.Errorf("%s does not name avatarworker status", want)
		}
	}
	files, err := os.ReadDir("../docs/runbooks")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Name() != "README.md" && !pages[f.Name()] {
			t.Errorf("docs/runbooks/%s belongs to no alert", f.Name())
		}
	}
}

func TestEveryAlertIsTriedFiringAndQuiet(t *testing.T) {
	var suite struct {
		Tests []struct {
			Alerts []struct {
				Alert string `yaml:"alertname"`
				Exp   []any  `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		} `yaml:"tests"`
	}
	parseYAML(t, "prometheus/rules_test.yaml", &suite)
	fired, quiet := map[string]bool{}, map[string]bool{}
	for _, test := range suite.Tests {
		for _, a := range test.Alerts {
			if len(a.Exp) > 0 {
				fired[a.Alert] = true
			} else {
				quiet[a.Alert] = true
			}
		}
	}
	for _, r := range rules(t) {
		if !fired[r.Alert] || !quiet[r.Alert] {
			t.Errorf("%s: tried firing: %v, quiet: %v", r.Alert, fired[r.Alert], quiet[r.Alert])
		}
	}
}

func TestDashboardPanelsAreWhole(t *testing.T) {
	var board struct {
		UID    string `json:"uid"`
		Panels []struct {
			ID          int    `json:"id"`
			Type        string `json:"type"`
			Title       string `json:"title"`
			Description string `json:"description"`
			GridPos     struct{ X, Y, W, H int }
			Targets     []struct {
				RefID string `json:"refId"`
			} `json:"targets"`
		} `json:"panels"`
	}
	if err := json.Unmarshal([]byte(read(t, "grafana/avatarworker.json")), &board); err != nil {
		t.Fatal(err)
	}
	if board.UID == "" {
		t.Error("without a uid each import makes another dashboard")
	}
	seen := map[int]bool{}
	for _, p := range board.Panels {
		if seen[p.ID] {
			t.Errorf("panel %q: id %d is taken", p.Title, p.ID)
		}
		seen[p.ID] = true
		if p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %q sticks out of the grid", p.Title)
		}
		if p.Type != "row" && (p.Description == "" || len(p.Targets) == 0) {
			t.Errorf("panel %q has no description or no query", p.Title)
		}
	}
}

func TestImageIsStaticAndRunsAsNobodyWithoutAShell(t *testing.T) {
	text := read(t, "Dockerfile")
	stages := regexp.MustCompile(`(?m)^FROM (\S+)`).FindAllStringSubmatch(text, -1)
	if len(stages) != 2 || stages[1][1] != "scratch" {
		t.Fatalf("stages %v: want a build and scratch", stages)
	}
	final := text[strings.LastIndex(text, "FROM scratch"):]
	for _, want := range []string{
		"\nUSER 65532:65532\n",
		"\nENTRYPOINT [\"/usr/local/bin/avatarworker\"]\n",
		"/etc/ssl/certs/ca-certificates.crt", // the backend is reached by TLS
	} {
		if !strings.Contains(final, want) {
			t.Errorf("the final stage lacks %q", want)
		}
	}
	if strings.Contains(final, "\nRUN ") {
		t.Error("scratch has nothing that could RUN")
	}
	for _, want := range []string{"CGO_ENABLED=0", "-trimpath", "-X main.version=${VERSION}", "./cmd/worker"} {
		if !strings.Contains(text, want) {
			t.Errorf("the build lacks %q", want)
		}
	}
	goVersion := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(read(t, "../go.mod"))
	if want := "golang:" + goVersion[1] + "-"; !strings.HasPrefix(stages[0][1], want) {
		t.Errorf("built with %s, go.mod wants %s", stages[0][1], want)
	}
}

func TestUnitGivesADrainItsTime(t *testing.T) {
	unit := read(t, "systemd/avatarworker.service")
	drain := config.Defaults().Worker.DrainTimeout
	if got, want := duration(t, unit, "TimeoutStopSec"), drain+30*time.Second; got != want {
		t.Errorf("TimeoutStopSec is %s, want the default drain timeout and 30 s: %s", got, want)
	}
	for _, want := range []string{"Type=notify", "KillSignal=SIGTERM", "LoadCredential=api-key:", "DynamicUser=yes", "RestartPreventExitStatus=2 78"} {
		if !strings.Contains(unit, "\n"+want) {
			t.Errorf("the unit lacks %s", want)
		}
	}
}

// The settings that the unit, the image and the chart make must be ones that
// the worker reads: each must change the configuration, or be refused for its
// value.
func TestEnvironmentVariablesAreOnesTheWorkerKnows(t *testing.T) {
	assigned := regexp.MustCompile(`(?:ENV |Environment=|- name: )((?:AVATAR|SPATIUS|NATS)_[A-Z_]+)`)
	base := config.Defaults()
	for _, file := range []string{"Dockerfile", "systemd/avatarworker.service", "helm/avatarworker/templates/deployment.yaml"} {
		names := assigned.FindAllStringSubmatch(read(t, file), -1)
		if len(names) == 0 {
			t.Errorf("%s sets nothing: is it still read right?", file)
		}
		for _, name := range names {
			c, warnings, err := config.Load(config.Source{Environ: []string{name[1] + "=some-value"}})
			if len(warnings) > 0 || err == nil && reflect.DeepEqual(c, base) {
				t.Errorf("%s sets %s, which the worker does not know: %v", file, name[1], warnings)
			}
		}
	}
}

func TestRunbooksNameKeysThatExist(t *testing.T) {
	keys := map[string]bool{"policy.CODE.alert": true}
	for _, k := range config.Keys() {
		keys[k.Path] = true
	}
	keyLike := regexp.MustCompile("`((?:nats|worker|retry|lease|app|backend|audio|circuit|alerts|policy|admin|ui|log)\\.[a-zA-Z_.]+)")
	found := 0
	for _, page := range glob(t, "../docs/runbooks/*.md") {
		for _, m := range keyLike.FindAllStringSubmatch(read(t, page), -1) {
			found++
			if !keys[m[1]] {
				t.Errorf("%s names %s, which is not a key", page, m[1])
			}
		}
	}
	if found < 10 {
		t.Errorf("found %d keys in the runbooks: are they still read right?", found)
	}
}

func TestChartsConfigIsOneTheWorkerTakes(t *testing.T) {
	for _, values := range append(glob(t, "helm/avatarworker/ci/*.yaml"), "helm/avatarworker/values.yaml") {
		var v struct {
			Config map[string]any `yaml:"config"`
		}
		parseYAML(t, values, &v)
		text, err := yaml.Marshal(v.Config)
		if err != nil {
			t.Fatal(err)
		}
		loadConfig(t, values, string(text))
	}
}

func loadConfig(t *testing.T, name, text string) *config.Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, _, err := config.Load(config.Source{File: file, FileNamed: true})
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return c
}

// --- reading ---

// metric is one exported family: its labels, and whether it is a histogram.
type metric struct {
	labels    []string
	histogram bool
}

var describeDesc = regexp.MustCompile(`fqName: "([^"]+)".*variableLabels: \{([^}]*)\}`)

// exportedMetrics are the families that a worker registers.
func exportedMetrics(t *testing.T) map[string]metric {
	t.Helper()
	reg := prometheus.NewRegistry()
	telemetry.NewMetrics(reg, telemetry.Labels{Queues: []string{"default"}, Apps: []string{"app"}}, telemetry.Readings{})
	descs := make(chan *prometheus.Desc)
	go func() {
		reg.Describe(descs)
		close(descs)
	}()
	found := map[string]metric{}
	for d := range descs {
		m := describeDesc.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("can't read %s", d)
		}
		found[m[1]] = metric{labels: strings.FieldsFunc(m[2], func(r rune) bool { return r == ',' || r == ' ' })}
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		m := found[f.GetName()]
		m.histogram = len(f.GetMetric()) > 0 && f.GetMetric()[0].GetHistogram() != nil
		found[f.GetName()] = m
	}
	return found
}

func checkQuery(t *testing.T, exported map[string]metric, where, expr string) {
	t.Helper()
	for _, p := range queryProblems(exported, expr) {
		t.Errorf("%s: %s\n%s", where, p, expr)
	}
}

var (
	quoted   = regexp.MustCompile(`"[^"]*"`)
	grouping = regexp.MustCompile(`\b(?:by|without|on|ignoring)\s*\(([^)]*)\)`)
	matchers = regexp.MustCompile(`\{([^}]*)\}`)
	ranges   = regexp.MustCompile(`\[[^\]]*\]`)
	word     = regexp.MustCompile(`[a-zA-Z_:][a-zA-Z0-9_:]*`)
	function = regexp.MustCompile(`\b[a-z_0-9]+\s*\(`)
	keyword  = regexp.MustCompile(`\b(?:or|and|unless|by|on|without|ignoring|bool|sum|max|min|count|avg|offset\s+\d+[smhd])\b`)
)

// queryProblems names the metrics in a query that no worker exports, and the
// labels that none of the query's metrics has.
func queryProblems(exported map[string]metric, expr string) []string {
	text := quoted.ReplaceAllString(expr, `""`)
	labels := []string{}
	for _, group := range grouping.FindAllStringSubmatch(text, -1) {
		labels = append(labels, word.FindAllString(group[1], -1)...)
	}
	for _, group := range matchers.FindAllStringSubmatch(text, -1) {
		labels = append(labels, word.FindAllString(group[1], -1)...)
	}
	for _, gone := range []*regexp.Regexp{grouping, matchers, ranges, function, keyword} {
		text = gone.ReplaceAllString(text, " ")
	}
	var problems []string
	known := []string{"job", "instance", "namespace", "pod"} // the scrape's own
	for _, name := range word.FindAllString(text, -1) {
		m, ok := exported[name]
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if base, cut := strings.CutSuffix(name, suffix); cut && exported[base].histogram {
				m, ok = exported[base], true
				known = append(known, "le")
			}
		}
		if !ok {
			problems = append(problems, name+" is not exported")
		}
		known = append(known, m.labels...)
	}
	for _, label := range labels {
		if !slices.Contains(known, label) {
			problems = append(problems, "no metric of the query has the label "+label)
		}
	}
	return problems
}

func rules(t *testing.T) []rule {
	t.Helper()
	var file struct {
		Groups []struct {
			Rules []rule `yaml:"rules"`
		} `yaml:"groups"`
	}
	parseYAML(t, "prometheus/rules.yaml", &file)
	var all []rule
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) == 0 {
		t.Fatal("no rules found")
	}
	return all
}

type query struct{ panel, expr string }

func dashboardQueries(t *testing.T) []query {
	t.Helper()
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct {
				Name  string
				Query any
			}
		}
	}
	if err := json.Unmarshal([]byte(read(t, "grafana/avatarworker.json")), &board); err != nil {
		t.Fatal(err)
	}
	var all []query
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			all = append(all, query{p.Title, target.Expr})
		}
	}
	labelValues := regexp.MustCompile(`label_values\((\w+), (\w+)\)`)
	for _, v := range board.Templating.List {
		if object, ok := v.Query.(map[string]any); ok {
			m := labelValues.FindStringSubmatch(object["query"].(string))
			if m == nil {
				t.Fatalf("variable %s: can't read %v", v.Name, object)
			}
			all = append(all, query{"variable " + v.Name, m[1] + "{" + m[2] + `=""}`})
		}
	}
	return all
}

func duration(t *testing.T, unit, key string) time.Duration {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + key + `=(\S+)$`).FindStringSubmatch(unit)
	if m == nil {
		t.Fatalf("the unit has no %s", key)
	}
	d, err := time.ParseDuration(m[1])
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func parseYAML(t *testing.T, file string, into any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(read(t, file)), into); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %d files, %v", pattern, len(files), err)
	}
	return files
}
