"""Static steps draw the same codes as CPU steps, for any batch, bucket size and sampling."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch._dynamo

from musicgen_eval.inference.continuation import continue_prompts
from musicgen_eval.models.decoder import static_steps
from musicgen_eval.models.decoder.fused_decoder import FusedDecoder
from musicgen_eval.models.decoder.sampling import Sampling

GREEDY = Sampling(temperature=0)
TOP_K = Sampling(top_k=20)
TOP_P = Sampling(top_k=None, top_p=0.9)

pytestmark = pytest.mark.usefixtures("one_thread")


def continued(decoder, prompts, totals, texts, *, sampling=TOP_K, guidance_scale=3.0, seed=0, **settings):
    numbers = torch.rand(len(prompts), 4, max(totals), generator=torch.Generator().manual_seed(seed))
    return continue_prompts(
        decoder,
        prompts,
        total_frames=totals,
        delays=(0, 1, 2, 3),
        texts=texts,
        guidance_scale=guidance_scale,
        sampling=sampling,
        uniforms=None if sampling.temperature == 0 else numbers,
        **{"max_frames": 200, "stride_frames": 120, **settings},
    )


@pytest.fixture
def rows(tiny_model, generator):
    """Prompts, total numbers of frames and texts of a batch with different rows."""
    width = tiny_model.decoder.config.hidden_size
    prompts = [torch.randint(0, 64, (4, frames), generator=generator) for frames in (12, 0, 30, 50, 7)]
    texts = [torch.randn(length, width, generator=generator) if length else None for length in (5, 0, 2, 0, 9)]
    return prompts, [60, 33, 95, 51, 7], texts


@torch.inference_mode()
@pytest.mark.parametrize("bucket", [8, 256])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampling", [GREEDY, TOP_K, TOP_P])
def test_a_mixed_batch_has_the_same_codes_as_with_cpu_steps(
    tiny_model, rows, sampling, guidance_scale, bucket, monkeypatch
):
    monkeypatch.setattr(static_steps, "BUCKET", bucket)
    settings = {"sampling": sampling, "guidance_scale": guidance_scale}
    expected = continued(tiny_model.decoder, *rows, **settings)
    assert torch.equal(continued(FusedDecoder(tiny_model.decoder, torch.float32), *rows, **settings), expected)


@torch.inference_mode()
def test_sliding_windows_have_the_same_codes_as_with_cpu_steps(tiny_model, rows):
    settings = {"max_frames": 40, "stride_frames": 24}
    expected = continued(tiny_model.decoder, *rows, **settings)
    fused = FusedDecoder(tiny_model.decoder, torch.float32)
    assert torch.equal(continued(fused, *rows, **settings), expected)


@torch.inference_mode()
def test_static_steps_are_reused_for_a_batch_of_the_same_sizes(tiny_model, rows):
    fused = FusedDecoder(tiny_model.decoder, torch.float32)
    first = continued(fused, *rows)
    kept = fused.last_steps
    prompts, totals, texts = rows
    other = ([prompt.flip(1) for prompt in prompts], totals, [None if text is None else -text for text in texts])
    again = continued(fused, *other, seed=1)
    assert fused.last_steps is kept
    assert torch.equal(again, continued(tiny_model.decoder, *other, seed=1))
    assert torch.equal(continued(fused, *rows), first)
    continued(fused, *rows, guidance_scale=1.0)
    assert fused.last_steps is not kept


@torch.inference_mode()
def test_batches_of_similar_length_use_the_same_cache(tiny_model, rows):
    prompts, _, texts = rows
    fused = FusedDecoder(tiny_model.decoder, torch.float32)
    continued(fused, prompts, [60, 33, 95, 51, 7], texts)
    kept = fused.last_steps
    continued(fused, prompts, [60, 33, 98, 51, 7], texts)
    assert fused.last_steps is kept


@torch.inference_mode()
def test_an_old_cache_is_freed_before_a_new_one_is_allocated(tiny_model, rows, monkeypatch):
    alive = []
    build = static_steps.StaticSteps.__init__

    def spy(self, *args):
        alive.append([reference() is not None for reference in old])
        build(self, *args)

    monkeypatch.setattr(static_steps.StaticSteps, "__init__", spy)
    fused, old = FusedDecoder(tiny_model.decoder, torch.float32), []
    gc.disable()
    try:
        continued(fused, *rows)
        old += [weakref.ref(fused.last_steps), weakref.ref(fused.last_steps._cache)]
        continued(fused, *rows, guidance_scale=1.0)
        continued(tiny_model.decoder, *rows)
    finally:
        gc.enable()
    assert alive == [[], [False, False]]


@torch.inference_mode()
def test_long_prompts_are_read_in_several_passes(tiny_model, rows, monkeypatch):
    monkeypatch.setattr(static_steps, "STEPS_AT_ONCE", 60)
    fused = FusedDecoder(tiny_model.decoder, torch.float32)
    assert torch.equal(continued(fused, *rows), continued(tiny_model.decoder, *rows))


@torch.inference_mode()
def test_a_row_of_nans_does_not_affect_the_next_batch(tiny_model, rows):
    prompts, totals, texts = rows
    fused = FusedDecoder(tiny_model.decoder, torch.float32)
    broken = [torch.full_like(texts[0], float("nan")), *texts[1:]]
    with pytest.raises(ValueError, match="rows 0 of the batch"):
        continued(fused, prompts, totals, broken)
    assert torch.equal(continued(fused, *rows), continued(tiny_model.decoder, *rows))


@torch.inference_mode()
def test_half_precision_steps_mostly_draw_the_codes_of_float32(tiny_model, rows):
    expected = continued(tiny_model.decoder, *rows, sampling=GREEDY)
    found = continued(FusedDecoder(tiny_model.decoder, torch.bfloat16), *rows, sampling=GREEDY)
    assert 0.5 < (found == expected).float().mean() <= 1


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("sampling", [TOP_K, TOP_P])
def test_a_step_compiles_to_one_graph_for_any_number_of_buckets(tiny_model, rows, sampling, monkeypatch):
    monkeypatch.setattr(static_steps, "BUCKET", 32)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    expected = continued(FusedDecoder(tiny_model.decoder, torch.float32), *rows, sampling=sampling, kernels="eager")
    fused = FusedDecoder(tiny_model.decoder, torch.float32)
    with torch._dynamo.config.patch(recompile_limit=2):
        found = continued(fused, *rows, sampling=sampling, kernels="compiled")
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    torch._dynamo.reset()
