package audio

import (
	"bytes"
	"encoding/binary"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio/sniff"
	"avatarworker/internal/errors"
)

// liveSniffed is how much of an utterance is examined to detect its kind.
const liveSniffed = 4 << 10

// liveCheck examines an utterance as it passes. Anything other than the announced
// kind of speech is refused before it reaches the backend, where it would be
// played as noise and billed.
type liveCheck struct {
	head []byte // of the utterance, as far as it is looked at; nil: looked at
	seen bool   // the head was
	wav  sniff.WAVHeaders
}

// chunk checks the next message of the utterance.
func (c *liveCheck) chunk(spec LiveSpec, msg *jetstream.RawStreamMsg) error {
	refuse := func(format string, args ...any) error {
		return errors.Newf(errors.CodeInvalidJob, errors.PhaseAudio, "live: message %d on %s "+format,
			append([]any{msg.Sequence, spec.Subject}, args...)...)
	}
	if spec.Format == PCM {
		return c.pcm(spec, msg.Data, refuse)
	}
	return c.opus(spec, msg.Data, refuse)
}

func (c *liveCheck) pcm(spec LiveSpec, data []byte, refuse func(string, ...any) error) error {
	look := data[:min(len(data), liveSniffed)] // each message may be a separate file
	if c.begin(data) {
		look = c.head
	}
	if kind, found := sniff.Detect(look); found {
		return refuse("is %s, and the job says raw PCM; %s", kind.Name, kind.LiveHint(spec.SampleRate))
	}
	c.end(len(c.head) >= liveSniffed)
	if len(data)%2 == 1 {
		return refuse("has %d bytes; 16-bit PCM has an even number in each", len(data))
	}
	if c.wav.Find(data) >= 0 {
		return refuse("has the header of a WAV file in it; publish the samples alone")
	}
	return nil
}

func (c *liveCheck) opus(spec LiveSpec, data []byte, refuse func(string, ...any) error) error {
	if !c.begin(data) {
		return nil
	}
	const mark = "OggS"
	if !bytes.HasPrefix([]byte(mark), c.head[:min(len(c.head), len(mark))]) {
		kind, found := sniff.Detect(c.head)
		if !found {
			kind.Name = "not the beginning of an Ogg file"
		}
		return refuse("is %s, and the job says ogg_opus: an utterance is one Ogg Opus stream, from its first page on", kind.Name)
	}
	page := cutPage(c.head)
	if page == nil {
		c.end(len(c.head) >= liveSniffed) // no OpusHead is that long
		return nil
	}
	if !bytes.HasPrefix(page.body, []byte("OpusHead")) {
		return refuse("is an Ogg file with %s: only Opus is taken", codecName(page.body))
	}
	if len(page.body) >= opusHeadSize {
		if original := int(binary.LittleEndian.Uint32(page.body[12:])); original > 0 && opusRate(0, original) != spec.SampleRate {
			return refuse("is Ogg Opus made from speech at %d Hz, but live.sample_rate says %d Hz", original, spec.SampleRate)
		}
	}
	c.end(true)
	return nil
}

// begin adds data to the head. It returns false if the head was examined already.
func (c *liveCheck) begin(data []byte) bool {
	if c.seen || len(data) == 0 {
		return false
	}
	c.head = append(c.head, data[:min(len(data), liveSniffed-len(c.head))]...)
	return true
}

// end drops the head once enough of it was examined.
func (c *liveCheck) end(enough bool) {
	if enough {
		c.seen, c.head = true, nil
	}
}
