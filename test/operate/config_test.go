package operate_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"avatarworker/internal/config"
)

func TestCheckConfigShowsEveryProblemAndHidesEverySecret(t *testing.T) {
	t.Parallel()
	file := write(t, "config.yaml", "nats:\n  prefx: a\nretry:\n  max_attempts: lots\n")
	call(t, nil, 78, []string{file + ":2: nats.prefx", file + ":4: retry.max_attempts"}, "-c", file, "check-config")
	call(t, nil, 78, []string{"no-such.yaml", "no such file"}, "-c", "no-such.yaml", "check-config")
	call(t, nil, 0, []string{"app.id"}, "check-config")
	env := []string{"SPATIUS_APP_ID=app", "SPATIUS_API_KEY=hush-1", "AVATAR_NATS_USER=u", "AVATAR_NATS_PASSWORD=hush-2", "AVATAR_RETRY_MAX_ATTEMPT=3"}
	out, logs := call(t, env, 0, []string{"AVATAR_RETRY_MAX_ATTEMPT", "AVATAR_RETRY_MAX_ATTEMPTS"}, "check-config", "--log-level", "debug")
	if strings.Contains(out+logs, "hush") {
		t.Errorf("a secret is shown:\n%s%s", out, logs)
	}
	again := write(t, "again.yaml", strings.ReplaceAll(out, "[hidden]", "x"))
	if once, _ := call(t, nil, 0, nil, "check-config", "-c", again); once != out {
		t.Errorf("what check-config prints is not what a worker reads:\n%s", once)
	}
}

// Each key's variable is known, and takes the default as it is documented.
func TestEveryKeyIsTakenFromTheEnvironment(t *testing.T) {
	t.Parallel()
	env := []string{"SPATIUS_APP_ID=app", "SPATIUS_API_KEY=hush"}
	plain, _ := call(t, env, 0, nil, "check-config")
	for _, k := range config.Keys() {
		if k.Default != "" && k.Path != "app.id" && k.Path != "app.api_key" && !strings.Contains(k.Path, "<") {
			env = append(env, k.Env[0]+"="+k.Default)
		}
	}
	if len(env) < 40 {
		t.Fatalf("only %d variables", len(env))
	}
	out, logs := call(t, env, 0, nil, "check-config")
	if out != plain || strings.Contains(logs, "sets nothing") {
		t.Errorf("with every default in the environment:\n%s%s", logs, out)
	}
}

// The config file that lies in the directory is read without being named.
func TestConfigFileOfTheDirectoryIsRead(t *testing.T) {
	t.Parallel()
	p := spawn(t, nil, "errors", "--json")
	p.wait()
	dir := p.cmd.Dir
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte("nonsense: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	q := spawnIn(t, dir, nil, "errors")
	if code := q.wait(); code != 78 || !strings.Contains(q.stderr.String(), "config.yaml:1: nonsense") {
		t.Errorf("exit %d: %s", code, q.stderr)
	}
}
