from dataclasses import replace

import pytest
import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.inference.readings import CodedWindow, reading_generator, score_readings, scored_mask
from musicgen_eval.inference.scoring import score_codes
from musicgen_eval.metrics import CodebookPerplexity, ContextGain, TextGain
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.inputs import WindowData
from musicgen_eval.metrics.plugin.readings import PLAIN, READINGS
from musicgen_eval.records import Reading, Window

NO_TEXT, NO_CONTEXT, OTHER_TEXT = READINGS
TEXT = "warm piano over a slow drum loop"


def coded(
    index: int, *, context: int, target: int, text: str | None = TEXT, other: str | None = "loud rock"
) -> CodedWindow:
    codes = torch.randint(64, (4, context + target), generator=torch.Generator().manual_seed(index))
    return CodedWindow(Window(f"track{index}", index, 7, context, target), codes, text, other)


def by_score_codes(model, codes: Tensor, *, text: str | None, scored: Tensor) -> Tensor:
    """Scores one window with `score_codes`, after encoding its text."""
    states = model.encode_text(text)
    with torch.inference_mode():
        return score_codes(
            model.decoder,
            codes.unsqueeze(0),
            delays=model.spec.delays,
            scored=scored.unsqueeze(0),
            encoder_hidden_states=None if states is None else states.unsqueeze(0),
        )[0]


def target_mask(window: Window) -> Tensor:
    mask = torch.zeros(4, window.num_frames, dtype=torch.bool)
    mask[:, window.context_frames :] = True
    return mask


def assert_same_nats(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5, equal_nan=True)


def test_the_plain_reading_uses_the_windows_own_text_and_context(tiny_model):
    window = coded(1, context=6, target=9)
    (read,) = score_readings(tiny_model, [window], [PLAIN])
    expected = by_score_codes(tiny_model, window.codes, text=TEXT, scored=target_mask(window.window))
    assert_same_nats(read[""].nll, expected)
    assert read[""].nll[:, :6].isnan().all()
    assert not read[""].nll[:, 6:].isnan().any()
    assert (read[""].rank[:, :6] == -1).all()
    assert torch.equal(read[""].scored, target_mask(window.window))
    assert read[""].logits is None


def test_no_text_uses_the_null_condition(tiny_model):
    window = coded(2, context=4, target=8)
    (read,) = score_readings(tiny_model, [window], [PLAIN, NO_TEXT])
    expected = by_score_codes(tiny_model, window.codes, text=None, scored=target_mask(window.window))
    assert_same_nats(read["no_text"].nll, expected)
    assert (read["no_text"].nll - read[""].nll)[:, 4:].abs().max() > 0.01


def test_other_text_uses_the_text_of_another_track(tiny_model):
    window = coded(3, context=4, target=8)
    (read,) = score_readings(tiny_model, [window], [OTHER_TEXT])
    expected = by_score_codes(tiny_model, window.codes, text="loud rock", scored=target_mask(window.window))
    assert_same_nats(read["other_text"].nll, expected)


def test_no_context_scores_only_the_target_from_position_0_and_aligns_it_to_the_window(tiny_model):
    window = coded(4, context=6, target=9)
    (read,) = score_readings(tiny_model, [window], [PLAIN, NO_CONTEXT], with_logits=frozenset({"no_context"}))
    target = window.codes[:, 6:]
    expected = by_score_codes(tiny_model, target, text=TEXT, scored=torch.ones(4, 9, dtype=torch.bool))
    assert read["no_context"].nll.shape == (4, 15)
    assert read["no_context"].nll[:, :6].isnan().all()
    assert_same_nats(read["no_context"].nll[:, 6:], expected)
    assert (read["no_context"].rank[:, :6] == -1).all()
    assert torch.equal(read["no_context"].scored, target_mask(window.window))
    logits = read["no_context"].logits
    assert logits.shape == (4, 15, 64)
    assert (logits[:, :6] == 0).all()
    true = logits.gather(-1, window.codes.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close((logits.logsumexp(-1) - true)[:, 6:], expected, rtol=0, atol=2e-5)
    assert (read["no_context"].nll - read[""].nll)[:, 6:].abs().max() > 0.01


def test_readings_that_do_not_exist_are_none_and_do_not_affect_the_rest_of_the_batch(tiny_model):
    windows = [
        coded(5, context=0, target=8),
        coded(6, context=3, target=9, text=None),
        coded(7, context=3, target=5, text=""),
        coded(8, context=5, target=6),
    ]
    readings = [PLAIN, NO_TEXT, NO_CONTEXT, OTHER_TEXT]
    batch = score_readings(tiny_model, windows, readings)
    exists = [[read[reading.name] is not None for reading in readings] for read in batch]
    assert exists == [
        [True, True, False, True],
        [True, False, True, True],
        [True, False, True, True],
        [True, True, True, True],
    ]
    for window, read in zip(windows, batch, strict=True):
        (alone,) = score_readings(tiny_model, [window], readings)
        for name, one in alone.items():
            assert (one is None) == (read[name] is None)
            if one is not None:
                assert torch.equal(one.nll.nan_to_num(-1), read[name].nll.nan_to_num(-1))


def test_other_text_raises_if_no_other_text_exists(tiny_model):
    with pytest.raises(MetricError, match="requires the text of another track, but there is none for track track9"):
        score_readings(tiny_model, [coded(9, context=2, target=4, other=None)], [OTHER_TEXT])


def test_tail_drop_applies_to_the_length_of_each_window(tiny_model):
    windows = [coded(10, context=2, target=6), coded(11, context=3, target=9)]
    batch = score_readings(tiny_model, windows, [PLAIN, NO_CONTEXT], tail="drop")
    for window, read in zip(windows, batch, strict=True):
        T, context = window.window.num_frames, window.window.context_frames
        expected = torch.tensor([[context <= t < T - k for t in range(T)] for k in range(4)])  # delay k in codebook k
        assert torch.equal(scored_mask(window.window, tiny_model.spec, "drop"), expected)
        for name in ("", "no_context"):
            assert torch.equal(read[name].scored, expected)
            assert torch.equal(~read[name].nll.isnan(), expected)


def shuffled(codes: Tensor, window: Window, generator: torch.Generator) -> Tensor:
    order = torch.randperm(window.target_frames, generator=generator) + window.context_frames
    return torch.cat([codes[:, : window.context_frames], codes[:, order]], dim=1)


def test_changed_codes_are_fed_scored_and_returned(tiny_model):
    reading = Reading("shuffled", change=shuffled)
    window = coded(12, context=4, target=8)
    (read,) = score_readings(tiny_model, [window], [PLAIN, reading], seed=3)
    changed = read["shuffled"].codes
    expected_codes = shuffled(window.codes, window.window, reading_generator(3, window.window, reading))
    assert torch.equal(changed, expected_codes)
    assert not torch.equal(changed, window.codes)
    assert torch.equal(read[""].codes, window.codes)
    expected = by_score_codes(tiny_model, changed, text=TEXT, scored=target_mask(window.window))
    assert_same_nats(read["shuffled"].nll, expected)


def test_a_change_depends_only_on_seed_track_window_and_reading(tiny_model):
    def noised(codes: Tensor, window: Window, generator: torch.Generator) -> Tensor:
        return torch.randint(64, codes.shape, generator=generator)

    reading = Reading("noised", change=noised)
    window = coded(13, context=2, target=6)

    def codes_of(windows: list[CodedWindow], reading: Reading, seed: int) -> Tensor:
        return score_readings(tiny_model, windows, [reading], seed=seed)[-1][reading.name].codes

    torch.manual_seed(0)
    first = codes_of([window], reading, 0)
    torch.manual_seed(99)
    assert torch.equal(codes_of([coded(14, context=1, target=12), window], reading, 0), first)
    assert not torch.equal(codes_of([window], reading, 1), first)
    assert not torch.equal(codes_of([window], replace(reading, name="other"), 0), first)
    for other in (replace(window.window, track="another"), replace(window.window, index=99)):
        assert not torch.equal(codes_of([replace(window, window=other)], reading, 0), first)


def test_a_change_in_place_does_not_affect_other_readings(tiny_model):
    def zeroed(codes: Tensor, window: Window, generator: torch.Generator) -> Tensor:
        return codes.zero_()

    window = coded(15, context=2, target=6)
    before = window.codes.clone()
    (read,) = score_readings(tiny_model, [window], [Reading("zeroed", change=zeroed), PLAIN])
    assert torch.equal(window.codes, before)
    assert torch.equal(read[""].codes, before)
    assert (read["zeroed"].codes == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes, window, generator: codes[:, 1:], r"from \(4, 8\) torch.int64 to \(4, 7\) torch.int64"),
        (lambda codes, window, generator: codes.float(), "return codes of the same shape and dtype"),
        (lambda codes, window, generator: codes + 64, r"return codes in \[0, 64\)"),
        (lambda codes, window, generator: codes - 64, r"return codes in \[0, 64\)"),
    ],
)
def test_a_change_to_invalid_codes_raises_and_names_the_reading(tiny_model, change, message):
    with pytest.raises(MetricError, match=f"reading 'odd' changed the codes.*{message}"):
        score_readings(tiny_model, [coded(16, context=2, target=6)], [Reading("odd", change=change)])


def test_metrics_count_nothing_for_readings_that_do_not_exist(tiny_model):
    bank = MetricBank({"ppl": CodebookPerplexity(), "text": TextGain(), "context": ContextGain()}, spec=tiny_model.spec)
    windows = [
        coded(17, context=0, target=8),
        coded(18, context=4, target=6, text=None),
        coded(19, context=5, target=7),
    ]
    batch = score_readings(tiny_model, windows, bank.readings, with_logits=bank.readings_with_logits)
    states = bank.update([WindowData(read, tiny_model.spec.frame_rate_hz) for read in batch])
    assert [window["ppl"]["count"].tolist() for window in states] == [[8] * 4, [6] * 4, [7] * 4]
    assert [window["text"]["count"].tolist() for window in states] == [[8] * 4, [0] * 4, [7] * 4]
    assert [window["context"]["count"].tolist() for window in states] == [[0] * 4, [6] * 4, [7] * 4]

    saved = [batch[row]["no_text"].nll.double() - batch[row][""].nll.double() for row in (0, 2)]
    saved[1] = saved[1][:, 5:]
    expected = torch.cat(saved, dim=1).mean(1).sum().item() * 50
    assert bank.compute(states)["text"]["nats_per_second"] == pytest.approx(expected, rel=1e-9)
