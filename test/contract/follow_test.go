package contract

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
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
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestAPublisherThatFollowsOnlyTheDocumentGetsASession(t *testing.T) {
	for _, message := range []string{"Job", "JobProtobuf"} {
		f := follow(limited(t), t, true)
		examples := f.message("takeJob", "Job").Examples
		if len(examples) < 5 {
			t.Errorf("only %d examples of a job were found", len(examples))
		}
		for _, e := range examples {
			t.Run(message+"/"+e.Name, func(t *testing.T) {
				in := *f
				in.t = t
				in.session(limited(t), message, in.job(e.Name, "ok-avatar"))
			})
		}
	}
}

// session publishes a job and listens to its end.
func (f *following) session(ctx context.Context, message string, job follower.Example) {
	f.t.Helper()
	id := f.id(job)
	events, frames := f.listen("tellEvent", id), f.listen("sendFrame", id)
	f.upload(ctx, job)
	f.store(ctx, "takeJob", message, nil, job)
	if fields, _ := job.Payload.(map[string]any); fields["live"] != nil {
		f.speak(ctx, id)
		// Silence would end the session too, but later.
		silence, _ := fields["live"].(map[string]any)["max_silence"].(string)
		limit, err := time.ParseDuration(silence)
		if err != nil {
			f.t.Fatal(err)
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	heard := f.until(ctx, events, "Completed")
	if got := names(heard); !slices.Equal(got, []string{"Started", "Completed"}) {
		f.t.Errorf("events are %v", got)
	}
	late, err := f.Stored(ctx, f.operation("tellEvent"), id)
	if err != nil {
		f.t.Fatal(err)
	}
	if !slices.Contains(names(late), "Completed") {
		f.t.Errorf("who comes late finds %v", names(late))
	}
	completed := heard[len(heard)-1]
	switch output := heard[0].Field("output"); output {
	case "frames":
		f.wantFrames(ctx, id, frames, completed)
	case "object":
		f.wantRecording(ctx, completed)
	}
}

// upload puts speech under each name that the job gives.
func (f *following) upload(ctx context.Context, job follower.Example) {
	f.t.Helper()
	objects, err := f.message("takeJob", "Job").Objects(job.Payload)
	if err != nil {
		f.t.Fatal(err)
	}
	for _, o := range objects {
		if err := f.Upload(ctx, o, clip.WAV); err != nil {
			f.t.Fatal(err)
		}
	}
}

// speak says one utterance: a second of raw PCM in chunks, then its end and the
// session's.
func (f *following) speak(ctx context.Context, id map[string]string) {
	f.t.Helper()
	const wavHeader, tenth = 44, 3200 // bytes
	for chunk := range slices.Chunk(clip.WAV[wavHeader:wavHeader+10*tenth], tenth) {
		f.store(ctx, "takeLiveAudio", "LiveAudio", id, follower.Example{Payload: chunk})
	}
	for _, end := range []string{"endOfUtterance", "endOfSession"} {
		f.store(ctx, "takeLiveAudio", "LiveAudio", id, f.example("takeLiveAudio", "LiveAudio", end))
	}
}

// wantFrames checks that as many frames came as the outcome says, the last one
// marked as the document marks it; and that who comes late finds the same.
func (f *following) wantFrames(ctx context.Context, id map[string]string, frames *follower.Feed, completed *follower.Received) {
	f.t.Helper()
	count, err := strconv.Atoi(completed.Field("utterances", "0", "frames"))
	if err != nil || count == 0 {
		f.t.Fatalf("no frames: %s", completed.Body)
	}
	late, err := f.Stored(ctx, f.operation("sendFrame"), id)
	if err != nil {
		f.t.Fatal(err)
	}
	if len(late) != count {
		f.t.Fatalf("%d frames are stored, want %d", len(late), count)
	}
	marks := slices.Sorted(maps.Keys(f.example("sendFrame", "Frame", "lastOfAnUtterance").Headers))
	for i := range count {
		frame, err := frames.Next(ctx)
		if err != nil {
			f.t.Fatalf("frame %d of %d: %v", i+1, count, err)
		}
		if !bytes.Equal(frame.Body, late[i].Body) {
			f.t.Errorf("frame %d is another one in the stream", i+1)
		}
		last := true
		for _, name := range marks {
			last = last && frame.Headers[name] != ""
		}
		if last != (i == count-1) {
			f.t.Errorf("frame %d of %d has %v", i+1, count, frame.Headers)
		}
	}
}

// wantRecording checks that the recording is envelopes behind their lengths.
func (f *following) wantRecording(ctx context.Context, completed *follower.Received) {
	f.t.Helper()
	objects, err := completed.Message.Objects(completed.JSON)
	if err != nil || len(objects) != 1 {
		f.t.Fatalf("the recording is not said: %v, %v: %s", objects, err, completed.Body)
	}
	data, err := f.Download(ctx, objects[0])
	if err != nil || len(data) == 0 {
		f.t.Fatalf("%v has %d bytes: %v", objects[0], len(data), err)
	}
	for len(data) > 0 {
		size, n := binary.Uvarint(data)
		if n <= 0 || size > uint64(len(data)-n) {
			f.t.Fatal("no length before an envelope")
		}
		if err := f.message("sendFrame", "Frame").Decode(data[n:][:size]); err != nil {
			f.t.Fatal(err)
		}
		data = data[uint64(n)+size:]
	}
}

func TestWhoFollowsOnlyTheDocumentCancelsAJob(t *testing.T) {
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("live", "ok-avatar")
	id := f.id(job)
	events := f.listen("tellEvent", id)
	f.store(ctx, "takeJob", "Job", nil, job)
	f.until(ctx, events, "Started")
	for range 2 {
		f.control(ctx, "cancel", id, "cancelled")
	}
	f.until(ctx, events, "Cancelled")

	job = f.job("inline", "ok-avatar")
	id = f.id(job)
	f.control(ctx, "cancel", map[string]string{"job_id": "never-published"}, "requested")
	events = f.listen("tellEvent", id)
	f.store(ctx, "takeJob", "Job", nil, job)
	f.until(ctx, events, "Completed")
	f.control(ctx, "cancel", id, "tooLate")
}

func TestWhoFollowsOnlyTheDocumentInterruptsAnUtterance(t *testing.T) {
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("inline", "hang-avatar") // says nothing, until it is interrupted
	id := f.id(job)
	events := f.listen("tellEvent", id)
	f.control(ctx, "interrupt", id, "notRunning")
	f.store(ctx, "takeJob", "Job", nil, job)
	f.until(ctx, events, "Started")
	request := f.example("obey", "ControlRequest", "interrupt")
	reply := f.send(ctx, "obey", "ControlRequest", id, request)
	for reply.Field("status") == "not_running" {
		reply = f.send(ctx, "obey", "ControlRequest", id, request)
	}
	if reply.Field("status") != "interrupted" {
		t.Errorf("the answer is %s", reply.Body)
	}
	heard := f.until(ctx, events, "Completed")
	if got := heard[len(heard)-1].Field("utterances", "0", "interrupted"); got != "true" {
		t.Errorf("completed says %s", heard[len(heard)-1].Body)
	}
}

// control sends the example of a request, and wants an answer like that example.
func (f *following) control(ctx context.Context, request string, id map[string]string, want string) {
	f.t.Helper()
	reply := f.send(ctx, "obey", "ControlRequest", id, f.example("obey", "ControlRequest", request))
	example, err := reply.Message.Example(want)
	if err != nil {
		f.t.Fatal(err)
	}
	fields, _ := example.Payload.(map[string]any)
	for name, value := range fields {
		if value == fields["job_id"] {
			value = id["job_id"]
		}
		if got := reply.Field(name); got != fmt.Sprint(value) {
			f.t.Errorf("%s: %s is %q in %s, want %q", request, name, got, reply.Body, value)
		}
	}
}

func TestWhoFollowsOnlyTheDocumentSeesAJobGivenUp(t *testing.T) {
	for _, message := range []string{"Job", "JobProtobuf"} {
		ctx := limited(t)
		f := follow(ctx, t, true)
		job := f.job("object", "ok-avatar") // and its speech was not uploaded
		id := f.id(job)
		events, failures, letters := f.listen("tellEvent", id), f.listen("tellError", nil), f.listen("giveUp", nil)
		f.store(ctx, "takeJob", message, nil, job)
		heard := f.until(ctx, events, "DeadLettered")
		told := heard[len(heard)-1]
		f.until(ctx, failures, "ErrorEvent")
		letter := f.until(ctx, letters, "DeadLetter")[0]
		if told.Field("dead_letter") != letter.Subject {
			t.Errorf("the dead letter is on %s, the event says %s", letter.Subject, told.Body)
		}
		if got, err := letter.Message.ID(letter.Headers, nil); err != nil || got != id["job_id"] {
			t.Errorf("the dead letter is of job %q: %v", got, err)
		}
	}
}

func TestWhoFollowsOnlyTheDocumentSeesAnAppWait(t *testing.T) {
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("inline", "fail-creditsExhausted")
	events, alerts := f.listen("tellEvent", f.id(job)), f.listen("alert", nil)
	f.store(ctx, "takeJob", "Job", nil, job)
	f.until(ctx, events, "Held")
	f.until(ctx, alerts, "CircuitOpened")
}

func TestWhoFollowsOnlyTheDocumentLearnsOfADuplicate(t *testing.T) {
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("object", "ok-avatar")
	f.upload(ctx, job)
	first, again := f.store(ctx, "takeJob", "Job", nil, job), f.store(ctx, "takeJob", "Job", nil, job)
	if again.Field("duplicate") != "true" || again.Field("seq") != first.Field("seq") {
		t.Errorf("acknowledged with %s, then %s", first.Body, again.Body)
	}
	job = f.job("inline", "ok-avatar")
	events := f.listen("tellEvent", f.id(job))
	first = f.store(ctx, "takeJob", "Job", nil, job)
	f.until(ctx, events, "Completed") // of two that wait, either counts
	again = f.store(ctx, "takeJob", "Job", nil, job)
	heard := f.until(ctx, events, "Duplicate")
	duplicate := heard[len(heard)-1]
	if duplicate.Field("stream_seq") != again.Field("seq") || duplicate.Field("kept_seq") != first.Field("seq") {
		t.Errorf("duplicate says %s, the acknowledgements %s and %s", duplicate.Body, first.Body, again.Body)
	}
}

func TestAJobThatIsTooLargeIsRefusedAsTheDocumentSays(t *testing.T) {
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("inline", "ok-avatar")
	job.Payload = replaced(job.Payload, strings.NewReplacer("AAABAAIAAwA=", strings.Repeat("AAAA", int(f.MaxPayload()-48<<10)/4)))
	answer := f.send(ctx, "takeJob", "Job", nil, job)
	if answer.Message.Name != "NotStored" {
		t.Errorf("the answer is %s", answer.Body)
	}
}

func TestWithoutAWorkerNobodyAnswersAsTheDocumentSays(t *testing.T) {
	ctx := limited(t)
	f := follow(ctx, t, false)
	job := f.job("inline", "ok-avatar")
	for operation, m := range map[string]string{"takeJob": "Job", "obey": "ControlRequest"} {
		e := job
		if operation == "obey" {
			e = f.example(operation, m, "cancel")
		}
		_, err := f.Send(ctx, f.operation(operation), f.id(job), f.message(operation, m), e.Headers, e.Payload)
		if err == nil || !strings.Contains(err.Error(), "no responders") {
			t.Errorf("%s: %v, want no responders", operation, err)
		}
	}
}

// What the follower knew from elsewhere would be no fault of the document.
func TestTheFollowerKnowsNothingOfTheWorker(t *testing.T) {
	files, err := filepath.Glob("follower/*.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("no sources: %v", err)
	}
	for _, file := range append(files, "follow_test.go") {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		imports := map[ast.Node]bool{}
		for _, i := range parsed.Imports {
			imports[i.Path] = true
			if file != "follow_test.go" && strings.HasPrefix(i.Path.Value, `"avatarworker/`) {
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

// known tells a subject, stream, bucket or header of the worker.
func known(text string) bool {
	return regexp.MustCompile(`(?i)"(avatar[._].*|avatar-.*|ce-.*|nats-.*)"`).MatchString(text)
}
