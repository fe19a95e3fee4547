"""Draws are compared with a brute-force implementation and with their probabilities."""

import pytest
import torch

from musicgen_eval.models.decoder.sampling import continuation_uniforms, draw_codes


def brute_force_draw(logits, uniform, *, temperature, top_k, top_p):
    """Draws one code in plain Python by sorting, truncating and summing the probabilities."""
    ranked = sorted(range(len(logits)), key=lambda code: -logits[code])[: top_k or len(logits)]
    weights = [2.718281828459045 ** (logits[code] / temperature) for code in ranked]
    total = sum(weights)
    allowed, allowed_sum = [], 0.0
    for code, weight in zip(ranked, weights, strict=True):
        if top_p is not None and allowed_sum >= top_p:
            break
        allowed.append((code, weight / total))
        allowed_sum += weight / total
    cumulative = 0.0
    for code, probability in allowed:
        cumulative += probability / allowed_sum
        if uniform <= cumulative:
            return code
    return allowed[-1][0]


@pytest.mark.parametrize("top_k", [None, 1, 5, 32])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_draw_inverts_the_cumulative_distribution(generator, temperature, top_k, top_p):
    logits = torch.randn(40, 32, generator=generator) * 2
    uniforms = torch.rand(40, generator=generator)
    drawn = draw_codes(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    for row, uniform, code in zip(logits.double().tolist(), uniforms.tolist(), drawn.tolist(), strict=True):
        assert code == brute_force_draw(row, uniform, temperature=temperature, top_k=top_k, top_p=top_p)


def test_evenly_spaced_uniforms_give_the_probabilities(generator):
    logits = torch.randn(8, generator=generator)
    uniforms = (torch.arange(100_000) + 0.5) / 100_000
    drawn = draw_codes(logits.expand(100_000, 8), uniforms, top_k=None)
    shares = torch.bincount(drawn, minlength=8) / 100_000
    assert torch.allclose(shares, logits.softmax(-1), atol=2e-5)


def test_temperature_zero_selects_the_likeliest_code_without_uniforms(generator):
    logits = torch.randn(3, 4, 16, generator=generator)
    assert torch.equal(draw_codes(logits, temperature=0), logits.argmax(-1))


def test_the_largest_uniform_draws_an_allowed_code():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(2, 4)
    uniforms = torch.tensor([0.0, 1 - 2**-24])
    assert draw_codes(logits, uniforms, top_k=4, top_p=0.7).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 9}, "top_k must be between 1 and 8, the checkpoint's codebook size, got 9"),
        ({"top_k": 8, "top_p": 0.0}, "top_p must be above 0"),
        ({"top_k": 8, "top_p": 1.1}, "top_p must be above 0"),
    ],
)
def test_settings_that_are_out_of_range_are_named_in_the_error(settings, message):
    with pytest.raises(ValueError, match=message):
        draw_codes(torch.zeros(1, 8), torch.zeros(1), **settings)


def test_drawing_without_uniforms_is_refused():
    with pytest.raises(ValueError, match="pass uniforms"):
        draw_codes(torch.zeros(1, 8), top_k=8)


def test_uniforms_depend_only_on_seed_track_and_continuation():
    first = continuation_uniforms(4, 50, seed=1, track="a")
    torch.manual_seed(3)
    assert torch.equal(first, continuation_uniforms(4, 50, seed=1, track="a"))
    for other in ({"seed": 2, "track": "a"}, {"seed": 1, "track": "b"}, {"seed": 1, "track": "a", "continuation": 1}):
        assert not torch.equal(first, continuation_uniforms(4, 50, **other))
    assert 0 <= first.min() <= first.max() < 1


def test_a_longer_continuation_starts_with_the_same_uniforms():
    long = continuation_uniforms(4, 1000, seed=1, track="a")
    for num_frames in (1, 7, 50, 333):
        assert torch.equal(long[:, :num_frames], continuation_uniforms(4, num_frames, seed=1, track="a"))


def test_uniforms_do_not_depend_on_the_default_dtype():
    expected = continuation_uniforms(4, 50, seed=1, track="a")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(continuation_uniforms(4, 50, seed=1, track="a"), expected)
    finally:
        torch.set_default_dtype(torch.float32)
