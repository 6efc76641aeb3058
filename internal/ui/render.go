package ui

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"html/template"
	"io/fs"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"avatarworker/internal/errors"
)

//go:embed templates/*.html
var templateFiles embed.FS

//go:embed static/style.css static/page.js static/icon.svg
var staticFiles embed.FS

// pages are the templates by name, and the version of what they link to.
type pages struct {
	byName map[string]*template.Template
	static map[string]staticFile
}

// staticFile is a file that does not change while the process runs.
type staticFile struct {
	data []byte
	kind string
	hash string
}

func newPages() (*pages, error) {
	p := &pages{byName: make(map[string]*template.Template), static: make(map[string]staticFile)}
	for name, kind := range map[string]string{"style.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml"} {
		data, err := staticFiles.ReadFile("static/" + name)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(data)
		p.static[name] = staticFile{data, kind, hex.EncodeToString(sum[:6])}
	}
	shared, err := template.New("layout.html").Funcs(p.funcs()).ParseFS(templateFiles, "templates/layout.html", "templates/parts.html")
	if err != nil {
		return nil, err
	}
	names, err := fs.Glob(templateFiles, "templates/*.html")
	if err != nil {
		return nil, err
	}
	for _, path := range names {
		name := strings.TrimSuffix(strings.TrimPrefix(path, "templates/"), ".html")
		if name == "layout" || name == "parts" {
			continue
		}
		t, err := shared.Clone()
		if err != nil {
			return nil, err
		}
		if p.byName[name], err = t.ParseFS(templateFiles, path); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// view is what a template gets.
type view struct {
	Title   string // of the document and of its first heading
	Section string // of the navigation that it belongs to
	Path    string // with its query, to come back to
	Live    bool   // it keeps itself current
	Write   bool
	User    string
	Token   string // of forms
	Version string
	Now     time.Time
	Result  *result    // of the action before
	Stale   *Freshness // what is shown is older than it should be; nil: it is not
	Data    any
}

// request is one request for a page, and its answer.
type request struct {
	w    http.ResponseWriter
	r    *http.Request
	ctx  context.Context
	s    *Server
	form url.Values // of an action
	view view
}

// page serves a page within its time.
func (s *Server) page(handle func(*request)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		session, fresh := s.guard.session(w, r)
		if fresh && fromElsewhere(r) {
			// The browser keeps the session's cookie back from a link on another
			// site. It is not replaced: the forms of other tabs stay valid.
			w.Header().Del("Set-Cookie")
			s.bounce(w, r)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), requestTime)
		defer cancel()
		user := userOf(r)
		req := &request{w: w, r: r, ctx: ctx, s: s, view: view{
			Path: ownPath(r.URL), Write: s.o.Write, User: user, Token: s.guard.formToken(session, user), Version: s.o.Version, Now: s.o.Now().UTC(),
		}}
		if fresh := s.o.Reader.Freshness(); fresh.Error != "" {
			req.view.Stale = &fresh
		}
		if r.Method == http.MethodGet {
			req.view.Result = s.results.get(r.URL.Query().Get("done"), session)
		}
		handle(req)
	}
}

// fromElsewhere reports whether a link on another site led here.
func fromElsewhere(r *http.Request) bool {
	site := r.Header.Get("Sec-Fetch-Site")
	return r.Method == http.MethodGet && (site == "cross-site" || site == "same-site")
}

// bounce has the browser ask again, as from a page of this site.
func (s *Server) bounce(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	path := template.HTMLEscapeString(ownPath(r.URL))
	// The caller may have left.
	_, _ = fmt.Fprintf(w, `<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=%s">`+
		`<title>avatarworker</title><p><a href="%[1]s">Go on</a></p></html>`, path)
}

// ownPath is a path of this server with its query, without the note of a result.
func ownPath(u *url.URL) string {
	q := u.Query()
	q.Del("done")
	path := (&url.URL{Path: "/" + strings.TrimLeft(u.Path, "/\\"), RawQuery: q.Encode()}).String()
	return path
}

// backPath is a path that a form names to come back to: one of ours, else "/".
func backPath(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.IsAbs() || u.Host != "" || u.User != nil || !strings.HasPrefix(u.Path, "/") || strings.HasPrefix(text, "//") || strings.ContainsAny(text, "\\\r\n\t") || len(text) > maxQuery {
		return "/"
	}
	return ownPath(u)
}

// render answers with a page.
func (q *request) render(code int, name string) {
	var out bytes.Buffer
	if err := q.s.pages.byName[name].ExecuteTemplate(&out, "layout.html", q.view); err != nil {
		q.s.o.Logger.Error().Err(err).Str("page", name).Msg("the page can't be rendered")
		http.Error(q.w, "this page can't be rendered: its log says why", http.StatusInternalServerError)
		return
	}
	q.w.Header().Set("Content-Type", "text/html; charset=utf-8")
	q.w.WriteHeader(code)
	if q.r.Method != http.MethodHead {
		_, _ = q.w.Write(harmless(out.Bytes())) // the caller may have left
	}
}

// harmless is HTML in which characters that change how a text is shown, or that no
// HTML may have, are shown as their code: texts come from publishers and backends.
func harmless(html []byte) []byte {
	if !bytes.ContainsFunc(html, steers) && utf8.Valid(html) {
		return html
	}
	var out bytes.Buffer
	for len(html) > 0 {
		r, n := utf8.DecodeRune(html)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&out, "‹%02X›", html[0])
		case steers(r):
			fmt.Fprintf(&out, "‹U+%04X›", r)
		default:
			out.Write(html[:n])
		}
		html = html[n:]
	}
	return out.Bytes()
}

func steers(r rune) bool {
	switch r {
	case '\n', '\t':
		return false
	case '\u2028', '\u2029', '\ufeff':
		return true
	}
	return unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r)
}

// problem is an answer that is not the page that was asked for.
type problem struct {
	Text   string
	Remedy string
	Back   string
}

// fail answers that something is not as asked.
func (q *request) fail(code int, text, remedy string) {
	q.view.Title = text
	if code == http.StatusServiceUnavailable || code == http.StatusBadGateway {
		q.view.Live = true // it comes back by itself
	}
	q.view.Data = problem{Text: text, Remedy: remedy, Back: q.view.Path}
	q.render(code, "problem")
}

// unreadable answers that what the page shows can't be read now.
func (q *request) unreadable(err error) {
	q.s.o.Logger.Warn().Err(err).Str("path", q.r.URL.Path).Msg("a page can't be shown")
	q.view.Stale = nil // this says the same
	text := "This can't be read now."
	if errors.Is(err, errDisconnected) {
		text = "NATS can't be reached."
	}
	q.fail(http.StatusServiceUnavailable, text, sentence(errors.RedactText(err.Error())))
}

// sentence is a text that begins with a capital letter and ends with a full stop.
func sentence(text string) string {
	r, n := utf8.DecodeRuneInString(text)
	if n == 0 {
		return text
	}
	text = string(unicode.ToUpper(r)) + text[n:]
	if !strings.HasSuffix(text, ".") && !strings.HasSuffix(text, "?") {
		text += "."
	}
	return text
}

// static serves a file under its version for good.
func (s *Server) static(w http.ResponseWriter, r *http.Request) {
	file, ok := s.pages.static[r.PathValue("file")]
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", file.kind)
	if r.URL.Query().Get("v") == file.hash {
		w.Header().Set("Cache-Control", "private, max-age=31536000, immutable")
	}
	_, _ = w.Write(file.data) // the caller may have left
}
