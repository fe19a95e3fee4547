"""The fused forward pass is compared with that of transformers, and the marks of hidden keys with masks."""

import copy

import pytest
import torch
from torch.nn import functional

from musicgen_eval.inference.scoring import hidden_states
from musicgen_eval.models.decoder.fused_decoder import HIDDEN, TEXT_LENGTH_MULTIPLE, FusedDecoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def steps(generator):
    return torch.randint(0, 65, (3, 4, 30), generator=generator)


@pytest.fixture
def texts(tiny_model, generator):
    width = tiny_model.decoder.config.hidden_size
    return [torch.randn(5, width, generator=generator), None, torch.randn(3, width, generator=generator)]


@torch.inference_mode()
def test_rows_of_a_padded_batch_have_the_hidden_states_of_transformers(tiny_model, steps, texts):
    fused = FusedDecoder(tiny_model.decoder, torch.float32)
    found = fused.hidden_states(steps, fused.text_keys(texts))
    for row, text in enumerate(texts):
        expected = hidden_states(tiny_model.decoder, steps[row, None], None if text is None else text[None], None)[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_rows_without_a_text_have_the_null_condition(tiny_model, steps, texts):
    fused = FusedDecoder(tiny_model.decoder, torch.float32)
    found = fused.hidden_states(steps, fused.text_keys(texts[:1]))
    expected = hidden_states(tiny_model.decoder, steps[1:], None, None)
    torch.testing.assert_close(found[1:], expected, rtol=1e-4, atol=1e-5)
    assert fused.text_keys([None, None]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mark_hides_a_key_like_a_mask(dtype, generator):
    q, k, v = (torch.randn(2, 3, n, 64, generator=generator).to(dtype) for n in (1, 40, 40))
    is_hidden = torch.arange(40) >= torch.tensor([40, 17])[:, None]
    bias = torch.zeros(2, 1, 1, 40, dtype=dtype).masked_fill(is_hidden[:, None, None], -torch.inf)
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    marks = torch.zeros(2, 3, 40, 8, dtype=dtype)
    marks[..., 0].masked_fill_(is_hidden[:, None], HIDDEN)
    marked = functional.scaled_dot_product_attention(
        functional.pad(q, (0, 8), value=1.0), torch.cat([k, marks], -1), functional.pad(v, (0, 8)), scale=64**-0.5
    )
    torch.testing.assert_close(marked[..., :64], expected)
    assert not marked[..., 64:].any()


def test_text_padding_is_hidden_and_lengths_are_rounded_up(tiny_model, texts):
    keys = FusedDecoder(tiny_model.decoder, torch.float32).text_keys(texts)
    assert keys.length == TEXT_LENGTH_MULTIPLE
    mark = keys.keys[0][:, 0, :, tiny_model.decoder.config.hidden_size // 4]
    assert [(row == 0).sum().item() for row in mark] == [5, 1, 3]
    assert set(mark.unique().tolist()) == {0.0, HIDDEN}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_joined_in_place_are_shared_with_the_decoder(tiny_model, steps, dtype):
    decoder = copy.deepcopy(tiny_model.decoder)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        expected = decoder(steps.reshape(12, 30), use_cache=False).logits
        fused = FusedDecoder(decoder, dtype, in_place=True)
        found = decoder(steps.reshape(12, 30), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    attention = decoder.model.decoder.layers[0].self_attn
    assert attention.q_proj.weight.dtype == dtype
    assert attention.k_proj.weight.untyped_storage().data_ptr() == fused.layers[0].qkv.untyped_storage().data_ptr()


def test_a_decoder_with_biases_is_refused(tiny_model):
    decoder = copy.deepcopy(tiny_model.decoder)
    decoder.model.decoder.layers[0].fc1.bias = torch.nn.Parameter(torch.zeros(decoder.config.ffn_dim))
    with pytest.raises(ValueError, match="has linear layers with a bias"):
        FusedDecoder(decoder, torch.float32)
