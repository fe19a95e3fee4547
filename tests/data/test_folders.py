"""Tests which files of a folder are used, and the note about skipped files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musicgen_eval.audio.reader import probe
from musicgen_eval.data.sources import read_source
from tests.support.bad_files import DATA, music, write_av

# Formats whose extensions do not denote audio: headerless samples, a header in another file, and tables of numbers.
NO_EXTENSION_OF_AUDIO = {"RAW", "SD2", "MAT4", "MAT5"}
EXTENSIONS = {"WAVEX": "wav", "NIST": "sph", "MPC2K": "mpc2k", "IRCAM": "sf", "SVX": "8svx"}


def write_every_format(folder: Path) -> None:
    samples = music(16_000)[:, 0]
    for format in sorted(set(soundfile.available_formats()) - NO_EXTENSION_OF_AUDIO):
        name = EXTENSIONS.get(format, format.lower())
        subtype = next(
            one
            for one in ("PCM_16", "PCM_S8", "VORBIS", "MPEG_LAYER_III", "ALAW", "DPCM_16")
            if soundfile.check_format(format, one)
        )
        soundfile.write(folder / f"{format}.{name}", samples, 32_000, format=format, subtype=subtype)
    for codec, container, names in (
        ("flac", "matroska", "a.mkv a.mka"), ("libopus", "webm", "a.webm a.weba"), ("pcm_s16le", "mov", "a.mov"),
        ("aac", "mp4", "a.mp4"), ("aac", "ipod", "a.m4a a.m4r a.m4b"), ("aac", "3gp", "a.3gp"), ("aac", "3g2", "a.3g2"),
        ("aac", "adts", "a.aac a.adts"), ("wavpack", "wv", "a.wv"), ("tta", "tta", "a.tta"), ("mp2", "mp2", "a.mp2"),
        ("flac", "ogg", "a.oga a.ogv"),
    ):  # fmt: skip
        rate_hz = 48_000 if codec == "libopus" else 32_000
        for name in names.split():
            write_av(folder / name, music(16_000), codec=codec, container=container, rate_hz=rate_hz)
    for name in ("a.wma", "a.wmv", "a.asf"):
        shutil.copy(DATA / "case.wma", folder / name)


def test_a_folder_includes_every_format_that_can_be_read(tmp_path: Path):
    write_every_format(tmp_path)
    for path in tmp_path.iterdir():
        assert probe(path).num_samples > 0, path
    tracks = read_source(tmp_path)
    assert sorted(tracks.ids) == sorted(path.name for path in tmp_path.iterdir())
    assert (tracks.ignored, tracks.notes) == (0, ())


@pytest.mark.parametrize("pattern", ["", "/*"])
def test_skipped_files_are_reported_in_one_note_and_are_not_failures(pattern: str, tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 32_000)
    for name in ("cover.jpg", "back.JPG", "notes.txt", "Makefile", *(f"x.{letter}" for letter in "abcdefg")):
        (tmp_path / name).write_text("no music")
    tracks = read_source(f"{tmp_path}{pattern}")
    assert tracks.ids == ["a.wav"]
    assert tracks.ignored == 11
    [note] = tracks.notes
    assert note == (
        f"{tmp_path}{pattern}: skipped 11 of 12 files because they have no audio extension: .jpg (2), .a (1), .b (1), .c (1), "
        ".d (1), .e (1), .f (1), .g (1), 2 other extensions"
    )
