import re
from math import exp, fsum, isnan, nan
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.audio.reader import open_track
from musicgen_eval.data.plan_builder import DEMO_CLIPS
from musicgen_eval.errors import MetricError
from musicgen_eval.inference.scoring import score_codes
from musicgen_eval.metrics import CodebookPerplexity, PositionProfile
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.states import compute_in_place, merge_states, window_state
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.records import CodecSpec, Window

pytestmark = pytest.mark.usefixtures("cheap_runs")

DOCS = (Path(__file__).parent.parent.parent / "docs" / "metrics.md").read_text()


def window(num_frames: int, context_frames: int = 0) -> Window:
    return Window("song", 3, 200, context_frames, num_frames - context_frames)


def numbers(metric: PositionProfile) -> dict[str, float]:
    return {key: value.item() for key, value in metric.compute().items()}


def brute_force(windows: list[Tensor], *, bin_frames: int, num_bins: int, max_frames: int) -> dict[str, list[float]]:
    """Computes the ce of each bin, and within and beyond the limit, in a plain loop over codes."""
    K = windows[0].shape[0]
    values: list[list[list[float]]] = [[[] for _ in range(K)] for _ in range(num_bins + 2)]
    for nll in windows:
        for k in range(K):
            for t, value in enumerate(nll[k].double().tolist()):
                if isnan(value):
                    continue
                if t // bin_frames < num_bins:
                    values[t // bin_frames][k].append(value)
                values[num_bins if t < max_frames else num_bins + 1][k].append(value)
    ce = [fsum(fsum(v) / len(v) for v in part) / K if all(part) else nan for part in values]
    return {"bins": ce[:num_bins], "sides": ce[num_bins:]}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 70))
def test_the_profile_equals_brute_force_also_after_merging(seed, num_windows, num_codebooks, max_frames):
    generator = torch.Generator().manual_seed(seed)

    def make() -> PositionProfile:
        return PositionProfile(0.2, 1.0, max_frames, num_codebooks=num_codebooks, frame_rate_hz=50)

    metric, inputs = make(), []
    for _ in range(num_windows):
        T = int(torch.randint(1, 70, (), generator=generator))
        nll = torch.rand(num_codebooks, T, generator=generator) * 9
        nll[torch.rand(num_codebooks, T, generator=generator) < 0.3] = nan
        inputs.append({"nll": nll, "window": window(T)})
        metric.update(**inputs[-1])
    expected = brute_force([given["nll"] for given in inputs], bin_frames=10, num_bins=5, max_frames=max_frames)
    found = numbers(metric)
    keys = ["0", "0.2", "0.4", "0.6", "0.8"]
    assert list(found) == ["ppl_within", "ppl_beyond", *(f"ce_{k}s" for k in keys), *(f"ppl_{k}s" for k in keys)]
    assert [found[f"ce_{k}s"] for k in keys] == pytest.approx(expected["bins"], rel=1e-12, nan_ok=True)
    assert [found[f"ppl_{k}s"] for k in keys] == pytest.approx([exp(x) for x in expected["bins"]], nan_ok=True)
    sides = [exp(x) for x in expected["sides"]]
    assert [found["ppl_within"], found["ppl_beyond"]] == pytest.approx(sides, nan_ok=True)

    merged = merge_states(metric, [window_state(make(), given) for given in inputs])
    assert compute_in_place(make(), merged) == pytest.approx(found, rel=1e-12, nan_ok=True)


def test_positions_start_at_the_first_frame_of_the_context():
    metric = PositionProfile(end_s=3, max_frames=100, num_codebooks=1)
    nll = torch.full((1, 150), 2.0)
    nll[:, :60] = nan
    metric.update(nll, window(150, context_frames=60))
    assert metric.count.tolist() == [[0, 40, 50, 40, 50]]


def test_a_bin_without_codes_is_nan_and_keeps_its_key():
    metric = PositionProfile(end_s=3, max_frames=100)
    metric.update(torch.ones(4, 60), window(60))
    found = numbers(metric)
    assert [found[f"ce_{k}s"] for k in range(2)] == [1.0, 1.0]
    assert isnan(found["ce_2s"])
    assert isnan(found["ppl_2s"])
    assert isnan(found["ppl_beyond"])


def test_codes_after_the_profile_still_count_within_or_beyond_the_limit():
    metric, plain = PositionProfile(end_s=1, max_frames=60, num_codebooks=1), CodebookPerplexity(num_codebooks=1)
    nll = torch.arange(100.0).unsqueeze(0) / 100
    metric.update(nll, window(100))
    plain.update(nll[:, 60:])
    assert metric.count.tolist() == [[50, 60, 40]]
    assert numbers(metric)["ppl_beyond"] == pytest.approx(plain.compute()["ppl"].item(), rel=1e-12)


def test_a_checkpoint_sets_codebooks_frame_rate_and_limit():
    spec = CodecSpec(16000, 25, 640, 2, 64, 1, (0, 1), 50)
    bank = MetricBank({"position": PositionProfile()}, spec=spec)  # passes the trial
    metric = bank.metrics["position"]
    assert (metric.max_frames, metric.bin_frames, metric.total.shape) == (50, 25, (2, 62))
    assert metric.recipe.settings == {"bin_s": 1.0, "end_s": 60.0, "max_frames": 50}
    assert metric.recipe.unit("ce_17s") == "nats"


def test_the_yaml_example_of_the_docs_creates_a_profile():
    shown = re.search(r"<!-- tested: position -->\n```yaml\n(.*?)```", DOCS, re.DOTALL)[1]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metrics", type=dict[str, Metric])
    made = parser.instantiate(parser.parse_object({"metrics": yaml.safe_load(shown)})).metrics["position"]
    assert (made.bin_frames, made.num_bins) == (25, 60)


def test_the_state_takes_at_most_16_kilobytes():
    metric = PositionProfile(num_codebooks=8)
    assert sum(state.numel() * state.element_size() for state in (metric.total, metric.count)) < 16 * 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bin_s": 0.33}, r"bin_s=0.33 s is 16.5 frames at 50 Hz; set bin_s to a multiple of 0.02 s"),
        ({"bin_s": 0.001}, "set bin_s to a multiple of 0.02 s"),
        ({"bin_s": 0.0}, "bin_s and end_s must be above 0"),
        ({"end_s": float("nan")}, "bin_s and end_s must be above 0"),
        ({"bin_s": 2.0, "end_s": 7.0}, "end_s=7.0 s is 3.5 bins of bin_s=2.0 s"),
    ],
)
def test_invalid_bins_are_refused(arguments, message):
    with pytest.raises(MetricError, match=message):
        PositionProfile(**arguments)


@pytest.mark.parametrize("shape", [(2, 60), (4, 61), (1, 4, 60)])
def test_values_of_another_shape_than_the_window_are_refused(shape):
    with pytest.raises(MetricError, match=r"expected \(4, 60\)"):
        PositionProfile().update(torch.zeros(shape), window(60))


def test_the_perplexity_of_the_demo_model_rises_at_its_limit():
    model = load_model("demo")
    metric = PositionProfile(end_s=14)
    metric.configure(model.spec)
    for name in ("happy_04.ogg", "sad_09.mp3", "epic_10.ogg"):
        audio = open_track(DEMO_CLIPS / name).read(0, 14 * 32000, sample_rate_hz=32000, channels=1)
        codes = model.encode([audio])[0].unsqueeze(0)
        with torch.inference_mode():
            nll = score_codes(model.decoder, codes, delays=model.spec.delays)[0]
        metric.update(nll, window(700))
    ce = [numbers(metric)[f"ce_{second}s"] for second in range(14)]
    found = numbers(metric)
    assert max(ce[3:10]) < 1.5
    assert ce[10] > max(ce[3:10]) + 1  # the first second past the limit
    assert min(ce[11:]) > max(ce[:10]) + 1  # and all that follow
    assert found["ppl_beyond"] > 10 * found["ppl_within"]
