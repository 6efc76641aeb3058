package jobs_test

import (
	"os/exec"
	"strings"
	"testing"
)

func TestJobsDoNotLinkTheNATSServer(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "avatarworker/internal/jobs").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, pkg := range strings.Fields(string(out)) {
		if strings.HasPrefix(pkg, "github.com/nats-io/nats-server") || strings.HasPrefix(pkg, "avatarworker/internal/session") {
			t.Errorf("internal/jobs links %s", pkg)
		}
	}
}
