package reliability

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"avatarworker/internal/errors"
)

// historyEnv set to "required" makes the test of an upgrade fail where it can't
// be run: CI is to have the history.
const historyEnv = "TEST_HISTORY"

// previousBinary builds the worker of the commit that testdata/previous_commit
// names.
func previousBinary(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "previous_commit"))
	if err != nil {
		t.Fatal(err)
	}
	commit := strings.TrimSpace(string(data))
	root := filepath.Join("..", "..")
	if out, err := exec.Command("git", "-C", root, "cat-file", "-e", commit+"^{commit}").CombinedOutput(); err != nil {
		why := fmt.Sprintf("commit %s of testdata/previous_commit is not in the history here (%v: %s): fetch it to run the test of an upgrade", commit, err, bytes.TrimSpace(out))
		if os.Getenv(historyEnv) == "required" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	// Always in the same folder, for the compiler's cache to know it again.
	dir, err := filepath.Abs(filepath.Join(root, "bin", "previous", commit))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		extract(t, root, commit, dir)
	} else if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "previous")
	run(t, "go", "-C", dir, "build", "-ldflags", "-s -w", "-tags", "failpoint", "-o", binary, "./cmd/worker")
	return binary
}

// extract puts a commit's files into dir, all or none.
func extract(t *testing.T, root, commit, dir string) {
	t.Helper()
	above := filepath.Dir(dir)
	if err := os.MkdirAll(above, 0o750); err != nil {
		t.Fatal(err)
	}
	half, err := os.MkdirTemp(above, "half-") //nolint:usetesting // it is renamed within its folder
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(half) // is gone if it was renamed
	source := filepath.Join(t.TempDir(), "source.tar")
	run(t, "git", "-C", root, "archive", "--output", source, commit)
	run(t, "tar", "-xf", source, "-C", half)
	if err := os.Rename(half, dir); err != nil {
		if _, there := os.Stat(dir); there != nil { // another test process was not quicker
			t.Fatal(err)
		}
	}
}

func run(t *testing.T, command ...string) {
	t.Helper()
	if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(command, " "), err, out)
	}
}

func TestAFleetOfThisBuildAndTheOneBeforeKeepsThePromisesThroughAnUpgrade(t *testing.T) {
	if testing.Short() {
		t.Skip("builds another worker, and a minute of chaos: not with -short")
	}
	t.Parallel()
	before, after := previousBinary(t), workerBinary(t)
	seed := chaosSeed(t)
	t.Logf("seed %d: replay with AVATAR_CHAOS_SEED=%d", seed, seed)
	c := newChaos(t, 10*time.Second, 0, before, after, before, after)
	c.run(seed, 16*time.Second, 160)
	for _, w := range c.workers {
		if w.binary != before {
			continue
		}
		w.process.signal(syscall.SIGTERM)
		if !w.process.waitEnd(40*time.Second) || !w.process.cmd.ProcessState.Success() {
			t.Fatalf("worker %s did not drain in good order: %v", w.name, w.process.cmd.ProcessState)
		}
		w.binary = after
		c.start(w)
	}
	for i := range 50 {
		c.publish(job(fmt.Sprintf("new-%d", i), pick(seeded(i), "ok", "slow-300", "slow-1000"), 2))
	}
	c.finish(seed)
}
