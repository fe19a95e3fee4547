import time
from datetime import datetime
from itertools import islice
from pathlib import Path

import pytest

from musicgen_eval.errors import RunError
from musicgen_eval.results.run_record import RunRecord
from musicgen_eval.runs import folder as run_folder
from musicgen_eval.runs.folder import RunFolder, default_run_dirs, expanded_path, resumed_arguments
from musicgen_eval.runs.folder_lock import LOCK
from tests.support.programs import Program


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "old.txt").write_text("x")
    with pytest.raises(RunError, match=r"is not empty \(old\.txt\) and contains no run; choose an empty or new folder"):
        RunFolder(tmp_path).claim()
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


def test_a_path_of_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(RunError, match="cannot be used"):
        RunFolder(tmp_path / "x").claim()


def test_a_run_that_ends_before_its_first_batch_restores_the_folder(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.claim()
    folder.write("config.yaml", "a: 1\n")
    folder.write_run(RunRecord(command="test"))
    folder.remove_if_empty()
    assert list(tmp_path.iterdir()) == []
    kept = RunFolder(tmp_path)
    kept.claim()
    kept.remove_if_empty()
    assert list(tmp_path.iterdir()) == []


def test_the_files_of_an_earlier_start_are_never_removed(tmp_path):
    first = RunFolder(tmp_path / "x")
    first.claim()
    first.write_run(RunRecord(command="test"))
    (first.journal / "000-r0.jsonl").write_text("")
    first.unlock()
    again = RunFolder(tmp_path / "x")
    again.claim()
    assert again.state == "unfinished"
    again.remove_if_empty()
    assert sorted(path.name for path in again.path.iterdir()) == ["journal", "run.json"]
    assert (again.journal / "000-r0.jsonl").exists()


def test_a_folder_with_a_result_is_a_finished_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.write_run(RunRecord(command="test"))
    folder.write("summary.json", "{}")
    folder.unlock()
    again = RunFolder(tmp_path)
    again.claim()
    assert again.state == "finished"


KILLED = """
import os, sys
from musicgen_eval.results.run_record import RunRecord
from musicgen_eval.runs.folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.claim()
for name in sys.argv[2:]:
    (folder.path / name).write_text("{")
os.kill(os.getpid(), 9)
"""


CONFIG_LEFTOVER = ".config.yaml.0123456789ab.tmp"
RUN_LEFTOVER = ".run.json.0123456789ab.tmp"


@pytest.mark.slow
@pytest.mark.parametrize("names", [[], ["config.yaml"], [CONFIG_LEFTOVER], ["config.yaml", RUN_LEFTOVER]])
def test_a_folder_whose_run_was_killed_before_its_first_batch_is_new(tmp_path, names):
    (tmp_path / "killed.py").write_text(KILLED)
    with Program([str(tmp_path / "killed.py"), str(tmp_path / "x"), *names]) as killed:
        killed.communicate()
    assert killed.returncode == -9
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == sorted(["journal", LOCK, *names])
    again = RunFolder(tmp_path / "x")
    again.claim()
    assert again.state == "new"
    assert not list((tmp_path / "x").glob("*.tmp"))


def test_a_folder_with_other_files_of_the_same_names_is_refused(tmp_path):
    for name in ("config.yaml", "wandb/precious", "journal/diary.txt", RUN_LEFTOVER):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError, match="contains no run; choose an empty"):
        folder.claim()
    folder.remove_if_empty()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4


def test_a_process_cannot_claim_a_folder_twice(tmp_path):
    first = RunFolder(tmp_path / "x")
    first.claim()
    with pytest.raises(RunError, match="is in use by another run"):
        RunFolder(tmp_path / "y" / ".." / "x").claim()
    first.remove_if_empty()
    RunFolder(tmp_path / "x").claim()


def test_an_index_that_took_long_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "KEEP_AFTER_S", 0.0)
    folder = RunFolder(tmp_path / "x")
    folder.claim()
    folder.index.write_bytes(b"an hour of opening files")
    folder.remove_if_empty()
    again = RunFolder(tmp_path / "x")
    again.claim()
    assert again.state == "new"
    assert again.index.read_bytes() == b"an hour of opening files"


HOLD = """
import pathlib, sys, time
from musicgen_eval.runs.folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.claim()
pathlib.Path(sys.argv[2]).touch()
time.sleep(300)
"""


@pytest.mark.slow
def test_one_process_at_a_time_can_claim_a_folder_also_after_it_is_killed(tmp_path):
    (tmp_path / "hold.py").write_text(HOLD)
    with Program([str(tmp_path / "hold.py"), str(tmp_path / "x"), str(tmp_path / "claimed")]) as other:
        while other.poll() is None and not (tmp_path / "claimed").exists():
            time.sleep(0.01)
        assert other.poll() is None, other.communicate()
        with pytest.raises(RunError, match="is in use by another run"):
            RunFolder(tmp_path / "x").claim()
        other.kill()
        other.communicate()
    folder = RunFolder(tmp_path / "x")
    folder.claim()
    assert folder.state == "new"


def test_a_damaged_run_json_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json cannot be read .*; restore it, or choose another folder"):
        RunFolder(tmp_path).claim()


def test_the_argument_resume_is_replaced_by_configuration_and_folder(tmp_path):
    with pytest.raises(RunError, match="the path does not exist; specify a run folder"):
        resumed_arguments(tmp_path / "none")
    with pytest.raises(RunError, match="the path contains no run; specify a run folder"):
        resumed_arguments(tmp_path)
    for name in ("run.json", "config.yaml"):
        (tmp_path / name).write_text("{}")
    assert resumed_arguments(tmp_path) == ["--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path)]


def test_default_names_contain_date_and_command():
    names = default_run_dirs("test", now=datetime(2026, 1, 2, 3, 4, 5))
    first = "runs/20260102-030405-test"
    assert [name.as_posix() for name in islice(names, 3)] == [first, f"{first}-2", f"{first}-3"]


def test_runs_that_start_in_the_same_second_get_different_folders(tmp_path, monkeypatch):
    """All of them choose the same name before the first one claims it. Another process has only created a folder."""

    def names(command):
        return default_run_dirs(command, now=datetime(2026, 1, 2, 3, 4, 5))

    monkeypatch.setattr(run_folder, "default_run_dirs", names)
    monkeypatch.chdir(tmp_path)
    folders = [RunFolder.with_default_name("test") for _ in range(3)]
    assert len({folder.path for folder in folders}) == 1
    (tmp_path / folders[0].path).with_name("20260102-030405-test-3").mkdir(parents=True)
    for folder in folders:
        folder.claim()
    assert [folder.path.name.removeprefix("20260102-030405-") for folder in folders] == ["test", "test-2", "test-4"]
    assert all((folder.path / "journal").is_dir() for folder in folders)
    for folder in folders:
        folder.remove_if_empty()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["20260102-030405-test-3"]


def test_a_default_folder_that_cannot_be_created_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot be used: Not a directory"):
        RunFolder.with_default_name("test").claim()


def test_a_leading_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("~/runs/x")
    folder.claim()
    folder.write_run(RunRecord(command="test"))
    folder.write("config.yaml", "")
    assert folder.path == tmp_path / "home" / "runs" / "x"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert resumed_arguments("~/runs/x")[-1] == str(folder.path)


def test_a_tilde_without_a_home_directory_is_a_plain_name(monkeypatch):
    monkeypatch.setattr("pwd.getpwnam", lambda name: {}[name])
    assert expanded_path("~nobody/x") == Path("~nobody/x")
