package fleet

import (
	"context"
	"encoding/json"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/kv"
)

// Stored is a presence and when the server stored it.
type Stored struct {
	Presence
	Stored time.Time
}

// Read returns the presences that the bucket has now, also those of workers that
// are lost: Fresh distinguishes them. Those that this version can't read are left
// out.
func Read(ctx context.Context, bucket jetstream.KeyValue) ([]Stored, error) {
	entries, err := kv.Entries(ctx, bucket, Prefix+">")
	if err != nil {
		return nil, err
	}
	var list []Stored
	for _, entry := range entries {
		s := Stored{Stored: entry.Created()}
		if json.Unmarshal(entry.Value(), &s.Presence) == nil {
			list = append(list, s)
		}
	}
	return list, nil
}
