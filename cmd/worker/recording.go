package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"avatarworker/internal/errors"
	"avatarworker/internal/output"
	"avatarworker/internal/terminal"
)

func newRecordingCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "recording", Short: "List, fetch and inspect recordings", Args: noArgs, RunE: showHelp,
	}
	var asJSON bool
	info := &cobra.Command{
		Use: "info FILE|OBJECT", Short: "Print what a recording holds, and check that it is complete",
		Long: `Reads a recording from a file or, where no such file exists, from the object
of that name in the bucket of recordings. Exit code 1 if it is not whole.`,
		Args: argCount(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error { return c.recordingInfo(cmd.Context(), args[0], asJSON) },
	}
	jsonFlag(info, &asJSON)
	cmd.AddCommand(newRecordingListCommand(c), newRecordingGetCommand(c), info)
	return cmd
}

func newRecordingListCommand(c *cli) *cobra.Command {
	var (
		limit  int
		asJSON bool
	)
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List recordings, newest first", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if limit < 0 {
				return usagef("--limit %d: want 0 (no limit) or more", limit)
			}
			return c.listRecordings(cmd.Context(), limit, cmd.Flags().Changed("limit"), asJSON)
		},
	}
	cmd.Flags().IntVar(&limit, "limit", defaultList, "at most `N` (0: no limit)")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) listRecordings(ctx context.Context, limit int, limited, asJSON bool) error {
	l, err := c.connect(ctx, "recording ls")
	if err != nil {
		return err
	}
	defer l.close()
	list, err := l.recordings(ctx)
	if err != nil {
		return err
	}
	more := limit > 0 && len(list) > limit
	if more {
		list = list[:limit]
	}
	t := terminal.NewTable(c.stdout, "RECORDING", "JOB", "STORED", "BYTES")
	for _, r := range list {
		if asJSON {
			if err := c.printLine(r); err != nil {
				return err
			}
			continue
		}
		t.Row(r.Name, terminal.OrDash(r.JobID), terminal.Ago(c.now(), r.StoredAt)+" ago", r.Bytes)
	}
	switch {
	case len(list) == 0 && !asJSON:
		c.note("no recordings")
		return nil
	case more && !limited:
		c.note("there are more: --limit N shows them")
	}
	if asJSON {
		return nil
	}
	return t.Flush()
}

// recordings lists the complete recordings, newest first.
func (l *link) recordings(ctx context.Context) ([]output.Stored, error) {
	list, err := output.ListRecordings(ctx, l.js, l.names)
	if err != nil {
		return nil, l.names.Unavailable("bucket "+l.names.RecordingsBucket(), err)
	}
	return list, nil
}

func newRecordingGetCommand(c *cli) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use: "get NAME", Short: "Fetch a recording", Args: argCount(1, 1),
		Long: `Fetches a recording to the file of its name, to --out FILE, or with --out - to
stdout. An existing file is left alone, unless --out names it. If the recording
can't be fetched completely, no file is left behind.`,
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			var names []string
			c.lookUp(cmd.Context(), func(ctx context.Context, l *link) {
				list, err := l.recordings(ctx)
				if err != nil {
					return
				}
				for _, r := range list {
					names = append(names, r.Name)
				}
			})
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error { return c.getRecording(cmd.Context(), args[0], out) },
	}
	cmd.Flags().StringVar(&out, "out", "", "write to this `FILE`, - for stdout")
	return cmd
}

func (c *cli) getRecording(ctx context.Context, name, out string) error {
	l, err := c.connect(ctx, "recording get")
	if err != nil {
		return err
	}
	defer l.close()
	if out == "" {
		// A name may look like a path. It must not lead out of this directory.
		if out = filepath.Base(name); out != name || out == "." || out == ".." {
			return usagef("recording %s: its name can't be used as a file name; use --out FILE", name)
		}
		if _, err := os.Lstat(out); err == nil {
			return fmt.Errorf("there is a file %s already; use --out FILE to overwrite it, or to write another one", out)
		}
	}
	body, err := l.client.Recording(ctx, name)
	if err != nil {
		return err
	}
	defer body.Close() // it was only read
	if out == "-" {
		_, err := io.Copy(c.raw(), body)
		return wrapRecording(name, err)
	}
	saved, err := saveFile(out, func(w io.Writer) error {
		_, err := io.Copy(w, body)
		return err
	})
	if err != nil {
		return wrapRecording(name, err)
	}
	c.note("%s: %d bytes", saved.File, saved.Bytes)
	return nil
}

func wrapRecording(name string, err error) error {
	if err != nil {
		return fmt.Errorf("recording %s: %w", name, err)
	}
	return nil
}

func (c *cli) recordingInfo(ctx context.Context, name string, asJSON bool) error {
	f, err := os.Open(name)
	if err == nil {
		defer f.Close() // it was only read
		if info, err := f.Stat(); err == nil && info.IsDir() {
			return fmt.Errorf("%s is a directory: name a recording in it", name)
		}
		return c.describeRecording(f, name, asJSON)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := c.connect(ctx, "recording info")
	if err != nil {
		return fmt.Errorf("no file %s, and the bucket of recordings can't be reached: %w", name, err)
	}
	defer l.close()
	body, err := l.client.Recording(ctx, name)
	if err != nil {
		return err
	}
	defer body.Close() // it was only read
	return c.describeRecording(body, name, asJSON)
}

func (c *cli) describeRecording(r io.Reader, name string, asJSON bool) error {
	info, readErr := output.ReadRecording(r)
	if err := c.printRecording(info, asJSON); err != nil {
		return err
	}
	switch {
	case readErr != nil:
		return fmt.Errorf("recording %s is not whole: %w", name, readErr)
	case !info.Whole:
		return fmt.Errorf("recording %s is not whole: an utterance has no end, or there is none", name)
	}
	return nil
}

// recordingView is a recording as it is shown: its frames are what the events
// and headers of a job count as frames, one envelope each.
type recordingView struct {
	output.RecordingInfo
	Frames     int             `json:"frames"`
	Utterances []utteranceView `json:"utterances"`
}

type utteranceView struct {
	output.RecordedUtterance
	Frames int `json:"frames"`
}

func viewRecording(info output.RecordingInfo) recordingView {
	v := recordingView{RecordingInfo: info, Frames: info.Envelopes, Utterances: []utteranceView{}}
	for _, u := range info.Utterances {
		v.Utterances = append(v.Utterances, utteranceView{u, u.Envelopes})
	}
	return v
}

func (c *cli) printRecording(info output.RecordingInfo, asJSON bool) error {
	if asJSON {
		return c.printJSON(viewRecording(info))
	}
	t := terminal.NewTable(c.stdout, "UTTERANCE", "REQ ID", "FRAMES", "KEY FRAMES", "SECONDS", "BYTES", "WHOLE")
	for i, u := range info.Utterances {
		t.Row(i+1, u.ReqID, u.Envelopes, u.KeyFrames, fmt.Sprintf("%.2f", u.Seconds), u.Bytes, yesNo(u.Whole))
	}
	t.Row("total", "", info.Envelopes, info.KeyFrames, fmt.Sprintf("%.2f", info.Seconds), info.Bytes, yesNo(info.Whole))
	return t.Flush()
}
