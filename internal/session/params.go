package session

import (
	"context"

	"google.golang.org/protobuf/proto"

	"avatarworker/internal/errors"
	"avatarworker/internal/session/avatarpb"
)

// Format is how speech is encoded.
type Format int

const (
	FormatPCM     Format = iota // signed 16-bit little-endian, mono
	FormatOggOpus               // one continuous logical stream for each utterance, mono
)

// AudioConfig describes the speech to the backend before any is sent.
type AudioConfig struct {
	SampleRate int // Hz
	Bitrate    int // bits per second; 0 leaves it open
	Format     Format
}

// LiveKit is the room that the backend publishes into.
type LiveKit struct {
	URL, RoomName, PublisherID string
	APIToken                   string // redacted from every error
	ExtraAttributes            map[string]string
	IdleTimeout                int // seconds; 0 is the backend's own default
}

// Agora is the channel that the backend publishes into.
type Agora struct {
	ChannelName, PublisherID string
	Token                    string // redacted from every error
	UID                      uint32
}

// Params are one session's.
type Params struct {
	AppID string
	// APIKey is called for each token, and again after a reply 401: if it returns
	// another key, that one is tried once.
	APIKey   func() (string, error)
	AvatarID string
	Region   string // "" is Options.DefaultRegion; "auto" asks the bootstrap call

	// Config is called while the token is minted; an error of it is returned by
	// Open. A session is dialled only once its speech is known to exist.
	Config func(ctx context.Context) (AudioConfig, error)

	LiveKit *LiveKit // at most one of LiveKit and Agora; neither: frames come back
	Agora   *Agora

	ExtraParams map[string]string

	TraceParent, TraceState string // W3C, used where the context carries no trace

	Secrets []string // redacted from every error, besides what is known to be secret
}

func (p *Params) egress() bool { return p.LiveKit != nil || p.Agora != nil }

func (p *Params) check() error {
	invalid := func(format string, args ...any) error {
		return errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, format, args...)
	}
	switch {
	case p.AppID == "":
		return invalid("no app id: name one in the job or the configuration")
	case p.AvatarID == "":
		return invalid("avatar_id is empty")
	case p.APIKey == nil || p.Config == nil:
		return errors.Newf(errors.CodeInternal, errors.PhaseJob, "the session was opened without APIKey or Config")
	case p.LiveKit != nil && p.Agora != nil:
		return invalid("output: livekit and agora exclude each other")
	}
	return nil
}

// secrets returns the texts that must not appear in this session's errors. The
// API key and the session token are added when they are known.
func (p *Params) secrets() []string {
	all := append([]string(nil), p.Secrets...)
	if p.LiveKit != nil {
		all = append(all, p.LiveKit.APIToken)
	}
	if p.Agora != nil {
		all = append(all, p.Agora.Token)
	}
	return all
}

// configure encodes the session's first message (docs/protocol.md, sections 4
// and 5).
func (p *Params) configure(a AudioConfig) ([]byte, error) {
	msg := &avatarpb.ClientConfigureSession{
		SampleRate:  int32(a.SampleRate),
		Bitrate:     int32(a.Bitrate),
		AudioFormat: avatarpb.AudioFormat(a.Format),
		ExtraParams: p.ExtraParams,
	}
	if l := p.LiveKit; l != nil {
		msg.EgressType = avatarpb.EgressType_EGRESS_TYPE_LIVEKIT
		msg.LivekitEgress = &avatarpb.LiveKitEgress{
			Url: l.URL, RoomName: l.RoomName, PublisherId: l.PublisherID, ApiToken: l.APIToken,
			ExtraAttributes: l.ExtraAttributes, IdleTimeout: int32(l.IdleTimeout),
		}
	}
	if a := p.Agora; a != nil {
		msg.EgressType = avatarpb.EgressType_EGRESS_TYPE_AGORA
		msg.AgoraEgress = &avatarpb.AgoraEgress{
			ChannelName: a.ChannelName, Token: a.Token, Uid: a.UID, PublisherId: a.PublisherID,
		}
	}
	b, err := proto.Marshal(&avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_CONFIGURE_SESSION,
		Data: &avatarpb.Message_ClientConfigureSession{ClientConfigureSession: msg},
	})
	if err != nil {
		// Only texts that are not UTF-8 can't be encoded.
		return nil, errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, "the session's settings can't be encoded: %v", err)
	}
	return b, nil
}
