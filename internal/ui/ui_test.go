package ui_test

import (
	"bufio"
	"context"
	"fmt"
	"html"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
	"avatarworker/internal/ui"
)

func everyPage() []string {
	return []string{"/", "/?span=24h", "/jobs", "/jobs?by=label%3Acustomer", "/jobs?by=app&state=held", "/jobs?state=held,running&label=a%3Db&newer=24h&sort=cost&page=2", "/letters", "/letters?code=avatarNotFound&class=config", "/alerts", "/codes", "/codes/avatarNotFound", "/recordings"}
}

var (
	inlineCode = regexp.MustCompile(`(?i)<script(?:[^>]*)>[^<]|<style|\sstyle=|\son[a-z]+=|javascript:`)
	elsewhere  = regexp.MustCompile(`(?i)(?:src|href|action)="(?:https?:)?//`)
	idOf       = regexp.MustCompile(`\sid="([^"]+)"`)
)

// wellMade checks what every page must hold to.
func wellMade(t *testing.T, path, page string) {
	t.Helper()
	if m := inlineCode.FindString(page); m != "" {
		t.Errorf("%s: code or style in the page: %s", path, m)
	}
	if m := elsewhere.FindString(page); m != "" {
		t.Errorf("%s: something from elsewhere: %s", path, m)
	}
	seen := map[string]bool{}
	for _, m := range idOf.FindAllStringSubmatch(page, -1) {
		if seen[m[1]] && m[1] != "hatch" && m[1] != "dots" {
			t.Errorf("%s: two elements with the id %s", path, m[1])
		}
		seen[m[1]] = true
	}
	if strings.Count(page, "<h1") != 1 || !strings.Contains(page, "<main id=\"content\"") || !strings.Contains(page, `lang="en"`) {
		t.Errorf("%s: no main heading, no main part, or no language", path)
	}
	for _, secret := range []string{"hush", "egress-secret", "<script>alert", "\u202e", "\u2066", "\x1b", "\x00", "\u2028"} {
		if strings.Contains(page, secret) {
			t.Errorf("%s shows %q", path, secret)
		}
	}
}

func TestEveryPageIsShownWithNothingAndWithAll(t *testing.T) {
	for name, w := range map[string]*world{"nothing": {}, "all": busy()} {
		for _, write := range []bool{false, true} {
			s := open(t, w, func(o *ui.Options) { o.Write = write })
			paths := everyPage()
			if name == "all" {
				paths = append(paths, "/jobs/j1", "/jobs/j2", "/jobs/j3", "/jobs/w1", "/letters/1")
			}
			for _, path := range paths {
				r := s.do(http.MethodGet, path, "", nil)
				page := text(t, r)
				if r.StatusCode != http.StatusOK {
					t.Errorf("%s with %s: %d\n%s", path, name, r.StatusCode, page)
				}
				wellMade(t, path, page)
				if has := strings.Contains(page, `method="post"`) && strings.Contains(page, "<button class=\"main\" aria-label=\"Resume"); has && !write {
					t.Errorf("%s offers actions though it may only show", path)
				}
			}
		}
	}
}

// A page that is added is to be tested as the others are.
func TestEveryPageOfTheNavigationIsTested(t *testing.T) {
	_, nav, _ := strings.Cut(text(t, open(t, busy(), nil).do(http.MethodGet, "/", "", nil)), `<nav aria-label="Pages">`)
	nav, _, _ = strings.Cut(nav, "</nav>")
	links := regexp.MustCompile(`href="([^"]*)"`).FindAllStringSubmatch(nav, -1)
	if len(links) < 6 {
		t.Fatalf("%d links in the navigation: is it still read right?", len(links))
	}
	for _, link := range links {
		if !slices.Contains(everyPage(), link[1]) {
			t.Errorf("everyPage lacks %s", link[1])
		}
	}
}

func TestACodeOfTwoClassesIsShownWithItsClass(t *testing.T) {
	w := busy()
	w.fleet.DeadLetters = []dlq.Count{
		{Class: errors.ClassJob, Code: errors.CodeAudioUnavailable, Letters: 6}, {Class: errors.ClassTransient, Code: errors.CodeAudioUnavailable, Letters: 1},
	}
	s := open(t, w, nil).visit()
	for _, path := range []string{"/", "/letters"} {
		page := text(t, s.do(http.MethodGet, path, "", nil))
		for _, class := range []string{"job", "transient"} {
			if want := `<a href="/letters?class=` + class + `&amp;code=audioUnavailable">audioUnavailable`; strings.Count(page, want) != 1 {
				t.Errorf("%s: %q is not there once", path, want)
			}
		}
	}
	if page := text(t, s.do(http.MethodGet, "/", "", nil)); !strings.Contains(page, "all because of audioUnavailable") {
		t.Error("that all letters have one code is not said")
	}
}

func TestOnlyACodeThatIsRetriedHasAttempts(t *testing.T) {
	s := open(t, busy(), nil).visit()
	for path, want := range map[string]string{
		"/codes/avatarNotFound": "<dd>–</dd>", "/codes/creditsExhausted": "<dd>–</dd>", "/codes/connectionClosed": "<dd>as many as the job has</dd>", "/codes/unknown": "<dd>2 with this code in all</dd>",
	} {
		if page := text(t, s.do(http.MethodGet, path, "", nil)); !strings.Contains(page, "<dt>Attempts</dt>"+want) {
			t.Errorf("%s does not say %s", path, want)
		}
	}
}

func TestEachQuestionOfTheWalkHasItsAnswerOnAPage(t *testing.T) {
	s := open(t, busy(), nil).visit()
	for _, q := range []struct {
		question, path string
		answers        []string
	}{
		{"where is my job while it waits", "/jobs/w1", []string{"has waited in queue nobody", "No worker serves the queue"}},
		{"is my cancel noted", "/jobs/noted", []string{"no worker has received it yet. Its cancel is noted"}},
		{"is the cancel of a job noted that is still to come", "/jobs/early", []string{"No job with this id is in a queue yet. Its cancel is noted"}},
		{"what does a job that was handed back wait for", "/jobs/back", []string{"handed back without a session. It waits for a free session of limit app_id/lim", "delivered again by itself", ">batch=17<"}},
		{"what ran longest", "/jobs?state=running&sort=running", []string{"j2", "5.0 s"}},
		{"which customer's jobs fail", "/jobs?by=label%3Acustomer&state=dead_lettered", []string{"label:customer</th>", "dead lettered</th>", `</th><td class="num">1</td><td class="num">1</td>`}},
		{"what is this list of", "/jobs?state=dead_lettered,held&label=a%3D1&label=b%3D2&newer=24h", []string{"<summary>Filter: label a=1 and b=2, newer 24h, state dead lettered or held</summary>"}},
		{"which code stops them", "/jobs?by=code&state=dead_lettered", []string{`<a href="/jobs?code=avatarNotFound&amp;state=dead_lettered">avatarNotFound</a>`}},
		{"which of one customer's jobs fail", "/jobs?state=dead_lettered&label=customer%3Dacme", []string{"j7", `href="/jobs?by=label%3Acustomer&amp;newer=24h&amp;state=dead_lettered%2Cretrying">Failing by customer today`}},
		{"what does this cost", "/jobs/j1", []string{"at least 2", "7.0 s"}},
		{"what does today cost", "/", []string{"601", "credits today"}},
		{"what do this month and each customer cost", "/", []string{"this month", "123,456", "customer: acme &lt;b&gt;", "98,765", "not set"}},
		{"what is lost to failures", "/", []string{"Lost to failures", ">23<"}},
		{"what is full", "/", []string{"stream AVATAR_JOBS is 90 % full", "nearly full"}},
		{"who is paused", "/", []string{"Queue vip is paused for 30 min"}},
		{"why does nothing start", "/", []string{"No sessions are started for app shop in us-west: creditsExhausted", "Buy credits"}},
		{"run this corrected letter", "/letters/1", []string{"Correct and replay", `value="avatar_id"`, "[hidden]"}},
		{"stop these forty", "/jobs", []string{"Cancel all that match"}},
		{"let one through now", "/", []string{"Let one through"}},
		{"empty this worker", "/", []string{"Drain worker host-1"}},
		{"what does this code mean", "/codes/creditsExhausted", []string{"Buy credits"}},
		{"which budget is spent", "/", []string{"The budget of 20 credits per month for label.customer acme is spent: 1,234 of 20, 1,000 jobs of it are held until 1 Apr 00:00 UTC", "cost budget label.customer --per month --credits N", "/jobs?label=customer%3Dacme&amp;state=held"}},
		{"which sessions are used up", "/", []string{"All 2 sessions of app_id shop are in use"}},
		{"what was corrected", "/jobs/j1", []string{">corrected</span> <small>run 2</small>", "From dead letter 9. The original (sha256:12): avatarworker dlq show --original j1 --run 2"}},
		{"where is its dead letter", "/jobs/j1", []string{"/letters/1"}},
	} {
		page := text(t, s.do(http.MethodGet, q.path, "", nil))
		for _, answer := range q.answers {
			if !strings.Contains(page, answer) {
				t.Errorf("%s: %s does not say %q", q.question, q.path, answer)
			}
		}
	}
}

func TestLinksToTheNextPageKeepTheFilter(t *testing.T) {
	w := &world{}
	for i := range 120 {
		w.rows = append(w.rows, status.Row{ID: fmt.Sprintf("j%d", i), Run: 1, State: lifecycle.StateHeld, Queue: "default"})
		w.letters = append(w.letters, dlq.Letter{Entry: dlq.Entry{Seq: uint64(i + 1), JobID: fmt.Sprintf("j%d", i), Code: errors.CodeAvatarNotFound}})
	}
	s := open(t, w, nil).visit()
	next := regexp.MustCompile(`<a rel="next" href="([^"]+)"`)
	for _, c := range []struct{ path, want, filter string }{
		{"/jobs?state=held&label=customer%3Dacme", "51 to 100", `name="label" value="customer=acme"`},
		{"/letters?code=avatarNotFound", "51 to 100", `name="code" value="avatarNotFound"`},
	} {
		m := next.FindStringSubmatch(text(t, s.do(http.MethodGet, c.path, "", nil)))
		if m == nil {
			t.Fatalf("%s: there is no next page", c.path)
		}
		page := text(t, s.do(http.MethodGet, html.UnescapeString(m[1]), "", nil))
		if !strings.Contains(page, c.want) || !strings.Contains(page, c.filter) {
			t.Errorf("%s: the next page, %s, has not %q or %q", c.path, m[1], c.want, c.filter)
		}
	}
}

func TestAnswersHaveTheHeadersThatKeepOthersOut(t *testing.T) {
	s := open(t, busy(), func(o *ui.Options) { o.Auth = ui.Auth{Secrets: secrets("tok", "")} })
	for _, path := range []string{"/", "/livez", "/static/style.css", "/static/none", "/nope", "/jobs/..%2f"} {
		for _, login := range []string{"", "Bearer tok"} {
			r := s.do(http.MethodGet, path, "", func(r *http.Request) { r.Header.Set("Authorization", login) })
			r.Body.Close()
			for name, want := range map[string]string{
				"Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
				"X-Content-Type-Options":  "nosniff", "Referrer-Policy": "same-origin",
			} {
				if got := r.Header.Get(name); got != want {
					t.Errorf("%s: %s is %q", path, name, got)
				}
			}
			if r.Header.Get("Access-Control-Allow-Origin") != "" {
				t.Errorf("%s may be read by other sites", path)
			}
		}
	}
}

func secrets(token, password string) func() (string, string, error) {
	return func() (string, string, error) { return token, password, nil }
}

// everyAction is each action as a form that does it, and the call that it makes.
func everyAction() []struct {
	path, call string
	fields     []string
} {
	return []struct {
		path, call string
		fields     []string
	}{
		{"/jobs/cancel", "cancel j2", []string{"id", "j2", "sure", "yes"}},
		{"/jobs/retry", "retry j3 true", []string{"id", "j3", "probe", "on"}},
		{"/letters/replay", "replay 1", []string{"seq", "1", "sure", "yes"}},
		{"/letters/remove", "remove 2", []string{"seq", "2", "sure", "yes"}},
		{"/queues/pause", "pause default 15m0s", []string{"queue", "default", "for", "15m"}},
		{"/queues/resume", "resume vip", []string{"queue", "vip"}},
		{"/circuits/probe", "probe shop us-west", []string{"app", "shop", "region", "us-west"}},
		{"/circuits/close", "close shop us-west", []string{"app", "shop", "region", "us-west", "sure", "yes"}},
		{"/workers/drain", "drain host-1", []string{"worker", "host-1", "sure", "yes"}},
	}
}

func TestEveryActionDoesWhatItSaysOnce(t *testing.T) {
	w := busy()
	s := open(t, w, nil).visit()
	for _, a := range everyAction() {
		w.calls = nil
		code, page := s.post(a.path, a.fields...)
		calls := w.called()
		if len(calls) != 1 || !strings.HasPrefix(calls[0], a.call) {
			t.Errorf("%s called %q, want %q (%d)\n%s", a.path, calls, a.call, code, page)
		}
		if code != http.StatusOK || !strings.Contains(page, "What was done") {
			t.Errorf("%s: %d, and the page does not say what was done", a.path, code)
		}
		wellMade(t, a.path, page)
	}
}

func TestEveryActionIsRefusedToThoseWhoMayNot(t *testing.T) {
	header := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(name, value) }
	}
	for _, way := range []struct {
		name   string
		want   int
		change func(*ui.Options)
		edit   func(*http.Request)
		form   func(*site, string) string
	}{
		{name: "without ui.write", want: http.StatusForbidden, change: func(o *ui.Options) { o.Write = false }},
		{name: "without a login", want: http.StatusUnauthorized, change: func(o *ui.Options) { o.Auth = ui.Auth{Secrets: secrets("tok", "")} }},
		{name: "with a wrong login", want: http.StatusUnauthorized, change: func(o *ui.Options) { o.Auth = ui.Auth{Secrets: secrets("tok", "")} }, edit: header("Authorization", "Bearer tokk")},
		{name: "with another host", want: http.StatusMisdirectedRequest, edit: func(r *http.Request) { r.Host = "evil.example" }},
		{name: "with another address as host", want: http.StatusMisdirectedRequest, edit: func(r *http.Request) { r.Host = "192.0.2.7:8090" }},
		{name: "without host", want: http.StatusMisdirectedRequest, edit: func(r *http.Request) { r.Host = "" }},
		{name: "without the form's token", want: http.StatusForbidden, form: func(_ *site, form string) string { return strings.ReplaceAll(form, "token=", "tocken=") }},
		{name: "with an empty token", want: http.StatusForbidden, form: func(s *site, form string) string { return strings.ReplaceAll(form, url.QueryEscape(s.token), "") }},
		{name: "with the token of another session", want: http.StatusForbidden, edit: header("Cookie", "avatarworker_session="+strings.Repeat("A", 52))},
		{name: "without a session", want: http.StatusForbidden, edit: func(r *http.Request) { r.Header.Del("Cookie") }},
		{name: "from another site", want: http.StatusForbidden, edit: func(r *http.Request) {
			r.Header.Set("Origin", "https://evil.example")
			r.Header.Set("Sec-Fetch-Site", "cross-site")
		}},
		{name: "from another origin alone", want: http.StatusForbidden, edit: func(r *http.Request) {
			r.Header.Set("Origin", "https://evil.example")
			r.Header.Del("Sec-Fetch-Site")
		}},
		{name: "from another port", want: http.StatusForbidden, edit: header("Origin", "http://127.0.0.1:9999")},
		{name: "from an opaque origin", want: http.StatusForbidden, edit: header("Origin", "null")},
		{name: "from a neighbour", want: http.StatusForbidden, edit: header("Sec-Fetch-Site", "same-site")},
		{name: "with the token in the query", want: http.StatusForbidden, edit: func(r *http.Request) {
			r.URL.RawQuery = "token=x"
		}, form: func(_ *site, form string) string { return strings.ReplaceAll(form, "token=", "tocken=") }},
	} {
		w := busy()
		s := open(t, w, way.change)
		for _, a := range everyAction() {
			s.cookie, s.token = "", ""
			if way.name != "without a login" && way.name != "with a wrong login" {
				s.visit()
			}
			form := s.form(a.fields...)
			if way.form != nil {
				form = way.form(s, form)
			}
			r := s.do(http.MethodPost, a.path, form, way.edit)
			r.Body.Close()
			if r.StatusCode != way.want || len(w.called()) > 0 {
				t.Errorf("%s %s: %d (want %d), called %q", a.path, way.name, r.StatusCode, way.want, w.called())
			}
		}
	}
	s := open(t, busy(), nil).visit()
	for _, a := range everyAction() {
		r := s.do(http.MethodGet, a.path+"?"+s.form(a.fields...), "", nil)
		r.Body.Close()
		if len(s.world.called()) > 0 {
			t.Fatalf("GET %s changed something: %q", a.path, s.world.called())
		}
	}
}

func TestWhatCantBeUndoneIsAskedForFirst(t *testing.T) {
	w := busy()
	s := open(t, w, nil).visit()
	for _, a := range everyAction() {
		if !slices.Contains(a.fields, "sure") {
			continue
		}
		fields := a.fields[:len(a.fields)-2]
		code, page := s.post(a.path, fields...)
		if code != http.StatusOK || len(w.called()) > 0 || !strings.Contains(page, `name="sure" value="yes"`) {
			t.Errorf("%s: %d, called %q", a.path, code, w.called())
		}
		wellMade(t, a.path, page)
	}
}

func TestWhoMaySeeThePage(t *testing.T) {
	proxies := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	both := ui.Auth{Secrets: secrets("tok-en", "pass word"), User: "ops"}
	header := ui.Auth{TrustedHeader: "X-User", Proxies: proxies}
	for _, tc := range []struct {
		name string
		auth ui.Auth
		edit func(*http.Request)
		want bool
	}{
		{"nobody asks", ui.Auth{}, nil, true},
		{"nothing", both, nil, false},
		{"the token", both, func(r *http.Request) { r.Header.Set("Authorization", "Bearer tok-en") }, true},
		{"the token, in lower case", both, func(r *http.Request) { r.Header.Set("Authorization", "bearer tok-en") }, true},
		{"the token as a browser gives it", both, func(r *http.Request) { r.SetBasicAuth("me", "tok-en") }, true},
		{"a longer token", both, func(r *http.Request) { r.Header.Set("Authorization", "Bearer tok-en2") }, false},
		{"the password as token", both, func(r *http.Request) { r.Header.Set("Authorization", "Bearer pass word") }, false},
		{"user and password", both, func(r *http.Request) { r.SetBasicAuth("ops", "pass word") }, true},
		{"another user", both, func(r *http.Request) { r.SetBasicAuth("me", "pass word") }, false},
		{"an empty password", ui.Auth{Secrets: secrets("tok", ""), User: ""}, func(r *http.Request) { r.SetBasicAuth("", "") }, false},
		{"an empty token", ui.Auth{Secrets: secrets("", "p"), User: "u"}, func(r *http.Request) { r.Header.Set("Authorization", "Bearer ") }, false},
		{"secrets that can't be read", ui.Auth{Secrets: func() (string, string, error) { return "", "", errors.New("gone") }}, func(r *http.Request) { r.Header.Set("Authorization", "Bearer ") }, false},
		{"the proxy's user", header, func(r *http.Request) { r.RemoteAddr = "10.1.2.3:4"; r.Header.Set("X-User", "ada") }, true},
		{"the proxy in IPv6", header, func(r *http.Request) { r.RemoteAddr = "[::ffff:10.1.2.3]:4"; r.Header.Set("X-User", "ada") }, true},
		{"the header of others", header, func(r *http.Request) { r.RemoteAddr = "192.0.2.1:4"; r.Header.Set("X-User", "ada") }, false},
		{"the header of others, forwarded", header, func(r *http.Request) {
			r.RemoteAddr = "192.0.2.1:4"
			r.Header.Set("X-User", "ada")
			r.Header.Set("X-Forwarded-For", "10.1.2.3")
		}, false},
		{"the header twice", header, func(r *http.Request) {
			r.RemoteAddr = "10.1.2.3:4"
			r.Header.Add("X-User", "ada")
			r.Header.Add("X-User", "eve")
		}, false},
		{"the proxy without a user", header, func(r *http.Request) { r.RemoteAddr = "10.1.2.3:4" }, false},
		{"the proxy with an empty user", header, func(r *http.Request) { r.RemoteAddr = "10.1.2.3:4"; r.Header.Set("X-User", "") }, false},
	} {
		s := open(t, busy(), func(o *ui.Options) { o.Auth = tc.auth })
		for _, path := range []string{"/", "/static/style.css", "/events", "/jobs/j1"} {
			if path == "/events" && tc.want {
				continue // it does not end
			}
			r := s.do(http.MethodGet, path, "", tc.edit)
			r.Body.Close()
			if (r.StatusCode == http.StatusOK) != tc.want {
				t.Errorf("%s at %s: %d", tc.name, path, r.StatusCode)
			}
		}
		if r := s.do(http.MethodGet, "/livez", "", nil); r.StatusCode != http.StatusOK {
			t.Errorf("%s: /livez %d", tc.name, r.StatusCode)
		}
	}
}

func TestThePageIsNotServedToTheWorldByMistake(t *testing.T) {
	for addr, want := range map[string]bool{
		"127.0.0.1:0": true, "[::1]:0": true, "localhost:0": true, ":0": false, "0.0.0.0:0": false, "[::]:0": false, "10.0.0.1:0": false, "host.example:0": false, "nonsense": false,
	} {
		_, err := ui.New(ui.Options{Addr: addr, Reader: busy(), Actor: busy()})
		if (err == nil) != want {
			t.Errorf("%s: %v", addr, err)
		}
	}
	if _, err := ui.New(ui.Options{Addr: "127.0.0.1:0", Auth: ui.Auth{TrustedHeader: "X-User"}}); err == nil {
		t.Error("a header is trusted from everywhere")
	}
}

func TestHostsAreThisMachineItsAddressAndThoseThatAreConfigured(t *testing.T) {
	s := open(t, &world{}, func(o *ui.Options) { o.Hosts = []string{"Avatars.Example.com", "192.0.2.9"} })
	for host, want := range map[string]bool{
		"127.0.0.1:8090": true, "localhost:8090": true, "LOCALHOST": true, "[::1]:8090": true, "a.localhost": true, "avatars.example.com": true, "avatars.example.com.": true, "192.0.2.9:80": true,
		"evil.example": false, "avatars.example.com.evil.example": false, "192.0.2.1": false, "": false, "127.0.0.1.evil.example": false, "[2001:db8::1]": false,
	} {
		r := s.do(http.MethodGet, "/", "", func(r *http.Request) { r.Host = host })
		r.Body.Close()
		if (r.StatusCode == http.StatusOK) != want {
			t.Errorf("%q: %d", host, r.StatusCode)
		}
	}
}

func TestALinkFromElsewhereKeepsTheSessionOfOtherTabs(t *testing.T) {
	s := open(t, busy(), nil)
	r := s.do(http.MethodGet, "/jobs/j1?x=%22%3E", "", func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") })
	page := text(t, r)
	if len(r.Cookies()) > 0 || !strings.Contains(page, `http-equiv="refresh"`) || strings.Contains(page, `"><`+`x`) || strings.Contains(page, `">"`) {
		t.Errorf("cookies %v, page %s", r.Cookies(), page)
	}
	s.visit()
	cookie := s.do(http.MethodGet, "/", "", nil).Cookies()
	if len(cookie) > 0 {
		t.Errorf("the session was replaced: %v", cookie)
	}
	for _, c := range open(t, busy(), nil).do(http.MethodGet, "/", "", nil).Cookies() {
		if !c.HttpOnly || c.SameSite != http.SameSiteStrictMode || c.Path != "/" {
			t.Errorf("cookie %v", c)
		}
	}
}

func TestWhatIsTooLargeIsRefused(t *testing.T) {
	s := open(t, busy(), nil).visit()
	for _, tc := range []struct {
		method, path, body string
		want               int
	}{
		{http.MethodGet, "/jobs?queue=" + strings.Repeat("a", 9000), "", http.StatusRequestURITooLong},
		{http.MethodPost, "/letters/replay", s.form("seq", "1", "body", strings.Repeat("a", 5<<20)), http.StatusRequestEntityTooLarge},
		{http.MethodPost, "/jobs/cancel", s.form(slices.Repeat([]string{"id", "j1"}, 501)...), http.StatusBadRequest},
		{http.MethodPost, "/letters/remove", s.form(slices.Repeat([]string{"seq", "1"}, 501)...), http.StatusBadRequest},
		{http.MethodPost, "/queues/pause", s.form("queue", "default", "for", "9000h"), http.StatusBadRequest},
		{http.MethodPost, "/queues/pause", s.form("queue", "default", "for", "-1h"), http.StatusBadRequest},
	} {
		r := s.do(tc.method, tc.path, tc.body, nil)
		r.Body.Close()
		if r.StatusCode != tc.want || len(s.world.called()) > 0 {
			t.Errorf("%s %.40s: %d, want %d; called %q", tc.method, tc.path, r.StatusCode, tc.want, s.world.called())
		}
	}
}

func TestALetterIsCorrectedAfterAPreviewAndItsSecretsStay(t *testing.T) {
	w := busy()
	s := open(t, w, nil).visit()
	code, page := s.post("/letters/replay", "seq", "1", "path", "avatar_id", "value", "ok-7", "path", "", "value", "")
	if code != http.StatusOK || len(w.called()) > 0 || !strings.Contains(page, "&#34;a&#34;</del>") || !strings.Contains(page, "ok-7") || !strings.Contains(page, "as run 2") {
		t.Fatalf("preview: %d, called %q\n%s", code, w.called(), page)
	}
	s.post("/letters/replay", "seq", "1", "path", "avatar_id", "value", "ok-7", "sure", "yes")
	calls := w.called()
	if len(calls) != 1 || !strings.Contains(calls[0], `"avatar_id":"ok-7"`) || !strings.Contains(calls[0], "egress-secret") || !strings.Contains(calls[0], "sig=hush") {
		t.Fatalf("called %q", calls)
	}
	// The whole job, as a browser sends what the page showed.
	page = text(t, s.do(http.MethodGet, "/letters/1", "", nil))
	edited := regexp.MustCompile(`(?s)<textarea name="body"[^>]*>\n(.*?)</textarea>`).FindStringSubmatch(page)[1]
	edited = strings.NewReplacer("&#34;", `"`, "&amp;", "&", "\n", "\r\n").Replace(edited)
	edited = strings.Replace(edited, `"a"`, `"b"`, 1)
	s.post("/letters/replay", "seq", "1", "edit", "on", "body", edited, "sure", "yes")
	calls = w.called()
	if len(calls) != 2 || !strings.Contains(calls[1], `"avatar_id":"b"`) || !strings.Contains(calls[1], "egress-secret") || !strings.Contains(calls[1], "sig=hush") {
		t.Fatalf("called %q", calls)
	}
}

func TestAWrongCorrectionComesBackWithWhatWasTyped(t *testing.T) {
	w := busy()
	s := open(t, w, nil).visit()
	for _, fields := range [][]string{
		{"path", "avatar_idd", "value", "ok-7"},
		{"edit", "on", "body", `{"avatar_id": "ok-7"`},
		{"path", "avatar_id", "value", "ok-7", "edit", "on", "body", `{}`},
	} {
		code, _ := s.post("/letters/replay", append([]string{"seq", "1", "sure", "yes"}, fields...)...)
		if code != http.StatusBadRequest && code != http.StatusOK || len(w.called()) > 0 {
			t.Errorf("%v: %d, called %q", fields, code, w.called())
		}
		code, page := s.post("/letters/replay", append([]string{"seq", "1"}, fields...)...)
		if code != http.StatusBadRequest || !strings.Contains(page, "Nothing was published") || !strings.Contains(page, "ok-7") {
			t.Errorf("%v: %d\n%s", fields, code, page)
		}
	}
}

func TestAllThatMatchAreShownBeforeTheyAreCancelled(t *testing.T) {
	w := busy()
	s := open(t, w, nil).visit()
	code, page := s.post("/jobs/cancel", "all", "1", "filter", "queue=default&label=customer%3Dacme")
	ids := regexp.MustCompile(`name="id" value="(j\d)"`).FindAllStringSubmatch(page, -1)
	if code != http.StatusOK || len(ids) != 5 || len(w.called()) > 0 {
		t.Fatalf("%d: %v, called %q", code, ids, w.called())
	}
	asked := w.asked[len(w.asked)-1]
	if len(asked.States) != 5 || asked.Labels["customer"] != "acme" || !slices.Equal(asked.Queues, []string{"default"}) {
		t.Errorf("asked for %+v", asked.Filter)
	}
	_, page = s.post("/jobs/cancel", "id", "j1", "id", "j2", "sure", "yes", "back", "/jobs?queue=default")
	if got := w.called(); !slices.Equal(got, []string{"cancel j1", "cancel j2"}) || !strings.Contains(page, "Cancelled 2 jobs") {
		t.Errorf("called %q", got)
	}
	code, _ = s.post("/jobs/cancel", "all", "1", "filter", "state=completed")
	if code != http.StatusBadRequest {
		t.Errorf("jobs with an outcome: %d", code)
	}
	code, _ = s.post("/jobs/cancel", "all", "1", "filter", "state=nonsense")
	if code != http.StatusBadRequest {
		t.Errorf("a filter that is not valid: %d", code)
	}
}

func TestWhatWasDoneIsShownToWhomDidIt(t *testing.T) {
	s := open(t, busy(), nil).visit()
	r := s.do(http.MethodPost, "/queues/resume", s.form("queue", "vip", "back", "/?span=6h"), nil)
	r.Body.Close()
	next := r.Header.Get("Location")
	if !strings.HasPrefix(next, "/?") || !strings.Contains(next, "done=") {
		t.Fatalf("leads to %q", next)
	}
	if page := text(t, s.do(http.MethodGet, next, "", nil)); !strings.Contains(page, "What was done") {
		t.Error("its own session does not see it")
	}
	s.cookie = ""
	if page := text(t, s.do(http.MethodGet, next, "", nil)); strings.Contains(page, "What was done") {
		t.Error("another session sees it")
	}
	for _, back := range []string{"https://evil.example/", "//evil.example/", "/\\evil.example", "javascript:alert(1)", "", "x", "/%2f/evil.example", "/\tevil", "///evil.example"} {
		s.visit()
		r := s.do(http.MethodPost, "/queues/resume", url.Values{"token": {s.token}, "queue": {"vip"}, "back": {back}}.Encode(), nil)
		r.Body.Close()
		u, err := url.Parse(r.Header.Get("Location"))
		if err != nil || u.Host != "" || u.Scheme != "" || !strings.HasPrefix(u.Path, "/") || strings.HasPrefix(r.Header.Get("Location"), "//") {
			t.Errorf("back to %q leads to %q", back, r.Header.Get("Location"))
		}
	}
}

func TestFaultsOfReadingAreAnswersWithoutSecrets(t *testing.T) {
	w := busy()
	w.err = errors.New("nats: no answer from nats://user:secretpw@h:4222 https://h/x?sig=hush")
	s := open(t, w, nil)
	for _, path := range []string{"/", "/jobs", "/letters", "/alerts", "/recordings", "/jobs/j1", "/letters/1"} {
		r := s.do(http.MethodGet, path, "", nil)
		page := text(t, r)
		if r.StatusCode != http.StatusServiceUnavailable || strings.Contains(page, "secretpw") || strings.Contains(page, "hush") {
			t.Errorf("%s: %d\n%s", path, r.StatusCode, page)
		}
	}
	for _, path := range []string{"/jobs/none", "/jobs/a.b", "/letters/99", "/letters/x", "/letters/0", "/codes/none", "/nope", "/jobs/%00"} {
		r := s.do(http.MethodGet, path, "", nil)
		if page := text(t, r); r.StatusCode != http.StatusNotFound || !strings.Contains(page, "<h1>") {
			t.Errorf("%s: %d", path, r.StatusCode)
		}
	}
}

// What is shown from memory may be old while NATS is there: a subject that is denied, a
// stream that is away.
func TestEveryPageSaysThatItIsNotCurrent(t *testing.T) {
	w := busy()
	s := open(t, w, nil)
	paths := append(everyPage(), "/jobs/j1", "/letters/1", "/jobs/none", "/nope")
	for _, path := range paths {
		if page := text(t, s.do(http.MethodGet, path, "", nil)); strings.Contains(page, "not current") || !strings.Contains(page, `<div id="stale" data-live hidden></div>`) {
			t.Errorf("%s says that it is not current, or has no place for that", path)
		}
	}
	w.fresh = ui.Freshness{At: now.Add(-time.Minute), Error: "stream AVATAR_DLQ: nats: no response from stream <b>"}
	for _, path := range paths {
		page := text(t, s.do(http.MethodGet, path, "", nil))
		for _, want := range []string{"shown as they were at 11:59:00 UTC", "Stream AVATAR_DLQ: nats: no response from stream &lt;b&gt;.", "setup --dry-run", `<div id="stale" data-live>`} {
			if !strings.Contains(page, want) {
				t.Errorf("%s does not say %q", path, want)
			}
		}
		wellMade(t, path, page)
	}
	if page := text(t, s.do(http.MethodGet, "/", "", nil)); !strings.Contains(page, "How it stands now is not known") || strings.Contains(page, "All is well") {
		t.Error("the overview sums up what it does not know")
	}
	w.fresh.At = time.Time{}
	if page := text(t, s.do(http.MethodGet, "/codes", "", nil)); !strings.Contains(page, "Nothing could be read yet") {
		t.Error("a page does not say that nothing was read yet")
	}
}

func TestAFilterThatIsNotValidIsSaidAndKept(t *testing.T) {
	s := open(t, busy(), nil)
	for _, path := range []string{"/jobs?state=none", "/jobs?older=soon", "/jobs?label=x", "/jobs?sort=size", "/letters?before=then", "/jobs?label=a%3D1&label=a%3D2"} {
		r := s.do(http.MethodGet, path, "", nil)
		if page := text(t, r); r.StatusCode != http.StatusBadRequest || !strings.Contains(page, `role="alert"`) {
			t.Errorf("%s: %d", path, r.StatusCode)
		}
	}
	s.do(http.MethodGet, "/jobs?state=held&state=running&queue=a,b&app=x&avatar=y&code=internal&label=c%3Dd&older=1h&newer=2d&sort=cost&page=3", "", nil)
	q := s.world.asked[len(s.world.asked)-1]
	if len(q.States) != 2 || len(q.Queues) != 2 || q.Apps[0] != "x" || q.Avatars[0] != "y" || q.Codes[0] != errors.CodeInternal || q.Labels["c"] != "d" ||
		!q.Before.Equal(now.Add(-time.Hour)) || !q.After.Equal(now.Add(-48*time.Hour)) || q.Order != status.ByCost || q.Limit != 150 {
		t.Errorf("asked for %+v", q)
	}
}

func TestTheAPIIsGuarded(t *testing.T) {
	called := 0
	api := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { called++; w.WriteHeader(http.StatusNoContent) })
	with := func(write bool, auth ui.Auth) *site {
		return open(t, busy(), func(o *ui.Options) { o.API, o.Write, o.Auth = api, write, auth })
	}
	token := ui.Auth{Secrets: secrets("tok", "")}
	for _, tc := range []struct {
		name   string
		s      *site
		method string
		edit   func(*http.Request)
		want   int
	}{
		{"reading", with(false, ui.Auth{}), http.MethodGet, nil, http.StatusNoContent},
		{"reading without a login", with(false, token), http.MethodGet, nil, http.StatusUnauthorized},
		{"writing without ui.write", with(false, ui.Auth{}), http.MethodPost, func(r *http.Request) { r.Header.Set("Content-Type", "application/json") }, http.StatusForbidden},
		{"writing JSON", with(true, ui.Auth{}), http.MethodPost, func(r *http.Request) { r.Header.Set("Content-Type", "application/json; charset=utf-8") }, http.StatusNoContent},
		{"writing with the token", with(true, token), http.MethodDelete, func(r *http.Request) { r.Header.Set("Authorization", "Bearer tok") }, http.StatusNoContent},
		{"a form of another site", with(true, ui.Auth{}), http.MethodPost, func(r *http.Request) {
			r.Header.Set("Origin", "https://evil.example")
			r.Header.Set("Sec-Fetch-Site", "cross-site")
		}, http.StatusForbidden},
		{"a form without origin", with(true, ui.Auth{}), http.MethodPost, func(r *http.Request) { r.Header.Del("Origin"); r.Header.Del("Sec-Fetch-Site") }, http.StatusUnsupportedMediaType},
		{"text of another site", with(true, ui.Auth{}), http.MethodPost, func(r *http.Request) { r.Header.Set("Content-Type", "text/plain") }, http.StatusUnsupportedMediaType},
		{"another host", with(true, ui.Auth{}), http.MethodGet, func(r *http.Request) { r.Host = "evil.example" }, http.StatusMisdirectedRequest},
	} {
		before := called
		r := tc.s.do(tc.method, "/api/v1/jobs", "", tc.edit)
		r.Body.Close()
		if r.StatusCode != tc.want || (called > before) != (tc.want == http.StatusNoContent) {
			t.Errorf("%s: %d, called %t", tc.name, r.StatusCode, called > before)
		}
	}
}

func TestALivePageReceivesAChangeAndEndsWithTheServer(t *testing.T) {
	w := busy()
	s := open(t, w, func(o *ui.Options) { o.Addr = "127.0.0.1:0" })
	address, err := s.server.Start()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, address+"events", nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	answer, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if answer.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatal(answer.Header)
	}
	lines := bufio.NewScanner(answer.Body)
	close(w.changed)
	for lines.Scan() && lines.Text() != "data: changed" {
	}
	if lines.Text() != "data: changed" {
		t.Fatalf("no change: %v", lines.Err())
	}
	if err := s.server.Stop(ctx); err != nil {
		t.Errorf("an open page keeps the server: %v", err)
	}
	if err := s.server.Stop(ctx); err != nil {
		t.Errorf("stopped again: %v", err)
	}
}

func TestStaticFilesAreCachedByTheirContent(t *testing.T) {
	s := open(t, busy(), nil)
	page := text(t, s.do(http.MethodGet, "/", "", nil))
	links := regexp.MustCompile(`"(/static/[^"]+)"`).FindAllStringSubmatch(page, -1)
	if len(links) != 3 {
		t.Fatalf("links %v", links)
	}
	for _, link := range links {
		r := s.do(http.MethodGet, link[1], "", nil)
		r.Body.Close()
		if r.StatusCode != http.StatusOK || !strings.Contains(r.Header.Get("Cache-Control"), "immutable") {
			t.Errorf("%s: %d %q", link[1], r.StatusCode, r.Header.Get("Cache-Control"))
		}
	}
	for _, path := range []string{"/static/../ui.go", "/static/style.css%00", "/static/"} {
		if r := s.do(http.MethodGet, path, "", nil); r.StatusCode == http.StatusOK {
			t.Errorf("%s is served", path)
		}
	}
}

func FuzzQueries(f *testing.F) {
	for _, path := range everyPage() {
		f.Add(path)
	}
	f.Add("/jobs/j1?done=x")
	f.Add("/find?id=j1")
	f.Add("/letters/1?before=%ff")
	s := open(f, busy(), nil)
	f.Fuzz(func(t *testing.T, target string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || u.Host != "" || !strings.HasPrefix(u.Path, "/") || strings.HasPrefix(u.Path, "/events") {
			return
		}
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.URL, r.Host, r.RequestURI = u, "127.0.0.1:8090", target
		rec := httptest.NewRecorder()
		s.handler.ServeHTTP(rec, r)
		if page := rec.Body.String(); rec.Code >= 500 || strings.Contains(page, "<script>alert") || inlineCode.MatchString(page) {
			t.Errorf("%q: %d\n%s", target, rec.Code, page)
		}
		if len(s.world.called()) > 0 {
			t.Errorf("%q changed something: %q", target, s.world.called())
		}
	})
}

func FuzzForms(f *testing.F) {
	for i, a := range everyAction() {
		f.Add(i, (&site{}).form(a.fields...))
	}
	f.Add(2, "seq=1&path=a.b.c&value=%00&edit=on&body=%7B")
	f.Add(2, "all=1&filter=code%3D%3E%26class%3D%2A")
	f.Add(0, "all=1&filter=state%3Dx")
	s := open(f, busy(), nil).visit()
	f.Fuzz(func(t *testing.T, action int, body string) {
		actions := everyAction()
		path := actions[(action%len(actions)+len(actions))%len(actions)].path
		s.world.calls = nil
		// Without the session's token nothing happens, whatever the form says.
		r := s.do(http.MethodPost, path, body, nil)
		r.Body.Close()
		if len(s.world.called()) > 0 || r.StatusCode < 400 {
			t.Errorf("%s %q: %d, called %q", path, body, r.StatusCode, s.world.called())
		}
		v, err := url.ParseQuery(body)
		if err != nil {
			return
		}
		v.Set("token", s.token)
		r = s.do(http.MethodPost, path, v.Encode(), nil)
		page := text(t, r)
		if r.StatusCode >= 500 || inlineCode.MatchString(page) || strings.Contains(page, "<script>alert") || strings.Contains(page, "egress-secret") {
			t.Errorf("%s %q: %d\n%s", path, body, r.StatusCode, page)
		}
		if v.Get("sure") != "yes" && slices.Contains(actions[(action%len(actions)+len(actions))%len(actions)].fields, "sure") && len(s.world.called()) > 0 {
			t.Errorf("%s %q was not confirmed: %q", path, body, s.world.called())
		}
	})
}
