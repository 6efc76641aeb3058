package topology

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
)

// overlaps reports whether some subject is matched by both filters.
func overlaps(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range min(len(as), len(bs)) {
		if as[i] == ">" || bs[i] == ">" {
			return true
		}
		if as[i] != "*" && bs[i] != "*" && as[i] != bs[i] {
			return false
		}
	}
	return len(as) == len(bs)
}

var (
	severalTokens = regexp.MustCompile(`(?i)\{\{\s*(split|slice)`)
	oneToken      = regexp.MustCompile(`\{\{.*\}\}|^\$\d+$`)
)

// result is a filter that matches every subject a transform can give.
func result(t jetstream.SubjectTransformConfig) string {
	if t.Destination == "" {
		return anySubject(t.Source)
	}
	tokens := strings.Split(t.Destination, ".")
	for i, token := range tokens {
		switch {
		case severalTokens.MatchString(token):
			return strings.Join(append(tokens[:i:i], ">"), ".")
		case oneToken.MatchString(token):
			tokens[i] = "*"
		}
	}
	return strings.Join(tokens, ".")
}

func anySubject(filter string) string {
	if filter == "" {
		return ">"
	}
	return filter
}

// divertedJobs refuses a jobs stream that would store jobs under subjects that no
// queue has, or none that is served: they would be acknowledged and never run.
// served are the subjects of the queues with a consumer.
func divertedJobs(have jetstream.StreamConfig, all string, served []string) error {
	t := have.SubjectTransform
	if t == nil || !overlaps(anySubject(t.Source), all) {
		return nil
	}
	to := result(*t)
	if covers(all, to) && slices.ContainsFunc(served, func(queue string) bool { return overlaps(queue, to) }) {
		return nil
	}
	return unusable("stream "+have.Name, fmt.Sprintf("its subject_transform stores jobs of %s as %s, which no worker serves, so that they would be acknowledged and never run: remove it, or map to the subject of a queue that is served",
		anySubject(t.Source), t.Destination))
}

// divertedKeys refuses a bucket that would store values under other keys than
// they were written with: they would never be found again.
func divertedKeys(bucket string, have jetstream.StreamConfig) error {
	if t := have.SubjectTransform; t != nil && overlaps(anySubject(t.Source), "$KV."+bucket+".>") {
		return unusable("bucket "+bucket, fmt.Sprintf("its subject_transform stores %s as %s, so that values are not found where they were written: remove it",
			anySubject(t.Source), t.Destination))
	}
	return nil
}

// foreignSource refuses a jobs stream that also takes messages from another
// stream which are not jobs of any queue: they would stay in it for ever.
func (e *ensurer) foreignSource(ctx context.Context, have jetstream.StreamConfig) error {
	for _, s := range have.Sources {
		for _, subject := range e.sourced(ctx, s) {
			if !covers(e.names.AllJobs(), subject) {
				return unusable("stream "+have.Name, fmt.Sprintf("it takes %s from stream %s (sources), which no queue serves: map these to %s by subject_transforms, filter them, or remove the source",
					subject, s.Name, e.names.AllJobs()))
			}
		}
	}
	return nil
}

// sourced lists filters of the subjects that come from a source; none where
// that can't be known.
func (e *ensurer) sourced(ctx context.Context, s *jetstream.StreamSource) []string {
	var subjects []string
	for _, t := range s.SubjectTransforms {
		subjects = append(subjects, result(t))
	}
	switch {
	case len(subjects) > 0:
		return subjects
	case s.FilterSubject != "":
		return []string{s.FilterSubject}
	case s.External != nil:
		return nil
	}
	short, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	from, err := e.js.Stream(short, s.Name)
	if err != nil {
		return nil // this user may not look at it, or it is not there: then nothing comes
	}
	return from.CachedInfo().Config.Subjects
}

// compareFlow reports what makes other subjects, copies or messages of a
// stream's messages.
func (d *differ) compareFlow(have jetstream.StreamConfig) {
	if t := have.SubjectTransform; t != nil {
		d.add("subject_transform", fmt.Sprintf("from %s to %s", anySubject(t.Source), t.Destination), "none")
	}
	if r := have.RePublish; r != nil {
		d.add("republish", fmt.Sprintf("from %s to %s, where others can read it", anySubject(r.Source), r.Destination), "none")
	}
	var sources []string
	for _, s := range have.Sources {
		name := s.Name
		if s.External != nil {
			name += " of " + s.External.APIPrefix
		}
		sources = append(sources, name)
	}
	d.add("sources", sources, []string(nil))
}

// foreign is a consumer of the jobs stream that is not a queue's.
type foreign struct {
	name    string
	filters []string
	copies  bool // it acknowledges nothing: another stream sources or mirrors this one
}

func (f foreign) String() string {
	filters := "everything"
	if len(f.filters) > 0 {
		filters = strings.Join(f.filters, ", ")
	}
	verb := "takes"
	if f.copies {
		verb = "copies"
	}
	return fmt.Sprintf("consumer %s, which %s %s", f.name, verb, filters)
}

func (f foreign) takes(subject string) bool {
	if f.copies {
		return false
	}
	return len(f.filters) == 0 || slices.ContainsFunc(f.filters, func(filter string) bool { return overlaps(filter, subject) })
}

func filtersOf(c jetstream.ConsumerConfig) []string {
	if c.FilterSubject != "" {
		return []string{c.FilterSubject}
	}
	return c.FilterSubjects
}

// foreigners lists the consumers that are not those of queues, which have the
// name and the subject of their queue.
func foreigners(ctx context.Context, jobs jetstream.Stream, n Names) ([]foreign, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	var found []foreign
	list := jobs.ListConsumers(ctx)
	for info := range list.Info() {
		filters := filtersOf(info.Config)
		if len(filters) == 1 && filters[0] == n.Jobs(info.Name) {
			continue
		}
		found = append(found, foreign{info.Name, filters, info.Config.AckPolicy != jetstream.AckExplicitPolicy})
	}
	slices.SortFunc(found, func(a, b foreign) int { return strings.Compare(a.name, b.name) })
	return found, list.Err()
}

// queueTaken names who has the jobs of a queue, where the server only says that
// it is another one.
func queueTaken(ctx context.Context, jobs jetstream.Stream, n Names, queue string, err error) error {
	all, listErr := foreigners(ctx, jobs, n)
	var names []string
	for _, f := range all {
		if f.takes(n.Jobs(queue)) {
			names = append(names, f.String())
		}
	}
	if listErr != nil || len(names) == 0 {
		names = []string{"another consumer (nats consumer ls " + n.JobsStream() + ")"}
	}
	return fmt.Errorf("consumer %s: %w: the jobs of queue %s go to %s, and would be acknowledged without being run: delete it: %w",
		queue, ErrUnusable, queue, strings.Join(names, " and "), err)
}
