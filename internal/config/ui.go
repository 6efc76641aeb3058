package config

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
)

// headerName is a name that an HTTP header may have.
var headerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]*$`)

func (v *validator) ui() {
	u := &v.c.UI
	v.listenAddr("ui.addr", u.Addr, "127.0.0.1:8090")
	if u.TrustedHeader != "" {
		v.matches("ui.trusted_header", u.TrustedHeader, headerName, "give the name of an HTTP header, such as X-Forwarded-User")
	}
	for i, proxy := range u.TrustedProxies {
		if _, err := parseNetwork(proxy); err != nil {
			v.fail(fmt.Sprintf("ui.trusted_proxies[%d]", i), "%s is neither an address nor a network: write 10.0.0.7 or 10.0.0.0/8", quote(proxy))
		}
	}
	for i, host := range u.Hosts {
		if _, err := netip.ParseAddr(host); err != nil {
			v.matches(fmt.Sprintf("ui.hosts[%d]", i), host, dnsName, "give a host's name or address without scheme and port, such as avatars.example.com")
		}
	}
}

// parseNetwork reads an address or a network.
func parseNetwork(text string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(text); err == nil {
		return addr.Prefix(addr.BitLen())
	}
	p, err := netip.ParsePrefix(text)
	return p.Masked(), err
}

// Networks are the addresses of the trusted proxies.
func (u *UI) Networks() []netip.Prefix {
	var list []netip.Prefix
	for _, text := range u.TrustedProxies {
		if p, err := parseNetwork(text); err == nil { // Validate has said so
			list = append(list, p)
		}
	}
	return list
}

// Loopback reports whether only this machine can reach the page.
func (u *UI) Loopback() bool {
	host, _, err := net.SplitHostPort(u.Addr)
	return err == nil && isLoopback(host)
}

// hasAuth reports whether any way to log in is configured.
func (u *UI) hasAuth() bool {
	return u.Auth.TokenFile != "" || u.Auth.PasswordFile != "" || u.TrustedHeader != ""
}

// RequireUI checks what the commands that serve the page need: a user from another machine
// has to log in, and the secrets can be read now. The error is
// an *Error.
func (c *Config) RequireUI() error {
	v, u := &validator{c: c}, &c.UI
	if u.Addr != "" && !u.Loopback() && !u.hasAuth() {
		v.fail("ui.addr", "%s can be reached from other machines, and nothing says who may see the page: set ui.auth.token_file, ui.auth.user and ui.auth.password_file, or ui.trusted_header; or listen at 127.0.0.1", quote(u.Addr))
	}
	switch {
	case u.Auth.User != "" && u.Auth.PasswordFile == "":
		v.fail("ui.auth.user", "is set without ui.auth.password_file: give the file that holds the password")
	case u.Auth.User == "" && u.Auth.PasswordFile != "":
		v.fail("ui.auth.password_file", "is set without ui.auth.user: give the user's name")
	}
	if u.TrustedHeader != "" && len(u.TrustedProxies) == 0 {
		v.fail("ui.trusted_header", "is set without ui.trusted_proxies, so it is never trusted: give the addresses of the proxy that sets it")
	}
	if u.TrustedHeader == "" && len(u.TrustedProxies) > 0 {
		v.fail("ui.trusted_proxies", "is set without ui.trusted_header: give the header in which the proxy says who the user is")
	}
	v.readable("ui.auth.token", "", u.Auth.TokenFile)
	v.readable("ui.auth.password", "", u.Auth.PasswordFile)
	return asError(v.found)
}

// Secrets returns the token and the password of the page as they are in their files
// now; "" is none.
func (a *UIAuth) Secrets() (token, password string, err error) {
	if token, err = readSecret("ui.auth.token", "", a.TokenFile); err != nil {
		return "", "", err
	}
	if password, err = readSecret("ui.auth.password", "", a.PasswordFile); err != nil {
		return "", "", err
	}
	return token, password, nil
}
