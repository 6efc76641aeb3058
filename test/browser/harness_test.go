package browser_test

import (
	"bufio"
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

var update = flag.Bool("update", false, "write the screenshots of docs/page")

// site is a demo that runs: NATS, a worker, a simulated backend and the page.
var site struct {
	url     string // of the page, ends with a slash
	nats    string
	program string
	browser context.Context
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "browser-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	stop, err := startDemo(dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer stop()
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.NoSandbox, chromedp.Flag("hide-scrollbars", true), chromedp.Flag("force-color-profile", "srgb"))
	allocator, endAllocator := chromedp.NewExecAllocator(context.Background(), options...)
	defer endAllocator()
	browser, endBrowser := chromedp.NewContext(allocator)
	defer endBrowser()
	if err := chromedp.Run(browser); err != nil {
		fmt.Fprintln(os.Stderr, "Chromium can't be started; is it installed (apt-get install chromium)?", err)
		return 1
	}
	site.browser = browser
	return m.Run()
}

var addresses = regexp.MustCompile(`The page for operators: (\S+)|export NATS_URL=(\S+)`)

// startDemo builds the program and runs its demo until stop.
func startDemo(dir string) (stop func(), err error) {
	site.program = filepath.Join(dir, "avatarworker")
	build := exec.Command("go", "build", "-o", site.program, "./cmd/worker")
	build.Dir = filepath.Join("..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the program: %w\n%s", err, out)
	}
	demo := exec.Command(site.program, "demo", "--stay")
	demo.Dir = dir
	said, err := demo.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := demo.Start(); err != nil {
		return nil, err
	}
	stop = func() {
		_ = demo.Process.Signal(syscall.SIGTERM)
		_ = demo.Wait()
	}
	lines := bufio.NewScanner(said)
	for (site.url == "" || site.nats == "") && lines.Scan() {
		for _, m := range addresses.FindAllStringSubmatch(lines.Text(), -1) {
			if m[1] != "" {
				site.url = m[1]
			}
			if m[2] != "" {
				site.nats = m[2]
			}
		}
	}
	if site.nats == "" {
		stop()
		return nil, fmt.Errorf("the demo ended before it said where it is")
	}
	go func() { // it must not wait for its reader
		for lines.Scan() {
		}
	}()
	return stop, nil
}

// command runs the program against the demo.
func command(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), site.program, args...)
	cmd.Env = append(os.Environ(), "NATS_URL="+site.nats)
	cmd.Dir = t.TempDir()
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("avatarworker %s: %v\n%s", strings.Join(args, " "), err, said.String())
	}
	return string(out)
}

var clip = func() string {
	path, err := filepath.Abs(filepath.Join("..", "..", "internal", "audio", "clip", "hello.wav"))
	if err != nil {
		panic(err)
	}
	return path
}()

// submit publishes a job.
func submit(t *testing.T, id, avatar string, more ...string) {
	t.Helper()
	command(t, append([]string{"submit", "--id", id, "--avatar", avatar, "--audio", clip}, more...)...)
}

// end publishes a job and waits for its outcome.
func end(t *testing.T, id, avatar string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), site.program, "submit", "--id", id, "--avatar", avatar, "--audio", clip, "--wait")
	cmd.Env = append(os.Environ(), "NATS_URL="+site.nats)
	if out, err := cmd.CombinedOutput(); err != nil && cmd.ProcessState.ExitCode() != 1 { // 1: it did not complete
		t.Fatalf("job %s: %v\n%s", id, err, out)
	}
}

// tab is one page in the browser, which must not ask anybody else for anything, nor
// complain.
type tab struct {
	t   *testing.T
	ctx context.Context

	mu       sync.Mutex
	asked    []string // addresses that were asked for
	expected []string // texts of complaints that are no fault
	said     []string // complaints
}

// patience is how long something may take on a busy machine.
const patience = 12 * time.Second

func newTab(t *testing.T, scripts bool) *tab {
	t.Helper()
	ctx, cancel := chromedp.NewContext(site.browser)
	p := &tab{t: t, ctx: ctx}
	chromedp.ListenTarget(ctx, p.listen)
	actions := []chromedp.Action{network.Enable(), runtime.Enable(), cdplog.Enable(), chromedp.EmulateViewport(1280, 900)}
	if !scripts {
		actions = append(actions, emulation.SetScriptExecutionDisabled(true))
	}
	p.run(actions...)
	t.Cleanup(func() {
		p.mu.Lock()
		asked, said := p.asked, p.said
		p.mu.Unlock()
		cancel()
		for _, url := range asked {
			if !strings.HasPrefix(url, site.url) && !strings.HasPrefix(url, "data:") && url != "about:blank" {
				t.Errorf("something was loaded from elsewhere: %s", url)
			}
		}
		for _, text := range said {
			t.Errorf("the browser complains: %s", text)
		}
	})
	return p
}

func (p *tab) listen(event any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	complain := func(text string) {
		for _, expected := range p.expected {
			if strings.Contains(text, expected) {
				return
			}
		}
		p.said = append(p.said, text)
	}
	switch e := event.(type) {
	case *network.EventRequestWillBeSent:
		p.asked = append(p.asked, e.Request.URL)
	case *runtime.EventExceptionThrown:
		complain(e.ExceptionDetails.Error())
	case *runtime.EventConsoleAPICalled:
		complain(fmt.Sprintf("console.%s: %v", e.Type, e.Args))
	case *cdplog.EventEntryAdded:
		if e.Entry.Level == cdplog.LevelError || e.Entry.Level == cdplog.LevelWarning {
			complain(e.Entry.Text + " " + e.Entry.URL)
		}
	}
}

// run does something in the tab.
func (p *tab) run(actions ...chromedp.Action) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	// The first run makes the tab, which must live longer than its own time.
	if chromedp.FromContext(p.ctx).Target == nil {
		ctx = p.ctx
	}
	if err := chromedp.Run(ctx, actions...); err != nil {
		p.t.Fatalf("%v\nat %s:\n%.1500s", err, p.where(), p.text())
	}
}

func (p *tab) where() (url string) {
	_ = chromedp.Run(p.ctx, chromedp.Location(&url))
	return url
}

// text is what a person reads on the page.
func (p *tab) text() (text string) {
	_ = chromedp.Run(p.ctx, chromedp.Evaluate(`document.body.innerText`, &text))
	return text
}

func (p *tab) visit(path string) {
	p.t.Helper()
	p.run(chromedp.Navigate(site.url + strings.TrimPrefix(path, "/")))
}

// click clicks what has that text, and waits for the next page.
func (p *tab) click(selector, text string) {
	p.t.Helper()
	xpath := fmt.Sprintf(`//%s[contains(normalize-space(.), %q) and not(ancestor::*[@hidden])]`, selector, text)
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if _, err := chromedp.RunResponse(ctx, chromedp.Click(xpath, chromedp.BySearch, chromedp.NodeVisible)); err != nil {
		p.t.Fatalf("clicking %q: %v\nat %s:\n%.1500s", text, err, p.where(), p.text())
	}
}

// sees waits until the page has a text; a page without script is loaded again.
func (p *tab) sees(text string, scripts bool) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if strings.Contains(p.text(), text) {
			return
		}
		<-time.After(250 * time.Millisecond)
		if !scripts {
			p.run(chromedp.Reload())
		}
	}
	p.t.Fatalf("no %q at %s:\n%.2500s", text, p.where(), p.text())
}

// awaiting waits for a promise.
func awaiting(p *runtime.EvaluateParams) *runtime.EvaluateParams { return p.WithAwaitPromise(true) }
