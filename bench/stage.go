package main

import (
	"context"
	"slices"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

// stage is the processes around one measurement.
type stage struct {
	nats, backend *child
	nodes         []*child // of NATS; nil: it is one
	children      []*child
}

func (s *stage) spawn(ctx context.Context, p params) (*child, error) {
	c, err := spawn(ctx, p)
	if err == nil {
		s.children = append(s.children, c)
	}
	return c, err
}

// withNATS starts NATS.
func (s *stage) withNATS(ctx context.Context) (err error) {
	s.nats, err = s.spawn(ctx, params{Role: "nats"})
	s.nodes = []*child{s.nats}
	return err
}

// withCluster starts a NATS cluster of three nodes.
func (s *stage) withCluster(ctx context.Context) error {
	c, err := startNATS(ctx, replicas)
	if err != nil {
		return err
	}
	s.nats, s.nodes, s.children = c.nats, c.nodes, append(s.children, c.children...)
	return nil
}

// replicas of the rows that have a cluster.
const replicas = 3

// settings are the worker's own, with that many replicas (0: one).
func settings(n int) topology.Settings {
	s := topology.DefaultSettings()
	s.Replicas = max(n, 1)
	return s
}

// withBackend starts the simulated backend: frames, speed and TLS are p's.
func (s *stage) withBackend(ctx context.Context, p params) (err error) {
	s.backend, err = s.spawn(ctx, params{Role: "backend", Frames: p.Frames, Speed: p.Speed, TLS: p.TLS})
	return err
}

// with starts the process that is measured.
func (s *stage) with(ctx context.Context, p params) (*child, error) {
	return s.spawn(ctx, s.addresses(p))
}

// addresses returns the parameters with the addresses of the other processes.
func (s *stage) addresses(p params) params {
	if s.nats != nil {
		p.NATS = s.nats.said.NATS
	}
	if s.backend != nil {
		p.Console, p.Ingress, p.Trust = s.backend.said.Console, s.backend.said.Ingress, s.backend.said.Trust
	}
	return p
}

// close stops the processes, the measured one first.
func (s *stage) close() error {
	var err error
	for _, c := range slices.Backward(s.children) {
		err = errors.Join(err, c.stop())
	}
	return err
}
