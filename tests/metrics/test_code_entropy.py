import re
from math import exp, fsum, inf, log, nan
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import CodebookPerplexity, CodeEntropy, code_entropy
from musicgen_eval.metrics.code_entropy import prediction_statistics, sums_by_bin
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.metrics.plugin.states import is_sum_metric
from musicgen_eval.records import CodecSpec
from tests.support.pretend_cuda import pretend_cuda

DOCS = (Path(__file__).parent.parent.parent / "docs" / "metrics.md").read_text()
SPEC = CodecSpec(32000, 50, 640, 2, 16, 1, (0, 1), 100)


def scores(logits: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Returns the inputs of `CodeEntropy` for (K, T, V) logits and (K, T) true codes."""
    true = logits.gather(-1, codes.unsqueeze(-1))
    nll = logits.double().logsumexp(-1) - true.squeeze(-1).double()
    return {"logits": logits, "nll": nll.float(), "rank": (logits > true).sum(-1)}


def random_window(generator: torch.Generator, K: int, T: int, V: int) -> dict[str, Tensor]:
    """Returns random inputs with small integer logits, so that many logits are tied. Some logits are -inf, some nlls NaN."""
    logits = torch.randint(-3, 4, (K, T, V), generator=generator).float()
    logits[torch.rand((K, T, V), generator=generator) < 0.1] = -inf
    codes = torch.randint(V, (K, T), generator=generator)
    logits.scatter_(-1, codes.unsqueeze(-1), 1.0)
    window = scores(logits, codes)
    window["nll"][torch.rand((K, T), generator=generator) < 0.3] = nan
    return window


def brute_force(windows: list[dict[str, Tensor]], num_bins: int, frame_rate_hz: float) -> dict[str, float]:
    """Computes the definition in plain loops over codes and probabilities."""
    K = windows[0]["nll"].shape[0]
    columns: dict[str, list[float]] = {"entropy": [], "ce": [], "excess": [], "ece": []}
    for k in range(K):
        entropies, nlls, bins = [], [], [[] for _ in range(num_bins)]
        for window in windows:
            for t in range(window["nll"].shape[1]):
                nll = window["nll"][k, t].item()
                if nll != nll:
                    continue
                row = window["logits"][k, t].tolist()
                weights = [exp(value) for value in row]
                p = [weight / fsum(weights) for weight in weights]
                entropies.append(-fsum(value * log(value) for value in p if value > 0))
                nlls.append(nll)
                ties = sum(value == max(row) for value in row)
                hit = 1 / ties if window["rank"][k, t] == 0 else 0.0
                bins[min(num_bins - 1, int(max(p) * num_bins))].append((max(p), hit))
        n = len(entropies)
        gaps = [
            abs(fsum(c for c, _ in cell) / len(cell) - fsum(h for _, h in cell) / len(cell)) for cell in bins if cell
        ]
        sizes = [len(cell) for cell in bins if cell]
        columns["entropy"].append(fsum(entropies) / n)
        columns["ce"].append(fsum(nlls) / n)
        columns["excess"].append(fsum(nlls) / n - fsum(entropies) / n)
        columns["ece"].append(fsum(gap * size / n for gap, size in zip(gaps, sizes, strict=True)))
    results = {name: fsum(column) / K for name, column in columns.items()}
    results |= {f"{name}_q{k}": value for name, column in columns.items() for k, value in enumerate(column, start=1)}
    per_second = fsum(columns["entropy"]) * frame_rate_hz
    return results | {"nats_per_second": per_second, "bits_per_second": per_second / log(2)}


def results(metric: CodeEntropy) -> dict[str, float]:
    return {key: value.item() for key, value in metric.compute().items()}


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 5, 16]))
def test_the_results_equal_brute_force(seed, num_windows, K, num_bins):
    generator = torch.Generator().manual_seed(seed)
    windows = [random_window(generator, K, 10 + index, 7) for index in range(num_windows)]
    windows[0]["nll"][:, 0] = 1.0
    metric = CodeEntropy(num_bins=num_bins, num_codebooks=K, frame_rate_hz=50)
    for window in windows:
        metric.update(**window)
    assert results(metric) == pytest.approx(brute_force(windows, num_bins, 50), rel=1e-6, abs=1e-6)
    assert all(value.dtype == torch.float64 for value in metric.compute().values())


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_the_calibration_error_equals_that_of_torchmetrics_without_ties(generator, num_bins):
    logits = torch.randn(3, 400, 32, generator=generator) * 3
    codes = torch.distributions.Categorical(logits=logits * 0.5).sample()
    metric = CodeEntropy(num_bins=num_bins, num_codebooks=3)
    metric.update(**scores(logits, codes))
    for k in range(3):
        stock = MulticlassCalibrationError(num_classes=32, n_bins=num_bins, norm="l1")
        stock.update(logits[k].softmax(-1), codes[k])
        assert stock.compute() > 0.05
        assert metric.compute()[f"ece_q{k + 1}"].item() == pytest.approx(stock.compute().item(), abs=1e-6)


def test_the_entropy_equals_that_of_torch(generator):
    logits = torch.randn(2, 50, 300, generator=generator) * 5
    entropy, confidence, num_likeliest = prediction_statistics(logits)
    expected = torch.distributions.Categorical(logits=logits.double())
    torch.testing.assert_close(entropy, expected.entropy(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(confidence, expected.probs.amax(-1), rtol=1e-6, atol=0)
    assert (num_likeliest == 1).all()


def test_a_uniform_model_has_the_entropy_log_v_and_no_calibration_error(generator):
    codes = torch.randint(2048, (4, 60), generator=generator)
    metric = CodeEntropy()
    metric.update(**scores(torch.zeros(4, 60, 2048), codes))
    found = results(metric)
    assert found["entropy"] == pytest.approx(log(2048), rel=1e-12)
    assert found["bits_per_second"] == pytest.approx(2200, rel=1e-12)
    assert found["nats_per_second"] == pytest.approx(2200 * log(2), rel=1e-12)
    assert found["excess"] == pytest.approx(0, abs=1e-6)
    assert found["ece"] == pytest.approx(0, abs=1e-15)


def test_a_confidently_wrong_model_has_a_calibration_error_near_1():
    codes = torch.zeros(2, 30, dtype=torch.int64)
    logits = torch.zeros(2, 30, 64)
    logits[..., 5] = 20.0
    metric = CodeEntropy(num_codebooks=2)
    metric.update(**scores(logits, codes))
    found = results(metric)
    assert found["ece"] == pytest.approx(1, abs=1e-6)
    assert found["entropy"] < 1e-5
    assert found["excess"] == pytest.approx(20, rel=1e-4)


def test_a_certain_and_correct_model_has_neither_entropy_nor_calibration_error():
    logits = torch.full((1, 9, 5), -inf)
    logits[..., 3] = 0.0
    metric = CodeEntropy(num_codebooks=1)
    metric.update(**scores(logits, torch.full((1, 9), 3)))
    assert [results(metric)[name] for name in ("entropy", "ce", "excess", "ece")] == [0, 0, 0, 0]


@pytest.mark.parametrize(("temperature", "sign"), [(1.0, 0), (0.5, 1), (2.0, -1)])
def test_excess_is_0_for_a_calibrated_model_and_its_sign_shows_overconfidence(generator, temperature, sign):
    logits = torch.randn(1, 20000, 64, generator=generator) * 2
    noise = -torch.rand(logits.shape, generator=generator).log()
    codes = (logits.softmax(-1) / noise).argmax(-1)  # draws from the distributions by exponential races
    metric = CodeEntropy(num_codebooks=1)
    metric.update(**scores(logits / temperature, codes))
    found = results(metric)
    if sign == 0:
        assert abs(found["excess"]) < 0.03
        assert found["ece"] < 0.01
    else:
        assert found["excess"] * sign > 0.3
        assert found["ece"] > 0.1


def test_true_codes_that_are_tied_share_the_accuracy():
    logits = torch.tensor([[[1.0, 1.0, -inf, -inf]] * 2])
    metric = CodeEntropy(num_codebooks=1)
    metric.update(**scores(logits, torch.tensor([[0, 1]])))
    assert results(metric)["entropy"] == pytest.approx(log(2))
    assert (
        results(metric)["ece"] == 0
    )  # two codes with probability 1/2 each; the first-index convention would give 0 or 1/2


def test_the_mean_nll_equals_the_cross_entropy_of_codebook_perplexity(generator):
    window = random_window(generator, 4, 40, 9)
    metric, plain = CodeEntropy(), CodebookPerplexity()
    metric.update(**window)
    plain.update(window["nll"])
    for name in ("ce", "ce_q1", "ce_q4"):
        assert metric.compute()[name] == plain.compute()[name]


def test_window_states_equal_the_states_of_single_updates(generator):
    windows = [random_window(generator, 4, T, 9) for T in (3, 50, 17)]
    at_once = CodeEntropy().window_states(windows)
    assert set(at_once) == set(CodeEntropy()._defaults)
    for row, window in enumerate(windows):
        metric = CodeEntropy()
        metric.update(**window)
        for name, column in at_once.items():
            assert column.dtype == getattr(metric, name).dtype
            assert torch.equal(column[row], getattr(metric, name))


def test_the_states_do_not_depend_on_the_size_of_the_chunks(generator, monkeypatch):
    window = random_window(generator, 3, 40, 50)
    expected = CodeEntropy(num_codebooks=3).window_states([window])
    for size in (1, 50, 1234):
        monkeypatch.setattr(code_entropy, "CHUNK_NUMBERS", size)
        found = CodeEntropy(num_codebooks=3).window_states([window])
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_converted_to_float32(generator, dtype):
    logits = (torch.randn(2, 30, 40, generator=generator) * 4).to(dtype)
    codes = torch.randint(40, (2, 30), generator=generator)
    half, full = CodeEntropy(num_codebooks=2).to(dtype), CodeEntropy(num_codebooks=2)
    half.update(**scores(logits, codes))
    full.update(**scores(logits.float(), codes))
    assert half.total.dtype == half.gap.dtype == torch.float64
    assert torch.equal(half.total, full.total)
    assert torch.equal(half.gap, full.gap)


def test_codes_that_are_not_scored_do_not_count(generator):
    window = random_window(generator, 2, 20, 8)
    window["nll"][:, :5] = nan
    whole, rest = CodeEntropy(num_codebooks=2), CodeEntropy(num_codebooks=2)
    whole.update(**window)
    rest.update(**{name: value[:, 5:] for name, value in window.items()})
    assert whole.count.tolist() == rest.count.tolist()
    assert results(whole) == pytest.approx(results(rest), rel=1e-12, abs=1e-15)


def test_without_counted_codes_the_results_are_nan():
    metric = CodeEntropy(num_codebooks=1)
    metric.update(torch.zeros(1, 3, 4), torch.full((1, 3), nan), torch.full((1, 3), -1))
    assert all(value.isnan() for value in metric.compute().values())


def test_positions_at_the_limits_of_the_bins():
    position = torch.tensor([[0.0, 0.25, 0.4999, 0.5, 1.0]], dtype=torch.float64)
    values = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0]], dtype=torch.float64)
    assert sums_by_bin(position, values, num_bins=4).tolist() == [[1, 110, 1000, 10000]]


@pytest.mark.parametrize("task", ["score", "continue"])
def test_runs_accept_the_metric_and_its_results_have_intervals(task):
    bank = MetricBank({"entropy": CodeEntropy()}, spec=SPEC, task=task)
    assert bank.readings_with_logits == {""}
    assert is_sum_metric(bank.metrics["entropy"])
    assert bank.metrics["entropy"].gap.shape == (2, 15)
    recipe = bank.recipe("entropy")
    assert recipe.higher_is_better is None
    assert recipe.settings["num_bins"] == 15
    assert [recipe.unit(key) for key in ("entropy_q1", "ece_q2", "bits_per_second")] == ["nats", "share", "bit/s"]


def test_wrong_shapes_and_numbers_of_bins_are_refused():
    with pytest.raises(MetricError, match=r"shapes \(1, 3, 4\), \(1, 3\) and \(1, 2\), expected \(K, T, V\)"):
        CodeEntropy(num_codebooks=1).update(torch.zeros(1, 3, 4), torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(MetricError, match="K=4 codebooks"):
        CodeEntropy().update(torch.zeros(1, 3, 4), torch.zeros(1, 3), torch.zeros(1, 3))
    for wrong in (0, -1):
        with pytest.raises(MetricError, match=f"num_bins must be at least 1, got {wrong}"):
            CodeEntropy(num_bins=wrong)


def test_the_yaml_example_of_the_docs_is_accepted():
    shown = re.search(r"<!-- tested: entropy -->\n```yaml\n(.*?)```", DOCS, re.DOTALL)[1]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metrics", type=dict[str, Metric | MetricEntry])
    made = parser.instantiate(parser.parse_object({"metrics": yaml.safe_load(shown)})).metrics
    bank = MetricBank(made, spec=SPEC)
    assert bank.readings_with_logits == {"", "no_text"}


def test_the_states_on_an_accelerator_equal_those_on_the_cpu_without_waiting(generator):
    windows = [random_window(generator, 4, T, 9) for T in (3, 50)]
    expected = CodeEntropy().window_states(windows)
    with pretend_cuda() as log:
        metric = CodeEntropy().to("cuda")
        on_device = [{name: value.to("cuda") for name, value in window.items()} for window in windows]
        log.clear()
        states = metric.window_states(on_device)
        for window in on_device:
            metric.update(**window)
        assert log.num_waits == 0
        for name, column in states.items():
            assert column.device.type == getattr(metric, name).device.type == "cuda"
            assert torch.equal(column.cpu(), expected[name])
            torch.testing.assert_close(getattr(metric, name).cpu(), expected[name].sum(0), rtol=1e-14, atol=1e-14)
