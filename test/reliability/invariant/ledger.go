package invariant

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/cost"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/retry"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
)

// exactWithin is how far an exact usage record may be from the backend's own log
// where nothing is delayed.
const exactWithin = 250 * time.Millisecond

// Ledger is what the ledger of connected time shows.
type Ledger struct {
	Records  []Usage
	Counters cost.Compared // the counters, held against the records
	Total    []cost.Row    // the counters once all records are in them
}

// Usage is one usage record with its Nats-Msg-Id.
type Usage struct {
	ID string
	usage.Record
}

// readLedger reads the ledger until it is at rest: a worker that was cut off may correct
// its sessions meanwhile, and a replica that answers may not have yet what was added.
func readLedger(ctx context.Context, js jetstream.JetStream, names topology.Names) (l *Ledger, err error) {
	begun := time.Now()
	_ = retry.Until(ctx, retry.Backoff{Initial: 100 * time.Millisecond, Max: time.Second}, func(error) bool { return err != nil || time.Since(begun) > inStep }, func() error {
		if l, err = readLedgerOnce(ctx, js, names); err == nil && l.total() != l.Counters.Totals {
			return errors.New("the counters are not what the records add up to")
		}
		return err
	})
	return l, err
}

func readLedgerOnce(ctx context.Context, js jetstream.JetStream, names topology.Names) (*Ledger, error) {
	l := &Ledger{}
	err := each(ctx, js, names.UsageStream(), names.AllUsage(), func(msg jetstream.Msg, _ *jetstream.MsgMetadata) error {
		u := Usage{ID: msg.Headers().Get(nats.MsgIdHdr)}
		l.Records = append(l.Records, u)
		return json.Unmarshal(msg.Data(), &l.Records[len(l.Records)-1].Record)
	})
	if err != nil {
		return l, err
	}
	store := cost.NewStore(js, names, nil)
	if l.Counters, err = store.Compare(ctx); err != nil {
		return l, err
	}
	// What the last worker had no time for.
	counters, err := usage.OpenCounters(ctx, js, names, nil)
	if err == nil {
		err = counters.CatchUp(ctx, func(error) {})
	}
	if err != nil {
		return l, err
	}
	l.Total, err = store.Sum(ctx, cost.Query{By: cost.ByDay})
	return l, err
}

// inStep is how long the ledger may take to be at rest.
const inStep = 20 * time.Second

// total is what the counters add up to.
func (l *Ledger) total() (total usage.Totals) {
	for _, row := range l.Total {
		total = total.Plus(row.Totals)
	}
	return total
}

// ledger holds the ledger against the backend's session log: every session that it
// confirmed is in it once.
func (c *check) ledger() {
	if c.seen.Ledger == nil {
		return
	}
	for _, d := range c.seen.Ledger.Counters.Differences {
		c.violate("counter %s is %+v, its records add up to %+v", d.Counter, d.Have, d.Want)
	}
	if total, records := c.seen.Ledger.total(), c.seen.Ledger.Counters.Totals; total != records {
		c.violate("the counters add up to %+v, the records to %+v", total, records)
	}
	counts := c.counting()
	byConnection := map[string]Usage{}
	var nameless []Usage
	for _, u := range counts {
		if u.ConnectionID == "" {
			nameless = append(nameless, u)
			continue
		}
		if other, ok := byConnection[u.ConnectionID]; ok {
			c.violate("session %s is in the ledger as %s and as %s", u.ConnectionID, other.ID, u.ID)
		}
		byConnection[u.ConnectionID] = u
	}
	for _, s := range c.seen.Sessions {
		if s.Confirmed.IsZero() || s.Closed.IsZero() {
			continue
		}
		u, ok := byConnection[s.ConnectionID]
		if !ok {
			u, ok = take(&nameless, s)
		}
		delete(byConnection, s.ConnectionID)
		c.sessionUsed(s, u, ok)
	}
	for id, u := range byConnection {
		c.violate("usage record %s is of session %s, which the backend has not confirmed", u.ID, id)
	}
}

// counting is the record of each session that counts: an exact one instead of an
// estimate.
func (c *check) counting() map[string]Usage {
	counts, stored := map[string]Usage{}, map[string]bool{}
	for _, u := range c.seen.Ledger.Records {
		id := u.Record.ID()
		if stored[u.ID] {
			c.violate("usage record %s is stored twice", u.ID)
		}
		stored[u.ID] = true
		if !u.Estimated && u.ConnectionID == "" {
			c.violate("usage record %s is exact and has no connection id", u.ID)
		}
		before, ok := counts[id]
		switch {
		case ok && before.Estimated == u.Estimated:
			c.violate("session %s has two usage records: %s and %s", id, before.ID, u.ID)
		case !ok || before.Estimated:
			counts[id] = u
		}
	}
	return counts
}

// take finds an estimate whose worker died before it had written down the
// connection id, and which may be of that session.
func take(nameless *[]Usage, s simulator.Session) (Usage, bool) {
	for i, u := range *nameless {
		from, to := u.ConfirmedAt, u.ConfirmedAt.Add(time.Duration(u.ConnectedMS)*time.Millisecond)
		if u.AvatarID == s.AvatarID && u.AppID == s.AppID && from.Add(-exactWithin).Before(s.Confirmed) && to.Add(exactWithin).After(s.Closed) {
			*nameless = append((*nameless)[:i], (*nameless)[i+1:]...)
			return u, true
		}
	}
	return Usage{}, false
}

// sessionUsed compares one session with its usage record.
func (c *check) sessionUsed(s simulator.Session, u Usage, found bool) {
	truth, exactWithin := s.Closed.Sub(s.Confirmed), c.within(s)
	have := time.Duration(u.ConnectedMS) * time.Millisecond
	switch {
	case !found && truth < exactWithin:
		c.report.Unseen++ // its confirm crossed with a close, or with its worker's end
	case !found:
		c.violate("session %s of avatar %s was connected for %s and is not in the ledger", s.ConnectionID, s.AvatarID, truth)
	case u.Estimated:
		c.report.Estimated++
		if have < truth-exactWithin {
			c.violate("usage record %s is an estimate of %s, below the truth: session %s was connected for %s", u.ID, have, s.ConnectionID, truth)
		}
	case (have - truth).Abs() > exactWithin:
		c.violate("usage record %s says %s, but session %s was connected for %s", u.ID, have, s.ConnectionID, truth)
	default:
		c.report.Exact++
	}
}

// within is how far an exact usage record of a session may be off.
func (c *check) within(s simulator.Session) time.Duration {
	within := exactWithin
	for _, d := range c.run.Delays {
		if d.Start.Before(s.Closed) && d.End.After(s.Confirmed) {
			within += d.End.Sub(d.Start)
		}
	}
	return within
}

// ledgerText is the ledger's part of a report.
func (r Report) ledgerText() string {
	return fmt.Sprintf("in the ledger %d, estimated %d, unseen %d", r.Exact, r.Estimated, r.Unseen)
}
