package api

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/output"
	"avatarworker/internal/status"
)

var update = flag.Bool("update", false, "write the golden files")

// operation describes a route in the document.
type operation struct {
	method, path, summary string
	parameters            []parameter
	request               any    // its type; nil: none
	example               string // of the request; "": none
	response              any    // its type
	statuses              []int  // besides 200
	at                    string // a path with values that the stubs know
}

type parameter struct {
	Name        string         `json:"name"`
	In          string         `json:"in"`
	Description string         `json:"description"`
	Required    bool           `json:"required,omitempty"`
	Schema      map[string]any `json:"schema"`
}

func text(name, description string) parameter {
	return parameter{Name: name, In: "query", Description: description, Schema: map[string]any{"type": "string"}}
}

func several(name, description string) parameter {
	return parameter{Name: name, In: "query", Description: description + "; may be repeated, or have commas between several", Schema: map[string]any{"type": "array", "items": map[string]any{"type": "string"}}}
}

func limit() parameter {
	return parameter{Name: "limit", In: "query", Description: "most entries", Schema: map[string]any{"type": "integer", "minimum": 1, "maximum": maxLimit, "default": defaultLimit}}
}

const ago = " (RFC 3339, or how long ago such as 90m)"

func operations() []operation {
	jobs := []parameter{
		several("state", "in this state: "+join(status.States())), several("queue", "of this queue"), several("app", "of this app"), several("avatar", "of this avatar"),
		{Name: "label", In: "query", Description: "with this label, KEY=VALUE; of several, all", Schema: map[string]any{"type": "array", "items": map[string]any{"type": "string"}}},
		several("code", "whose last failure, or what holds them, has this code; expired jobs have deadlineExceeded"), text("older", "published before this time"+ago), text("newer", "published at this time or later"+ago),
		{Name: "sort", In: "query", Description: "newest first, longest running first, or most connected time first", Schema: map[string]any{"type": "string", "enum": status.Orders(), "default": status.ByAge}},
		{Name: "by", In: "query", Description: "count the jobs by queue, app, avatar, code or label:NAME instead of listing them: `groups`, those with the most jobs first", Schema: map[string]any{"type": "string"}}, limit(),
	}
	letters := []parameter{
		several("code", "with this error code"), several("class", "with this error class"), several("app", "of this app"), several("job", "of this job"),
		text("before", "failed before this time"+ago), text("after", "failed at this time or later"+ago),
		{Name: "newest", In: "query", Description: "newest first", Schema: map[string]any{"type": "boolean", "default": false}}, limit(),
	}
	const day = " (a day such as 2026-03-01, UTC; RFC 3339; or how long ago such as 90m)"
	sums := []parameter{
		{Name: "by", In: "query", Description: "what to sum by: app, queue, avatar, day or label:NAME", Schema: map[string]any{"type": "string", "default": cost.ByApp}},
		text("since", "sessions confirmed at this time or later"+day), text("until", "sessions confirmed before this time"+day),
	}
	get := func(path, summary string, parameters []parameter, response any, at string, statuses ...int) operation {
		return operation{method: http.MethodGet, path: path, summary: summary, parameters: parameters, response: response, at: at, statuses: statuses}
	}
	post := func(path, summary string, request any, example string, response any, at string, statuses ...int) operation {
		return operation{method: http.MethodPost, path: path, summary: summary, request: request, example: example, response: response, at: at, statuses: statuses}
	}
	return []operation{
		get("/overview", "The state of the fleet", nil, overview{}, "/overview"),
		get("/jobs", "Jobs by filter, those that only wait in their queue among them", jobs, jobList{}, "/jobs?state=retrying&label=customer=acme&newer=24h"),
		get("/jobs/{id}", "A job: its record, its history, its cost", nil, status.Job{}, "/jobs/j1", 404),
		get("/queues", "Queues", nil, queueList{}, "/queues"),
		get("/workers", "Workers", nil, workerList{}, "/workers"),
		get("/circuits", "Circuits that are not closed", nil, circuitList{}, "/circuits"),
		get("/limits", "Session limits in use", nil, limitList{}, "/limits"),
		get("/storage", "How full the streams and buckets are", nil, storageList{}, "/storage"),
		get("/failures", "Failed attempts by code over the last day", nil, status.Failures{}, "/failures"),
		get("/dead-letters", "Dead letters by filter", letters, letterList{}, "/dead-letters?newest=true"),
		get("/dead-letters/{seq}", "A dead letter with its secrets hidden, and what its error means", nil, dlq.Masked{}, "/dead-letters/17", 404),
		get("/alerts", "The newest alerts", []parameter{limit()}, alertList{}, "/alerts"),
		get("/codes", "Error codes: what they mean, and what a worker does about each", nil, codeList{}, "/codes"),
		get("/cost", "What sessions cost, and how budgets stand", sums, costSums{}, "/cost?by=label:customer&since=2026-02-01&until=2026-03-01"),
		get("/recordings", "Recordings", []parameter{limit()}, recordingList{}, "/recordings"),
		post("/jobs/{id}/cancel", "End a job, running or not", cancelRequest{}, `{"if_unknown":true}`, jobChange{}, "/jobs/j1/cancel", 404, 409),
		post("/jobs/{id}/retry", "Deliver a job at once that is in backoff or held", retryRequest{}, `{"probe":true}`, jobChange{}, "/jobs/j1/retry", 404, 409),
		post("/dead-letters/{seq}/replay", "Publish a dead letter's job again, as it is or corrected", replayRequest{}, `{"set":["avatar_id=v2"],"dry_run":true}`, dlq.Result{}, "/dead-letters/17/replay", 404),
		post("/dead-letters/{seq}/remove", "Remove a dead letter for good", removeRequest{}, "", removed{}, "/dead-letters/17/remove", 404),
		post("/queues/{name}/pause", "Stop the deliveries of a queue", pauseRequest{}, `{"for":"30m"}`, queueChange{}, "/queues/default/pause", 404),
		post("/queues/{name}/resume", "End the pause of a queue", resumeRequest{}, "", queueChange{}, "/queues/default/resume", 404),
		post("/workers/{id}/drain", "Have a worker end as after SIGTERM", drainRequest{}, "", drained{}, "/workers/w-1/drain", 404),
		post("/circuits/probe", "Let one job of an open circuit through", circuitRequest{}, `{"app_id":"a1","region":"us-west"}`, circuitChanges{}, "/circuits/probe", 404),
		post("/circuits/close", "Close an open circuit", circuitRequest{}, `{"app_id":"a1"}`, circuitChanges{}, "/circuits/close", 404),
	}
}

// schemas makes JSON schemas of Go types, with their comments as descriptions.
type schemas struct {
	t     *testing.T
	named map[string]any
	types map[string]reflect.Type
	docs  map[string]map[string]string // of fields, by type and field
}

func (s *schemas) of(t reflect.Type) map[string]any {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return map[string]any{"type": "string", "format": "date-time"}
	case t == reflect.TypeFor[json.RawMessage]():
		return map[string]any{}
	case t == reflect.TypeFor[[]byte]():
		return map[string]any{"type": "string", "contentEncoding": "base64"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.of(t.Elem())
	case reflect.String:
		return map[string]any{"type": "string"}
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Float64:
		return map[string]any{"type": "number"}
	case reflect.Int, reflect.Int32, reflect.Int64:
		return map[string]any{"type": "integer"}
	case reflect.Uint64:
		return map[string]any{"type": "integer", "minimum": 0}
	case reflect.Slice:
		return map[string]any{"type": "array", "items": s.of(t.Elem())}
	case reflect.Map:
		return map[string]any{"type": "object", "additionalProperties": s.of(t.Elem())}
	case reflect.Struct:
		return map[string]any{"$ref": "#/components/schemas/" + s.name(t)}
	default:
		s.t.Fatalf("there is no schema of %s", t)
		return nil
	}
}

// names are those of types whose own name says too little outside their package.
var names = map[reflect.Type]string{
	reflect.TypeFor[status.Row]():    "JobRow",
	reflect.TypeFor[errors.Row]():    "ErrorCode",
	reflect.TypeFor[dlq.Entry]():     "DeadLetter",
	reflect.TypeFor[dlq.Masked]():    "WholeDeadLetter",
	reflect.TypeFor[dlq.Result]():    "Replayed",
	reflect.TypeFor[dlq.Count]():     "DeadLetterCount",
	reflect.TypeFor[event.Error]():   "ErrorEvent",
	reflect.TypeFor[output.Stored](): "Recording",
}

// name makes the schema of a struct and returns its name.
func (s *schemas) name(t reflect.Type) string {
	name := strings.ToUpper(t.Name()[:1]) + t.Name()[1:]
	if other := names[t]; other != "" {
		name = other
	}
	if other, ok := s.types[name]; ok {
		if other != t {
			s.t.Fatalf("%s and %s would have one name", other, t)
		}
		return name
	}
	s.types[name] = t
	properties, required := map[string]any{}, []string{}
	s.fields(t, properties, &required)
	slices.Sort(required)
	s.named[name] = map[string]any{"type": "object", "additionalProperties": false, "properties": properties, "required": required}
	return name
}

func (s *schemas) fields(t reflect.Type, properties map[string]any, required *[]string) {
	for i := range t.NumField() {
		f := t.Field(i)
		tag, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && tag == "":
			inner := f.Type
			if inner.Kind() == reflect.Pointer {
				inner = inner.Elem()
			}
			s.fields(inner, properties, required)
			continue
		case !f.IsExported() || tag == "-":
			continue
		case tag == "":
			s.t.Fatalf("%s.%s has no name in JSON", t, f.Name)
		}
		schema := s.of(f.Type)
		optional := strings.Contains(options, "omit")
		if f.Type.Kind() == reflect.Pointer && !optional {
			schema = map[string]any{"anyOf": []any{schema, map[string]any{"type": "null"}}}
		}
		if doc := s.doc(t)[f.Name]; doc != "" {
			schema["description"] = doc
		}
		properties[tag] = schema
		if !optional {
			*required = append(*required, tag)
		}
	}
}

// doc reads the comments of a struct's fields from its source.
func (s *schemas) doc(t reflect.Type) map[string]string {
	pkg := t.PkgPath()
	key := pkg + "." + t.Name()
	if s.docs[key] != nil {
		return s.docs[key]
	}
	files, err := filepath.Glob(filepath.Join("..", "..", "..", strings.TrimPrefix(pkg, "avatarworker/"), "*.go"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			s.t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}
			fields := map[string]string{}
			if st, ok := spec.Type.(*ast.StructType); ok {
				for _, f := range st.Fields.List {
					text := strings.TrimSpace(f.Comment.Text())
					if text == "" {
						text = strings.TrimSpace(f.Doc.Text())
					}
					for _, name := range f.Names {
						fields[name.Name] = strings.Join(strings.Fields(text), " ")
					}
				}
			}
			s.docs[pkg+"."+spec.Name.Name] = fields
			return true
		})
	}
	if s.docs[key] == nil {
		s.docs[key] = map[string]string{}
	}
	return s.docs[key]
}

var inPath = regexp.MustCompile(`\{(\w+)\}`)

// makeDocument makes the OpenAPI document, its examples answers of a handler over stubs.
func makeDocument(t *testing.T) map[string]any {
	t.Helper()
	s := &schemas{t: t, named: map[string]any{}, types: map[string]reflect.Type{}, docs: map[string]map[string]string{}}
	h := serve(t, true)
	content := func(schema map[string]any, example []byte) map[string]any {
		media := map[string]any{"schema": schema}
		if len(bytes.TrimSpace(example)) > 0 {
			media["example"] = json.RawMessage(bytes.TrimSpace(example))
		}
		return map[string]any{"application/json": media}
	}
	failed := s.of(reflect.TypeFor[problem]())
	descriptions := map[int]string{400: "A parameter or the body is wrong", 403: "Changes are switched off", 404: "It is not there", 409: "It could not be done; status says why", 503: "NATS did not answer, or not in time"}
	paths := map[string]any{}
	for _, op := range operations() {
		response := s.of(reflect.TypeOf(op.response))
		responses := map[string]any{"200": map[string]any{"description": "Done", "content": content(response, h.ask(op.method, op.at, op.example).Body.Bytes())}}
		statuses := append([]int{400, 503}, op.statuses...)
		if op.method == http.MethodPost {
			statuses = append(statuses, 403)
		}
		for _, code := range statuses {
			body := failed
			if _, ok := op.response.(jobChange); ok && (code == 404 || code == 409) {
				body = response
			}
			responses[fmt.Sprint(code)] = map[string]any{"description": descriptions[code], "content": content(body, nil)}
		}
		parameters := op.parameters
		for _, m := range inPath.FindAllStringSubmatch(op.path, -1) {
			schema := map[string]any{"type": "string"}
			if m[1] == "seq" {
				schema = map[string]any{"type": "integer", "minimum": 1}
			}
			parameters = append(parameters, parameter{Name: m[1], In: "path", Required: true, Description: m[1] + " of what is meant", Schema: schema})
		}
		id := strings.ToLower(op.method) + inPath.ReplaceAllString(strings.ReplaceAll(op.path, "/", "_"), "$1")
		doc := map[string]any{"summary": op.summary, "operationId": id, "responses": responses}
		if len(parameters) > 0 {
			doc["parameters"] = parameters
		}
		if op.request != nil {
			doc["requestBody"] = map[string]any{"content": content(s.of(reflect.TypeOf(op.request)), []byte(op.example))}
		}
		if paths[op.path] == nil {
			paths[op.path] = map[string]any{}
		}
		paths[op.path].(map[string]any)[strings.ToLower(op.method)] = doc
	}
	return map[string]any{
		"openapi": "3.1.0",
		"info": map[string]any{
			"title": "avatarworker", "version": "1",
			"description": "What the page of `avatarworker ui` shows, and what it changes if ui.write is set. Secrets are hidden: egress tokens and the queries of URLs. Changes need Content-Type: application/json, also without a body.",
		},
		"servers":    []any{map[string]any{"url": Prefix}},
		"paths":      paths,
		"components": map[string]any{"schemas": s.named},
	}
}

func TestDocumentIsWhatTheTypesSay(t *testing.T) {
	made, err := json.MarshalIndent(makeDocument(t), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	made = append(made, '\n')
	if *update {
		if err := os.WriteFile("openapi.json", made, 0o600); err != nil {
			t.Fatal(err)
		}
		return // the old one is compiled into this test
	}
	if !reflect.DeepEqual(withoutComments(t, made), withoutComments(t, document)) {
		t.Fatal("openapi.json is not what the routes and types say: make generate writes it")
	}
	h := serve(t, false)
	if w := h.ask(http.MethodGet, "/openapi.json", ""); w.Code != 200 || !bytes.Equal(bytes.TrimSpace(w.Body.Bytes()), bytes.TrimSpace(document)) {
		t.Errorf("it is not served: %d", w.Code)
	}
	var routes, described []string
	for _, r := range h.routes() {
		routes = append(routes, r.method+" "+r.path)
	}
	for _, op := range operations() {
		described = append(described, op.method+" "+op.path)
	}
	slices.Sort(routes)
	slices.Sort(described)
	if !slices.Equal(routes, described) {
		t.Errorf("served are %q, described %q", routes, described)
	}
}

// withoutComments is a document without the descriptions of fields: a comment that is
// reworded does not make it wrong.
func withoutComments(t *testing.T, data []byte) (doc map[string]any) {
	t.Helper()
	if err := json.Unmarshal(data, &doc); err != nil {
		t.Fatal(err)
	}
	components, _ := doc["components"].(map[string]any)
	named, _ := components["schemas"].(map[string]any)
	for _, schema := range named {
		object, _ := schema.(map[string]any)
		properties, _ := object["properties"].(map[string]any)
		for _, property := range properties {
			if field, ok := property.(map[string]any); ok {
				delete(field, "description")
			}
		}
	}
	return doc
}

// compiled returns the document's schemas, by the pointer to one.
func compiled(t testing.TB) func(pointer string) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(document))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	if err := c.AddResource("api:doc", doc); err != nil {
		t.Fatal(err)
	}
	return func(pointer string) *jsonschema.Schema {
		t.Helper()
		schema, err := c.Compile("api:doc#" + pointer)
		if err != nil {
			t.Fatal(err)
		}
		return schema
	}
}

func schemaOf(op operation, code int) string {
	escaped := strings.NewReplacer("~", "~0", "/", "~1", "{", "%7B", "}", "%7D").Replace(op.path)
	return fmt.Sprintf("/paths/%s/%s/responses/%d/content/application~1json/schema", escaped, strings.ToLower(op.method), code)
}

func valid(t *testing.T, schema *jsonschema.Schema, body []byte) {
	t.Helper()
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
	if err == nil {
		err = schema.Validate(v)
	}
	if err != nil {
		t.Errorf("%s is not as described: %v", body, err)
	}
}

// Every path answers as the document says, errors included; and no answer has a secret.
func TestAnswersAreAsDescribed(t *testing.T) {
	schema := compiled(t)
	h, readOnly := serve(t, true), serve(t, false)
	for _, op := range operations() {
		check := func(h served, path, body string, want int) {
			t.Helper()
			w := h.ask(op.method, path, body)
			if w.Code != want {
				t.Errorf("%s %s: %d, want %d: %s", op.method, path, w.Code, want, w.Body)
				return
			}
			valid(t, schema(schemaOf(op, want)), w.Body.Bytes())
			if strings.Contains(w.Body.String(), secret) || strings.Contains(w.Body.String(), "\\u003csecret") {
				t.Errorf("%s %s: the answer has a secret: %s", op.method, path, w.Body)
			}
		}
		check(h, op.at, op.example, 200)
		path, _, _ := strings.Cut(op.at, "?")
		check(h, path+"?nothing=1", "", 400)
		if op.method == http.MethodPost {
			check(readOnly, op.at, op.example, 403)
			check(h, op.at, `{"x":1}`, 400)
		}
	}
	for path, want := range map[string]int{
		"/jobs/other": 404, "/jobs/a.b": 400, "/dead-letters/5": 404, "/dead-letters/x": 400, "/nothing": 404, "/jobs?state=done": 400, "/dead-letters?class=bogus": 400, "/jobs?limit=0": 400, "/jobs?limit=1&limit=2": 400,
		"/jobs?sort=size": 400, "/jobs?by=label:": 400, "/jobs?older=soon": 400, "/jobs?label=x": 400, "/jobs?label=x=1&label=x=2": 400, "/dead-letters?newest=yes": 400, "/alerts?limit=x": 400, "/jobs?%zz": 400,
	} {
		w := h.ask(http.MethodGet, path, "")
		if w.Code != want {
			t.Errorf("%s: %d, want %d: %s", path, w.Code, want, w.Body)
		}
		valid(t, schema("/components/schemas/Problem"), w.Body.Bytes())
	}
}
