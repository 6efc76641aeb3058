package operate_test

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
)

// pipedRun starts `avatarworker run --embedded` with its log in a pipe, reads
// until it takes jobs, and returns the reading end.
func pipedRun(s *site) (*exec.Cmd, *os.File) {
	s.t.Helper()
	reader, writer, err := os.Pipe()
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command(binary, "run", "--embedded")
	cmd.Dir = s.t.TempDir()
	cmd.Env = append([]string{"HOME=" + cmd.Dir}, s.env...)
	cmd.Stdout, cmd.Stderr = writer, writer
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	_ = writer.Close() // the process has its own
	s.t.Cleanup(func() {
		_ = reader.Close()
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	lines := bufio.NewScanner(reader)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "worker started") {
			return cmd, reader
		}
	}
	s.t.Fatalf("the worker ended before it began: %v", lines.Err())
	return nil, nil
}

func TestRunGoesOnWhenTheReaderOfItsLogHasGone(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0)
	cmd, reader := pipedRun(s)
	if err := reader.Close(); err != nil { // as in `run | head`
		t.Fatal(err)
	}
	s.connect()
	for _, id := range []string{"j1", "j2", "j3"} {
		s.publish("default", id, "ok")
		s.awaitEvents(s.names.Events("completed", id), 1)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the worker ended: %v", err)
	}
}

func TestAHangupDrainsAsSIGTERMDoes(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1)
	// A test that runs under nohup would pass the ignored signal on.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	p := s.run()
	s.connect()
	s.publish("default", "j1", "slow-300")
	s.awaitEvents(s.names.Events("started", "j1"), 1)
	p.signal(syscall.SIGHUP)
	if code := p.wait(); code != 0 || !strings.Contains(p.stderr.String(), "draining") || !strings.Contains(p.stderr.String(), `"drain_timeout":"5m0s"`) {
		t.Errorf("exit %d:\n%s", code, p.stderr)
	}
}

func TestUnderNohupAHangupIsIgnored(t *testing.T) {
	s := newSite(t, 0)
	cmd := exec.Command("nohup", binary, "run", "--embedded")
	cmd.Dir = t.TempDir()
	cmd.Env = append([]string{"HOME=" + cmd.Dir, "PATH=" + os.Getenv("PATH")}, s.env...)
	log := newScreen()
	cmd.Stdout, cmd.Stderr = io.Discard, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the worker ended: %v", err)
		}
	}()
	log.awaitText(t, "worker started")
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.connect()
	s.publish("default", "j1", "ok")
	s.awaitEvents(s.names.Events("completed", "j1"), 1)
	if strings.Contains(log.String(), "draining") {
		t.Errorf("it drains:\n%s", log)
	}
}

func TestASecondWorkerOnOneHostSaysWhichFlagToUse(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0)
	p := s.run()
	call(t, s.env, 1, []string{"address already in use", "--admin-addr", "AVATAR_ADMIN_ADDR", "admin.addr"}, "run")
	call(t, s.env, 1, []string{"nats.url", "--nats-url", "leave out --embedded"}, "run", "--embedded")
	second := spawn(t, s.env, "run", "--admin-addr", freeAddr(t))
	second.stderr.awaitText(t, "worker started")
	for _, w := range []*process{second, p} {
		w.signal(syscall.SIGTERM)
		if code := w.wait(); code != 0 {
			t.Errorf("exit %d:\n%s", code, w.stderr)
		}
	}
}

func TestRunWithoutNATSNamesTheURL(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0)
	p := spawn(t, append(s.env, "NATS_URL=nats://me:hush@"+strings.TrimPrefix(s.url, "nats://")), "run")
	p.stderr.awaitText(t, "can't be reached")
	for _, text := range []string{strings.TrimPrefix(s.url, "nats://"), "--nats-url", "NATS_URL"} {
		if !strings.Contains(p.stderr.String(), text) {
			t.Errorf("no %q in:\n%s", text, p.stderr)
		}
	}
	if strings.Contains(p.stderr.String(), "hush") {
		t.Errorf("the password is shown:\n%s", p.stderr)
	}
	p.signal(syscall.SIGTERM)
	if code := p.wait(); code != 0 {
		t.Errorf("exit %d:\n%s", code, p.stderr)
	}
}

func TestAWorkersPresenceHasTheSpeechItTakes(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0)
	p := s.run("--set", "audio.convert=true", "--set", "audio.max_bytes=5MiB")
	out, _ := call(t, s.env, 0, nil, "status", "--json")
	for _, text := range []string{`"audio_convert": true`, `"audio_max_bytes": 5242880`} {
		if !strings.Contains(out, text) {
			t.Errorf("no %s in %s", text, out)
		}
	}
	p.signal(syscall.SIGTERM)
	if code := p.wait(); code != 0 {
		t.Errorf("exit %d", code)
	}
}
