"""Compares the batches read from a journal with those written, for intact and for damaged files."""

import errno
import io
import json
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from musicgen_eval.errors import MetricError, RunError
from musicgen_eval.metrics.plugin.states import State
from musicgen_eval.results.journal import format as journal_rows
from musicgen_eval.results.journal import writer as writing
from musicgen_eval.results.journal.format import JournalEntry, JournalRow
from musicgen_eval.results.journal.reader import JournalReader
from musicgen_eval.results.journal.writer import JournalWriter

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ODD = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 5e-324, 1e-40, 6e-8, 1 / 3, -1.7976931348623157e308, 1e38]
TINY = {dtype: torch.finfo(dtype).smallest_normal / 2 for dtype in FLOATS}


pytestmark = pytest.mark.usefixtures("without_fsync")


def same(found: Tensor, expected: Tensor) -> bool:
    """Returns True if two tensors are bit-identical, with NaN equal to NaN."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    if not found.dtype.is_floating_point:
        return torch.equal(found, expected)
    nan = found.isnan()
    bits = [tensor.masked_fill(nan, 0).contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)]
    return torch.equal(nan, expected.isnan()) and torch.equal(*bits)


def same_value(found: Tensor | list[Tensor], expected: Tensor | list[Tensor]) -> bool:
    if isinstance(expected, list) or isinstance(found, list):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
    return same(found, expected)


def same_states(found: Mapping[str, State], expected: Mapping[str, State]) -> bool:
    return found.keys() == expected.keys() and all(
        found[metric].keys() == state.keys() and all(same_value(found[metric][name], state[name]) for name in state)
        for metric, state in expected.items()
    )


def is_entry(row: JournalRow, entry: JournalEntry) -> bool:
    """Returns True if a row has the content of an entry."""
    return (
        (row.track, row.window, row.failure) == (entry.track, entry.window, entry.failure)
        and same_states(row.states(), entry.states)
        and row.tensors().keys() == entry.tensors.keys()
        and all(same(tensor, entry.tensors[name]) for name, tensor in row.tensors().items())
    )


def write(folder: Path, batches: Mapping[str, Sequence[JournalEntry]], *, start=0, rank=0, layouts=None) -> None:
    writer = JournalWriter(folder, start=start, rank=rank, layouts=layouts or {})
    for key, entries in batches.items():
        writer.append(key, entries)
    writer.close()


def read(folder: Path) -> list[tuple[str, list[JournalRow]]]:
    reader = JournalReader(folder)
    found = list(reader.batches())
    assert reader.notes == []
    return found


def assert_is(found: Sequence[tuple[str, Sequence[JournalRow]]], batches: Mapping[str, Sequence[JournalEntry]]) -> None:
    assert [key for key, _ in found] == list(batches)
    for key, rows in found:
        assert all(is_entry(row, entry) for row, entry in zip(rows, batches[key], strict=True))


# Content


@pytest.mark.parametrize("in_row", [True, False], ids=["in the row", "in the side file"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_of_every_dtype_are_restored_bit_for_bit(tmp_path, dtype, in_row):
    value = torch.tensor([*ODD, TINY[dtype], torch.finfo(dtype).max], dtype=torch.float64).to(dtype)
    layouts = {"m": {"x": (str(dtype).removeprefix("torch."), [len(value)])}} if in_row else {}
    batches = {"k": [JournalEntry("t", 0, 1.0, states={"m": {"x": value}})]}
    write(tmp_path, batches, layouts=layouts)
    assert_is(read(tmp_path), batches)
    assert (tmp_path / "000-r0.states").exists() is not in_row


@given(st.lists(st.floats(width=64), min_size=1, max_size=8), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_numbers_are_restored_bit_for_bit(floats, integers):
    state: State = {"x": torch.tensor(floats, dtype=torch.float64), "n": torch.tensor(integers, dtype=torch.int64)}
    layouts = {"m": {"x": ("float64", [len(floats)]), "n": ("int64", [len(integers)])}}
    with TemporaryDirectory() as folder:
        write(Path(folder), {"k": [JournalEntry("t", 0, 1.0, states={"m": state})]}, layouts=layouts)
        assert_is(read(Path(folder)), {"k": [JournalEntry("t", 0, 1.0, states={"m": state})]})


MANY_KINDS: dict[str, State] = {
    "scalars": {"a": torch.tensor(1 / 3, dtype=torch.float64), "b": torch.tensor(2**60 + 1), "c": torch.tensor(True)},
    "shaped": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([[True], [False]])},
    "empty": {"a": torch.zeros(0), "b": torch.zeros((3, 0), dtype=torch.int64)},
    "lists": {"a": [torch.arange(3.0), torch.zeros(0), torch.ones((2, 2), dtype=torch.int32)], "b": []},
    "many parts": {"a": [torch.tensor(float(part)) for part in range(12)]},
    "no parts": {"a": []},
    "large": {"a": torch.randn(50, 50, generator=torch.Generator().manual_seed(0)).double()},
    "view": {"a": torch.arange(12).reshape(3, 4).t()[1:], "b": torch.arange(4.0)[::2]},
    "no state": {},
    'a "quoted"\n\ud800 name': {"é\x00": torch.ones(1), "__metadata__": torch.ones(1)},
}
LAYOUTS = {
    "scalars": {"a": ("float64", []), "b": ("int64", []), "c": ("bool", [])},
    "shaped": {"a": ("float32", [2, 3]), "b": ("bool", [2, 1])},
    "view": {"a": ("int64", [9, 9])},
}


@pytest.mark.parametrize("layouts", [{}, LAYOUTS], ids=["in the side file", "in rows"])
def test_states_of_every_kind_are_restored(tmp_path, layouts):
    tensors = {"nll": torch.full((4, 9), float("nan")), "codes": torch.arange(4).to(torch.int16), "x y": torch.zeros(0)}
    batches = {
        "all": [JournalEntry("t", 0, 1.0, states=MANY_KINDS, tensors=tensors)],
        **{
            name: [JournalEntry("u", row, 0.5, states={name: state})]
            for row, (name, state) in enumerate(MANY_KINDS.items())
        },
        "tensors alone": [JournalEntry("v", 0, 2.5, tensors=tensors), JournalEntry("v", 1, 2.5)],
        "nothing": [JournalEntry("w", 0, 0.0)],
    }
    write(tmp_path, batches, layouts=layouts)
    assert_is(read(tmp_path), batches)


def test_tensors_and_states_of_the_same_name_are_distinct(tmp_path):
    entry = JournalEntry("t", 0, 1.0, states={"nll": {"nll": torch.ones(1)}}, tensors={"nll": torch.zeros(2)})
    write(tmp_path, {"k": [entry]})
    assert_is(read(tmp_path), {"k": [entry]})


ANY_TEXT = st.text(st.characters(), max_size=12)  # with lone surrogates, newlines, NUL and quotes


@given(ANY_TEXT, ANY_TEXT, st.none() | ANY_TEXT)
@settings(max_examples=150, deadline=None)
def test_ids_and_reasons_may_contain_any_characters(track, other, reason):
    batches = {"k": [JournalEntry(track, 3, 1.0, reason), JournalEntry(other, 4, 1.0)]}
    with TemporaryDirectory() as folder:
        write(Path(folder), batches)
        assert (Path(folder) / "000-r0.jsonl").read_bytes().count(b"\n") == 3
        assert_is(read(Path(folder)), batches)


def test_ids_that_look_like_the_end_of_a_row_do_not_end_it(tmp_path):
    odd = ['","crc":"00000000"}', "\n", "\r\n", "\u2028\u0085", "\ud83d\ude00", "\U0001f600", '{"journal":1}', "\ud800"]
    batches = {"k": [JournalEntry(name, row, 1.0, f"cannot open\n{name}") for row, name in enumerate(odd)]}
    write(tmp_path, batches)
    assert_is(read(tmp_path), batches)


def some_batches(first: int, num: int) -> dict[str, list[JournalEntry]]:
    """Returns batches of three windows: with data in the side file, with a failure, and with numbers only."""
    made = {}
    for number in range(first, first + num):
        entries = []
        for window in range(3):
            state: State = {"x": torch.tensor([number + window / 7, -0.0], dtype=torch.float64)}
            kept: dict[str, State] = {"m": state}
            if number % 3:
                kept["c"] = {"parts": [torch.arange(float(window + 1))] * window}
            tensors = {"nll": torch.full((2, 3), number / 3)} if number % 2 else {}
            failure = "cut short" if (number, window) == (first + 1, 1) else None
            states = {} if failure else kept
            entries.append(JournalEntry(f"track é {number}", window, 1.5, failure, states, {} if failure else tensors))
        made[f"key{number}"] = entries
    return made


SOME_LAYOUTS = {"m": {"x": ("float64", [2])}}


def test_files_are_read_in_the_order_of_starts_and_then_of_ranks(tmp_path):
    starts = {
        (start, rank): some_batches(10 * start + 3 * rank, 2)
        for start, rank in [(10, 1), (2, 0), (0, 10), (0, 2), (1000, 0)]
    }
    for (start, rank), batches in starts.items():
        write(tmp_path, batches, start=start, rank=rank, layouts=SOME_LAYOUTS)
    everything = {f"{place}{key}": entries for place in sorted(starts) for key, entries in starts[place].items()}
    found = read(tmp_path)
    keys = [f"{place}{key}" for place in sorted(starts) for key in starts[place]]
    assert_is([(key, rows) for key, (_, rows) in zip(keys, found, strict=True)], everything)
    assert JournalReader(tmp_path).num_starts == 1001


def test_a_batch_measured_again_is_read_again_later(tmp_path):
    first, again = some_batches(0, 2), some_batches(0, 1)
    again["key0"] = [JournalEntry(entry.track, entry.window, 1.5, "gone") for entry in again["key0"]]
    write(tmp_path, first, layouts=SOME_LAYOUTS)
    write(tmp_path, again, start=1, layouts=SOME_LAYOUTS)
    found = read(tmp_path)
    assert_is(found[:2], first)
    assert_is(found[2:], again)


def test_a_missing_or_empty_folder_is_an_empty_journal(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert read(folder) == []
        assert JournalReader(folder).num_starts == 0


def test_files_with_other_names_are_ignored(tmp_path):
    batches = some_batches(0, 1)
    write(tmp_path, batches, layouts=SOME_LAYOUTS)
    for name in ("000-r0 (copy).jsonl", "000-r0-old.jsonl", "000-r0.jsonl~", "x-r0.jsonl", "notes.txt"):
        (tmp_path / name).write_text("{}\n")
    assert_is(read(tmp_path), batches)
    assert JournalReader(tmp_path).num_starts == 1


# Damage


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[dict[str, list[JournalEntry]], bytes, bytes]:
    """Batches, and the bytes of their rows and of their side file."""
    folder = tmp_path_factory.mktemp("whole")
    batches = some_batches(0, 6)
    write(folder, batches, layouts=SOME_LAYOUTS)
    assert_is(read(folder), batches)
    return batches, (folder / "000-r0.jsonl").read_bytes(), (folder / "000-r0.states").read_bytes()


def damaged(data: bytes, how: str, at: int, value: int, garbage: bytes) -> bytes:
    at %= len(data)
    flipped = bytes([data[at] ^ (value or 1)])
    return {
        "cut": data[:at],
        "flip": data[:at] + flipped + data[at + 1 :],
        "append": data + garbage,
        "insert": data[:at] + garbage + data[at:],
        "zero a tail": data[:at] + bytes(len(data) - at),
        "lose a middle": data[:at] + data[at + 1 + value :],
        "nothing": data,
    }[how]


HOWS = st.sampled_from(["cut", "flip", "append", "insert", "zero a tail", "lose a middle", "nothing"])
DAMAGE = st.tuples(HOWS, st.integers(0, 10**6), st.integers(0, 255), st.binary(max_size=40))


@pytest.mark.slow
@given(DAMAGE, DAMAGE, st.booleans())
@settings(max_examples=500, deadline=None)
def test_any_damage_leaves_only_complete_and_unchanged_batches(written, rows, side, exists):
    batches, lines, side_file = written
    broken, broken_side_file = damaged(lines, *rows), damaged(side_file, *side)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "000-r0.jsonl").write_bytes(broken)
        if exists:
            (folder / "000-r0.states").write_bytes(broken_side_file)
        reader = JournalReader(folder)
        found = list(reader.batches())
        keys = [key for key, _ in found]
        assert keys == sorted(set(keys))
        assert_is(found, {key: batches[key] for key in keys})
        is_cut_between = rows[0] == "cut" and (broken == b"" or broken.endswith(b"\n"))
        if len(keys) < len(batches) and not is_cut_between:
            assert reader.notes
        if not reader.notes and not is_cut_between:
            assert list(batches) == keys
        assert all(note.startswith("000-r0.jsonl: skipped ") for note in reader.notes)


def test_every_batch_before_a_cut_is_read(written, tmp_path):
    batches, lines, side_file = written
    (tmp_path / "000-r0.states").write_bytes(side_file)
    ends = [index + 1 for index, byte in enumerate(lines) if byte == ord("\n")]
    batch_ends = ends[3::3]  # after the header, three rows per batch
    for at in range(0, len(lines), 7):
        (tmp_path / "000-r0.jsonl").write_bytes(lines[:at])
        reader = JournalReader(tmp_path)
        num_whole = sum(end <= at for end in batch_ends)
        assert [key for key, _ in reader.batches()] == list(batches)[:num_whole]
        assert bool(reader.notes) == (at > 0 and at != ends[0] and at not in batch_ends)


def test_a_flipped_bit_in_the_side_file_affects_only_its_batch(written, tmp_path):
    batches, lines, side_file = written
    (tmp_path / "000-r0.jsonl").write_bytes(lines)
    spans: dict[str, list[int]] = {}
    for line in lines.splitlines()[1:]:
        row = json.loads(line)
        if "beside" in row:
            spans.setdefault(row["batch"], []).extend(range(row["beside"][0], sum(row["beside"][:2])))
    assert sorted(at for span in spans.values() for at in span) == list(range(len(side_file)))
    for key, span in spans.items():
        for at in (span[0], span[len(span) // 2], span[-1]):
            (tmp_path / "000-r0.states").write_bytes(damaged(side_file, "flip", at, 64, b""))
            reader = JournalReader(tmp_path)
            assert [found for found, _ in reader.batches()] == [other for other in batches if other != key]
            assert reader.notes == ["000-r0.jsonl: skipped 3 rows with missing or damaged data in the side file"]


def test_without_the_side_file_only_batches_without_side_data_are_read(written, tmp_path):
    batches, lines, _ = written
    (tmp_path / "000-r0.jsonl").write_bytes(lines)
    reader = JournalReader(tmp_path)
    assert_is(list(reader.batches()), {"key0": batches["key0"]})
    assert reader.notes == ["000-r0.jsonl: skipped 15 rows with missing or damaged data in the side file"]


def test_a_side_file_without_rows_is_noted_and_counts_as_a_start(written, tmp_path):
    (tmp_path / "004-r1.states").write_bytes(written[2])
    reader = JournalReader(tmp_path)
    assert list(reader.batches()) == []
    assert reader.notes == ["004-r1.states: skipped, because 004-r1.jsonl is missing"]
    assert reader.num_starts == 5


def test_unreferenced_bytes_of_the_side_file_are_ignored(written, tmp_path):
    batches, lines, side_file = written
    (tmp_path / "000-r0.jsonl").write_bytes(lines)
    (tmp_path / "000-r0.states").write_bytes(side_file + b"bytes of a batch whose rows were never written")
    assert_is(read(tmp_path), batches)


def test_rows_of_incomplete_batches_are_skipped_with_a_note(written, tmp_path):
    batches, lines, side_file = written
    (tmp_path / "000-r0.states").write_bytes(side_file)
    kept = lines.splitlines(keepends=True)
    del kept[5]  # one of three
    (tmp_path / "000-r0.jsonl").write_bytes(b"".join(kept[:-1]))
    reader = JournalReader(tmp_path)
    found = list(reader.batches())
    assert_is(found, {key: batches[key] for key in ("key0", "key2", "key3", "key4")})
    assert reader.notes == ["000-r0.jsonl: skipped 4 rows of incomplete batches"]


def test_rows_without_a_readable_header_are_skipped_with_a_note(written, tmp_path):
    _, lines, side_file = written
    header, rest = lines.split(b"\n", 1)
    (tmp_path / "000-r0.states").write_bytes(side_file)
    later = journal_rows.row_line({**json.loads(header), "journal": journal_rows.VERSION + 1})
    for first, num_notes in [(b"", 1), (header[:-1] + b"\n", 2), (later, 1)]:
        (tmp_path / "000-r0.jsonl").write_bytes(first + rest)
        reader = JournalReader(tmp_path)
        assert list(reader.batches()) == []
        assert reader.notes[-1] == ("000-r0.jsonl: skipped 18 rows without a header that this version can read")
        assert len(reader.notes) == num_notes


def test_a_damaged_file_does_not_affect_the_others(tmp_path):
    first, second = some_batches(0, 3), some_batches(3, 3)
    write(tmp_path, first, layouts=SOME_LAYOUTS)
    write(tmp_path, second, rank=1, layouts=SOME_LAYOUTS)
    (tmp_path / "000-r0.jsonl").write_bytes(b"\0" * 5000)
    reader = JournalReader(tmp_path)
    assert_is(list(reader.batches()), second)
    assert reader.notes == ["000-r0.jsonl: skipped 1 truncated or damaged line"]


def test_a_side_file_damaged_after_it_was_checked_is_an_error(tmp_path):
    write(tmp_path, some_batches(1, 1), layouts=SOME_LAYOUTS)
    ((_, rows),) = JournalReader(tmp_path).batches()
    (tmp_path / "000-r0.states").write_bytes(b"")
    with pytest.raises(RunError, match=r"000-r0\.states is damaged; remove the file and resume the run"):
        rows[0].states()


def test_an_unreadable_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "000-r0.jsonl").mkdir()
    with pytest.raises(RunError, match=r"000-r0\.jsonl: the journal file cannot be read"):
        list(JournalReader(tmp_path).batches())


# Disks


class Full(io.FileIO):
    """A file on a disk with `room` free bytes. A write takes at most 50 bytes."""

    room = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        fits = min(len(data), max(Full.room, 0), 50)
        if data and not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Full.room -= fits
        return super().write(bytes(data[:fits]))


@pytest.fixture
def full_disk(monkeypatch) -> Iterator[type[Full]]:
    monkeypatch.setattr(Path, "open", lambda self, mode, **_: Full(self, mode.replace("b", "")))
    Full.room = 10**9
    yield Full
    Full.room = 0


@pytest.mark.parametrize("room", [0, 1, 40, 300, 700, 1500, 3000])
def test_a_full_disk_leaves_complete_batches_and_the_run_can_be_resumed(tmp_path, full_disk, monkeypatch, room):
    batches = some_batches(0, 6)
    writer = JournalWriter(tmp_path, start=0, rank=0, layouts=SOME_LAYOUTS)
    full_disk.room, done = room, []

    def append_all() -> None:
        for key, entries in batches.items():
            writer.append(key, entries)
            done.append(key)

    with pytest.raises(
        RunError, match=r"the journal could not be written .*No space left.*free disk space and resume the run"
    ):
        append_all()
    full_disk.room = 10**9
    writer.close()
    monkeypatch.undo()
    assert_is(read(tmp_path), {key: batches[key] for key in done})
    write(tmp_path, batches, start=1, layouts=SOME_LAYOUTS)
    assert_is(read(tmp_path)[len(done) :], batches)


def test_a_file_at_its_size_limit_keeps_complete_batches(tmp_path):
    writer = JournalWriter(tmp_path, start=0, rank=0, layouts=SOME_LAYOUTS)
    batches = some_batches(0, 6)
    for key in ("key0", "key1"):
        writer.append(key, batches[key])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "000-r0.jsonl").stat().st_size + 100, limits[1]))
    try:
        with pytest.raises(RunError, match="File too large"):
            writer.append("key2", batches["key2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_is(read(tmp_path), {key: batches[key] for key in ("key0", "key1")})
    writer.append("key2", batches["key2"])
    writer.close()
    assert_is(read(tmp_path), {key: batches[key] for key in ("key0", "key1", "key2")})


@pytest.mark.parametrize("room", [0, 1, 40, 300, 700])
def test_a_temporarily_full_disk_leaves_no_gap(tmp_path, full_disk, monkeypatch, room):
    batches = some_batches(1, 4)
    writer = JournalWriter(tmp_path, start=0, rank=0, layouts=SOME_LAYOUTS)
    for key, entries in batches.items():
        full_disk.room = room
        with pytest.raises(RunError):
            writer.append(key, entries)
        full_disk.room = 10**9
        writer.append(key, entries)
    writer.close()
    monkeypatch.undo()
    assert_is(read(tmp_path), batches)
    assert b"\0" not in (tmp_path / "000-r0.jsonl").read_bytes()


def test_a_disk_full_from_the_start_leaves_an_empty_journal(tmp_path, full_disk, monkeypatch):
    full_disk.room = 10
    with pytest.raises(RunError, match="No space left"):
        JournalWriter(tmp_path, start=0, rank=0, layouts=SOME_LAYOUTS)
    monkeypatch.undo()
    assert read(tmp_path) == []
    assert JournalReader(tmp_path).num_starts == 1


def test_two_writers_of_one_start_and_rank_are_refused(tmp_path):
    batches = some_batches(0, 2)
    writer = JournalWriter(tmp_path, start=0, rank=0, layouts=SOME_LAYOUTS)
    with pytest.raises(RunError, match="File exists"):
        JournalWriter(tmp_path, start=0, rank=0, layouts=SOME_LAYOUTS)
    JournalWriter(tmp_path, start=0, rank=1, layouts=SOME_LAYOUTS).close()
    for key, entries in batches.items():
        writer.append(key, entries)
    writer.close()
    assert_is(read(tmp_path), batches)


def test_a_missing_folder_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(
        RunError,
        match=r"the journal could not be written .*Completed batches are kept; fix the cause and resume the run",
    ):
        JournalWriter(tmp_path / "nowhere", start=0, rank=0, layouts={})


def test_batches_are_readable_before_close_and_close_may_be_repeated(tmp_path):
    batches = some_batches(0, 2)
    writer = JournalWriter(tmp_path, start=0, rank=0, layouts=SOME_LAYOUTS)
    for number, (key, entries) in enumerate(batches.items(), start=1):
        writer.append(key, entries)
        assert_is(read(tmp_path), dict(list(batches.items())[:number]))
    writer.close()
    writer.close()
    assert_is(read(tmp_path), batches)


def test_names_and_content_of_both_files_are_flushed_to_disk(tmp_path, monkeypatch):
    synced: list[tuple[int, int]] = []  # inode and size of each flushed file
    fsync = os.fsync

    def noted(number: int) -> None:
        synced.append((os.fstat(number).st_ino, os.fstat(number).st_size))
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    write(tmp_path, some_batches(1, 2), layouts=SOME_LAYOUTS)
    assert [number for number, _ in synced[:2]] == [tmp_path.stat().st_ino] * 2
    ends = {(file.stat().st_ino, file.stat().st_size) for file in tmp_path.iterdir()}
    assert len(ends) == 2
    assert ends <= set(synced[2:])


def test_a_background_flush_error_is_raised_by_close(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SYNC_EVERY_S", 0.0)
    failures = iter([OSError(errno.EIO, "Input/output error")])

    def fsync(number: int) -> None:
        for error in failures:
            raise error

    writer = JournalWriter(tmp_path, start=0, rank=0, layouts=SOME_LAYOUTS)
    monkeypatch.setattr(os, "fsync", fsync)
    writer.append("key0", some_batches(0, 1)["key0"])
    with pytest.raises(RunError, match="Input/output error"):
        writer.close()


def test_a_state_of_an_unsupported_dtype_is_refused_by_name(tmp_path):
    writer = JournalWriter(tmp_path, start=0, rank=0, layouts={})
    with pytest.raises(MetricError, match=r"spectrum.*cannot be stored"):
        writer.append(
            "a", [JournalEntry("t", 0, 1.0, states={"spectrum": {"bins": torch.zeros(3, dtype=torch.complex128)}})]
        )
    writer.close()
    assert list(JournalReader(tmp_path).batches()) == []
