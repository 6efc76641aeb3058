package ui

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
)

// ErrRefused is in the chain of the error of a change that NATS does not permit.
var ErrRefused = errors.New("NATS does not permit it")

// refusals collects what NATS refuses to the page's user. The server says so beside the
// request, which then has no answer: without this, a change would end with a timeout
// that names no reason.
type refusals struct {
	mu sync.Mutex
	// known is what was refused while nothing was being changed, and when last: reads
	// that go on beside changes.
	known   map[string]time.Time
	changes map[*attempted]struct{}
}

// attempted is a change that is under way.
type attempted struct {
	cancel  context.CancelCauseFunc
	timer   *time.Timer // nil: nothing was refused
	refused error
}

const (
	// refusedFor is how long a refusal of a read is known.
	refusedFor = time.Minute
	// refusedAfter is how long a change may go on after a refusal, which may be that
	// of another change beside it.
	refusedAfter = time.Second
)

func newRefusals(nc *nats.Conn) *refusals {
	r := &refusals{known: make(map[string]time.Time), changes: make(map[*attempted]struct{})}
	before := nc.ErrorHandler()
	nc.SetErrorHandler(func(c *nats.Conn, sub *nats.Subscription, err error) {
		if before != nil {
			before(c, sub, err)
		}
		r.add(err)
	})
	return r
}

var refusedSubject = regexp.MustCompile(`(?i)violation for (publish|subscription) to "([^"]+)"`)

func (r *refusals) add(err error) {
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return
	}
	kind, subject := "publish", "a subject"
	if m := refusedSubject.FindStringSubmatch(err.Error()); m != nil {
		kind, subject = strings.ToLower(m[1]), m[2]
	}
	// Names of consumers and jobs differ from one request to the next.
	key := strings.Join(strings.SplitN(subject, ".", 6)[:min(strings.Count(subject, ".")+1, 5)], ".")
	if kind == "subscription" {
		kind = "subscribe"
	}
	refused := fmt.Errorf(`%w: the page's NATS user may not %s to %s; give it an operator's permissions, or switch ui.write off (docs/permissions.md)`, ErrRefused, kind, subject)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.changes) == 0 {
		r.known[key] = time.Now()
		return
	}
	if at, ok := r.known[key]; ok && time.Since(at) < refusedFor {
		return
	}
	for c := range r.changes {
		if c.timer == nil {
			c.refused = refused
			c.timer = time.AfterFunc(refusedAfter, func() { c.cancel(refused) })
		}
	}
}

// Permitted begins a change. Its context ends early if NATS refuses what the change
// needs; explain is to be called with the change's error, once, and returns one that
// says so.
func (s *Store) Permitted(ctx context.Context) (_ context.Context, explain func(error) error) {
	ctx, cancel := context.WithCancelCause(ctx)
	c := &attempted{cancel: cancel}
	r := s.refused
	r.mu.Lock()
	r.changes[c] = struct{}{}
	r.mu.Unlock()
	return ctx, func(err error) error {
		r.mu.Lock()
		delete(r.changes, c)
		refused := c.refused
		if c.timer != nil {
			c.timer.Stop()
		}
		r.mu.Unlock()
		cancel(nil)
		switch {
		case err == nil:
			return nil
		case refused != nil:
			return refused
		case errors.Is(err, nats.ErrNoResponders):
			return fmt.Errorf("%w: may the page's NATS user do this (docs/permissions.md)?", err)
		default:
			return err
		}
	}
}
