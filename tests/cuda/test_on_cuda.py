"""Tests that require a real GPU: its kernels, graphs and waits, compared with the CPU. They are skipped without a GPU."""

import warnings

import pytest
import torch

from musicgen_eval.api import generate, perplexity
from musicgen_eval.inference.batch_scoring import score_padded
from musicgen_eval.inference.continuation import continue_prompts
from musicgen_eval.models.decoder.fused_decoder import FusedDecoder
from musicgen_eval.models.decoder.sampling import Sampling
from musicgen_eval.models.decoder.static_steps import StaticSteps
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.models.numerics import full_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HALF = ("bf16-mixed", "bf16-true", "16-mixed")
NLL_LIMITS = {"32-true": 1e-4, "bf16-mixed": 0.2, "bf16-true": 0.2, "16-mixed": 0.05}
"""Largest difference of an nll from float32 on the CPU, in nats."""
PPL_LIMITS = {"32-true": 1e-4, "bf16-mixed": 2e-2, "bf16-true": 2e-2, "16-mixed": 5e-3}
"""Largest relative difference of a perplexity from float32 on the CPU."""


@pytest.fixture
def batch(tiny_model, generator):
    """Prompts, totals and texts of different rows. The keys of two rows reach the second bucket."""
    width = tiny_model.decoder.config.hidden_size
    prompts = [torch.randint(0, 64, (4, frames), generator=generator) for frames in (12, 0, 230, 50)]
    texts = [torch.randn(length, width, generator=generator) if length else None for length in (5, 0, 2, 9)]
    return prompts, [60, 33, 280, 51], texts


def model_on_cuda(oracle, precision="32-true"):
    model = load_model(oracle / "tiny_musicgen").to("cuda")
    model = model.to(torch.bfloat16) if precision == "bf16-true" else model
    model.prepare(precision)
    return model


@torch.inference_mode()
def continued(decoder, prompts, totals, texts, *, sampling=None, **settings):
    sampling = sampling or Sampling(top_k=20)
    numbers = torch.rand(len(prompts), 4, max(totals), generator=torch.Generator().manual_seed(0))
    with full_precision():
        return continue_prompts(
            decoder,
            [prompt.to(decoder.device) for prompt in prompts],
            total_frames=totals,
            delays=(0, 1, 2, 3),
            max_frames=1500,
            stride_frames=900,
            texts=[None if text is None else text.to(decoder.device) for text in texts],
            guidance_scale=3.0,
            sampling=sampling,
            uniforms=None if sampling.temperature == 0 else numbers,
            **settings,
        ).cpu()


def agreement(found, expected):
    return (found == expected).float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=20), Sampling(top_k=None, top_p=0.9)])
def test_replayed_graphs_generate_the_codes_of_eager_steps(oracle, batch, sampling, dtype):
    decoder = load_model(oracle / "tiny_musicgen").decoder.to("cuda")
    eager = continued(FusedDecoder(decoder, dtype), *batch, sampling=sampling, kernels="eager")
    fused = FusedDecoder(decoder, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a failed capture causes a warning
        captured = continued(fused, *batch, sampling=sampling)
        replayed = continued(fused, *batch, sampling=sampling)
    assert torch.equal(captured, eager)
    assert torch.equal(replayed, eager)


def test_sampled_codes_equal_those_of_the_cpu(tiny_model, oracle, batch):
    expected = continued(tiny_model.decoder, *batch)
    found = continued(model_on_cuda(oracle).fused, *batch)
    assert agreement(found, expected) > 0.9  # rounding may change a code and all later codes of its row


def test_compiled_steps_generate_the_codes_of_eager_steps(oracle, batch):
    fused = model_on_cuda(oracle).fused
    eager = continued(fused, *batch, kernels="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decoding runs without CUDA graphs")
        found = continued(fused, *batch, kernels="compiled")
    assert agreement(found, eager) > 0.9


@pytest.mark.parametrize("kernels", ["eager", "graph"])
def test_no_step_waits_for_the_device(oracle, batch, kernels, monkeypatch):
    fused = model_on_cuda(oracle, "bf16-mixed").fused
    continued(fused, *batch, kernels=kernels)  # captures graphs, which may wait
    advance, num_calls = StaticSteps._advance, []

    def watched(*arguments):
        num_calls.append(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(StaticSteps, "_advance", watched)
    continued(fused, *batch, kernels=kernels)
    assert len(num_calls) > 50


@torch.inference_mode()
@pytest.mark.parametrize("precision", NLL_LIMITS)
def test_a_padded_batch_has_the_nll_of_the_cpu(tiny_model, oracle, generator, precision):
    width = tiny_model.decoder.config.hidden_size
    codes = [torch.randint(0, 64, (4, frames), generator=generator) for frames in (100, 37, 64)]
    scored = [torch.ones(window.shape, dtype=torch.bool) for window in codes]
    states = [torch.randn(5, width, generator=generator), None, torch.randn(20, width, generator=generator)]
    model = model_on_cuda(oracle, precision)
    with full_precision():
        expected = score_padded(tiny_model, codes, scored, states)
        found = score_padded(
            model,
            [window.to("cuda") for window in codes],
            scored,
            [None if state is None else state.to("cuda") for state in states],
        )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.nll.cpu() - theirs.nll).abs().max() < NLL_LIMITS[precision]


def test_the_codes_of_a_window_do_not_depend_on_the_batch(oracle, generator):
    model = model_on_cuda(oracle)
    audio = [torch.randn(1, 50 * 640, generator=generator) * 0.1 for _ in range(8)]
    together = torch.stack(model.encode(audio)).cpu()
    alone = torch.stack([model.encode([window])[0] for window in audio]).cpu()
    on_cpu = torch.stack(load_model(oracle / "tiny_musicgen").encode(audio))
    assert agreement(together, alone) > 0.999
    assert agreement(together, on_cpu) > 0.99


def test_decoded_audio_equals_that_of_the_cpu(tiny_model, oracle, generator):
    codes = torch.randint(0, 64, (4, 120), generator=generator)
    found = model_on_cuda(oracle).decode(codes.to("cuda")).cpu()
    torch.testing.assert_close(found, tiny_model.decode(codes), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def cpu_ppl():
    return perplexity("demo", accelerator="cpu", limit=2).ppl


@pytest.mark.parametrize("precision", PPL_LIMITS)
def test_a_run_in_any_precision_has_the_perplexity_of_the_cpu(cpu_ppl, precision):
    found = perplexity("demo", accelerator="gpu", precision=precision, limit=2)
    assert found.ppl == pytest.approx(cpu_ppl, rel=PPL_LIMITS[precision])


@pytest.mark.parametrize("precision", HALF)
def test_the_demo_with_heads_of_width_36_is_continued_in_half_precision(precision):
    result = generate("demo", "EDM", accelerator="gpu", precision=precision, limit=1, context_s=1.0, duration_s=1.0)
    assert result.continuations[0].generated.isfinite().all()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_equal_runs_are_bit_identical(precision):
    settings = {"accelerator": "gpu", "precision": precision, "limit": 2}
    first, second = (perplexity("demo", **settings) for _ in range(2))
    assert first.nll.keys() == second.nll.keys()
    assert all(torch.equal(first.nll[track], second.nll[track]) for track in first.nll)
    first, second = (generate("demo", context_s=3.0, duration_s=2.0, **settings).continuations for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.generated, theirs.generated)
