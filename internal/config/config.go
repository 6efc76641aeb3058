// Package config loads and checks the worker's configuration: defaults, then
// a strict YAML file, then the environment, then flags. All that is wrong is
// reported at once, each with its place and its key. The package owns the keys, their
// defaults and bounds, and hides secrets when it prints. It must not know what a value
// is used for.
package config

import "time"

// Config is the whole configuration. config.yaml at the root of the repository
// explains every key; the yaml tags are the key paths.
type Config struct {
	NATS    NATS               `yaml:"nats"`
	Streams Streams            `yaml:"streams"`
	Worker  Worker             `yaml:"worker"`
	Retry   Retry              `yaml:"retry"`
	Lease   Lease              `yaml:"lease"`
	App     App                `yaml:"app"`
	Apps    map[string]*App    `yaml:"apps"` // more apps, by id; their own ID field is set by Load
	Limits  []SessionLimit     `yaml:"limits"`
	Backend Backend            `yaml:"backend"`
	Audio   Audio              `yaml:"audio"`
	Circuit Circuit            `yaml:"circuit"`
	Alerts  Alerts             `yaml:"alerts"`
	Policy  map[string]*Policy `yaml:"policy"` // by error code
	Cost    Cost               `yaml:"cost"`
	Budgets []Budget           `yaml:"budgets"`
	Admin   Admin              `yaml:"admin"`
	UI      UI                 `yaml:"ui"`
	Log     Log                `yaml:"log"`

	// origins says where each key that is not at its default was set.
	origins map[string]origin
}

// NATS says where the queue is and what is kept in it.
type NATS struct {
	URL          string        `yaml:"url"`    // several are separated by commas; may hold a password: never log it
	Prefix       string        `yaml:"prefix"` // of subjects; in upper case, of streams and buckets
	Context      string        `yaml:"context"`
	Domain       string        `yaml:"domain"`       // of JetStream; "": the context's, else the server's own
	APIPrefix    string        `yaml:"api_prefix"`   // of JetStream's API instead of $JS.API; "": the context's
	InboxPrefix  string        `yaml:"inbox_prefix"` // of the subjects that answers come to; "": the context's, else _INBOX
	TLSFirst     bool          `yaml:"tls_first"`    // TLS handshake before the server says anything; or the context's
	Creds        string        `yaml:"creds"`        // path of a credentials file
	NKey         string        `yaml:"nkey"`         // path of a seed file
	User         string        `yaml:"user"`
	Password     Secret        `yaml:"password"`
	PasswordFile string        `yaml:"password_file"`
	Token        Secret        `yaml:"token"`
	TokenFile    string        `yaml:"token_file"`
	TLS          TLS           `yaml:"tls"`
	Replicas     int           `yaml:"replicas"`
	Placement    Placement     `yaml:"placement"`
	Storage      string        `yaml:"storage"`   // file or memory
	StoreDir     string        `yaml:"store_dir"` // embedded server only
	StateTTL     time.Duration `yaml:"state_ttl"`
}

// Placement chooses the NATS servers that keep streams and buckets; the zero value
// leaves it to NATS.
type Placement struct {
	Cluster string   `yaml:"cluster"` // name of a cluster; "": any
	Tags    []string `yaml:"tags"`    // that a server must all have
}

// TLS names PEM files.
type TLS struct {
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	CA   string `yaml:"ca"`
}

// Streams sets how much each stream and bucket may hold. The jobs stream has no
// age: a job waits as long as it must. The age of records is nats.state_ttl.
type Streams struct {
	Jobs       SizeLimit `yaml:"jobs"`
	State      SizeLimit `yaml:"state"`
	Fleet      SizeLimit `yaml:"fleet"`
	DLQ        Limits    `yaml:"dlq"`
	Events     Limits    `yaml:"events"`
	Usage      Limits    `yaml:"usage"`
	Totals     Limits    `yaml:"totals"`
	Frames     Limits    `yaml:"frames"`
	Audio      Limits    `yaml:"audio"`
	AudioFiles Limits    `yaml:"audio_files"`
	Recordings Limits    `yaml:"recordings"`
}

// SizeLimit bounds a stream or bucket that refuses what is new when full: new
// jobs, or the records of jobs not taken yet.
type SizeLimit struct {
	MaxBytes Size `yaml:"max_bytes"` // 0: no limit
}

// Limits bounds a stream or an object bucket.
type Limits struct {
	MaxAge   time.Duration `yaml:"max_age"`   // 0: for ever
	MaxBytes Size          `yaml:"max_bytes"` // 0: no limit
}

// Worker is what one worker process takes on.
type Worker struct {
	Concurrency  int           `yaml:"concurrency"` // sessions at a time
	Queues       []Queue       `yaml:"queues"`
	DrainTimeout time.Duration `yaml:"drain_timeout"` // 0: hand back at once
	Name         string        `yaml:"name"`          // "": the host's name
	Micro        bool          `yaml:"micro"`         // register as a NATS micro service
}

// Retry bounds attempts and the waits between them.
type Retry struct {
	MaxAttempts int           `yaml:"max_attempts"`
	Initial     time.Duration `yaml:"initial"`
	Max         time.Duration `yaml:"max"`
}

// Lease is how long a worker may have a job without renewing its lease on it.
type Lease struct {
	AckWait time.Duration `yaml:"ack_wait"`
}

// App holds the credentials of one app. Exactly one of APIKey and APIKeyFile
// is set where there is a key; read it through Config.Credentials.
type App struct {
	ID          string `yaml:"id"`
	APIKey      Secret `yaml:"api_key"`
	APIKeyFile  string `yaml:"api_key_file"`
	MaxSessions int    `yaml:"max_sessions"` // over the whole fleet; 0: no limit
}

// Backend says where the avatar backend is and how long to wait for it.
type Backend struct {
	Region           string        `yaml:"region"` // or auto
	FallbackRegions  []string      `yaml:"fallback_regions"`
	ConsoleURL       string        `yaml:"console_url"`   // "": composed from the region
	IngressURL       string        `yaml:"ingress_url"`   // "": composed from the region
	BootstrapURL     string        `yaml:"bootstrap_url"` // asked when region is auto
	AllowPlainHTTP   bool          `yaml:"allow_plain_http"`
	Auth             string        `yaml:"auth"` // header or query
	TokenTTL         time.Duration `yaml:"token_ttl"`
	TokenPool        int           `yaml:"token_pool"` // tokens minted ahead for each app and region; 0: none
	ConnectTimeout   time.Duration `yaml:"connect_timeout"`
	HandshakeTimeout time.Duration `yaml:"handshake_timeout"`
	StallTimeout     time.Duration `yaml:"stall_timeout"`
	MaxSession       time.Duration `yaml:"max_session"` // 0: no limit
}

// Audio bounds and shapes the speech.
type Audio struct {
	MaxBytes         Size          `yaml:"max_bytes"`
	FetchTimeout     time.Duration `yaml:"fetch_timeout"`
	AllowPrivateURLs bool          `yaml:"allow_private_urls"`
	Convert          bool          `yaml:"convert"`
	EgressMargin     time.Duration `yaml:"egress_margin"`
	Chunk            time.Duration `yaml:"chunk"` // of speech in one message
	Pace             string        `yaml:"pace"`  // fast or realtime
}

// Circuit says when the sessions of an app stop being started.
type Circuit struct {
	Failures    int           `yaml:"failures"`
	Cooldown    time.Duration `yaml:"cooldown"`
	MaxCooldown time.Duration `yaml:"max_cooldown"`
	MaxHold     time.Duration `yaml:"max_hold"`
}

// Alerts says when a repeated failure is news.
type Alerts struct {
	Threshold int           `yaml:"threshold"`
	Window    time.Duration `yaml:"window"`
}

// Policy overrides what is done about one error code.
type Policy struct {
	Action   string `yaml:"action"`   // one of errors.PolicyActions; "": as the table says
	Attempts int    `yaml:"attempts"` // failures with this code in all; 0: as the table says
	Alert    *bool  `yaml:"alert"`    // nil: as the table says
}

// Cost says how connected time is counted in credits.
type Cost struct {
	Credit  time.Duration `yaml:"credit"`  // connected time that one credit pays for
	Minimum int           `yaml:"minimum"` // credits of the shortest session
	Labels  []string      `yaml:"labels"`  // names of the labels by which each day is added up
}

// Budget bounds what the sessions of all jobs with one value under Key may cost.
type Budget struct {
	Key     string  `yaml:"key"` // app_id or label.<name>
	Credits int     `yaml:"credits"`
	Per     string  `yaml:"per"`  // day or month, UTC
	Warn    float64 `yaml:"warn"` // share of Credits at which an alert is given; 0: none
}

// Admin is the HTTP listener for health and metrics.
type Admin struct {
	Addr  string   `yaml:"addr"`  // host:port; "": no listener
	Hosts []string `yaml:"hosts"` // names that requests may use, besides addresses and localhost
	PProf bool     `yaml:"pprof"`
}

// UI is the page for operators.
type UI struct {
	Addr  string `yaml:"addr"`  // host:port; "": run --embedded and demo serve none
	Write bool   `yaml:"write"` // actions, not only looking
	Auth  UIAuth `yaml:"auth"`
	// TrustedHeader names the header in which a proxy says who the user is. It
	// counts only in requests from TrustedProxies.
	TrustedHeader  string   `yaml:"trusted_header"`
	TrustedProxies []string `yaml:"trusted_proxies"` // addresses, or networks such as 10.0.0.0/8
	Hosts          []string `yaml:"hosts"`           // names and addresses that requests may use, besides loopback and its own
}

// UIAuth is how a request shows that it may see the page. Each file holds the
// secret alone, and is read again when it changes.
type UIAuth struct {
	TokenFile    string `yaml:"token_file"` // bearer token; a browser gives it as the password of any user
	User         string `yaml:"user"`
	PasswordFile string `yaml:"password_file"`
}

// Log shapes the log on standard error.
type Log struct {
	Level  string `yaml:"level"`
	Format string `yaml:"format"` // auto, json or console
}

const (
	kib Size = 1 << 10
	mib      = kib << 10
	gib      = mib << 10

	day = 24 * time.Hour
)

// Defaults returns the configuration that an empty file gives.
func Defaults() *Config {
	return &Config{
		NATS: NATS{
			URL: "nats://127.0.0.1:4222", Prefix: "avatar", Replicas: 1,
			Storage: "file", StoreDir: "./data", StateTTL: 7 * day,
		},
		Streams: defaultStreams(),
		Worker: Worker{
			Concurrency: 16, Queues: []Queue{{Name: "default", Weight: 1}},
			DrainTimeout: 5 * time.Minute, Micro: true,
		},
		Retry: Retry{MaxAttempts: 5, Initial: time.Second, Max: time.Minute},
		Lease: Lease{AckWait: 30 * time.Second},
		Apps:  map[string]*App{},
		Backend: Backend{
			Region: "us-west", BootstrapURL: "https://global.spatialwalk.top/bootstrap",
			Auth: "header", TokenTTL: time.Hour,
			ConnectTimeout: 10 * time.Second, HandshakeTimeout: 10 * time.Second,
			StallTimeout: 30 * time.Second,
		},
		Audio: Audio{
			MaxBytes: 64 * mib, FetchTimeout: time.Minute, EgressMargin: 5 * time.Second,
			Chunk: 100 * time.Millisecond, Pace: "fast",
		},
		Circuit: Circuit{
			Failures: 5, Cooldown: 10 * time.Second,
			MaxCooldown: 5 * time.Minute, MaxHold: day,
		},
		Alerts:  Alerts{Threshold: 5, Window: time.Minute},
		Policy:  map[string]*Policy{},
		Cost:    Cost{Credit: 6 * time.Second, Minimum: 1},
		Admin:   Admin{Addr: "127.0.0.1:8080"},
		UI:      UI{Addr: "127.0.0.1:8090"},
		Log:     Log{Level: "info", Format: "auto"},
		origins: map[string]origin{},
	}
}

// defaultStreams adds up to some 10 GiB: JetStream reserves a stream's bytes when it
// is made and refuses where the disk has less, so generosity has its price on
// small machines. At 12.46 kB of frames for a second of speech
// (docs/protocol.md, section 4), 1 GiB of frames is a day of speech and 2 GiB of
// recordings two; 2 GiB of uploads is 18 hours of 16 kHz PCM; 1 GiB of records
// is some 500,000 jobs, 1 GiB of usage records some two million sessions.
func defaultStreams() Streams {
	return Streams{
		Jobs:       SizeLimit{MaxBytes: gib},
		State:      SizeLimit{MaxBytes: gib},
		Fleet:      SizeLimit{MaxBytes: 64 * mib},
		DLQ:        Limits{MaxAge: 30 * day, MaxBytes: gib},
		Events:     Limits{MaxAge: 7 * day, MaxBytes: gib / 2},
		Usage:      Limits{MaxAge: 400 * day, MaxBytes: gib},
		Totals:     Limits{MaxAge: 400 * day, MaxBytes: gib / 4},
		Frames:     Limits{MaxAge: time.Hour, MaxBytes: gib},
		Audio:      Limits{MaxAge: time.Hour, MaxBytes: gib / 2},
		AudioFiles: Limits{MaxAge: day, MaxBytes: 2 * gib},
		Recordings: Limits{MaxAge: 7 * day, MaxBytes: 2 * gib},
	}
}
