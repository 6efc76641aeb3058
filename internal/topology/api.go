package topology

import (
	"strings"

	"github.com/nats-io/nats.go/jetstream"
)

// APIPrefix begins the subjects of the API that js talks to; it ends with a dot.
func APIPrefix(js jetstream.JetStream) string {
	o := js.Options()
	switch {
	case o.APIPrefix != "":
		return strings.TrimSuffix(o.APIPrefix, ".") + "."
	case o.Domain != "":
		return "$JS." + o.Domain + ".API."
	}
	return jetstream.DefaultAPIPrefix
}

// AtMost returns n, or what a consumer gives to one request if that is less: its
// account or its server may limit that.
func AtMost(n int, c jetstream.ConsumerConfig) int {
	if c.MaxRequestBatch > 0 {
		return min(n, c.MaxRequestBatch)
	}
	return n
}
