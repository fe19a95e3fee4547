"""run.json is written and read as one record."""

import json
from dataclasses import asdict, replace

import pytest

from musicgen_eval.errors import RunError
from musicgen_eval.results.run_record import RunRecord, SettledValues

RECORD = RunRecord(
    command="predict",
    seed=3,
    max_frames_from="default",
    platform="Linux",
    starts=({"started": "2026-01-02", "windows": 9}, {"started": "2026-01-03", "windows": 7}),
    fingerprint={"task": "continue"},
    machine={"device": "a CPU"},
    settled=SettledValues(threads=2, arithmetic=None),
)

SETTLED = '{"command": "test", "settled": {"threads": %s, "arithmetic": %s}}'


@pytest.mark.parametrize(
    "record",
    [RECORD, RunRecord(command="test"), replace(RECORD, wandb_run_id="a1", other_machines=({"device": "another"},))],
)
def test_a_record_is_read_as_it_was_written(tmp_path, record):
    (tmp_path / "run.json").write_text(record.to_json())
    assert RunRecord.read(tmp_path, remedy="") == record


def test_values_that_a_run_does_not_have_are_not_written():
    assert json.loads(RECORD.to_json()).keys() == asdict(RECORD).keys() - {"other_machines", "wandb_run_id"}
    assert json.loads(RECORD.to_json())["settled"] == {"threads": 2, "arithmetic": None}


def test_the_planned_windows_are_those_of_the_last_session():
    assert RECORD.num_windows_planned == 7
    assert RunRecord(command="test").num_windows_planned is None


def test_a_folder_without_run_json_has_no_record(tmp_path):
    assert RunRecord.read(tmp_path, remedy="") is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read"),
        ("[]", "is damaged: expected a JSON object, got list"),
        ("{}", "is damaged: the command is missing"),
        ('{"command": ""}', "is damaged: the command is missing"),
        ('{"command": "test", "settled": 1}', "is damaged: settled must be a JSON object, got int"),
        ('{"command": "test", "starts": [1]}', "is damaged: starts must be a list of JSON objects"),
        (
            '{"command": "test", "starts": [{"windows": "9"}]}',
            "is damaged: windows must be a whole number or None, got '9'",
        ),
        ('{"command": "test", "settled": null}', "is damaged: settled must be a JSON object, got NoneType"),
        ('{"command": "test", "settled": {}}', "is damaged: settled.threads is missing"),
        ('{"command": "test", "settled": {"threads": 2}}', "is damaged: settled.arithmetic is missing"),
        (SETTLED % ('"2"', "null"), "is damaged: settled.threads must be a whole number or None, got '2'"),
        (SETTLED % ("0", "null"), "is damaged: settled.threads must be at least 1, got 0"),
        (SETTLED % ("2", "[]"), r"is damaged: settled.arithmetic must be a string or None, got \[\]"),
        ('{"command": "test", "seed": "3"}', "is damaged: seed must be a whole number or None, got '3'"),
        ('{"command": "test", "seed": true}', "is damaged: seed must be a whole number or None, got True"),
        ('{"command": "test", "platform": 1}', "is damaged: platform must be a string or None, got 1"),
        ('{"command": "test", "git_commit": 1}', "is damaged: git_commit must be a string or None, got 1"),
        ('{"command": "test", "max_frames_from": {}}', "is damaged: max_frames_from must be a string or None, got {}"),
        ('{"command": "test", "wandb_run_id": 7}', "is damaged: wandb_run_id must be a string or None, got 7"),
    ],
)
def test_a_damaged_record_is_refused_with_the_remedy(tmp_path, content, problem):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=rf"run\.json {problem}.*; copy it from elsewhere"):
        RunRecord.read(tmp_path, remedy="copy it from elsewhere")
