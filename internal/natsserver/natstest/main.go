package natstest

import (
	"flag"
	"fmt"
	"runtime"
	"strconv"
	"testing"

	"go.uber.org/goleak"
)

// parallel is how many tests of a package run at once. They mostly wait for
// servers, leases and cooldowns, so more of them run than there are processors.
const parallel = 12

// Main runs a package's tests, up to 12 at a time unless Parallel or -parallel
// says otherwise, and fails if they leave goroutines behind.
func Main(m *testing.M) {
	Parallel(parallel)
	goleak.VerifyTestMain(m, LibraryLeaks()...)
}

// LibraryLeaks makes goleak ignore three goroutines. One nats.go 1.55 leaves behind: if an
// object is stored before the goroutine first runs, cleanupReplySub has set its channel
// to nil, and it never ends. The others are nats-server 2.15's, which wait up to half a
// minute for the consumer of a stream's source or mirror, also when the server has ended.
func LibraryLeaks() []goleak.Option {
	return []goleak.Option{
		goleak.IgnoreTopFunction("github.com/nats-io/nats.go/jetstream.(*jetStream).resetPendingAcksOnReconnect"),
		goleak.IgnoreTopFunction("github.com/nats-io/nats-server/v2/server.(*stream).trySetupSourceConsumer.func3"),
		goleak.IgnoreTopFunction("github.com/nats-io/nats-server/v2/server.(*stream).setupMirrorConsumer.func3"),
	}
}

// Parallel lets n tests of this package run at once, or as many as there are
// processors if those are more. The first call counts; a -parallel flag
// overrides it.
func Parallel(n int) {
	// m.Run parses the command line, if TestMain has not: what is set before is
	// the default.
	p := flag.Lookup("test.parallel")
	if p.Value.String() != p.DefValue {
		return
	}
	if err := p.Value.Set(strconv.Itoa(max(n, runtime.GOMAXPROCS(0)))); err != nil {
		panic(fmt.Sprintf("test.parallel: %v", err))
	}
}
