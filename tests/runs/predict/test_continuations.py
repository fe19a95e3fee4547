"""The continuations of predict, compared with reference implementations that continue each track alone."""

import lightning as L
import pytest
import soundfile
import torch

from musicgen_eval.errors import WindowError
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.models.decoder.sampling import continuation_uniforms
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation
from tests.support.continuations import (
    DRAWING,
    HOP,
    NUM_FRAMES,
    RATE,
    TEXTS,
    THREADS,
    continued,
    continued_alone,
    decoded,
    drawn,
    encoded,
    wave_of,
)
from tests.support.songs import write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]


def test_the_first_half_of_each_track_is_continued_by_the_length_of_the_second(songs, model):
    result = continued(songs, model, batch_size=3)
    assert [one.window.track for one in result.continuations] == list(NUM_FRAMES)
    for one in result.continuations:
        num_frames = NUM_FRAMES[one.window.track]
        context = num_frames // 2
        assert (one.window.start_frame, one.window.context_frames) == (0, context)
        assert one.window.target_frames == num_frames - context
        assert one.codes.shape == (4, num_frames)
        assert 0 <= one.codes.min() <= one.codes.max() < 64
        wave = wave_of(songs, one.window.track)
        assert torch.equal(one.codes[:, :context], encoded(model, wave[:, : context * HOP]))
        assert one.generated.shape == (1, (num_frames - context) * HOP)
        assert torch.equal(one.context, wave[:, : context * HOP])
        assert torch.equal(one.reference, wave[:, context * HOP :])
        for tensor in (one.codes, one.generated, one.context, one.reference):
            assert not tensor.is_inference()  # an ordinary tensor, which can be changed in place
        assert (one.sample_rate_hz, one.text, one.seed, one.path) == (RATE, TEXTS[one.window.track], 0, None)
    counts = result.evaluation.counts
    assert (counts["tracks_ok"], counts["windows"]) == (4, 4)
    assert counts["generated_seconds"] == sum(n - n // 2 for n in NUM_FRAMES.values()) / 50
    assert result.evaluation.metrics == {}


def test_a_track_alone_in_its_batch_equals_the_reference_implementation_bit_for_bit(songs, model):
    for one in continued(songs, model, batch_size=1).continuations:
        track, context = one.window.track, one.window.context_frames
        prompt = encoded(model, wave_of(songs, track)[:, : context * HOP])
        whole = drawn(model, prompt, one.window.target_frames, track=track, text=TEXTS[track])
        assert torch.equal(one.codes, whole)
        assert torch.equal(one.generated, decoded(model, whole)[:, context * HOP :])


def test_a_track_in_a_mixed_batch_has_the_codes_of_the_reference_implementation(songs, model):
    for one in continued(songs, model, batch_size=3).continuations:
        track, context = one.window.track, one.window.context_frames
        prompt = encoded(model, wave_of(songs, track)[:, : context * HOP])
        whole = drawn(model, prompt, one.window.target_frames, track=track, text=TEXTS[track])
        assert torch.equal(one.codes, whole)


@pytest.mark.parametrize(
    ("settings", "context", "target"),
    [
        ({"context_s": 0.2}, 10, None),
        ({"duration_s": 0.6}, None, 30),
        ({"max_new_frames": 7}, None, 7),
        ({"context_s": 0.3, "duration_s": 0.02}, 15, 1),
        ({"context_s": 0.4, "max_new_frames": 90}, 20, 90),
    ],
)
def test_context_and_length_can_be_given(songs, model, settings, context, target):
    for one in continued(songs, model, limit=3, **settings).continuations:
        num_frames = NUM_FRAMES[one.window.track]
        boundary = num_frames // 2 if context is None else context
        assert one.window.context_frames == boundary
        assert one.window.target_frames == (num_frames - boundary if target is None else target)
        assert one.generated.shape == (1, one.window.target_frames * HOP)


def test_sampling_settings_are_applied(songs, model):
    likeliest = continued(songs, model, limit=1, temperature=0.0, guidance_scale=1.0, batch_size=1).continuations[0]
    context = likeliest.window.context_frames
    prompt = likeliest.codes[:, :context]
    expected = continued_alone(model, prompt, 50, "drums", temperature=0.0, guidance_scale=1.0, top_k=None)
    assert torch.equal(likeliest.codes, expected)
    others = [{}, {"temperature": 0.3}, {"guidance_scale": 1.0}, {"top_k": 2}, {"top_p": 0.1}]
    codes = [continued(songs, model, limit=1, **other).continuations[0].codes for other in others]
    for first in range(len(codes)):
        for second in range(first):
            assert not torch.equal(codes[first], codes[second]), (others[first], others[second])


def test_the_same_seed_repeats_and_another_one_differs(songs, model):
    first, again, other = (continued(songs, model, seed=seed, batch_size=4).continuations for seed in (3, 3, 4))
    for one, same_one, other_one in zip(first, again, other, strict=True):
        assert torch.equal(one.codes, same_one.codes)
        assert torch.equal(one.generated, same_one.generated)
        context = one.window.context_frames
        assert torch.equal(one.codes[:, :context], other_one.codes[:, :context])
        assert not torch.equal(one.codes, other_one.codes)
        assert not torch.equal(one.generated, other_one.generated)


def test_continuations_of_a_track_differ_and_the_first_does_not_depend_on_their_number(songs, model):
    several = continued(songs, model, num_continuations=3, limit=2, batch_size=4).continuations
    assert [(one.window.track, one.window.index) for one in several] == [
        (track, index) for track in ("song 0", "song 1") for index in range(3)
    ]
    assert not any(torch.equal(several[a].codes, several[b].codes) for a, b in [(0, 1), (0, 2), (1, 2), (3, 4)])
    only = continued(songs, model, limit=2, batch_size=4).continuations
    assert [torch.equal(one.codes, several[row].codes) for one, row in zip(only, (0, 3), strict=True)] == [True, True]


def test_the_codes_of_a_track_do_not_depend_on_other_tracks_or_their_order(songs, model, tmp_path):
    all_of_them = {one.window.track: one.codes for one in continued(songs, model, batch_size=4).continuations}
    rows = [(str(songs.parent / f"{index}.wav"), f"song {index}", TEXTS[f"song {index}"]) for index in (2, 0)]
    turned = continued(write_manifest(tmp_path / "turned.csv", rows), model, batch_size=2).continuations
    assert [one.window.track for one in turned] == ["song 2", "song 0"]
    for one in turned:
        assert torch.equal(one.codes, all_of_them[one.window.track])


def test_a_tensor_is_continued_like_its_file(songs, model):
    wave = torch.from_numpy(soundfile.read(songs.parent / "0.wav", dtype="float32")[0])
    from_tensor = continued(wave, model, sample_rate_hz=RATE, text="drums").continuations[0]
    (from_file,) = continued(songs.parent / "0.wav", model, text="drums").continuations
    context = from_file.window.context_frames
    assert torch.equal(from_tensor.codes[:, :context], from_file.codes[:, :context])
    assert from_tensor.generated.shape == from_file.generated.shape


def test_a_plain_trainer_gives_the_same_continuations_as_generate(songs, model, oracle):
    settings = ContinuationSettings(**DRAWING, **THREADS)
    module = MusicGenEvaluation(str(oracle / "tiny_musicgen"), metrics={}, continuation=settings)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, use_distributed_sampler=False,
    )  # fmt: skip
    batches = trainer.predict(module, datamodule=WindowDataModule(str(songs), batch_size=4))
    found = {one.window.track: one for batch in batches for one in batch}
    for one in continued(songs, model, batch_size=4).continuations:
        assert torch.equal(found[one.window.track].codes, one.codes)
        assert torch.equal(found[one.window.track].generated, one.generated)


def test_the_window_slides_beyond_the_limit(long_song, short_model):
    (one,) = continued(long_song, short_model, stride_s=0.6, text="drums").continuations
    assert (one.window.start_frame, one.window.context_frames, one.window.target_frames) == (80, 20, 100)
    wave = torch.from_numpy(soundfile.read(long_song, dtype="float32")[0])[None]
    expected = encoded(short_model, wave[:, 80 * HOP : 100 * HOP])
    assert torch.equal(one.codes[:, :20], expected)
    numbers = continuation_uniforms(4, 100, seed=0, track="long.wav")
    while expected.shape[1] < 120:
        num_new = min(30, 120 - expected.shape[1])
        at = expected.shape[1]
        uniforms = torch.cat([torch.zeros(4, 20), numbers[:, at - 20 : at - 20 + num_new]], dim=1)
        window = continued_alone(
            short_model, expected[:, at - 20 :], 20 + num_new, "drums", uniforms=uniforms[None], **DRAWING
        )
        expected = torch.cat([expected, window[:, 20:]], dim=1)
    assert torch.equal(one.codes, expected)
    assert one.generated.shape == (1, 100 * HOP)
    assert torch.equal(one.context, wave[:, : 100 * HOP])
    assert torch.equal(one.reference, wave[:, 100 * HOP :])


def test_the_prompt_is_the_limit_minus_the_stride(songs, long_song, short_model):
    (by_default,) = continued(long_song, short_model).continuations
    assert by_default.window.context_frames == 20  # the stride is 3/5 of 50 frames
    (small_stride,) = continued(long_song, short_model, stride_s=0.1).continuations
    assert (small_stride.window.start_frame, small_stride.window.context_frames) == (55, 45)
    (whole,) = continued(songs.parent / "0.wav", short_model).continuations  # 25 + 25 frames
    assert (whole.window.start_frame, whole.window.context_frames) == (0, 25)
    (little,) = continued(songs.parent / "3.wav", short_model, max_new_frames=60).continuations
    assert (little.window.start_frame, little.window.context_frames) == (0, 10)


def test_a_context_longer_than_the_prompt_is_refused(long_song, short_model):
    with pytest.raises(
        WindowError, match=r"context_s=1 and a continuation of .* s together exceed .* must be at most 0\.4 s"
    ):
        continued(long_song, short_model, context_s=1.0, stride_s=0.6)
    with pytest.raises(
        WindowError, match=r"context_s=0\.8 and a continuation of 3\.2 s together exceed .* must be at most 0\.4 s"
    ):
        continued(long_song, short_model, context_s=0.8, stride_s=0.6)
    with pytest.raises(
        WindowError, match=r"context_s=0\.42 and a continuation of 1 s together exceed .* must be at most 0\.4 s"
    ):
        continued(long_song, short_model, context_s=0.42, duration_s=1.0)
    (one,) = continued(long_song, short_model, context_s=0.4, duration_s=1.0).continuations
    assert (one.window.start_frame, one.window.context_frames, one.window.target_frames) == (0, 20, 50)
    (one,) = continued(long_song, short_model, context_s=0.8, duration_s=0.2).continuations
    assert (one.window.context_frames, one.window.target_frames) == (40, 10)
