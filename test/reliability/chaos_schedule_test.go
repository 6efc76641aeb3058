package reliability

import (
	"math/rand/v2"
	"slices"
	"time"
)

// The kinds of faults.
const (
	killWorker    = "worker killed"
	freezeWorker  = "worker frozen"
	killNode      = "NATS node killed"
	stopNode      = "NATS node stopped"
	loseNode      = "NATS node killed, its disk lost"
	cutQueue      = "NATS cut off from a worker"
	slowQueue     = "NATS slow for a worker"
	narrowQueue   = "NATS narrow for a worker"
	cutBackend    = "backend cut off from a worker"
	slowBackend   = "backend slow for a worker"
	narrowBackend = "backend narrow for a worker"
	backendDown   = "backend down"
	storm         = "error storm"
	chaosNodes    = 3
)

// fault is one thing that is broken for a while.
type fault struct {
	kind   string
	at     time.Duration // since the start
	lasts  time.Duration
	target int    // worker or node
	what   string // of a storm: the account's fault
	amount int    // ms of latency, or KB a second
}

// lane is a row of faults that follow each other; lanes overlap.
type lane struct {
	min, max time.Duration // pause between faults
	draw     func(r *rand.Rand) fault
}

func between(r *rand.Rand, low, high time.Duration) time.Duration {
	return low + time.Duration(r.Int64N(int64(high-low)))
}

func pick[T any](r *rand.Rand, list ...T) T { return list[r.IntN(len(list))] }

func seeded(n int) *rand.Rand { return rand.New(rand.NewPCG(uint64(n), 0)) }

func lanes(lease time.Duration, workers int) []lane {
	return []lane{
		{4 * time.Second, 12 * time.Second, func(r *rand.Rand) fault {
			f := fault{kind: killWorker, target: r.IntN(workers), lasts: between(r, 200*time.Millisecond, 3*time.Second)}
			if r.IntN(3) == 0 {
				f.kind, f.lasts = freezeWorker, pick(r, time.Second, lease+3*time.Second)
			}
			return f
		}},
		{15 * time.Second, 25 * time.Second, func(r *rand.Rand) fault {
			return fault{kind: pick(r, killNode, killNode, stopNode, loseNode), target: r.IntN(chaosNodes), lasts: between(r, time.Second, 5*time.Second)}
		}},
		{3 * time.Second, 8 * time.Second, func(r *rand.Rand) fault {
			f := fault{kind: pick(r, cutQueue, slowQueue, narrowQueue, cutBackend, slowBackend, narrowBackend), target: r.IntN(workers)}
			f.lasts = between(r, 500*time.Millisecond, 5*time.Second)
			f.amount = 50 + r.IntN(250)
			if f.kind == cutQueue && r.IntN(4) == 0 {
				f.lasts = lease + 2*time.Second
			}
			return f
		}},
		{8 * time.Second, 16 * time.Second, func(r *rand.Rand) fault {
			f := fault{kind: backendDown, lasts: between(r, 500*time.Millisecond, 3*time.Second)}
			if r.IntN(2) == 0 {
				f.kind, f.what = storm, pick(r, "serverError", "upstreamError", "status-503", "connectionClosed", "creditsExhausted", "billingRequired")
			}
			return f
		}},
	}
}

// schedule draws the faults of a run: the same seed and length give the same.
func schedule(seed uint64, length, lease time.Duration, workers int) []fault {
	var all []fault
	for i, l := range lanes(lease, workers) {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		for at := between(r, l.min/2, l.max/2); ; {
			f := l.draw(r)
			f.at = at
			if at+f.lasts > length {
				break
			}
			all = append(all, f)
			at += f.lasts + between(r, l.min, l.max)
		}
	}
	slices.SortFunc(all, func(a, b fault) int { return int(a.at - b.at) })
	return all
}

// chaosJob draws the job with this number.
func chaosJob(r *rand.Rand, id string, deadline time.Time) map[string]any {
	var j map[string]any
	switch n := r.IntN(20); {
	case n < 6:
		j = job(id, "ok", 1+r.IntN(3))
	case n < 12:
		j = job(id, pick(r, "slow-200", "slow-500", "slow-1000"), 1+r.IntN(3))
	case n < 15:
		j = job(id, pick(r, "slow-100", "slow-300"), 1+r.IntN(2))
		j["output"] = map[string]any{"object": map[string]any{}}
	case n < 18:
		j = job(id, "flaky-"+pick(r, "connectionClosed", "upstreamError", "egressUnavailable")+"-1-"+id, 1)
	default:
		j = job(id, pick(r, "fail-avatarNotFound", "fail-invalidRequest"), 1)
	}
	if r.IntN(4) == 0 && j["output"].(map[string]any)["discard"] != nil {
		withFrames(j)
	}
	if r.IntN(5) == 0 {
		j["deadline"] = deadline.Format(time.RFC3339)
	}
	return j
}
