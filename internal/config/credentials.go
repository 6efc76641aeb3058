package config

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"unicode"

	"avatarworker/internal/errors"
)

// Credentials are one app's.
type Credentials struct {
	AppID       string
	MaxSessions int // over the whole fleet; 0: no limit

	secret Secret
	file   string
	key    string // of the configuration, for messages
}

// Credentials returns those of an app; "" asks for the default app's. ok is
// false where the app is not in the configuration.
func (c *Config) Credentials(appID string) (creds Credentials, ok bool) {
	app, key := &c.App, "app.api_key"
	if appID != "" && appID != c.App.ID {
		if app, ok = c.Apps[appID]; !ok {
			return Credentials{}, false
		}
		key = "apps." + appID + ".api_key"
	}
	if app.ID == "" && appID == "" {
		return Credentials{}, false
	}
	id := appID
	if id == "" {
		id = app.ID
	}
	return Credentials{AppID: id, MaxSessions: app.MaxSessions, secret: app.APIKey, file: app.APIKeyFile, key: key}, true
}

// APIKey returns the key; from a file it is read afresh each time, so that a
// rotated key is found without a restart. An error names the file, never the
// key.
func (c Credentials) APIKey() (string, error) {
	key, err := readSecret(c.key, c.secret, c.file)
	if err == nil && key == "" {
		err = fmt.Errorf("%s is not set: give it, or %s_file", c.key, c.key)
	}
	return key, err
}

// Login returns the password and the token for NATS, read from their files
// where they are in files; "" is none.
func (n *NATS) Login() (password, token string, err error) {
	if password, err = readSecret("nats.password", n.Password, n.PasswordFile); err != nil {
		return "", "", err
	}
	if token, err = readSecret("nats.token", n.Token, n.TokenFile); err != nil {
		return "", "", err
	}
	return password, token, nil
}

// maxSecret bounds a secret's file: a wrong path may name anything.
const maxSecret = 64 * kib

func readSecret(key string, secret Secret, file string) (string, error) {
	text := secret.Reveal()
	if file != "" {
		data, err := readFile(file)
		if err != nil {
			return "", fmt.Errorf("%s_file: %s can't be read: %s", key, file, reason(err))
		}
		text = string(bytes.TrimPrefix(data, []byte("\uFEFF")))
	}
	text = strings.TrimSpace(text)
	switch {
	case file != "" && text == "":
		return "", fmt.Errorf("%s_file: %s is empty", key, file)
	case strings.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) || r == unicode.ReplacementChar }):
		// It can't be an HTTP header, and the error of the HTTP client would
		// show it.
		return "", fmt.Errorf("%s holds a line break or another control character: give the key alone", key)
	}
	return text, nil
}

// readFile reads a regular file. Anything else is refused and not read: a FIFO
// would wait for a writer, and has nothing left when it is read again.
func readFile(path string) (data []byte, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if err := regular(info.Mode()); err != nil {
		return nil, err
	}
	// Not to wait, should it have become a FIFO since.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
	}()
	if info, err = f.Stat(); err != nil {
		return nil, err
	}
	if err := regular(info.Mode()); err != nil {
		return nil, err
	}
	data, err = io.ReadAll(io.LimitReader(f, int64(maxSecret)+1))
	if err == nil && len(data) > int(maxSecret) {
		return nil, fmt.Errorf("it is larger than %s", maxSecret)
	}
	return data, err
}

// regular returns nil for a regular file, else what it is instead.
func regular(mode os.FileMode) error {
	kind := "it is not a regular file"
	switch {
	case mode.IsRegular():
		return nil
	case mode.IsDir():
		kind = "it is a directory"
	case mode&os.ModeNamedPipe != 0:
		kind = "it is a named pipe"
	case mode&os.ModeSocket != 0:
		kind = "it is a socket"
	case mode&os.ModeDevice != 0:
		kind = "it is a device"
	}
	return errors.New(kind + ": name a regular file that holds the secret")
}

// RequireApp checks what the commands that open sessions need: at least one
// app, and for each a key that can be read now. The error is an *Error.
func (c *Config) RequireApp() error {
	v := &validator{c: c}
	app := &c.App
	switch {
	case app.ID == "" && !app.hasKey() && len(c.Apps) == 0:
		v.fail("app.id", "is not set: sessions need an app: set app.id and app.api_key, or SPATIUS_APP_ID and SPATIUS_API_KEY")
	case app.ID != "" && !app.hasKey():
		v.fail("app.api_key", "is not set: give it, or app.api_key_file")
	}
	v.appKeys()
	return asError(v.found)
}

func (a *App) hasKey() bool { return a.APIKey != "" || a.APIKeyFile != "" }

// secrets checks those that are configured, with what is in their files now.
// What is not configured at all a deployment may still add.
func (v *validator) secrets() {
	v.appKeys()
	n := &v.c.NATS
	v.readable("nats.password", n.Password, n.PasswordFile)
	v.readable("nats.token", n.Token, n.TokenFile)
}

func (v *validator) appKeys() {
	app := &v.c.App
	if app.ID == "" && app.hasKey() {
		v.fail("app.id", "is not set, though app.api_key is: set it, or SPATIUS_APP_ID")
		// It is where the key is that it should be.
		for _, key := range []string{"app.api_key", "app.api_key_file"} {
			if o, set := v.c.origins[key]; set {
				v.found[len(v.found)-1].Source, v.found[len(v.found)-1].Line = o.source, o.line
			}
		}
	}
	v.readable("app.api_key", app.APIKey, app.APIKeyFile)
	for _, id := range sortedNames(v.c.Apps) {
		v.readable("apps."+id+".api_key", v.c.Apps[id].APIKey, v.c.Apps[id].APIKeyFile)
	}
}

// readable checks a secret where there is one.
func (v *validator) readable(key string, secret Secret, file string) {
	text, err := readSecret(key, secret, file)
	switch {
	case err == nil && text == "" && secret != "":
		v.fail(key, "holds only spaces")
	case err != nil:
		if file != "" {
			key += "_file"
		}
		v.fail(key, "%s", strings.TrimLeft(strings.TrimPrefix(err.Error(), key), ": "))
	}
}
