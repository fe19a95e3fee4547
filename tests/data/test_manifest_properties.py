"""Any manifest gives either valid tracks or an error that names it, and its content is never executed."""

import csv
import gzip
import io
import json
import math
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from musicgen_eval.data import manifest as manifests
from musicgen_eval.data.manifest import MAX_DURATION_S, read_manifest
from musicgen_eval.data.sources import read_source
from musicgen_eval.data.tabular_files import Oddities, RowBatch
from musicgen_eval.errors import SourceError

EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.sampled_from(
    ["path", "id", "text", "start_s", "end_s", "duration_s", "duration", "sample_rate", "Path", "x"]
)
SECONDS = st.sampled_from(["", "0", "1", "2.5", "30", "1e3", "-1", "nan", "inf", "1_0", " 4 ", "x", "1e400", "9" * 400])
WORDS = st.text(max_size=6) | st.sampled_from(
    ["a.wav", "sub/b.wav", "/c.wav", "..", ".", "file://x", "\0", "\ud800", "\udc80"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | SECONDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


def read(name: str, content: bytes) -> None:
    """Reads a manifest and checks that the tracks are valid or the error names the manifest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        error = None
        try:
            tracks = read_source(path, text="default")
        except SourceError as raised:
            error = raised
        if error is not None:
            assert str(path) in str(error)
            return
        assert 0 < len(tracks) == len(tracks.ids) == len(set(tracks.ids)) == len(tracks.texts)
        for track in tracks:
            track.id.encode()
            assert track.id
            assert track.text is not None
            track.text.encode()
            assert "\0" not in str(track.path)
            assert 0 <= track.start_s < math.inf
            assert track.duration_s is None or 0 < track.duration_s < math.inf
        if tracks.file_duration_s is not None:
            declared = tracks.file_duration_s
            assert (~(declared <= tracks.start_s) & ~(declared > MAX_DURATION_S)).all()


@EXAMPLES
@given(st.sampled_from(["m.csv", "m.jsonl", "m.jsonl.gz", "m.parquet"]), st.binary(max_size=200))
@example("m.jsonl", b"[" * 100_000)
@example("m.jsonl", b'{"path": "a.wav", "id": ' + b"9" * 5000 + b"}")
@example("m.csv", b"path\n" + b"a" * 200_000 + b"\n")
@example("m.csv", b"\n\npath\na.wav\n")
def test_arbitrary_bytes_give_tracks_or_an_error(name, content):
    read(name, content)


@EXAMPLES
@given(st.binary(max_size=120))
def test_arbitrary_bytes_in_gzip_give_tracks_or_an_error(content):
    read("m.jsonl.gz", gzip.compress(content))


@EXAMPLES
@given(
    st.lists(NAMES, min_size=1, max_size=6, unique=True).map(lambda names: ["path", *(set(names) - {"path"})]),
    st.lists(st.lists(WORDS | SECONDS, min_size=6, max_size=6), max_size=5),
)
def test_arbitrary_csv_rows_give_tracks_or_an_error(header, rows):
    text = io.StringIO()
    csv.writer(text).writerows([header, *(row[: len(header)] for row in rows)])
    read("m.csv", text.getvalue().encode("utf-8", "surrogatepass"))


@EXAMPLES
@given(
    st.lists(st.dictionaries(NAMES, JSON, max_size=6) | st.dictionaries(st.just("path"), WORDS, min_size=1), max_size=5)
)
@example([{"path": "\ud800"}])
@example([{"path": "a.wav", "text": "\ud800"}])
@example([{"path": ".", "duration": 1, "sample_rate": 1}])
def test_arbitrary_json_rows_give_tracks_or_an_error(rows):
    read("m.jsonl", "\n".join(map(json.dumps, rows)).encode())


@EXAMPLES
@given(
    st.lists(
        st.fixed_dictionaries(
            {"path": WORDS | st.none() | st.integers(0, 3)},
            optional={
                "id": WORDS | st.none() | st.integers() | st.booleans(),
                "text": WORDS | st.none(),
                "start_s": SECONDS | st.none() | st.floats() | st.integers(),
                "end_s": SECONDS | st.none() | st.floats() | st.just(10**400),
                "duration_s": SECONDS | st.none() | st.floats(0, 100) | st.booleans(),
            },
        ),
        min_size=1,
        max_size=6,
    )
)
def test_parsing_rows_together_equals_parsing_them_one_by_one(rows):
    together = RowBatch(1, None, None, rows)
    many = manifests._plain_rows(together)
    try:
        alone = manifests._odd_rows(Path("m.jsonl"), together)
    except SourceError:
        assert many is None
        return
    if many is not None:
        for name, column in many._asdict().items():
            assert [str(cell) for cell in column] == [str(cell) for cell in getattr(alone, name)]


@pytest.mark.parametrize(
    ("cell", "wrong"),
    [
        ("", None),
        ("30", None),
        (" 30.000 ", None),
        ("0", "above 0"),
        ("1e7", "above 0 and at most 1e[+]06"),
        ("nan", None),
    ],
)
def test_a_file_duration_must_be_a_number_of_seconds(cell, wrong, tmp_path):
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"path,duration_s\na.wav,{cell}\n")
    if wrong is not None:
        with pytest.raises(SourceError, match=rf"row 1 \(line 2\): duration_s .*{wrong}"):
            read_source(manifest)
        return
    declared = read_source(manifest).file_duration_s
    assert (declared is None) if cell in ("", "nan") else (declared.tolist() == [30.0])


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.parquet"])
def test_every_manifest_format_can_give_the_file_duration(name, tmp_path):
    rows = [
        {"path": "a.wav", "id": "whole", "start_s": 0.0, "end_s": None, "duration_s": 30.0},
        {"path": "a.wav", "id": "part", "start_s": 10.0, "end_s": 30.0004, "duration_s": 30.0},
        {"path": "b.wav", "id": "not given", "start_s": 0.0, "end_s": 3.0, "duration_s": None},
    ]
    if name.endswith("csv"):
        cells = [",".join("" if cell is None else str(cell) for cell in row.values()) for row in rows]
        (tmp_path / name).write_text("\n".join([",".join(rows[0]), *cells]))
    elif name.endswith("jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    tracks = read_source(tmp_path / name)
    assert str(tracks.file_duration_s.tolist()) == "[30.0, 30.0, nan]"
    assert [track.duration_s for track in tracks] == [None, pytest.approx(20.0004), 3.0]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("30,40", r"start_s \(30\) is past the end of the file; duration_s is 30"),
        ("0,30.002", r"end_s \(30\.002\) is past the end of the file"),
    ],
)
def test_a_part_must_lie_within_the_given_file_duration(row, wrong, tmp_path):
    (tmp_path / "m.csv").write_text(f"path,duration_s,start_s,end_s\na.wav,30,{row}\n")
    with pytest.raises(SourceError, match=rf"row 1 \(line 2\): {wrong}"):
        read_source(tmp_path / "m.csv")


def test_audiocrafts_duration_is_ignored(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "a.mp3", "duration": 30.04, "sample_rate": 44100}')
    assert read_source(tmp_path / "m.jsonl").file_duration_s is None


def test_rows_before_a_damaged_one_are_checked_first(tmp_path):
    (tmp_path / "m.csv").write_text("path,start_s\na.wav,0\nb.wav,x\nc.wav\n")
    with pytest.raises(SourceError, match=r"row 2 \(line 3\): start_s"):
        list(read_manifest(tmp_path / "m.csv", Oddities()))


def test_code_in_a_manifest_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [
        "=cmd|'/C touch ran'!A0",
        "@SUM(1+1)",
        "!!python/object/apply:os.system ['touch ran']",
        "$(touch ran).wav",
        "`touch ran`",
        "cposix\nsystem\n(S'touch ran'\ntR.",
        "{{ ''.__class__ }}",
        "%(ran)s ${HOME} ~",
        "__import__('os').system('touch ran')",
    ]
    rows = [{"path": f"{row}{cell}", "id": cell, "text": cell} for row, cell in enumerate(cells)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (tmp_path / "m.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "id", "text"])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("m.jsonl", "m.csv"):
        tracks = read_source(tmp_path / name)
        assert tracks.ids == cells
        assert tracks.texts == cells
        assert [str(path) for path in tracks.paths] == [str(tmp_path / row["path"]) for row in rows]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv", "m.jsonl"]
