package main

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"avatarworker/internal/errors"
)

// errNoValue refuses the empty value of a filter: it is mostly a variable of a
// script that is not set, and without the filter the command would change more
// than was meant.
var errNoValue = errors.New("want a value; to choose by something else, leave the flag out")

// errEmpty is errNoValue for the other flags.
var errEmpty = errors.New("want a value; to do without it, leave the flag out")

// noneEmpty refuses flags with an empty text: it would count as not given, and a
// script whose variable is not set would do something else than was meant.
func noneEmpty(cmd *cobra.Command) error {
	var err error
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if f.Value.Type() == "string" && f.Value.String() == "" {
			err = usagef("--%s \"\": %s", f.Name, errEmpty)
		}
	})
	return err
}

// filterText is the text of a flag that chooses what a command lists or changes.
type filterText string

func (t *filterText) String() string { return string(*t) }
func (t *filterText) Type() string   { return "string" }

func (t *filterText) Set(text string) error {
	if text == "" {
		return errNoValue
	}
	*t = filterText(text)
	return nil
}

// filterTexts are the texts of such a flag that takes several, by commas or
// repeated.
type filterTexts []string

func (t *filterTexts) String() string { return strings.Join(*t, ",") }
func (t *filterTexts) Type() string   { return "strings" }

func (t *filterTexts) Set(list string) error {
	texts := strings.Split(list, ",")
	if slices.Contains(texts, "") {
		return errNoValue
	}
	*t = append(*t, texts...)
	return nil
}

func filterVar(f *pflag.FlagSet, to *string, name, usage string) {
	f.Var((*filterText)(to), name, usage)
}

func filtersVar(f *pflag.FlagSet, to *[]string, name, usage string) {
	f.Var((*filterTexts)(to), name, usage)
}
