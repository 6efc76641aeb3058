package cost

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
)

// Charge is one session on the vendor's list.
type Charge struct {
	ConnectionID string
	ConnectedMS  int64 // -1: the list does not say
	Credits      int64 // -1: the list does not say
	ConfirmedAt  time.Time
}

// ReadCharges reads a vendor's list: CSV whose first line names the columns, or a
// JSON object on each line. connection_id is needed; of connected_ms,
// connected_seconds and credits at least one; confirmed_at (RFC 3339) is optional.
// Other columns are ignored. The error names the line.
func ReadCharges(r io.Reader) ([]Charge, error) {
	in := bufio.NewReader(r)
	if bom, err := in.Peek(3); err == nil && bytes.Equal(bom, []byte("\xef\xbb\xbf")) {
		_, _ = in.Discard(3) // what was peeked at
	}
	first, err := in.Peek(1)
	if errors.Is(err, io.EOF) {
		return nil, errors.New("the list is empty")
	}
	if err != nil {
		return nil, err
	}
	switch first[0] {
	case '{':
		return readLines(in)
	case '[':
		return nil, errors.New("the list is a JSON array: write one object with connection_id on each line (jq -c '.[]')")
	}
	return readCSV(in)
}

func readLines(in io.Reader) ([]Charge, error) {
	var charges []Charge
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" {
			continue
		}
		var object map[string]json.RawMessage
		if err := json.Unmarshal([]byte(text), &object); err != nil || object == nil {
			return nil, fmt.Errorf("line %d is not one JSON object: %w", n, cmp.Or(err, errors.New("it is null")))
		}
		charge, err := parseCharge(func(name string) (string, error) { return scalar(object[name]) })
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		charges = append(charges, charge)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("behind %s: %w", lastOf(charges), err)
	}
	return charges, nil
}

// lastOf names the last session that was read.
func lastOf(charges []Charge) string {
	if len(charges) == 0 {
		return "the begin"
	}
	return fmt.Sprintf("connection_id %q", charges[len(charges)-1].ConnectionID)
}

// scalar is a JSON string or number as text; "" for null and for nothing.
func scalar(value json.RawMessage) (string, error) {
	text := strings.TrimSpace(string(value))
	switch {
	case text == "" || text == "null":
		return "", nil
	case text[0] == '"':
		var s string
		err := json.Unmarshal(value, &s)
		return strings.TrimSpace(s), err
	case strings.ContainsAny(text[:1], "-0123456789"):
		return text, nil
	default:
		return "", fmt.Errorf("is %.60s: want a string or a number", text)
	}
}

func readCSV(in io.Reader) ([]Charge, error) {
	rows := csv.NewReader(in)
	rows.TrimLeadingSpace = true
	head, err := rows.Read()
	if errors.Is(err, io.EOF) {
		return nil, errors.New("the list is empty")
	}
	if err != nil {
		return nil, fmt.Errorf("line 1 does not name the columns, of which connection_id is one: %w", err)
	}
	for i, name := range head {
		head[i] = strings.ToLower(strings.TrimSpace(name))
	}
	if !slices.Contains(head, "connection_id") {
		return nil, fmt.Errorf("line 1 names no column connection_id, but %s", strings.Join(head, ", "))
	}
	for i, name := range head {
		if slices.Contains(columns, name) && slices.Index(head, name) < i {
			return nil, fmt.Errorf("line 1 names the column %s twice: keep one", name)
		}
	}
	var charges []Charge
	for {
		row, err := rows.Read()
		if errors.Is(err, io.EOF) {
			return charges, nil
		}
		if err != nil {
			return nil, err // it names the line
		}
		line, _ := rows.FieldPos(0)
		charge, err := parseCharge(func(name string) (string, error) {
			if i := slices.Index(head, name); i >= 0 {
				return strings.TrimSpace(row[i]), nil
			}
			return "", nil
		})
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
		charges = append(charges, charge)
	}
}

// columns are the names that count in a list.
var columns = []string{"connection_id", "connected_ms", "connected_seconds", "credits", "confirmed_at"}

func parseCharge(field func(name string) (string, error)) (Charge, error) {
	c := Charge{ConnectedMS: -1, Credits: -1}
	fields := make(map[string]string)
	for _, name := range columns {
		text, err := field(name)
		if err != nil {
			return c, fmt.Errorf("%s %w", name, err)
		}
		fields[name] = text
	}
	if c.ConnectionID = fields["connection_id"]; c.ConnectionID == "" {
		return c, errors.New("connection_id is empty or missing")
	}
	number := func(name string, scale float64, into *int64) error {
		text := fields[name]
		if text == "" {
			return nil
		}
		f, err := strconv.ParseFloat(text, 64)
		if err != nil || f < 0 || math.IsNaN(f) || f*scale > math.MaxInt64/2 {
			return fmt.Errorf("%s is %q: want a number from 0 on", name, text)
		}
		*into = int64(math.Round(f * scale))
		return nil
	}
	err := errors.Join(number("connected_seconds", 1000, &c.ConnectedMS), number("connected_ms", 1, &c.ConnectedMS), number("credits", 1, &c.Credits))
	if err == nil && c.ConnectedMS < 0 && c.Credits < 0 {
		err = errors.New("it has none of connected_ms, connected_seconds and credits")
	}
	if text := fields["confirmed_at"]; err == nil && text != "" {
		if c.ConfirmedAt, err = time.Parse(time.RFC3339Nano, text); err != nil {
			err = fmt.Errorf("confirmed_at is %q: want a time such as 2026-03-01T12:00:00Z", text)
		}
	}
	return c, err
}

// What a finding can be about.
const (
	NotInLedger = "not_in_ledger"  // on the vendor's list only
	NotOnList   = "not_on_list"    // in the ledger only
	Differs     = "differs"        // time or credits
	OverBound   = "above_estimate" // the vendor's is more than our upper bound
	Twice       = "twice_on_list"
)

// Finding is one session that is not the same on both sides; -1 is a number that
// its side does not say.
type Finding struct {
	ConnectionID string `json:"connection_id"`
	What         string `json:"what"`
	JobID        string `json:"job_id,omitempty"`
	Run          int    `json:"run,omitempty"`
	Session      int    `json:"session,omitempty"`
	OurMS        int64  `json:"our_ms"`
	TheirMS      int64  `json:"their_ms"`
	OurCredits   int64  `json:"our_credits"`
	TheirCredits int64  `json:"their_credits"`
}

// Checked is a vendor's list compared with the ledger.
type Checked struct {
	OK           bool  `json:"ok"`
	Listed       int   `json:"listed"`
	Same         int   `json:"same"`
	Estimated    int   `json:"estimated"` // of those, no more than an estimate here
	OurCredits   int64 `json:"our_credits"`
	TheirCredits int64 `json:"their_credits"` // of those that say
	// WithoutID are sessions of the time looked at whose workers died before they
	// had written down the connection id: as many that are not in the ledger may be
	// these.
	WithoutID int       `json:"without_id"`
	Findings  []Finding `json:"findings"`
}

// Check compares a vendor's list with the sessions confirmed at since or later and
// before until (zero: no bound). Times within tolerance are the same.
func (s *Store) Check(ctx context.Context, charges []Charge, since, until time.Time, tolerance time.Duration) (Checked, error) {
	c := Checked{Listed: len(charges), Findings: []Finding{}}
	ours := make(map[string]usage.Record)
	err := s.Records(ctx, since, until, func(r usage.Record, t usage.Totals) {
		switch {
		case r.ConnectionID == "":
			c.WithoutID += int(t.Sessions)
		case t.Sessions > 0:
			ours[r.ConnectionID] = r // an exact one comes after its estimate
		}
	})
	if err != nil {
		return c, err
	}
	seen := make(map[string]bool)
	for _, charge := range charges {
		c.TheirCredits += max(charge.Credits, 0)
		r, known := ours[charge.ConnectionID]
		what := compare(r, charge, tolerance)
		switch {
		case seen[charge.ConnectionID]:
			what = Twice
		case !known:
			what = NotInLedger
		}
		seen[charge.ConnectionID] = true
		if what == "" {
			c.Same++
			if r.Estimated {
				c.Estimated++
			}
			continue
		}
		f := finding(r, what)
		f.ConnectionID, f.TheirMS, f.TheirCredits = charge.ConnectionID, charge.ConnectedMS, charge.Credits
		if !known {
			f.OurMS, f.OurCredits = -1, -1
		}
		c.Findings = append(c.Findings, f)
	}
	for _, id := range slices.Sorted(maps.Keys(ours)) {
		r := ours[id]
		c.OurCredits += r.Credits
		if !seen[id] {
			f := finding(r, NotOnList)
			f.TheirMS, f.TheirCredits = -1, -1
			c.Findings = append(c.Findings, f)
		}
	}
	c.OK = len(c.Findings) == 0
	return c, nil
}

func finding(r usage.Record, what string) Finding {
	return Finding{ConnectionID: r.ConnectionID, What: what, JobID: r.JobID, Run: r.Run, Session: r.Session, OurMS: r.ConnectedMS, OurCredits: r.Credits}
}

// compare says how a charge is not what the ledger has; "": it is.
func compare(r usage.Record, c Charge, tolerance time.Duration) string {
	over := c.ConnectedMS - r.ConnectedMS
	switch {
	case r.Estimated && (over > tolerance.Milliseconds() || c.Credits > r.Credits):
		return OverBound
	case r.Estimated:
		return ""
	case c.ConnectedMS >= 0 && max(over, -over) > tolerance.Milliseconds():
		return Differs
	case c.Credits >= 0 && c.ConnectedMS < 0 && c.Credits != r.Credits:
		return Differs
	case c.Credits >= 0 && c.ConnectedMS >= 0 && c.Credits != r.Credits && over == 0:
		return Differs
	default:
		return ""
	}
}
