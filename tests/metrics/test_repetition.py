from math import isnan

import numpy as np
import pytest
import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.repetition import repeated_share

RATE_HZ = 8000
BLOCK = RATE_HZ // 2


def noise(num_samples: int, *, channels: int = 1, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(channels, num_samples, generator=torch.Generator().manual_seed(seed))


def share(audio: Tensor, before: Tensor, rate_hz: int = RATE_HZ) -> float:
    return repeated_share(audio, before, sample_rate_hz=rate_hz)


def twin(audio: np.ndarray, before: np.ndarray, size: int) -> float:
    """Computes the definition block by block and place by place."""
    whole = np.concatenate([before, audio], axis=1).astype(np.float64)
    repeated = []
    for start in range(before.shape[1], whole.shape[1] - size + 1, size):
        block = whole[:, start : start + size]
        energy = np.sum(block**2)
        if energy <= 1e-6 * block.size:
            continue
        found = False
        for place in range(start - size + 1):
            earlier = whole[:, place : place + size]
            floor = max(np.sum(earlier**2), 1e-4 * energy)
            found = found or np.sum(earlier * block) / np.sqrt(floor * energy) >= 0.999
        repeated.append(found)
    return np.mean(repeated)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_share_equals_a_plain_implementation(channels, generator):
    size, rate_hz = 20, 40
    whole = torch.randint(-1, 2, (channels, 330), generator=generator).float() / 10
    whole[:, 200:240] = whole[:, 31:71]
    whole[:, 260:280] = 0
    whole[:, 300:320] = -whole[:, 10:30]
    before, audio = whole[:, :120], whole[:, 120:]
    expected = twin(audio.numpy(), before.numpy(), size)
    assert 0 < expected < 1
    assert share(audio, before, rate_hz) == pytest.approx(expected)


@pytest.mark.parametrize("offset", [0, 1, 1234, 3999])
def test_a_repetition_of_the_prompt_or_of_the_continuation_is_found(offset):
    before, new = noise(3 * RATE_HZ), noise(RATE_HZ, seed=1)
    copied = before[:, offset : offset + 2 * BLOCK]
    assert share(torch.cat([new, copied], 1), before) == 0.5  # 2 of 4 blocks
    assert share(torch.cat([new, new], 1), before[:, :0]) == 0.5
    assert share(torch.cat([new, 0.2 * copied], 1), before) == 0.5  # a change of gain
    assert share(torch.cat([new, -copied], 1), before) == 0
    assert share(new, before) == 0


def test_long_audio_is_searched_completely():
    before = noise(100 * RATE_HZ)
    for at in (0, 37 * RATE_HZ + 5, 99 * RATE_HZ):
        assert share(before[:, at : at + RATE_HZ], before) == 1


def test_a_nearly_equal_repetition_is_found_up_to_a_share_of_noise():
    before = noise(2 * RATE_HZ)
    copied, other = before[:, :RATE_HZ], noise(RATE_HZ, seed=1)
    # with noise of relative level a, the correlation is 1 / sqrt(1 + a^2), which is 0.999 for a = 0.045
    assert share(copied + 0.03 * other, before) == 1
    assert share(copied + 0.06 * other, before) == 0


def test_a_block_overlapping_itself_is_no_repetition():
    assert share(noise(RATE_HZ), noise(RATE_HZ, seed=1)) == 0
    period = noise(BLOCK - 1)
    # the first block has nothing before it, and the sound before the second block repeats it but overlaps it by one sample
    assert share(torch.cat([period] * 4, 1), period[:, :0]) == pytest.approx(1 / 3)


def test_silence_is_not_counted():
    silence = torch.zeros(1, RATE_HZ)
    assert isnan(share(silence, silence))
    assert isnan(share(noise(BLOCK - 1), silence))
    assert isnan(share(silence[:, :0], silence))
    assert share(torch.cat([silence, noise(RATE_HZ)], 1), silence) == 0
    assert share(torch.cat([noise(RATE_HZ), 1e-3 * silence], 1), noise(RATE_HZ)) == 1


def test_other_channels_are_refused():
    with pytest.raises(MetricError, match="expected the same number"):
        share(noise(RATE_HZ, channels=2), noise(RATE_HZ))
