package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
)

// onTerminal runs the program with a terminal for its three streams, types the
// answer when a question was put, and returns the exit code and what was shown.
func onTerminal(t *testing.T, answer string, args ...string) (code int, shown string) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer keyboard.Close()
	if err := unix.IoctlSetPointerInt(int(keyboard.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(keyboard.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	screen, read := newScreen(), make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(screen, keyboard) // ends with an error when the terminal is closed
	}()
	ended := make(chan int, 1)
	go func() { ended <- runContext(t.Context(), args, terminal, terminal, terminal) }()
	if answer != "" {
		screen.await(t, "[y/N]")
		if _, err := io.WriteString(keyboard, answer+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case code = <-ended:
	case <-time.After(natstest.Patience):
		t.Fatalf("still running:\n%s", screen)
	}
	if err := terminal.Close(); err != nil {
		t.Fatal(err)
	}
	<-read
	return code, screen.String()
}

func TestChangingManyDeadLettersAsksOnATerminal(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for i := range 4 {
		b.letter(fmt.Sprint("j", i), errors.CodeAvatarNotFound, `{"avatar_id":"a"}`, time.Now())
	}
	for _, no := range []string{"n", "nope", "\x04"} {
		code, shown := onTerminal(t, no, b.args("dlq", "rm", "--all")...)
		if code != exitFailed || !strings.Contains(shown, "Remove 4 dead letters for good?") || !strings.Contains(shown, "nothing was changed") || b.letters() != 4 {
			t.Fatalf("%q: exit %d, %d letters left: %s", no, code, b.letters(), shown)
		}
	}
	if code, shown := onTerminal(t, "", b.args("dlq", "rm", "1")...); code != 0 || b.letters() != 3 {
		t.Fatalf("one letter: exit %d: %s", code, shown)
	}
	if code, shown := onTerminal(t, "y", b.args("dlq", "replay", "2", "3")...); code != 0 || !strings.Contains(shown, "Replay 2 dead letters?") || b.letters() != 1 {
		t.Fatalf("replay: exit %d: %s", code, shown)
	}
	b.letter("j9", errors.CodeAvatarNotFound, `{}`, time.Now())
	if code, shown := onTerminal(t, "", b.args("dlq", "rm", "--all", "-y")...); code != 0 || b.letters() != 0 {
		t.Fatalf("-y: exit %d: %s", code, shown)
	}
}

func TestAJobsOwnBytesDoNotSteerATerminal(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.letter("j1", errors.CodeAvatarNotFound, "no JSON \u009b2J", time.Now())
	if code, shown := onTerminal(t, "", b.args("dlq", "show", "1", "--raw")...); code != 0 || bytes.Contains([]byte(shown), []byte("\u009b")) {
		t.Errorf("exit %d: %q", code, shown)
	}
}
