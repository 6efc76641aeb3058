package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"avatarworker/internal/errors"
	"avatarworker/internal/output"
)

func newRecordingCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "recording", Short: "Inspect recordings", Args: noArgs, RunE: showHelp,
	}
	var asJSON bool
	info := &cobra.Command{
		Use: "info FILE|OBJECT", Short: "Print what a recording holds, and check that it is complete",
		Long: `Reads a recording from a file or, where no such file exists, from the object
of that name in the bucket of recordings. Exit code 1 if it is not whole.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return c.recordingInfo(cmd.Context(), args[0], asJSON) },
	}
	jsonFlag(info, &asJSON)
	cmd.AddCommand(info)
	return cmd
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
	t := newTable(c.stdout, "UTTERANCE", "REQ ID", "FRAMES", "KEY FRAMES", "SECONDS", "BYTES", "WHOLE")
	for i, u := range info.Utterances {
		t.row(i+1, u.ReqID, u.Envelopes, u.KeyFrames, fmt.Sprintf("%.2f", u.Seconds), u.Bytes, yesNo(u.Whole))
	}
	t.row("total", "", info.Envelopes, info.KeyFrames, fmt.Sprintf("%.2f", info.Seconds), info.Bytes, yesNo(info.Whole))
	return t.end()
}
