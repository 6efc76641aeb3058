package config

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestKeyFileIsReadAfreshEachTime(t *testing.T) {
	file := write(t, " first\n")
	c := load(t, Source{Overrides: map[string]string{"app.id": "a", "app.api_key_file": file}})
	creds, ok := c.Credentials("")
	if !ok || creds.AppID != "a" {
		t.Fatalf("got %+v, %v", creds, ok)
	}
	for _, want := range []string{"first", "second"} {
		if err := os.WriteFile(file, []byte(want+"\r\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if key, err := creds.APIKey(); err != nil || key != want {
			t.Errorf("got %q, %v, want %q", key, err, want)
		}
	}
}

func TestCredentialsAreThoseOfTheApp(t *testing.T) {
	c := load(t, Source{File: write(t, "app: {id: a, api_key: ka, max_sessions: 2}\napps: {b: {api_key: kb}}\n")})
	for _, row := range []struct {
		ask, id, key string
		max          int
	}{{"", "a", "ka", 2}, {"a", "a", "ka", 2}, {"b", "b", "kb", 0}} {
		creds, ok := c.Credentials(row.ask)
		if key, err := creds.APIKey(); !ok || err != nil || key != row.key || creds.AppID != row.id || creds.MaxSessions != row.max {
			t.Errorf("%q gives %+v with %q (%v)", row.ask, creds, key, err)
		}
	}
	if _, ok := c.Credentials("c"); ok {
		t.Error("an app that is not configured has credentials")
	}
	if _, ok := Defaults().Credentials(""); ok {
		t.Error("no app has credentials")
	}
}

func TestRequireAppSaysWhatIsMissing(t *testing.T) {
	dir := t.TempDir()
	for _, row := range []struct{ name, file, want string }{
		{"no app", "", "app.id: is not set"},
		{"key without id", "app: {api_key: hunter2}", "app.id: is not set, though app.api_key is"},
		{"id without key", "app: {id: a}", "app.api_key: is not set"},
		{"no such file", "app: {id: a, api_key_file: " + filepath.Join(dir, "none") + "}", "can't be read: no such file"},
		{"a directory", "app: {id: a, api_key_file: " + dir + "}", "can't be read: it is a directory"},
		{"a named pipe", "app: {id: a, api_key_file: " + fifo(t) + "}", "can't be read: it is a named pipe"},
		{"a device", "app: {id: a, api_key_file: /dev/zero}", "can't be read: it is a device"},
		{"a link to a pipe", "app: {id: a, api_key_file: " + link(t, fifo(t)) + "}", "can't be read: it is a named pipe"},
		{"empty file", "app: {id: a, api_key_file: " + write(t, " \n") + "}", "is empty"},
		{"two lines", "app: {id: a, api_key_file: " + write(t, "hunter2\nhunter2\n") + "}", "line break"},
		{"huge", "app: {id: a, api_key_file: " + write(t, strings.Repeat("hunter2", 10000)) + "}", "larger than 64KiB"},
		{"another app's", "app: {id: a, api_key: k}\napps: {b: {api_key_file: " + filepath.Join(dir, "none") + "}}", "apps.b.api_key_file: "},
		{"fine", "app: {id: a, api_key: k}", ""},
		{"only apps", "apps: {b: {api_key: k}}", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			err := load(t, Source{File: write(t, row.file)}).RequireApp()
			switch {
			case row.want == "" && err != nil:
				t.Error(err)
			case row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)):
				t.Errorf("got %v, want %s", err, row.want)
			case err != nil && strings.Contains(err.Error(), "hunter2"):
				t.Errorf("the error shows the key: %v", err)
			}
		})
	}
}

// fifo makes a named pipe that has no writer: opening it for reading waits.
func fifo(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func link(t *testing.T, to string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestASecretMayBeALinkToAFile(t *testing.T) {
	c := load(t, Source{File: write(t, "app: {id: a, api_key_file: "+link(t, write(t, "key\n"))+"}")})
	if err := c.RequireApp(); err != nil {
		t.Error(err)
	}
}

func TestNoFileOfASecretMakesTheWorkerWait(t *testing.T) {
	for _, key := range []string{"nats.token_file", "nats.password_file"} {
		overrides := map[string]string{key: fifo(t)}
		if key == "nats.password_file" {
			overrides["nats.user"] = "me"
		}
		if _, _, err := Load(Source{Overrides: overrides, Secrets: true}); err == nil || !strings.Contains(err.Error(), "named pipe") {
			t.Errorf("%s: %v", key, err)
		}
	}
}

func TestLoginReadsPasswordAndTokenFiles(t *testing.T) {
	c := load(t, Source{Overrides: map[string]string{"nats.user": "me", "nats.password_file": write(t, "pw\n")}})
	if password, token, err := c.NATS.Login(); err != nil || password != "pw" || token != "" {
		t.Errorf("got %q %q %v", password, token, err)
	}
	c = load(t, Source{Overrides: map[string]string{"nats.token_file": filepath.Join(t.TempDir(), "none")}})
	if _, _, err := c.NATS.Login(); err == nil || !strings.Contains(err.Error(), "nats.token_file: ") {
		t.Errorf("got %v", err)
	}
}
