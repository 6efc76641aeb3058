// Package jobs takes session jobs from JetStream to their outcome: it pulls them,
// reads them, decides by each job's record what to do, has a Runner run them,
// and settles them. docs/architecture.md follows one job through it.
package jobs
