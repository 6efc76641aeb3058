package reliability

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"avatarworker/internal/natsserver/natstest"
)

// binary is the worker as it is shipped, but with its failpoints compiled in.
var binary = struct {
	sync.Once
	dir, path string
	err       error
}{}

func TestMain(m *testing.M) {
	zerolog.SetGlobalLevel(zerolog.Disabled)                                       // toxiproxy's toxics log to a global logger at every level
	for _, role := range []string{"WORKER", "PUBLISHER", "LISTENER", "OPERATOR"} { // of deploy/nats/cells.conf
		if err := os.Setenv("AVATAR_"+role+"_PASSWORD", natsPassword); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	natstest.Parallel(16)
	// toxiproxy leaves the toxics of a connection, and who reads it, behind that is
	// cut while they are taken off it.
	toxic := goleak.IgnoreAnyFunction("github.com/Shopify/toxiproxy/v2/toxics.(*ToxicStub).Run")
	reader := goleak.IgnoreAnyFunction("github.com/Shopify/toxiproxy/v2.(*ToxicLink).read")
	goleak.VerifyTestMain(m, append(natstest.LibraryLeaks(), toxic, reader, goleak.Cleanup(func(code int) {
		if err := os.RemoveAll(binary.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(code)
	}))...)
}

// workerBinary builds the worker once for all tests.
func workerBinary(t *testing.T) string {
	t.Helper()
	binary.Do(func() {
		binary.dir, binary.err = os.MkdirTemp("", "avatarworker-") //nolint:usetesting // it outlives the test that happens to come first
		if binary.err != nil {
			return
		}
		binary.path = filepath.Join(binary.dir, "worker")
		out, err := exec.Command("go", "build", "-ldflags", "-s -w", "-tags", "failpoint", "-o", binary.path, "avatarworker/cmd/worker").CombinedOutput()
		if err != nil {
			binary.err = fmt.Errorf("go build: %w: %s", err, out)
		}
	})
	if binary.err != nil {
		t.Fatal(binary.err)
	}
	return binary.path
}
