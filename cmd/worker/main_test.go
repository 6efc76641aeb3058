package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) { natstest.Main(m) }

var names = topology.Names{}

// screen is an output that may be read while a command writes it.
type screen struct {
	mu     sync.Mutex
	buffer bytes.Buffer
	grown  chan struct{} // closed and replaced with each write
}

func newScreen() *screen { return &screen{grown: make(chan struct{})} }

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.grown)
	s.grown = make(chan struct{})
	return s.buffer.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buffer.String()
}

// await returns when the output contains the text.
func (s *screen) await(t *testing.T, text string) {
	t.Helper()
	timeout := time.After(natstest.Patience)
	for {
		s.mu.Lock()
		found, grown := strings.Contains(s.buffer.String(), text), s.grown
		s.mu.Unlock()
		if found {
			return
		}
		select {
		case <-grown:
		case <-timeout:
			t.Fatalf("no %q within 20 s, only:\n%s", text, s)
		}
	}
}

// command is a run of the program in the background.
type command struct {
	t           *testing.T
	out, stderr *screen
	interrupt   context.CancelFunc
	code        chan int
}

func start(t *testing.T, stdin string, args ...string) *command {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	c := &command{t: t, out: newScreen(), stderr: newScreen(), interrupt: cancel, code: make(chan int, 1)}
	go func() { c.code <- runContext(ctx, args, strings.NewReader(stdin), c.out, c.stderr) }()
	return c
}

func (c *command) wait() int {
	c.t.Helper()
	defer c.interrupt()
	select {
	case code := <-c.code:
		return code
	case <-time.After(natstest.Patience):
		c.t.Fatalf("still running after 60 s; stdout:\n%s\nstderr:\n%s", c.out, c.stderr)
		return -1
	}
}

// call runs the program to its end.
func call(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	c := start(t, "", args...)
	code = c.wait()
	return code, c.out.String(), c.stderr.String()
}

// expect runs the program and wants this exit code and, in what it wrote, these
// texts.
func expect(t *testing.T, want int, texts []string, args ...string) (stdout string) {
	t.Helper()
	code, stdout, stderr := call(t, args...)
	if code != want {
		t.Fatalf("avatarworker %s: exit %d, want %d\nstdout:\n%s\nstderr:\n%s", strings.Join(args, " "), code, want, stdout, stderr)
	}
	for _, text := range texts {
		if !strings.Contains(stdout+stderr, text) {
			t.Errorf("avatarworker %s: no %q in\n%s%s", strings.Join(args, " "), text, stdout, stderr)
		}
	}
	return stdout
}

// bench is a NATS server with all that a worker makes.
type bench struct {
	t   *testing.T
	url string
	nc  *nats.Conn
	js  jetstream.JetStream
	h   topology.Handles
}

func newBench(t *testing.T) *bench {
	t.Helper()
	s := natstest.Start(t)
	nc := natstest.Connect(t, s)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	settings := topology.DefaultSettings()
	settings.Queues = []string{"default"}
	h, _, err := topology.Ensure(t.Context(), js, names, settings)
	if err != nil {
		t.Fatal(err)
	}
	return &bench{t: t, url: s.ClientURL(), nc: nc, js: js, h: h}
}

func (b *bench) args(args ...string) []string { return append(args, "--nats-url", b.url) }

func (b *bench) record(r lifecycle.Record) {
	b.t.Helper()
	data, err := json.Marshal(r)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.h.State.Put(b.t.Context(), r.JobID, data); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) event(id string, body event.Body) {
	b.t.Helper()
	msg, err := event.Event{ID: id, Time: time.Now(), Body: body}.Message(names, event.Source("host"))
	if err != nil {
		b.t.Fatal(err)
	}
	b.publish(msg)
}

func (b *bench) publish(msg *nats.Msg) {
	b.t.Helper()
	if _, err := b.js.PublishMsg(b.t.Context(), msg); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) jobsStored() uint64 {
	b.t.Helper()
	info, err := b.h.Jobs.Info(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return info.State.Msgs
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("not the JSON that was wanted: %v\n%s", err, text)
	}
	return v
}

func writeFile(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestExitCodesDistinguishUsageConfigurationAndFailure(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		code int
		text string
		args []string
	}{
		{0, "Usage:", nil},
		{0, "Usage:", []string{"dlq"}},
		{2, "unknown command", []string{"nonsense"}},
		{2, "unknown command", []string{"dlq", "nonsense"}},
		{2, "unknown flag", []string{"errors", "--nonsense"}},
		{2, "which ones", []string{"cancel"}},
		{2, "is not a job id", []string{"cancel", "a.b"}},
		{2, "want key=value", []string{"--set", "retry.max_attempts", "errors"}},
		{2, "Give SEQs", []string{"dlq", "replay"}},
		{2, "not both", []string{"dlq", "rm", "3", "--all"}},
		{2, `"x" is not a SEQ`, []string{"dlq", "show", "x"}},
		{2, "--before", []string{"dlq", "ls", "--before", "yesterday"}},
		{2, "--pace", []string{"submit", "--pace", "slow"}},
		{2, "--output", []string{"submit", "--avatar", "a", "--audio-url", "http://h/a.wav", "--output", "disk"}},
		{2, "needs --output object", []string{"submit", "--avatar", "a", "--audio-url", "http://h/a.wav", "--output", "frames", "--output-name", "r"}},
		{2, "needs --output object", []string{"submit", "--avatar", "a", "--audio-url", "http://h/a.wav", "--output-name", "r"}},
		{2, "need --output livekit or agora", []string{"submit", "--avatar", "a", "--audio-url", "http://h/a.wav", "--output", "discard", "--egress-room", "r"}},
		{2, "--timeout needs --wait", []string{"submit", "--avatar", "a", "--audio-url", "http://h/a.wav", "--timeout", "1m"}},
		{2, "--max-silence needs --live", []string{"submit", "--avatar", "a", "--audio-url", "http://h/a.wav", "--max-silence", "5s"}},
		{2, "--live -", []string{"submit", "--avatar", "a", "--audio", "-"}},
		{2, "--label", []string{"submit", "--avatar", "a", "--label", "x"}},
		{2, "--deadline", []string{"submit", "--avatar", "a", "--deadline", "soon"}},
		{2, "--speed", []string{"simulator", "--speed", "-1"}},
		{78, "can't be read", []string{"-c", "no-such-file.yaml", "errors"}},
		{78, "retry.max_attempts", []string{"--set", "retry.max_attempts=many", "errors"}},
		{78, "nats.prefix", []string{"--set", "nats.prefix=a.b", "status"}},
		{78, "retry.max_attempts", []string{"--set", "retry.max_attempts=many", "--prefix", "a.b", "errors"}},
		{78, "worker.concurrency", []string{"run", "--concurrency", "4", "--set", "worker.concurrency=abc"}},
		{2, "--prefix: nats.prefix", []string{"--prefix", "a.b", "status"}},
		{2, "--concurrency: worker.concurrency", []string{"run", "--concurrency", "abc"}},
		{2, "--concurrency: worker.concurrency", []string{"run", "--concurrency", "0"}},
		{2, "--queues: worker.queues", []string{"run", "--queues", "default,default"}},
		{2, "--admin-addr: admin.addr", []string{"run", "--admin-addr", "nowhere"}},
		{2, "--log-level: log.level", []string{"--log-level", "loud", "errors"}},
		{2, "--limit -1", []string{"dlq", "ls", "--limit", "-1"}},
		{2, "--limit -1", []string{"dlq", "rm", "--all", "-y", "--limit", "-1"}},
		{2, "--limit -1", []string{"dlq", "replay", "--all", "--limit", "-1"}},
		{2, "Give SEQs", []string{"dlq", "rm", "--limit", "0"}},
		{2, "add -y", []string{"dlq", "rm", "--all"}},
		{1, "connecting to NATS", []string{"--nats-url", "nats://127.0.0.1:1", "status"}},
		{1, "no such file", []string{"errors", "classify", "no-such-file"}},
		{1, "not a valid job", []string{"submit", "--avatar", "a", "--audio-url", "ftp://h/a.wav"}},
		{1, "carries a user name", []string{"submit", "--avatar", "a", "--audio-url", "http://u:p@h/a.wav"}},
		{1, "the URL's port", []string{"submit", "--avatar", "a", "--audio-url", "http://h:70000/a.wav"}},
		{1, "the backend takes", []string{"submit", "--avatar", "a", "--audio-url", "http://h/a.pcm", "--format", "pcm_s16le", "--sample-rate", "12345"}},
		{2, `--class "transiend": want one of transient, server, protocol, unknown, auth, config, billing, job, internal; did you mean transient?`, []string{"dlq", "ls", "--class", "transiend"}},
		{2, "want one of transient", []string{"dlq", "rm", "--class", "bogus", "-y"}},
		{2, "did you mean running?", []string{"jobs", "ls", "--state", "runnin"}},
		{2, "want one of age, running, cost", []string{"jobs", "ls", "--sort", "name"}},
		{1, "warning: --code idleTimeot is not known here; did you mean idleTimeout?", []string{"--nats-url", "nats://127.0.0.1:1", "events", "--code", "idleTimeot"}},
		{1, "warning: --code bogus is not known here;", []string{"--nats-url", "nats://127.0.0.1:1", "dlq", "ls", "--code", "bogus"}},
		{2, "give --avatar", []string{"submit"}},
		{2, "no speech", []string{"submit", "--avatar", "a"}},
		{2, "no avatar: give --avatar ID", []string{"submit", "--audio-url", "http://h/a.wav"}},
		{2, "--addr nonsense: want HOST:PORT, such as 127.0.0.1:9090", []string{"simulator", "--addr", "nonsense"}},
		{2, "--addr 127.0.0.1:99999: want HOST:PORT", []string{"simulator", "--addr", "127.0.0.1:99999"}},
		{2, "--addr 192.0.2.1:9090: this machine has no such address", []string{"simulator", "--addr", "192.0.2.1:9090"}},
		{2, "not both", []string{"submit", "a.json", "-f", "b.json"}},
		{2, `unexpected argument "b.json"`, []string{"submit", "a.json", "b.json"}},
		{2, "unknown command", []string{"completion", "tcsh"}},
		{2, "unknown command", []string{"help", "nonsense"}},
		{0, "Usage:", []string{"help", "dlq", "ls"}},
	} {
		t.Run(strings.Join(tc.args, " "), func(t *testing.T) {
			code, stdout, stderr := call(t, tc.args...)
			if code != tc.code || !strings.Contains(stdout+stderr, tc.text) {
				t.Errorf("exit %d, want %d with %q; got\n%s%s", code, tc.code, tc.text, stdout, stderr)
			}
			if code != 0 && stdout != "" {
				t.Errorf("a failure wrote to stdout: %s", stdout)
			}
		})
	}
}

func TestCheckConfigPrintsTheWholeAndHidesSecrets(t *testing.T) {
	t.Setenv("SPATIUS_API_KEY", "hush-hush")
	stdout := expect(t, 0, []string{"max_attempts: 7", "[hidden]"}, "check-config", "--set", "app.id=mine", "--set", "retry.max_attempts=7")
	if strings.Contains(stdout, "hush") {
		t.Errorf("the key is shown:\n%s", stdout)
	}
	t.Setenv("SPATIUS_API_KEY", "")
	expect(t, 0, []string{"app.id", "max_attempts: 5"}, "check-config")
}

func TestALoginToNATSThatCannotBeReadIsABadConfiguration(t *testing.T) {
	junk := writeFile(t, "junk", []byte("no key in it"))
	for _, tc := range []struct {
		environ map[string]string
		text    string
	}{
		{map[string]string{"NATS_CREDS": "/no/such/creds"}, "nats.creds (NATS_CREDS): there is no file /no/such/creds"},
		{map[string]string{"NATS_CREDS": junk}, "nats.creds " + junk},
		{map[string]string{"NATS_NKEY": "/no/such/seed"}, "nats.nkey (NATS_NKEY): there is no file /no/such/seed"},
		{map[string]string{"NATS_CA": "/no/such/ca"}, "nats.tls.ca (NATS_CA): there is no file /no/such/ca"},
		{map[string]string{"NATS_CERT": junk, "NATS_KEY": junk}, "nats.tls.cert " + junk},
		{map[string]string{"NATS_CONTEXT": "unknown-context"}, "nats.context unknown-context"},
	} {
		t.Run(tc.text, func(t *testing.T) {
			for name, value := range tc.environ {
				t.Setenv(name, value)
			}
			for _, command := range []string{"check-config", "run", "status"} {
				expect(t, exitConfig, []string{tc.text}, command, "--set", "app.id=a", "--set", "app.api_key=k", "--set", "admin.addr=off")
			}
		})
	}
}

func TestCheckConfigRefusesSecretsThatRunWouldAllAtOnce(t *testing.T) {
	t.Parallel()
	empty := writeFile(t, "empty", []byte(" \n"))
	file := writeFile(t, "config.yaml", []byte(`app:
  api_key_file: `+empty+`
apps:
  other:
    api_key_file: /no/such/file
nats:
  user: me
  password_file: /no/such/password
retry:
  max_attempts: 0
`))
	want := []string{
		"5 problems", file + ":2: app.id: is not set, though app.api_key is", file + ":2: app.api_key_file: " + empty + " is empty",
		file + ":5: apps.other.api_key_file: /no/such/file can't be read", file + ":8: nats.password_file: ", file + ":10: retry.max_attempts",
	}
	for _, command := range []string{"check-config", "run"} {
		expect(t, 78, want, command, "-c", file)
	}
	for _, missing := range [][]string{nil, {"--set", "app.id=mine"}} {
		expect(t, 0, []string{"valid so far", "app."}, append([]string{"check-config"}, missing...)...)
	}
	expect(t, 78, []string{"app.id: is not set, though app.api_key is"}, "check-config", "--set", "app.api_key=k")
	expect(t, 78, []string{"app.api_key: holds only spaces"}, "check-config", "--set", "app.id=mine", "--set", "app.api_key=  ")
}

func TestUnknownVariableIsWarnedAboutOnce(t *testing.T) {
	t.Setenv("AVATAR_RETRY_MAX_ATTEMPT", "3")
	_, _, stderr := call(t, "errors")
	if n := strings.Count(stderr, "AVATAR_RETRY_MAX_ATTEMPT\""); n != 1 {
		t.Errorf("%d warnings, want 1:\n%s", n, stderr)
	}
}

func TestAWrongCommandLineIsAnsweredWithARightOne(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		text, help string
		args       []string
	}{
		{`unknown command "stauts" for "avatarworker"; did you mean status?`, "avatarworker", []string{"stauts"}},
		{`unknown command "lst" for "avatarworker dlq"; did you mean ls?`, "avatarworker dlq", []string{"dlq", "lst"}},
		{"did you mean classify?", "avatarworker errors", []string{"errors", "clasify"}},
		{"did you mean status?", "avatarworker help", []string{"help", "Status"}},
		{"unknown flag: --avatr; did you mean --avatar?", "avatarworker submit", []string{"submit", "--avatr", "a"}},
		{"did you mean --avatar?", "avatarworker submit", []string{"submit", "--avatar_id", "a"}},
		{"did you mean --sample-rate?", "avatarworker submit", []string{"submit", "--sample_rate=16000"}},
		{"did you mean --nats-url?", "avatarworker dlq ls", []string{"dlq", "ls", "--nat-url", "x"}},
		{"did you mean --avatar?", "avatarworker submit", []string{"submit", "-avatar", "a"}},
		{`unexpected argument "now": write 'avatarworker run'`, "avatarworker run", []string{"run", "now"}},
		{"no FILE given: write 'avatarworker cost check FILE'", "avatarworker cost check", []string{"cost", "check"}},
		{"no JOB given: write 'avatarworker jobs show JOB'", "avatarworker jobs show", []string{"jobs", "show"}},
		{"no NAME given: write 'avatarworker recording get NAME'", "avatarworker recording get", []string{"recording", "get"}},
		{"no APP given: write 'avatarworker circuit close APP [REGION]'", "avatarworker circuit close", []string{"circuit", "close"}},
		{`unexpected argument "c": write 'avatarworker circuit close APP [REGION]'`, "avatarworker circuit close", []string{"circuit", "close", "a", "b", "c"}},
		{"no WORKER given: write 'avatarworker drain WORKER…'", "avatarworker drain", []string{"drain"}},
		{"no NAME given: write 'avatarworker queue pause NAME…'", "avatarworker queue pause", []string{"queue", "pause"}},
		{`unexpected argument "b": write 'avatarworker status [JOB]'`, "avatarworker status", []string{"status", "a", "b"}},
		{`--limit "99999999999999999999": the number is out of range`, "avatarworker jobs ls", []string{"jobs", "ls", "--limit", "99999999999999999999"}},
		{`--limit "few": want a whole number`, "avatarworker jobs ls", []string{"jobs", "ls", "--limit", "few"}},
		{`--for "long": want a duration such as 90s, 15m or 24h`, "avatarworker queue pause", []string{"queue", "pause", "q", "--for", "long"}},
		{`--json "maybe": want true or false`, "avatarworker status", []string{"status", "--json=maybe"}},
		{`--set "x": want key=value`, "avatarworker status", []string{"status", "--set", "x"}},
		{`--since "2026-13-01": want a day such as 2026-03-01 (UTC), a time`, "avatarworker cost", []string{"cost", "--since", "2026-13-01"}},
		{`--newer "soon": want a day such as 2026-03-01 (UTC), a time`, "avatarworker jobs ls", []string{"jobs", "ls", "--newer", "soon"}},
		{"is not a job id", "avatarworker status", []string{"status", "a.b"}},
		{`--set nats.url: there is no field "nats" (it has app_id,`, "avatarworker dlq replay", []string{"dlq", "replay", "1", "--set", "nats.url=x"}},
		{"this sets fields of the job, not of the configuration", "avatarworker dlq replay", []string{"dlq", "replay", "1", "--set", "nats.url=x"}},
		{`queue "a b": only letters, digits, '-' and '_'`, "avatarworker queue pause", []string{"queue", "pause", "a b"}},
		{`unknown command "" for "avatarworker"`, "avatarworker", []string{""}},
		{`unknown command "" for "avatarworker dlq"`, "avatarworker dlq", []string{"dlq", ""}},
		{`unknown command ""`, "avatarworker help", []string{"help", ""}},
		{"CODE is empty: write 'avatarworker errors [CODE]'", "avatarworker errors", []string{"errors", ""}},
		{"WORKER is empty: write 'avatarworker drain WORKER…'", "avatarworker drain", []string{"drain", "a", ""}},
		{"REGION is empty: write 'avatarworker circuit close APP [REGION]'", "avatarworker circuit close", []string{"circuit", "close", "a", ""}},
		{"FILE|- is empty: write 'avatarworker submit [FILE|-]'", "avatarworker submit", []string{"submit", ""}},
	} {
		_, _, stderr := call(t, tc.args...)
		expect(t, exitUsage, []string{tc.text, "Try '" + tc.help + " --help'."}, tc.args...)
		if strings.Count(stderr, "did you mean") > 1 {
			t.Errorf("%v: %s", tc.args, stderr)
		}
	}
	if _, _, stderr := call(t, "dlq", "zzzzzz"); strings.Contains(stderr, "mean") {
		t.Errorf("a guess at nothing: %s", stderr)
	}
}

func TestAFilterWithoutAValueIsRefused(t *testing.T) {
	t.Parallel()
	for command, flags := range map[string][]string{
		"cancel":     {"state", "queue", "app", "avatar", "label", "code", "older", "newer"},
		"retry":      {"state", "queue", "app", "avatar", "label", "code", "older", "newer"},
		"jobs ls":    {"state", "queue", "app", "avatar", "label", "code", "older", "newer"},
		"dlq ls":     {"code", "class", "app", "job", "before", "after"},
		"dlq rm":     {"code", "class", "app", "job", "before", "after"},
		"dlq replay": {"code", "class", "app", "job", "before", "after"},
		"events":     {"job", "code"},
		"cost":       {"since", "until"},
		"cost check": {"since", "until"},
	} {
		for _, flag := range flags {
			args := append(strings.Fields(command), "--"+flag, "", "--json")
			expect(t, exitUsage, []string{"--" + flag, "want"}, args...)
		}
	}
	expect(t, exitUsage, []string{`--app "a,": want a value`}, "cancel", "--app", "a,", "-y")
}

// An empty value is mostly a variable of a script that is not set: without the flag
// the command would do something else, such as run a job under another id again.
func TestAFlagWithoutAValueIsRefusedByEveryCommand(t *testing.T) {
	t.Parallel()
	flags := 0
	var walk func(cmd *cobra.Command, path []string)
	walk = func(cmd *cobra.Command, path []string) {
		for _, sub := range cmd.Commands() {
			walk(sub, append(slices.Clone(path), sub.Name()))
		}
		cmd.InheritedFlags() // adds them to those of the command
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Name == "set" || f.Name == "egress-attribute" { // pairs, that others are needed for
				return
			}
			args := append(slices.Clone(path), "--"+f.Name+"=")
			for _, name := range strings.Fields(cmd.Use)[1:] { // what it needs besides
				if !strings.HasPrefix(name, "[") {
					args = append(args, "1")
				}
			}
			flags++
			expect(t, exitUsage, []string{"--" + f.Name, "want"}, args...)
		})
	}
	for _, cmd := range newRootCommand(newCLI(nil, nil, nil, nil)).Commands() {
		if cmd.Name() != "completion" && cmd.Name() != "help" {
			walk(cmd, []string{cmd.Name()})
		}
	}
	if flags < 100 {
		t.Errorf("%d flags were tried", flags)
	}
	file := writeFile(t, "job.json", []byte(`{"id":"","avatar_id":"a","audio":{"url":"http://h/a.wav"}}`))
	expect(t, exitFailed, []string{`id is ""`}, "submit", file)
}

func TestVersionAndCompletion(t *testing.T) {
	t.Parallel()
	version := expect(t, 0, []string{"avatarworker "}, "version")
	if flag := expect(t, 0, nil, "--version"); flag != version {
		t.Errorf("--version prints %q, version %q", flag, version)
	}
	if b := decode[build](t, expect(t, 0, nil, "version", "--json")); b.Go == "" || b.Version == "" {
		t.Errorf("got %+v", b)
	}
	expect(t, 0, []string{"bash completion"}, "completion", "bash")
}

func TestEveryCommandHasHelp(t *testing.T) {
	t.Parallel()
	for _, cmd := range newRootCommand(newCLI(nil, nil, nil, nil)).Commands() {
		if cmd.Short == "" || !cmd.Runnable() {
			t.Errorf("%s: no help, or nothing that it does", cmd.Name())
		}
		expect(t, 0, []string{"Usage:", fmt.Sprintf("avatarworker %s", cmd.Name())}, cmd.Name(), "--help")
	}
}
