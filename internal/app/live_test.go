package app_test

import (
	"github.com/nats-io/nats.go"
)

// how a live message ends.
type ending int

const (
	going ending = iota
	end
	closing
)

// say publishes one chunk of live speech.
func (f *fleet) say(id string, chunk []byte, how ending) {
	f.t.Helper()
	h := nats.Header{}
	switch how {
	case going:
	case end:
		h["Avatar-End"] = []string{"true"}
	case closing:
		h["Avatar-Close"] = []string{"true"}
	}
	f.publishRaw(&nats.Msg{Subject: f.names.Audio(id), Header: h, Data: chunk})
}
