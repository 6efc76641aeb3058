package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
)

var pageAddress = regexp.MustCompile(`http://[0-9.:]+/`)

// get asks for a page of the program.
func get(t *testing.T, url string, edit func(*http.Request)) (code int, body string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		edit(r)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close() // it was only read
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(data)
}

func TestThePageIsServedUntilASignal(t *testing.T) {
	b := newBench(t)
	b.letter("d1", errors.CodeAvatarNotFound, `{}`, time.Now())
	secret := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(secret, []byte("correct-horse\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		args  []string
		login string
	}{
		{"at loopback", []string{"ui", "--ui-addr", "127.0.0.1:0"}, ""},
		{"with a login", []string{"ui", "--ui-addr", "127.0.0.1:0", "--write", "--set", "ui.auth.token_file=" + secret}, "Bearer correct-horse"},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		said, code := newLines(), make(chan int, 1)
		go func() { code <- runContext(ctx, b.args(tc.args...), strings.NewReader(""), io.Discard, said) }()
		said.await(t, "the page is at http")
		url := pageAddress.FindString(said.String())
		status, page := get(t, url, func(r *http.Request) {
			if tc.login != "" {
				r.Header.Set("Authorization", tc.login)
			}
		})
		if status != http.StatusOK || !strings.Contains(page, "1 dead letter to decide on") || strings.Contains(page, "Look only") != (tc.login == "") {
			t.Errorf("%s: %d\n%s", tc.name, status, page)
		}
		if status, _ := get(t, url, nil); (status == http.StatusOK) != (tc.login == "") {
			t.Errorf("%s, without a login: %d", tc.name, status)
		}
		if status, _ := get(t, url, func(r *http.Request) { r.Host = "evil.example" }); status != http.StatusMisdirectedRequest {
			t.Errorf("%s, as evil.example: %d", tc.name, status)
		}
		cancel()
		if got := <-code; got != exitDone {
			t.Errorf("%s: exit %d\n%s", tc.name, got, said)
		}
		if strings.Contains(said.String(), "correct-horse") {
			t.Errorf("%s: the secret is in the log", tc.name)
		}
	}
}

func TestTheFlagOfWritingTakesPrecedenceOverTheFileEitherWay(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, tc := range []struct {
		file, flag string
		writes     bool
	}{
		{"true", "--write=false", false}, {"false", "--write", true}, {"false", "--write=true", true}, {"true", "", true},
	} {
		args := []string{"ui", "--ui-addr", "127.0.0.1:0", "-c", writeFile(t, "config.yaml", []byte("ui: {write: "+tc.file+"}\n"))}
		if tc.flag != "" {
			args = append(args, tc.flag)
		}
		page := start(t, "", b.args(args...)...)
		page.stderr.await(t, "the page is at http")
		_, body := get(t, pageAddress.FindString(page.stderr.String()), nil)
		if writes := !strings.Contains(body, "Look only"); writes != tc.writes {
			t.Errorf("ui.write: %s in the file, %s: the page writes: %t", tc.file, tc.flag, writes)
		}
		page.interrupt()
		page.wait()
	}
	expect(t, exitUsage, []string{"--write", "want true or false"}, "ui", "--write=perhaps")
}

func TestThePageIsRefusedToTheWorldWithoutALogin(t *testing.T) {
	for _, args := range [][]string{
		{"ui", "--ui-addr", ":0"}, {"ui", "--ui-addr", "0.0.0.0:8090"}, {"ui", "--ui-addr", "off"}, {"ui", "--set", "ui.auth.token_file=/nonexistent"},
		{"ui", "--ui-addr", ":0", "--set", "ui.trusted_header=X-User"}, {"run", "--embedded", "--ui-addr", ":0", "--set", "app.id=a", "--set", "app.api_key=key-for-tests"},
	} {
		expect(t, exitConfig, []string{"ui."}, args...)
	}
}

func TestAnEmbeddedWorkerServesThePageAndWorksWithoutItsAddress(t *testing.T) {
	t.Parallel()
	// One of them has the address, the other one none.
	addr := fmt.Sprintf("127.0.0.1:%d", natstest.Port(t))
	_, stopFirst := embedded(t, t.TempDir(), "--ui-addr", addr)
	_, stopSecond := embedded(t, t.TempDir(), "--ui-addr", addr)
	// The page may be there before the worker has made its streams.
	code, page := get(t, "http://"+addr+"/", nil)
	again, end := time.NewTicker(50*time.Millisecond), time.After(natstest.Patience)
	defer again.Stop()
	for waits := true; waits && code == http.StatusServiceUnavailable; {
		select {
		case <-again.C:
			code, page = get(t, "http://"+addr+"/", nil)
		case <-end:
			waits = false
		}
	}
	if code != http.StatusOK || !strings.Contains(page, "Queues") {
		t.Errorf("%d\n%s", code, page)
	}
	for _, stop := range []func() int{stopFirst, stopSecond} {
		if code := stop(); code != exitDone {
			t.Errorf("exit %d", code)
		}
	}
}
