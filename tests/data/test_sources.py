"""Tests the tracks read from files, folders, globs and manifests, and the errors for invalid sources."""

import gzip
import json
import math
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from musicgen_eval.data.folders import AUDIO_SUFFIXES
from musicgen_eval.data.sources import TrackList, read_source
from musicgen_eval.errors import SourceError
from musicgen_eval.records import Track


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def write_csv(folder: Path, content: str, name: str = "m.csv") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def test_a_file_is_one_track_with_any_extension(tmp_path: Path):
    touch(tmp_path, "a.mp3", "b.dat")
    for name in ("a.mp3", "b.dat"):
        tracks = read_source(str(tmp_path / name), text="techno")
        assert list(tracks) == [Track(id=name, path=tmp_path / name, text="techno")]
        assert tracks.ignored == 0


def test_a_folder_gives_all_audio_below_it_sorted_and_counts_other_files(tmp_path: Path):
    touch(tmp_path, "b.wav", "a/z.MP3", "a/cover.jpg", "a-b.flac", "notes.txt", ".hidden.wav", ".git/x.wav", "a/.x.ogg")
    tracks = read_source(tmp_path)
    assert tracks.ids == ["a-b.flac", "a/z.MP3", "b.wav"]
    assert [track.path for track in tracks] == [tmp_path / id for id in tracks.ids]
    assert tracks.ignored == 2
    assert all(track.text is None and track.start_s == 0.0 and track.duration_s is None for track in tracks)


def test_links_to_folders_are_followed_once_even_in_cycles(tmp_path: Path):
    touch(tmp_path, "music/real/a.wav", "elsewhere/b.wav", "elsewhere/deep/c.wav")
    music = tmp_path / "music"
    (music / "again").symlink_to(music / "real")
    (music / "real" / "up").symlink_to(music)
    (music / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(music)
    (music / "self.wav").symlink_to(music / "self.wav")
    (music / "gone.wav").symlink_to(music / "nowhere.wav")
    assert read_source(music).ids == ["gone.wav", "out/b.wav", "out/deep/c.wav", "real/a.wav", "self.wav"]


def test_glob_ids_are_relative_to_the_fixed_part_of_the_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path, "rock/a.wav", "rock/b.mp3", "jazz/live/c.wav", "jazz/c.txt", "jazz/.d.wav")
    (tmp_path / "rock" / "folder.wav").mkdir()
    tracks = read_source(f"{tmp_path}/**/*.*")
    assert tracks.ids == ["jazz/live/c.wav", "rock/a.wav", "rock/b.mp3"]
    assert tracks.ignored == 1
    assert read_source(f"{tmp_path}/rock/*.wav").ids == ["a.wav"]
    monkeypatch.chdir(tmp_path)
    assert [track.path for track in read_source("r*/*.wav")] == [Path("rock/a.wav")]
    touch(tmp_path, "odd [1].wav")
    assert read_source("odd [1].wav").ids == ["odd [1].wav"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nothing", r"nothing: no such file or folder"),
        ("musc", r"musc: no such file or folder; did you mean music\?"),
        ("no/where/a.wav", r"where/a\.wav: no such file or folder \(.*where does not exist either\)"),
        ("empty", r"empty: no files found"),
        ("texts", r"texts: none of the 2 files found has an audio extension"),
        ("texts/*", r"texts/\*: none of the 2 files found has an audio extension"),
        ("music/*.ogg", r"\*\.ogg: no files found"),
    ],
)
def test_a_source_without_tracks_raises_with_the_reason(source: str, reason: str, tmp_path: Path):
    touch(tmp_path, "texts/a.txt", "texts/b/c.jpg", "texts/c.md", "music/a.wav")
    (tmp_path / "texts" / "c.md").unlink()
    (tmp_path / "empty").mkdir()
    if source == "texts/*":
        touch(tmp_path, "texts/d.txt")
    with pytest.raises(SourceError, match=reason):
        read_source(f"{tmp_path}/{source}")


def test_a_csv_manifest_keeps_the_order_of_rows_and_resolves_paths_from_its_folder(tmp_path: Path):
    manifest = write_csv(
        tmp_path,
        "\ufeffpath,id,text,start_s,end_s,artist\r\n"
        'z.wav,last,"a ""slow"", sad\nsong",1.5,4,x\r\n'
        "sub/./a.wav,,,,,y\r\n"
        f"{tmp_path}/sub/b.wav,,,0.25,,\r\n"
        "\r\n"
        "/elsewhere/c.wav,,,,2e1,z\r\n",
    )
    tracks = read_source(manifest, text="default")
    assert list(tracks) == [
        Track("last", tmp_path / "z.wav", 1.5, 2.5, 'a "slow", sad\nsong'),
        Track("sub/a.wav", tmp_path / "sub" / "a.wav", 0.0, None, "default"),
        Track("sub/b.wav", tmp_path / "sub" / "b.wav", 0.25, None, "default"),
        Track("/elsewhere/c.wav", Path("/elsewhere/c.wav"), 0.0, 20.0, "default"),
    ]


ROWS = [
    {"path": "a.wav", "id": "1", "text": "rock", "start_s": 0.5, "end_s": 2.0},
    {"path": "b.wav", "id": "2", "text": None, "start_s": None, "end_s": None},
]


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.jsonl.gz", "m.parquet", "M.JSONL"])
def test_every_manifest_format_gives_the_same_tracks(name: str, tmp_path: Path):
    path = tmp_path / name
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    if name.endswith("csv"):
        cells = ["" if cell is None else str(cell) for row in ROWS for cell in row.values()]
        path.write_text("path,id,text,start_s,end_s\n" + ",".join(cells[:5]) + "\n" + ",".join(cells[5:]))
    elif name.endswith("gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith("parquet"):
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_text(lines)
    assert list(read_source(path)) == [
        Track("1", tmp_path / "a.wav", 0.5, 1.5, "rock"),
        Track("2", tmp_path / "b.wav", 0.0, None, None),
    ]


def test_texts_of_audiocraft_manifests_come_from_the_json_files_next_to_the_audio(tmp_path: Path):
    rows = [
        {
            "path": f"{name}.mp3",
            "duration": 30.1,
            "sample_rate": 44100,
            "amplitude": None,
            "weight": None,
            "info_path": None,
        }
        for name in "abcd"
    ]
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (tmp_path / "a.json").write_text(json.dumps({"description": " a calm piano ", "key": "C"}))
    (tmp_path / "b.json").write_text(json.dumps({"description": None}))
    (tmp_path / "c.json").write_text(json.dumps({"title": "x"}))
    tracks = read_source(tmp_path / "data.jsonl.gz", text="music")
    assert tracks.texts == ["a calm piano", "music", "music", "music"]
    assert np.isnan(tracks.duration_s).all()
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(SourceError, match=r"data\.jsonl\.gz: row 4 \(line 4\): cannot read .*d\.json: "):
        read_source(tmp_path / "data.jsonl.gz")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the file has no header"),
        ("path,text\n", "the manifest has no rows"),
        ("id,text\n1,a\n", "the column 'path' is missing; columns found: id, text"),
        ("path,txt\na.wav,b\n", "column 'txt' would be ignored; did you mean 'text'"),
        ("path,Text\na.wav,b\n", "column 'Text' would be ignored; did you mean 'text'"),
        ("path,caption\na.wav,b\n", "column 'caption' would be ignored; did you mean 'text'"),
        ("file,text\na.wav,b\n", "column 'file' would be ignored; did you mean 'path'"),
        ("path,start,end\na.wav,0,1\n", "column 'end' would be ignored; did you mean 'end_s'"),
        (
            "path,start_s,duration\na.wav,0,1\n",
            "column 'duration' would be ignored because of column 'start_s'; use 'end_s'",
        ),
        ("path,text,text\na.wav,b,c\n", "two columns are named 'text'"),
        ("path,text\na.wav,b\nb.wav\n", r"row 2 \(line 3\): expected 2 fields as in the header, got 1"),
        ("path,text\na.wav,b\nb.wav,x,y\n", r"row 2 \(line 3\): expected 2 fields as in the header, got 3"),
        ('path,text\na.wav,"b\n', r"row 1: the file is not a CSV file"),
        ("path,text\na.wav,x\n,b\n", r"row 2 \(line 3\): path must be a file name, got ''"),
        ("path\nhttp://x/a.wav\n", r"row 1 \(line 2\): path must be a local file"),
        ("path,start_s\na.wav,abc\n", r"row 1 \(line 2\): start_s must be a non-negative number of seconds, got 'abc'"),
        ('path,start_s\na.wav,"1,5"\n', "start_s must be a non-negative number"),
        ("path,start_s\na.wav,1_0\n", "start_s must be a non-negative number"),
        ("path,start_s\na.wav,-1\n", "start_s must be a non-negative number of seconds, got '-1'"),
        ("path,end_s\na.wav,inf\n", "end_s must be a non-negative number"),
        ("path,start_s,end_s\na.wav,2,1\n", r"row 1 \(line 2\): end_s \(1\) must be greater than start_s \(2\)"),
        ("path,start_s,end_s\na.wav,2,2\n", "must be greater than start_s"),
        ("path,end_s\na.wav,0\n", "must be greater than start_s"),
        ("path,id\na.wav,1\nb.wav,2\nc.wav,1\n", "rows 1 and 3 have the same id '1'"),
        ("path,start_s\na.wav,0\n./a.wav,5\n", "rows 1 and 2 have the same id 'a.wav'; give each row a unique id"),
    ],
)
def test_an_invalid_csv_manifest_raises_with_the_row_and_the_cause(content: str, reason: str, tmp_path: Path):
    manifest = write_csv(tmp_path, content)
    with pytest.raises(SourceError, match=reason) as caught:
        read_source(manifest)
    assert str(manifest) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"path": "a.wav"}\n{"path": \n', r"row 2 \(line 2\): the line is not valid JSON"),
        (b'{"path": "a.wav"}\n\n["b.wav"]\n', r"row 2 \(line 3\): expected a JSON object"),
        (b'{"path": "a.wav"}\n{"id": "2"}\n', r"row 2 \(line 2\): the column 'path' is missing"),
        (
            b'{"path": "a.wav", "prompt": "x"}\n',
            r"row 1 \(line 1\): column 'prompt' would be ignored; did you mean 'text'",
        ),
        (b'{"path": 3}\n', "path must be a file name, got 3"),
        (b'{"path": "a.wav", "text": ["x"]}\n', "text must be a string"),
        (b'{"path": "a.wav", "id": 1.5}\n', "id must be a string"),
        (b'{"path": "a.wav", "start_s": true}\n', "start_s must be a non-negative number of seconds, got True"),
        (b'{"path": "a.wav", "start_s": [1]}\n', "start_s must be a non-negative number"),
        (b'{"path": "\xff.wav"}\n', r"row 1 \(line 1\): the line is not valid JSON"),
    ],
)
def test_an_invalid_jsonl_manifest_raises_with_the_row_and_the_cause(content: bytes, reason: str, tmp_path: Path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(content)
    with pytest.raises(SourceError, match=rf"m\.jsonl: .*{reason}|m\.jsonl: {reason}"):
        read_source(manifest)


def test_damaged_and_misnamed_manifests_raise(tmp_path: Path):
    packed = gzip.compress(b'{"path": "a.wav"}\n' * 5000)
    contents = {
        "cut.jsonl.gz": packed[: len(packed) // 2],
        "text.jsonl.gz": b"not gzip",
        "text.parquet": b"not parquet",
    }
    contents["latin.csv"] = "path\ncafé.wav\n".encode("latin-1")
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=name):
            read_source(tmp_path / name)


def test_a_parquet_manifest_without_pyarrow_raises_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    touch(tmp_path, "m.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install 'musicgen-eval\[parquet\]'"):
        read_source(tmp_path / "m.parquet")


def test_a_parquet_manifest_is_validated_like_other_formats(tmp_path: Path):
    path = tmp_path / "m.parquet"
    parquet.write_table(pa.table({"path": ["a.wav", "b.wav"], "start_s": [0.0, -1.0]}), path)
    with pytest.raises(
        SourceError, match=r"m\.parquet: row 2: start_s must be a non-negative number of seconds, got -1\.0"
    ):
        read_source(path)
    parquet.write_table(pa.table({"path": ["a.wav"], "starts": [0.0]}), path)
    with pytest.raises(SourceError, match="column 'starts' would be ignored; did you mean 'start_s'"):
        read_source(path)


def test_empty_texts_count_as_missing(tmp_path: Path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"path": "a.wav", "text": ""}\n{"path": "b.wav"}\n{"path": "c.wav", "text": "own", "id": 7}\n')
    assert read_source(manifest).texts == [None, None, "own"]
    assert read_source(manifest, text="given").texts == ["given", "given", "own"]
    assert read_source(manifest).ids == ["a.wav", "b.wav", "7"]


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0.001, 1e5)), min_size=1, max_size=20))
def test_seconds_are_read_from_a_manifest_without_rounding(spans: list[tuple[float, float]]):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "m.jsonl"
        rows = [
            {"path": "a.wav", "id": str(row), "start_s": start, "end_s": start + length}
            for row, (start, length) in enumerate(spans)
        ]
        manifest.write_text("\n".join(map(json.dumps, rows)))
        tracks = read_source(manifest)
    assert tracks.start_s.tolist() == [start for start, _ in spans]
    for track, (start, length) in zip(tracks, spans, strict=True):
        assert track.duration_s is not None
        assert math.isclose(track.start_s + track.duration_s, start + length, rel_tol=1e-15)


def test_file_names_that_are_not_utf8_get_printable_ids(tmp_path: Path):
    (tmp_path / b"caf\xe9.wav".decode("utf-8", "surrogateescape")).write_bytes(b"x")
    tracks = read_source(tmp_path)
    assert tracks.ids == ["caf\\xe9.wav"]
    assert tracks[0].path.exists()


def test_rows_take_little_memory(tmp_path: Path):
    manifest = tmp_path / "m.csv"
    num_rows = 5_000
    manifest.write_text("path,text\n" + "".join(f"folder/{row:06}.mp3,a song\n" for row in range(num_rows)))
    tracemalloc.start()
    tracks = read_source(manifest)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tracks) == num_rows
    assert held < 450 * num_rows + len(str(tmp_path)) * num_rows
    assert peak < 2 * held + 1e6


def test_a_track_list_is_indexed_and_iterated(tmp_path: Path):
    touch(tmp_path, "a.wav", "b.wav")
    tracks = read_source(tmp_path)
    assert isinstance(tracks, TrackList)
    assert len(tracks) == 2
    assert tracks[-1].id == "b.wav"
    with pytest.raises(IndexError):
        tracks[2]
    assert ".wav" in AUDIO_SUFFIXES


MISSING = ["nan", "NaN", "None", "null", "NULL", "NA", "N/A", "n/a", "<NA>", "#N/A", "-nan", " nan ", ""]
TEXTS = ["nanotechnology", "none", "Na", "none of it", "n/a?"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_words_for_a_missing_value_count_as_missing_texts_in_every_manifest_format(kind: str, tmp_path: Path):
    rows = [{"path": f"{row}.wav", "text": text} for row, text in enumerate([*MISSING, *TEXTS])]
    path = tmp_path / f"m.{kind}"
    if kind == "csv":
        path.write_text("path,text\n" + "".join(f"{row['path']},{row['text']}\n" for row in rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    tracks = read_source(path)
    assert list(tracks.texts) == [None] * len(MISSING) + TEXTS
    assert tracks.notes == (
        f"{path}: rows whose text is a word such as nan or None, which counts as no text: {len(MISSING) - 1}",
    )
    assert list(read_source(path, text="given").texts) == ["given"] * len(MISSING) + TEXTS


def test_a_text_that_is_nan_counts_as_missing(tmp_path: Path):
    (tmp_path / "m.jsonl").write_text('{"path": "a.wav", "text": NaN}\n{"path": "b.wav", "text": "x"}\n')
    assert list(read_source(tmp_path / "m.jsonl").texts) == [None, "x"]
    table = pa.table({"path": ["a.wav", "b.wav"], "text": pa.array([math.nan, math.nan], pa.float64())})
    parquet.write_table(table, tmp_path / "m.parquet")
    assert list(read_source(tmp_path / "m.parquet").texts) == [None, None]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_missing_seconds_and_ids_are_read_as_pandas_writes_them(kind: str, tmp_path: Path):
    path = tmp_path / f"m.{kind}"
    if kind == "csv":
        path.write_text("path,start_s,end_s\na.wav,nan,4\nb.wav,1,NaN\n")
    elif kind == "jsonl":
        path.write_text(
            '{"path": "a.wav", "id": NaN, "start_s": NaN, "end_s": 4}\n{"path": "b.wav", "start_s": 1, "end_s": NaN}\n'
        )
    else:
        seconds = {"start_s": [math.nan, 1.0], "end_s": [4.0, math.nan], "id": [math.nan, math.nan]}
        parquet.write_table(pa.table({"path": ["a.wav", "b.wav"], **seconds}), path)
    tracks = read_source(path)
    assert list(tracks.start_s) == [0.0, 1.0]
    assert str(list(map(float, tracks.duration_s))) == "[4.0, nan]"


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        ('\ufeffpath,text,,\r\na.wav,"calm, piano",,\r\n', []),
        ("path,text,,\na.wav,\"calm, piano\"\n", []),  # Excel omits trailing separators in later rows
        ("path,text\na.wav,\"calm, piano\",,\n", []),
        ("path,text\n,\na.wav,\"calm, piano\"\n,\n\n", ["empty rows, which are skipped: 2"]),
        ("path,text\n , \na.wav,\"calm, piano\"\n", ["empty rows, which are skipped: 1"]),
        ("path;text;note, more\na.wav;calm, piano;x\n", []),
        ("sep=;\npath;text\na.wav;calm, piano\n", []),
        ("\ufeffpath\ttext\na.wav\tcalm, piano\n", []),
        (",path,text\n0,a.wav,\"calm, piano\"\n", []),  # pandas writes row numbers in an unnamed first column
        ("path,text,\na.wav,\"calm, piano\",lost\n", ["rows with values in an unnamed column, which are ignored: 1"]),
        ('"path","text","a\nb"\na.wav,"calm, piano",x\n', []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_csv_file_is_read_as_excel_writes_it(content: str, notes: list[str], encoding: str, tmp_path: Path):
    path = tmp_path / "m.csv"
    path.write_bytes((content.removeprefix("\ufeff") if encoding == "utf-16" else content).encode(encoding))
    tracks = read_source(path)
    assert list(tracks) == [Track("a.wav", tmp_path / "a.wav", 0.0, None, "calm, piano")]
    assert list(tracks.notes) == [f"{path}: {note}" for note in notes]


def test_errors_after_empty_rows_give_the_line_in_the_file(tmp_path: Path):
    manifest = write_csv(tmp_path, "sep=,\npath,start_s\n,\na.wav,0\n\n,\nb.wav,x\n")
    with pytest.raises(SourceError, match=r"row 2 \(line 7\): start_s must be a non-negative number"):
        read_source(manifest)


def test_a_csv_file_in_another_encoding_raises_with_the_remedy_for_excel(tmp_path: Path):
    (tmp_path / "m.csv").write_bytes("path,text\na.wav,café\n".encode("cp1252"))
    with pytest.raises(
        SourceError, match=r"row 1: the file is not a CSV file in UTF-8: .* in Excel, save it as `CSV UTF-8`"
    ):
        read_source(tmp_path / "m.csv")


def test_ids_of_several_sources_are_relative_to_their_common_folder(tmp_path: Path, monkeypatch):
    touch(tmp_path, "rock/a.wav", "rock/live/b.wav", "jazz/a.wav", "jazz/cover.jpg", "c.wav")
    monkeypatch.chdir(tmp_path)
    tracks = read_source(["c.wav", "rock", "jazz/*"], text="music")
    assert tracks.ids == ["c.wav", "rock/a.wav", "rock/live/b.wav", "jazz/a.wav"]
    assert [tracks.file(row) for row in range(4)] == [Path(id) for id in tracks.ids]
    assert list(tracks.texts) == ["music"] * 4
    assert tracks.ignored == 1
    assert len(tracks.notes) == 1
    assert read_source([tmp_path / "rock" / "a.wav", tmp_path / "rock" / "live" / "b.wav"]).ids == [
        "a.wav",
        "live/b.wav",
    ]
    for alone in ("c.wav", "rock", "jazz/*"):
        assert list(read_source([alone])) == list(read_source(alone))


def test_manifests_in_a_list_keep_their_rows(tmp_path: Path):
    touch(tmp_path, "x.wav", "deep/y.wav")
    write_csv(tmp_path, "path,id,text,start_s,end_s,duration_s\na.wav,first,slow,1,3,9\n", "one.csv")
    write_csv(tmp_path, "path\nb.wav\n", "two.csv")
    tracks = read_source([f"{tmp_path}/one.csv", f"{tmp_path}/two.csv", f"{tmp_path}/x.wav", f"{tmp_path}/deep/y.wav"])
    assert tracks.ids == ["first", "b.wav", "x.wav", "deep/y.wav"]
    assert tracks[0] == Track("first", tmp_path / "a.wav", 1.0, 2.0, "slow")
    assert str(tracks.file_duration_s.tolist()) == "[9.0, nan, nan, nan]"  # type: ignore[union-attr]
    assert read_source([f"{tmp_path}/two.csv", f"{tmp_path}/x.wav"]).file_duration_s is None


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ([], "the list of sources is empty"),
        (["a.wav", ""], "the source is empty"),
        (["a.wav", "gone.wav"], r"gone\.wav: no such file"),
        (["a.wav", "a.wav"], r"a\.wav: track 'a\.wav' is already in a\.wav; list each file once"),
        (["a.wav", "*.wav"], r"\*\.wav: track 'a\.wav' is already in a\.wav"),
        (["m.csv", "n.csv"], r"n\.csv: track '1' is already in m\.csv; .*give each manifest row a unique id"),
    ],
)
def test_a_list_with_duplicate_tracks_or_an_invalid_source_raises(sources, reason: str, tmp_path: Path, monkeypatch):
    touch(tmp_path, "a.wav")
    write_csv(tmp_path, "path,id\nx.wav,1\n", "m.csv")
    write_csv(tmp_path, "path,id\ny.wav,1\n", "n.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=reason):
        read_source(sources)
