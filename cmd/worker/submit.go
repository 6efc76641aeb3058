package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/client"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/terminal"
	"avatarworker/internal/topology"
)

const aboutSubmit = `Publishes a job and prints its id. The job comes from flags, from a JSON FILE (- is
stdin), or from both: flags override the file. The command first checks the job as
a worker would. A FILE may hold several jobs, in an array or one after the other
(NDJSON): all are checked before the first is published.

  avatarworker submit --avatar a1 --audio hello.wav --wait --out hello.rec
  avatarworker submit job.json --label order=17
  avatarworker submit jobs.ndjson --wait
  arecord -f S16_LE -r 16000 -t raw | avatarworker submit --avatar a1 --live - --sample-rate 16000`

// submission is what the flags of submit say.
type submission struct {
	jobFlags
	queue   string
	file    string
	noCheck bool
	wait    bool
	timeout time.Duration
	out     string
	live    string
	pace    string
	asJSON  bool
}

func newSubmitCommand(c *cli) *cobra.Command {
	var s submission
	cmd := &cobra.Command{
		Use: "submit [FILE|-]", Short: "Publish a job, and wait for its outcome", Long: aboutSubmit, Args: argCount(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.takeFile(args); err != nil {
				return err
			}
			return c.submit(cmd, &s)
		},
	}
	s.jobFlags.register(cmd)
	f := cmd.Flags()
	f.StringVar(&s.queue, "queue", "default", "`NAME` of the queue")
	f.StringVarP(&s.file, "file", "f", "", "the `FILE`, in place of the argument")
	f.BoolVar(&s.noCheck, "no-check", false, "publish it even if it is not a valid job")
	f.BoolVar(&s.wait, "wait", false, "follow it to its outcome; exit code 1 unless it completed")
	f.DurationVar(&s.timeout, "timeout", 0, "longest `TIME` to wait (0: as long as it takes)")
	f.StringVar(&s.out, "out", "", "wait, and save its frames as a recording in `FILE`")
	f.StringVar(&s.live, "live", "", "publish the speech in `FILE` (- is raw PCM on stdin) while the job runs")
	f.StringVar(&s.pace, "pace", "realtime", "`PACE` of a --live file: realtime (as fast as it is spoken) or fast")
	jsonFlag(cmd, &s.asJSON)
	return cmd
}

// takeFile is the FILE that the arguments name.
func (s *submission) takeFile(args []string) error {
	if len(args) == 0 {
		return nil
	}
	if s.file != "" {
		return usagef("give FILE or --file: not both")
	}
	s.file = args[0]
	return nil
}

func (s *submission) check() error {
	switch {
	case s.out == "-":
		return usagef("--out -: stdout has the job's id; name a file")
	case s.live != "" && len(s.speech) > 0:
		return usagef("give --live, or --audio and --audio-url: not both")
	case s.live == "-" && s.file == "-":
		return usagef("--live - and FILE - both read stdin; use one of them")
	case s.timeout < 0:
		return usagef("--timeout %s: want a positive duration", s.timeout)
	case s.timeout > 0 && !s.wait && s.out == "":
		return usagef("--timeout needs --wait")
	case s.maxSilence != "" && s.live == "":
		return usagef("--max-silence needs --live")
	}
	if err := oneOf("pace", s.pace, []string{"realtime", "fast"}); err != nil {
		return err
	}
	if err := topology.ValidQueue(s.queue); err != nil {
		return usagef("--%s", err)
	}
	if s.id != "" {
		return checkJobID(s.id)
	}
	return nil
}

// whole returns an error if neither a file nor the flags make a job.
func (s *submission) whole() error {
	switch {
	case s.file != "" || s.noCheck:
		return nil
	case s.avatar == "" && len(s.speech) == 0 && s.live == "":
		return usagef("no job: give --avatar and --audio, or a JSON FILE")
	case s.avatar == "":
		return usagef("no avatar: give --avatar ID")
	case len(s.speech) == 0 && s.live == "":
		return usagef("no speech: give --audio, --audio-url or --live")
	}
	return nil
}

// published is what submit prints.
type published struct {
	client.Published

	// With --wait.
	Outcome lifecycle.State `json:"outcome,omitempty"`
	Event   json.RawMessage `json:"event,omitempty"` // the outcome's event
	Saved   *savedRecording `json:"saved,omitempty"`
}

func (c *cli) submit(cmd *cobra.Command, s *submission) error {
	if err := s.check(); err != nil {
		return err
	}
	s.wait = s.wait || s.out != ""
	ctx := cmd.Context()
	docs, err := c.documents(s, cmd.Flags().Changed)
	if err != nil {
		return err
	}
	if err := s.whole(); err != nil {
		return err
	}
	if len(docs) > 1 {
		return c.submitAll(ctx, s, docs)
	}
	doc := docs[0]
	live, err := c.openLive(ctx, s, doc)
	if err != nil {
		return err
	}
	defer live.close()
	job, err := doc.job(s.noCheck)
	if err != nil {
		return unpublished(err)
	}
	if s.out != "" && job != nil && !savesFrames(job) {
		return usagef("--out: with output %s no frames can be saved", job.OutputKind())
	}
	var file *frameFile
	if s.out != "" { // before anything is published: it may be no place for a file
		if file, err = newFrameFile(s.out); err != nil {
			return err
		}
		defer file.close()
	}
	l, err := c.connect(ctx, "submit")
	if err != nil {
		return err
	}
	defer l.close()
	if err := c.checkUploads(ctx, l, s, doc.uploads); err != nil {
		return err
	}
	return c.publishAndFollow(ctx, l, s, doc, live, file)
}

func savesFrames(job *jobspec.Job) bool {
	kind := job.OutputKind()
	return kind == jobspec.OutputFrames || kind == jobspec.OutputObject
}

func (c *cli) publishAndFollow(ctx context.Context, l *link, s *submission, doc *document, live *liveSpeech, file *frameFile) error {
	var from client.Position
	var err error
	if s.wait {
		if from, err = l.client.Position(ctx); err != nil {
			return err
		}
	}
	p, err := c.publishOne(ctx, l, s, doc)
	if err != nil {
		return err
	}
	c.warnUnserved(ctx, l, s.queue)
	if s.wait {
		return c.waitFor(ctx, l, s, p, from, live, file)
	}
	if err := live.publish(ctx, l, p.JobID); err != nil {
		return err
	}
	if s.asJSON {
		return c.printJSON(p)
	}
	return nil
}

// publishOne uploads a job's speech, publishes it, and prints its id.
func (c *cli) publishOne(ctx context.Context, l *link, s *submission, doc *document) (*published, error) {
	if err := l.client.Upload(ctx, doc.uploads); err != nil {
		return nil, err
	}
	p, err := l.client.Publish(ctx, s.queue, doc.id, doc.data)
	if err != nil {
		l.client.RemoveUploads(ctx, doc.uploads)
		return nil, err
	}
	if p.Duplicate {
		c.note("job %s was published before: it was not published again", p.JobID)
	}
	if !s.asJSON {
		_, err = fmt.Fprintln(c.stdout, p.JobID)
	}
	return &published{Published: p}, err
}

// unpublished adds to an error about a job that it was not published.
func unpublished(err error) error {
	return fmt.Errorf("%w\nNothing was published; --no-check publishes it anyway", err)
}

// submitAll publishes the jobs of a file that holds several.
func (c *cli) submitAll(ctx context.Context, s *submission, docs []*document) error {
	if s.id != "" || s.out != "" || s.live != "" {
		return usagef("--id, --out and --live are for one job; %s holds %d", s.file, len(docs))
	}
	var faults []error
	for _, doc := range docs {
		if _, err := doc.job(false); err != nil {
			faults = append(faults, err)
		}
	}
	if len(faults) > 0 {
		return fmt.Errorf("%w\nNothing was published", errors.Join(faults...))
	}
	l, err := c.connect(ctx, "submit")
	if err != nil {
		return err
	}
	defer l.close()
	if err := c.checkUploads(ctx, l, s, docs[0].uploads); err != nil { // the others have the same
		return err
	}
	var from client.Position
	if s.wait {
		if from, err = l.client.Position(ctx); err != nil {
			return err
		}
	}
	var all []*published
	fresh := 0
	for _, doc := range docs {
		p, err := c.publishOne(ctx, l, s, doc)
		if err != nil {
			return fmt.Errorf("%s: %w\n%s before it published, and none after it", doc.where, err, terminal.Count(fresh, "job"))
		}
		if s.asJSON && !s.wait {
			if err := c.printLine(p); err != nil {
				return err
			}
		}
		if !p.Duplicate {
			fresh++
		}
		all = append(all, p)
	}
	c.warnUnserved(ctx, l, s.queue)
	c.note("published: %s", terminal.Count(fresh, "job"))
	if !s.wait {
		return nil
	}
	var failed error
	for _, p := range all {
		if err := c.waitFor(ctx, l, s, p, from, nil, nil); err != nil {
			if !errors.Is(err, errShown) {
				return err
			}
			failed = err
		}
	}
	return failed
}

// warnUnserved notes that no worker serves the queue now. Where that can't be
// found out it notes nothing: the job is published.
func (c *cli) warnUnserved(ctx context.Context, l *link, queue string) {
	workers, err := l.serving(ctx, queue)
	if err == nil && len(workers) == 0 {
		c.note("no worker serves queue %s now: the job waits until one does", queue)
	}
}

// serving returns the live workers that serve the queue. It reads them once:
// without the permission to read them the answer takes seconds.
func (l *link) serving(ctx context.Context, queue string) ([]fleet.Presence, error) {
	if !l.served.known {
		l.served.workers, l.served.err = l.client.Workers(ctx, queue)
		l.served.known = true
	}
	return l.served.workers, l.served.err
}
