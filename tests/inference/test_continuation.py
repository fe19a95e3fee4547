"""Compares continuations with audiocraft, transformers, and an implementation without a cache."""

import copy
import functools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import MusicgenForConditionalGeneration

from musicgen_eval.errors import NonFiniteError
from musicgen_eval.inference.continuation import continue_codes
from musicgen_eval.models.decoder import step_decoder
from musicgen_eval.models.decoder.packing import pack_linears
from musicgen_eval.models.decoder.sampling import draw_codes
from musicgen_eval.models.delay import delay_codes

DELAYS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def composite(oracle):
    model = MusicgenForConditionalGeneration.from_pretrained(oracle / "tiny_musicgen", dtype=torch.float32).eval()
    model.generation_config.max_length = None
    return model


@pytest.fixture(scope="module")
def packed_decoder(composite):
    packed = copy.deepcopy(composite.decoder)
    return packed if pack_linears(packed) else None


@pytest.fixture(params=["plain", "packed", "as a large one"])
def decoder(request, composite, packed_decoder, monkeypatch):
    """A plain decoder, a packed one, and a packed one on the code path of large decoders.

    For small decoders, weights are unpacked and texts are folded into the weights.
    """
    if request.param == "plain":
        return composite.decoder
    if packed_decoder is None:
        pytest.skip("packed products are not available on this processor")
    if request.param == "as a large one":
        monkeypatch.setattr(step_decoder, "SMALL_PRODUCT", 0)
        monkeypatch.setattr(step_decoder, "FOLDED_WIDTH", 0)
    return packed_decoder


def random_codes(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def random_texts(decoder, *lengths, seed=0):
    """Returns (B, L, D) states and their mask; a length of 0 means the null condition."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(lengths), max(*lengths, 1), decoder.config.hidden_size, generator=generator)
    mask = torch.arange(states.shape[1]) < torch.tensor(lengths)[:, None]
    return states * mask[..., None], mask.long()


def without_cache(decoder, prompt, total, *, text=None, guidance=3.0, uniforms=None, **sampling):
    """Continues one row in one window without a cache, by a forward pass of transformers over all steps for every step."""
    K, P = prompt.shape
    steps = delay_codes(prompt[None], delays=DELAYS, special_token=64, num_steps=total + max(DELAYS) + 1)[0]
    for column in range(P + 1, total + max(DELAYS) + 1):
        logits = [
            decoder(steps[:, :column], encoder_hidden_states=None if states is None else states[None]).logits[:, -1]
            for states in ([text] if guidance == 1 or text is None else [text, None])
        ]
        guided = logits[0] if len(logits) == 1 else logits[1] + guidance * (logits[0] - logits[1])
        for k in range(K):
            frame = column - 1 - k
            if P <= frame < total:
                number = None if uniforms is None else uniforms[k, frame]
                steps[k, column] = draw_codes(guided[k], number, **sampling)
    return torch.stack([steps[k, 1 + k : 1 + k + total] for k in range(K)])


def generate_by_transformers(model, prompt, num_new, *, text, guidance):
    """Returns the codes that `generate` passes to its codec."""
    B, K, P = prompt.shape
    caught = []

    def decode(codes, **_):
        caught.append(codes[0])
        return SimpleNamespace(audio_values=torch.zeros(B, 1, 1))

    model.audio_encoder.decode = decode
    try:
        model.generate(
            **text, decoder_input_ids=prompt.reshape(B * K, P), do_sample=False, guidance_scale=guidance,
            max_new_tokens=num_new + K - 1,
        )  # fmt: skip
    finally:
        del model.audio_encoder.decode
    return caught[0].reshape(B, K, -1)


@pytest.mark.parametrize("run", ["single_window", "small_prompt"])
def test_greedy_codes_equal_audiocraft(decoder, tiny_model, oracle, run):
    expected = json.loads((oracle / "continuation" / "expected.json").read_text())["runs"][run]
    tokens = load_file(oracle / "continuation" / "tokens.safetensors")
    codes = continue_codes(
        decoder,
        tokens[f"{run}.prompt_tokens"].long(),
        total_frames=expected["T"],
        delays=DELAYS,
        max_frames=int(expected["max_duration"] * 50),
        stride_frames=int(expected["extend_stride"] * 50),
        encoder_hidden_states=tiny_model.encode_text(expected["text"])[None],
        guidance_scale=expected["cfg_coef"],
        temperature=0,
    )
    assert torch.equal(codes, tokens[f"{run}.tokens"].long())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_codes_equal_transformers_generate(composite, decoder, guidance):
    ids = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    prompt = random_codes(2, 4, 15)
    theirs = generate_by_transformers(
        composite, prompt, 45, text={"input_ids": ids, "attention_mask": mask}, guidance=guidance
    )
    states = [
        composite.text_encoder(row[kept][None]).last_hidden_state[0] for row, kept in zip(ids, mask.bool(), strict=True)
    ]
    states = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    if hasattr(composite, "enc_to_dec_proj"):
        states = composite.enc_to_dec_proj(states)
    ours = continue_codes(
        decoder, prompt, total_frames=60, delays=DELAYS, encoder_hidden_states=states, encoder_attention_mask=mask,
        guidance_scale=guidance, temperature=0,
    )  # fmt: skip
    assert theirs.shape == (2, 4, 60)
    assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def repeated_generate(composite):
    """Returns a function that continues random codes by one call of `generate` per window, once for the same arguments."""

    @functools.cache
    def repeated(num_frames, max_frames, num_prompt, text_ids):
        ids = torch.tensor([text_ids])
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        codes = random_codes(1, 4, num_prompt, seed=2)
        start = 0
        while codes.shape[-1] < num_frames:
            known = codes[:, :, start:]
            num_new = min(max_frames, num_frames - start) - known.shape[-1]
            grown = generate_by_transformers(composite, known, num_new, text=text, guidance=3.0)
            codes = torch.cat([codes[:, :, :start], grown], dim=-1)
            start += 3 * max_frames // 5
        return codes

    return repeated


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_frames", "max_frames", "num_prompt"), [(130, 40, 25), pytest.param(1900, 1500, 1200, id="30 s per window")]
)
def test_sliding_windows_equal_repeated_calls_of_generate(
    composite, repeated_generate, decoder, num_frames, max_frames, num_prompt
):
    ids = torch.randint(3, 200, (1, 6), generator=torch.Generator().manual_seed(1))
    expected = repeated_generate(num_frames, max_frames, num_prompt, tuple(ids[0].tolist()))
    states = composite.text_encoder(ids).last_hidden_state
    states = composite.enc_to_dec_proj(states) if hasattr(composite, "enc_to_dec_proj") else states
    ours = continue_codes(
        decoder, expected[:, :, :num_prompt], total_frames=num_frames, delays=DELAYS, max_frames=max_frames,
        encoder_hidden_states=states, temperature=0,
    )  # fmt: skip
    assert torch.equal(ours, expected)


@pytest.fixture(scope="module")
def continued_without_cache(composite):
    """Returns a function that continues random codes to 40 frames without a cache, once for the same arguments."""

    @functools.cache
    def continued(num_prompt, guidance, sampling):
        states, _ = random_texts(composite.decoder, 5)
        return without_cache(
            composite.decoder, random_codes(1, 4, num_prompt)[0], 40, text=states[0], guidance=guidance,
            uniforms=random_numbers(40)[0], **dict(sampling),
        )  # fmt: skip

    return continued


def random_numbers(num_frames):
    """Returns (1, 4, T) random numbers for sampling."""
    return torch.rand(1, 4, num_frames, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("guidance", "sampling"),
    [
        (1.0, {"temperature": 1.0, "top_k": 20}),
        (3.0, {"temperature": 0.7, "top_k": None, "top_p": 0.8}),
        (2.0, {"temperature": 0}),
    ],
)
@pytest.mark.parametrize("num_prompt", [0, 1, 3, 20])
def test_codes_equal_those_without_a_cache(decoder, continued_without_cache, guidance, sampling, num_prompt):
    expected = continued_without_cache(num_prompt, guidance, tuple(sampling.items()))
    prompt = random_codes(1, 4, num_prompt)
    states, _ = random_texts(decoder, 5)
    codes = continue_codes(
        decoder, prompt, total_frames=40, delays=DELAYS, encoder_hidden_states=states, guidance_scale=guidance,
        uniforms=random_numbers(40), **sampling,
    )  # fmt: skip
    assert torch.equal(codes[0], expected)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_k": 30}])
def test_codes_of_a_row_do_not_depend_on_the_batch(decoder, sampling):
    prompts, totals, text_lengths = [12, 0, 30, 50, 7], [60, 33, 95, 51, 7], [4, 0, 6, 1, 2]
    prompt = random_codes(5, 4, 50)
    states, mask = random_texts(decoder, *text_lengths)
    uniforms = torch.rand(5, 4, 95, generator=torch.Generator().manual_seed(1))
    together = continue_codes(
        decoder, prompt, prompt_frames=prompts, total_frames=totals, delays=DELAYS, max_frames=40, stride_frames=22,
        encoder_hidden_states=states, encoder_attention_mask=mask, uniforms=uniforms, **sampling,
    )  # fmt: skip
    for row, (known, total, length) in enumerate(zip(prompts, totals, text_lengths, strict=True)):
        alone = continue_codes(
            decoder, prompt[row : row + 1, :, :known], total_frames=total, delays=DELAYS, max_frames=40, stride_frames=22,
            encoder_hidden_states=states[row : row + 1, :length] if length else None,
            uniforms=uniforms[row : row + 1, :, :total], **sampling,
        )  # fmt: skip
        assert torch.equal(together[row, :, :total], alone[0])
        assert torch.equal(together[row, :, :known], prompt[row, :, :known])
        assert (together[row, :, total:] == 64).all()
        assert (together[row, :, :total] < 64).all()


def test_a_prompt_longer_than_a_window_is_cut_to_its_last_frames(decoder):
    prompt = random_codes(1, 4, 90)
    settings = {"delays": DELAYS, "max_frames": 40, "stride_frames": 24, "temperature": 0}
    whole = continue_codes(decoder, prompt, total_frames=140, **settings)
    cut = continue_codes(decoder, prompt[:, :, -16:], total_frames=66, **settings)
    assert torch.equal(whole[:, :, :90], prompt)
    assert torch.equal(whole[:, :, 74:], cut)


def test_stereo_codes_follow_the_stereo_delay_pattern(oracle):
    from transformers import MusicgenForCausalLM

    decoder = MusicgenForCausalLM.from_pretrained(oracle / "stereo_T50" / "hf_decoder", dtype=torch.float32).eval()
    delays = (0, 0, 1, 1, 2, 2, 3, 3)
    codes = continue_codes(decoder, random_codes(1, 8, 10), total_frames=30, delays=delays, temperature=0)
    logits = decoder(delay_codes(codes, delays=delays, special_token=64)[0]).logits
    for k, delay in enumerate(delays):
        assert torch.equal(codes[0, k, 10:], logits[k, 10 + delay : 30 + delay].argmax(-1))


def test_non_finite_logits_raise_and_name_the_rows(composite):
    broken = copy.deepcopy(composite.decoder)
    states, mask = random_texts(broken, 3, 0, 3)
    states[2] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinite logits in rows 2 of the batch") as raised:
        continue_codes(
            broken, random_codes(3, 4, 5), total_frames=20, delays=DELAYS, encoder_hidden_states=states,
            encoder_attention_mask=mask, temperature=0,
        )  # fmt: skip
    assert raised.value.rows == (2,)


def test_a_prompt_of_the_total_length_is_returned_unchanged(decoder):
    prompt = random_codes(2, 4, 10)
    assert torch.equal(continue_codes(decoder, prompt, total_frames=10, delays=DELAYS, temperature=0), prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": torch.zeros(1, 3, 5, dtype=torch.int64)}, r"prompt must be \(B, K, P\) int64 with K = 4"),
        ({"prompt": torch.full((1, 4, 5), 64)}, r"row 0: the first 5 frames of prompt must be in \[0, 64\)"),
        ({"prompt": torch.full((1, 4, 5), -1)}, r"the first 5 frames of prompt must be in \[0, 64\)"),
        ({"total_frames": 3}, r"row 0: prompt_frames must be between 0 and 3 \(prompt: 5, total_frames: 3\), got 5"),
        ({"total_frames": [20, 20]}, "total_frames must be a whole number or a sequence of 1 whole numbers"),
        ({"prompt_frames": [6]}, "row 0: prompt_frames must be between 0 and 5 .*, got 6"),
        ({"stride_frames": 0}, r"stride_frames must be between 1 and 9 \(below max_frames=10\), got 0"),
        ({"stride_frames": 10}, "stride_frames must be between 1 and 9"),
        ({"max_frames": 0}, "max_frames must be at least 1"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": 1.0, "top_k": 65}, "top_k must be between 1 and 64"),
        ({"temperature": 1.0, "top_k": 20}, "uniforms is required if temperature is above 0"),
        ({"uniforms": torch.zeros(1, 4, 5)}, r"uniforms must be \(B, K, total_frames\) = \(1, 4, 20\)"),
        ({"encoder_hidden_states": torch.zeros(2, 3, 64)}, r"encoder_hidden_states must be \(B, L, D\) with B = 1"),
        ({"encoder_hidden_states": torch.zeros(1, 3, 8)}, "B = 1 and D = 64"),
        ({"encoder_attention_mask": torch.ones(1, 3)}, "encoder_attention_mask requires encoder_hidden_states"),
        ({"uniforms": torch.full((1, 4, 20), 1.0)}, r"uniforms must be in \[0, 1\)"),
        ({"uniforms": torch.full((1, 4, 20), float("nan"))}, r"uniforms must be in \[0, 1\)"),
        ({"prompt": torch.zeros(1, 4, 5)}, r"prompt must be \(B, K, P\) int64"),
        ({"top_k": 65}, "top_k must be between 1 and 64"),
    ],
)
def test_invalid_arguments_raise(composite, change, message):
    settings = {"prompt": random_codes(1, 4, 5), "total_frames": 20, "max_frames": 10, "temperature": 0, **change}
    with pytest.raises(ValueError, match=message):
        continue_codes(composite.decoder, settings.pop("prompt"), delays=DELAYS, **settings)
