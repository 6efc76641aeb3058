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

// forbiddenError means that a host has a forbidden address.
type forbiddenError struct {
	host string
	addr netip.Addr
}

func (e *forbiddenError) Error() string {
	if e.host == e.addr.String() {
		return e.host + " is a private or special address"
	}
	return e.host + " leads to " + e.addr.Unmap().String() + ", a private or special address"
}

// guardedDial returns a dial function that looks the host up once, drops the
// addresses that are not public, and connects to one of the rest. A name that
// resolves differently the next time can't bypass the check. Redirects use it
// too.
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

// special are the blocks of IANA's special-purpose address registries (for IPv4
// all of them, for IPv6 those within globalUnicast), and addresses that a cloud
// gives a meaning of its own inside its networks.
var special = prefixes(
	"0.0.0.0/8",         // this network
	"10.0.0.0/8",        // private use
	"100.64.0.0/10",     // carrier-grade NAT
	"127.0.0.0/8",       // loopback
	"168.63.129.16/32",  // Azure's platform: no special-purpose block
	"169.254.0.0/16",    // link-local
	"172.16.0.0/12",     // private use
	"192.0.0.0/24",      // protocol assignments
	"192.0.2.0/24",      // documentation
	"192.31.196.0/24",   // AS112
	"192.52.193.0/24",   // AMT
	"192.88.99.0/24",    // 6to4 relays
	"192.168.0.0/16",    // private use
	"192.175.48.0/24",   // AS112
	"198.18.0.0/15",     // benchmarks
	"198.51.100.0/24",   // documentation
	"203.0.113.0/24",    // documentation
	"224.0.0.0/4",       // multicast
	"240.0.0.0/4",       // reserved, broadcast
	"2001::/23",         // protocol assignments, Teredo
	"2001:db8::/32",     // documentation
	"2620:4f:8000::/48", // AS112
	"3fff::/20",         // documentation
)

var (
	// globalUnicast is all of IPv6 that is assigned for use on the internet.
	globalUnicast = netip.MustParsePrefix("2000::/3")
	// nat64 precedes an IPv4 address to which a network translates.
	nat64 = netip.MustParsePrefix("64:ff9b::/96")
	// sixToFour has the IPv4 address of a tunnel's end in bytes 2 to 5.
	sixToFour = netip.MustParsePrefix("2002::/16")
)

func prefixes(texts ...string) []netip.Prefix {
	list := make([]netip.Prefix, len(texts))
	for i, text := range texts {
		list[i] = netip.MustParsePrefix(text)
	}
	return list
}

// isPublic reports whether an address is one of the public internet: global
// unicast, and in no special-purpose block. Where an IPv6 address carries an IPv4
// one to which the packets may go, that one has to be public too.
func isPublic(addr netip.Addr) bool {
	addr = addr.WithZone("").Unmap()
	if addr.Is6() && nat64.Contains(addr) {
		return isPublic(lastIPv4(addr))
	}
	if !addr.IsValid() || addr.Is6() && !globalUnicast.Contains(addr) {
		return false
	}
	for _, block := range special {
		if block.Contains(addr) {
			return false
		}
	}
	b := addr.As16()
	if addr.Is6() && sixToFour.Contains(addr) && !isPublic(netip.AddrFrom4([4]byte(b[2:6]))) {
		return false
	}
	return !isISATAP(addr) || isPublic(lastIPv4(addr))
}

// isISATAP reports whether an address is of a tunnel whose end is the IPv4 address
// in its last four bytes (RFC 5214).
func isISATAP(addr netip.Addr) bool {
	if !addr.Is6() {
		return false
	}
	b := addr.As16()
	return b[8]&^0x02 == 0 && b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe
}

func lastIPv4(addr netip.Addr) netip.Addr {
	b := addr.As16()
	return netip.AddrFrom4([4]byte(b[12:16]))
}
