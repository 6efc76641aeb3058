package main

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"

	"avatarworker/internal/natsserver"
	"avatarworker/internal/simulator"
)

// natsRole is NATS with JetStream, its files in a temporary directory.
type natsRole struct{ server *natsserver.Server }

func (r *natsRole) start(context.Context, params) (answer, error) {
	server, err := natsserver.Start(natsserver.Options{Port: natsserver.RandomPort})
	if err != nil {
		return answer{}, err
	}
	r.server = server
	return answer{NATS: server.ClientURL()}, nil
}

func (r *natsRole) do(_ context.Context, c command) (answer, error) {
	return answer{}, fmt.Errorf("%s: NATS takes no commands", c.Do)
}

func (r *natsRole) stop() { _ = r.server.Shutdown() } // its files are temporary

// backendRole is the simulated backend. It answers each utterance with
// envelopes of the real size, made once.
type backendRole struct{ server *simulator.Server }

func (r *backendRole) start(ctx context.Context, p params) (answer, error) {
	r.server = simulator.New(simulator.Options{
		Addr: "127.0.0.1:0", Speed: p.Speed, Replay: exchange(p.Frames), SessionLogLimit: 10_000,
	})
	if err := r.server.Start(ctx); err != nil {
		return answer{}, err
	}
	return answer{Console: r.server.ConsoleURL(), Ingress: r.server.IngressURL(), Page: r.server.URL()}, nil
}

func (r *backendRole) do(ctx context.Context, c command) (answer, error) {
	switch c.Do {
	case "reset":
		r.server.ResetSessionLog()
		return answer{}, nil
	default:
		return answer{}, fmt.Errorf("%s: not a command of the backend", c.Do)
	}
}

func (r *backendRole) stop() { r.server.Stop() }

// The shape of real traffic (docs/protocol.md, section 4): key
// frames of 498 bytes, 2 s of motion in the first envelope, 4 s in the others,
// which makes 49,868 bytes.
const (
	keyFrameBody   = 495
	keyFramesFirst = 50
	keyFrames      = 100

	recordedConnection = "20260101000000_AbCdEfGhIjKl"
	recordedRequest    = "20260101000000_aBcDeFgHiJkL"
)

// exchange is an utterance answered with so many envelopes; 0: none is
// replayed.
func exchange(frames int) *simulator.Exchange {
	if frames == 0 {
		return nil
	}
	x := &simulator.Exchange{SampleRate: 16000, ConnectionID: recordedConnection, ReqID: recordedRequest}
	first, middle := envelope(keyFramesFirst, false), envelope(keyFrames, false)
	for i := range frames {
		switch {
		case i == frames-1:
			x.Envelopes = append(x.Envelopes, envelope(keyFrames, true))
		case i == 0:
			x.Envelopes = append(x.Envelopes, first)
		default:
			x.Envelopes = append(x.Envelopes, middle)
		}
	}
	return x
}

func envelope(keyFrames int, end bool) []byte {
	var motion []byte
	for range keyFrames {
		motion = protowire.AppendTag(motion, 1, protowire.BytesType)
		motion = protowire.AppendBytes(motion, make([]byte, keyFrameBody))
	}
	var body []byte
	body = protowire.AppendTag(body, 1, protowire.BytesType)
	body = protowire.AppendString(body, recordedConnection)
	body = protowire.AppendTag(body, 2, protowire.BytesType)
	body = protowire.AppendString(body, recordedRequest)
	if end {
		body = protowire.AppendTag(body, 3, protowire.VarintType)
		body = protowire.AppendVarint(body, 1)
	}
	body = protowire.AppendTag(body, 4, protowire.BytesType)
	body = protowire.AppendBytes(body, motion)

	const serverResponseAnimation = 5
	var b []byte
	b = protowire.AppendTag(b, 1, protowire.VarintType)
	b = protowire.AppendVarint(b, serverResponseAnimation)
	b = protowire.AppendTag(b, 6, protowire.BytesType)
	return protowire.AppendBytes(b, body)
}
