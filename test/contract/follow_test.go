package contract

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/config"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/test/contract/follower"
)

// Names that stand here are the document's own: of its operations, messages,
// examples and parameters.

// following is a publisher and listener that has read the document and nothing
// else, beside a worker.
type following struct {
	t   *testing.T
	doc *follower.Document
	*follower.Client
	web string // where speech is served
}

// follow starts a server and, unless there is to be none, a worker.
func follow(ctx context.Context, t *testing.T, worker bool) *following {
	t.Helper()
	server := natstest.Start(t)
	if worker {
		startWorker(ctx, t, server.ClientURL(), func(c *config.Config) {
			c.Audio.AllowPrivateURLs = true // the speech is served on this machine
			c.Audio.EgressMargin = 100 * time.Millisecond
		})
	}
	doc := document(t)
	_, host, _ := strings.Cut(server.ClientURL(), "://")
	client, err := doc.Connect(host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if _, err := w.Write(clip.WAV); err != nil {
			t.Errorf("serving speech: %v", err)
		}
	}))
	t.Cleanup(web.Close)
	return &following{t: t, doc: doc, Client: client, web: web.URL}
}

func (f *following) operation(id string) *follower.Operation {
	f.t.Helper()
	o := f.doc.Operations[id]
	if o == nil {
		f.t.Fatalf("the document has no operation %s", id)
	}
	return o
}

func (f *following) message(operation, name string) *follower.Message {
	f.t.Helper()
	m, err := f.operation(operation).Channel.Message(name)
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

func (f *following) example(operation, message, name string) follower.Example {
	f.t.Helper()
	e, err := f.message(operation, message).Example(name)
	if err != nil {
		f.t.Fatal(err)
	}
	return e
}

// job is an example of a job with what the document leaves to its reader: an
// avatar, and a host that serves the speech.
func (f *following) job(name, avatar string) follower.Example {
	f.t.Helper()
	e := f.example("takeJob", "Job", name)
	e.Payload = replaced(e.Payload, strings.NewReplacer("my-avatar", avatar, "https://example.com", f.web))
	return e
}

func replaced(v any, r *strings.Replacer) any {
	switch v := v.(type) {
	case string:
		return r.Replace(v)
	case map[string]any:
		out := maps.Clone(v)
		for key, value := range out {
			out[key] = replaced(value, r)
		}
		return out
	case []any:
		out := slices.Clone(v)
		for i, value := range out {
			out[i] = replaced(value, r)
		}
		return out
	}
	return v
}

// id is the job's id, which is what events and frames are found by.
func (f *following) id(job follower.Example) map[string]string {
	f.t.Helper()
	id, err := f.message("takeJob", "Job").ID(job.Headers, job.Payload)
	if err != nil {
		f.t.Fatal(err)
	}
	return map[string]string{"job_id": id}
}

func (f *following) listen(operation string, parameters map[string]string) *follower.Feed {
	f.t.Helper()
	feed, err := f.Listen(f.operation(operation), parameters)
	if err != nil {
		f.t.Fatal(err)
	}
	return feed
}

// late listens as one who comes when all is said.
func (f *following) late(ctx context.Context, operation string, parameters map[string]string) *follower.Feed {
	f.t.Helper()
	feed, err := f.ReadStream(ctx, f.operation(operation), parameters)
	if err != nil {
		f.t.Fatal(err)
	}
	return feed
}

// send publishes and returns the answer.
func (f *following) send(ctx context.Context, operation, message string, parameters map[string]string, e follower.Example) *follower.Received {
	f.t.Helper()
	answer, err := f.Send(ctx, f.operation(operation), parameters, f.message(operation, message), e.Headers, e.Payload)
	if err != nil {
		f.t.Fatalf("%s of %s: %v", message, operation, err)
	}
	return answer
}

// store publishes what a stream is to keep.
func (f *following) store(ctx context.Context, operation, message string, parameters map[string]string, e follower.Example) *follower.Received {
	f.t.Helper()
	answer := f.send(ctx, operation, message, parameters, e)
	if stream := f.operation(operation).Channel.Stream; answer.Message.Name != "Stored" || answer.Field("stream") != stream {
		f.t.Fatalf("%s of %s: %s %s, want stored in %s", message, operation, answer.Message.Name, answer.Body, stream)
	}
	return answer
}

// until reads a feed to a message of that name; it returns all that came.
func (f *following) until(ctx context.Context, feed *follower.Feed, name string) []*follower.Received {
	f.t.Helper()
	var all []*follower.Received
	for {
		r, err := feed.Next(ctx)
		if err != nil {
			f.t.Fatalf("waiting for %s after %v: %v", name, names(all), err)
		}
		all = append(all, r)
		if r.Message.Name == name {
			return all
		}
	}
}

func names(all []*follower.Received) []string {
	var list []string
	for _, r := range all {
		list = append(list, r.Message.Name)
	}
	return list
}

func limited(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
	t.Cleanup(cancel)
	return ctx
}

// What the follower knew from elsewhere would be no fault of the document.
func TestTheFollowerKnowsNothingOfTheWorker(t *testing.T) {
	files, err := filepath.Glob("follower/*.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("no sources: %v", err)
	}
	tests, err := filepath.Glob("follow*_test.go")
	if err != nil || len(tests) == 0 {
		t.Fatalf("no tests: %v", err)
	}
	for _, file := range append(files, tests...) {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		imports := map[ast.Node]bool{}
		for _, i := range parsed.Imports {
			imports[i.Path] = true
			if !slices.Contains(tests, file) && strings.HasPrefix(i.Path.Value, `"avatarworker/`) {
				t.Errorf("%s imports %s", file, i.Path.Value)
			}
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			if text, ok := n.(*ast.BasicLit); ok && text.Kind == token.STRING && !imports[n] && known(text.Value) {
				t.Errorf("%s knows %s", file, text.Value)
			}
			return true
		})
	}
}

// known reports whether a text is a subject, stream, bucket or header of the worker.
func known(text string) bool {
	return regexp.MustCompile(`(?i)"(avatar[._].*|avatar-.*|ce-.*|nats-.*)"`).MatchString(text)
}
