"""The last frame of FLAC files, compared with the number of samples that were written."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen_eval.audio.decoding import probe
from musicgen_eval.audio.formats.flac import find_flac_end
from musicgen_eval.audio.formats.flac import flac_num_samples as num_samples_of
from musicgen_eval.errors import AudioError

DATA = Path(__file__).parents[2] / "data" / "audio"


def write_flac(
    path: Path, num_samples: int, *, rate_hz: int = 44_100, channels: int = 1, subtype: str = "PCM_16"
) -> bytes:
    samples = np.random.default_rng(num_samples).normal(0, 0.1, (num_samples, channels))
    soundfile.write(path, samples, rate_hz, subtype=subtype)
    return path.read_bytes()


def without_length(content: bytes) -> bytes:
    """Removes the length from the header, as in a file that was written to a pipe."""
    return content[:21] + bytes((content[21] & 0xF0,)) + bytes(4) + content[26:]


@settings(deadline=None, max_examples=40)
@given(
    num_samples=st.one_of(st.integers(1, 5000), st.integers(1, 700_000)),
    rate_hz=st.sampled_from([8000, 12345, 44_100, 96_000, 192_000]),
    channels=st.sampled_from([1, 2, 5]),
    subtype=st.sampled_from(["PCM_S8", "PCM_16", "PCM_24"]),
)
def test_the_last_frame_ends_where_the_audio_does(num_samples: int, rate_hz: int, channels: int, subtype: str):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.flac"
        content = write_flac(path, num_samples, rate_hz=rate_hz, channels=channels, subtype=subtype)
        assert find_flac_end(path) == num_samples
        path.write_bytes(without_length(content))
        assert probe(path).num_samples == num_samples


def test_silence_in_few_bytes_has_the_correct_length(tmp_path: Path):
    soundfile.write(tmp_path / "a.flac", np.zeros(5_000_000), 44_100)
    assert (tmp_path / "a.flac").stat().st_size < 5_000_000 // 64
    assert find_flac_end(tmp_path / "a.flac") == probe(tmp_path / "a.flac").num_samples == 5_000_000


def test_a_tag_after_the_last_frame_is_ignored(tmp_path: Path):
    content = write_flac(tmp_path / "a.flac", 10_000)
    (tmp_path / "a.flac").write_bytes(content + b"TAG" + bytes(125))
    assert find_flac_end(tmp_path / "a.flac") == 10_000


@pytest.mark.parametrize("missing", [1, 2, 100, 3000])
def test_a_truncated_file_of_unknown_length_is_an_error(missing: int, tmp_path: Path):
    content = without_length(write_flac(tmp_path / "a.flac", 30_000))
    (tmp_path / "a.flac").write_bytes(content[:-missing])
    with pytest.raises(
        AudioError, match=r"a\.flac: the file is truncated or damaged: .* does not end with a complete FLAC frame"
    ):
        probe(tmp_path / "a.flac")


def test_damage_in_the_middle_does_not_shorten_a_file_of_unknown_length(tmp_path: Path):
    content = bytearray((DATA / "piped.flac").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    (tmp_path / "a.flac").write_bytes(content)
    assert num_samples_of(tmp_path / "a.flac") == 17_640


def test_a_header_that_contradicts_the_last_frame_is_an_error(tmp_path: Path):
    content = write_flac(tmp_path / "a.flac", 10_000)
    (tmp_path / "a.flac").write_bytes(content[:22] + (9_000).to_bytes(4, "big") + content[26:])
    with pytest.raises(
        AudioError,
        match=r"a\.flac: the file is damaged: its header declares 9000 samples, but its last frame ends at sample 10000",
    ):
        probe(tmp_path / "a.flac")
