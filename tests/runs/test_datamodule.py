import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.data.batches import RankBatches
from musicgen_eval.data.scoring_plan import plan_evaluation
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.runs.window_dataset import Batch, WindowDataset
from tests.support.specs import codec_spec

SPEC = codec_spec(codebook_size=64)


@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 6))
def test_every_window_is_dealt_once_in_as_many_steps_on_every_rank(num_windows, batch_size, world_size):
    ranks = [
        list(RankBatches(num_windows, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(row for batches in ranks for batch in batches for row in batch) == list(range(num_windows))


@given(st.integers(1, 40), st.integers(1, 7), st.integers(2, 6))
def test_batches_do_not_depend_on_the_number_of_ranks(num_windows, batch_size, world_size):
    alone = list(RankBatches(num_windows, batch_size=batch_size, rank=0, world_size=1))
    dealt = [
        batch
        for rank in range(world_size)
        for batch in RankBatches(num_windows, batch_size=batch_size, rank=rank, world_size=world_size)
        if batch
    ]
    assert sorted(dealt) == alone


@pytest.fixture
def song(tmp_path):
    """7.3 s of stereo noise at 44.1 kHz."""
    samples = np.random.default_rng(0).normal(0, 0.1, (int(7.3 * 44100), 2)).astype(np.float32)
    soundfile.write(tmp_path / "song.wav", samples, 44100, subtype="FLOAT")
    return tmp_path / "song.wav"


def test_windows_read_alone_are_the_whole_track_cut_there(song):
    plan = plan_evaluation(DataSettings(source=str(song), context_s=1.0, target_s=1.0), SPEC)
    dataset = WindowDataset(plan, SPEC)
    whole = plan.open_track(0).read(0, 365 * 640, sample_rate_hz=32000, channels=1)
    assert len(dataset) == 7
    for row in range(len(dataset)):
        item = dataset[row]
        first = item.window.start_frame * 640
        assert item.audio.shape == (1, item.window.num_frames * 640)
        assert torch.equal(item.audio, whole[:, first : first + item.audio.shape[1]])


def test_a_track_that_vanishes_becomes_a_failure_of_its_windows(song):
    plan = plan_evaluation(DataSettings(source=str(song), context_s=1.0, target_s=1.0), SPEC)
    song.unlink()
    item = WindowDataset(plan, SPEC)[0]
    assert item.audio is None
    assert "song.wav" in item.failure


def test_an_empty_batch_is_a_surplus_step():
    assert Batch([]).windows == []
