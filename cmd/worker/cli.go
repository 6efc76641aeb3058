package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/client"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/natsconn"
	"avatarworker/internal/operate"
	"avatarworker/internal/telemetry"
	"avatarworker/internal/terminal"
	"avatarworker/internal/topology"
)

// defaultConfigFile is read where it exists and no other file is named.
const defaultConfigFile = "config.yaml"

// cli is what all commands share: the process's streams, the global flags, and
// what they lead to.
type cli struct {
	stdin   io.Reader
	stdout  io.Writer
	stderr  io.Writer
	environ []string
	now     func() time.Time

	configFile string            // -c; "": defaultConfigFile where there is one
	overrides  map[string]string // flags that set a key of the configuration
	flags      map[string]string // by key: the flag that set it, unless that was --set
	colours    bool              // stdout is copied to a terminal with colours
	secrets    bool              // check the configuration's secrets too
	started    bool              // the command line was valid
	loaded     *config.Config
	denied     *denied
}

func newCLI(stdin io.Reader, stdout, stderr io.Writer, environ []string) *cli {
	return &cli{
		stdin: stdin, stdout: terminal.NewWriter(stdout), stderr: terminal.NewWriter(stderr), environ: environ,
		now: time.Now, denied: &denied{}, overrides: make(map[string]string), flags: make(map[string]string),
	}
}

// keyFlag gives a command a flag that sets a key of the configuration.
func (c *cli) keyFlag(cmd *cobra.Command, flag, key, usage string) {
	cmd.Flags().Func(flag, usage+" ("+key+")", c.override(flag, key))
}

// boolKeyFlag is keyFlag for a key that is true or false. Without a value the flag
// means true; either value takes precedence over the file's.
func (c *cli) boolKeyFlag(cmd *cobra.Command, flag, key, usage string) {
	cmd.Flags().BoolFunc(flag, usage+" ("+key+")", func(value string) error {
		on, err := strconv.ParseBool(value)
		if err != nil {
			return errors.New("want true or false")
		}
		return c.override(flag, key)(strconv.FormatBool(on))
	})
}

func (c *cli) override(flag, key string) func(string) error {
	return func(value string) error {
		if value == "" {
			return errEmpty
		}
		c.overrides[key], c.flags[key] = value, flag
		return nil
	}
}

// set takes one --set key=value.
func (c *cli) set(pair string) error {
	key, value, ok := strings.Cut(pair, "=")
	if !ok || key == "" {
		return fmt.Errorf("want key=value, as in retry.max_attempts=3")
	}
	c.overrides[key] = value
	delete(c.flags, key)
	return nil
}

// wrongFlags is a usage error if everything that is wrong with the configuration
// came from flags; otherwise nil.
func (c *cli) wrongFlags(err error) error {
	var wrong *config.Error
	if !errors.As(err, &wrong) {
		return nil
	}
	var texts []string
	for _, p := range wrong.Problems {
		key, _, _ := strings.Cut(p.Key, "[")
		flag, ok := c.flags[key]
		if !ok || p.Source != "flag" {
			return nil
		}
		texts = append(texts, fmt.Sprintf("--%s: %s %s", flag, p.Key, p.Message))
	}
	return usagef("%s", strings.Join(texts, "\n"))
}

// config loads the configuration once. Its warnings are logged then. The error
// leads to exit code 78.
func (c *cli) config() (*config.Config, error) {
	if c.loaded != nil {
		return c.loaded, nil
	}
	src := config.Source{File: defaultConfigFile, Environ: c.environ, Overrides: c.overrides, Secrets: c.secrets}
	if c.configFile != "" {
		src.File, src.FileNamed = c.configFile, true
	}
	cfg, warnings, err := config.Load(src)
	if wrong := c.wrongFlags(err); wrong != nil {
		return nil, wrong
	}
	if err != nil {
		return nil, &configError{err}
	}
	log, err := c.loggerFor(cfg)
	if err != nil {
		return nil, &configError{err}
	}
	for _, w := range warnings {
		log.Warn().Str("setting", w.Name).Msg(w.Message)
	}
	c.loaded = cfg
	return cfg, nil
}

// logger is the configured one, on stderr.
func (c *cli) logger() (zerolog.Logger, error) {
	cfg, err := c.config()
	if err != nil {
		return zerolog.Nop(), err
	}
	return c.loggerFor(cfg)
}

func (c *cli) loggerFor(cfg *config.Config) (zerolog.Logger, error) {
	return telemetry.NewLogger(c.stderr, cfg.Log.Level, cfg.Log.Format, terminal.Is(c.stderr))
}

// quietLogger is for commands that a person waits for: only warnings, unless the
// command line sets log.level.
func (c *cli) quietLogger() (zerolog.Logger, error) {
	log, err := c.logger()
	if _, asked := c.overrides["log.level"]; err == nil && !asked {
		log = log.Level(max(log.GetLevel(), zerolog.WarnLevel))
	}
	return log, err
}

// natsOptions are the configured connection's. Login errors name the file.
func natsOptions(cfg *config.Config, name string, log zerolog.Logger) (natsconn.Options, error) {
	o, err := app.ConnOptions(cfg)
	o.Name, o.Logger = name, log
	return o, err
}

// link is a command's connection to the queue.
type link struct {
	cfg    *config.Config
	log    zerolog.Logger
	nc     *nats.Conn
	js     jetstream.JetStream
	names  topology.Names
	client *client.Client
	ops    *operate.Operator // once it is opened

	served struct { // what serving has read
		known   bool
		workers []fleet.Presence
		err     error
	}
}

// connect loads the configuration and connects, trying once: a person is waiting.
func (c *cli) connect(ctx context.Context, command string) (*link, error) {
	cfg, err := c.config()
	if err != nil {
		return nil, err
	}
	log, err := c.quietLogger()
	if err != nil {
		return nil, err
	}
	options, err := natsOptions(cfg, "avatarworker "+command, log)
	if err != nil {
		return nil, &configError{err}
	}
	options.Once, options.OnDenied = true, c.denied.add
	nc, js, err := natsconn.Open(ctx, options)
	var wrong *natsconn.SettingError
	if errors.As(err, &wrong) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%w\nIs it running? Set its address with --nats-url, NATS_URL or nats.url", err)
	}
	names := topology.Names{Prefix: cfg.NATS.Prefix}
	return &link{
		cfg: cfg, log: log, nc: nc, js: js, names: names,
		client: client.New(client.Options{JetStream: js, Names: names, Now: c.now, Log: log}),
	}, nil
}

// denied is what NATS did not permit a command. A request that is not permitted gets
// no answer, so its own error says only that time ran out.
type denied struct {
	mu         sync.Mutex
	operations []string
}

func (d *denied) add(operation string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !slices.Contains(d.operations, operation) {
		d.operations = append(d.operations, operation)
	}
}

func (d *denied) list() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.operations)
}

// close sends what was published and closes.
func (l *link) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := natsconn.Close(ctx, l.nc); err != nil {
		l.log.Debug().Err(err).Msg("closing the connection to NATS")
	}
}

// note writes a line for people. It is not data: a pipe that is closed loses
// nothing.
func (c *cli) note(format string, args ...any) {
	_, _ = fmt.Fprintf(c.stderr, format+"\n", args...) // it can only fail for good
}
