"""Tests that files are written completely or not at all, also if the process is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from musicgen_eval.files.atomic import atomic_file, is_leftover, remove_leftovers


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("before")
    with atomic_file(path) as file:
        file.write("after\n")
        file.flush()
        assert path.read_text() == "before"
        (temporary,) = set(tmp_path.iterdir()) - {path}
        assert temporary.name.startswith(".")
        assert is_leftover(temporary.name)
    assert path.read_text() == "after\n"
    assert list(tmp_path.iterdir()) == [path]


def test_text_and_bytes_are_written_as_given(tmp_path):
    with atomic_file(tmp_path / "text") as file:
        file.write("ü\r\n\n\udcff")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xbc\r\n\n\\udcff"
    with atomic_file(tmp_path / "bytes", "wb") as file:
        file.write(b"\xff\n")
    assert (tmp_path / "bytes").read_bytes() == b"\xff\n"


@pytest.mark.parametrize("name", ["line\nbreak", "\udcff", "ü", ".hidden"])
def test_a_leftover_is_recognised_for_any_name(name, tmp_path):
    try:
        with atomic_file(tmp_path / name) as file:
            file.write("x")
            assert all(is_leftover(entry.name) for entry in tmp_path.iterdir())
    except UnicodeEncodeError:
        pytest.skip("the file system stores names in Unicode only")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [RuntimeError("in the block"), KeyboardInterrupt(), OSError(28, "disk full")])
@pytest.mark.parametrize("mode", ["w", "wb"])
def test_an_exception_keeps_the_existing_file(error, mode, tmp_path):
    path = tmp_path / "a"
    path.write_text("before")

    def write():
        with atomic_file(path, mode) as file:
            file.write("half" if mode == "w" else b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_clean_up_does_not_replace_the_first_error(tmp_path):
    def write():
        with atomic_file(tmp_path / "a") as file:
            file.write("half")
            os.close(file.fileno())  # so that closing the file raises
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_sync_or_rename_keeps_the_existing_file(step, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    path = tmp_path / "a"
    path.write_text("before")
    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(OSError, match="Input/output error"), atomic_file(path) as file:
        file.write("after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: steps.append(os.fstat(number).st_size) or fsync(number))
    monkeypatch.setattr(Path, "replace", lambda path, other: steps.append("rename") or replace(path, other))
    with atomic_file(tmp_path / "a") as file:
        file.write("12345")
    assert steps == [5, "rename"]


def test_the_last_of_two_writers_wins(tmp_path):
    path = tmp_path / "a"
    with atomic_file(path) as one:
        one.write("one")
        with atomic_file(path) as other:
            other.write("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from musicgen_eval.files.atomic import atomic_file

def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)

path, step = Path(sys.argv[1]), sys.argv[2]
if step == "fsync":
    os.fsync = kill
if step == "replace":
    Path.replace = kill
with atomic_file(path) as file:
    file.write("after")
    if step == "write":
        file.flush()
        kill()
"""


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "none"])
def test_a_killed_process_leaves_the_existing_file_and_a_leftover(step, tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    run = subprocess.run([sys.executable, "-c", KILLED, str(path), step], check=False)
    assert run.returncode == (0 if step == "none" else -signal.SIGKILL)
    assert path.read_text() == ("after" if step == "none" else "before")
    leftovers = [entry for entry in tmp_path.iterdir() if entry != path]
    assert [is_leftover(entry.name) for entry in leftovers] == ([] if step == "none" else [True])
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_only_leftovers_are_removed(tmp_path):
    others = {".a.tmp", "a.0123456789ab.tmp", ".a.0123456789AB.tmp", ".a.0123456789ab.part", "..0123456789ab.tmp"}
    for name in (*others, ".a.0123456789ab.tmp"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == others
    remove_leftovers(tmp_path / "missing")


def test_a_missing_folder_raises_the_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "missing" / "a"):
        pass
