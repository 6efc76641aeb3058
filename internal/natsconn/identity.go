package natsconn

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"avatarworker/internal/errors"
)

// serverURLs checks each address, because the library's own errors quote
// addresses with their passwords.
func serverURLs(list string) (string, error) {
	if strings.TrimSpace(list) == "" {
		return nats.DefaultURL, nil
	}
	var urls []string
	for i, text := range strings.Split(list, ",") {
		text = strings.TrimSpace(text)
		if text == "" {
			continue
		}
		if err := checkURL(text); err != nil {
			// Don't quote the address: in a malformed one the password can't be
			// told from the host.
			return "", fmt.Errorf("nats.url: address %d: %w", i+1, err)
		}
		urls = append(urls, text)
	}
	if len(urls) == 0 {
		return "", fmt.Errorf("nats.url names no server")
	}
	return strings.Join(urls, ","), nil
}

func checkURL(text string) error {
	if !strings.Contains(text, "://") {
		text = "nats://" + text
	}
	u, err := url.Parse(text)
	if err != nil {
		return fmt.Errorf("not a URL: expected nats://host:port; special characters in a password are written as %%XX")
	}
	switch u.Scheme {
	case "nats", "tls", "ws", "wss":
	default:
		return fmt.Errorf("unknown scheme %q: use nats, tls, ws or wss", u.Scheme)
	}
	if u.Hostname() == "" {
		return fmt.Errorf("no host")
	}
	return nil
}

// identity returns the options for authentication. It reads every file now: the
// library would read some only at each connect, and would try forever.
func (o Options) identity() ([]nats.Option, error) {
	if err := o.checkOne(); err != nil {
		return nil, err
	}
	opts, err := o.TLS.options()
	if err != nil {
		return nil, err
	}
	switch {
	case o.Creds != "":
		path := expandHome(o.Creds)
		if err := regular("nats.creds", path); err != nil {
			return nil, err
		}
		if err := checkCreds(path); err != nil {
			return nil, err
		}
		opts = append(opts, nats.UserCredentials(path))
	case o.NKey != "":
		if err := regular("nats.nkey", expandHome(o.NKey)); err != nil {
			return nil, err
		}
		nkey, err := nats.NkeyOptionFromSeed(expandHome(o.NKey))
		if err != nil {
			return nil, fmt.Errorf("nats.nkey %s: %w: expected a file with a user's seed (it begins with SU)", o.NKey, err)
		}
		opts = append(opts, nkey)
	case o.User != "":
		opts = append(opts, nats.UserInfo(o.User, o.Password))
	case o.Token != "":
		opts = append(opts, nats.Token(o.Token))
	}
	return opts, nil
}

func (o Options) checkOne() error {
	var given []string
	for _, way := range []struct{ name, value string }{
		{"nats.creds", o.Creds}, {"nats.nkey", o.NKey}, {"a user", o.User}, {"a token", o.Token},
	} {
		if way.value != "" {
			given = append(given, way.name)
		}
	}
	if len(given) > 1 {
		return fmt.Errorf("%s are given together: choose one way to log in to NATS", strings.Join(given, " and "))
	}
	return nil
}

// checkCreds reads a credentials file as the library will.
func checkCreds(path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("nats.creds: %w", err)
	}
	if _, err := nkeys.ParseDecoratedJWT(content); err != nil {
		return fmt.Errorf("nats.creds %s: no user JWT in it: expected a credentials file as nsc writes it", path)
	}
	key, err := nkeys.ParseDecoratedNKey(content)
	if err != nil {
		return fmt.Errorf("nats.creds %s: no user seed in it: expected a credentials file as nsc writes it", path)
	}
	key.Wipe()
	return nil
}

// readable reads a context's credentials file. The library does so only at each
// connect, and would try forever with a missing one.
func readable(o *nats.Options) error {
	if o.UserJWT == nil {
		return nil // no file, or read already
	}
	if _, err := o.UserJWT(); err != nil {
		return fmt.Errorf("creds: %w", err)
	}
	if _, err := o.SignatureCB([]byte("nonce")); err != nil {
		return fmt.Errorf("creds: %w", err)
	}
	return nil
}

// variable is the environment variable of a key that names a file.
func variable(key string) string {
	return "NATS_" + strings.ToUpper(strings.TrimPrefix(strings.TrimPrefix(key, "nats."), "tls."))
}

// regular refuses a path that names something other than a file. A named pipe
// would make each connect wait for a writer. What else is wrong with a file is left to the
// code that reads it, which reports it.
func regular(key, path string) error {
	if path == "" {
		return nil
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s (%s): there is no file %s: correct the path, or put the file there", key, variable(key), path)
	}
	if err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %s is not a regular file (%s): name a file that can be read again at each connect", key, path, info.Mode().Type())
	}
	return nil
}

func (t TLS) options() ([]nats.Option, error) {
	var opts []nats.Option
	cert, key, ca := expandHome(t.Cert), expandHome(t.Key), expandHome(t.CA)
	for _, f := range []struct{ key, path string }{{"nats.tls.cert", cert}, {"nats.tls.key", key}, {"nats.tls.ca", ca}} {
		if err := regular(f.key, f.path); err != nil {
			return nil, err
		}
	}
	switch {
	case cert != "" && key != "":
		if _, err := tls.LoadX509KeyPair(cert, key); err != nil {
			return nil, fmt.Errorf("nats.tls.cert %s with nats.tls.key %s: %w", t.Cert, t.Key, err)
		}
		opts = append(opts, nats.ClientCert(cert, key))
	case cert != "":
		return nil, fmt.Errorf("nats.tls.cert is given without nats.tls.key")
	case key != "":
		return nil, fmt.Errorf("nats.tls.key is given without nats.tls.cert")
	}
	if ca != "" {
		content, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("nats.tls.ca: %w", err)
		}
		if !x509.NewCertPool().AppendCertsFromPEM(content) {
			return nil, fmt.Errorf("nats.tls.ca %s: no certificate in it: expected PEM", t.CA)
		}
		opts = append(opts, nats.RootCAs(ca))
	}
	return opts, nil
}

// expandHome replaces a leading "~/" by the user's home directory, as a shell
// does: in a config file or an environment variable no shell has done it.
func expandHome(path string) string {
	rest, ok := strings.CutPrefix(path, "~/")
	if !ok {
		return path
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return path
	}
	return filepath.Join(home, rest)
}
