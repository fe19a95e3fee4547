"""Damaged and unusual audio files of many kinds, each with the expected outcome.

`make_bad_files` writes all of them into a folder, with the same bytes in each call. Sound files contain about a second of chords
and are written by soundfile and PyAV, or copied from `tests/data/audio`. Their bytes are damaged. The file is long because it is
a list.
"""

import os
import socket
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import av
import numpy as np
import soundfile

DATA = Path(__file__).parent.parent / "data" / "audio"
RATE_HZ = 32_000
NUM_SAMPLES = 16_000
SAMPLE_BYTES = {"PCM_U8": 1, "ULAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
SAMPLE_FORMATS = dict.fromkeys(("tta", "pcm_s16le", "flac", "libopus", "mp2"), "s16") | {"aac": "fltp"}
KINDS = (
    "whole", "cut", "flipped bytes", "zeroed", "spliced", "wrong header", "absurd rate", "channels", "huge length", "samples",
    "name", "not audio", "not a file", "odd but right",
)  # fmt: skip


@dataclass(frozen=True)
class BadFile:
    """A file and its expected outcome.

    Attributes:
        path: Path of the file.
        kind: One of `KINDS`.
        format: Format of the content.
        expected: `right` if the file must be read completely, `failure` if it must be an error, and `either` if both are accepted.
        samples: (N, C) float32 expected samples, within `tolerance`.
        num_samples: Expected number of samples if the file can be read. None means any number.
        is_track: False for a folder, which a source searches recursively.
    """

    path: Path
    kind: str
    format: str
    expected: Literal["right", "failure", "either"]
    samples: np.ndarray | None = None
    tolerance: float = 0.0
    num_samples: int | None = None
    is_track: bool = True


@dataclass(frozen=True)
class Sound:
    """An undamaged file, and properties that determine the outcome of damage.

    Attributes:
        name: Name of the file.
        content: Bytes of the file.
        samples: (N, C) float32 samples as written or decoded by PyAV, within `tolerance`.
        header_bytes: Position of the audio. Damage after it does not change the declared length.
        checked: True if checksums cover all bytes of the audio.
        plain: True if the audio is stored as samples, so that zero bytes are samples of 0.
    """

    name: str
    content: bytes
    samples: np.ndarray
    tolerance: float
    num_samples: int
    header_bytes: int = 64
    checked: bool = False
    plain: bool = False

    @property
    def format(self) -> str:
        return self.name.partition(".")[2]


def make_bad_files(folder: Path) -> list[BadFile]:
    """Writes all files into a folder.

    Args:
        folder: Folder, which is created.

    Returns:
        The files, ordered by kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sounds = make_sounds(folder / ".scratch")
    files = [
        *_of_sounds(folder, sounds),
        *_of_bytes(folder, "spliced", _spliced(sounds)),
        *_of_bytes(folder, "wrong header", _wrong_headers(sounds)),
        *_of_bytes(folder, "absurd rate", _absurd_rates(sounds)),
        *_of_bytes(folder, "channels", _channels(sounds)),
        *_of_bytes(folder, "huge length", _huge_lengths(sounds)),
        *_samples(folder),
        *_names(folder, sounds),
        *_of_bytes(folder, "not audio", _not_audio(sounds)),
        *_no_files(folder, sounds),
        *_of_bytes(folder, "odd but right", _odd_but_right(sounds)),
    ]
    assert {file.kind for file in files} == set(KINDS)
    assert len({file.path for file in files}) == len(files)
    return files


def music(num_samples: int = NUM_SAMPLES, num_channels: int = 1) -> np.ndarray:
    """Returns (N, C) float32 with a chord and a little noise, below full scale."""
    seconds = np.arange(num_samples) / RATE_HZ
    chord = sum(np.sin(2 * np.pi * hz * seconds) for hz in (220.0, 277.2, 329.6))
    noise = np.random.default_rng(num_samples).normal(0, 0.01, (num_samples, num_channels))
    return (0.2 * chord[:, None] + noise).astype(np.float32)  # type: ignore[index]


def make_sounds(scratch: Path) -> dict[str, Sound]:
    """Returns name -> undamaged file, one for each format."""
    scratch.mkdir(exist_ok=True)
    sounds: list[Sound] = []
    for name, format, subtype, tolerance in (
        ("u8.wav", "WAV", "PCM_U8", 2**-6), ("s16.wav", "WAV", "PCM_16", 2**-14), ("s24.wav", "WAV", "PCM_24", 2**-22),
        ("s32.wav", "WAV", "PCM_32", 2**-22), ("float32.wav", "WAV", "FLOAT", 0.0), ("float64.wav", "WAV", "DOUBLE", 0.0),
        ("s16.rf64", "RF64", "PCM_16", 2**-14), ("s16.w64", "W64", "PCM_16", 2**-14), ("s16.aiff", "AIFF", "PCM_16", 2**-14),
        ("s16.au", "AU", "PCM_16", 2**-14), ("s16.caf", "CAF", "PCM_16", 2**-14), ("ulaw.wav", "WAV", "ULAW", 0.03),
    ):  # fmt: skip
        samples = music()
        write_sound(scratch / name, samples, RATE_HZ, format=format, subtype=subtype)
        content = (scratch / name).read_bytes()
        header = len(content) - len(samples) * SAMPLE_BYTES[subtype]  # the audio comes last
        plain = subtype not in ("PCM_U8", "ULAW")
        sounds.append(Sound(name, content, samples, tolerance, len(samples), header_bytes=header, plain=plain))
    for name, format, subtype, tolerance in (
        ("s16.flac", "FLAC", "PCM_16", 2**-14),
        ("s24.flac", "FLAC", "PCM_24", 2**-22),
    ):
        samples = music()
        soundfile.write(scratch / name, samples, RATE_HZ, format=format, subtype=subtype)
        content = (scratch / name).read_bytes()
        frames = content.index(b"\xff\xf8", 42)  # after the blocks of metadata
        sounds.append(Sound(name, content, samples, tolerance, len(samples), header_bytes=frames, checked=True))
    for name, codec, container in (("wavpack.wv", "wavpack", "wv"), ("tta.tta", "tta", "tta"), ("alac.mka", "alac", "matroska"),
                                   ("pcm.mka", "pcm_s16le", "matroska")):  # fmt: skip
        samples = music()
        write_av(scratch / name, samples, codec=codec, container=container)
        content = (scratch / name).read_bytes()
        checked = codec in ("wavpack", "tta")
        sounds.append(
            Sound(name, content, samples, 2**-14, len(samples), header_bytes=len(content) // 3, checked=checked)
        )
    for name, file in (
        ("vorbis.ogg", "q5_48000.ogg"), ("opus.opus", "64k_44100.opus"), ("flac.ogg", "flac_in_ogg.ogg"),
        ("tagged.mp3", "cbr128.mp3"), ("untagged.mp3", "cbr8_8000.mp3"), ("layer2.mp2", "layer2.mp2"),
        ("aac.m4a", "aac.m4a"), ("alac.m4a", "alac.m4a"), ("adts.aac", "adts.aac"), ("opus.webm", "case.webm"),
        ("wma.wma", "case.wma"),
    ):  # fmt: skip
        # The Opus decoder of FFmpeg differs from libopus by up to 5e-2.
        samples = (
            soundfile.read(DATA / file, dtype="float32", always_2d=True)[0]
            if "opus.o" in name
            else decoded(DATA / file)
        )
        content = (DATA / file).read_bytes()
        checked = content[:4] == b"OggS"
        sounds.append(
            Sound(name, content, samples, 2e-3, len(samples), header_bytes=len(content) // 3, checked=checked)
        )
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()
    return {sound.name: sound for sound in sounds}


def write_sound(path: Path, samples: np.ndarray, rate_hz: int, *, subtype: str, format: str | None = None) -> None:
    """Writes (N, C) samples with soundfile, with the same bytes in each call."""
    soundfile.write(path, samples, rate_hz, format=format, subtype=subtype)
    content = path.read_bytes()
    at = content.find(b"PEAK")
    if 0 < at < 100:  # this chunk contains the time of writing
        path.write_bytes(content[: at + 12] + bytes(4) + content[at + 16 :])


def write_av(path: Path, samples: np.ndarray, *, codec: str, container: str, rate_hz: int = RATE_HZ) -> None:
    """Encodes (N, C) float32 with PyAV, with the same bytes in each call."""
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    with av.open(str(path), "w", format=container, options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream(codec, rate=rate_hz, layout=layout)
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        stream.codec_context.format = SAMPLE_FORMATS.get(codec, "s16p")
        for start in range(0, len(samples), 1024):
            part = np.ascontiguousarray(samples[start : start + 1024].T)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate_hz, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def decoded(path: Path) -> np.ndarray:
    """Decodes a file with PyAV to (N, C) float32."""
    with av.open(str(path)) as file:
        frames = list(file.decode(audio=0))
    resampler = av.AudioResampler(format="fltp", layout=frames[0].layout, rate=frames[0].sample_rate)
    blocks = [block.to_ndarray() for frame in [*frames, None] for block in resampler.resample(frame)]
    return np.concatenate(blocks, axis=1).T


def _of_sounds(folder: Path, sounds: dict[str, Sound]) -> Iterator[BadFile]:
    """Yields each format undamaged, truncated, with flipped bytes in header and audio, and partly zeroed."""
    for number, sound in enumerate(sounds.values()):
        generator = np.random.default_rng(number)
        content, size = sound.content, len(sound.content)
        whole = BadFile(
            Path(), "whole", sound.format, "right", sound.samples, sound.tolerance, num_samples=sound.num_samples
        )
        yield _write(folder / "whole" / sound.name, content, whole)
        for place, kept in (("header", 20), ("third", size // 3 + 1), ("most", size * 4 // 5), ("byte", size - 1)):
            yield _write(
                folder / "cut" / f"{place}_{sound.name}",
                content[:kept],
                replace(whole, kind="cut", expected="failure", samples=None),
            )
        unknown = replace(whole, expected="either", samples=None)
        for place, first, end in (("header", 0, min(sound.header_bytes, 200)), ("audio", sound.header_bytes, size)):
            flipped = bytearray(content)
            for at in generator.integers(first, end, 2 if place == "header" else 8).tolist():
                flipped[at] ^= 1 << int(generator.integers(8))
            file = replace(unknown, kind="flipped bytes", num_samples=None if place == "header" else sound.num_samples)
            if place == "audio" and sound.checked:
                file = replace(file, expected="failure")
            yield _write(folder / "flipped" / f"{place}_{sound.name}", bytes(flipped), file)
        first = sound.header_bytes + (size - sound.header_bytes) // 2 // 24 * 24
        zeroed = content[:first] + bytes(480) + content[first + 480 :]
        file = replace(unknown, kind="zeroed", expected="failure" if sound.checked else "either")
        if sound.plain:
            width = (size - sound.header_bytes) // len(sound.samples)
            samples = sound.samples.copy()
            samples[(first - sound.header_bytes) // width :][: 480 // width] = 0
            file = replace(file, expected="right", samples=samples)
        yield _write(folder / "zeroed" / sound.name, zeroed, file)


def _of_bytes(
    folder: Path, kind: str, files: Iterator[tuple[str, bytes, str] | tuple[str, bytes, str, np.ndarray, float]]
) -> Iterator[BadFile]:
    """Yields files of one kind from (name, bytes, expected), followed by samples and tolerance if they are right."""
    for name, content, expected, *known in files:
        samples, tolerance = known if known else (None, 0.0)
        file = BadFile(Path(), kind, name.rpartition(".")[2], expected, samples, tolerance)  # type: ignore[arg-type]
        if samples is not None:
            file = replace(file, num_samples=len(samples))
        yield _write(folder / kind.replace(" ", "_") / name, content, file)


def _write(path: Path, content: bytes, file: BadFile) -> BadFile:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return replace(file, path=path)


def _spliced(sounds: dict[str, Sound]) -> Iterator[tuple[str, bytes, str]]:
    """Yields files with the header of another format, and with pieces removed, doubled and inserted."""
    wav, ogg, mp3, aac = (sounds[name].content for name in ("s16.wav", "vorbis.ogg", "tagged.mp3", "aac.m4a"))
    yield "wav_header_mp3_body.wav", wav[:44] + mp3, "either"  # valid, but noise
    yield "ogg_header_wav_body.ogg", ogg[:1000] + wav, "failure"
    yield "m4a_header_ogg_body.m4a", aac[:200] + ogg, "failure"
    yield "flac_magic_on_wav.flac", b"fLaC" + wav, "failure"
    for name in ("s16.flac", "vorbis.ogg", "opus.opus", "tagged.mp3", "aac.m4a", "opus.webm", "wma.wma", "wavpack.wv"):
        content = sounds[name].content
        middle = len(content) // 2
        yield f"left_out_{name}", content[:middle] + content[middle + 700 :], "failure"
    for name in ("s16.flac", "vorbis.ogg", "tagged.mp3", "tta.tta"):
        content = sounds[name].content
        middle = len(content) // 2
        yield f"put_in_{name}", content[:middle] + np.random.default_rng(0).bytes(700) + content[middle:], "failure"
    yield "joined.ogg", ogg + ogg, "failure"
    yield "joined_tagged.mp3", (DATA / "joined_tagged.mp3").read_bytes(), "failure"
    yield "joined.wav", wav + wav, "failure"
    yield "joined.flac", sounds["s16.flac"].content + (DATA / "case.flac").read_bytes(), "failure"
    yield "joined.m4a", aac + aac, "either"


def riff(*chunks: tuple[bytes, bytes], num_bytes: int | None = None) -> bytes:
    """Returns a RIFF file of (name, content) chunks."""
    body = b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) & 1) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4 if num_bytes is None else num_bytes) + b"WAVE" + body


def fmt(
    *, coding: int = 1, channels: int = 1, rate_hz: int = RATE_HZ, block: int | None = None, bits: int = 16
) -> tuple[bytes, bytes]:
    """Returns the format chunk of a wav file with arbitrary values."""
    block = channels * bits // 8 & 0xFFFF if block is None else block
    return b"fmt ", struct.pack("<HHIIHH", coding, channels, rate_hz, rate_hz * block & 0xFFFFFFFF, block, bits)


def _wrong_headers(sounds: dict[str, Sound]) -> Iterator[tuple[str, bytes, str]]:
    data = b"data", np.round(music()[:, 0] * 32767).astype("<i2").tobytes()
    for bits in (0, 7, 65, 65535):
        yield f"bits_{bits}.wav", riff(fmt(bits=bits, block=2), data), "either" if bits == 7 else "failure"
    yield "coding_65535.wav", riff(fmt(coding=0xFFFF), data), "failure"
    yield "coding_mp3.wav", riff(fmt(coding=0x55), data), "failure"
    yield "block_0.wav", riff(fmt(block=0), data), "either"
    yield "no_fmt.wav", riff(data), "failure"
    yield "data_before_fmt.wav", riff(data, fmt()), "failure"
    yield "no_data.wav", riff(fmt()), "failure"
    yield "empty_data.wav", riff(fmt(), (b"data", b"")), "failure"
    yield "size_0_never_closed.wav", riff(fmt(), (b"data", b""))[:-4] + bytes(4) + data[1], "failure"
    yield "short_fmt.wav", riff((b"fmt ", fmt()[1][:8]), data), "failure"
    yield "chunk_beyond_the_end.wav", riff(fmt(), (b"junk", b""))[:-4] + b"\xf0\xff\xff\x7f" + data[1], "failure"
    yield "only_riff.wav", b"RIFF", "failure"
    mp3, vorbis = sounds["tagged.mp3"].content, sounds["vorbis.ogg"].content
    at = mp3.index(b"Info") + 8
    yield "few_frames.mp3", mp3[:at] + struct.pack(">I", 5) + mp3[at + 4 :], "failure"
    at = vorbis.rindex(b"OggS")
    last = vorbis[at : at + 6] + struct.pack("<q", 2 * len(sounds["vorbis.ogg"].samples)) + vorbis[at + 14 :]
    yield "twice.ogg", vorbis[:at] + ogg_page(last), "failure"
    # Frames can be counted without the tag, and AAC is recognised by its own header.
    known = {("tagged.mp3", b"Info"), ("aac.m4a", b"mp4a")}
    for name, place, patch in (
        ("s16.aiff", b"COMM", b"\xff\xff\xff\xff"), ("s16.caf", b"desc", bytes(40)), ("s16.au", b".snd", b"\xff" * 20),
        ("s16.w64", b"fmt ", b"\xff" * 30), ("s16.rf64", b"fmt ", bytes(16)), ("s16.flac", b"fLaC", b"\xff" * 12),
        ("vorbis.ogg", b"vorbis", b"VORBIS"), ("opus.opus", b"OpusHead", b"\xff" * 12), ("tagged.mp3", b"Info", b"\xff" * 12),
        ("aac.m4a", b"moov", b"moof"), ("aac.m4a", b"mp4a", b"xxxx"), ("aac.m4a", b"stsz", bytes(24)),
        ("aac.m4a", b"stts", bytes(24)), ("alac.m4a", b"stco", b"\xff" * 16), ("opus.webm", b"A_OPUS", b"A_NONE"),
        ("wavpack.wv", b"wvpk", b"\xff" * 24),
    ):  # fmt: skip
        content = sounds[name].content
        at = content.index(place) + (4 if patch[:1] in (b"\0", b"\xff") else 0)
        patched = content[:at] + patch + content[at + len(patch) :]
        yield f"{place.decode().strip(' .')}_{name}", patched, "either" if (name, place) in known else "failure"


def _absurd_rates(sounds: dict[str, Sound]) -> Iterator[tuple[str, bytes, str]]:
    data = b"data", np.round(music()[:, 0] * 32767).astype("<i2").tobytes()
    for rate_hz in (0, 1, 999, 768_001, 2**31, 4_000_000_000, 2**32 - 1):
        yield f"{rate_hz}.wav", riff(fmt(rate_hz=rate_hz), data), "failure"
    for rate_hz in (0, 1, 4_000_000_000):
        au = sounds["s16.au"].content
        yield f"{rate_hz}.au", au[:16] + struct.pack(">I", rate_hz) + au[20:], "failure"
    caf, aiff, m4a = (sounds[name].content for name in ("s16.caf", "s16.aiff", "aac.m4a"))
    for word, value in (
        ("zero", 0.0),
        ("nan", float("nan")),
        ("inf", float("inf")),
        ("negative", -44100.0),
        ("huge", 1e300),
    ):
        yield f"{word}.caf", caf[:20] + struct.pack(">d", value) + caf[28:], "failure"
    at = aiff.index(b"COMM") + 16
    for word, rate in (("zero", bytes(10)), ("inf", b"\x7f\xff" + bytes(8)), ("huge", b"\x40\x3e\xff" + bytes(7))):
        yield f"{word}.aiff", aiff[:at] + rate + aiff[at + 10 :], "failure"
    at = m4a.index(b"mdhd") + 16
    yield "timescale_0.m4a", m4a[:at] + bytes(4) + m4a[at + 4 :], "either"
    yield "rate_0.ogg", with_first_page(sounds["vorbis.ogg"].content, 28 + 12, bytes(4)), "failure"


def with_first_page(ogg: bytes, at: int, patch: bytes) -> bytes:
    """Returns an Ogg file with other bytes in its first page, and their checksum."""
    size = 27 + ogg[26] + sum(ogg[27 : 27 + ogg[26]])
    page = ogg[:at] + patch + ogg[at + len(patch) : size]
    return ogg_page(page) + ogg[size:]


def ogg_page(page: bytes) -> bytes:
    """Returns an Ogg page with its checksum, computed bit by bit."""
    register = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1 ^ (0x04C11DB7 if register >> 31 else 0)) & 0xFFFFFFFF
    return page[:22] + struct.pack("<I", register) + page[26:]


def _channels(sounds: dict[str, Sound]) -> Iterator[tuple[str, bytes, str]]:
    data = b"data", np.round(music()[:, 0] * 32767).astype("<i2").tobytes()
    for channels in (0, 3, 6, 255, 1025, 65535):
        yield f"{channels}.wav", riff(fmt(channels=channels), data), "failure"
    for channels in (0, 3, 2**31, 2**32 - 1):
        au = sounds["s16.au"].content
        yield f"{channels}.au", au[:20] + struct.pack(">I", channels) + au[24:], "failure"
    aiff = sounds["s16.aiff"].content
    at = aiff.index(b"COMM") + 8
    for channels in (0, 255):
        yield f"{channels}.aiff", aiff[:at] + struct.pack(">H", channels) + aiff[at + 2 :], "failure"
    for channels in (0, 255):
        vorbis = sounds["vorbis.ogg"].content
        yield f"{channels}.ogg", with_first_page(vorbis, 28 + 11, bytes([channels])), "failure"


def _huge_lengths(sounds: dict[str, Sound]) -> Iterator[tuple[str, bytes, str]]:
    """Yields files whose headers declare impossibly large lengths."""
    data = b"data", np.round(music()[:, 0] * 32767).astype("<i2").tobytes()
    for num_bytes in (len(data[1]) + 2, 0x70000000, 0xFFFFFFF0):
        content = riff(fmt(), (b"data", b""))[:-4] + struct.pack("<I", num_bytes) + data[1]
        yield f"{num_bytes}.wav", content, "failure"
    rf64, w64, caf, au = (sounds[f"s16.{name}"].content for name in ("rf64", "w64", "caf", "au"))
    at = rf64.index(b"ds64") + 16
    huge_rf64 = rf64[:at] + struct.pack("<QQ", 2**40, 2**40) + rf64[at + 16 :]
    at = huge_rf64.index(b"data") + 4
    yield "2_40.rf64", huge_rf64[:at] + b"\xff" * 4 + huge_rf64[at + 4 :], "failure"
    for power in (40, 62):
        at = w64.index(b"data") + 16
        yield f"2_{power}.w64", w64[:at] + struct.pack("<Q", 2**power) + w64[at + 8 :], "failure"
        at = caf.index(b"data") + 4
        yield f"2_{power}.caf", caf[:at] + struct.pack(">q", 2**power) + caf[at + 8 :], "failure"
        at = caf.index(b"free") + 4 if b"free" in caf else 56
        yield f"chunk_2_{power}.caf", caf[:at] + struct.pack(">q", 2**power) + caf[at + 8 :], "failure"
    yield "2_32.au", au[:8] + struct.pack(">I", 0xFFFFFFFE) + au[12:], "failure"
    yield "offset.au", au[:4] + struct.pack(">I", 0xFFFFFFF0) + au[8:], "failure"
    flac = sounds["s16.flac"].content
    yield "2_36.flac", flac[:21] + bytes((flac[21] | 0x0F,)) + b"\xff" * 4 + flac[26:], "failure"
    yield "short.flac", flac[:21] + bytes((flac[21] & 0xF0,)) + struct.pack(">I", 1000) + flac[26:], "failure"
    vorbis = sounds["vorbis.ogg"].content
    at = vorbis.rindex(b"OggS")
    last = vorbis[at : at + 6] + struct.pack("<q", 2**60) + vorbis[at + 14 :]
    yield "2_60_damaged.ogg", vorbis[:at] + last, "failure"
    yield "2_60.ogg", vorbis[:at] + ogg_page(last), "failure"
    last = vorbis[at : at + 6] + struct.pack("<q", 2 * len(sounds["vorbis.ogg"].samples)) + vorbis[at + 14 :]
    yield "twice_damaged.ogg", vorbis[:at] + last, "failure"
    mp3, m4a = sounds["tagged.mp3"].content, sounds["aac.m4a"].content
    at = mp3.index(b"Info") + 8
    yield "2_32_frames.mp3", mp3[:at] + b"\xff" * 4 + mp3[at + 4 :], "failure"
    yield "2_17_frames.mp3", mp3[:at] + struct.pack(">I", 2**17) + mp3[at + 4 :], "failure"
    yield "id3.mp3", b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + mp3, "failure"
    yield "box_2_63.m4a", m4a[:28] + b"\0\0\0\1mdat" + struct.pack(">Q", 2**63) + m4a[28:], "failure"
    yield "box_0.m4a", bytes(4) + m4a[4:], "either"
    at = m4a.index(b"mdhd") + 20
    yield (
        "duration.m4a",
        m4a[:at] + b"\xff\xff\xff\xf0" + m4a[at + 4 :],
        "either",
    )  # the table of packets contains the length too


def _samples(folder: Path) -> Iterator[BadFile]:
    """Yields undamaged files with silence, steps, non-finite values or very few samples."""
    level = np.ones((NUM_SAMPLES, 1))
    ramp = np.linspace(-1, 1, NUM_SAMPLES)[:, None]
    cases: list[tuple[str, np.ndarray, str, float]] = [
        ("silence.wav", 0 * level, "PCM_16", 0), ("silence.flac", 0 * level, "PCM_16", 0), ("dc.wav", 0.5 * level, "PCM_16", 0),
        ("full_scale.wav", np.sign(ramp), "PCM_16", 2**-15), ("full_scale_u8.wav", np.sign(ramp), "PCM_U8", 2**-6),
        ("full_scale_24.wav", np.sign(ramp), "PCM_24", 2**-22), ("full_scale_32.wav", np.sign(ramp), "PCM_32", 2**-22),
        ("beyond_1.wav", 3 * ramp, "FLOAT", 1e-6), ("beyond_1_double.wav", 3 * ramp, "DOUBLE", 1e-6),
        ("denormal.wav", 1e-40 * ramp, "FLOAT", 1e-44), ("denormal_double.wav", 1e-310 * ramp, "DOUBLE", 1e-44),
        ("minus_zero.wav", -0.0 * level, "FLOAT", 0), ("one_step.wav", 2.0**-15 * np.round(ramp), "PCM_16", 0),
        ("one_channel_silent.wav", np.hstack([ramp, 0 * ramp]), "FLOAT", 1e-6),
        ("opposite_channels.wav", np.hstack([ramp, -ramp]), "FLOAT", 1e-6),
    ]  # fmt: skip
    for num in (1, 2, 639, 640, 641, 1279):
        cases += [(f"{num}.wav", music(num), "PCM_16", 2**-14), (f"{num}.flac", music(num), "PCM_16", 2**-14)]
    directory = folder / "samples"
    directory.mkdir()
    for name, samples, subtype, tolerance in cases:
        path = directory / name
        write_sound(path, samples, RATE_HZ, subtype=subtype)
        expected = samples.astype(np.float32)
        yield BadFile(path, "samples", path.suffix[1:], "right", expected, tolerance, len(samples))
    for rate_hz in (1000, 8000, 11025, 44056, 96000, 192_000, 768_000):
        path = directory / f"rate_{rate_hz}.wav"
        write_sound(path, music(), rate_hz, subtype="PCM_16")
        yield BadFile(path, "samples", "wav", "right", music(), 2**-14, NUM_SAMPLES)
    for word, value in (
        ("nan", np.nan),
        ("inf", np.inf),
        ("minus_inf", -np.inf),
        ("1e30", 1e30),
        ("unscaled", 32767.0),
    ):
        samples = music()
        samples[12_345] = value
        for subtype in ("FLOAT", "DOUBLE"):
            path = directory / f"{word}_{subtype.lower()}.wav"
            write_sound(path, samples, RATE_HZ, subtype=subtype)
            yield BadFile(path, "samples", "wav", "failure")


def _names(folder: Path, sounds: dict[str, Sound]) -> Iterator[BadFile]:
    """Yields files with unusual names that a file system allows."""
    directory = folder / "names"
    directory.mkdir()
    names = [
        b"spaces in  it", b" leading and trailing ", b"'single' \"double\" `back`", b"new\nline", b"tab\tand\rreturn",
        "Größe, naïve".encode(), "音楽".encode(), "emoji 🎵🎶".encode(), "e\u0301 combining, ‮right to left".encode(),
        b"latin-1 \xe9\xff", b"\xf0\x9f broken utf-8", b"-rf", b"--config", b"100%s %d {x} $HOME", b"*[x]?", b"back\\slash",
        b"a;b|c&d<e>", b"#hash", b"http:", b"C:", b"two..dots", b"NUL", b"\x01\x7f control", b"no.ending.",
    ]  # fmt: skip
    chosen = [sounds[name] for name in ("s16.wav", "s16.flac", "vorbis.ogg", "tagged.mp3", "aac.m4a")]
    for number, name in enumerate(names):
        sound = chosen[number % len(chosen)]
        ending = b"." + sound.format.encode()
        path = directory / os.fsdecode(name + ending)
        file = BadFile(path, "name", sound.format, "right", sound.samples, sound.tolerance, sound.num_samples)
        yield _write(path, sound.content, file)
        if number % 3 == 0:
            path = directory / os.fsdecode(name + b" cut" + ending)
            yield _write(path, sound.content[: len(sound.content) // 2], BadFile(path, "name", sound.format, "failure"))
    for sound in chosen:
        longest = b"n" * (254 - len(sound.format)) + b"." + sound.format.encode()
        path = directory / os.fsdecode(longest)
        file = BadFile(path, "name", sound.format, "right", sound.samples, sound.tolerance, sound.num_samples)
        yield _write(path, sound.content, file)


def _not_audio(sounds: dict[str, Sound]) -> Iterator[tuple[str, bytes, str]]:
    png = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + bytes(13)
        + struct.pack(">I", zlib.crc32(b"IHDR" + bytes(13)))
    )
    noise = np.random.default_rng(5).bytes(20_000)
    for ending in ("wav", "mp3", "ogg", "flac", "m4a"):
        yield f"empty.{ending}", b"", "failure"
        yield f"zeros.{ending}", bytes(20_000), "failure"
        yield f"text.{ending}", b"These are the lyrics,\nnot the music.\n" * 50, "failure"
        yield f"png.{ending}", png + bytes(2000), "failure"
        yield f"noise.{ending}", noise, "failure"
    yield "ones.mp3", b"\xff" * 20_000, "failure"
    yield "zip.mp3", b"PK\x03\x04" + noise, "failure"
    yield "page.mp3", b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n", "failure"
    yield "id3_alone.mp3", b"ID3\x04\0\0\0\0\x01\0" + bytes(128), "failure"
    yield "one_header.mp3", b"\xff\xfb\x90\x64", "failure"
    yield "tag_alone.mp3", sounds["tagged.mp3"].content[:417], "failure"
    yield "one_byte.wav", b"R", "failure"
    yield "lfs.wav", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n", "failure"


def _no_files(folder: Path, sounds: dict[str, Sound]) -> Iterator[BadFile]:
    """Yields folders, links, fifos and sockets with the name of an audio file."""
    directory = folder / "not_a_file"
    directory.mkdir()

    def path_of(name: str, expected: Literal["right", "failure"] = "failure", *, is_track: bool = True) -> BadFile:
        return BadFile(directory / name, "not a file", name.rpartition(".")[2], expected, is_track=is_track)

    for name in ("folder.wav", "folder.mp3"):
        (directory / name).mkdir()
        yield path_of(name, is_track=False)
    os.mkfifo(directory / "fifo.wav")
    yield path_of("fifo.wav")
    here = Path.cwd()
    os.chdir(directory)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.ogg")
    finally:
        os.chdir(here)
    yield path_of("socket.ogg")
    for name, target in (
        ("dangling.wav", "gone.wav"), ("itself.wav", "itself.wav"), ("there.mp3", "back.mp3"), ("back.mp3", "there.mp3"),
        ("device.wav", "/dev/zero"), ("null.wav", "/dev/null"), ("through_a_file.wav", "../whole/s16.wav/x.wav"),
    ):  # fmt: skip
        (directory / name).symlink_to(target)
        yield path_of(name)
    for name, target in (("to_a_folder.wav", "../whole"), ("loop.wav", ".")):
        (directory / name).symlink_to(target)
        yield path_of(name, is_track=False)
    sound = sounds["s16.wav"]
    (directory / "link.wav").symlink_to("../whole/s16.wav")
    yield replace(
        path_of("link.wav", "right"), samples=sound.samples, tolerance=sound.tolerance, num_samples=NUM_SAMPLES
    )
    unreadable = directory / "unreadable.wav"
    unreadable.write_bytes(sound.content)
    unreadable.chmod(0)
    file = path_of("unreadable.wav", "right" if os.access(unreadable, os.R_OK) else "failure")
    yield replace(file, samples=sound.samples, tolerance=sound.tolerance) if file.expected == "right" else file


def _odd_but_right(sounds: dict[str, Sound]) -> Iterator[tuple[str, bytes, str, np.ndarray, float]]:
    """Yields files that look damaged but are valid."""
    samples, tolerance = music(), 2**-14
    data = b"data", np.round(samples[:, 0] * 32767).astype("<i2").tobytes()
    for name, content in {
        "chunks_before.wav": riff((b"LIST", b"abc"), fmt(), (b"junk", b"x"), data),
        "chunks_behind.wav": riff(fmt(), data, (b"id3 ", bytes(77)), (b"LIST", bytes(5))),
        "riff_size_0.wav": riff(fmt(), data, num_bytes=0),
        "riff_size_unknown.wav": riff(fmt(), data, num_bytes=0xFFFFFFFF),
        "piped.wav": riff(fmt(), (b"data", b""), num_bytes=0xFFFFFFFF)[:-4] + b"\xff" * 4 + data[1],
        "bytes_behind.wav": riff(fmt(), data) + b"what somebody left here" * 20,
        "extensible.wav": riff(
            (
                b"fmt ",
                fmt(coding=0xFFFE)[1]
                + struct.pack("<HHI", 22, 16, 4)
                + b"\1\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71",
            ),
            data,
        ),
        "rate_of_bytes_wrong.wav": riff((b"fmt ", fmt()[1][:8] + bytes(4) + fmt()[1][12:]), data),
        "unknown_length.au": sounds["s16.au"].content[:8] + b"\xff" * 4 + sounds["s16.au"].content[12:],
    }.items():
        yield name, content, "right", samples, tolerance
    flac = sounds["s16.flac"]
    piped = flac.content[:21] + bytes((flac.content[21] & 0xF0,)) + bytes(4) + flac.content[26:]
    yield "piped.flac", piped, "right", flac.samples, flac.tolerance
    for name, other in (("s16.wav", "mp3"), ("s16.flac", "wav"), ("vorbis.ogg", "mp3"), ("tagged.mp3", "wav"), ("aac.m4a", "mp3"),
                        ("opus.webm", "ogg"), ("wma.wma", "flac")):  # fmt: skip
        sound = sounds[name]
        yield f"is_{sound.format}.{other}", sound.content, "right", sound.samples, sound.tolerance
    mp3 = sounds["tagged.mp3"]
    for name, before, behind in (
        ("id3.mp3", b"ID3\x04\0\0\0\0\x01\x00" + bytes(128), b""), ("id3v1.mp3", b"", b"TAG" + bytes(125)),
    ):  # fmt: skip
        yield name, before + mp3.content + behind, "right", mp3.samples, mp3.tolerance
    at = mp3.content.index(b"Info") + 8
    num_frames = int.from_bytes(mp3.content[at : at + 4], "big")
    for off in (-1, 1):  # some writers count the frame of the tag
        content = mp3.content[:at] + struct.pack(">I", num_frames + off) + mp3.content[at + 4 :]
        yield f"miscounted_{off}.mp3", content, "right", mp3.samples, mp3.tolerance
    untagged = sounds["untagged.mp3"]
    yield "ape_behind.mp3", untagged.content + b"APETAGEX" + bytes(200), "right", untagged.samples, untagged.tolerance
    yield "zeros_before.mp3", bytes(3000) + untagged.content, "right", untagged.samples, untagged.tolerance
