package reliability

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"avatarworker/internal/natsserver/natstest"
)

// process is one worker process.
type process struct {
	t        *testing.T
	name     string
	cmd      *exec.Cmd
	read     chan struct{} // closed when its log has ended
	ended    chan struct{} // closed when the process has ended
	ready    chan struct{} // closed when it takes jobs
	draining func()        // called before it is told to drain; nil: nothing is

	mu      sync.Mutex
	id      string // worker id, once ready
	tail    []string
	lost    []time.Time              // when it lost its lease, by its log
	waiting map[string]chan struct{} // for a line with this text
	err     error                    // how it ended
}

// logTail is how many of the last log lines are shown when a test fails.
const logTail = 60

// startProcess starts the worker at path; env is its whole environment but for
// PATH and HOME.
func startProcess(t *testing.T, path, name string, env map[string]string) *process {
	t.Helper()
	p := &process{
		t: t, name: name, cmd: exec.Command(path, "run"),
		read: make(chan struct{}), ended: make(chan struct{}), ready: make(chan struct{}),
	}
	p.cmd.Dir = t.TempDir() // without a config.yaml
	p.cmd.SysProcAttr = dieWithParent()
	p.cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + p.cmd.Dir, "AVATAR_WORKER_NAME=" + name}
	for k, v := range env {
		p.cmd.Env = append(p.cmd.Env, k+"="+v)
	}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go p.follow(stderr)
	go p.wait()
	t.Cleanup(func() {
		p.signal(syscall.SIGKILL)
		<-p.ended
		if t.Failed() {
			t.Logf("worker %s ended: %v; its last lines:\n%s", p.name, p.err, strings.Join(p.lines(), "\n"))
		}
	})
	return p
}

// follow reads the worker's log.
func (p *process) follow(log io.Reader) {
	defer close(p.read)
	scanner := bufio.NewScanner(log)
	scanner.Buffer(nil, 4<<20)
	for scanner.Scan() {
		p.line(scanner.Text())
	}
	// A killed process may leave half a line: nothing to complain about.
}

func (p *process) line(text string) {
	var entry struct {
		Time     time.Time `json:"time"`
		WorkerID string    `json:"worker_id"`
	}
	if strings.Contains(text, apiKey) {
		p.t.Errorf("worker %s logged its API key: %s", p.name, text)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for part, seen := range p.waiting {
		if strings.Contains(text, part) {
			close(seen)
			delete(p.waiting, part)
		}
	}
	p.tail = append(p.tail, text)
	if len(p.tail) > 2*logTail {
		p.tail = append([]string(nil), p.tail[len(p.tail)-logTail:]...)
	}
	if p.id == "" && strings.Contains(text, `"worker started"`) && json.Unmarshal([]byte(text), &entry) == nil {
		p.id = entry.WorkerID
		close(p.ready)
	}
	if strings.Contains(text, `"message":"the worker's lease was lost`) && json.Unmarshal([]byte(text), &entry) == nil {
		p.lost = append(p.lost, entry.Time)
	}
}

// leasesLost is when the worker lost its lease.
func (p *process) leasesLost() []time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.lost)
}

func (p *process) wait() {
	<-p.read
	err := p.cmd.Wait()
	p.mu.Lock()
	p.err = err
	p.mu.Unlock()
	close(p.ended)
}

func (p *process) lines() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.tail[max(0, len(p.tail)-logTail):]...)
}

// workerID is the name and start of the worker, as events and records have it.
func (p *process) workerID() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.id
}

// signal sends a signal unless the process has ended.
func (p *process) signal(s syscall.Signal) {
	select {
	case <-p.ended:
	default:
		if s == syscall.SIGTERM && p.draining != nil && p.workerID() != "" {
			p.draining()
		}
		// It may be ending right now: then nothing receives the signal.
		_ = p.cmd.Process.Signal(s)
	}
}

// waitReady returns when the worker takes jobs.
func (p *process) waitReady() {
	p.t.Helper()
	select {
	case <-p.ready:
	case <-p.ended:
		p.t.Fatalf("worker %s ended before it was ready: %v", p.name, p.err)
	case <-time.After(natstest.Patience):
		p.t.Fatalf("worker %s was not ready in time", p.name)
	}
}

// awaitLine returns when the worker logs a line with this text.
func (p *process) awaitLine(text string) {
	p.t.Helper()
	seen := make(chan struct{})
	p.mu.Lock()
	if p.waiting == nil {
		p.waiting = map[string]chan struct{}{}
	}
	if strings.Contains(strings.Join(p.tail, "\n"), text) {
		close(seen)
	} else {
		p.waiting[text] = seen
	}
	p.mu.Unlock()
	select {
	case <-seen:
	case <-time.After(natstest.Patience):
		p.t.Fatalf("worker %s did not log %q", p.name, text)
	}
}

// waitEnd returns when the process has ended; false if it has not within d.
func (p *process) waitEnd(d time.Duration) bool {
	select {
	case <-p.ended:
		return true
	case <-time.After(d):
		return false
	}
}

// alive fails the test if the process has ended.
func (p *process) alive() {
	p.t.Helper()
	select {
	case <-p.ended:
		p.t.Errorf("worker %s ended: %v", p.name, p.err)
	default:
	}
}

// killed reports whether the process ended by SIGKILL.
func (p *process) killed() bool {
	status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
}

// memory is the resident memory of the process in bytes.
func (p *process) memory() (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("no VmRSS in the status of worker process %d", p.cmd.Process.Pid)
}
