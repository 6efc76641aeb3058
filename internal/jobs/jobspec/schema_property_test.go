package jobspec

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"avatarworker/internal/jobs/jobpb"
)

// validJob draws a job of any kind that the schema allows.
func validJob(t *rapid.T) *jobpb.Job {
	text := rapid.StringMatching(`[a-zé]{1,20}`)
	job := &jobpb.Job{
		Id:           rapid.StringMatching(`([A-Za-z0-9_-]{1,64})?`).Draw(t, "id"),
		AppId:        rapid.StringMatching(`([a-z0-9_-]{1,9}(\.[a-z0-9]{1,9})?)?`).Draw(t, "app"),
		AvatarId:     text.Draw(t, "avatar"),
		Region:       rapid.SampledFrom([]string{"", "us-west", "cn-beijing", "ap-northeast-2"}).Draw(t, "region"),
		MaxAttempts:  rapid.Int32Range(0, 100).Draw(t, "attempts"),
		OnRedelivery: rapid.SampledFrom([]string{"", "resume", "restart", "give_up"}).Draw(t, "redelivery"),
		Labels:       rapid.MapOfN(text, text, 0, 16).Draw(t, "labels"),
		ExtraParams:  rapid.MapOfN(text, text, 0, 8).Draw(t, "params"),
	}
	if rapid.Bool().Draw(t, "deadline?") {
		job.Deadline = timestamppb.New(time.Unix(rapid.Int64Range(0, 1<<33).Draw(t, "deadline"), 0))
	}
	switch rapid.IntRange(0, 2).Draw(t, "speech") {
	case 0:
		job.Audio = validAudio(t)
	case 1:
		job.Utterances = rapid.SliceOfN(rapid.Custom(validAudio), 1, 4).Draw(t, "utterances")
	default:
		job.Live = &jobpb.Live{
			SampleRate: rapid.Int32Range(1, 48000).Draw(t, "rate"),
			Format:     rapid.SampledFrom([]string{"", "pcm_s16le", "ogg_opus"}).Draw(t, "format"),
			MaxSilence: rapid.SampledFrom([]string{"", "1s", "10m", "90"}).Draw(t, "silence"),
		}
	}
	job.Output = rapid.SampledFrom([]*jobpb.Output{
		nil,
		{Frames: &jobpb.FramesOutput{}},
		{Object: &jobpb.ObjectOutput{Name: "a/b"}},
		{Livekit: &jobpb.LiveKitOutput{Url: "wss://h", RoomName: "r", ApiToken: "t"}},
		{Agora: &jobpb.AgoraOutput{ChannelName: "c", Token: "t", Uid: 1<<32 - 1}},
		{Discard: &jobpb.DiscardOutput{}},
	}).Draw(t, "output")
	return job
}

func validAudio(t *rapid.T) *jobpb.Audio {
	audio := &jobpb.Audio{
		Format:     rapid.SampledFrom([]string{"", "wav", "pcm_s16le", "ogg_opus"}).Draw(t, "format"),
		SampleRate: rapid.Int32Range(1, 48000).Draw(t, "rate"),
	}
	switch rapid.IntRange(0, 2).Draw(t, "source") {
	case 0:
		audio.Inline = rapid.SliceOfN(rapid.Byte(), 1, 50).Draw(t, "inline")
	case 1:
		audio.Object = rapid.SampledFrom([]string{"name.wav", "bucket/name", "bucket/dir/näme 1"}).Draw(t, "object")
	default:
		audio.Url = rapid.SampledFrom([]string{"http://h/x", "https://h:8/x?sig=1234"}).Draw(t, "url")
	}
	return audio
}

func TestEveryValidJobIsTakenAndSurvivesBothEncodings(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		job := validJob(rt)
		if err := Validate(job); err != nil {
			rt.Fatalf("refused: %s", err.Message)
		}
		roundTrip(rt, job, job.GetId())
	})
}

func TestSecondSourceOfSpeechIsAlwaysRefused(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		job := validJob(t)
		if job.Live == nil {
			job.Live = &jobpb.Live{SampleRate: 16000}
		} else {
			job.Audio = validAudio(t)
		}
		if Validate(job) == nil {
			t.Fatalf("taken: %v", job)
		}
	})
}
