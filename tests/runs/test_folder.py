import time
from datetime import datetime
from itertools import islice
from pathlib import Path

import pytest

from musicgen_eval.errors import RunError
from musicgen_eval.runs import folder as run_folder
from musicgen_eval.runs.folder import LOCK, RunFolder, default_run_dirs, expanded_path, resumed_arguments, run_record
from tests.support.programs import Program


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "old.txt").write_text("x")
    with pytest.raises(RunError, match=r"holds old\.txt and no run; choose an empty or new folder"):
        RunFolder(tmp_path).claim()
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(RunError, match="cannot be used"):
        RunFolder(tmp_path / "x").claim()


def test_a_run_that_measured_nothing_leaves_the_folder_as_it_was_found(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.claim()
    folder.write("config.yaml", "a: 1\n")
    folder.write_run({"command": "test"})
    folder.remove_if_empty()
    assert list(tmp_path.iterdir()) == []
    kept = RunFolder(tmp_path)
    kept.claim()
    kept.remove_if_empty()
    assert list(tmp_path.iterdir()) == []


def test_what_was_begun_before_is_never_taken_back(tmp_path):
    first = RunFolder(tmp_path / "x")
    first.claim()
    first.write_run({"command": "test"})
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
    folder.write_run({"command": "test"})
    folder.write("summary.json", "{}")
    folder.unlock()
    again = RunFolder(tmp_path)
    again.claim()
    assert again.state == "finished"


KILLED = """
import os, sys
from musicgen_eval.runs.folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.claim()
for name in sys.argv[2:]:
    (folder.path / name).write_text("{")
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", [[], ["config.yaml"], [".config.yaml.part"], ["config.yaml", ".run.json.part"]])
def test_a_folder_whose_run_was_killed_before_it_began_is_new(tmp_path, names):
    (tmp_path / "killed.py").write_text(KILLED)
    with Program([str(tmp_path / "killed.py"), str(tmp_path / "x"), *names]) as killed:
        killed.communicate()
    assert killed.returncode == -9
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == sorted(["journal", LOCK, *names])
    again = RunFolder(tmp_path / "x")
    again.claim()
    assert again.state == "new"
    assert not list((tmp_path / "x").glob("*.part"))


def test_a_folder_of_somebody_else_is_refused_whatever_its_names(tmp_path):
    for name in ("config.yaml", "wandb/precious", "journal/diary.txt", ".run.json.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError, match="and no run; choose an empty"):
        folder.claim()
    folder.remove_if_empty()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4


def test_a_process_does_not_take_a_folder_twice(tmp_path):
    first = RunFolder(tmp_path / "x")
    first.claim()
    with pytest.raises(RunError, match="belongs to a run that is going on"):
        RunFolder(tmp_path / "y" / ".." / "x").claim()
    first.remove_if_empty()
    RunFolder(tmp_path / "x").claim()


def test_what_was_learnt_of_files_for_long_is_not_taken_back(tmp_path, monkeypatch):
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
def test_a_folder_belongs_to_one_process_at_a_time_however_that_ends(tmp_path):
    (tmp_path / "hold.py").write_text(HOLD)
    with Program([str(tmp_path / "hold.py"), str(tmp_path / "x"), str(tmp_path / "claimed")]) as other:
        while other.poll() is None and not (tmp_path / "claimed").exists():
            time.sleep(0.01)
        assert other.poll() is None, other.communicate()
        with pytest.raises(RunError, match="belongs to a run that is going on"):
            RunFolder(tmp_path / "x").claim()
        other.kill()
        other.communicate()
    folder = RunFolder(tmp_path / "x")
    folder.claim()
    assert folder.state == "new"


def test_a_run_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json cannot be read .*; choose another run_dir"):
        RunFolder(tmp_path).claim()


def test_resuming_stands_for_the_configuration_and_the_folder(tmp_path):
    with pytest.raises(RunError, match="which does not exist: no run that could go on"):
        resumed_arguments(tmp_path / "none")
    with pytest.raises(RunError, match="no run that could go on; give the folder that holds its run"):
        resumed_arguments(tmp_path)
    for name in ("run.json", "config.yaml"):
        (tmp_path / name).write_text("{}")
    assert resumed_arguments(tmp_path) == ["--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path)]


def test_the_default_names_carry_date_and_command():
    names = default_run_dirs("test", now=datetime(2026, 1, 2, 3, 4, 5))
    first = "runs/20260102-030405-test"
    assert [name.as_posix() for name in islice(names, 3)] == [first, f"{first}-2", f"{first}-3"]


def test_the_record_names_the_circumstances():
    record = run_record(command="test", seed=3, max_frames_from="default")
    assert (record["seed"], record["command"], record["starts"]) == (3, "test", [])


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    """Each has chosen the same name before the first of them claims it; other processes only create the folder."""

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


def test_a_default_folder_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot be used: Not a directory"):
        RunFolder.with_default_name("test").claim()


def test_a_leading_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("~/runs/x")
    folder.claim()
    folder.write_run({"command": "test"})
    folder.write("config.yaml", "")
    assert folder.path == tmp_path / "home" / "runs" / "x"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert resumed_arguments("~/runs/x")[-1] == str(folder.path)


def test_a_tilde_without_a_home_directory_is_a_plain_name(monkeypatch):
    monkeypatch.setattr("pwd.getpwnam", lambda name: {}[name])
    assert expanded_path("~nobody/x") == Path("~nobody/x")
