package session

import (
	"context"
	"runtime"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// watched is something that reports when nothing refers to it any more.
type watched struct{ _ [64]byte }

func watch(name string, freed chan<- string) *watched {
	w := new(watched)
	runtime.AddCleanup(w, func(name string) { freed <- name }, name)
	return w
}

// watchedKey is the context key of a watched.
type watchedKey struct{}

// watchedTracer puts a watched into the context of each utterance.
type watchedTracer struct {
	noop.Tracer
	freed chan<- string
}

func (w watchedTracer) Start(ctx context.Context, name string, o ...trace.SpanStartOption) (context.Context, trace.Span) {
	ctx, span := w.Tracer.Start(ctx, name, o...)
	if name == spanUtterance {
		ctx = context.WithValue(ctx, watchedKey{}, watch("context of the speech", w.freed))
	}
	return ctx, span
}

// What a session keeps, it keeps for as long as it waits for the backend, which may
// be hours.
func TestWaitingSessionDropsWhatItsStartNeeded(t *testing.T) {
	b := &backend{session: func(p *peer) {
		p.confirm()
		for p.read() != nil { // to its end
		}
	}}
	freed := make(chan string, 3)
	c := overTCP(t, b, Options{Tracer: watchedTracer{freed: freed}, StallTimeout: time.Hour})
	start := func() Call {
		job, speech := watch("parameters", freed), watch("speech", freed)
		p := params()
		p.Config = func(context.Context) (AudioConfig, error) {
			runtime.KeepAlive(job)
			return AudioConfig{SampleRate: 16000}, nil
		}
		said := chunks{data: [][]byte{{1, 2}}}
		return mustOpen(t, c, p).Start(context.Background(), Utterance{Speech: keepingSpeech{&said, speech}})
	}
	call := start()
	deadline := time.After(time.Minute)
	for left := map[string]bool{"parameters": true, "speech": true, "context of the speech": true}; len(left) > 0; {
		runtime.GC()
		select {
		case name := <-freed:
			delete(left, name)
		case <-time.After(time.Millisecond): // the next collection may free it
		case <-deadline:
			t.Fatalf("still kept: %v", left)
		}
	}
	runtime.KeepAlive(call)
}

// keepingSpeech is speech that refers to something.
type keepingSpeech struct {
	Speech
	kept *watched
}

func (k keepingSpeech) Next(ctx context.Context) ([]byte, time.Duration, error) {
	defer runtime.KeepAlive(k.kept)
	return k.Speech.Next(ctx)
}
