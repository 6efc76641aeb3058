package status

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/limit"
	"avatarworker/internal/kv"
	"avatarworker/internal/topology"

	"github.com/nats-io/nats.go/jetstream"
)

// Limit is a session limit and who holds sessions of it. How many it allows only the
// workers' configuration says.
type Limit struct {
	Name    string        `json:"limit"` // "app_id/a1", "label/customer/acme"
	InUse   int           `json:"in_use"`
	Holders []LimitHolder `json:"holders"`
}

// LimitHolder is a session that counts against a limit.
type LimitHolder struct {
	WorkerID string `json:"worker_id"`
	JobID    string `json:"job_id"`
}

// Limits lists the session limits of which a session is in use, by name. The keys of
// workers whose lease is gone do not count.
func (s *Store) Limits(ctx context.Context) ([]Limit, error) {
	bucket := s.names.StateBucket()
	state, err := s.js.KeyValue(ctx, bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return []Limit{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", bucket, err)
	}
	entries, err := kv.Entries(ctx, state, limit.Prefix+">", lease.Prefix+">")
	if err != nil {
		return nil, err
	}
	keys := newLimitKeys()
	for _, entry := range entries {
		keys.learn(entry.Key(), entry.Value(), entry.Revision())
	}
	return keys.list(), nil
}

// limitKeys are the keys of session limits and the leases of those who hold them.
type limitKeys struct {
	leases map[string]uint64 // revision by key
	keys   map[string]limitKey
}

type limitKey struct {
	LimitHolder
	limit    string
	revision uint64
}

func newLimitKeys() *limitKeys {
	return &limitKeys{leases: make(map[string]uint64), keys: make(map[string]limitKey)}
}

// learn takes the value of a key; one without a value is removed. It reports whether
// that changes a limit.
func (k *limitKeys) learn(key string, value []byte, revision uint64) bool {
	if strings.HasPrefix(key, lease.Prefix) {
		_, known := k.leases[key]
		if len(value) == 0 {
			delete(k.leases, key)
		} else {
			k.leases[strings.Clone(key)] = revision
		}
		return known != (len(value) > 0)
	}
	name, _, ok := limit.ParseKey(key)
	if !ok {
		return false
	}
	before := k.keys[key]
	holder := limitKey{limit: strings.Clone(name), revision: revision}
	if json.Unmarshal(value, &holder.LimitHolder) != nil || holder.WorkerID == "" {
		delete(k.keys, key)
		return before.WorkerID != ""
	}
	k.keys[strings.Clone(key)] = holder
	return before.LimitHolder != holder.LimitHolder
}

// expire removes what is older than a revision, and reports whether that changes a
// limit.
func (k *limitKeys) expire(first uint64) (changed bool) {
	for key, revision := range k.leases {
		if revision < first {
			delete(k.leases, key)
			changed = true
		}
	}
	for key, held := range k.keys {
		if held.revision < first {
			delete(k.keys, key)
			changed = true
		}
	}
	return changed
}

func (k *limitKeys) list() []Limit {
	limits := make(map[string]*Limit)
	for _, held := range k.keys {
		if _, valid := k.leases[lease.Prefix+topology.Token(held.WorkerID)]; !valid {
			continue
		}
		l := limits[held.limit]
		if l == nil {
			l = &Limit{Name: held.limit}
			limits[held.limit] = l
		}
		l.InUse++
		l.Holders = append(l.Holders, held.LimitHolder)
	}
	list := []Limit{}
	for _, l := range limits {
		slices.SortFunc(l.Holders, func(a, b LimitHolder) int {
			return cmp.Or(cmp.Compare(a.WorkerID, b.WorkerID), cmp.Compare(a.JobID, b.JobID))
		})
		list = append(list, *l)
	}
	slices.SortFunc(list, func(a, b Limit) int { return cmp.Compare(a.Name, b.Name) })
	return list
}
