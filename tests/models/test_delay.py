import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.models.delay import default_delays, delay_codes, realign, tail_mask, undelay_codes

SPECIAL = 99
DELAYS = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def slow_steps(codes: torch.Tensor, delays: list[int], num_steps: int) -> torch.Tensor:
    """Fills the steps one code at a time, as in the definition."""
    B, K, T = codes.shape
    steps = torch.full((B, K, num_steps), SPECIAL)
    for b in range(B):
        for k in range(K):
            for t in range(T):
                if t + 1 + delays[k] < num_steps:
                    steps[b, k, t + 1 + delays[k]] = codes[b, k, t]
    return steps


@given(DELAYS, st.integers(1, 3), st.integers(1, 7), st.integers(0, 6))
def test_each_code_is_fed_one_step_after_the_output_that_predicts_it(delays, batch, frames, missing):
    codes = torch.arange(batch * len(delays) * frames).reshape(batch, len(delays), frames)
    num_steps = max(1, frames + max(delays) - missing)
    steps = delay_codes(codes, delays=delays, special_token=SPECIAL, num_steps=num_steps)
    assert torch.equal(steps, slow_steps(codes, delays, num_steps))


@given(DELAYS, st.integers(1, 3), st.integers(1, 7))
def test_undelay_is_the_inverse_of_delay(delays, batch, frames):
    codes = torch.arange(batch * len(delays) * frames).reshape(batch, len(delays), frames)
    steps = delay_codes(codes, delays=delays, special_token=SPECIAL, num_steps=frames + 1 + max(delays))
    assert torch.equal(undelay_codes(steps, delays=delays, num_frames=frames), codes)


def test_padding_is_fed_as_the_special_token():
    codes = torch.tensor([[[1, 2, 77]]])
    valid = torch.tensor([[[True, True, False]]])
    steps = delay_codes(codes, delays=(0,), special_token=SPECIAL, valid=valid, num_steps=4)
    assert steps.tolist() == [[[SPECIAL, 1, 2, SPECIAL]]]


def test_the_first_step_holds_the_special_token_in_every_codebook():
    steps = delay_codes(torch.ones(2, 4, 5, dtype=torch.int64), delays=(0, 1, 2, 3), special_token=SPECIAL)
    assert (steps[:, :, 0] == SPECIAL).all()
    assert steps.shape[-1] == 5 + 3


def test_realign_refuses_too_few_steps():
    with pytest.raises(ValueError, match="5 frames with delays up to 2 need at least 7 steps, got 6"):
        realign(torch.zeros(1, 2, 6), delays=(0, 2), num_frames=5)


def test_the_tail_mask_of_1500_frames_has_the_counts_of_audiocraft():
    assert tail_mask(1500, delays=(0, 1, 2, 3)).sum(1).tolist() == [1500, 1499, 1498, 1497]


def test_the_default_delays_of_mono_and_stereo_checkpoints():
    assert default_delays(4, channels=1) == (0, 1, 2, 3)
    assert default_delays(8, channels=2) == (0, 0, 1, 1, 2, 2, 3, 3)
