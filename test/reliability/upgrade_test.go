package reliability

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
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
	dir := t.TempDir()
	source := filepath.Join(dir, "source.tar")
	for _, command := range [][]string{
		{"git", "-C", root, "archive", "--output", source, commit},
		{"tar", "-xf", source, "-C", dir},
		{"go", "-C", dir, "build", "-tags", "failpoint", "-o", filepath.Join(dir, "previous"), "./cmd/worker"},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(command, " "), err, out)
		}
	}
	return filepath.Join(dir, "previous")
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
	c.run(seed, 25*time.Second, 300)
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
	for i := range 100 {
		c.publish(job(fmt.Sprintf("new-%d", i), pick(seeded(i), "ok", "slow-300", "slow-1000"), 2))
	}
	c.finish(seed)
}
