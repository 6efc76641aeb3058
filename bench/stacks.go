package main

import (
	"bufio"
	"bytes"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"syscall"
)

// stack is how much of its stack a goroutine uses, in bytes.
type stack struct {
	Goroutine string // the function that it is known by
	Used      int
	Frames    []frame // the innermost first
}

// frame is one function's part of a stack.
type frame struct {
	Function string
	Bytes    int
}

// nosplit is what the runtime adds to what a goroutine uses before it compares it
// with a quarter of its stack: room for functions that do not check (stackNosplit,
// internal/abi, on amd64).
const nosplit = 800

// keeps returns the size of the stack that a goroutine is left with after enough
// collections: one halves it if less than a quarter is in use.
func (s stack) keeps() int {
	const least = 2 << 10
	size := least
	for s.Used+nosplit >= size/2 {
		size *= 2
	}
	return size
}

// spare is by how many bytes the stack misses the next larger size.
func (s stack) spare() int { return s.keeps()/2 - nosplit - s.Used }

// String shows the size and the chain of calls that needs it.
func (s stack) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s uses %d bytes, keeps %d, with %d to spare:\n", s.Goroutine, s.Used, s.keeps(), s.spare())
	for _, f := range s.Frames {
		fmt.Fprintf(&b, "%6d  %s\n", f.Bytes, f.Function)
	}
	return b.String()
}

// stacks ends the child and returns the stacks of its goroutines that have one of
// the functions on them. Only a process that dies shows the addresses of frames:
// the child must have been started with its stderr kept and GOTRACEBACK=system.
func (c *child) stacks(dump *bytes.Buffer, functions []string) ([]stack, error) {
	if err := c.cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		return nil, err
	}
	if err := c.cmd.Wait(); err == nil {
		return nil, fmt.Errorf("%s: it ended without a dump", c.name)
	}
	return parseStacks(dump.Bytes(), functions), nil
}

var frameAddresses = regexp.MustCompile(` fp=0x([0-9a-f]+) sp=0x([0-9a-f]+)`)

func parseStacks(text []byte, functions []string) []stack {
	var list []stack
	for _, goroutine := range bytes.Split(text, []byte("\n\n")) {
		if s, ok := parseStack(goroutine); ok && s.calls(functions) {
			list = append(list, s)
		}
	}
	return list
}

func (s *stack) calls(functions []string) bool {
	for _, f := range s.Frames {
		for _, name := range functions {
			if strings.HasSuffix(f.Function, name) {
				s.Goroutine = name
				return true
			}
		}
	}
	return false
}

// parseStack reads one goroutine of a dump: a line with each function and its
// arguments, then one with its place and its addresses.
func parseStack(text []byte) (s stack, ok bool) {
	var function string
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		line := lines.Text()
		if !strings.HasPrefix(line, "\t") {
			if i := strings.LastIndexByte(line, '('); i > 0 {
				function = line[:i]
			}
			continue
		}
		at := frameAddresses.FindStringSubmatch(line)
		if at == nil {
			continue
		}
		fp, fpErr := strconv.ParseUint(at[1], 16, 64)
		sp, spErr := strconv.ParseUint(at[2], 16, 64)
		if fpErr != nil || spErr != nil {
			continue
		}
		n := int(fp - sp) // #nosec G115 -- a part of a stack
		s.Frames = append(s.Frames, frame{function, n})
		s.Used += n
	}
	return s, len(s.Frames) > 0
}
