//go:build deploytools

package deploy_test

import (
	"bytes"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v4"

	"avatarworker/internal/errors"
)

// HELM names the helm to render with; .ci/run builds the pinned one.
func render(t *testing.T, args ...string) (manifests, error) {
	t.Helper()
	helm := os.Getenv("HELM")
	if helm == "" {
		helm = "helm"
	}
	cmd := exec.Command(helm, append([]string{"template", "w", "helm/avatarworker", "--namespace", "avatars"}, args...)...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatalf("helm can't be run (HELM=%q): %v", helm, err)
		}
		return nil, errors.New(errOut.String())
	}
	return parseManifests(t, &out), nil
}

// manifests are the rendered objects by kind; ConfigMaps and Secrets by name.
type manifests map[string]map[string]any

func parseManifests(t *testing.T, r io.Reader) manifests {
	t.Helper()
	all := manifests{}
	decoder := yaml.NewDecoder(r)
	for {
		var object map[string]any
		if err := decoder.Decode(&object); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		if object == nil {
			continue
		}
		kind, _ := object["kind"].(string)
		name := field[string](t, object, "metadata", "name")
		switch {
		case kind == "ConfigMap" || kind == "Secret":
			kind += " " + name
		case strings.HasSuffix(name, "-ui"):
			kind += " ui"
		}
		if all[kind] != nil {
			t.Fatalf("two objects of kind %s", kind)
		}
		all[kind] = object
	}
}

func mustRender(t *testing.T, args ...string) manifests {
	t.Helper()
	m, err := render(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// field walks into an object; a list is walked into by its first element.
func field[T any](t *testing.T, object any, path ...string) T {
	t.Helper()
	at := object
	for _, key := range path {
		if list, ok := at.([]any); ok && len(list) > 0 {
			at = list[0]
		}
		m, ok := at.(map[string]any)
		if !ok || m[key] == nil {
			t.Fatalf("%s: nothing at %s", strings.Join(path, "."), key)
		}
		at = m[key]
	}
	v, ok := at.(T)
	if !ok {
		t.Fatalf("%s is %T: %v", strings.Join(path, "."), at, at)
	}
	return v
}

func TestChartByDefaultIsADeploymentAndWhatItNeeds(t *testing.T) {
	m := mustRender(t)
	want := []string{"ConfigMap w-avatarworker", "Deployment", "PodDisruptionBudget", "Service", "ServiceAccount"}
	if got := slices.Sorted(maps.Keys(m)); !slices.Equal(got, want) {
		t.Errorf("kinds %v, want %v", got, want)
	}
	pod := field[map[string]any](t, m["Deployment"], "spec", "template", "spec")
	if !field[bool](t, pod, "securityContext", "runAsNonRoot") ||
		!field[bool](t, pod, "containers", "securityContext", "readOnlyRootFilesystem") ||
		field[bool](t, pod, "containers", "securityContext", "allowPrivilegeEscalation") {
		t.Error("the pod may do more than it needs")
	}
	for probe, path := range map[string]string{"livenessProbe": "/livez", "startupProbe": "/livez", "readinessProbe": "/readyz"} {
		if got := field[string](t, pod, "containers", probe, "httpGet", "path"); got != path {
			t.Errorf("%s asks %s, want %s", probe, got, path)
		}
	}
}

func TestGracePeriodFollowsTheDrainTimeout(t *testing.T) {
	for drain, want := range map[string]time.Duration{
		"0": 0, "45s": 45 * time.Second, "5m": 5 * time.Minute, "1h": time.Hour,
		"1h10m5s": time.Hour + 10*time.Minute + 5*time.Second, "90m": 90 * time.Minute,
	} {
		m := mustRender(t, "--set-string", "config.worker.drain_timeout="+drain)
		grace := field[int](t, m["Deployment"], "spec", "template", "spec", "terminationGracePeriodSeconds")
		if got := time.Duration(grace) * time.Second; got != want+30*time.Second {
			t.Errorf("drain timeout %s: grace period %s, want %s and 30 s", drain, got, want)
		}
	}
}

func TestConfigMapIsAConfigTheWorkerTakes(t *testing.T) {
	m := mustRender(t, "--values", "helm/avatarworker/ci/full.yaml")
	c := loadConfig(t, "full.yaml", field[string](t, m["ConfigMap w-avatarworker"], "data", "config.yaml"))
	if c.Worker.Concurrency != 32 || c.NATS.Prefix != "shop" || len(c.Worker.Queues) != 2 {
		t.Errorf("loaded %+v", c.Worker)
	}
}

func TestKeyComesAsAFileAndNowhereElse(t *testing.T) {
	m := mustRender(t, "--set", "app.apiKey.value=tell-nobody")
	if got := field[string](t, m["Secret w-avatarworker"], "stringData", "api-key"); got != "tell-nobody" {
		t.Errorf("the secret has %q", got)
	}
	delete(m, "Secret w-avatarworker")
	text, err := yaml.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "tell-nobody") {
		t.Error("the key is outside its secret")
	}
	if env := env(t, m); env["SPATIUS_API_KEY_FILE"] != "/etc/avatarworker/secrets/app/api-key" {
		t.Errorf("environment %v", env)
	}
	m = mustRender(t, "--values", "helm/avatarworker/ci/full.yaml")
	if m["Secret w-avatarworker"] != nil {
		t.Error("a secret of the chart's own beside the given one")
	}
	if env := env(t, m); env["SPATIUS_API_KEY_FILE"] != "/etc/avatarworker/secrets/app/token" || env["NATS_CREDS"] == "" || env["NATS_CERT"] == "" {
		t.Errorf("environment %v", env)
	}
}

func TestURLsWithSecretsAreKeptOutOfTheConfigMap(t *testing.T) {
	for variable, row := range map[string]struct{ key, url string }{
		"AVATAR_NATS_URL":              {"config.nats.url", "nats://me:tell-nobody@nats:4222"},
		"AVATAR_BACKEND_INGRESS_URL":   {"config.backend.ingress_url", "wss://h/v2/driveningress?token=tell-nobody"},
		"AVATAR_BACKEND_CONSOLE_URL":   {"config.backend.console_url", "https://me:tell-nobody@h/v1/console"},
		"AVATAR_BACKEND_BOOTSTRAP_URL": {"config.backend.bootstrap_url", "https://h/bootstrap?key=tell-nobody"},
	} {
		for _, more := range []string{"", ",app.apiKey.value=k"} {
			m := mustRender(t, "--set", row.key+"="+row.url+more)
			if got := field[string](t, m["Secret w-avatarworker-urls"], "stringData", variable); got != row.url {
				t.Errorf("%s: the secret has %q", row.key, got)
			}
			delete(m, "Secret w-avatarworker-urls")
			text, err := yaml.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(text), "tell-nobody") {
				t.Errorf("%s is outside its secret", row.key)
			}
			if !strings.Contains(string(text), "name: "+variable) {
				t.Errorf("the pod does not get %s", variable)
			}
		}
	}
	if m := mustRender(t); m["Secret w-avatarworker-urls"] != nil {
		t.Error("a secret for a URL without one")
	}
}

func TestTheServicesNamesMayAskTheAdminPort(t *testing.T) {
	hosts := strings.Split(env(t, mustRender(t, "--set", "config.admin.hosts={metrics.example}"))["AVATAR_ADMIN_HOSTS"], ",")
	for _, want := range []string{"w-avatarworker", "w-avatarworker.avatars.svc", "w-avatarworker.avatars.svc.cluster.local", "metrics.example"} {
		if !slices.Contains(hosts, want) {
			t.Errorf("%s is not among %v", want, hosts)
		}
	}
}

// The page is a Deployment of its own, which no worker's Service, Deployment or
// disruption budget takes for a worker.
func TestThePageIsADeploymentOfItsOwn(t *testing.T) {
	m := mustRender(t, "--set", "ui.enabled=true,ui.write=true,ui.auth.tokenSecret=page,ui.hosts={avatars.example},networkPolicy.enabled=true,ui.nats.user=operator,ui.nats.inboxPrefix=_INBOX_operator,ui.nats.passwordSecret=op,nats.credsSecret=w")
	want := []string{"ConfigMap w-avatarworker", "Deployment", "Deployment ui", "NetworkPolicy", "NetworkPolicy ui", "PodDisruptionBudget", "Service", "Service ui", "ServiceAccount"}
	if got := slices.Sorted(maps.Keys(m)); !slices.Equal(got, want) {
		t.Errorf("kinds %v, want %v", got, want)
	}
	labels := field[map[string]any](t, m["Deployment ui"], "spec", "template", "metadata", "labels")
	selects := func(selector map[string]any) bool {
		for key, value := range selector {
			if labels[key] != value {
				return false
			}
		}
		return true
	}
	for kind, path := range map[string][]string{
		"Service": {"spec", "selector"}, "Deployment": {"spec", "selector", "matchLabels"}, "PodDisruptionBudget": {"spec", "selector", "matchLabels"}, "NetworkPolicy": {"spec", "podSelector", "matchLabels"},
	} {
		if selects(field[map[string]any](t, m[kind], path...)) {
			t.Errorf("the %s of the workers takes the page for a worker", kind)
		}
		if own := m[kind+" ui"]; own != nil && !selects(field[map[string]any](t, own, path...)) {
			t.Errorf("the %s of the page does not find it", kind)
		}
	}
	pod := field[map[string]any](t, m["Deployment ui"], "spec", "template", "spec")
	if !field[bool](t, pod, "securityContext", "runAsNonRoot") || !field[bool](t, pod, "containers", "securityContext", "readOnlyRootFilesystem") {
		t.Error("the pod may do more than it needs")
	}
	if got := field[[]any](t, pod, "containers", "args")[0]; got != "ui" {
		t.Errorf("it runs %v", got)
	}
	vars := envOf(t, m["Deployment ui"])
	for name, want := range map[string]string{
		"AVATAR_UI_ADDR": ":8090", "AVATAR_UI_WRITE": "true", "AVATAR_UI_AUTH_TOKEN_FILE": "/etc/avatarworker/ui/token/token", "AVATAR_NATS_USER": "operator", "AVATAR_NATS_INBOX_PREFIX": "_INBOX_operator",
		"AVATAR_NATS_PASSWORD_FILE": "/etc/avatarworker/secrets/nats-password/password", "NATS_CREDS": "", "SPATIUS_API_KEY_FILE": "",
	} {
		if vars[name] != want {
			t.Errorf("%s is %q, want %q", name, vars[name], want)
		}
	}
	if hosts := strings.Split(vars["AVATAR_UI_HOSTS"], ","); !slices.Contains(hosts, "avatars.example") || !slices.Contains(hosts, "w-avatarworker-ui.avatars.svc") {
		t.Errorf("hosts %v", hosts)
	}
	// Without a user of its own it has the workers'.
	if vars := envOf(t, mustRender(t, "--set", "ui.enabled=true,ui.auth.user=u,ui.auth.passwordSecret=page,nats.credsSecret=w")["Deployment ui"]); vars["NATS_CREDS"] != "/etc/avatarworker/secrets/nats/nats.creds" || vars["AVATAR_UI_AUTH_USER"] != "u" || vars["AVATAR_UI_WRITE"] != "false" {
		t.Errorf("%v", vars)
	}
	if _, err := render(t, "--set", "ui.enabled=true"); err == nil || !strings.Contains(err.Error(), "nothing says who may see the page") {
		t.Errorf("a page for everybody: %v", err)
	}
}

func env(t *testing.T, m manifests) map[string]string {
	t.Helper()
	return envOf(t, m["Deployment"])
}

// envOf are the variables of a Deployment's container.
func envOf(t *testing.T, deployment any) map[string]string {
	t.Helper()
	vars := map[string]string{}
	for _, v := range field[[]any](t, deployment, "spec", "template", "spec", "containers", "env") {
		entry := v.(map[string]any)
		value, _ := entry["value"].(string)
		vars[entry["name"].(string)] = value
	}
	return vars
}

func TestScalingCountsTheFleetOnce(t *testing.T) {
	m := mustRender(t, "--values", "helm/avatarworker/ci/full.yaml")
	query := field[string](t, m["ScaledObject"], "spec", "triggers", "metadata", "query")
	want := `sum(max by (queue) (avatar_worker_jobs_runnable{queue=~"default|vip",namespace="avatars"}))`
	if query != want {
		t.Errorf("query %s, want %s", query, want)
	}
	checkQuery(t, exportedMetrics(t), "ScaledObject", query)
	if _, has := m["Deployment"]["spec"].(map[string]any)["replicas"]; has {
		t.Error("the deployment sets replicas that KEDA sets too")
	}
}

func TestScalingFromNoneAsksTheStream(t *testing.T) {
	m := mustRender(t, "--values", "helm/avatarworker/ci/from-none.yaml")
	triggers := field[[]any](t, m["ScaledObject"], "spec", "triggers")
	var consumers []string
	for _, trigger := range triggers {
		if stream := field[string](t, trigger, "metadata", "stream"); stream != "AVATAR_JOBS" {
			t.Errorf("stream %s", stream)
		}
		consumers = append(consumers, field[string](t, trigger, "metadata", "consumer"))
	}
	if !slices.Equal(consumers, []string{"default", "vip"}) {
		t.Errorf("consumers %v", consumers)
	}
}

func TestChartCarriesTheRulesWithTheirRunbooks(t *testing.T) {
	m := mustRender(t, "--values", "helm/avatarworker/ci/full.yaml")
	got := field[[]any](t, m["PrometheusRule"], "spec", "groups", "rules")
	if len(got) != len(rules(t)) {
		t.Errorf("%d rules, want %d", len(got), len(rules(t)))
	}
	url := field[string](t, got, "annotations", "runbook_url")
	if !strings.HasPrefix(url, "https://example.com/runbooks/AvatarWorker") {
		t.Errorf("runbook_url %s", url)
	}
	board := field[string](t, m["ConfigMap w-avatarworker-dashboard"], "data", "avatarworker.json")
	if strings.TrimSpace(board) != strings.TrimSpace(read(t, "grafana/avatarworker.json")) {
		t.Error("the dashboard was changed on its way")
	}
}

func TestSchemaRefusesWhatCannotWork(t *testing.T) {
	for name, args := range map[string][]string{
		"misspelled":                       {"--set", "replica=3"},
		"misspelled inside":                {"--set", "autoscaling.enable=true"},
		"from none by the worker's metric": {"--set", "autoscaling.enabled=true,autoscaling.minReplicas=0"},
		"a key in the ConfigMap":           {"--set", "config.app.api_key=k"},
		"an app's key in the ConfigMap":    {"--set", "config.apps.shop.api_key=k"},
		"drain in milliseconds":            {"--set", "config.worker.drain_timeout=100ms"},
		"drain without a unit":             {"--set-string", "config.worker.drain_timeout=300"},
		"a limit of nothing known":         {"--set", "config.limits[0].key=room,config.limits[0].max=1"},
		"a limit without a maximum":        {"--set", "config.limits[0].key=label.room"},
		"no margin":                        {"--set", "terminationMargin=0"},
		"a page's password without a user": {"--set", "ui.enabled=true,ui.auth.passwordSecret=p"},
		"a header trusted from nowhere":    {"--set", "ui.enabled=true,ui.auth.trustedHeader=X-User"},
		"runbooks without a slash":         {"--set", "prometheusRule.runbookBaseURL=https://example.com"},
	} {
		if _, err := render(t, args...); err == nil || !strings.Contains(err.Error(), "schema") {
			t.Errorf("%s: %v, want a refusal by the schema", name, err)
		}
	}
}
