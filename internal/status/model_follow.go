package status

import (
	"slices"
	"strings"
	"time"

	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/streams"
)

type sharedEntry struct {
	value    []byte
	stored   time.Time
	revision uint64
}

func (m *Model) stateFollower(changed *bool) streams.Follower {
	prefix := "$KV." + m.store.names.StateBucket() + "."
	type change struct {
		key string
		row compactRow
		ok  bool
		msg *streams.Message
	}
	return streams.Follower{
		Reset: func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.records, m.limits, m.fresh.Loaded = newRecordTable(), newLimitKeys(), false
			*changed = true
		},
		Take: func(batch []streams.Message) {
			// What takes long is done before others have to wait.
			changes := make([]change, 0, len(batch))
			for i := range batch {
				key := strings.TrimPrefix(batch[i].Subject, prefix)
				c := change{key: key, msg: &batch[i]}
				if !strings.Contains(key, ".") {
					c.row, c.ok = compactRecord(batch[i].Data, batch[i].Seq)
				}
				changes = append(changes, c)
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			for _, c := range changes {
				switch {
				case strings.Contains(c.key, "."):
					*changed = m.limits.learn(c.key, c.msg.Data, c.msg.Seq) || *changed
				case c.ok && c.row.id == c.key:
					m.records.put(c.row)
					*changed = true
				default:
					*changed = m.records.remove(c.key) || *changed
				}
			}
		},
		Expired: func(first uint64) {
			m.mu.Lock()
			defer m.mu.Unlock()
			*changed = m.records.expire(first) || *changed
			*changed = m.limits.expire(first) || *changed
		},
	}
}

func (m *Model) fleetFollower(changed *bool) streams.Follower {
	prefix := "$KV." + m.store.names.FleetBucket() + "."
	return streams.Follower{
		Reset: func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.shared = make(map[string]sharedEntry)
			*changed = true
		},
		Take: func(batch []streams.Message) {
			m.mu.Lock()
			defer m.mu.Unlock()
			for _, msg := range batch {
				key := strings.TrimPrefix(msg.Subject, prefix)
				switch {
				case !strings.HasPrefix(key, fleet.Prefix) && !strings.HasPrefix(key, circuit.Prefix):
					continue
				case len(msg.Data) == 0:
					delete(m.shared, key)
				default:
					m.shared[key] = sharedEntry{value: slices.Clone(msg.Data), stored: msg.Stored, revision: msg.Seq}
				}
				*changed = true
			}
		},
		Expired: func(first uint64) {
			m.mu.Lock()
			defer m.mu.Unlock()
			for key, entry := range m.shared {
				if entry.revision < first {
					delete(m.shared, key)
					*changed = true
				}
			}
		},
	}
}

func (m *Model) eventsFollower(changed *bool) streams.Follower {
	return streams.Follower{
		Reset: func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.failures = newFailureCounts(m.store.names)
			*changed = true
		},
		Take: func(batch []streams.Message) {
			m.mu.Lock()
			defer m.mu.Unlock()
			for _, msg := range batch {
				m.failures.add(msg.Subject, msg.Stored)
				*changed = true
			}
		},
		Expired: func(uint64) {}, // it keeps a day, whatever the stream keeps
	}
}
