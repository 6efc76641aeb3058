package audio

import (
	"context"
	"net"
	"net/netip"
	"time"

	"avatarworker/internal/errors"
)

// Resolver looks up a host's addresses; *net.Resolver does.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// DialFunc connects to an address as net.Dialer.DialContext does.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// dialTimeout is how long one of several addresses may take before the next is
// tried.
const dialTimeout = 10 * time.Second

// forbiddenError says that a host leads where no job may go.
type forbiddenError struct {
	host string
	addr netip.Addr
}

func (e *forbiddenError) Error() string {
	if e.host == e.addr.String() {
		return e.host + " is a private or special address"
	}
	return e.host + " leads to " + e.addr.String() + ", a private or special address"
}

// guardedDial returns a dial function that looks the host up once, drops the
// addresses that are not public, and connects to one of those it looked at: a
// name that resolves differently the next time can't slip past the check. It
// is called for redirects too.
func guardedDial(opts Options) DialFunc {
	resolver, dial := opts.Resolver, opts.Dial
	if resolver == nil {
		resolver = net.DefaultResolver
	}
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		addrs, err := lookup(ctx, resolver, host)
		if err != nil {
			return nil, err
		}
		if !opts.AllowPrivateURLs {
			if addrs, err = public(host, addrs); err != nil {
				return nil, err
			}
		}
		return dialFirst(ctx, dial, network, port, addrs)
	}
}

func lookup(ctx context.Context, resolver Resolver, host string) ([]netip.Addr, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{addr}, nil
	}
	addrs, err := resolver.LookupNetIP(ctx, "ip", host)
	if err == nil && len(addrs) == 0 {
		err = &net.DNSError{Err: "no addresses", Name: host, IsNotFound: true}
	}
	return addrs, err
}

func public(host string, addrs []netip.Addr) ([]netip.Addr, error) {
	var allowed []netip.Addr
	for _, addr := range addrs {
		if isPublic(addr) {
			allowed = append(allowed, addr)
		}
	}
	if len(allowed) == 0 {
		return nil, &forbiddenError{host: host, addr: addrs[0]}
	}
	return allowed, nil
}

func dialFirst(ctx context.Context, dial DialFunc, network, port string, addrs []netip.Addr) (net.Conn, error) {
	var failures []error
	for _, addr := range addrs {
		one, cancel := context.WithTimeout(ctx, dialTimeout)
		conn, err := dial(one, network, net.JoinHostPort(addr.String(), port))
		cancel()
		if err == nil {
			return conn, nil
		}
		failures = append(failures, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(failures...)
}

// specialRanges are the blocks that are not the public internet, beyond those
// that netip tells by itself (IANA's special-purpose registries).
func specialRanges() []string {
	return []string{
		"0.0.0.0/8",       // this network
		"100.64.0.0/10",   // carrier-grade NAT
		"192.0.0.0/24",    // protocol assignments
		"192.0.2.0/24",    // documentation
		"192.88.99.0/24",  // 6to4 relays
		"198.18.0.0/15",   // benchmarks
		"198.51.100.0/24", // documentation
		"203.0.113.0/24",  // documentation
		"240.0.0.0/4",     // reserved, broadcast
		"::/96",           // IPv4-compatible, loopback, unspecified
		"64:ff9b:1::/48",  // local NAT64
		"100::/64",        // discard
		"2001::/23",       // protocol assignments, Teredo
		"2001:db8::/32",   // documentation
		"3fff::/20",       // documentation
		"5f00::/16",       // segment routing
		"fec0::/10",       // site-local, deprecated
	}
}

// isPublic reports whether an address is one of the public internet. Where an
// IPv6 address carries an IPv4 one, that one decides.
func isPublic(addr netip.Addr) bool {
	addr = addr.WithZone("").Unmap()
	if v4, ok := embedded(addr); ok {
		return isPublic(v4)
	}
	if !addr.IsGlobalUnicast() || addr.IsPrivate() {
		return false
	}
	for _, r := range specialRanges() {
		if netip.MustParsePrefix(r).Contains(addr) {
			return false
		}
	}
	return true
}

// embedded is the IPv4 address that NAT64 (64:ff9b::/96) or 6to4 (2002::/16)
// would send the packets to.
func embedded(addr netip.Addr) (netip.Addr, bool) {
	if !addr.Is6() {
		return netip.Addr{}, false
	}
	b := addr.As16()
	switch {
	case netip.MustParsePrefix("64:ff9b::/96").Contains(addr):
		return netip.AddrFrom4([4]byte(b[12:16])), true
	case netip.MustParsePrefix("2002::/16").Contains(addr):
		return netip.AddrFrom4([4]byte(b[2:6])), true
	}
	return netip.Addr{}, false
}
