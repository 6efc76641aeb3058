package limit

import (
	"strconv"
	"strings"
)

// Prefix begins the keys of session limits. No job id has a dot.
const Prefix = "limit."

// limitKey is one key of a limit.
type limitKey struct {
	limit string
	n     int
}

func (p limitKey) key() string { return Prefix + p.limit + "." + strconv.Itoa(p.n) }

// ParseKey returns the limit and the number of one of its keys, and false if the key
// is not one of a limit.
func ParseKey(key string) (limit string, n int, ok bool) {
	rest, ok := strings.CutPrefix(key, Prefix)
	i := strings.LastIndexByte(rest, '.')
	if !ok || i < 0 {
		return "", 0, false
	}
	n, err := strconv.Atoi(rest[i+1:])
	return rest[:i], n, err == nil
}

// holder is the value of a key.
type holder struct {
	WorkerID string `json:"worker_id"`
	JobID    string `json:"job_id"`

	revision uint64
	writing  bool // this worker is writing it
}
