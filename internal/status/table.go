package status

import (
	"cmp"
	"encoding/binary"
	"maps"
	"math"
	"slices"
	"time"
	"unique"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
)

// word is a text that many jobs share, such as the id of an app: it is in memory once.
type word = unique.Handle[string]

// compactRow is a job in memory, in about 130 bytes plus its id and its labels.
type compactRow struct {
	id                                       string
	queue, app, avatar, region, code, worker word
	labels                                   string // as packLabels has them
	// Times in nanoseconds since 1970; noTime: none.
	published, started, next int64
	connected                int64  // nanoseconds, over all sessions that ended
	seq                      uint64 // of the record, or of the message that waits
	run, attempt, crashes    int32
	state                    lifecycle.State
	open                     bool // a session is open since started
	// held is the number of the reason among lifecycle.HeldReasons, from 1; 0: none.
	held uint8
}

const noTime = math.MinInt64

func nanos(t time.Time) int64 {
	if t.IsZero() || t.Year() < 1700 || t.Year() > 2200 {
		return noTime
	}
	return t.UnixNano()
}

func timeOf(nanos int64) time.Time {
	if nanos == noTime {
		return time.Time{}
	}
	return time.Unix(0, nanos).UTC()
}

// compactRecord makes a row of a record, as readRow does.
func compactRecord(data []byte, seq uint64) (compactRow, bool) {
	var r recordRow
	if decodeRow(data, &r) != nil || r.StreamSeq == 0 || r.JobID == "" {
		return compactRow{}, false
	}
	row := compactRow{
		id: r.JobID, queue: unique.Make(r.Queue), app: unique.Make(r.AppID), avatar: unique.Make(r.AvatarID), region: unique.Make(r.Region),
		code: unique.Make(string(r.code())), worker: unique.Make(r.WorkerID), labels: packLabels(r.Labels),
		published: nanos(r.published()), started: noTime, next: noTime, connected: int64(r.SessionTime), seq: seq,
		run: clampInt(r.Run), attempt: clampInt(r.Attempt), crashes: clampInt(r.Crashes), state: knownState(r.State),
	}
	if !r.State.Final() && r.NextAttemptAt != nil {
		row.next = nanos(*r.NextAttemptAt)
	}
	if reason := r.heldReason(); reason != "" {
		row.held = heldNumber(reason)
	}
	if r.State == lifecycle.StateRunning {
		row.started, row.open = nanos(r.StartedAt), r.ConnectionID != ""
	}
	return row, true
}

// heldNumber is a reason of a hold in one byte.
func heldNumber(reason string) uint8 {
	return uint8(slices.Index(lifecycle.HeldReasons(), reason) + 1) // #nosec G115 -- there are few
}

func clampInt(n int) int32 { return int32(min(max(n, math.MinInt32), math.MaxInt32)) } // #nosec G115 -- it fits

// knownState returns the state in memory that is there anyway, so that a row does not
// keep the text that it was read from.
func knownState(state lifecycle.State) lifecycle.State {
	if i := slices.Index(States(), state); i >= 0 {
		return States()[i]
	}
	return state
}

// compactWaiting makes a row of a job that waits, of which waitingRow has made r.
func compactWaiting(r *Row, seq uint64) compactRow {
	return compactRow{
		id: r.ID, queue: unique.Make(r.Queue), app: unique.Make(r.AppID), avatar: unique.Make(r.AvatarID), region: unique.Make(""),
		code: unique.Make(""), worker: unique.Make(""), labels: packLabels(r.Labels),
		published: nanos(r.published), started: noTime, next: noTime, seq: seq, run: clampInt(r.Run), state: StateWaiting,
	}
}

// row is the job as a list shows it.
func (c *compactRow) row(now time.Time, defaultApp string) Row {
	r := Row{
		ID: c.id, Run: int(c.run), State: c.state, Queue: c.queue.Value(), AppID: c.app.Value(), AvatarID: c.avatar.Value(), Labels: unpackLabels(c.labels),
		Attempt: int(c.attempt), Crashes: int(c.crashes), Code: errors.Code(c.code.Value()), WorkerID: c.worker.Value(),
		published: timeOf(c.published), region: c.region.Value(),
	}
	if c.state == StateWaiting {
		r.AppID = cmp.Or(r.AppID, defaultApp)
	}
	if c.held > 0 {
		r.held = lifecycle.HeldReasons()[c.held-1]
	}
	if c.next != noTime {
		next := timeOf(c.next)
		r.NextAttemptAt = &next
	}
	running, connected := c.times(now)
	r.AgeMS, r.RunningMS, r.SessionMS = max(now.Sub(r.published), 0).Milliseconds(), running.Milliseconds(), connected.Milliseconds()
	return r
}

// times returns how long the job's session has been running, and how long its sessions
// were connected in all.
func (c *compactRow) times(now time.Time) (running, connected time.Duration) {
	connected = time.Duration(c.connected)
	if c.started != noTime {
		running = max(now.Sub(timeOf(c.started)), 0)
		if c.open {
			connected += running
		}
	}
	return running, connected
}

// packLabels makes one text of labels: each name and value after its length, names in
// order.
func packLabels(labels map[string]string) string {
	var packed []byte
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		for _, text := range []string{name, labels[name]} {
			packed = binary.AppendUvarint(packed, uint64(len(text)))
			packed = append(packed, text...)
		}
	}
	return string(packed)
}

// eachLabel calls f for each packed label until it returns false.
func eachLabel(packed string, f func(name, value string) bool) {
	cut := func() string {
		length, shift, i := 0, 0, 0
		for ; i < len(packed) && packed[i] >= 0x80; i++ {
			length |= int(packed[i]&0x7f) << shift
			shift += 7
		}
		length |= int(packed[i]) << shift
		text := packed[i+1 : i+1+length]
		packed = packed[i+1+length:]
		return text
	}
	for packed != "" {
		name := cut()
		if !f(name, cut()) {
			return
		}
	}
}

// labelValue is the value of one packed label; "": there is none.
func labelValue(packed, label string) (found string) {
	eachLabel(packed, func(name, value string) bool {
		if name == label {
			found = value
		}
		return name != label
	})
	return found
}

func unpackLabels(packed string) map[string]string {
	found := make(map[string]string)
	eachLabel(packed, func(name, value string) bool {
		found[name] = value
		return true
	})
	return found
}

// hasLabels reports whether all the labels are among the packed ones.
func hasLabels(packed string, want map[string]string) bool {
	if len(want) == 0 {
		return true
	}
	found := 0
	eachLabel(packed, func(name, value string) bool {
		if w, ok := want[name]; ok {
			if w != value {
				return false
			}
			found++
		}
		return true
	})
	return found == len(want)
}

// recordTable holds the jobs that have a record.
type recordTable struct {
	rows   []compactRow // one with an empty id is free
	free   []int32
	index  map[string]int32 // by job id
	counts map[word]map[lifecycle.State]int
	held   map[uint8]int // jobs that are held, by the number of the reason
}

func newRecordTable() *recordTable {
	return &recordTable{index: make(map[string]int32), counts: make(map[word]map[lifecycle.State]int), held: make(map[uint8]int)}
}

// put takes a job's record as it is now.
func (t *recordTable) put(row compactRow) {
	if i, ok := t.index[row.id]; ok {
		row.id = t.rows[i].id // in memory once
		t.count(&t.rows[i], -1)
		t.rows[i] = row
		t.count(&row, 1)
		return
	}
	t.count(&row, 1)
	if n := len(t.free); n > 0 {
		t.index[row.id] = t.free[n-1]
		t.rows[t.free[n-1]] = row
		t.free = t.free[:n-1]
		return
	}
	t.index[row.id] = int32(len(t.rows)) // #nosec G115 -- there is no memory for so many
	t.rows = append(t.rows, row)
}

// remove forgets a job, and reports whether it was there.
func (t *recordTable) remove(id string) bool {
	i, ok := t.index[id]
	if !ok {
		return false
	}
	t.count(&t.rows[i], -1)
	t.rows[i] = compactRow{}
	t.free = append(t.free, i)
	delete(t.index, id)
	return true
}

// expire forgets the jobs whose record was stored before that sequence.
func (t *recordTable) expire(first uint64) (changed bool) {
	for i := range t.rows {
		if r := &t.rows[i]; r.id != "" && r.seq < first {
			t.remove(r.id)
			changed = true
		}
	}
	return changed
}

func (t *recordTable) get(id string) *compactRow {
	if i, ok := t.index[id]; ok {
		return &t.rows[i]
	}
	return nil
}

func (t *recordTable) count(r *compactRow, n int) {
	t.held[r.held] += n
	states := t.counts[r.queue]
	if states == nil {
		states = make(map[lifecycle.State]int)
		t.counts[r.queue] = states
	}
	if states[r.state] += n; states[r.state] == 0 {
		delete(states, r.state)
	}
	if len(states) == 0 {
		delete(t.counts, r.queue)
	}
}

// waitingTable holds the jobs of one subject that no worker has been given, in the
// order in which they were published.
type waitingTable struct {
	rows []compactRow
	next uint64 // sequence from which on nothing was read
	// odd is how often in a row the number of rows was not the server's: jobs were
	// removed from the middle of the queue.
	odd int
}

// drop forgets the jobs before that sequence, and reports whether there were any.
func (t *waitingTable) drop(first uint64) bool {
	n := 0
	for n < len(t.rows) && t.rows[n].seq < first {
		n++
	}
	if n == 0 {
		return false
	}
	t.rows = slices.Delete(t.rows, 0, n)
	if cap(t.rows) > 4*len(t.rows) {
		t.rows = slices.Clone(t.rows) // a long queue that is short again needs less memory
	}
	return true
}
