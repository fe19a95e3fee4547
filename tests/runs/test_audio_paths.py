"""The name of a track's folder is a single safe path component, and different ids have different names."""

import math
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from musicgen_eval.runs.audio_paths import NUM_DIGITS, track_folder

STRANGE = [
    "../../x", "/etc/passwd", "..", ".", "", "a\0b", "a\nb", "\r\n", "x" * 10_000, "é" * 10_000, "\u202egpj.mp3", "~", "~root",
    "a/x.mp3", "a/x.wav", "a/X.mp3", "A/x.mp3", "a_x.mp3", "CON", "con.mp3", "nul", "COM1.wav", "a b", "a'b", 'a"b', "$(id)",
    "`id`", "a;b", "-rf", "--help", "a\\b", "..\\..\\x", "C:\\x", "a:b", "*", "?", "\ud800", "\u00e9", "e\u0301", "\uff0e\uff0e/x",
    ".hidden", "trailing.", "trailing ", "%2e%2e%2fx", "song 1", "song\u00a01", "\u0130", "i\u0307", "\u00df", "ss", "\u212a", "k",
]  # fmt: skip


def folded(name: str) -> str:
    """Returns the name as a file system compares it that ignores case and normalises Unicode."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKD", name).casefold())


@pytest.mark.parametrize("track", STRANGE)
def test_a_strange_id_gives_one_plain_component(track, tmp_path):
    name = track_folder(track)
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
    assert Path(name).name == name
    assert len(name) <= 120
    assert not name.startswith((".", "-"))
    assert not name.endswith(".")
    assert name.partition(".")[0].upper() not in {"CON", "NUL", "COM1", "AUX", "PRN"}
    (tmp_path / name).mkdir()
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()


def test_strange_ids_give_different_folders_also_if_case_is_ignored():
    assert len({folded(track_folder(track)) for track in STRANGE}) == len(STRANGE)


@given(st.sets(st.text(st.characters(), max_size=300) | st.sampled_from(STRANGE), min_size=2, max_size=20))
@example({"a/x.mp3", "a/x.wav", "A/x.mp3"})
def test_any_different_ids_give_different_folders(tracks):
    names = [track_folder(track) for track in tracks]
    assert len({folded(name) for name in names}) == len(tracks)
    for name in names:
        assert Path(name).parts == (name,)
        assert len(name.encode()) <= 120


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_two_unicode_forms_of_an_id_are_two_tracks(text):
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    same = composed == decomposed
    assert (folded(track_folder(composed)) == folded(track_folder(decomposed))) == same


def test_a_million_tracks_have_different_folders_with_high_probability():
    """Computes the birthday bound for ids with the same readable part."""
    chance = -math.expm1(-(1e6**2) / 2 / 16**NUM_DIGITS)
    assert chance < 1e-7
