import pytest
import torch

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import CodebookPerplexity, LocalPerplexity
from musicgen_eval.records import Window


def window(context_frames: int, target_frames: int) -> Window:
    return Window("song", 1, 0, context_frames, target_frames)


def test_only_the_first_seconds_after_the_context_count(generator):
    local, plain = LocalPerplexity(duration_s=0.2), CodebookPerplexity()
    for context, target in ((5, 30), (8, 12), (3, 4)):
        nll = torch.rand(4, context + target, generator=generator)
        nll[:, :context] = float("nan")
        local.update(nll, window(context, target))
        plain.update(nll[:, context : context + min(target, 10)])
    assert local.count.tolist() == [10 + 10 + 4] * 4
    assert local.compute() == plain.compute()


def test_windows_without_a_context_do_not_count():
    local = LocalPerplexity()
    local.update(torch.ones(4, 20), window(0, 20))
    assert local.count.tolist() == [0] * 4


def test_at_least_one_frame_counts_and_the_duration_must_be_positive():
    local = LocalPerplexity(duration_s=0.001)
    local.update(torch.ones(4, 20), window(5, 15))
    assert local.count.tolist() == [1] * 4
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(MetricError, match="duration_s must be above 0"):
            LocalPerplexity(duration_s=wrong)


def test_the_duration_is_in_the_recipe():
    assert LocalPerplexity(duration_s=2.5).recipe.settings == {"duration_s": 2.5}
