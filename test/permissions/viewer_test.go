package permissions_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
	"avatarworker/internal/ui"
	"avatarworker/internal/ui/api"
)

func TestViewerNeedsJustItsPermissions(t *testing.T) {
	t.Parallel()
	each(t, "viewer", viewer)
}

func TestViewerNeedsJustTheImportsOfItsAccount(t *testing.T) {
	t.Parallel()
	inAccount(t, "AVATAR_VIEWERS", func(ctx context.Context, t *testing.T, url string, refused *refusals) error {
		if err := viewer(ctx, t, url, refused); err != nil {
			return err
		}
		// Consumers that were made for reading are removed after it, but for those that
		// follow events, which end by themselves.
		admin := connect(t, url, "admin", nil)
		for stream, left := range map[string]int{"KV_AVATAR_FLEET": 0, names.EventsStream(): 2, names.DLQStream(): 0} {
			if err := becomes(ctx, admin, stream, func(s jetstream.StreamState) bool { return s.Consumers <= left }); err != nil {
				return err
			}
		}
		return nil
	})
}

func TestViewerMayChangeNothing(t *testing.T) {
	t.Parallel()
	foreign(t, "viewer",
		"avatar.jobs.default", "avatar.control.J", "avatar.workers.w.drain", "avatar.events.completed.J", "avatar.totals.day.2026-03-01.a.b", "avatar.usage.a.b", "avatar.dlq.config.x",
		"$KV.AVATAR_STATE.J", "$KV.AVATAR_STATE.replay.J", "$KV.AVATAR_STATE.lease.w", "$KV.AVATAR_FLEET.circuit.a.b", "$KV.AVATAR_FLEET.budget.a.b", "$KV.AVATAR_FLEET.worker.w", "$O.AVATAR_RECORDINGS.M.x",
		"$JS.ACK.AVATAR_JOBS.default.1.1.1.1.1", "$JS.API.CONSUMER.PAUSE.AVATAR_JOBS.default", "$JS.API.CONSUMER.CREATE.AVATAR_JOBS.x", "$JS.API.CONSUMER.MSG.NEXT.AVATAR_JOBS.default",
		"$JS.API.STREAM.MSG.DELETE.AVATAR_DLQ", "$JS.API.STREAM.PURGE.AVATAR_DLQ", "$JS.API.STREAM.DELETE.AVATAR_JOBS", "$JS.API.STREAM.UPDATE.AVATAR_JOBS",
	)
}

// shown is what there is to see: of everything something.
func shown(ctx context.Context, t *testing.T, admin client) error {
	handles := prepare(ctx, t, admin)
	for _, id := range []string{"J", "K"} {
		if err := dlq.NewWriter(admin.js, names).Write(ctx, letter(id)); err != nil {
			return err
		}
	}
	for key, r := range map[string]lifecycle.Record{
		"R": {State: lifecycle.StateRunning, WorkerID: "w"},
		"H": {State: lifecycle.StateHeld, HeldReason: lifecycle.HeldBudget},
		"J": {State: lifecycle.StateDeadLettered, LastError: &event.Error{Code: errors.CodeAvatarNotFound}},
	} {
		r.JobID, r.Run, r.StreamSeq, r.Queue, r.AppID, r.PublishedAt, r.CreatedAt = key, 1, 1, "default", "app", time.Now(), time.Now()
		data, err := json.Marshal(r)
		if err != nil {
			return err
		}
		if _, err := handles.State.Put(ctx, key, data); err != nil {
			return err
		}
	}
	for key, value := range map[string]string{"worker.w": `{"worker":"w","worker_id":"w","queues":{"default":1}}`, "circuit.app.us-west": `{"app_id":"app","region":"us-west","state":"open"}`, budget.SettingKey("app_id", budget.Month): `{"credits":3}`} {
		if _, err := handles.Fleet.Put(ctx, key, []byte(value)); err != nil {
			return err
		}
	}
	if _, err := handles.Recordings.PutBytes(ctx, "rec-of-J", []byte("recording")); err != nil {
		return err
	}
	if _, err := admin.js.Publish(ctx, names.Alerts("recurring", "serverError"), []byte(`{"code":"serverError"}`)); err != nil {
		return err
	}
	if err := leaveTraces(ctx, admin, handles); err != nil {
		return err
	}
	if _, _, err := cost.NewStore(admin.js, names, nil).Rebuild(ctx); err != nil { // some are in the counters, the others are not yet
		return err
	}
	_, err := admin.js.Publish(ctx, names.Usage("app", "default"), fmt.Appendf(nil, `{"job_id":"R","run":1,"session":2,"app_id":"app","queue":"default","credits":7,"confirmed_at":%q}`, time.Now().UTC().Format(time.RFC3339)))
	return err
}

// page is the page as a NATS user.
type page struct {
	handler http.Handler
	cookie  string
	token   string
	write   bool
}

// servePage runs the page until stop.
func servePage(ctx context.Context, c client, write bool) (p *page, stop func(), err error) {
	costs := cost.NewStore(c.js, names, nil)
	budgets := func(ctx context.Context) ([]budget.Spending, error) {
		return costs.Budgets(ctx, []budget.Rule{{Key: "app_id", Credits: 1000, Per: budget.Month}}, time.Now())
	}
	model := status.NewModel(status.NewStore(c.js, names, nil, 0).WithBudgets(budgets), time.Hour)
	store := ui.NewStore(ui.StoreOptions{NC: c.nc, JS: c.js, Names: names, Statuses: model, Costs: costs, Log: zerolog.Nop()})
	handler, err := api.New(api.Options{
		Reader: model, Letters: dlq.NewStore(c.js, names, nil), Write: write, Permitted: store.Permitted, Recordings: store.StoredRecordings, Costs: costs, Budgets: budgets, Log: zerolog.Nop(),
		Changes: func(ctx context.Context) (api.Changes, error) { return store.Operator(ctx) },
	})
	if err != nil {
		return nil, nil, err
	}
	table, err := errors.NewTable(nil)
	if err != nil {
		return nil, nil, err
	}
	server, err := ui.New(ui.Options{Addr: "127.0.0.1:8090", Write: write, Reader: store, Actor: store, API: handler, Codes: table.Rows(), Logger: zerolog.Nop()})
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { model.Run(ctx) })
	running.Go(func() { store.Run(ctx) })
	return &page{handler: server.Handler(), write: write}, func() { cancel(); running.Wait() }, nil
}

var formToken = regexp.MustCompile(`name="token" value="([^"]+)"`)

func (p *page) ask(ctx context.Context, method, path, body, kind string) (code int, text string) {
	r := httptest.NewRequestWithContext(ctx, method, path, strings.NewReader(body))
	r.Host = "127.0.0.1:8090"
	if p.cookie != "" {
		r.Header.Set("Cookie", p.cookie)
	}
	if method == http.MethodPost {
		r.Header.Set("Content-Type", kind)
		r.Header.Set("Origin", "http://127.0.0.1:8090")
		r.Header.Set("Sec-Fetch-Site", "same-origin")
	}
	w := httptest.NewRecorder()
	p.handler.ServeHTTP(w, r)
	for _, c := range w.Result().Cookies() {
		p.cookie = c.Name + "=" + c.Value
	}
	out, _ := io.ReadAll(w.Body) // of memory
	if m := formToken.FindStringSubmatch(string(out)); m != nil {
		p.token = m[1]
	}
	if w.Code == http.StatusSeeOther {
		return p.ask(ctx, http.MethodGet, w.Header().Get("Location"), "", "")
	}
	return w.Code, string(out)
}

// viewer looks at each page and at each path of the API.
func viewer(ctx context.Context, t *testing.T, natsURL string, refused *refusals) error {
	if err := shown(ctx, t, connect(t, natsURL, "admin", nil)); err != nil {
		return err
	}
	p, stop, err := servePage(ctx, connect(t, natsURL, "viewer", refused), false)
	if err != nil {
		return err
	}
	defer stop()
	for path, wanted := range map[string][]string{
		"/":     {"The budget of 3 credits per month for app_id app is spent", "1 job of it is held", "No sessions are started for app app in us-west", "2 dead letters to decide on", "stream AVATAR_USAGE", "credits today"},
		"/jobs": {">R<", ">H<", "waiting"}, "/jobs/R": {">R</h1>", "History"}, "/jobs/J": {"letters/1"}, "/letters": {">J<", ">K<"}, "/letters/1": {"avatarNotFound"},
		"/alerts": {"serverError"}, "/codes": {"avatarNotFound"}, "/recordings": {"rec-of-J"},
		"/api/v1/overview": {`"spent":7`, `"failures"`}, "/api/v1/jobs": {`"R"`}, "/api/v1/jobs/R": {"R.run1.s1.error"}, "/api/v1/queues": {"default"}, "/api/v1/workers": {`"w"`},
		"/api/v1/circuits": {"us-west"}, "/api/v1/limits": {"limits"}, "/api/v1/storage": {"AVATAR_TOTALS", "AVATAR_AUDIO_FILES", "stream AVATAR_AUDIO\"", "AVATAR_FRAMES"}, "/api/v1/failures": {"serverError"}, "/api/v1/dead-letters": {`"J"`},
		"/api/v1/dead-letters/1": {"avatarNotFound"}, "/api/v1/alerts": {"recurring"}, "/api/v1/recordings": {"rec-of-J"}, "/api/v1/cost": {`"credits":7`, `"budgets":[{`}, "/api/v1/cost?by=avatar": {`"credits":7`},
	} {
		if err := p.shows(ctx, path, wanted); err != nil {
			return err
		}
	}
	return nil
}

// shows returns nil once a page shows what it should: some is read beside it.
func (p *page) shows(ctx context.Context, path string, wanted []string) error {
	for {
		asked, cancel := context.WithTimeout(ctx, 2*time.Second)
		code, text := p.ask(asked, http.MethodGet, path, "", "")
		cancel()
		missing := ""
		for _, want := range wanted {
			if !strings.Contains(text, want) {
				missing = want
			}
		}
		bad := code != http.StatusOK || strings.Contains(text, "can&#39;t be read") || strings.Contains(text, `role="alert"`) || strings.Contains(text, `"error":"`)
		switch {
		case missing == "" && !bad:
			if strings.Count(text, "<button") > strings.Count(text, "<button>Find")+strings.Count(text, `<button class="main">Show`) || !strings.HasPrefix(path, "/api/") && !strings.Contains(text, "Look only: changes are off") {
				return fmt.Errorf("%s offers changes, or does not say that they are off", path)
			}
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("%s: %d, no %q in it: %.1500s: %w", path, code, missing, text, context.Cause(ctx))
		}
		select { // as a browser asks again
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Someone who switches changes on and gives the page a viewer's password gets a text for
// each action that names what is missing, and nothing is changed.
func TestEveryActionOfAViewerIsRefusedWithItsReason(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*enough)
	defer cancel()
	natsURL := start(t, "viewer", nil)
	admin := connect(t, natsURL, "admin", nil)
	if err := shown(ctx, t, admin); err != nil {
		t.Fatal(err)
	}
	before := messages(ctx, t, admin)
	off, stop, err := servePage(ctx, connect(t, natsURL, "viewer", nil), false)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	on, stopOn, err := servePage(ctx, connect(t, natsURL, "viewer", nil), true)
	if err != nil {
		t.Fatal(err)
	}
	defer stopOn()
	for _, p := range []*page{off, on} {
		if err := (&page{handler: p.handler}).ready(ctx); err != nil {
			t.Fatal(err)
		}
		p.ask(ctx, http.MethodGet, "/", "", "")
	}
	var asking sync.WaitGroup
	for _, a := range []struct {
		path   string
		fields url.Values
		api    string
		body   string
	}{
		{"/jobs/cancel", url.Values{"id": {"R"}, "sure": {"yes"}}, "/jobs/R/cancel", ""},
		{"/jobs/retry", url.Values{"id": {"H"}}, "/jobs/H/retry", ""},
		{"/letters/replay", url.Values{"seq": {"1"}, "sure": {"yes"}}, "/dead-letters/1/replay", ""},
		{"/letters/remove", url.Values{"seq": {"2"}, "sure": {"yes"}}, "/dead-letters/2/remove", ""},
		{"/queues/pause", url.Values{"queue": {"default"}}, "/queues/default/pause", ""},
		{"/circuits/close", url.Values{"app": {"app"}, "region": {"us-west"}, "sure": {"yes"}}, "/circuits/close", `{"app_id":"app"}`},
		{"/circuits/probe", url.Values{"app": {"app"}, "region": {"us-west"}}, "/circuits/probe", `{"app_id":"app"}`},
		{"/workers/drain", url.Values{"worker": {"w"}, "sure": {"yes"}}, "/workers/w/drain", ""},
	} {
		asking.Go(func() {
			form := func(p *page) string {
				a.fields["token"], a.fields["back"] = []string{p.token}, []string{"/"}
				return a.fields.Encode()
			}
			session := *off
			if code, text := session.ask(ctx, http.MethodPost, a.path, form(off), "application/x-www-form-urlencoded"); code != http.StatusForbidden || !strings.Contains(text, "ui.write") {
				t.Errorf("%s without ui.write: %d %.600s", a.path, code, text)
			}
			if code, text := session.ask(ctx, http.MethodPost, "/api/v1"+a.api, a.body, "application/json"); code != http.StatusForbidden || !strings.Contains(text, "ui.write is off") {
				t.Errorf("%s without ui.write: %d %s", a.api, code, text)
			}
			session = *on
			const reason = "may not"
			if _, text := session.ask(ctx, http.MethodPost, a.path, form(on), "application/x-www-form-urlencoded"); !strings.Contains(text, reason) {
				i := max(strings.Index(text, "<main"), 0)
				t.Errorf("%s does not say that it is not permitted: %.1500s", a.path, text[i:])
			}
			if code, text := session.ask(ctx, http.MethodPost, "/api/v1"+a.api, a.body, "application/json"); code < 400 || !strings.Contains(text, reason) {
				t.Errorf("%s does not say that it is not permitted: %d %s", a.api, code, text)
			}
		})
	}
	asking.Wait()
	if after := messages(ctx, t, admin); after != before {
		t.Errorf("something was changed: %s, before it was %s", after, before)
	}
}

// ready waits until the page has read all there is.
func (p *page) ready(ctx context.Context) error {
	for {
		if code, _ := p.ask(ctx, http.MethodGet, "/", "", ""); code == http.StatusOK {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// messages is how far each stream has come, and what it holds.
func messages(ctx context.Context, t *testing.T, admin client) string {
	t.Helper()
	text := ""
	list := admin.js.ListStreams(ctx)
	for info := range list.Info() {
		text += fmt.Sprintf("%s %d %d; ", info.Config.Name, info.State.LastSeq, info.State.Msgs)
	}
	if err := list.Err(); err != nil {
		t.Fatal(err)
	}
	stream, err := admin.js.Stream(ctx, names.JobsStream())
	if err != nil {
		t.Fatal(err)
	}
	consumer, err := stream.Consumer(ctx, "default")
	if err != nil {
		t.Fatal(err)
	}
	info := consumer.CachedInfo()
	return text + fmt.Sprint(info.NumAckPending, info.Paused)
}
