"""Declared sizes in every container, chunks in unusual places, and Ogg checksums."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.audio.decoding import probe
from musicgen_eval.audio.formats.containers import DataChunk, check_data_size, data_chunk, kind_of
from musicgen_eval.audio.formats.ogg import ogg_checksum
from musicgen_eval.errors import AudioError

DATA = Path(__file__).parents[2] / "data" / "audio"


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("u8_8000_mono.wav", 12000), ("s24_96000.wav", 3 * 19200), ("rf64.wav", 2 * 17640), ("case.w64", 2 * 17640),
        ("case.aiff", 2 * 17640 + 8), ("case.au", 2 * 17640), ("case.caf", 2 * 17640 + 4), ("piped.wav", None),
    ],
)  # fmt: skip
def test_the_declared_size_is_found(name: str, num_bytes: int | None):
    with (DATA / name).open("rb") as file:
        chunk = data_chunk(file)
    assert chunk is not None
    assert chunk.num_bytes == num_bytes
    if num_bytes is not None:
        assert (DATA / name).stat().st_size - chunk.start - num_bytes in (0, 1)


@pytest.mark.parametrize("name", ["aac.m4a", "case.webm", "case.wma"])
def test_declared_ends_are_the_end_of_the_file(name: str):
    with (DATA / name).open("rb") as file:
        chunk = data_chunk(file)
    assert chunk is not None
    assert chunk.num_bytes is not None
    assert chunk.start + chunk.num_bytes == (DATA / name).stat().st_size


def riff(*chunks: tuple[bytes, bytes], order: str = "<", name: bytes = b"RIFF") -> bytes:
    body = b"".join(chunk + struct.pack(order + "I", len(data)) + data + bytes(len(data) & 1) for chunk, data in chunks)
    return name + struct.pack(order + "I", len(body) + 4) + b"WAVE" + body


def test_chunks_of_odd_length_before_the_audio_are_skipped():
    fmt = struct.pack("<HHIIHH", 1, 1, 8000, 8000, 1, 8)
    content = riff((b"LIST", b"abc"), (b"fmt ", fmt), (b"junk", b"x"), (b"data", bytes(11)), (b"id3 ", bytes(5)))
    assert data_chunk(io.BytesIO(content)) == DataChunk(content.index(b"data") + 8, 11)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_do_not_raise(content: bytes):
    for start in (b"", b"RIFF\0\0\0\0WAVE", b"FORM\0\0\0\0AIFF", b"caff\0\1\0\0", b".snd", b"\0\0\0\x20ftyp", b"OggS",
                  b"\x1a\x45\xdf\xa3", b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0"):  # fmt: skip
        kind_of(start + content)
        data_chunk(io.BytesIO(start + content))


@pytest.mark.parametrize("missing", [1, 1000])
def test_missing_bytes_at_the_end_are_detected(missing: int, tmp_path: Path):
    for name in ("s24_96000.wav", "rf64.wav", "case.w64", "case.aiff", "case.au", "case.caf", "aac.m4a", "case.wma"):
        content = (DATA / name).read_bytes()
        with (DATA / name).open("rb") as file:
            check_data_size(DATA / name, file)
        path = tmp_path / name
        path.write_bytes(content[:-missing])
        with pytest.raises(
            AudioError,
            match=rf"{name}: the file is truncated: its header declares \d+ bytes of audio, but the file has \d+",
        ):
            check_data_size(path, io.BytesIO(content[:-missing]))


def test_big_endian_wav_files_are_read(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 8000, endian="BIG", subtype="PCM_16")
    with (tmp_path / "a.wav").open("rb") as file:
        assert file.read(4) == b"RIFX"
        chunk = data_chunk(file)
    assert chunk is not None
    assert chunk.num_bytes == 200


@given(st.binary(max_size=300))
def test_ogg_checksums_equal_a_bitwise_computation(data: bytes):
    register = 0
    for byte in data:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1 ^ (0x04C11DB7 if register >> 31 else 0)) & 0xFFFFFFFF
    assert ogg_checksum(data) == register
    assert data == b"" or not any(data) or ogg_checksum(data) != zlib.crc32(data)


@pytest.mark.parametrize(
    ("format", "subtype"),
    [("NIST", "PCM_16"), ("NIST", "ULAW"), ("VOC", "PCM_16"), ("VOC", "ULAW"), ("AVR", "PCM_16"), ("MPC2K", "PCM_16"),
     ("MAT4", "PCM_16"), ("MAT5", "PCM_16"), ("SVX", "PCM_16"), ("WVE", "ALAW"), ("HTK", "PCM_16"), ("SDS", "PCM_16")],
)  # fmt: skip
@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_only_truncated_files_of_rare_formats_are_an_error(format: str, subtype: str, kept: float, tmp_path: Path):
    path = tmp_path / "a"
    soundfile.write(path, np.sin(np.arange(8000.0)), 8000, format=format, subtype=subtype)
    whole = probe(path)
    assert whole.format == f"{format}/{subtype}"
    assert 8000 <= whole.num_samples <= 8001  # VOC counts its terminator byte
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(AudioError, match=r"a: .*(truncated|not audio)"):
        probe(path)


@pytest.mark.parametrize("place", [1 << 44, (1 << 63) - 100, 1 << 70])
def test_a_chunk_with_an_impossible_size_is_ignored(place: int):
    content = b"caff\0\1\0\0" + b"junk" + min(place, (1 << 63) - 1).to_bytes(8, "big")
    assert data_chunk(io.BytesIO(content)) is None
