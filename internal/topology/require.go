package topology

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// LeastServer is the oldest NATS server that a fleet can use: keys with a life
// of their own (Nats-TTL, delete markers) and consumer pause came with it.
const LeastServer = "2.11"

// leastLevel is JetStream's API level of LeastServer. Older servers give none.
const leastLevel = 1

// countersServer is the oldest NATS server that has counters (Nats-Incr), and
// countersLevel its API level. A fleet on an older one has no totals.
const (
	countersServer = "2.12"
	countersLevel  = 2
)

// hasCounters reports whether the server has counters. level is as a server gives
// it; one that gives none is taken to be new enough.
func hasCounters(level string) bool {
	n, err := strconv.Atoi(level)
	return err != nil || n >= countersLevel
}

// tooOldForCounters reports whether the account's server says that it has no counters.
func tooOldForCounters(ctx context.Context, js jetstream.JetStream) bool {
	info, err := js.AccountInfo(ctx)
	return err == nil && info.API.Level < countersLevel
}

// noCounters says why a fleet has no totals.
func noCounters(js jetstream.JetStream, object string) Difference {
	return Difference{
		Object: object, Setting: "server",
		Have: "NATS " + js.Conn().ConnectedServerVersion() + ", which has no counters (sums of costs are read from the records)", Want: "NATS " + countersServer + " or later",
	}
}

// levelKey is what a server of LeastServer or later adds to a stream's metadata
// when it is asked for it.
const levelKey = "_nats.level"

// ErrServer is in the chain of an error about a server or an account that
// can't hold what workers need. Waiting does not change it.
var ErrServer = errors.New("this NATS server or account can't hold what workers need")

// requestTime bounds a request that a user may not be allowed to make: nothing
// answers it then.
const requestTime = 2 * time.Second

// lacking is a stream, or the one behind a bucket, that is to be made.
type lacking struct {
	object string // "stream AVATAR_JOBS", "bucket AVATAR_STATE"
	bytes  int64  // its limit; -1: none
}

// require checks the server and the account before anything is made, so that
// what is lacking is named once and nothing is half made. Where everything
// exists already, the account is not asked.
func (e *ensurer) require(ctx context.Context, maxJob int32) error {
	before := -1
	for {
		missing, err := e.missing(ctx, maxJob)
		if err != nil || len(missing) == 0 {
			return err
		}
		err = e.room(ctx, missing)
		if err == nil || len(missing) == before {
			return err
		}
		// Another worker that starts may just be making them: they would count as
		// there and as missing. Once nothing changes any more, it is so.
		before = len(missing)
	}
}

// missing lists what is to be made, and checks the server by what is there.
func (e *ensurer) missing(ctx context.Context, maxJob int32) (missing []lacking, err error) {
	checked, counters := false, true
	for _, want := range e.wanted(maxJob) {
		if want.stream == e.names.TotalsStream() && !counters {
			continue
		}
		s, err := e.js.Stream(ctx, want.stream)
		switch {
		case errors.Is(err, jetstream.ErrStreamNotFound):
			missing = append(missing, want.lacking)
		case err != nil:
			return nil, e.explained("", want.object, err)
		case !checked:
			checked = true
			level := s.CachedInfo().Config.Metadata[levelKey]
			counters = hasCounters(level)
			if err := checkLevel(level, e.js.Conn()); err != nil {
				return nil, err
			}
		}
	}
	return missing, nil
}

type wantedStream struct {
	stream string // its name
	lacking
}

func (e *ensurer) wanted(maxJob int32) []wantedStream {
	n, s := e.names, e.settings
	var all []wantedStream
	for _, c := range s.streams(n, maxJob) {
		all = append(all, wantedStream{c.Name, lacking{"stream " + c.Name, c.MaxBytes}})
	}
	for _, c := range []jetstream.KeyValueConfig{s.state(n), s.fleet(n)} {
		all = append(all, wantedStream{"KV_" + c.Bucket, lacking{"bucket " + c.Bucket, c.MaxBytes}})
	}
	for _, c := range []jetstream.ObjectStoreConfig{s.audioFiles(n), s.recordings(n)} {
		all = append(all, wantedStream{"OBJ_" + c.Bucket, lacking{"bucket " + c.Bucket, c.MaxBytes}})
	}
	return all
}

// checkLevel refuses a server that is too old. level is as a server gives it.
func checkLevel(level string, nc *nats.Conn) error {
	if n, err := strconv.Atoi(level); err == nil && n >= leastLevel {
		return nil
	}
	version := nc.ConnectedServerVersion()
	if version == "" {
		version = "of an unknown version"
	}
	return fmt.Errorf("%w: JetStream there is older than NATS %s, the least that workers need (connected to %s, %s): upgrade it",
		ErrServer, LeastServer, nc.ConnectedServerName(), version)
}

// room checks the account's limits against what is to be made. An account that
// does not answer, as where its user may not ask, is taken to have room.
func (e *ensurer) room(ctx context.Context, missing []lacking) error {
	short, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	account, err := e.js.AccountInfo(short)
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, nats.ErrTimeout):
		return ctx.Err()
	case err != nil:
		return e.explained("", missing[0].object, err)
	}
	if err := checkLevel(strconv.Itoa(account.API.Level), e.js.Conn()); err != nil {
		return err
	}
	if lacks := e.lacks(account, missing); len(lacks) > 0 {
		return fmt.Errorf("%w: %s. To be made are: %s", ErrServer, strings.Join(lacks, "; "), listed(missing))
	}
	return nil
}

// lacks says in which ways the account has too little.
func (e *ensurer) lacks(account *jetstream.AccountInfo, missing []lacking) (texts []string) {
	// Without tiers, what is reserved counts every replica.
	tier, copies := account.Tier, int64(e.settings.replicas())
	if own, ok := account.Tiers[fmt.Sprintf("R%d", e.settings.replicas())]; ok {
		tier, copies = own, 1
	}
	if limit := tier.Limits.MaxStreams; limit > 0 && tier.Streams+len(missing) > limit {
		texts = append(texts, fmt.Sprintf("it may have %d streams and has %d, but %d more are needed", limit, tier.Streams, len(missing)))
	}
	room, largest, kind := tier.Limits.MaxStore, tier.Limits.StoreMaxStreamBytes, "file"
	used := max(tier.ReservedStore, tier.Store)
	if e.settings.Storage == jetstream.MemoryStorage {
		room, largest, kind = tier.Limits.MaxMemory, tier.Limits.MemoryMaxStreamBytes, "memory"
		used = max(tier.ReservedMemory, tier.Memory)
	}
	needed, unbounded, tooLarge := int64(0), []string{}, []string{}
	for _, m := range missing {
		switch {
		case m.bytes <= 0:
			unbounded = append(unbounded, m.object)
		case largest > 0 && m.bytes > largest:
			tooLarge = append(tooLarge, m.object)
		}
		needed += max(m.bytes, 0) * copies
	}
	if room > 0 && needed > room-int64(used) {
		texts = append(texts, fmt.Sprintf("it may keep %s in %s storage and has %s reserved, but the size limits of what is to be made add up to %s more: raise the account's limit or lower streams.*.max_bytes",
			size(room), kind, size(int64(used)), size(needed)))
	}
	if len(tooLarge) > 0 {
		texts = append(texts, fmt.Sprintf("no stream of it may be larger than %s: lower streams.*.max_bytes for %s", size(largest), strings.Join(tooLarge, ", ")))
	}
	if (tier.Limits.MaxBytesRequired || largest > 0) && len(unbounded) > 0 {
		texts = append(texts, fmt.Sprintf("every stream of it needs a size limit: set streams.*.max_bytes for %s", strings.Join(unbounded, ", ")))
	}
	return texts
}

func listed(missing []lacking) string {
	texts := make([]string, len(missing))
	for i, m := range missing {
		texts[i] = m.object
		if m.bytes > 0 {
			texts[i] += " (" + size(m.bytes) + ")"
		}
	}
	return strings.Join(texts, ", ")
}

// size is a number of bytes as the configuration writes it, rounded up to a
// tenth of its unit.
func size(n int64) string {
	unit, name := float64(1), "B"
	for _, u := range []struct {
		unit float64
		name string
	}{{1 << 10, "KiB"}, {1 << 20, "MiB"}, {1 << 30, "GiB"}, {1 << 40, "TiB"}} {
		if float64(n) >= u.unit {
			unit, name = u.unit, u.name
		}
	}
	return strings.TrimSuffix(strconv.FormatFloat(float64(n)/unit, 'f', 1, 64), ".0") + name
}

// Answers of the server that need an explanation.
const (
	codeSubjectOverlap  = 10065
	codeNoStorage       = 10047
	codeNoMemory        = 10028
	codeNoPeers         = 10005
	codeReplicas        = 10074
	codeNoClusterRoom   = 10023
	codeAccountFull     = 10002
	codeConsumers       = 10026
	codeStreams         = 10027
	codeBytesRequired   = 10113
	codeInvalidStream   = 10052
	codeMaxAckPending   = 10121
	codeStreamTooLarge  = 10122
	codeQueueTaken      = 10100
	codeQueueUnfiltered = 10099
)

// explained adds to a server's answer what to do about it. kind may be empty.
func (e *ensurer) explained(kind, name string, err error) error {
	switch {
	case errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		return fmt.Errorf("%w: this user's account has no JetStream: enable it (jetstream: enabled in the account, or nsc edit account --js-disk-storage), "+
			"log in as a user of another account, or set nats.domain or nats.api_prefix to where JetStream is", err)
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, nats.ErrNoResponders):
		return fmt.Errorf("%w: nothing answers at %s on server %s: start NATS with JetStream (nats-server -js), "+
			"or set nats.domain or nats.api_prefix to where JetStream is", err, strings.TrimSuffix(APIPrefix(e.js), "."), e.js.Conn().ConnectedServerName())
	}
	return failed(kind, name, err)
}

func failed(kind, name string, err error) error {
	return fmt.Errorf("%s: %w%s", strings.TrimSpace(kind+" "+name), err, hint(err))
}

func hint(err error) string {
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		return ""
	}
	switch api.ErrorCode {
	case codeSubjectOverlap:
		return ": another stream takes these subjects already; remove them there or choose another nats.prefix"
	case codeNoStorage, codeNoMemory, codeNoClusterRoom:
		return ": the server has less room than the size limits need; lower them or give JetStream more"
	case codeNoPeers, codeReplicas:
		return ": nats.replicas needs more servers than are running, or than nats.placement leaves"
	case codeAccountFull:
		return ": the account may keep less than the size limits need; lower streams.*.max_bytes or raise the account's limit"
	case codeStreams:
		return ": the account may have no more streams; workers need 11 streams and buckets in all"
	case codeConsumers:
		return ": the account or the stream may have no more consumers; workers need one for each queue, and some for a short time"
	case codeBytesRequired:
		return ": the account wants a size limit for every stream; set streams.*.max_bytes"
	case codeStreamTooLarge:
		return ": the account allows no stream of that size; lower its streams.*.max_bytes"
	case codeInvalidStream:
		if strings.Contains(api.Description, "duplicates window") {
			return ": raise limits.duplicate_window of jetstream on the server to 24h, the window of dead letters"
		}
	case codeMaxAckPending:
		return ": jobs that wait for a retry stay un-acked, so that a queue needs a consumer without max_ack_pending; lift the account's limit"
	}
	return ""
}
