package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
)

func newDLQShowCommand(c *cli) *cobra.Command {
	var (
		lf  letterFlags
		raw bool
	)
	cmd := &cobra.Command{
		Use: "show [SEQ]", Short: "Show a dead letter, and explain its error", Args: cobra.MaximumNArgs(1),
		Long: `Shows a dead letter: what its error means, whose it is and what to do; its
headers, the error and the job. Without SEQ: the first one that the filters
choose. Egress tokens and the queries of URLs are hidden; --raw writes the job's
own bytes to stdout as they are.`,
		RunE: func(cmd *cobra.Command, args []string) error { return c.showLetter(cmd, args, &lf, raw) },
	}
	lf.register(cmd, 0)
	cmd.Flags().BoolVar(&raw, "raw", false, "write the job's own bytes, tokens included, and nothing else")
	return cmd
}

func (c *cli) showLetter(cmd *cobra.Command, args []string, lf *letterFlags, raw bool) error {
	seqs, filter, err := c.which(args, lf)
	if err != nil {
		return err
	}
	if len(seqs) == 0 && !lf.chooses() {
		return usagef("which one? Give a SEQ of 'avatarworker dlq ls', or a filter")
	}
	l, err := c.connect(cmd.Context(), "dlq show")
	if err != nil {
		return err
	}
	defer l.close()
	store := dlq.NewStore(l.js, l.names, c.now)
	if len(seqs) == 0 {
		if seqs, err = firstLetter(cmd.Context(), store, filter); err != nil {
			return err
		}
	}
	letter, err := store.Show(cmd.Context(), seqs[0])
	if err != nil {
		return err
	}
	switch {
	case raw:
		_, err = c.raw().Write(letter.Data)
		return err
	case lf.asJSON:
		return c.printJSON(shownLetter(letter))
	}
	return c.printLetter(letter)
}

func firstLetter(ctx context.Context, store *dlq.Store, filter dlq.Filter) ([]uint64, error) {
	for e, err := range store.List(ctx, filter, 1) {
		return []uint64{e.Seq}, err
	}
	return nil, fmt.Errorf("no dead letter is as the filters say")
}

// letterView is a dead letter as it may be seen.
type letterView struct {
	dlq.Entry
	Headers     map[string][]string `json:"headers"`
	Error       json.RawMessage     `json:"error"`
	Body        json.RawMessage     `json:"body"` // the job with its secrets hidden; a text where it is no JSON
	Explanation errors.Explanation  `json:"explanation"`
}

func shownLetter(l dlq.Letter) letterView {
	v := letterView{Entry: l.Entry, Headers: make(map[string][]string), Explanation: errors.Explain(l.Code)}
	if len(l.Error) > 0 {
		v.Error = maskedBody(nil, l.Error)
	}
	for name, values := range l.Header {
		if name == dlq.HeaderError {
			continue
		}
		for _, value := range values {
			v.Headers[name] = append(v.Headers[name], errors.RedactText(value))
		}
	}
	v.Message, v.ServerTitle, v.ServerDetail = errors.RedactText(l.Message), errors.RedactText(l.ServerTitle), errors.RedactText(l.ServerDetail)
	v.Body = maskedBody(l.Header, l.Data)
	return v
}

const hidden = "[hidden]"

// maxInline is how much of inline speech is shown.
const maxInline = 48

// maskedBody is the job's body as JSON that may be seen.
func maskedBody(header nats.Header, data []byte) json.RawMessage {
	inProtobuf := jobspec.IsProtobuf(header)
	if inProtobuf {
		var job jobpb.Job
		if proto.Unmarshal(data, &job) == nil {
			if text, err := (protojson.MarshalOptions{UseProtoNames: true}).Marshal(&job); err == nil {
				data = text
			}
		}
	}
	var body any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&body); err != nil {
		body = fmt.Sprintf("%d bytes that are no JSON; --raw writes them", len(data))
		if !inProtobuf && mayBeShown(data) {
			body = short(errors.RedactText(string(data)), 4096)
		}
	}
	return encode(masked("", body))
}

// mayBeShown reports whether a body that is no JSON is a text without a token.
// A job in protobuf, of which no header tells, has control characters in it, and
// no names that would tell which of its texts is the token.
func mayBeShown(data []byte) bool {
	control := func(r rune) bool { return unicode.IsControl(r) && !unicode.IsSpace(r) }
	return utf8.Valid(data) && !bytes.ContainsFunc(data, control) && !bytes.Contains(bytes.ToLower(data), []byte("token"))
}

// encode is JSON with <, > and & as they are. What was decoded can be encoded.
func encode(v any) json.RawMessage {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return json.RawMessage(`null`)
	}
	return bytes.TrimSpace(b.Bytes())
}

// masked hides egress tokens and the queries of URLs, and shortens inline
// speech. The name of a field is compared in lower case and without
// underscores, for protobuf's JSON takes apiToken too.
func masked(name string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			v[key] = masked(key, value)
		}
		return v
	case []any:
		for i := range v {
			v[i] = masked(name, v[i])
		}
		return v
	case string:
		switch plainName := strings.ToLower(strings.ReplaceAll(name, "_", "")); {
		case strings.HasSuffix(plainName, "token") && v != "":
			return hidden
		case plainName == "inline" && len(v) > maxInline:
			return fmt.Sprintf("%s… (%d characters of base64)", v[:maxInline], len(v))
		}
		return errors.RedactText(v)
	default:
		return v
	}
}

func (c *cli) printLetter(l dlq.Letter) error {
	v := shownLetter(l)
	t := newTable(c.stdout)
	t.row("dead letter", v.Seq)
	t.row("job", fmt.Sprintf("%s, run %d, of queue %s", orDash(v.JobID), v.Run, orDash(v.Queue)))
	t.row("failed", when(c.now(), v.FailedAt)+" on "+orDash(v.Worker))
	t.row("error", fmt.Sprintf("%s (%s) in %s: %s", v.Code, v.Class, orDash(string(v.Phase)), cause(v.Message, v.ServerTitle, v.ServerDetail)))
	t.row("reason", fmt.Sprintf("%s, after %s and %s", orDash(v.Reason), count(v.Attempts, "attempt"), crashes(v.Crashes)))
	if v.Explanation.Meaning != "" {
		t.row("meaning", v.Explanation.Meaning)
		t.row("whose", v.Explanation.Owner)
		t.row("what to do", v.Explanation.Remedy)
	}
	if err := t.end(); err != nil {
		return err
	}
	return errors.Join(c.printHeaders(v.Headers), c.printBlock("Error", v.Error), c.printBlock("Job", v.Body), c.printNext(v))
}

func crashes(n int) string {
	if n == 1 {
		return "1 crash"
	}
	return fmt.Sprintf("%d crashes", n)
}

func (c *cli) printHeaders(headers map[string][]string) error {
	if err := c.heading("\nHeaders"); err != nil {
		return err
	}
	t := newTable(c.stdout)
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		t.row(name, strings.Join(headers[name], ", "))
	}
	return t.end()
}

func (c *cli) printBlock(title string, body json.RawMessage) error {
	var pretty bytes.Buffer
	if len(body) == 0 || json.Indent(&pretty, body, "", "  ") != nil {
		return nil
	}
	if err := c.heading("\n" + title); err != nil {
		return err
	}
	_, err := fmt.Fprintln(c.stdout, pretty.String())
	return err
}

func (c *cli) printNext(v letterView) error {
	_, err := fmt.Fprintf(c.stdout, "\nTo run it again: avatarworker dlq replay %d\nAll with this code: avatarworker dlq replay --code %s\n", v.Seq, plain(string(v.Code)))
	return err
}

// letterTime bounds what is done with one letter.
const letterTime = 20 * time.Second
