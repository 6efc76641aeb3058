// Package jobs takes session jobs from JetStream to their outcome: it pulls them,
// reads them, decides by each job's record what to do, has a Runner run them,
// and settles them. docs/architecture.md follows one job through it. It owns the order
// of these steps, and must not know how a session runs, how a dead letter looks or
// what the metrics are: see Runner, DeadLetters, Storage and Observer.
package jobs
