package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"avatarworker/internal/terminal"
)

// build says what this program was built from.
type build struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"` // of the source
	Modified bool   `json:"modified,omitempty"` // the source had changes that are not in the revision
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// version is set by the linker; "": as the Go toolchain knows it.
var version string //nolint:gochecknoglobals // the linker sets nothing else

func thisBuild() build {
	b := build{Version: "(devel)", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	switch {
	case version != "":
		b.Version = version
	case info.Main.Version != "":
		b.Version = info.Main.Version
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Revision = s.Value
		case "vcs.modified":
			b.Modified = s.Value == "true"
		}
	}
	return b
}

// String is the build on one line: "avatarworker v1.2.3 (0123456789ab) go1.26.0 linux/amd64".
func (b build) String() string {
	text := "avatarworker " + b.Version
	if b.Revision != "" {
		text += " (" + terminal.Short(b.Revision, 13) + ")"
	}
	return fmt.Sprintf("%s %s %s", text, b.Go, b.Platform)
}

func newVersionCommand(c *cli) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			b := thisBuild()
			if asJSON {
				return c.printJSON(b)
			}
			_, err := fmt.Fprintln(c.stdout, b)
			return err
		},
	}
	jsonFlag(cmd, &asJSON)
	return cmd
}

func jsonFlag(cmd *cobra.Command, asJSON *bool) {
	cmd.Flags().BoolVar(asJSON, "json", false, "print JSON")
}
