package web

import (
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
)

// HostCheck refuses requests for a name that is not one of ours. A web page whose
// name has come to lead here (DNS rebinding) would else be allowed to read the
// answers, and to ask for changes.
type HostCheck struct {
	Addr    string   // host:port at which the server listens: its host is known
	Hosts   []string // names and addresses that are known too, beside localhost and this host's name
	Setting string   // that has Hosts, for the answer to others
	// OwnAddresses leaves out addresses that are neither in Hosts nor the
	// connection's own. An address can't be made to lead here by others, so that
	// this only matters to who counts on the list.
	OwnAddresses bool
}

// Handler serves next to requests with a Host that is known, and the status 421 to
// others.
func (c HostCheck) Handler(next http.Handler) http.Handler {
	known := map[string]bool{"localhost": true}
	if host, _, err := net.SplitHostPort(c.Addr); err == nil {
		known[hostName(host)] = true
	}
	if host, err := os.Hostname(); err == nil {
		known[hostName(host)] = true
	}
	for _, host := range c.Hosts {
		known[hostName(host)] = true
	}
	delete(known, "") // of an address without a host
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		host = hostName(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
		if !known[host] && !strings.HasSuffix(host, ".localhost") && !c.takesAddress(r, host) {
			http.Error(w, "this name is not served here: use an address, or add the name to "+c.Setting, http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// takesAddress reports whether a host that is not known by name is an address that
// is served, or is missing, as in HTTP/1.0.
func (c HostCheck) takesAddress(r *http.Request, host string) bool {
	addr, err := netip.ParseAddr(host)
	switch {
	case !c.OwnAddresses:
		return err == nil || host == ""
	case err != nil:
		return false
	case addr.IsLoopback():
		return true
	}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok {
		return false
	}
	own, err := netip.ParseAddrPort(local.String())
	return err == nil && own.Addr().Unmap().WithZone("") == addr.Unmap().WithZone("")
}

// hostName is a name as names are compared.
func hostName(host string) string { return strings.ToLower(strings.TrimSuffix(host, ".")) }
