"""Packed decoders are compared with plain ones, on random decoders whose logits are far from uniform."""

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional
from transformers import MusicgenForCausalLM
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

from musicgen_eval.models import packed_matrix, processor
from musicgen_eval.models.decoder import forward, packing
from musicgen_eval.models.decoder.forward import causal_attention, last_hidden_state
from musicgen_eval.models.decoder.packing import PackedLinear, pack_linears
from musicgen_eval.models.packed_matrix import PackedMatrix, can_pack
from musicgen_eval.models.threads import map_single_threaded, single_threaded

needs_bfloat16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this processor has no oneDNN in bfloat16")


@pytest.fixture(autouse=True)
def _one_thread():
    with single_threaded(), torch.inference_mode():
        yield


def random_decoder() -> MusicgenForCausalLM:
    config = MusicgenDecoderConfig(
        vocab_size=64, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, num_codebooks=4
    )
    config._attn_implementation = "sdpa"
    decoder = MusicgenForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5 * 1.5)
    return decoder


@pytest.fixture(scope="module")
def plain() -> MusicgenForCausalLM:
    return random_decoder()


def steps(num_steps: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 65, (4, num_steps), generator=torch.Generator().manual_seed(seed))


def text(num_tokens: int | None) -> torch.Tensor | None:
    return None if num_tokens is None else torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(2))


def hidden_of(decoder: MusicgenForCausalLM, input_ids: torch.Tensor, states: torch.Tensor | None) -> torch.Tensor:
    """Computes the hidden states with transformers' forward pass."""
    states = None if states is None else states[None]
    return decoder.model.decoder(input_ids=input_ids, encoder_hidden_states=states, use_cache=False).last_hidden_state[
        0
    ]


def nll(decoder: MusicgenForCausalLM, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    targets = input_ids.clamp_max(63)
    return torch.stack(
        [
            functional.cross_entropy(head(hidden).float(), target, reduction="none")
            for head, target in zip(decoder.lm_heads, targets, strict=True)
        ]
    )


@pytest.mark.parametrize("num_tokens", [None, 1, 9])
@pytest.mark.parametrize("num_steps", [1, 2, 191, 192, 193, 600])
def test_float32_scores_equal_those_of_the_plain_decoder(plain, num_steps, num_tokens):
    decoder = copy.deepcopy(plain)
    assert pack_linears(decoder)
    ids, states = steps(num_steps), text(num_tokens)
    expected = nll(plain, hidden_of(plain, ids, states), ids)
    assert expected.std() > 0.5 or num_steps < 3
    for hidden in (
        hidden_of(decoder, ids, states),
        last_hidden_state(decoder, ids, states),
        last_hidden_state(plain, ids, states),
    ):
        assert (nll(decoder, hidden, ids) - expected).abs().max() < 1e-5


@needs_bfloat16
@pytest.mark.parametrize("num_tokens", [None, 9])
def test_bfloat16_scores_are_about_as_accurate_as_with_autocast(plain, num_tokens):
    decoder = copy.deepcopy(plain)
    assert pack_linears(decoder, torch.bfloat16)
    ids, states = steps(600), text(num_tokens)
    exact = nll(plain, hidden_of(plain, ids, states), ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = (nll(plain, hidden_of(plain, ids, states), ids) - exact).square().mean().sqrt()
    for hidden in (hidden_of(decoder, ids, states), last_hidden_state(decoder, ids, states)):
        assert hidden.dtype == torch.float32
        error = (nll(decoder, hidden, ids) - exact).square().mean().sqrt()
        assert 0 < error < 1.1 * autocast


@needs_bfloat16
def test_the_output_heads_stay_in_float32():
    decoder = random_decoder()
    pack_linears(decoder, torch.bfloat16)
    assert {head.dtype for head in decoder.lm_heads} == {torch.float32}
    assert {layer.fc2.dtype for layer in decoder.model.decoder.layers} == {torch.bfloat16}
    assert not [module for module in decoder.modules() if type(module) is torch.nn.Linear]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_windows_computed_in_parallel_are_bit_identical_to_windows_alone(plain, dtype):
    decoder = copy.deepcopy(plain)
    pack_linears(decoder, dtype)
    windows = [(steps(n, seed=n), text(tokens)) for n, tokens in ((250, 5), (31, None), (193, 2), (250, None))]
    alone = [last_hidden_state(decoder, *window) for window in windows]
    for num_workers in (1, 2, 3):
        together = map_single_threaded(
            lambda window: last_hidden_state(decoder, *window), windows[::-1], num_workers=num_workers
        )
        assert all(torch.equal(a, b) for a, b in zip(together[::-1], alone, strict=True))


def test_packing_frees_the_old_parameters():
    decoder = random_decoder()
    weights = [weakref.ref(module.weight) for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
    assert pack_linears(decoder)
    gc.collect()
    assert len(weights) == 24
    assert not [ref for ref in weights if ref() is not None]


def test_packing_again_has_no_effect_and_another_dtype_is_refused():
    decoder = random_decoder()
    assert pack_linears(decoder)
    head = decoder.lm_heads[0]
    assert pack_linears(decoder)
    assert decoder.lm_heads[0] is head
    with pytest.raises(ValueError, match=r"already packed in torch.float32 and cannot be packed in torch.bfloat16"):
        pack_linears(decoder, torch.bfloat16)
    with pytest.raises(ValueError, match="float16"):
        pack_linears(random_decoder(), torch.float16)
    with pytest.raises(ValueError, match="must have float32 weights to be packed"):
        pack_linears(random_decoder().double())


def test_a_decoder_is_not_changed_if_packing_is_not_supported(plain, monkeypatch):
    decoder = copy.deepcopy(plain)
    for module in (packing, forward, packed_matrix):
        monkeypatch.setattr(module, "can_pack", lambda dtype: False)
    assert not pack_linears(decoder)
    ids = steps(50)
    assert torch.equal(hidden_of(decoder, ids, None), hidden_of(plain, ids, None))
    assert (last_hidden_state(decoder, ids) - hidden_of(plain, ids, None)).abs().max() < 1e-5
    matrix = PackedMatrix(decoder.lm_heads[0].weight, torch.ones(64))
    x = torch.ones(3, 64)
    expected = functional.linear(x, decoder.lm_heads[0].weight, torch.ones(64))
    assert torch.equal(matrix(x, add=x), expected + x)
    assert torch.equal(matrix(x, activation="gelu"), functional.gelu(expected))


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_linear_layer_equals_the_linear_layer(has_bias, generator):
    linear = torch.nn.Linear(24, 40, bias=has_bias)
    x = torch.randn(2, 7, 24, generator=generator)
    assert torch.allclose(PackedLinear(linear, torch.float32)(x), linear(x), atol=1e-6)
    assert torch.allclose(PackedLinear(linear, torch.float32, "gelu")(x), functional.gelu(linear(x)), atol=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PackedLinear(linear, torch.float32)(x.bfloat16()).dtype == torch.float32
    matrix = PackedMatrix(linear.weight, linear.bias)
    add = torch.randn(2, 7, 40, generator=generator)
    assert torch.allclose(matrix(x, add=add), linear(x) + add, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 5, 191, 192, 193, 385])
def test_causal_attention_equals_attention_with_a_mask(num_steps, generator):
    q, k, v = (torch.randn(num_steps, 48, generator=generator) for _ in range(3))
    heads = [t.view(num_steps, 3, 16).transpose(0, 1).double() for t in (q, k, v)]
    scores = heads[0] @ heads[1].mT / 4
    scores += torch.full((num_steps, num_steps), -torch.inf, dtype=torch.float64).triu(1)
    expected = (scores.softmax(-1) @ heads[2]).transpose(0, 1).flatten(1)
    assert (causal_attention(q, k, v, num_heads=3) - expected).abs().max() < 2e-6


@pytest.mark.skipif(not can_pack(torch.float32), reason="this processor has no oneDNN")
def test_packing_and_unpacking_a_weight_is_exact(generator):
    weight, bias = torch.randn(40, 24, generator=generator), torch.randn(40, generator=generator)
    x, total = torch.randn(7, 24, generator=generator), torch.randn(7, 40, generator=generator)
    matrix = PackedMatrix(weight, bias)
    packed_result = matrix(x)
    assert torch.equal(matrix.plain_weight(), weight)
    matrix.lay_out(False)
    assert not matrix.is_packed
    assert torch.equal(matrix.weight, weight)
    assert torch.allclose(matrix(x), packed_result, atol=1e-5)
    assert torch.allclose(matrix.add_to(total.clone(), x), total + x @ weight.T, atol=1e-5)
    matrix.lay_out(True)
    assert torch.equal(matrix(x), packed_result)
    assert torch.allclose(matrix.add_to(total.clone(), x), total + x @ weight.T, atol=1e-5)


@pytest.mark.skipif(not can_pack(torch.float32), reason="this processor has no oneDNN")
@pytest.mark.parametrize("fast_mkl", [False, True])
def test_float32_weights_stay_plain_for_many_rows_if_mkl_is_faster(plain, fast_mkl, monkeypatch):
    for module in (packing, forward):
        monkeypatch.setattr(module, "has_fast_mkl", lambda: fast_mkl)
    ids, states = steps(50), text(5)

    def prepared(*calls: bool) -> torch.Tensor:
        decoder = copy.deepcopy(plain)
        for few_rows in calls:
            assert pack_linears(decoder, few_rows=few_rows)
        layouts = {module.matrix.is_packed for module in decoder.modules() if isinstance(module, PackedLinear)}
        assert layouts == {calls[-1] or not fast_mkl}
        return last_hidden_state(decoder, ids, states)

    for_scoring, for_steps = prepared(False), prepared(True)
    assert torch.equal(prepared(False, True), for_steps)
    assert torch.equal(prepared(True, False), for_scoring)
    assert (for_scoring - for_steps).abs().max() < 1e-5
    assert (for_scoring - hidden_of(plain, ids, states)).abs().max() < 1e-5


def test_an_intel_processor_is_recognised(tmp_path, monkeypatch):
    for vendor, expected in (("GenuineIntel", torch.backends.mkl.is_available()), ("AuthenticAMD", False)):
        cpuinfo = tmp_path / vendor
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
        monkeypatch.setattr(processor, "CPUINFO", cpuinfo)
        processor.has_fast_mkl.cache_clear()
        assert processor.has_fast_mkl() == expected
    processor.has_fast_mkl.cache_clear()
