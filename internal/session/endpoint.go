package session

import (
	"net/url"
	"regexp"
	"strings"

	"avatarworker/internal/errors"
)

const defaultBootstrapURL = "https://global.spatialwalk.top/bootstrap"

// Endpoints override the backend's addresses. Empty ones are derived from the
// region (docs/protocol.md, section 1).
type Endpoints struct {
	// ConsoleURL ends in /v1/console; a final /session-tokens is tolerated.
	ConsoleURL string
	// IngressURL ends in /v2/driveningress; a final /websocket is tolerated,
	// and so are http and https.
	IngressURL string
	// BootstrapURL is the whole address.
	BootstrapURL string
}

func (e Endpoints) explicit() bool { return e.ConsoleURL != "" && e.IngressURL != "" }

// regionPattern is what the JavaScript SDK accepts, plus digits.
var regionPattern = regexp.MustCompile(`^[a-z0-9]{1,32}(-[a-z0-9]{1,32}){1,4}$`)

func checkRegion(region string) error {
	if regionPattern.MatchString(region) {
		return nil
	}
	return errors.Newf(errors.CodeInvalidJob, errors.PhaseJob,
		"region %.64q is not valid: use lowercase words joined by hyphens, such as us-west", region)
}

// The vendor's domains.
const (
	domain   = "spatius.ai"
	domainCN = "spatialwalk.top"
)

func regionDomain(region string) string {
	if strings.HasPrefix(region, "cn-") {
		return domainCN
	}
	return domain
}

// mayReplay reports whether the ingress may be a simulated one: its address is
// configured, and is not one of the vendor's.
func (e Endpoints) mayReplay() bool {
	u, err := url.Parse(strings.TrimSpace(e.IngressURL))
	if err != nil || u.Host == "" {
		return false
	}
	host := "." + strings.ToLower(strings.TrimSuffix(u.Hostname(), "."))
	return !strings.HasSuffix(host, "."+domain) && !strings.HasSuffix(host, "."+domainCN)
}

// tokenURL returns where session tokens for a region are minted.
func (e Endpoints) tokenURL(region string) (*url.URL, error) {
	base := orDefault(e.ConsoleURL, "https://console."+region+"."+regionDomain(region)+"/v1/console")
	return parseBase("backend.console_url", base, "session-tokens")
}

// socketURL returns where a region's sessions are opened, without credentials.
func (e Endpoints) socketURL(region, avatarID string) (*url.URL, error) {
	base := orDefault(e.IngressURL, "wss://api."+region+"."+regionDomain(region)+"/v2/driveningress")
	u, err := parseBase("backend.ingress_url", base, "websocket")
	if err != nil {
		return nil, err
	}
	u.Scheme = strings.Replace(u.Scheme, "http", "ws", 1)
	q := u.Query()
	q.Set("id", avatarID)
	u.RawQuery = q.Encode()
	return u, nil
}

// parseBase reads a configured base URL and makes sure of its last path
// element. ws and wss become http and https.
func parseBase(key, base, last string) (*url.URL, error) {
	u, err := url.Parse(strings.TrimSpace(base))
	if err != nil || u.Host == "" {
		// Not err itself: it repeats the URL, which may hold credentials.
		return nil, errors.Newf(errors.CodeInvalidRequest, errors.PhaseConnect, "%s is not a URL with a host", key)
	}
	switch u.Scheme {
	case "ws", "wss":
		u.Scheme = strings.Replace(u.Scheme, "ws", "http", 1)
	case "http", "https":
	default:
		return nil, errors.Newf(errors.CodeInvalidRequest, errors.PhaseConnect,
			"%s has scheme %q: http, https, ws and wss are understood", key, u.Scheme)
	}
	// Else net/url would pass over what it can't read.
	if _, err := url.ParseQuery(u.RawQuery); err != nil {
		return nil, errors.Newf(errors.CodeInvalidRequest, errors.PhaseConnect, "%s has a query that can't be read", key)
	}
	u.Fragment, u.RawFragment = "", ""
	path := strings.TrimRight(u.Path, "/")
	path = strings.TrimSuffix(path, "/"+last)
	u.Path, u.RawPath = path+"/"+last, ""
	return u, nil
}
