from math import exp, fsum, log

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from musicgen_eval.inference.scoring import nll_from_logits, score_codes
from musicgen_eval.metrics import CodebookPerplexity
from musicgen_eval.models.delay import delay_codes


def brute_force(windows: list[Tensor], frame_rate_hz: float) -> dict[str, float]:
    """Computes the definition in a plain loop."""
    num_codebooks = windows[0].shape[0]
    ce = []
    for k in range(num_codebooks):
        counted = [value for window in windows for value in window[k].double().tolist() if value == value]
        ce.append(fsum(counted) / len(counted))
    mean = fsum(ce) / num_codebooks
    results = {"ppl": exp(mean), "ce": mean, "bits_per_second": frame_rate_hz * fsum(ce) / log(2)}
    for k, value in enumerate(ce, start=1):
        results[f"ce_q{k}"] = value
        results[f"ppl_q{k}"] = exp(value)
    return results


def random_windows(seed: int, num_windows: int, num_codebooks: int) -> list[Tensor]:
    """Returns random (K, T_i) nats, of which some but not all are NaN."""
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for _ in range(num_windows):
        T = int(torch.randint(1, 30, (), generator=generator))
        nll = torch.rand((num_codebooks, T), generator=generator) * 12
        nll[torch.rand((num_codebooks, T), generator=generator) < 0.3] = float("nan")
        windows.append(nll)
    windows[0][:, 0] = 1.0
    return windows


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 8))
def test_perplexity_equals_brute_force(seed, num_windows, num_codebooks):
    windows = random_windows(seed, num_windows, num_codebooks)
    metric = CodebookPerplexity(num_codebooks=num_codebooks, frame_rate_hz=50)
    for window in windows:
        metric.update(window)
    found = {key: value.item() for key, value in metric.compute().items()}
    assert found == pytest.approx(brute_force(windows, 50), rel=1e-12)
    assert all(value.dtype == torch.float64 for value in metric.compute().values())


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_window_states_equal_the_states_of_single_updates(seed, num_windows):
    windows = random_windows(seed, num_windows, 4)
    at_once = CodebookPerplexity().window_states([{"nll": window} for window in windows])
    for row, window in enumerate(windows):
        metric = CodebookPerplexity()
        metric.update(window)
        torch.testing.assert_close(at_once["total"][row], metric.total, rtol=1e-14, atol=0)
        assert torch.equal(at_once["count"][row], metric.count)
    assert set(at_once) == set(CodebookPerplexity()._defaults)


def test_perplexity_is_the_exponential_of_the_mean_over_codebooks():
    nll = torch.tensor([[1.0, 1.0, 1.0, float("nan")], [5.0, float("nan"), float("nan"), float("nan")]])
    metric = CodebookPerplexity(num_codebooks=2)
    metric.update(nll)
    ppl = metric.compute()["ppl"].item()
    assert ppl == pytest.approx(exp(3))
    assert abs(ppl - (exp(1) + exp(5)) / 2) > 1  # mean of codebook perplexities
    assert abs(ppl - exp((3 * 1 + 5) / 4)) > 1  # micro average


def test_perplexity_does_not_depend_on_batches():
    codes = torch.tensor([[[1.0, 2.0]], [[6.0, 7.0]]])
    apart, together = CodebookPerplexity(num_codebooks=1), CodebookPerplexity(num_codebooks=1)
    together.update(codes)
    for row in codes:
        apart.update(row)
    assert apart.compute()["ppl"] == together.compute()["ppl"]
    assert together.compute()["ppl"].item() == pytest.approx(exp(4))  # a mean of batch perplexities would be 334.8


def test_sums_and_counts_do_not_stall_at_2_to_the_24():
    metric = CodebookPerplexity(num_codebooks=1)
    metric.total = torch.full((1,), 2.0**24 * 3, dtype=torch.float64)
    metric.count = torch.full((1,), 2**24, dtype=torch.int64)
    metric.update(torch.full((1, 3), 7.0))
    assert metric.count.item() == 2**24 + 3
    assert metric.compute()["ce"].item() == (2.0**24 * 3 + 21) / (2**24 + 3)


def test_half_precision_nats_are_added_in_float64():
    nll = torch.full((1, 5000), 2.5, dtype=torch.bfloat16)
    metric = CodebookPerplexity(num_codebooks=1)
    metric.update(nll)
    assert metric.compute()["ce"].item() == 2.5


def test_perplexity_without_counted_codes_is_nan():
    metric = CodebookPerplexity()
    metric.update(torch.full((4, 3), float("nan")))
    assert metric.compute()["ppl"].isnan()


def test_a_uniform_guess_reaches_the_ceiling():
    metric = CodebookPerplexity()
    metric.update(torch.full((4, 9), 2048.0).log())
    assert metric.compute()["ppl"].item() == pytest.approx(2048, rel=1e-6)
    assert metric.compute()["bits_per_second"].item() == pytest.approx(2200, rel=1e-6)


def test_perplexity_from_the_decoders_logits_equals_scoring(tiny_model, generator):
    decoder, delays = tiny_model.decoder, tiny_model.spec.delays
    codes = torch.randint(64, (2, 4, 20), generator=generator)
    steps = delay_codes(codes, delays=delays, special_token=64)
    with torch.inference_mode():
        logits = decoder(input_ids=steps.reshape(8, -1)).logits
        scored = score_codes(decoder, codes, delays=delays)

    metric = CodebookPerplexity(num_codebooks=4)
    metric.update(nll_from_logits(logits, codes, delays=delays))

    by_hand = []
    for b in range(2):
        for k in range(4):
            for t in range(20):
                row = logits.reshape(2, 4, -1, 64)[b, k, t + delays[k]].double()
                by_hand.append((row.logsumexp(0) - row[codes[b, k, t]]).item())
    by_window = torch.tensor(by_hand, dtype=torch.float64).reshape(2, 4, 20)
    expected = brute_force(list(scored), 50)
    found = {key: value.item() for key, value in metric.compute().items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert found == pytest.approx(brute_force(list(by_window), 50), rel=1e-6)
    assert abs(found["ce"] - log(64)) > 0.05  # far from a uniform guess, so that a shift by one step would be detected


class Training(L.LightningModule):
    """A module of a user, with a metric as submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.ppl = CodebookPerplexity(num_codebooks=1)


def test_perplexity_stays_exact_in_a_lightning_module_cast_to_bf16():
    module = Training().to(torch.bfloat16)
    assert module.layer.weight.dtype == torch.bfloat16
    for _ in range(1400):
        module.ppl.update(torch.full((1, 1), 1.0, dtype=torch.bfloat16))
    assert (module.ppl.total.item(), module.ppl.count.item()) == (1400.0, 1400)
