package main

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/rs/zerolog"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver"
)

// startEmbedded starts the NATS server of run --embedded at nats.url.
func startEmbedded(cfg *config.Config, log zerolog.Logger) (*natsserver.Server, error) {
	host, port, err := listenAt(cfg.NATS.URL)
	if err != nil {
		return nil, &configError{err}
	}
	if cfg.NATS.NKey != "" {
		return nil, &configError{errors.New("nats.nkey: --embedded knows no nkeys: set nats.user and nats.password, or nats.token, instead")}
	}
	if tls := cfg.NATS.TLS; tls.Cert+tls.Key+tls.CA != "" || cfg.NATS.TLSFirst {
		return nil, &configError{errors.New("nats.tls: --embedded listens without TLS: leave out nats.tls_first, nats.tls.cert, nats.tls.key and nats.tls.ca, or run NATS as a separate server")}
	}
	if cfg.NATS.APIPrefix != "" {
		return nil, &configError{errors.New("nats.api_prefix: --embedded has JetStream at $JS.API: leave it out, or run NATS as a separate server")}
	}
	password, token, err := cfg.NATS.Login()
	if err != nil {
		return nil, &configError{err}
	}
	server, err := natsserver.Start(natsserver.Options{
		StoreDir: cfg.NATS.StoreDir, Host: host, Port: port, Domain: cfg.NATS.Domain,
		User: cfg.NATS.User, Password: password, Token: token, Logger: log,
	})
	if errors.Is(err, natsserver.ErrOpen) {
		return nil, &configError{err}
	}
	return server, err
}

// listenAt returns the host and port of nats.url, where the embedded server
// listens.
func listenAt(text string) (host string, port int, err error) {
	if strings.Contains(text, ",") {
		return "", 0, errors.New("nats.url: --embedded starts one server, so it takes one URL")
	}
	if !strings.Contains(text, "://") {
		text = "nats://" + text
	}
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" {
		return "", 0, errors.New("nats.url: --embedded needs an address to listen at, such as nats://127.0.0.1:4222")
	}
	if u.Scheme != "nats" {
		return "", 0, fmt.Errorf("nats.url: --embedded listens without TLS and WebSocket, so that %s:// can't be served: write nats://host:port, or run NATS as a separate server", u.Scheme)
	}
	if u.User != nil {
		return "", 0, errors.New("nats.url: with --embedded set nats.user and nats.password, or nats.token, instead of writing them into the URL")
	}
	port = 4222
	if p := u.Port(); p != "" {
		if port, err = strconv.Atoi(p); err != nil || port > 65535 {
			return "", 0, fmt.Errorf("nats.url: %q is not a port", p)
		}
	}
	if port == 0 {
		port = natsserver.RandomPort
	}
	return u.Hostname(), port, nil
}
