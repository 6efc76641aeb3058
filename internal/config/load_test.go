package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/errors"
)

const reference = "../../config.yaml"

func load(t *testing.T, src Source) *Config {
	t.Helper()
	c, warnings, err := Load(src)
	if err != nil {
		t.Fatal(err)
	}
	if len(warnings) > 0 {
		t.Errorf("warnings: %v", warnings)
	}
	return c
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// same compares without the places where keys were set.
func same(a, b *Config) bool {
	x, y := *a, *b
	x.origins, y.origins = nil, nil
	return reflect.DeepEqual(x, y)
}

func TestReferenceFileIsTheDefaults(t *testing.T) {
	if got := load(t, Source{File: reference, FileNamed: true}); !same(got, Defaults()) {
		t.Errorf("config.yaml gives\n%+v\nnot the defaults\n%+v", got, Defaults())
	}
}

func TestReferenceFileHasEveryKey(t *testing.T) {
	c := load(t, Source{File: reference, FileNamed: true})
	for _, l := range leaves(Defaults()) {
		if !strings.HasPrefix(c.Source(l.path), reference+":") {
			t.Errorf("config.yaml does not have %s", l.path)
		}
	}
}

func TestEmptyFileIsTheDefaults(t *testing.T) {
	for _, text := range []string{"", "# nothing\n", "---\n", "nats:\napps:\n"} {
		if got := load(t, Source{File: write(t, text)}); !same(got, Defaults()) {
			t.Errorf("%q gives %+v", text, got)
		}
	}
}

func TestDefaultsAreValid(t *testing.T) {
	if err := Defaults().Validate(); err != nil {
		t.Error(err)
	}
}

func TestAFileThatWasNamedMustExist(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none.yaml")
	if got := load(t, Source{File: missing}); !same(got, Defaults()) {
		t.Error("a missing file that was not named changes something")
	}
	_, _, err := Load(Source{File: missing, FileNamed: true})
	var bad *Error
	if !errors.As(err, &bad) || !strings.Contains(err.Error(), missing+": can't be read: no such file") {
		t.Errorf("got %v", err)
	}
}

func TestFlagOverEnvironmentOverFileOverDefault(t *testing.T) {
	src := Source{
		File: write(t, "nats: {prefix: file, url: 'nats://file', replicas: 3}\nretry: {max_attempts: 7}\n"),
		Environ: []string{
			"NATS_URL=nats://older", "AVATAR_NATS_URL=nats://ours",
			"AVATAR_NATS_PREFIX=environment", "AVATAR_RETRY_MAX=", "SPATIUS_REGION=ap-northeast",
		},
		Overrides: map[string]string{"nats.prefix": "flag"},
	}
	c := load(t, src)
	for _, row := range []struct{ key, got, want, source string }{
		{"nats.prefix", c.NATS.Prefix, "flag", "flag"},
		{"nats.url", c.NATS.URL, "nats://ours", "AVATAR_NATS_URL"},
		{"nats.replicas", fmt.Sprint(c.NATS.Replicas), "3", src.File + ":1"},
		{"retry.max_attempts", fmt.Sprint(c.Retry.MaxAttempts), "7", src.File + ":2"},
		{"retry.max", c.Retry.Max.String(), "1m0s", ""},
		{"backend.region", c.Backend.Region, "ap-northeast", "SPATIUS_REGION"},
	} {
		if row.got != row.want || c.Source(row.key) != row.source {
			t.Errorf("%s is %q from %q, want %q from %q", row.key, row.got, c.Source(row.key), row.want, row.source)
		}
	}
}

// sample is a valid value other than the default, by key path; keys that are
// not here take the one of their type.
func sample(k Key) string {
	switch special := map[string]string{
		"nats.url": "nats://a:1,nats://b:2", "nats.storage": "memory", "nats.state_ttl": "200h",
		"worker.queues": "default,vip:3", "limits": "label.room:1,avatar_id:4", "worker.micro": "false", "retry.max": "70s", "retry.initial": "70ms",
		"backend.fallback_regions": "eu-west,cn-beijing", "backend.region": "auto", "backend.auth": "query",
		"backend.console_url": "http://127.0.0.1:1/v1/console", "backend.ingress_url": "ws://127.0.0.1:1/v2",
		"backend.bootstrap_url": "https://b.example/x", "nats.api_prefix": "$JS.hub.API", "nats.inbox_prefix": "_INBOX.me", "audio.pace": "realtime", "audio.chunk": "20ms",
		"circuit.cooldown": "3s", "circuit.max_hold": "30h", "admin.addr": ":9", "ui.addr": ":9", "ui.trusted_proxies": "10.0.0.0/8", "log.level": "debug", "log.format": "json",
		"apps": `{"shop": {"api_key": "k"}}`, "budgets": "app_id=1000/day@0.5", "policy": `{"internal": {"attempts": 4}}`,
	}[k.Path]; {
	case special != "":
		return special
	case k.Type == "true/false":
		return "true"
	case k.Type == "whole number":
		return "4"
	case k.Type == "duration":
		return "90s"
	case k.Type == "size":
		return "3MiB"
	default:
		return "some-text"
	}
}

func TestEveryKeyCanBeSetByItsVariablesAndByFlag(t *testing.T) {
	for _, k := range Keys() {
		if strings.Contains(k.Path, "<") {
			continue
		}
		set := func(name string) Source { return Source{Environ: []string{name + "=" + sample(k)}} }
		sources := []Source{{Overrides: map[string]string{k.Path: sample(k)}}}
		for _, name := range k.Env {
			sources = append(sources, set(name))
		}
		for _, src := range sources {
			c, warnings, err := Load(src)
			if err != nil { // some keys only come together: the key itself must be fine
				var bad *Error
				if !errors.As(err, &bad) || len(bad.Problems) != 1 || !strings.Contains(err.Error(), "without") {
					t.Errorf("%s: %v", k.Path, err)
				}
				continue
			}
			if len(warnings) > 0 || same(c, Defaults()) || c.Source(k.Path) == "" {
				t.Errorf("%s by %v changes nothing (%v)", k.Path, src, warnings)
			}
		}
	}
}

func TestKeysHaveVariablesOfTheirOwn(t *testing.T) {
	seen := map[string]string{}
	var paths []string
	for _, k := range Keys() {
		paths = append(paths, k.Path)
		for _, name := range k.Env {
			if other := seen[name]; other != "" {
				t.Errorf("%s sets %s and %s", name, other, k.Path)
			}
			seen[name] = k.Path
		}
	}
	for name, path := range map[string]string{
		"AVATAR_NATS_TLS_CA": "nats.tls.ca", "NATS_CA": "nats.tls.ca",
		"AVATAR_APPS_<ID>_API_KEY_FILE": "apps.<id>.api_key_file", "SPATIUS_API_KEY_FILE": "app.api_key_file",
		"AVATAR_POLICY_<CODE>_ACTION": "policy.<code>.action",
	} {
		if seen[name] != path {
			t.Errorf("%s sets %q, want %s", name, seen[name], path)
		}
	}
	if slices.Contains(paths, "apps.<id>.id") {
		t.Error("an entry of apps has an id as well as its name")
	}
}

func TestAppsAndPoliciesComeFromTheEnvironment(t *testing.T) {
	c := load(t, Source{
		File: write(t, "apps: {my-shop: {api_key: file, max_sessions: 2}}\npolicy: {internal: {alert: false}}\n"),
		Environ: []string{
			"AVATAR_APPS_MY_SHOP_API_KEY=fresh",
			`AVATAR_APPS={"other": {"api_key_file": "/run/other"}}`,
			"AVATAR_POLICY_UPSTREAMERROR_ATTEMPTS=3",
			"AVATAR_POLICY_INTERNAL_ACTION=dead_letter",
		},
	})
	no := false
	want := Defaults()
	want.Apps["my-shop"] = &App{ID: "my-shop", APIKey: "fresh", MaxSessions: 2}
	want.Apps["other"] = &App{ID: "other", APIKeyFile: "/run/other"}
	want.Policy["upstreamError"] = &Policy{Attempts: 3}
	want.Policy["internal"] = &Policy{Action: "dead_letter", Alert: &no}
	if !same(c, want) {
		t.Errorf("got apps %+v %+v, policy %+v", c.Apps["my-shop"], c.Apps["other"], c.Policy)
	}
}

func TestVariableOfTwoAppsIsRefused(t *testing.T) {
	_, _, err := Load(Source{
		File:    write(t, "apps: {a-b: {api_key: x}, a.b: {api_key: y}}\n"),
		Environ: []string{"AVATAR_APPS_A_B_API_KEY=z"},
	})
	if err == nil || !strings.Contains(err.Error(), "AVATAR_APPS_A_B_API_KEY: stands for apps.a-b.api_key and apps.a.b.api_key") {
		t.Errorf("got %v", err)
	}
}

func TestUnknownVariableIsAWarningThatNamesTheNearestKey(t *testing.T) {
	for name, want := range map[string]string{
		"AVATAR_NATS_PREFIXX":       "AVATAR_NATS_PREFIX (nats.prefix)",
		"AVATAR_WORKER_CONCURENCY":  "AVATAR_WORKER_CONCURRENCY (worker.concurrency)",
		"AVATAR_APPS_SHOP_API_KEY":  "apps that are not in the file come in AVATAR_APPS",
		"AVATAR_RETRY_MAX_ATTEMPTZ": "the nearest is AVATAR_RETRY_MAX_ATTEMPTS (retry.max_attempts)",
	} {
		c, warnings, err := Load(Source{Environ: []string{name + "=5", "OTHER_NATS_PREFIX=x"}})
		if err != nil || !same(c, Defaults()) {
			t.Fatalf("%s: %v", name, err)
		}
		if len(warnings) != 1 || warnings[0].Name != name || !strings.Contains(warnings[0].String(), want) {
			t.Errorf("%s: warnings %v, want one with %s", name, warnings, want)
		}
	}
}

func TestANameThatIsNearNoneGetsNoHint(t *testing.T) {
	for _, name := range []string{"AVATAR_NOPE", "AVATAR_X", "AVATAR_SOMETHING_ELSE_ALTOGETHER"} {
		_, warnings, err := Load(Source{Environ: []string{name + "=5"}})
		if err != nil || len(warnings) != 1 || strings.Contains(warnings[0].String(), "nearest") || !strings.Contains(warnings[0].String(), "docs/configuration.md") {
			t.Errorf("%s: %v, %v", name, warnings, err)
		}
	}
	_, _, err := Load(Source{Overrides: map[string]string{"bogus": "1"}, Environ: []string{`AVATAR_POLICY={"x": {}}`}})
	if err == nil || strings.Contains(err.Error(), "nearest") || !strings.Contains(err.Error(), "bogus: is not a known key: docs/configuration.md") || !strings.Contains(err.Error(), "policy.x: is not an error code: avatarworker errors lists them") {
		t.Error(err)
	}
}

func TestBadEnvironmentAndFlagsAreNamed(t *testing.T) {
	_, _, err := Load(Source{
		Environ: []string{
			"AVATAR_WORKER_CONCURRENCY=x", "AVATAR_WORKER_QUEUES=a,,b", "SPATIUS_REGION=US",
			"AVATAR_LIMITS=label.room", "AVATAR_BUDGETS=label.customer=5/day@x", "AVATAR_APPS={nope", `AVATAR_POLICY={"unknwn": {}}`,
		},
		Overrides: map[string]string{"lease.ack_wait": "500ms", "retry.initail": "1s", "log.level": "loud"},
	})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		`AVATAR_WORKER_CONCURRENCY: worker.concurrency: "x" is not a whole number`,
		`AVATAR_WORKER_QUEUES: worker.queues: "a,,b" has an empty entry`,
		`AVATAR_BUDGETS: budgets: "label.customer=5/day@x" is not a budget: write key=credits/per`,
		`AVATAR_LIMITS: limits: "label.room" is not a session limit: write key:max`,
		`SPATIUS_REGION: backend.region: is "US"`,
		`AVATAR_APPS: apps: is not valid YAML`,
		`AVATAR_POLICY: policy.unknwn: is not an error code: the nearest is unknown`,
		`flag: lease.ack_wait: is 500ms`,
		`flag: retry.initail: is not a known key: the nearest is retry.initial`,
		`flag: log.level: is "loud"`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in\n%v", want, err)
		}
	}
}

func TestStrongerSourceReplacesASecretsOtherForm(t *testing.T) {
	file := write(t, "app: {id: a, api_key: from-file}\n")
	c := load(t, Source{File: file, Environ: []string{"SPATIUS_API_KEY_FILE=/run/key"}})
	if c.App.APIKey != "" || c.App.APIKeyFile != "/run/key" || c.Source("app.api_key") != "" {
		t.Errorf("got %+v", c.App)
	}
	c = load(t, Source{File: file, Environ: []string{"SPATIUS_API_KEY_FILE=/run/key", "AVATAR_APP_API_KEY=ours"}})
	if c.App.APIKey != "ours" || c.App.APIKeyFile != "" {
		t.Errorf("got %+v", c.App)
	}
}

func TestQueuesTakeBothForms(t *testing.T) {
	c := load(t, Source{File: write(t, "worker:\n  queues: [a, {name: b}, {name: c, weight: 3}, 'd:4']\n")})
	want := []Queue{{"a", 1}, {"b", 1}, {"c", 3}, {"d", 4}}
	if !slices.Equal(c.Worker.Queues, want) {
		t.Errorf("got %v", c.Worker.Queues)
	}
}

func TestSessionLimitsTakeBothForms(t *testing.T) {
	want := []SessionLimit{{"label.room", 1}, {"avatar_id", 4}, {"label.a:b.c", 2}}
	for name, src := range map[string]Source{
		"sections":    {File: write(t, "limits: [{key: label.room, max: 1}, {key: avatar_id, max: 4}, {key: 'label.a:b.c', max: 2}]\n")},
		"texts":       {File: write(t, "limits: ['label.room:1', 'avatar_id: 4', 'label.a:b.c:2']\n")},
		"environment": {Environ: []string{"AVATAR_LIMITS=label.room:1, avatar_id:4,label.a:b.c:2"}},
		"flag":        {Overrides: map[string]string{"limits": "label.room:1,avatar_id:4,label.a:b.c:2"}},
	} {
		if c := load(t, src); !slices.Equal(c.Limits, want) {
			t.Errorf("%s: got %v", name, c.Limits)
		}
	}
}

func TestAdminCanBeSwitchedOff(t *testing.T) {
	if c := load(t, Source{Environ: []string{"AVATAR_ADMIN_ADDR=off"}}); c.Admin.Addr != "" {
		t.Errorf("got %q", c.Admin.Addr)
	}
}

func TestPrintHidesSecretsAndCanBeLoadedAgain(t *testing.T) {
	c := load(t, Source{File: write(t, `
nats: {url: "nats://me:hunter2@a:4222,nats://b:4222", token: hunter2}
app: {id: "007", api_key: hunter2, max_sessions: 4}
apps: {shop: {api_key: hunter2}, other: {api_key_file: /run/other}}
worker: {queues: [default, {name: vip, weight: 3}], name: "yes", drain_timeout: 90s}
limits: [{key: label.room, max: 1}, {key: queue, max: 9}]
backend: {fallback_regions: [ap-northeast]}
policy: {internal: {alert: false}, upstreamError: {attempts: 3, action: hold}}
`)})
	var out bytes.Buffer
	if err := c.Print(&out); err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{out.String(), fmt.Sprintf("%v %+v %#v", c.App, c.App, c.App), jsonOf(t, c.App)} {
		if strings.Contains(shown, "hunter2") {
			t.Fatalf("a secret is shown in\n%s", shown)
		}
	}
	again := load(t, Source{File: write(t, out.String())})
	c.NATS.URL, c.NATS.Token, c.App.APIKey, c.Apps["shop"].APIKey = "nats://hidden@a:4222,nats://b:4222", hidden, hidden, hidden
	if !same(c, again) {
		t.Errorf("loaded again it differs:\n%s", out.String())
	}
	for _, l := range leaves(Defaults()) {
		if again.Source(l.path) == "" {
			t.Errorf("%s is not printed", l.path)
		}
	}
}

func jsonOf(t *testing.T, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestDurationsAndSizesPrintAsTheyAreWritten(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 168 * time.Hour: "168h", 5 * time.Minute: "5m", 90 * time.Second: "1m30s",
		time.Hour + time.Second: "1h0m1s", 100 * time.Millisecond: "100ms", 10 * time.Second: "10s", 20 * time.Minute: "20m",
	} {
		if got := formatDuration(d); got != want {
			t.Errorf("%v prints as %s, want %s", d, got, want)
		}
	}
	for text, want := range map[string]Size{"0": 0, "1000": 1000, "64MiB": 64 << 20, "1 GiB": 1 << 30, "2TiB": 2 << 40} {
		got, err := parseSize(text)
		if err != nil || got != want {
			t.Errorf("%s is %d (%v)", text, got, err)
		}
		if back, err := parseSize(got.String()); err != nil || back != want {
			t.Errorf("%s prints as %s", text, got)
		}
	}
	for _, text := range []string{"", "64MB", "1.5GiB", "9999999999TiB", "GiB"} {
		if _, err := parseSize(text); err == nil {
			t.Errorf("%q is taken as a size", text)
		}
	}
}

// Whatever is in the file: no panic, an *Error or a valid configuration, and
// what is valid prints and loads again.
func FuzzLoad(f *testing.F) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range append(files, reference) {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	f.Add("&a [*a]")
	f.Add("worker: &w {queues: [*w]}")
	f.Fuzz(func(t *testing.T, text string) {
		printed, ok := decodeAndPrint(t, text)
		if !ok {
			return
		}
		if again, ok := decodeAndPrint(t, printed); !ok || again != printed {
			t.Fatalf("what was printed loads otherwise (valid: %v):\n%s\n%s", ok, printed, again)
		}
	})
}

// decodeAndPrint is ok where text is a valid configuration.
func decodeAndPrint(t *testing.T, text string) (printed string, ok bool) {
	t.Helper()
	l := &loading{c: Defaults()}
	d := &decoder{source: "f", isFile: true, set: map[string]origin{}}
	d.decode(strings.NewReader(text), reflect.ValueOf(l.c).Elem(), "")
	l.layer(d.set)
	if len(d.problems) > 0 || len(l.problems) > 0 || len(l.c.problems()) > 0 {
		return "", false
	}
	var out bytes.Buffer
	if err := l.c.Print(&out); err != nil {
		t.Fatal(err)
	}
	return out.String(), true
}

// A key that is set alone has to fit the others' defaults.
func TestEachKeyMayBeSetAlone(t *testing.T) {
	for key, value := range map[string]string{
		"circuit.max_hold": "10s", "circuit.cooldown": "10m", "circuit.max_cooldown": "1s", "retry.max": "500ms",
		"retry.initial": "2m", "lease.ack_wait": "1s", "nats.state_ttl": "2h", "log.level": "DEBUG",
	} {
		if _, _, err := Load(Source{Overrides: map[string]string{key: value}}); err != nil {
			t.Errorf("%s=%s: %v", key, value, err)
		}
	}
}
