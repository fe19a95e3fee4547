import pytest
import torch

from musicgen_eval.metrics import ContextGain, TextGain

NAN = float("nan")


@pytest.mark.parametrize("make", [TextGain, ContextGain])
def test_a_gain_is_the_nll_difference_per_second_summed_over_codebooks(make):
    metric = make(num_codebooks=2, frame_rate_hz=50)
    plain = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    without = torch.tensor([[1.5, 2.25], [3.0, 4.5]])
    metric.update(plain, without)
    found = {key: value.item() for key, value in metric.compute().items()}
    # codebook 1 gains (0.5 + 0.25) / 2 nats per frame, codebook 2 gains (0 + 0.5) / 2, at 50 frames per second
    assert found == {"nats_per_second_q1": 18.75, "nats_per_second_q2": 12.5, "nats_per_second": 31.25}


def test_only_codes_scored_in_both_readings_count():
    metric = TextGain(num_codebooks=1, frame_rate_hz=1)
    metric.update(torch.tensor([[1.0, 1.0, NAN, 1.0]]), torch.tensor([[2.0, NAN, 9.0, 4.0]]))
    metric.update(torch.tensor([[1.0]]), torch.tensor([[NAN]]))
    assert metric.count.item() == 2
    assert metric.compute()["nats_per_second"].item() == 2.0


def test_differences_are_computed_in_float64():
    metric = TextGain(num_codebooks=1, frame_rate_hz=1)
    plain, without = torch.tensor([[1e4]]), torch.tensor([[1e-4]])
    metric.update(plain, without)
    assert metric.total.item() == without.double().item() - plain.double().item()


def test_the_recipe_has_unit_and_direction():
    for metric in (TextGain(), ContextGain()):
        assert metric.recipe.unit("nats_per_second_q3") == "nats/s"
        assert metric.recipe.higher_is_better


@pytest.mark.parametrize(
    ("make", "source"),
    [
        (
            TextGain,
            "Decrease in nll due to the text of a track, in nats per second. Only tracks with a text are counted.",
        ),
        (
            ContextGain,
            "Decrease in nll due to the context of a window, in nats per second. Only windows with a context are counted.",
        ),
    ],
)
def test_the_source_does_not_depend_on_the_docstring(monkeypatch, make, source):
    monkeypatch.setattr(make, "__doc__", "Another docstring.")
    assert make().recipe.source == source
