// Package operate_test tries what an operator does, with the program as it is
// built: real processes, their signals, their exit codes, what they print.
package operate_test

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
)

// patience bounds each wait; none takes long on a machine that is not busy.
const patience = 60 * time.Second

// binary is the program, built once by TestMain.
var binary string

func TestMain(m *testing.M) { os.Exit(testAll(m)) }

func testAll(m *testing.M) int {
	if file := os.Getenv(measureInto); file != "" {
		return measured(file)
	}
	dir, err := os.MkdirTemp("", "operate")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir) // a temporary directory
	binary = filepath.Join(dir, "worker")
	if out, err := exec.Command("go", "build", "-o", binary, "avatarworker/cmd/worker").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the program: %v\n%s", err, out)
		return 1
	}
	natstest.Parallel(8)
	code := m.Run()
	if err := goleak.Find(natstest.LibraryLeaks()...); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// screen collects what a process writes and signals more.
type screen struct {
	mu    sync.Mutex
	text  bytes.Buffer
	grown chan struct{} // closed and replaced at each write
}

func newScreen() *screen { return &screen{grown: make(chan struct{})} }

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.grown)
	s.grown = make(chan struct{})
	return s.text.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// await returns when enough says that the text is.
func (s *screen) await(t *testing.T, what string, enough func(text string) bool) {
	t.Helper()
	timeout := time.After(patience)
	for {
		s.mu.Lock()
		text, grown := s.text.String(), s.grown
		s.mu.Unlock()
		if enough(text) {
			return
		}
		select {
		case <-grown:
		case <-timeout:
			t.Fatalf("no %s within %s, only:\n%s", what, patience, text)
		}
	}
}

func (s *screen) awaitText(t *testing.T, want string) {
	t.Helper()
	s.await(t, fmt.Sprintf("%q", want), func(text string) bool { return strings.Contains(text, want) })
}

// process is a run of the program.
type process struct {
	t           *testing.T
	cmd         *exec.Cmd
	out, stderr *screen
	ended       chan struct{}
}

// spawn starts the program with nothing of this process's environment that it
// would read.
func spawn(t *testing.T, env []string, args ...string) *process {
	t.Helper()
	return spawnIn(t, t.TempDir(), env, args...)
}

func spawnIn(t *testing.T, dir string, env []string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(binary, args...), out: newScreen(), stderr: newScreen(), ended: make(chan struct{})}
	p.cmd.Dir = dir
	p.cmd.Env = append([]string{"HOME=" + p.cmd.Dir, "PATH=" + os.Getenv("PATH")}, env...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		var exit *exec.ExitError
		if err := p.cmd.Wait(); err != nil && !asExit(err, &exit) {
			t.Errorf("waiting for worker %s: %v", args, err)
		}
	}()
	t.Cleanup(func() {
		select {
		case <-p.ended:
		default:
			p.signal(syscall.SIGKILL)
			<-p.ended
		}
	})
	return p
}

// asExit is errors.As for the one type that is looked for here.
func asExit(err error, target **exec.ExitError) bool {
	e, ok := err.(*exec.ExitError) //nolint:errorlint // Wait gives it unwrapped
	*target = e
	return ok
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil && err != os.ErrProcessDone { // Signal gives it unwrapped
		p.t.Errorf("signal: %v", err)
	}
}

// wait returns the exit code; -1 where a signal ended it.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		p.t.Fatalf("still running; stdout:\n%s\nstderr:\n%s", p.out, p.stderr)
		return -1
	}
}

// call runs the program to its end, wants the exit code, and in what it wrote
// these texts.
func call(t *testing.T, env []string, code int, texts []string, args ...string) (stdout, stderr string) {
	t.Helper()
	p := spawn(t, env, args...)
	if got := p.wait(); got != code {
		t.Fatalf("avatarworker %s: exit %d, want %d\nstdout:\n%s\nstderr:\n%s", strings.Join(args, " "), got, code, p.out, p.stderr)
	}
	for _, text := range texts {
		if both := p.out.String() + p.stderr.String(); !strings.Contains(both, text) {
			t.Errorf("avatarworker %s: no %q in\n%s", strings.Join(args, " "), text, both)
		}
	}
	return p.out.String(), p.stderr.String()
}

// site is one machine: a backend here, NATS and a worker in one process.
type site struct {
	t       *testing.T
	backend *simulator.Server
	env     []string
	url     string
	admin   string
	names   topology.Names
	js      jetstream.JetStream // nil before connect
}

// newSite starts the backend; speed as the simulator has it.
func newSite(t *testing.T, speed float64) *site {
	t.Helper()
	s := &site{t: t, url: "nats://" + freeAddr(t), admin: freeAddr(t), names: topology.Names{Prefix: "avatar"}}
	s.backend = simulator.New(simulator.Options{Addr: "127.0.0.1:0", Speed: speed})
	if err := s.backend.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.backend.Stop)
	s.env = []string{
		"NATS_URL=" + s.url, "SPATIUS_APP_ID=app", "SPATIUS_API_KEY=key-for-tests",
		"SPATIUS_CONSOLE_ENDPOINT=" + s.backend.ConsoleURL(), "SPATIUS_INGRESS_ENDPOINT=" + s.backend.IngressURL(),
		"AVATAR_ADMIN_ADDR=" + s.admin, "AVATAR_NATS_STORE_DIR=" + t.TempDir(),
		"AVATAR_RETRY_INITIAL=20ms", "AVATAR_RETRY_MAX=100ms", "AVATAR_LOG_LEVEL=info", "AVATAR_LOG_FORMAT=json",
	}
	return s
}

// run starts `avatarworker run --embedded` and returns when it takes jobs.
func (s *site) run(args ...string) *process {
	s.t.Helper()
	p := spawn(s.t, s.env, append([]string{"run", "--embedded"}, args...)...)
	p.stderr.awaitText(s.t, "worker started")
	return p
}

func (s *site) connect() {
	s.t.Helper()
	var err error
	if s.js, err = jetstream.New(natstest.ConnectURL(s.t, s.url, nats.MaxReconnects(0))); err != nil {
		s.t.Fatal(err)
	}
}

// publish publishes a job with a tenth of a second of speech.
func (s *site) publish(queue, id, avatar string) {
	s.t.Helper()
	speech := base64.StdEncoding.EncodeToString(make([]byte, 3200))
	body := fmt.Sprintf(`{"id":%q,"avatar_id":%q,"audio":{"inline":%q,"format":"pcm_s16le","sample_rate":16000},"output":{"discard":{}}}`, id, avatar, speech)
	if _, err := s.js.Publish(s.t.Context(), s.names.Jobs(queue), []byte(body)); err != nil {
		s.t.Fatal(err)
	}
}

// awaitEvents waits until n different messages were stored under the subject,
// and returns their bodies by job.
func (s *site) awaitEvents(subject string, n int) map[string][]json.RawMessage {
	s.t.Helper()
	messages := s.follow(s.names.EventsStream(), subject)
	found := make(map[string][]json.RawMessage)
	for range n {
		msg, err := messages.Next(jetstream.NextMaxWait(patience))
		if err != nil {
			s.t.Fatalf("%s: %d of %d: %v", subject, len(found), n, err)
		}
		var body struct {
			JobID string `json:"job_id"`
		}
		if err := json.Unmarshal(msg.Data(), &body); err != nil {
			s.t.Fatal(err)
		}
		found[body.JobID] = append(found[body.JobID], msg.Data())
	}
	return found
}

func (s *site) follow(stream, subject string) jetstream.MessagesContext {
	s.t.Helper()
	consumer, err := s.js.OrderedConsumer(s.t.Context(), stream, jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}})
	if err != nil {
		s.t.Fatal(err)
	}
	messages, err := consumer.Messages()
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(messages.Stop)
	return messages
}

// stored is how many messages a stream holds.
func (s *site) stored(stream string) uint64 {
	s.t.Helper()
	st, err := s.js.Stream(s.t.Context(), stream)
	if err != nil {
		s.t.Fatal(err)
	}
	return st.CachedInfo().State.Msgs
}

// record is the job's, as the bucket has it.
func (s *site) record(id string) map[string]any {
	s.t.Helper()
	kv, err := s.js.KeyValue(s.t.Context(), s.names.StateBucket())
	if err != nil {
		s.t.Fatal(err)
	}
	entry, err := kv.Get(s.t.Context(), id)
	if err != nil {
		s.t.Fatalf("record of %s: %v", id, err)
	}
	return decode[map[string]any](s.t, string(entry.Value()))
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("not the JSON that was wanted: %v\n%s", err, text)
	}
	return v
}

// lines are the objects that a process printed, one a line; lines that are none
// are left out.
func lines(text string) []map[string]any {
	var objects []map[string]any
	for scanner := bufio.NewScanner(strings.NewReader(text)); scanner.Scan(); {
		var o map[string]any
		if json.Unmarshal(scanner.Bytes(), &o) == nil {
			objects = append(objects, o)
		}
	}
	return objects
}

// freeAddr is an address of this machine where nothing listens, and which no outgoing
// connection takes before the program does.
func freeAddr(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf("127.0.0.1:%d", natstest.Port(t))
}
