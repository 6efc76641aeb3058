package app

import (
	"regexp"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"
)

// serveMicro registers the worker as a NATS micro service, so that `nats micro`
// finds it. It returns nil if that is switched off.
func (a *App) serveMicro(nc *nats.Conn) (micro.Service, error) {
	if !a.c.Worker.Micro {
		return nil, nil //nolint:nilnil // switched off, which is not an error
	}
	service, err := micro.AddService(nc, micro.Config{
		Name: "avatarworker", Version: microVersion(a.o.Version),
		Description: "runs avatar session jobs",
		Metadata:    map[string]string{"worker": a.name, "worker_id": a.id, "prefix": a.c.NATS.Prefix},
	})
	if err != nil {
		return nil, err
	}
	err = service.AddEndpoint("state", micro.HandlerFunc(func(r micro.Request) {
		if err := r.RespondJSON(a.worker.State()); err != nil {
			a.log.Debug().Err(err).Msg("could not answer a state request")
		}
	}), micro.WithEndpointSubject(a.names.WorkerState(a.id)), micro.WithEndpointQueueGroupDisabled())
	return service, err
}

var semver = regexp.MustCompile(`^\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$`)

// microVersion is the version as NATS micro services require it.
func microVersion(version string) string {
	if len(version) > 0 && version[0] == 'v' {
		version = version[1:]
	}
	if semver.MatchString(version) {
		return version
	}
	return "0.0.0"
}
