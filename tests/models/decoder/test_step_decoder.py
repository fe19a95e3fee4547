"""Steps with cached keys and values are compared with transformers' forward pass over whole sequences."""

import copy

import pytest
import torch

from musicgen_eval.models.decoder import step_decoder
from musicgen_eval.models.decoder.packing import pack_linears
from musicgen_eval.models.decoder.step_decoder import StepDecoder
from musicgen_eval.models.packed_matrix import can_pack


@pytest.fixture
def texts(tiny_model, generator):
    return [torch.randn(length, tiny_model.decoder.config.hidden_size, generator=generator) for length in (5, 3)]


def whole(decoder, steps, text):
    """Returns the (S, K, V) logits of all steps of one row, computed without a cache."""
    states = None if text is None else text[None]
    return decoder(steps, encoder_hidden_states=states, use_cache=False).logits.float().transpose(0, 1)


@torch.inference_mode()
def stepped(decoder, steps, texts, starts):
    """Returns the logits of each row from its start on, (R, steps, K, V)."""
    R, _, S = steps.shape
    cached = StepDecoder(decoder, num_rows=R, num_steps=S, text_states=texts)
    for row, start in enumerate(starts):
        cached.read(row, steps[row, :, :start])
    cached.begin(starts)
    found = [cached.logits(cached.last_read)]
    for number in range(S - min(starts)):
        at = [min(start + number, S - 1) for start in starts]
        ids = torch.stack([row[:, column] for row, column in zip(steps, at, strict=True)])
        found.append(cached.logits(cached.step(ids, number)))
    return torch.stack(found, dim=1)


@pytest.fixture
def steps(generator):
    return torch.randint(0, 65, (3, 4, 30), generator=generator)


@pytest.mark.parametrize("starts", [(12, 12, 12), (5, 20, 1)])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_step_equals_that_of_the_whole_sequence(tiny_model, steps, texts, starts, packed, small, monkeypatch):
    monkeypatch.setattr(step_decoder, "SMALL_PRODUCT", 10**9 if small else 0)
    monkeypatch.setattr(step_decoder, "FOLDED_WIDTH", 512 if small else 0)
    decoder = copy.deepcopy(tiny_model.decoder)
    if packed and not pack_linears(decoder):
        pytest.skip("this processor has no packed products")
    found = stepped(decoder, steps, texts, starts)
    for row, (start, text) in enumerate(zip(starts, [*texts, None], strict=True)):
        expected = whole(tiny_model.decoder, steps[row], text)[start - 1 :]
        torch.testing.assert_close(found[row, : len(expected)], expected, rtol=1e-4, atol=1e-4)


def test_reading_a_row_again_replaces_its_keys_and_values(tiny_model, steps, texts):
    cached = StepDecoder(tiny_model.decoder, num_rows=3, num_steps=30, text_states=texts)
    with torch.inference_mode():
        cached.read(0, steps[1])
        cached.read(0, steps[0, :, :9])
        cached.begin([9, 9, 9])
        logits = cached.logits(cached.step(steps[:, :, 9], 0))[0]
    torch.testing.assert_close(logits, whole(tiny_model.decoder, steps[0], texts[0])[9], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("how", ["packed", "autocast", "cast"])
def test_bfloat16_steps_are_about_as_accurate_as_those_of_transformers(
    tiny_model, steps, texts, how, small, monkeypatch
):
    monkeypatch.setattr(step_decoder, "FOLDED_WIDTH", 512 if small else 0)
    exact = whole(tiny_model.decoder, steps[0], texts[0])[11:]
    half = copy.deepcopy(tiny_model.decoder)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = (whole(half, steps[0], texts[0])[11:] - exact).square().mean().sqrt()
    if how == "cast":
        half = half.to(torch.bfloat16)
        texts = [text.to(torch.bfloat16) for text in texts]
    if how == "packed" and not (can_pack(torch.bfloat16) and pack_linears(half, torch.bfloat16)):
        pytest.skip("this processor has no packed bfloat16 products")
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = stepped(half, steps, texts, (12, 12, 12))[0]
    ours = (found - exact).square().mean().sqrt()
    assert 0 < ours < 1.5 * theirs


def test_the_table_of_positions_is_extended_if_it_is_too_short(tiny_model, generator):
    decoder = copy.deepcopy(tiny_model.decoder)
    num_steps = decoder.model.decoder.embed_positions.weights.shape[0] + 5
    StepDecoder(decoder, num_rows=1, num_steps=num_steps)
    assert decoder.model.decoder.embed_positions.weights.shape[0] >= num_steps


def test_steps_do_not_depend_on_the_default_dtype(tiny_model, steps, texts):
    decoder = copy.deepcopy(tiny_model.decoder)
    pack_linears(decoder)
    expected = stepped(decoder, steps, texts, (12, 12, 12))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = stepped(decoder, steps, texts, (12, 12, 12))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
