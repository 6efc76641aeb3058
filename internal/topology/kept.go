package topology

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
)

// Kept is a stream or bucket that workers need.
type Kept struct {
	Stream string // its name as a stream, for a bucket that of the one behind it
	Object string // as errors and logs name it: "stream AVATAR_JOBS", "bucket AVATAR_STATE"
	// Critical means that workers can't go on without what was in it. An empty one
	// in its place would hide the loss.
	Critical bool
}

// Name is that of the stream or bucket, without saying which it is.
func (k Kept) Name() string { return k.Object[strings.IndexByte(k.Object, ' ')+1:] }

// Object names a stream as people know it: the bucket that it is behind, or itself.
func Object(stream string) string {
	for _, prefix := range []string{"KV_", "OBJ_"} {
		if bucket, ok := strings.CutPrefix(stream, prefix); ok {
			return "bucket " + bucket
		}
	}
	return "stream " + stream
}

// Kept lists every stream and bucket of a fleet.
func (n Names) Kept() []Kept {
	stream := func(name string) Kept { return Kept{Stream: name, Object: "stream " + name} }
	bucket := func(kind, name string) Kept { return Kept{Stream: kind + name, Object: "bucket " + name} }
	list := []Kept{
		stream(n.JobsStream()), stream(n.EventsStream()), stream(n.DLQStream()),
		stream(n.FramesStream()), stream(n.AudioStream()), stream(n.UsageStream()), stream(n.TotalsStream()),
		bucket("KV_", n.StateBucket()), bucket("KV_", n.FleetBucket()),
		bucket("OBJ_", n.AudioFilesBucket()), bucket("OBJ_", n.RecordingsBucket()),
	}
	for i, k := range list {
		list[i].Critical = k.Stream == n.JobsStream() || k.Stream == "KV_"+n.StateBucket()
	}
	return list
}

// Kept lists what Ensure has opened, but for the consumers.
func (h Handles) Kept(n Names) []Kept {
	list := n.Kept()
	if h.Totals == nil {
		list = slices.DeleteFunc(list, func(k Kept) bool { return k.Stream == n.TotalsStream() })
	}
	return list
}

// Restore makes a missing stream or bucket as Ensure would. It is for one that was
// deleted while a worker runs. Its errors are those of Ensure.
func Restore(ctx context.Context, js jetstream.JetStream, n Names, s Settings, missing Kept) error {
	maxJob, err := jobMaxSize(js.Conn().MaxPayload())
	if err != nil {
		return err
	}
	e := ensurer{js: js, names: n, settings: s}
	for _, want := range s.streams(n, maxJob) {
		if want.Name == missing.Stream {
			_, err := e.stream(ctx, want)
			return err
		}
	}
	switch missing.Stream {
	case "KV_" + n.StateBucket():
		_, err = e.keyValue(ctx, s.state(n))
	case "KV_" + n.FleetBucket():
		_, err = e.keyValue(ctx, s.fleet(n))
	case "OBJ_" + n.AudioFilesBucket():
		_, err = e.objects(ctx, s.audioFiles(n))
	case "OBJ_" + n.RecordingsBucket():
		_, err = e.objects(ctx, s.recordings(n))
	default:
		err = fmt.Errorf("topology: workers do not use %s", missing.Object)
	}
	return err
}
