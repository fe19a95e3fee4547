"""File names in the spellings of other systems."""

import os
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.data.sources import absolute_source, read_source
from musicgen_eval.errors import SourceError
from musicgen_eval.files.file_names import expanded, locate, of_file_address, spellings

ACCENTED = "Café Año/Ångström.wav"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("written", "on_disk"),
    [
        ("rock\\live\\a.wav", "rock/live/a.wav"),
        (".\\rock\\a.wav", "rock/a.wav"),
        ("a%20song%20%231.wav", "a song #1.wav"),
        ("rock%5Ca.wav", "rock/a.wav"),
        (normalize("NFC", ACCENTED), normalize("NFD", ACCENTED)),
        (normalize("NFD", ACCENTED), normalize("NFC", ACCENTED)),
        (normalize("NFD", ACCENTED).replace("/", "\\"), normalize("NFC", ACCENTED)),
        ("Caf%C3%A9.wav", normalize("NFD", "Café.wav")),
    ],
)
def test_manifests_may_use_the_spelling_of_another_system(written: str, on_disk: str, tmp_path: Path):
    file = touch(tmp_path / on_disk)
    (tmp_path / "m.csv").write_text(f"path\n{written}\n", encoding="utf-8")
    assert read_source(tmp_path / "m.csv").file(0).samefile(file)


@pytest.mark.parametrize("name", ["a%20b.wav", "a\\b.wav", "~a.wav", normalize("NFD", "é.wav"), "a [1].wav"])
def test_an_existing_file_is_found_by_its_literal_name(name: str, tmp_path: Path):
    file = touch(tmp_path / name)
    for other in spellings(name):
        touch(tmp_path / other)
    (tmp_path / "m.csv").write_text(f"path\n{name}\n", encoding="utf-8")
    assert read_source(tmp_path / "m.csv").file(0) == file


def test_file_urls_are_accepted(tmp_path: Path):
    file = touch(tmp_path / "a song #1.wav")
    address = file.as_uri()
    assert "%20" in address
    rows = [address, address.replace("file://", "file://localhost")]
    (tmp_path / "m.csv").write_text("path,id\n" + "".join(f"{row},{at}\n" for at, row in enumerate(rows)))
    tracks = read_source(tmp_path / "m.csv")
    assert [tracks.file(row) for row in range(2)] == [file, file]
    (tmp_path / "m.csv").write_text("path\nfile://server/a.wav\n")
    with pytest.raises(SourceError, match=r"path must be a local file, got 'file://server/a\.wav'"):
        read_source(tmp_path / "m.csv")


@given(st.text("/abc %é~#?", min_size=1))
def test_a_file_url_is_converted_back_to_its_path(name: str):
    path = Path("/music", name.strip("/") or "a")
    assert of_file_address(path.as_uri()) == str(path)


def test_the_error_mentions_a_windows_drive_letter(tmp_path: Path):
    from musicgen_eval.audio.reader import open_track
    from musicgen_eval.errors import AudioError

    (tmp_path / "m.csv").write_text("path\nC:\\Music\\a.wav\n")
    with pytest.raises(AudioError, match=r"no such file \(the path has a Windows drive letter"):
        open_track(read_source(tmp_path / "m.csv").file(0))


def test_the_name_of_a_missing_file_is_not_changed(tmp_path: Path):
    assert locate(str(tmp_path), "no%20where\\a.wav") == tmp_path / "no%20where\\a.wav"
    assert locate(str(tmp_path), "x" * 5000) == tmp_path / ("x" * 5000)


def test_a_leading_tilde_is_expanded_only_for_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home, work = tmp_path / "home", tmp_path / "work"
    for file in (home / "music" / "a.wav", work / "~backup.wav", work / "~" / "b.wav"):
        touch(file)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    assert read_source("~/music/a.wav").file(0) == home / "music" / "a.wav"
    assert read_source("~/music/*.wav").file(0) == home / "music" / "a.wav"
    assert read_source("~backup.wav").ids == ["~backup.wav"]
    assert read_source("~b*.wav").ids == ["~backup.wav"]
    assert absolute_source("~backup.wav") == str(work / "~backup.wav")
    assert absolute_source("~/music") == str(home / "music")
    (work / "m.csv").write_text("path\n~/music/a.wav\n~backup.wav\n")
    tracks = read_source("m.csv")
    assert [tracks.file(row) for row in range(2)] == [home / "music" / "a.wav", Path("~backup.wav")]
    assert tracks.ids == [str(home / "music" / "a.wav"), "~backup.wav"]


def test_a_tilde_without_a_home_directory_is_a_missing_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os.path, "expanduser", lambda name: name)  # as for an unknown user
    assert expanded("~/x.wav") == "~/x.wav"
    with pytest.raises(SourceError, match=r"^~/x\.wav: no such file or folder"):
        read_source("~/x.wav")
