package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/coder/websocket"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
	"avatarworker/internal/output"
	"avatarworker/internal/session/avatarpb"
	"avatarworker/internal/topology"
)

// liveJob is the one session of a live measurement.
const liveJob = "live"

// measureLive opens one live session and speaks n short utterances, one after the
// other. It takes the time from publishing an utterance to its first frame.
func measureLive(ctx context.Context, p params, n int) (out sample, err error) {
	const warm = 20
	s := &stage{}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.withNATS(ctx); err != nil {
		return nil, err
	}
	// Of more than 2 s of speech come at least two frames.
	const perUtterance = 2
	if err := s.withBackend(ctx, params{Frames: perUtterance}); err != nil {
		return nil, err
	}
	c, err := s.with(ctx, p)
	if err != nil {
		return nil, err
	}
	nc, js, err := connect(s.nats.said.NATS)
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	names := topology.Names{}
	frames, err := nc.SubscribeSync(names.Frames(liveJob))
	if err != nil {
		return nil, err
	}
	if p.Role == "worker" {
		err = fill(ctx, s.nats.said.NATS, 1, func(int) []byte {
			return fmt.Appendf(nil, `{"id":%q,"avatar_id":"ok","live":{"sample_rate":16000}}`, liveJob)
		})
	} else {
		_, err = c.call(command{Do: "live"})
	}
	if err == nil {
		err = s.untilOpen(ctx, 1)
	}
	if err != nil {
		return nil, err
	}
	var took []float64
	for i := range n + warm {
		at := time.Now()
		msg := &nats.Msg{Subject: names.Audio(liveJob), Data: quiet[:], Header: nats.Header{audio.HeaderEnd: {"true"}}}
		if err := nc.PublishMsg(msg); err != nil {
			return nil, err
		}
		for frame := range perUtterance {
			if _, err := frames.NextMsgWithContext(ctx); err != nil {
				return nil, fmt.Errorf("frame %d of utterance %d: %w", frame+1, i+1, err)
			}
			if frame == 0 && i >= warm {
				took = append(took, micros(time.Since(at))/1e3)
			}
		}
		// What follows an utterance is not part of the next.
		if err := pause(ctx, 2*time.Millisecond); err != nil {
			return nil, err
		}
	}
	if _, err := js.PublishMsg(ctx, &nats.Msg{Subject: names.Audio(liveJob), Header: nats.Header{audio.HeaderClose: {"true"}}}); err != nil {
		return nil, err
	}
	return sample{firstFrameMedian: quantile(took, 0.5), firstFrameP99: quantile(took, 0.99)}, nil
}

// Metrics of live sessions.
const (
	firstFrameMedian = "ms to the first frame, median"
	firstFrameP99    = "ms to the first frame, p99"
)

// live relays one live session in the simplest way: each message of the audio
// stream goes to the backend, each frame to the frames stream.
func (r *bareReader) live(ctx context.Context) error {
	names := topology.Names{}
	stream, err := r.js.OrderedConsumer(ctx, names.AudioStream(), jetstream.OrderedConsumerConfig{FilterSubjects: []string{names.Audio(liveJob)}})
	if err != nil {
		return err
	}
	c, err := r.connect(ctx)
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.open = append(r.open, c)
	r.mu.Unlock()
	messages, err := stream.Messages()
	if err != nil {
		return err
	}
	r.stopLive = messages.Stop
	r.idle.Go(func() {
		for err := error(nil); err == nil; {
			var msg jetstream.Msg
			if msg, err = messages.Next(); err == nil && len(msg.Data()) > 0 {
				err = speakTo(ctx, c, msg.Data())
			}
		}
	})
	r.idle.Go(func() {
		for seq, err := 1, error(nil); err == nil; seq++ {
			err = r.read(c, func(b []byte) error { return r.publishFrame(ctx, names.Frames(liveJob), liveJob, seq, seq%2 == 0, b) })
		}
	})
	return nil
}

func speakTo(ctx context.Context, c *websocket.Conn, speech []byte) error {
	msg, err := proto.Marshal(&avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_AUDIO_INPUT,
		Data: &avatarpb.Message_ClientAudioInput{ClientAudioInput: &avatarpb.ClientAudioInput{
			ReqId: recordedRequest, End: true, Audio: speech,
		}},
	})
	if err != nil {
		return err
	}
	return c.Write(ctx, websocket.MessageBinary, msg)
}

// publishFrame publishes a frame with the headers that the worker gives it, and
// waits for the acknowledgement.
func (r *bareReader) publishFrame(ctx context.Context, subject, id string, seq int, end bool, b []byte) error {
	number := strconv.Itoa(seq)
	h := nats.Header{
		output.HeaderRun: {"1"}, output.HeaderSession: {"1"}, output.HeaderAttempt: {"1"}, output.HeaderUtterance: {"1"},
		output.HeaderReqID: {recordedRequest}, output.HeaderSeq: {number},
		jetstream.MsgIDHeader: {id + ".run1.s1.frame" + number},
	}
	if end {
		h[output.HeaderEnd] = []string{"true"}
	}
	_, err := r.js.PublishMsg(ctx, &nats.Msg{Subject: subject, Header: h, Data: b})
	return err
}
