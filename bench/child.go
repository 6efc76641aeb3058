package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"avatarworker/internal/errors"
)

// A child is this program, started again to play one role. It reads commands
// from its standard input, one JSON object in a line, and answers each with
// one; it ends with its input.

// command is one line to a child.
type command struct {
	Do     string `json:"do"`
	N      int    `json:"n,omitempty"`
	Frames int    `json:"frames,omitempty"`
}

// answer is one line from a child.
type answer struct {
	Error string `json:"error,omitempty"`

	// Of a role that serves.
	NATS    string `json:"nats,omitempty"`
	Console string `json:"console,omitempty"`
	Ingress string `json:"ingress,omitempty"`
	Page    string `json:"page,omitempty"`
	Trust   string `json:"trust,omitempty"` // file of the certificate that clients must trust; "": no TLS

	Elapsed time.Duration `json:"elapsed_ns,omitempty"` // of the work itself
	Counts  counts        `json:"counts,omitzero"`      // of a NATS node
	Stats   stats         `json:"stats,omitzero"`
}

// role is what a child plays. start brings it up and returns what it has to
// say; do answers a command; stop ends it.
type role interface {
	start(ctx context.Context, p params) (answer, error)
	do(ctx context.Context, c command) (answer, error)
	stop()
}

// params are what a role is started with.
type params struct {
	Role        string  `json:"role"`
	NATS        string  `json:"nats,omitempty"`
	Console     string  `json:"console,omitempty"`
	Ingress     string  `json:"ingress,omitempty"`
	Concurrency int     `json:"concurrency,omitempty"`
	Frames      int     `json:"frames,omitempty"`  // of each utterance of the simulated backend
	InHand      int     `json:"in_hand,omitempty"` // of a worker: jobs that it runs and finishes at most
	Speed       float64 `json:"speed,omitempty"`   // of the simulated backend
	TLS         bool    `json:"tls,omitempty"`     // of the simulated backend
	Trust       string  `json:"trust,omitempty"`   // file of the certificate to trust
	Replicas    int     `json:"replicas,omitempty"`
	Profiles    string  `json:"profiles,omitempty"`
	Confirmed   bool    `json:"confirmed,omitempty"` // the sessions are confirmed before they are over
	Ledger      string  `json:"ledger,omitempty"`    // "on": what they used is written
	Node        *node   `json:"node,omitempty"`      // of a NATS node
}

// serve plays a role until the input ends.
func serve(ctx context.Context, p params, r role, in io.Reader, out io.Writer) error {
	say := json.NewEncoder(out)
	first, err := r.start(ctx, p)
	if err != nil {
		return errors.Join(err, say.Encode(answer{Error: err.Error()}))
	}
	defer r.stop()
	if err := say.Encode(first); err != nil {
		return err
	}
	stopProfiles, err := startProfiles(p.Profiles)
	if err != nil {
		return err
	}
	defer stopProfiles()
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var c command
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return fmt.Errorf("command: %w", err)
		}
		var a answer
		var err error
		if c.Do == "stats" || c.Do == "settled stats" {
			a.Stats = readStats(c.Do == "settled stats")
		} else if a, err = r.do(ctx, c); err != nil {
			a = answer{Error: err.Error()}
		}
		if err := say.Encode(a); err != nil {
			return err
		}
	}
	return lines.Err()
}

// child is a started one, as its parent sees it.
type child struct {
	name  string
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines *bufio.Reader
	said  answer // when it was up
}

// spawn starts a child and waits until it is up.
func spawn(ctx context.Context, p params) (*child, error) { return spawnWith(ctx, p, os.Stderr) }

// spawnWith is spawn with another stderr.
func spawnWith(ctx context.Context, p params, stderr io.Writer, env ...string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	arg, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "child", string(arg)) // #nosec G204 -- this program itself
	cmd.Stderr, cmd.Env = stderr, append(os.Environ(), env...)
	if p.Trust != "" {
		cmd.Env = append(cmd.Env, "SSL_CERT_FILE="+p.Trust)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{name: p.Role, cmd: cmd, in: in, lines: bufio.NewReader(out)}
	if c.said, err = c.listen(); err != nil {
		return nil, errors.Join(err, c.stop())
	}
	return c, nil
}

func (c *child) listen() (answer, error) {
	line, err := c.lines.ReadBytes('\n')
	if err != nil {
		return answer{}, fmt.Errorf("%s: it ended: %w", c.name, err)
	}
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		return answer{}, fmt.Errorf("%s said %q: %w", c.name, strings.TrimSpace(string(line)), err)
	}
	if a.Error != "" {
		return answer{}, fmt.Errorf("%s: %s", c.name, a.Error)
	}
	return a, nil
}

// call sends a command and waits for its answer.
func (c *child) call(cmd command) (answer, error) {
	line, err := json.Marshal(cmd)
	if err != nil {
		return answer{}, err
	}
	if _, err := c.in.Write(append(line, '\n')); err != nil {
		return answer{}, fmt.Errorf("%s: %w", c.name, err)
	}
	return c.listen()
}

// stats returns what the process has used; settled: after a garbage collection.
func (c *child) stats(settled bool) (stats, error) {
	do := "stats"
	if settled {
		do = "settled stats"
	}
	a, err := c.call(command{Do: do})
	return a.Stats, err
}

// stop ends the child's input and waits for it.
func (c *child) stop() error {
	if err := c.in.Close(); err != nil {
		return err
	}
	if err := c.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	return nil
}
