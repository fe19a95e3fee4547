import pytest
import torch

from musicgen_eval.inference.batch_scoring import pad_states, score_padded, score_windows
from musicgen_eval.models.musicgen import load_model

TEXTS = ["slow ambient pads with warm bass", None, "fast techno drums", "", "fast techno drums", None, "drums", "bass"]


@pytest.fixture(scope="module", params=["transformers", "packed float32"])
def model(request, oracle):
    """The tiny checkpoint with the weights of transformers, and with packed weights."""
    loaded = load_model(oracle / "tiny_musicgen")
    if request.param != "transformers":
        loaded.prepare("32-true")
        assert loaded.arithmetic == request.param
    return loaded


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(5)
    lengths = [40, 7, 25, 40, 1, 12, 33, 3]
    return [torch.randint(64, (4, length), generator=generator) for length in lengths]


@pytest.mark.parametrize("tail", ["score", "drop"])
def test_batches_of_1_3_and_8_windows_are_bit_identical(model, windows, tail):
    def in_batches_of(size):
        results = []
        for first in range(0, len(windows), size):
            codes = windows[first : first + size]
            masks = [torch.ones_like(window, dtype=torch.bool) for window in codes]
            results += score_windows(model, codes, scored=masks, texts=TEXTS[first : first + size], tail=tail)
        return results

    alone = in_batches_of(1)
    for size in (3, 8):
        for one, other in zip(alone, in_batches_of(size), strict=True):
            assert torch.equal(one.nll.nan_to_num(-1), other.nll.nan_to_num(-1))
            assert torch.equal(one.rank, other.rank)


@pytest.mark.parametrize("tail", ["score", "drop"])
def test_a_padded_batch_agrees_with_single_windows(model, windows, tail):
    masks = [torch.ones_like(window, dtype=torch.bool) for window in windows]
    masks[0][:, :20] = False
    alone = score_windows(model, windows, scored=masks, texts=TEXTS, tail=tail)
    states = model.encode_texts(TEXTS)
    batch = score_padded(model, windows, masks, states, tail=tail, with_logits=True)
    for one, other in zip(alone, batch, strict=True):
        assert torch.equal(one.nll.isnan(), other.nll.isnan())
        assert (one.nll - other.nll).abs().nan_to_num().max() < 1e-5
        assert other.logits.shape == (*other.nll.shape, 64)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_scores_are_bit_identical_for_any_number_of_threads(model, windows, num_threads):
    masks = [torch.ones_like(window, dtype=torch.bool) for window in windows]
    found = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        scores = score_windows(model, windows, scored=masks, texts=TEXTS)
        torch.set_num_threads(1)
        expected = score_windows(model, windows, scored=masks, texts=TEXTS)
    finally:
        torch.set_num_threads(found)
    assert all(torch.equal(one.nll, other.nll) for one, other in zip(scores, expected, strict=True))


def test_the_decoder_attends_causally_through_sdpa(model, windows):
    assert model.decoder.config._attn_implementation == "sdpa"
    changed = windows[0].clone()
    changed[:, 30:] = 0
    masks = [torch.ones_like(changed, dtype=torch.bool)] * 2
    before, after = score_windows(model, [windows[0], changed], scored=masks, texts=[None, None])
    assert torch.equal(before.nll[:, :27], after.nll[:, :27])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_packed_weights_give_nearly_the_scores_of_transformers(oracle, tiny_model, windows, precision):
    packed = load_model(oracle / "tiny_musicgen")
    packed.prepare(precision)
    masks = [torch.ones_like(window, dtype=torch.bool) for window in windows]
    ours = score_windows(packed, windows, scored=masks, texts=TEXTS)
    theirs = score_windows(tiny_model, windows, scored=masks, texts=TEXTS)
    largest = max((one.nll - other.nll).abs().max().item() for one, other in zip(ours, theirs, strict=True))
    assert 0 < largest < (1e-4 if precision == "32-true" else 0.3)


def test_pad_states_masks_padding_and_gives_null_rows_one_position_of_zeros():
    batch, mask = pad_states([torch.ones(3, 2), None, torch.ones(1, 2)], width=2, device=torch.device("cpu"))
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert batch.sum((1, 2)).tolist() == [6, 0, 2]
    assert pad_states([None, None], width=2, device=torch.device("cpu")) == (None, None)
