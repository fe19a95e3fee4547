"""Tests of errors that were found by running the CUDA code on the pretend device or on a CPU."""

import copy

import pytest
import torch
from torchmetrics import Metric

import musicgen_eval
from musicgen_eval.errors import CheckpointError, MetricError, RunError
from musicgen_eval.inference import scoring
from musicgen_eval.inference.continuation import continue_codes
from musicgen_eval.models.decoder import forward, fused_decoder
from musicgen_eval.models.decoder.sampling import draw_codes
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.models.out_of_memory import out_of_memory_explained
from musicgen_eval.runs.fingerprint import machine
from tests.support.pretend_cuda import pretend_cuda

DELAYS = (0, 1, 2, 3)
MOVES = (" _apply", " convert", " move")
"""Functions that move a model to another device."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def prompt(generator):
    return torch.randint(0, 64, (2, 4, 10), generator=generator)


def continued(decoder, prompt, **settings):
    settings = {"temperature": 0, "total_frames": 30, "delays": DELAYS, **settings}
    return continue_codes(decoder, prompt, **settings)


def attention_settings(monkeypatch, found):
    """Appends the setting of cuDNN attention to a list at each call of attention."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        found.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_continuation_in_half_precision_accepts_head_widths_that_are_no_multiple_of_8(precision):
    with pretend_cuda() as log:
        result = musicgen_eval.generate(
            "demo", "EDM", precision=precision, accelerator="gpu", limit=1, context_s=0.5, duration_s=0.2
        )
    assert result.continuations[0].generated.isfinite().all()
    heads = {shape[-1] for _, *shapes in log.attention for shape in shapes}
    assert 36 in heads  # `view` does not accept the layout of these heads


def test_text_states_are_converted_to_the_dtype_of_a_cast_decoder(tiny_model, prompt, generator, monkeypatch):
    monkeypatch.setattr(forward, "can_pack", lambda dtype: False)
    decoder = copy.deepcopy(tiny_model.decoder).to(torch.bfloat16)
    states = torch.randn(2, 3, decoder.config.hidden_size, generator=generator)
    codes = continued(decoder, prompt, encoder_hidden_states=states)
    assert codes.shape == (2, 4, 30)


def test_cudnn_attention_is_disabled_during_scoring_and_continuation(tiny_model, prompt, monkeypatch):
    found = []
    attention_settings(monkeypatch, found)
    with pretend_cuda():
        decoder = copy.deepcopy(tiny_model.decoder).to("cuda")
        scoring.score_codes(decoder, prompt.to("cuda"), delays=DELAYS)
        num_scored = len(found)
        continued(decoder, prompt.to("cuda"))
    assert 0 < num_scored < len(found)
    assert not any(found)
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_sampling_works_under_deterministic_algorithms(top_p, generator):
    logits, numbers = torch.randn(50, 300, generator=generator), torch.rand(50, generator=generator)
    expected = draw_codes(logits, numbers, top_k=40, top_p=top_p)
    torch.use_deterministic_algorithms(True)
    try:
        with pretend_cuda():
            found = draw_codes(logits.to("cuda"), numbers.to("cuda"), top_k=40, top_p=top_p).cpu()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, expected)


def test_autocast_does_not_round_the_cumulative_sums_of_sampling(generator):
    logits, numbers = torch.randn(50, 300, generator=generator), torch.rand(50, generator=generator)
    expected = draw_codes(logits, numbers, top_k=None)
    with pretend_cuda(), torch.autocast("cuda", torch.bfloat16):
        found = draw_codes(logits.to("cuda"), numbers.to("cuda"), top_k=None).cpu()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_decoder_cast_by_the_caller_is_an_error(oracle, device):
    with pretend_cuda():
        model = load_model(oracle / "tiny_musicgen").to(device).to(torch.bfloat16)
        with pytest.raises(
            CheckpointError, match=r"32-true requires a decoder in float32, but it was cast to bfloat16"
        ):
            model.prepare("32-true")
        model.prepare("bf16-true")


def test_a_prepared_decoder_is_an_error_for_other_precisions_only_if_its_weights_changed(oracle):
    with pretend_cuda():
        model = load_model(oracle / "tiny_musicgen").to("cuda")
        model.prepare("32-true")
        model.to("cpu").prepare("32-true")
        half = load_model(oracle / "tiny_musicgen").to("cuda")
        half.prepare("bf16-mixed")
        with pytest.raises(CheckpointError, match="prepared for bf16-mixed on cuda"):
            half.prepare("32-true")


def test_an_out_of_memory_error_names_the_batch_size_and_how_to_resume():
    with pytest.raises(RunError) as caught, out_of_memory_explained(16, "a batch"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    assert "data.batch_size below 16, such as 8" in str(caught.value)
    assert "Tried to allocate 2.00 GiB" in str(caught.value)
    assert "cannot be resumed with a different data.batch_size" in str(caught.value)
    with pytest.raises(RunError, match=r"data\.batch_size is already 1"), out_of_memory_explained(1, "a batch"):
        raise torch.OutOfMemoryError


def test_a_run_without_enough_memory_ends_with_that_error(monkeypatch):
    def encode(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(musicgen_eval.MusicGen, "encode", encode)
    with pytest.raises(RunError, match=r"out of memory while processing a batch .* with data\.batch_size below"):
        musicgen_eval.perplexity("demo", limit=1, accelerator="cpu")


class Full(Metric):
    """A metric that requires more memory than is available."""

    higher_is_better = False
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, logits):
        if logits.shape[1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.total += logits.sum()

    def compute(self):
        return self.total


def test_a_metric_that_runs_out_of_memory_is_not_reported_as_a_metric_error():
    with pytest.raises(RunError, match=r"out of memory while processing a batch"):
        musicgen_eval.perplexity("demo", limit=1, accelerator="cpu", metrics={"full": Full()})


def test_a_partly_converted_model_is_an_error(oracle, monkeypatch):
    joined, count = fused_decoder._joined, []

    def failing(*args, **kwargs):
        count.append(1)
        if len(count) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return joined(*args, **kwargs)

    monkeypatch.setattr(fused_decoder, "_joined", failing)
    with pretend_cuda():
        model = load_model(oracle / "tiny_musicgen").to("cuda")
        with pytest.raises(torch.OutOfMemoryError):
            model.prepare("bf16-mixed")
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="prepared for bf16-mixed"):
            model.prepare("32-true")


class StuckOnTheCpu(Metric):
    """A metric with a tensor that is neither a state nor a buffer, and therefore stays on the CPU."""

    higher_is_better = False
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.weights = [torch.ones(1)]

    def update(self, logits, nll):
        self.total += (nll.nan_to_num() * self.weights[0]).sum()

    def compute(self):
        return self.total


def test_the_trial_of_a_metric_on_logits_runs_on_the_device_of_the_run():
    metrics = {"stuck": StuckOnTheCpu()}
    assert musicgen_eval.perplexity("demo", limit=1, accelerator="cpu", metrics=metrics).ppl > 1
    with pretend_cuda(), pytest.raises(MetricError, match=r"'stuck' .* where it failed in a trial.*register_buffer"):
        musicgen_eval.perplexity("demo", limit=1, accelerator="gpu", metrics=metrics)


def test_the_recipe_records_switches_and_versions_only_on_cuda():
    with pretend_cuda():
        recipe = musicgen_eval.perplexity("demo", limit=1, accelerator="gpu").evaluation.recipe
        libraries = machine(torch.device("cuda", 0))["libraries"]
    assert recipe["numerics"]["cudnn_attention"] is False
    assert recipe["numerics"]["cuda"] == libraries["cuda"] == torch.version.cuda
    assert recipe["numerics"]["cudnn"] == libraries["cudnn"] == torch.backends.cudnn.version()
    assert recipe["arithmetic"] == "fused float32"
    assert "numerics" not in musicgen_eval.perplexity("demo", limit=1, accelerator="cpu").evaluation.recipe


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("code", [-1, 64])
def test_codes_out_of_range_are_an_error_before_any_kernel_runs(tiny_model, prompt, device, code):
    prompt[1, 2, 3] = code
    with pretend_cuda():
        decoder = copy.deepcopy(tiny_model.decoder).to(device)
        with pytest.raises(ValueError, match=r"codes must be in \[0, 64\)"):
            scoring.score_codes(decoder, prompt.to(device), delays=DELAYS)
        with pytest.raises(ValueError, match=r"row 1: the first .* frames of prompt must be in"):
            continued(decoder, prompt.to(device))


def test_a_loaded_model_stays_on_its_device(oracle):
    with pretend_cuda() as log:
        model = load_model(oracle / "tiny_musicgen").to("cuda")
        musicgen_eval.perplexity("demo", model, limit=1, accelerator="gpu")
        assert model.device.type == "cuda"
        log.clear()
        musicgen_eval.perplexity("demo", model, limit=1, accelerator="gpu")
        assert not [place for _, place in log.by_place() if any(name in place for name in MOVES)]
        on_cpu = load_model(oracle / "tiny_musicgen")
        musicgen_eval.perplexity("demo", on_cpu, limit=1, accelerator="gpu")
        assert on_cpu.device.type == "cpu"


def test_kernels_selected_by_timing_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: True)
    with pretend_cuda(), pytest.raises(RunError, match="PYTORCH_TUNABLEOP_ENABLED"):
        musicgen_eval.perplexity("demo", limit=1, accelerator="gpu")
