package audio

import (
	"net/netip"
	"testing"
)

func TestOnlyGlobalUnicastThatIsNoSpecialPurposeIsPublic(t *testing.T) {
	for addr, want := range map[string]bool{
		// The edges of IPv4 blocks.
		"1.0.0.0": true, "9.255.255.255": true, "11.0.0.0": true, "100.63.255.255": true, "100.128.0.0": true, "126.255.255.255": true, "128.0.0.1": true,
		"169.253.255.255": true, "169.255.0.0": true, "172.15.255.255": true, "172.32.0.0": true, "192.0.1.0": true, "192.0.3.1": true, "192.88.98.1": true,
		"198.17.255.255": true, "198.20.0.0": true, "223.255.255.255": true, "168.63.129.15": true, "168.63.129.17": true,
		"168.63.129.16": false, "100.100.100.200": false, "192.0.0.192": false, "192.88.99.1": false, "192.31.196.1": false, "192.52.193.1": false, "192.175.48.1": false,
		"198.19.255.255": false, "224.0.0.0": false, "255.0.0.1": false,
		// IPv4 inside IPv6, in each way.
		"::ffff:168.63.129.16": false, "::ffff:169.254.169.254": false, "::ffff:0:127.0.0.1": false, "::ffff:0:8.8.8.8": false,
		"::8.8.8.8": false, "::169.254.169.254": false, "64:ff9b::a9fe:a9fe": false, "64:ff9b::a83f:8110": false, "64:ff9b:1::7f00:1": false,
		"2002:a9fe:a9fe::1": false, "2002:a83f:8110::1": false, "2001:0:4136:e378:8000:63bf:3fff:fdd2": false,
		"2606:4700::5efe:10.0.0.1": false, "2606:4700::200:5efe:127.0.0.1": false, "2606:4700::5efe:8.8.8.8": true,
		// Everything outside 2000::/3, and what is special within.
		"1fff:ffff::1": false, "4000::1": false, "5f00::1": false, "8000::1": false, "f000::1": false, "fd00:ec2::254": false, "fd20:ce::254": false, "100:0:0:1::1": false, "200::1": false,
		"2000::1": true, "2a00:1450:4001:81b::200e": true, "2001:200::1": true, "2001:4860:4860::8888": true, "3ffe::1": true,
		"2001:1::1": false, "2001:2::1": false, "2001:20::1": false, "2001:1ff::1": false, "2001:db8:ffff::1": false, "3fff::1": false, "3fff:fff::1": false, "2620:4f:8000::1": false,
		"2606:4700::1111%eth0": true, "fe80::1%eth0": false,
	} {
		if got := isPublic(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: public is %t, want %t", addr, got, want)
		}
	}
	for host, addr := range map[string]string{"localhost": "::ffff:127.0.0.1", "myhost": "127.0.0.1"} {
		want := host + " leads to 127.0.0.1, a private or special address"
		if _, err := public(host, []netip.Addr{netip.MustParseAddr(addr)}); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if isPublic(netip.Addr{}) {
		t.Error("no address is public")
	}
}
