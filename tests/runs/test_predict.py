"""The whole of predict: tracks to codes, audio, metrics and files. Reference implementations continue each track alone."""

import csv
import errno
import json
import os
from pathlib import Path

import lightning as L
import pytest
import soundfile
import torch
from torchmetrics import Metric
from torchmetrics.audio import ScaleInvariantSignalDistortionRatio, SignalNoiseRatio

from musicgen_eval.api import generate
from musicgen_eval.audio.writer import AudioWriter
from musicgen_eval.errors import MetricError, RunError, WindowError
from musicgen_eval.inference.continuation import continue_codes
from musicgen_eval.inference.scoring import score_codes
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.metrics import CodebookPerplexity, SeamDiscontinuity
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.models.decoder.sampling import continuation_uniforms
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.models.threads import single_threaded
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.runner import run_continuation
from musicgen_eval.runs.settings import RunSettings
from tests.support.run_folders import continuation_rows
from tests.support.songs import write_manifest, write_noise

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]

HOP, RATE = 640, 32000
TEXTS = {"song 0": "drums", "song 1": None, "song 2": "slow piano with many strings", "song 3": "drums"}
NUM_FRAMES = {"song 0": 50, "song 1": 37, "song 2": 63, "song 3": 20}
DRAWING = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 40}
THREADS = {"threads": 1}  # the steps of a tiny model are too small for two threads


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    """Writes four songs of noise, each some samples longer than its whole frames."""
    folder = tmp_path_factory.mktemp("songs")
    for index, num_frames in enumerate(NUM_FRAMES.values()):
        write_noise(folder / f"{index}.wav", num_frames * HOP + 100 * index, seed=index)
    rows = [(f"{index}.wav", track, TEXTS[track]) for index, track in enumerate(NUM_FRAMES)]
    return write_manifest(folder / "songs.csv", rows)


@pytest.fixture(scope="module")
def model(oracle):
    """Returns a model for these tests alone. A run prepares it for a precision in place."""
    return load_model(oracle / "tiny_musicgen")


@pytest.fixture(scope="module")
def short_model(oracle):
    """Returns the same model with windows of 1 s."""
    return load_model(oracle / "tiny_musicgen", max_frames=50)


def continued(source, model, **settings):
    return generate(source, checkpoint=model, accelerator="cpu", **{**DRAWING, **THREADS, **settings})


def wave_of(songs: Path, track: str) -> torch.Tensor:
    """Returns the (1, N) float32 audio of a track, cut to whole frames."""
    index = list(NUM_FRAMES).index(track)
    wave = torch.from_numpy(soundfile.read(songs.parent / f"{index}.wav", dtype="float32")[0])
    return wave[None, : NUM_FRAMES[track] * HOP]


def encoded(model, wave: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.encode([wave])[0]


def text_states(model, text: str | None) -> torch.Tensor | None:
    with single_threaded():
        states = model.encode_text(text)
    return None if states is None else states[None]


def drawn(model, prompt: torch.Tensor, target_frames: int, *, track: str, text: str | None, seed=0, continuation=0):
    """Returns the codes of one track, processed alone, and its continuation in one window."""
    uniforms = torch.zeros(1, 4, prompt.shape[1] + target_frames)
    uniforms[0, :, prompt.shape[1] :] = continuation_uniforms(
        4, target_frames, seed=seed, track=track, continuation=continuation
    )
    return continued_alone(model, prompt, uniforms.shape[2], text, uniforms=uniforms, **DRAWING)


def continued_alone(model, prompt: torch.Tensor, total_frames: int, text: str | None, **drawing) -> torch.Tensor:
    """Continues one prompt in one window with one thread."""
    with single_threaded():
        return continue_codes(
            model.decoder, prompt[None], total_frames=total_frames, delays=(0, 1, 2, 3),
            encoder_hidden_states=text_states(model, text), **drawing,
        )[0]  # fmt: skip


def decoded(model, codes: torch.Tensor) -> torch.Tensor:
    with single_threaded():
        return model.decode(codes)


def nll_of(model, codes: torch.Tensor, known: int, text: str | None) -> torch.Tensor:
    """Returns the (K, T) nll of one window, NaN for the codes of the prompt."""
    with torch.inference_mode(), single_threaded():
        nll = score_codes(
            model.decoder, codes[None], delays=(0, 1, 2, 3), encoder_hidden_states=text_states(model, text)
        )[0]
        nll[:, :known] = float("nan")
    return nll


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return torch.equal(found.isnan(), expected.isnan()) and torch.allclose(
        found.nan_to_num(), expected.nan_to_num(), rtol=0, atol=tolerance
    )


def witness(*names: str) -> tuple[Metric, dict[tuple[str, int], dict]]:
    """Returns a metric with these inputs, and the inputs that it receives, by (track, continuation)."""
    seen: dict = {}
    given = ", ".join(dict.fromkeys(["window", *names]))
    space: dict = {"seen": seen}
    exec(f"def update(self, {given}):\n    seen[window.track, window.index] = dict(locals())", space)

    def init(self):
        Metric.__init__(self)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    made = type("Witness", (Metric,), {"__init__": init, "update": space["update"], "compute": lambda self: self.total})
    return made(), seen


# Continuations


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


# Beyond the checkpoint's limit


@pytest.fixture(scope="module")
def long_song(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.wav"
    write_noise(path, 200 * HOP, seed=9)
    return path


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


# Metrics


def test_nll_is_given_for_continuation_and_reference(songs, model):
    metric, seen = witness("nll", "nll__reference", "codes", "codes__reference", "scored", "rank", "frame_rate_hz")
    result = continued(songs, model, metrics={"witness": metric}, batch_size=3)
    for one in result.continuations:
        track, context = one.window.track, one.window.context_frames
        given = seen[track, 0]
        assert torch.equal(given["codes"], one.codes)
        assert same(given["nll"], nll_of(model, one.codes, context, TEXTS[track]))
        assert torch.equal(given["scored"], given["nll"].isfinite())
        whole = encoded(model, wave_of(songs, track))
        true = torch.cat([one.codes[:, :context], whole[:, context:]], dim=1)
        assert torch.equal(given["codes__reference"], true)
        assert same(given["nll__reference"], nll_of(model, true, context, TEXTS[track]))
        assert given["frame_rate_hz"] == 50
        assert given["window"] == one.window


def test_perplexity_includes_all_continuations_and_all_references(songs, model):
    metrics = {
        "perplexity": CodebookPerplexity(),
        "true": MetricEntry(CodebookPerplexity(), {"nll": "nll__reference"}),
    }
    result = continued(songs, model, metrics=metrics)
    sums, counts = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4)
    for one in result.continuations:
        context = one.window.context_frames
        whole = encoded(model, wave_of(songs, one.window.track))
        for row, target in enumerate((one.codes, whole)):
            codes = torch.cat([one.codes[:, :context], target[:, context:]], dim=1)
            nll = nll_of(model, codes, context, one.text)
            sums[row] += nll.double().nansum(1)
            counts[row] += nll.isfinite().sum(1)
    for name, ce in zip(metrics, (sums / counts).mean(1), strict=True):
        values = result.evaluation.metrics[name]
        assert values["ce"].value == pytest.approx(ce.item(), abs=1e-5)
        assert values["ppl"].num_tracks == 4


def test_codes_beyond_the_limit_are_scored_in_the_window_in_which_they_were_drawn(long_song, short_model):
    metric, seen = witness("nll", "nll__reference")
    result = continued(long_song, short_model, stride_s=0.6, text="drums", metrics={"witness": metric})
    (one,) = result.continuations
    wave = torch.from_numpy(soundfile.read(long_song, dtype="float32")[0])[None]
    true = one.codes[:, :20]
    nll, true_nll = torch.full((2, 4, 120), float("nan"))
    for start, known, end in [(0, 20, 50), (30, 50, 80), (60, 80, 110), (90, 110, 120)]:
        nll[:, known:end] = nll_of(short_model, one.codes[:, start:end], 0, "drums")[:, known - start :]
        window = encoded(short_model, wave[:, (80 + start) * HOP : (80 + end) * HOP])
        true = torch.cat([true, window[:, known - start :]], dim=1)
        true_nll[:, known:end] = nll_of(short_model, true[:, start:end], 0, "drums")[:, known - start :]
    assert same(seen["long.wav", 0]["nll"], nll)
    assert same(seen["long.wav", 0]["nll__reference"], true_nll)


def test_no_text_is_scored_if_there_is_a_text(songs, model):
    metric, seen = witness("nll", "nll__no_text")
    for one in continued(songs, model, metrics={"witness": metric}).continuations:
        found = seen[one.window.track, 0]["nll__no_text"]
        if one.text is None:
            assert found.isnan().all()
        else:
            assert same(found, nll_of(model, one.codes, one.window.context_frames, None))


def test_audio_metrics_of_torchmetrics_compare_continuation_and_reference(songs, model):
    stock = {"snr": SignalNoiseRatio(), "sdr": ScaleInvariantSignalDistortionRatio()}
    result = continued(songs, model, metrics=stock, context_s=0.3, duration_s=0.5)
    by_hand = {"snr": SignalNoiseRatio(), "sdr": ScaleInvariantSignalDistortionRatio()}
    for one in result.continuations:
        reference = wave_of(songs, one.window.track)[:, 15 * HOP : 40 * HOP]
        assert one.reference.shape == reference.shape == (1, min(25, NUM_FRAMES[one.window.track] - 15) * HOP)
        for name, metric in by_hand.items():
            metric.update(one.generated[:, : reference.shape[1]], reference)
            alone = type(metric)()
            alone.update(one.generated[:, : reference.shape[1]], reference)
            track = next(track for track in result.evaluation.tracks if track.id == one.window.track)
            assert track.metrics[name]["value"] == pytest.approx(alone.compute().item(), rel=1e-5)
    for name, metric in by_hand.items():
        assert result.evaluation.metrics[name]["value"].value == pytest.approx(metric.compute().item(), rel=1e-5)


def test_there_is_no_reference_beyond_the_end_of_a_track(songs, model):
    metric, seen = witness("nll", "nll__reference")
    result = continued(
        songs, model, context_s=0.74, duration_s=0.4, limit=3,
        metrics={"snr": SignalNoiseRatio(), "ppl": CodebookPerplexity(), "witness": metric},
    )  # fmt: skip
    by_track = {one.window.track: one for one in result.continuations}
    assert by_track["song 1"].reference is None  # 37 frames, all of them context
    assert by_track["song 0"].reference.shape == (1, 13 * HOP)
    assert by_track["song 2"].reference.shape == (1, 20 * HOP)
    assert all(one.generated.shape == (1, 20 * HOP) for one in result.continuations)
    values = result.evaluation.metrics
    assert (values["snr"]["value"].num_tracks, values["ppl"]["ppl"].num_tracks) == (2, 3)
    expected = SignalNoiseRatio()
    for track in ("song 0", "song 2"):
        one = by_track[track]
        expected.update(one.generated[:, : one.reference.shape[1]], one.reference)
    assert values["snr"]["value"].value == pytest.approx(expected.compute().item(), rel=1e-5)
    assert seen["song 1", 0]["nll__reference"].isnan().all()
    true = seen["song 0", 0]["nll__reference"]
    assert true[:, 37:50].isfinite().all()
    assert true[:, :37].isnan().all()
    assert true[:, 50:].isnan().all()


def test_a_run_without_any_reference_works_and_has_no_audio_metrics(songs, model, tmp_path):
    result = continued(
        songs.parent / "3.wav", model, context_s=0.4, duration_s=0.2, run_dir=tmp_path / "x",
        metrics={
            "snr": SignalNoiseRatio(), "ppl": CodebookPerplexity(),
            "true": MetricEntry(SeamDiscontinuity(), {"generated": "reference_decoded"}),
        },
    )  # fmt: skip
    assert result.evaluation.metrics["snr"] == result.evaluation.metrics["true"] == {}
    assert result.evaluation.metric_errors == {}
    assert result.evaluation.metrics["ppl"]["ppl"].num_tracks == 1
    assert result.continuations[0].reference_path is None
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["counts"]["tracks_ok"] == 1


def test_metrics_receive_the_audio_that_they_name(songs, model):
    names = (
        "generated",
        "reference",
        "context",
        "context_decoded",
        "reference_decoded",
        "sample_rate_hz",
        "text",
        "codes",
    )
    metric, seen = witness(*names)
    for one in continued(songs, model, metrics={"witness": metric}, batch_size=3).continuations:
        given, num_context = seen[one.window.track, 0], one.window.context_frames * HOP
        for name in ("generated", "reference", "context"):
            assert torch.equal(given[name], getattr(one, name))
        whole = decoded(model, one.codes)
        assert torch.equal(given["context_decoded"], whole[:, :num_context])
        assert torch.equal(given["generated"], whole[:, num_context:])
        true = encoded(model, wave_of(songs, one.window.track))
        true = torch.cat([one.codes, true], dim=1)[
            :, [*range(one.window.context_frames), *range(-one.window.target_frames, 0)]
        ]
        assert torch.equal(given["reference_decoded"], decoded(model, true)[:, num_context:])
        assert (given["sample_rate_hz"], given["text"]) == (RATE, one.text)
        assert torch.equal(given["codes"], one.codes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nll__no_context", r"asks for the reading 'no_context' .*did you mean no_text"),
        ("generatd", r"asks for 'generatd', which predict does not provide; did you mean generated"),
        ("generated__no_text", r"asks for 'generated__no_text', which predict does not provide"),
        ("something", r"asks for 'something', which predict does not provide; known: .*generated"),
    ],
)
def test_an_input_that_predict_does_not_offer_is_refused_before_any_audio_is_opened(model, name, message):
    with pytest.raises(MetricError, match=message):
        continued("/nowhere", model, metrics={"m": witness(name)[0]})


# The run folder


def audio_files(run_dir: Path) -> list[str]:
    """Returns all files below audio/, hidden ones included, relative to the run folder."""
    return sorted(str(path.relative_to(run_dir)) for path in (run_dir / "audio").rglob("*") if not path.is_dir())


def read(path: Path) -> torch.Tensor:
    """Reads a file as (C, N) float32 audio."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == RATE
    return torch.from_numpy(wave.T)


def test_files_contain_the_audio_that_a_run_without_files_returns(songs, model, tmp_path):
    in_memory = continued(songs, model, num_continuations=2).continuations
    result = continued(songs, model, num_continuations=2, format="wav", run_dir=tmp_path / "x")
    rows = continuation_rows(tmp_path / "x")
    assert [(row["track"], row["continuation"]) for row in rows] == [
        (track, str(index)) for track in NUM_FRAMES for index in (0, 1)
    ]
    listed = {row[name] for row in rows for name in ("path", "context_path", "reference_path")}
    assert sorted(listed) == audio_files(tmp_path / "x")
    assert len(listed) == 4 * (2 + 1 + 1)
    for one, kept, row in zip(result.continuations, in_memory, rows, strict=True):
        assert (one.generated, one.context, one.reference) == (None, None, None)
        assert torch.equal(one.codes, kept.codes)
        for name, path in (
            ("path", one.path),
            ("context_path", one.context_path),
            ("reference_path", one.reference_path),
        ):
            assert tmp_path / "x" / row[name] == path
            assert not Path(row[name]).is_absolute()
        assert torch.equal(read(one.path), kept.generated)
        assert torch.equal(read(one.context_path), kept.context)
        assert torch.equal(read(one.reference_path), kept.reference)
        assert one.path.parent == one.context_path.parent == one.reference_path.parent
        num_frames = NUM_FRAMES[one.window.track]
        times = [float(row[name]) for name in ("context_s", "prompt_s", "generated_s", "reference_s")]
        assert times == pytest.approx(
            [count / 50 for count in (num_frames // 2, num_frames // 2, *2 * [num_frames - num_frames // 2])]
        )
        assert (row["text"], row["seed"], row["temperature"], row["top_k"]) == (
            TEXTS[row["track"]] or "",
            "0",
            "1.0",
            "40",
        )
        assert (row["top_p"], row["guidance_scale"], row["stride_s"]) == ("", "3.0", "18.0")
    held = {path.name for path in (tmp_path / "x").iterdir()}
    assert held == {
        "audio", "continuations.csv", "config.yaml", "run.json", "summary.json", "tracks.csv", "windows.csv", "journal",
    }  # fmt: skip


def test_the_table_contains_the_length_of_the_prompt_beyond_the_limit(long_song, short_model, tmp_path):
    result = continued(long_song, short_model, stride_s=0.6, run_dir=tmp_path / "x", format="wav")
    (row,) = continuation_rows(tmp_path / "x")
    times = [float(row[name]) for name in ("context_s", "prompt_s", "generated_s", "reference_s", "stride_s")]
    assert times == [2.0, 0.4, 2.0, 2.0, 0.6]
    assert read(result.continuations[0].context_path).shape == (1, 100 * HOP)


@pytest.mark.parametrize("format", ["flac", "wav", "mp3"])
def test_every_format_is_written(songs, model, tmp_path, format):
    result = continued(songs, model, limit=2, run_dir=tmp_path / "x", format=format, batch_size=4)
    in_memory = continued(songs, model, limit=2, batch_size=4).continuations
    expected = {f"{name}.{format}" for name in ("continuation_0", "context", "reference")}
    for one, kept in zip(result.continuations, in_memory, strict=True):
        assert {path.name for path in one.path.parent.iterdir()} == expected
        written = read(one.path)
        assert soundfile.info(one.path).format == format.upper()
        if format == "mp3":
            assert written.shape[1] == pytest.approx(kept.generated.shape[1], abs=3000)
        else:
            assert written.shape == kept.generated.shape
            assert (written - kept.generated.clamp(-1, 1)).abs().max() < 1e-6


def test_joined_files_contain_the_track_up_to_the_boundary_and_the_continuation(songs, model, tmp_path):
    result = continued(songs, model, run_dir=tmp_path / "x", format="wav", layout="joined", batch_size=4)
    in_memory = continued(songs, model, batch_size=4).continuations
    for one, kept in zip(result.continuations, in_memory, strict=True):
        joined, num_context = read(one.path), kept.context.shape[1]
        assert joined.shape == (1, num_context + kept.generated.shape[1])
        assert torch.equal(joined[:, num_context:], kept.generated)
        num_faded = 2 * HOP
        assert torch.equal(joined[:, : num_context - num_faded], kept.context[:, :-num_faded])
        prompt = decoded(model, kept.codes)[:, num_context - num_faded : num_context]
        original, faded = kept.context[:, -num_faded:], joined[:, num_context - num_faded : num_context]
        low, high = torch.minimum(original, prompt), torch.maximum(original, prompt)
        assert ((low - 1e-6 <= faded) & (faded <= high + 1e-6)).all()
        assert (faded[:, 0] - original[:, 0]).abs() < (original - prompt)[:, 0].abs() / 100 + 1e-6
        assert (faded[:, -1] - prompt[:, -1]).abs() < (original - prompt)[:, -1].abs() / 100 + 1e-6
        assert torch.equal(read(one.context_path), kept.context)


def test_a_joined_file_beyond_the_limit_begins_with_the_whole_context(long_song, short_model, tmp_path):
    (one,) = continued(long_song, short_model, run_dir=tmp_path / "x", format="wav", layout="joined").continuations
    joined, wave = read(one.path), read(long_song)
    assert joined.shape == (1, 200 * HOP)
    assert torch.equal(joined[:, : 98 * HOP], wave[:, : 98 * HOP])


def test_a_context_of_one_frame_can_be_joined(songs, model, tmp_path):
    (one,) = continued(
        songs.parent / "3.wav", model, context_s=0.02, run_dir=tmp_path / "x", format="wav", layout="joined"
    ).continuations
    assert read(one.path).shape == (1, 20 * HOP)


@pytest.mark.parametrize("layout", ["continuation", "joined"])
def test_without_originals_only_continuations_are_written(songs, model, tmp_path, layout):
    result = continued(songs, model, run_dir=tmp_path / "x", originals=False, layout=layout, num_continuations=2)
    assert len(audio_files(tmp_path / "x")) == 8
    assert all(
        Path(name).name in ("continuation_0.flac", "continuation_1.flac") for name in audio_files(tmp_path / "x")
    )
    assert {(row["context_path"], row["reference_path"]) for row in continuation_rows(tmp_path / "x")} == {("", "")}
    assert all(one.context_path is None and one.reference_path is None for one in result.continuations)


def test_metrics_are_the_same_with_and_without_files(songs, model, tmp_path):
    def metrics():
        return {
            "snr": SignalNoiseRatio(), "ppl": CodebookPerplexity(),
            "true": MetricEntry(SeamDiscontinuity(), {"generated": "reference_decoded"}),
        }  # fmt: skip

    written = continued(songs, model, metrics=metrics(), run_dir=tmp_path / "x", originals=False, limit=1)
    assert written.evaluation.metrics == continued(songs, model, metrics=metrics(), limit=1).evaluation.metrics
    assert all(one.generated is None for one in written.continuations)
    rows = list(csv.DictReader((tmp_path / "x" / "windows.csv").open()))
    assert [row["track"] for row in rows] == ["song 0"]
    assert all(row["snr/value"] for row in rows)


HOSTILE_IDS = [
    "../x", "../../x", "/etc/x", "a/b.mp3", "a_b.mp3", "Song", "song", "SONG", "x" * 300, "x" * 301, ".", "..", ".hidden",
    "trailing.", "ä/ö\\ü", "日本語", "CON", "a\nb", "-rf", "%s", "a:b|c?*",
]  # fmt: skip


def test_every_id_has_its_own_folder_inside_the_run_folder(songs, model, tmp_path):
    rows = [(str(songs.parent / "3.wav"), track, None) for track in HOSTILE_IDS]
    manifest = write_manifest(tmp_path / "hostile.csv", rows)
    before = set(tmp_path.rglob("*"))
    run_dir = tmp_path / "runs" / "x"
    result = continued(manifest, model, run_dir=run_dir, max_new_frames=2, batch_size=32, originals=False)
    folders = [one.path.parent for one in result.continuations]
    assert [one.window.track for one in result.continuations] == HOSTILE_IDS
    assert all(folder.resolve().parent == (run_dir / "audio").resolve() for folder in folders)
    assert len({folder.name.lower() for folder in folders}) == len(HOSTILE_IDS)
    assert all(len(folder.name.encode()) < 200 for folder in folders)
    assert [row["track"] for row in continuation_rows(run_dir)] == HOSTILE_IDS
    assert all((run_dir / row["path"]).is_file() for row in continuation_rows(run_dir))
    elsewhere = {path for path in tmp_path.rglob("*") if run_dir not in path.parents} - before
    assert elsewhere == {tmp_path / "runs", run_dir}


def test_no_continuations_are_returned_if_none_are_requested(songs, oracle, tmp_path):
    module = MusicGenEvaluation(
        str(oracle / "tiny_musicgen"), metrics={}, continuation=ContinuationSettings(**DRAWING, **THREADS)
    )
    settings = RunSettings(accelerator="cpu", run_dir=str(tmp_path / "x"))
    result = run_continuation(module, WindowDataModule(str(songs)), settings, return_continuations=False)
    assert result.continuations == []
    assert len(continuation_rows(tmp_path / "x")) == 4
    assert [track.status for track in result.evaluation.tracks] == ["ok"] * 4


# Errors


@pytest.fixture
def with_bad(songs, tmp_path) -> Path:
    """Returns the manifest of the songs and of one whose second half contains a NaN."""
    write_noise(tmp_path / "bad.wav", 44 * HOP, nan_at=40 * HOP)
    rows = [(str(songs.parent / f"{index}.wav"), track, TEXTS[track]) for index, track in enumerate(NUM_FRAMES)]
    return write_manifest(tmp_path / "bad.csv", [*rows[:2], ("bad.wav", "bad", None), *rows[2:]])


@pytest.mark.parametrize("hold", ["files", "memory"])
def test_a_track_that_cannot_be_read_after_the_boundary_is_a_recorded_failure(with_bad, songs, model, tmp_path, hold):
    run_dir = tmp_path / "x" if hold == "files" else None
    metrics = {"snr": SignalNoiseRatio()}
    result = continued(with_bad, model, max_failures=1, run_dir=run_dir, metrics=metrics, batch_size=1)
    assert [failure.track for failure in result.evaluation.failures] == ["bad"]
    assert "bad.wav" in result.evaluation.failures[0].reason
    assert [one.window.track for one in result.continuations] == list(NUM_FRAMES)
    clean = continued(songs, model, metrics={"snr": SignalNoiseRatio()}, batch_size=1)
    assert result.evaluation.metrics == clean.evaluation.metrics
    if run_dir is not None:
        assert [row["track"] for row in continuation_rows(run_dir)] == list(NUM_FRAMES)
        listed = {
            row[name] for row in continuation_rows(run_dir) for name in ("path", "context_path", "reference_path")
        }
        assert [name for name in audio_files(run_dir) if "/continuation_" in name and name not in listed] == []
        assert json.loads((run_dir / "summary.json").read_text())["counts"]["tracks_failed"] == 1


@pytest.mark.parametrize("metric", [{"true": MetricEntry(CodebookPerplexity(), {"nll": "nll__reference"})}, {}])
def test_too_many_failures_stop_the_run_and_written_continuations_stay_listed(with_bad, model, tmp_path, metric):
    with pytest.raises(RunError, match=r"1 track failed, but data.max_failures is 0.*\n.*bad\.wav"):
        continued(with_bad, model, run_dir=tmp_path / "x", metrics=metric, batch_size=1)
    rows = continuation_rows(tmp_path / "x")
    assert [row["track"] for row in rows] == [
        "song 3",
        "song 1",
    ]  # tracks that are shorter than the damaged one come first
    assert all((tmp_path / "x" / row["path"]).is_file() for row in rows)
    begun = {"config.yaml", "run.json", "journal"}
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"audio", "continuations.csv", *begun}


def test_a_damaged_reference_is_not_read_if_it_is_not_needed(with_bad, model, tmp_path):
    result = continued(with_bad, model, run_dir=tmp_path / "x", originals=False)
    assert len(result.continuations) == 5
    beyond = continued(with_bad, model, context_s=0.2, duration_s=0.2)
    assert len(beyond.continuations) == 5


def test_tracks_that_are_too_short_are_counted(songs, model, tmp_path):
    write_noise(tmp_path / "frame.wav", HOP + 1)
    rows = [(str(songs.parent / "0.wav"), "song 0", None), ("frame.wav", "one frame", None)]
    manifest = write_manifest(tmp_path / "short.csv", rows)
    by_half = continued(manifest, model).evaluation
    assert [track.status for track in by_half.tracks] == ["ok", "too_short"]
    assert by_half.counts["tracks_too_short"] == 1
    (one,) = continued(manifest, model, context_s=0.04, limit=1).continuations
    assert one.window.context_frames == 2
    longer = continued(songs, model, context_s=0.8).evaluation  # 40 frames: two songs are long enough
    assert [track.status for track in longer.tracks] == ["ok", "too_short", "ok", "too_short"]
    whole = continued(songs, model, context_s=1.0).evaluation  # the boundary is at the end of the first song
    assert [track.status for track in whole.tracks] == ["too_short", "too_short", "ok", "too_short"]
    with pytest.raises(RunError, match=r"nothing to continue.*1 track too short"):
        continued(tmp_path / "frame.wav", model)


def test_a_folder_that_cannot_be_created_is_refused(songs, model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"run_dir .*file/x cannot be used: Not a directory"):
        continued(songs, model, run_dir=tmp_path / "file" / "x")
    with pytest.raises(RunError, match=r"run_dir /proc/x cannot be used"):
        continued(songs, model, run_dir="/proc/x")


def test_a_run_dir_that_is_a_file_or_contains_other_files_is_refused_and_not_changed(songs, model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"run_dir .*file cannot be used"):
        continued(songs, model, run_dir=tmp_path / "file")
    with pytest.raises(RunError, match=r"is not empty \(file\)"):
        continued(songs, model, run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("originals", [False, True])
def test_a_full_disk_leaves_complete_files_and_is_reported(songs, model, tmp_path, monkeypatch, originals):
    write, opened = AudioWriter.write, []

    def until_full(writer, audio):
        if writer.path not in opened:
            opened.append(writer.path)
        write(writer, audio)
        if len(opened) > (7 if originals else 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(AudioWriter, "write", until_full)
    run_dir = tmp_path / "x"
    with pytest.raises(RunError) as error:
        continued(songs, model, run_dir=run_dir, originals=originals, batch_size=2)
    message = str(error.value)
    assert f"run_dir {run_dir}" in message
    assert "No space left on device" in message
    assert "written 2 continuations" in message
    assert "\n" not in message
    rows = continuation_rows(run_dir)
    assert [row["track"] for row in rows] == ["song 3", "song 1"]
    continuations = [name for name in audio_files(run_dir) if Path(name).name.startswith("continuation")]
    assert sorted(row["path"] for row in rows) == continuations
    assert not [name for name in audio_files(run_dir) if Path(name).name.startswith(".")]
    assert opened[-1].exists() is False
    assert all(soundfile.info(run_dir / name).frames for name in audio_files(run_dir))
    begun = {"config.yaml", "run.json", "journal"}
    assert {path.name for path in run_dir.iterdir()} == {"audio", "continuations.csv", *begun}


def test_a_run_that_fails_before_the_first_continuation_leaves_no_file(songs, model, tmp_path, monkeypatch):
    def full(writer, audio):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(AudioWriter, "write", full)
    with pytest.raises(RunError, match="written 0 continuations"):
        continued(songs, model, run_dir=tmp_path / "runs" / "x")
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_a_table_that_cannot_be_extended_stops_the_run_and_lists_the_written_continuations(
    songs, model, tmp_path, monkeypatch
):
    """The disk fills up while the table is written. The last line of the table is complete, and its file is removed."""
    from musicgen_eval.runs import continuation_table

    class Full(continuation_table.csv.DictWriter):
        def writerow(self, row):
            if row["track"] == "song 0":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().writerow(row)

    monkeypatch.setattr(continuation_table.csv, "DictWriter", Full)
    with pytest.raises(RunError, match="written 2 continuations"):
        continued(songs, model, run_dir=tmp_path / "x", originals=False, batch_size=2)
    assert [row["track"] for row in continuation_rows(tmp_path / "x")] == ["song 3", "song 1"]
    assert (tmp_path / "x" / "continuations.csv").read_text().endswith("\n")


def test_a_decoder_with_nan_logits_is_an_error_and_nothing_is_written(songs, oracle, tmp_path):
    broken = load_model(oracle / "tiny_musicgen")
    broken.decoder.model.decoder.layer_norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="logits are NaN or infinite; set the precision to bf16-mixed or 32-true"):
        generate(str(songs), checkpoint=broken, top_k=20, limit=2, run_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_recipe_contains_the_number_of_threads(songs, model):
    found = generate(str(songs), checkpoint=model, top_k=20, limit=1).evaluation.recipe["threads"]
    assert found == torch.get_num_threads()
    given = generate(str(songs), checkpoint=model, top_k=20, limit=1, threads=1).evaluation.recipe["threads"]
    assert given == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "ogg", "run_dir": "x"}, "format must be one of flac, wav, mp3, got 'ogg'"),
        ({"layout": "both", "run_dir": "x"}, "layout must be one of continuation, joined"),
        ({"layout": "joined"}, "have no effect without run_dir; specify run_dir"),
        ({"temperature": 0, "num_continuations": 2}, "continuations of a track are identical"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(songs, model, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=message):
        generate(str(songs), checkpoint=model, **{"top_k": 20, **settings})
    assert list(tmp_path.iterdir()) == []
