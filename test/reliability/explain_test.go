package reliability

import (
	"context"
	"encoding/json"
	"time"
)

// explain says what is known of the jobs that are still in the queue: whether
// they are delivered again and again, or by nobody.
func (f *fleet) explain() {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	stream, err := f.js.Stream(ctx, f.names.JobsStream())
	if err != nil {
		f.t.Log(err)
		return
	}
	show := func(what string, v any) {
		text, err := json.Marshal(v)
		if err != nil {
			f.t.Error(err)
		}
		f.t.Logf("%s: %s", what, text)
	}
	state := stream.CachedInfo().State
	show("stream", state)
	consumer, err := stream.Consumer(ctx, "default")
	if err != nil {
		f.t.Log(err)
		return
	}
	show("consumer", consumer.CachedInfo())
	for seq, shown := state.FirstSeq, 0; seq <= state.LastSeq && shown < 5; seq++ {
		if msg, err := stream.GetMsg(ctx, seq); err == nil {
			f.t.Logf("message %d: %v %s", msg.Sequence, msg.Header, msg.Data)
			shown++
		}
	}
}
