import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import CodebookAccuracy


@pytest.mark.parametrize("top_k", [1, 3])
def test_accuracy_equals_torchmetrics_per_codebook(top_k, generator):
    logits = torch.randn(4, 50, 16, generator=generator)
    codes = torch.randint(16, (4, 50), generator=generator)
    true = logits.gather(-1, codes.unsqueeze(-1))
    metric = CodebookAccuracy(top_k=top_k)
    metric.update((logits > true).sum(-1))
    found = metric.compute()
    expected = [
        MulticlassAccuracy(num_classes=16, top_k=top_k, average="micro")(logits[k], codes[k]).item() for k in range(4)
    ]
    assert [found[f"accuracy_q{k}"].item() for k in (1, 2, 3, 4)] == pytest.approx(expected, rel=1e-6)
    assert found["accuracy"].item() == pytest.approx(sum(expected) / 4, rel=1e-6)


def test_unscored_codes_are_not_counted():
    metric = CodebookAccuracy(top_k=5, num_codebooks=1)
    metric.update(torch.tensor([[[-1, -1, 0, 9]]]))
    assert metric.compute()["accuracy"].item() == 0.5
    assert metric.count.item() == 2


def test_top_k_is_in_the_recipe_and_must_be_positive():
    assert CodebookAccuracy(top_k=7).recipe.settings == {"top_k": 7}
    with pytest.raises(MetricError, match="top_k must be at least 1, got 0"):
        CodebookAccuracy(top_k=0)
