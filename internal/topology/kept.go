package topology

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
)

// Kept is one stream or bucket that workers need.
type Kept struct {
	Stream string // its name as a stream, for a bucket that of the one behind it
	Object string // as people know it: "stream AVATAR_JOBS", "bucket AVATAR_STATE"
	// Precious: what was in it can't be done without. An empty one in its place
	// would hide that it is gone.
	Precious bool
}

// Kept lists everything that Ensure opens, but for the consumers.
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
		list[i].Precious = k.Stream == n.JobsStream() || k.Stream == "KV_"+n.StateBucket()
	}
	return list
}

// Restore makes one of the Kept as Ensure would, where it is missing: for one
// that was deleted underneath a running worker. Its errors are Ensure's.
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
		err = fmt.Errorf("topology: %s is nothing that workers keep", missing.Object)
	}
	return err
}
