package permissions_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/operate"
)

// folder has the server's configuration with an account for each role, in
// server.conf and what it includes.
const folder = "../../deploy/nats"

// startAccounts runs it with another text of accounts.conf, or with its own where
// that is empty. An administrator is added to the fleet's account.
func startAccounts(t *testing.T, accounts string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"server.conf", "worker.conf", "accounts.conf"} {
		text := read(t, name)
		if name == "accounts.conf" && accounts != "" {
			text = accounts
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	opts, err := server.ProcessConfigFile(filepath.Join(dir, "server.conf"))
	if err != nil {
		t.Fatal(err)
	}
	var fleet *server.Account
	for _, account := range opts.Accounts {
		if account.Name == "AVATAR" {
			fleet = account
		}
	}
	opts.Users = append(opts.Users, &server.User{Username: "admin", Password: password, Account: fleet})
	return serve(t, opts)
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(folder, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// block is what accounts.conf says of an account, with what comes before and
// after it.
func block(t *testing.T, account string) (before, within, after string) {
	t.Helper()
	before, rest, ok := strings.Cut(read(t, "accounts.conf"), "\n  "+account+" {\n")
	within, after, closed := strings.Cut(rest, "\n  }\n")
	if !ok || !closed {
		t.Fatalf("there is no account %s", account)
	}
	return before + "\n  " + account + " {\n", within, "\n  }\n" + after
}

// imports lists the lines by which an account imports something.
func imports(t *testing.T, account string) []string {
	t.Helper()
	_, within, _ := block(t, account)
	var lines []string
	for line := range strings.Lines(within) {
		if strings.Contains(line, "account: AVATAR,") {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		t.Fatalf("account %s imports nothing", account)
	}
	return lines
}

// startWithout runs the server without one import of an account.
func startWithout(t *testing.T, account, line string) string {
	t.Helper()
	before, within, after := block(t, account)
	return startAccounts(t, before+strings.Replace(within, line, "", 1)+after)
}

// inAccount runs a role's work in its account, and then without one import at a
// time, when it must fail.
func inAccount(t *testing.T, account string, run scenario) {
	t.Run("all", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithTimeout(t.Context(), enough)
		defer cancel()
		refused := newRefusals(nil)
		if err := run(ctx, t, startAccounts(t, ""), refused); err != nil {
			t.Error(err)
		}
		if got := refused.all(); len(got) > 0 {
			t.Errorf("the server refused %v", got)
		}
	})
	for _, line := range imports(t, account) {
		t.Run("without "+strings.TrimSpace(line), func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), enough)
			defer cancel()
			refused := newRefusals(nil)
			go func() { // what nothing answers is waited for until 3 s after the role has begun
				select {
				case <-refused.begun:
					time.AfterFunc(3*time.Second, cancel)
				case <-ctx.Done():
				}
			}()
			if err := run(ctx, t, startWithout(t, account, line), refused); err == nil {
				t.Error("the role works without it: it is not needed")
			}
		})
	}
}

func TestWorkerWorksInTheFleetsAccount(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*enough)
	defer cancel()
	refused := newRefusals(nil)
	if err := worker(ctx, t, startAccounts(t, ""), refused); err != nil || len(refused.all()) > 0 {
		t.Errorf("%v; refused: %v", err, refused.all())
	}
}

func TestPublisherNeedsJustTheImportsOfItsAccount(t *testing.T) {
	t.Parallel()
	inAccount(t, "AVATAR_PUBLISHERS", func(ctx context.Context, t *testing.T, url string, refused *refusals) error {
		if err := publisher(ctx, t, url, refused); err != nil {
			return err
		}
		// An upload's entry and one chunk: those of the one before were removed.
		return becomes(ctx, connect(t, url, "admin", nil), "OBJ_"+names.AudioFilesBucket(), func(s jetstream.StreamState) bool { return s.Msgs == 2 })
	})
}

func TestOperatorNeedsJustTheImportsOfItsAccount(t *testing.T) {
	t.Parallel()
	inAccount(t, "AVATAR_OPERATORS", func(ctx context.Context, t *testing.T, url string, refused *refusals) error {
		if err := operator(ctx, t, url, refused); err != nil {
			return err
		}
		// Consumers that were made for reading are removed after it, but for the one
		// that follows the events, which ends by itself.
		admin := connect(t, url, "admin", nil)
		if err := controlled(ctx, admin, connect(t, url, "operator", refused)); err != nil {
			return must(err, "control")
		}
		if err := byPrefix(ctx, admin, connect(t, url, "operator", refused)); err != nil {
			return err
		}
		for stream, left := range map[string]int{"KV_AVATAR_STATE": 0, "KV_AVATAR_FLEET": 0, names.EventsStream(): 1, names.DLQStream(): 0} {
			if err := becomes(ctx, admin, stream, func(s jetstream.StreamState) bool { return s.Consumers <= left }); err != nil {
				return err
			}
		}
		return nil
	})
}

func TestListenerNeedsJustTheImportsOfItsAccount(t *testing.T) {
	t.Parallel()
	inAccount(t, "AVATAR_LISTENERS", listenerElsewhere)
}

// byPrefix replays and cancels with the API's prefix in the client's
// configuration: the client then puts it before the subjects of keys, too.
func byPrefix(ctx context.Context, admin, c client) error {
	if err := dlq.NewWriter(admin.js, names).Write(ctx, letter("P")); err != nil {
		return err
	}
	stream, err := admin.js.Stream(ctx, names.DLQStream())
	if err != nil {
		return err
	}
	js, err := jetstream.NewWithAPIPrefix(c.nc, "AVATAR.API")
	if err != nil {
		return err
	}
	return firstOf(ctx,
		func(ctx context.Context) error {
			_, err := dlq.NewStore(js, names, nil).Replay(ctx, stream.CachedInfo().State.LastSeq, dlq.ReplayOptions{})
			return must(err, "replay with the API's prefix")
		},
		func(ctx context.Context) error {
			operator, err := operate.Open(ctx, c.nc, js, names)
			if err != nil {
				return must(err, "open the records with the API's prefix")
			}
			_, err = operator.Cancel(ctx, "P", true)
			return must(err, "cancel with the API's prefix")
		},
	)
}

// controlled asks a job, for which the administrator answers.
func controlled(ctx context.Context, admin, c client) error {
	sub, err := admin.nc.SubscribeSync(names.Control("J"))
	if err != nil {
		return err
	}
	if err := admin.nc.Flush(); err != nil {
		return err
	}
	inbox, err := c.nc.SubscribeSync(c.nc.NewInbox())
	if err != nil {
		return err
	}
	if err := c.nc.PublishRequest(names.Control("J"), inbox.Subject, []byte(`{"op":"cancel"}`)); err != nil {
		return err
	}
	request, err := sub.NextMsgWithContext(ctx)
	if err != nil {
		return err
	}
	if err := request.Respond([]byte("{}")); err != nil {
		return err
	}
	_, err = inbox.NextMsgWithContext(ctx)
	return err
}

// becomes waits until a stream is as wanted.
func becomes(ctx context.Context, admin client, name string, wanted func(jetstream.StreamState) bool) error {
	stream, err := admin.js.Stream(ctx, name)
	if err != nil {
		return err
	}
	for {
		info, err := stream.Info(ctx)
		if err != nil {
			return fmt.Errorf("stream %s stays as it is, %+v: %w", name, stream.CachedInfo().State, err)
		}
		if wanted(info.State) {
			return nil
		}
	}
}

// listenerElsewhere receives what comes, catches up through the consumer that an
// operator made, and reads frames and recordings.
func listenerElsewhere(ctx context.Context, t *testing.T, url string, refused *refusals) error {
	admin := connect(t, url, "admin", nil)
	handles := prepare(ctx, t, admin)
	for _, subject := range []string{names.Events("completed", "J"), names.Frames("J")} {
		if _, err := admin.js.Publish(ctx, subject, []byte("x")); err != nil {
			return err
		}
	}
	if _, err := handles.Recordings.PutBytes(ctx, "J", []byte("recording")); err != nil {
		return err
	}
	if _, err := handles.Events.CreateConsumer(ctx, jetstream.ConsumerConfig{Durable: "listener", AckPolicy: jetstream.AckExplicitPolicy}); err != nil {
		return err
	}
	c := connect(t, url, "listener", refused)
	return firstOf(ctx,
		receive(c, admin, names.AllEvents(), names.Events("started", "J")),
		receive(c, admin, names.AllErrors(), names.Errors("server", "serverError")),
		receive(c, admin, names.AllAlerts(), names.Alerts("recurring", "serverError")),
		receive(c, admin, names.AllFrames(), names.Frames("J")),
		func(ctx context.Context) error { return must(catchUp(ctx, c.js), "catch up") },
		func(ctx context.Context) error { return must(readFrames(ctx, c), "read frames") },
		func(ctx context.Context) error {
			store, err := c.js.ObjectStore(ctx, names.RecordingsBucket())
			if err != nil {
				return err
			}
			if _, err = store.GetInfo(ctx, "J"); err != nil {
				return must(err, "look at the recording")
			}
			_, err = c.nc.RequestWithContext(ctx, "$JS.API.DIRECT.GET.OBJ_"+names.RecordingsBucket(), []byte(`{"seq":1}`))
			return must(err, "read a chunk")
		},
		func(ctx context.Context) error {
			body, _, err := audio.JetStreamObjects(c.js)(ctx, names.RecordingsBucket(), "J")
			if err != nil {
				return must(err, "read the recording as the tool does")
			}
			data, err := io.ReadAll(body)
			if err == nil && !bytes.Equal(data, []byte("recording")) {
				err = errors.New("these are not the bytes")
			}
			return must(err, "read the recording as the tool does")
		},
	)
}

// catchUp takes an event from the listeners' consumer and settles it.
func catchUp(ctx context.Context, js jetstream.JetStream) error {
	consumer, err := js.Consumer(ctx, names.EventsStream(), "listener")
	if err != nil {
		return err
	}
	msg, err := consumer.Next(jetstream.FetchMaxWait(2 * time.Second))
	if err != nil {
		return err
	}
	if msg.Subject() != names.Events("completed", "J") {
		return fmt.Errorf("got %s", msg.Subject())
	}
	return msg.DoubleAck(ctx)
}

// readFrames reads the frames of a job, several in one request.
func readFrames(ctx context.Context, c client) error {
	stream, err := c.js.Stream(ctx, names.FramesStream())
	if err != nil {
		return err
	}
	if _, err := stream.GetMsg(ctx, 1); err != nil {
		return err
	}
	inbox := c.nc.NewInbox()
	sub, err := c.nc.SubscribeSync(inbox)
	if err != nil {
		return err
	}
	if err := c.nc.PublishRequest("$JS.API.DIRECT.GET."+names.FramesStream(), inbox, []byte(`{"seq":1,"batch":10,"next_by_subj":"avatar.frames.J"}`)); err != nil {
		return err
	}
	for {
		msg, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return err
		}
		if msg.Header.Get("Status") != "" {
			if msg.Header.Get("Status") != "204" {
				return fmt.Errorf("got %v", msg.Header)
			}
			return nil // the end of the batch
		}
	}
}
