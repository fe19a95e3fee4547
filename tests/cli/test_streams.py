"""Tests that problems with standard output and standard error do not change the exit status of a run."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from musicgen_eval.cli.main import main
from musicgen_eval.cli.streams import TolerantStream, tolerant_streams

RUN = "import sys; from musicgen_eval.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def evaluate(tmp_path, oracle):
    """Arguments that evaluate half a second of noise in a file whose name exists in no single-byte encoding."""
    song = tmp_path / "songs" / "夜 \udcff.wav"
    song.parent.mkdir()
    soundfile.write(os.fsencode(song), np.random.default_rng(3).normal(0, 0.1, 16000), 32000)
    checkpoint = str(oracle / "tiny_musicgen")
    return ["evaluate", "--audio", str(song.parent), "--checkpoint", checkpoint, "--run_dir", str(tmp_path / "x")]


def pipe_without_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("latin-1", "? \\xff.wav"), ("ascii", "? \\xff.wav"), ("utf-8", "夜 \\xff.wav")]
)
def test_a_terminal_shows_the_characters_of_its_encoding(evaluate, tmp_path, monkeypatch, encoding, shown):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="strict"))
    assert main(evaluate) == 0
    assert (tmp_path / "x" / "summary.json").exists()
    printed = written.getvalue().decode(encoding)
    assert shown in printed
    assert "summary.json" in printed


def test_a_run_continues_without_a_reader_and_the_stream_can_be_closed(evaluate, tmp_path, monkeypatch, capsys):
    stream = pipe_without_reader()
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(evaluate) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "x" / "summary.json").exists()
    stream.close()  # buffered output is discarded


def test_an_error_without_a_reader_keeps_its_exit_status(monkeypatch):
    monkeypatch.setattr(sys, "stderr", pipe_without_reader())
    assert main(["evaluate", "--audio", "/nowhere.wav"]) == 1
    assert main(["evaluate", "--limit", "x"]) == 2


def test_standard_output_on_a_full_disk_is_reported_once(monkeypatch, capsys):
    with open("/dev/full", "w") as full, tolerant_streams():  # noqa: PTH123
        sys.stdout._stream = full
        for _ in range(3):
            print("x")
            sys.stdout.flush()
    assert capsys.readouterr().err == (
        "warning: cannot write to standard output (No space left on device); the run continues\n"
    )


def test_a_tolerant_stream_has_the_other_attributes_of_the_stream():
    written = io.StringIO()
    stream = TolerantStream(written)
    assert print("a", file=stream) is None
    stream.writelines(iter(["b", "c"]))
    assert (stream.write("de"), stream.getvalue(), stream.isatty()) == (2, "a\nbcde", False)


@pytest.mark.slow
def test_a_run_works_with_standard_streams_that_are_closed_from_the_start(evaluate, tmp_path):
    """No file of the run gets their descriptors, and the interpreter exits without an error."""
    command = [sys.executable, "-c", RUN, *evaluate]
    close = "exec 0<&- 2>&-; exec 3>&1 >&-; " + '"$@"; status=$?; echo $status >&3'
    done = subprocess.run(
        ["bash", "-c", close, "-", *command], stdout=subprocess.PIPE, text=True, timeout=120, check=False
    )
    assert done.stdout == "0\n"
    written = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert written == ["config.yaml", "journal", "run.json", "summary.json", "tracks.csv", "windows.csv"]
    journal = "".join(path.read_text() for path in (tmp_path / "x" / "journal").glob("*.jsonl"))
    assert journal.startswith("{")
    assert "summary.json" not in journal
