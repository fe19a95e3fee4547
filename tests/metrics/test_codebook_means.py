import pytest
import torch
from torch import nn

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import CodebookPerplexity, MetricRecipe
from musicgen_eval.metrics.codebook_means import pad_values, sums_and_counts
from musicgen_eval.records import CodecSpec


def test_sums_and_counts_ignore_nan_and_use_float64():
    values = torch.tensor([[[1.0, float("nan"), 2.0], [float("nan")] * 3]])
    sums, counts = sums_and_counts(values)
    assert (sums.dtype, counts.dtype) == (torch.float64, torch.int64)
    assert sums.tolist() == [[3.0, 0.0]]
    assert counts.tolist() == [[2, 0]]


def test_windows_of_different_lengths_are_padded_with_nan():
    padded = pad_values([torch.zeros(2, 1), torch.ones(2, 3)])
    assert padded.shape == (2, 2, 3)
    assert padded[0].isnan().tolist() == [[False, True, True]] * 2
    assert not padded[1].isnan().any()


def test_a_checkpoint_configures_codebooks_and_frame_rate():
    metric = CodebookPerplexity()
    metric.configure(CodecSpec(16000, 25, 640, 8, 64, 2, (0, 0, 1, 1, 2, 2, 3, 3), 100))
    assert metric.total.shape == metric.count.shape == (8,)
    metric.update(torch.full((8, 5), 64.0).log())
    assert metric.compute()["bits_per_second"].item() == pytest.approx(8 * 25 * 6)


@pytest.mark.parametrize("shape", [(10,), (3, 10), (1, 1, 4, 10)])
def test_values_of_another_shape_are_refused(shape):
    with pytest.raises(MetricError, match=r"CodebookPerplexity: values have shape \("):
        CodebookPerplexity().update(torch.zeros(shape))


def test_the_error_for_a_wrong_number_of_codebooks_names_the_right_one():
    with pytest.raises(MetricError, match="set num_codebooks=8"):
        CodebookPerplexity().update(torch.zeros(2, 8, 10))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_casting_a_module_keeps_the_sums_of_its_metrics_exact(cast):
    module = nn.Sequential(nn.Linear(2, 2), CodebookPerplexity(num_codebooks=1))
    module[1].update(torch.ones(1, 1400))
    cast(module)
    module[1].update(torch.ones(1, 1))
    assert module[0].weight.dtype != torch.float32
    assert (module[1].total.dtype, module[1].count.dtype) == (torch.float64, torch.int64)
    assert (module[1].total.item(), module[1].count.item()) == (1401.0, 1401)
    module[1].reset()
    assert module[1].total.dtype == torch.float64


def test_a_metric_moves_with_its_module():
    module = nn.Sequential(nn.Linear(2, 2), CodebookPerplexity())
    module.to("meta")
    assert module[1].total.device.type == "meta"
    assert module[1].total.dtype == torch.float64


def test_a_unit_applies_to_the_keys_of_codebooks():
    recipe = MetricRecipe(units={"ce": "nats"})
    assert [recipe.unit(key) for key in ("ce", "ce_q1", "ce_q12", "ppl", "ce_first")] == [
        "nats",
        "nats",
        "nats",
        "",
        "",
    ]


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError):
        CodebookPerplexity(num_codebook=4)
