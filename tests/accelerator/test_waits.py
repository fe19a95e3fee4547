"""Tests that the CPU waits for the device once per batch, and neither in decode steps nor in the encoder."""

import copy

import pytest
import torch

import musicgen_eval
from musicgen_eval.inference.continuation import continue_codes
from musicgen_eval.metrics import CodebookAccuracy, CodebookPerplexity, TextGain
from musicgen_eval.models.codec import encoder as encodec
from musicgen_eval.models.musicgen import load_model
from tests.support.pretend_cuda import pretend_cuda

DELAYS = (0, 1, 2, 3)
LOADING = ("_apply", " convert", " move", "fused_decoder.py", "run_evaluation", "run_continuation")
"""Parts of the places that belong to loading a model or to the set-up of Lightning."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def waits(log):
    """Returns (kind, place) -> number of waits caused by the package."""
    return {
        (kind, place): count
        for (kind, place), count in log.by_place().items()
        if "async" not in kind and not any(name in place for name in LOADING)
    }


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_k": 20}, {"top_k": None, "top_p": 0.9}])
def test_the_number_of_waits_does_not_depend_on_the_length_of_a_continuation(
    tiny_model, generator, sampling, precision
):
    prompt = torch.randint(0, 64, (3, 4, 30), generator=generator)
    states = torch.randn(3, 5, tiny_model.decoder.config.hidden_size, generator=generator)
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1, 2:], mask[2] = 0, 0
    counts = []
    with pretend_cuda() as log, torch.inference_mode():
        decoder = copy.deepcopy(tiny_model.decoder).to("cuda")
        for num_frames in (40, 70):
            numbers = torch.rand(3, 4, num_frames, generator=generator)
            log.clear()
            with torch.autocast("cuda", precision, enabled=precision != torch.float32):
                continue_codes(
                    decoder,
                    prompt.to("cuda"),
                    prompt_frames=[30, 12, 5],
                    total_frames=num_frames,
                    delays=DELAYS,
                    encoder_hidden_states=states.to("cuda"),
                    encoder_attention_mask=mask.to("cuda"),
                    uniforms=numbers.to("cuda"),
                    **sampling,
                )
            counts.append(log.num_waits)
    assert counts[0] == counts[1]


def test_encoding_does_not_wait_and_stacks_windows_of_equal_length(oracle, generator, monkeypatch):
    audio = [torch.randn(1, frames * 640, generator=generator) * 0.1 for frames in (25, 20, 25, 25, 20)]
    expected = load_model(oracle / "tiny_musicgen").encode(audio)
    with pretend_cuda() as log:
        model = load_model(oracle / "tiny_musicgen").to("cuda")
        on_device = [samples.to("cuda") for samples in audio]
        launches = []
        for limit in (1, encodec.STACK_SAMPLES):
            monkeypatch.setattr(encodec, "STACK_SAMPLES", limit)
            log.clear()
            codes = model.encode(on_device)
            assert log.num_waits == 0
            launches.append(sum(log.kernels.values()))
            assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(codes, expected, strict=True))
    assert launches[1] < 0.5 * launches[0]


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_scored_batch_waits_once_for_its_results(songs, batch_size):
    metrics = {"accuracy": CodebookAccuracy(), "text_gain": TextGain()}
    with pretend_cuda() as log:
        result = musicgen_eval.perplexity(
            songs, context_s=0.3, target_s=0.3, accelerator="gpu", batch_size=batch_size, metrics=metrics
        )
    num_batches = -(-result.evaluation.counts["windows"] // batch_size)
    assert num_batches > 1
    found = waits(log)
    assert {kind for kind, _ in found} == {"synchronize"}
    assert sum(found.values()) == num_batches


class OnLogits(CodebookPerplexity):
    """Perplexity with logits as an additional input, so that it runs on the device."""

    def update(self, logits, nll):
        super().update(nll + 0 * logits.sum(-1))


def test_metrics_on_logits_cause_one_more_wait_per_batch(songs):
    others = []
    for limit, num_batches in ((1, 1), (3, 3)):
        with pretend_cuda() as log:
            result = musicgen_eval.perplexity(
                songs, limit=limit, context_s=0.3, target_s=0.3, accelerator="gpu", batch_size=2,
                metrics={"on_logits": OnLogits()},
            )  # fmt: skip
        found = waits(log)
        synchronised = sum(count for (kind, _), count in found.items() if kind == "synchronize")
        assert synchronised == 2 * num_batches
        others.append(sum(found.values()) - synchronised)
        assert result.evaluation.metrics["on_logits"]["ppl"].value == pytest.approx(result.ppl, rel=1e-6)
    assert others[0] == others[1]  # the states of the metric are moved once per run
