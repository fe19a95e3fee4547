"""Writes tests/data/audio with the encoders of Debian packages, and shows the files that a plain seek reads incorrectly.

    apt-get install lame vorbis-tools opus-tools flac sox ffmpeg
    python tools/make_audio_cases.py [--only PATTERN] [--show]

The music is synthetic, short and the same in each call. Other versions of an encoder write other bytes, which the tests accept.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

DATA = Path(__file__).parent.parent / "tests" / "data" / "audio"
Make = Callable[[Path, Path], None]  # takes a folder for intermediate files, and the file to write


def main() -> None:
    """Writes the files and prints the number of incorrect seeks of soundfile, of 200 per file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="write only the files that match a glob pattern")
    parser.add_argument("--show", action="store_true", help="write nothing, only show the table")
    arguments = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    for name, make in CASES.items():
        if not fnmatch.fnmatch(name, arguments.only):
            continue
        if not arguments.show:
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder), DATA / name)
        print(f"{name:32} {(DATA / name).stat().st_size:8} bytes  {naive_seeks(DATA / name)}")
    print(f"{sum(path.stat().st_size for path in DATA.iterdir()):41} bytes in total")


def music(seconds: float, rate_hz: int, num_channels: int, *, silence_s: float = 0.0, seed: int = 0) -> np.ndarray:
    """Returns (N, C) float32 with plucked tones and bursts of noise after a silence."""
    generator = np.random.default_rng(seed)
    num_samples = round(seconds * rate_hz)
    time_s = np.arange(num_samples) / rate_hz
    audio = np.zeros((num_samples, num_channels))
    for channel in range(num_channels):
        for _ in range(10):
            frequency_hz, decay, amplitude = generator.uniform((60, 3, 0.02), (min(8000, 0.4 * rate_hz), 20, 0.1))
            pluck = np.exp(-decay * ((time_s - generator.uniform(0, seconds)) % 0.7))
            audio[:, channel] += amplitude * pluck * np.sin(2 * np.pi * frequency_hz * time_s + generator.uniform(0, 6))
        audio[:, channel] += 0.05 * generator.standard_normal(num_samples) * (time_s % 0.5 < 0.08)
    audio[: round(silence_s * rate_hz)] = 0
    return (0.7 * audio / np.abs(audio).max()).astype(np.float32)


def naive_seeks(path: Path, num_seeks: int = 200) -> str:
    """Describes how a seek and a read in a newly opened file differ from the same part of the whole file."""
    try:
        with soundfile.SoundFile(path) as sound:
            num_samples = sound.frames
            whole = sound.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, ValueError, MemoryError) as error:
        return f"soundfile: {error}"
    generator = np.random.default_rng(0)
    num_wrong, worst = 0, 0.0
    for start in generator.integers(0, len(whole), num_seeks).tolist():
        with soundfile.SoundFile(path) as sound:
            try:
                sound.seek(start)
                part = sound.read(2000, dtype="float32", always_2d=True)
            except soundfile.SoundFileError:
                num_wrong += 1
                continue
        expected = whole[start : start + 2000]
        difference = float(np.abs(part - expected).max()) if len(part) == len(expected) else np.inf
        num_wrong += difference > 1e-6
        worst = max(worst, difference)
    declared = "" if num_samples == len(whole) else f", declares {num_samples} samples and has {len(whole)}"
    return f"soundfile: {num_wrong} of {num_seeks} seeks incorrect, by up to {worst:.0e}{declared}"


def run(*command: str | Path, stdout: Path | None = None) -> None:
    """Runs an encoder. With `stdout`, it writes to a pipe and cannot seek back to write a length."""
    arguments = [str(part) for part in command]
    if stdout is None:
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return
    finished = subprocess.run(arguments, check=True, capture_output=True)
    stdout.write_bytes(finished.stdout)


def wav(folder: Path, audio: np.ndarray, rate_hz: int) -> Path:
    """Writes the music as a 16-bit wav file, the input of an encoder."""
    path = folder / "music.wav"
    soundfile.write(path, audio, rate_hz, subtype="PCM_16")
    return path


def with_soundfile(coding: str, rate_hz: int, num_channels: int, seconds: float, container: str = "WAV") -> Make:
    """Returns a function that writes a file with soundfile."""

    def make(folder: Path, path: Path) -> None:
        audio = music(seconds, rate_hz, num_channels, seed=len(path.name))
        soundfile.write(path, audio, rate_hz, subtype=coding, format=container)

    return make


def with_lame(
    *options: str, seconds: float = 4.0, silence_s: float = 0.0, rate_hz: int = 44100, channels: int = 2
) -> Make:
    """Returns a function that writes a file with LAME, which adds an Info or Xing tag unless `-t` is given."""

    def make(folder: Path, path: Path) -> None:
        source = wav(folder, music(seconds, rate_hz, channels, silence_s=silence_s), rate_hz)
        run("lame", "--quiet", *options, source, path)

    return make


def with_ffmpeg(
    *options: str, seconds: float = 2.0, rate_hz: int = 44100, channels: int = 2, piped: str | None = None
) -> Make:
    """Returns a function that writes a file with ffmpeg. `piped` is the format if it writes to a pipe."""

    def make(folder: Path, path: Path) -> None:
        source = wav(folder, music(seconds, rate_hz, channels), rate_hz)
        start = ("ffmpeg", "-loglevel", "error", "-y", "-i", source, "-fflags", "+bitexact", "-flags:a", "+bitexact")
        if piped is None:
            run(*start, *options, path)
        else:
            run(*start, *options, "-f", piped, "-", stdout=path)

    return make


def with_tool(*command: str, seconds: float, rate_hz: int, channels: int = 2) -> Make:
    """Returns a function that writes a file with another encoder. `{in}` and `{out}` are replaced by the files."""

    def make(folder: Path, path: Path) -> None:
        source = wav(folder, music(seconds, rate_hz, channels), rate_hz)
        run(*(part.replace("{in}", str(source)).replace("{out}", str(path)) for part in command))

    return make


def joined(first: Make, second: Make) -> Make:
    """Returns a function that writes two files as one."""

    def make(folder: Path, path: Path) -> None:
        parts = [folder / f"{number}{path.suffix}" for number in range(2)]
        for part, make_part in zip(parts, (first, second), strict=True):
            make_part(folder, part)
        path.write_bytes(b"".join(part.read_bytes() for part in parts))

    return make


def oggenc(quality: float, seconds: float, rate_hz: int, channels: int = 2) -> Make:
    """Returns a function that writes Vorbis in Ogg."""
    command = ("oggenc", "-Q", "--serial", "1", "-q", str(quality), "-o", "{out}", "{in}")
    return with_tool(*command, seconds=seconds, rate_hz=rate_hz, channels=channels)


def opusenc(kbit_per_s: float, seconds: float, rate_hz: int, channels: int = 2) -> Make:
    """Returns a function that writes Opus in Ogg."""
    command = ("opusenc", "--quiet", "--serial", "1", "--bitrate", str(kbit_per_s), "{in}", "{out}")
    return with_tool(*command, seconds=seconds, rate_hz=rate_hz, channels=channels)


CASES: dict[str, Make] = {
    "u8_8000_mono.wav": with_soundfile("PCM_U8", 8000, 1, 1.5),
    "s16_44056.wav": with_soundfile("PCM_16", 44056, 1, 0.6),
    "s24_96000.wav": with_soundfile("PCM_24", 96000, 1, 0.2),
    "s32_22050.wav": with_soundfile("PCM_32", 22050, 1, 0.5),
    "float_48000.wav": with_soundfile("FLOAT", 48000, 2, 0.15),
    "double_11025.wav": with_soundfile("DOUBLE", 11025, 1, 0.6),
    "ima_adpcm.wav": with_soundfile("IMA_ADPCM", 22050, 2, 1.5),
    "gsm610.wav": with_soundfile("GSM610", 8000, 1, 3.0),
    "piped.wav": with_ffmpeg(seconds=0.4, piped="wav", channels=1),
    "rf64.wav": with_ffmpeg("-rf64", "always", seconds=0.4, channels=1),
    "case.w64": with_tool("sox", "{in}", "{out}", seconds=0.4, rate_hz=44100, channels=1),
    "case.aiff": with_tool("sox", "{in}", "{out}", seconds=0.4, rate_hz=44100, channels=1),
    "case.au": with_tool("sox", "{in}", "{out}", seconds=0.4, rate_hz=44100, channels=1),
    "case.caf": with_ffmpeg(seconds=0.4, channels=1),
    "case.flac": with_tool("flac", "-s", "-f", "-o", "{out}", "{in}", seconds=0.5, rate_hz=44100),
    "piped.flac": with_ffmpeg(seconds=0.4, piped="flac"),
    "cbr16.mp3": with_lame("-b", "16", "--resample", "16", "-m", "m", seconds=8.0),
    "cbr32.mp3": with_lame("-b", "32", "--resample", "22.05", seconds=8.0),
    "cbr48.mp3": with_lame("-b", "48", "--resample", "44.1", "-m", "j", seconds=8.0),
    "cbr128.mp3": with_lame("-b", "128", seconds=2.0),
    "cbr8_8000.mp3": with_lame("-b", "8", "--resample", "8", "-m", "m", seconds=8.0),
    "cbr64_untagged.mp3": with_lame("-b", "64", "-t", "-m", "m", seconds=4.0),
    "vbr_silence.mp3": with_lame("-V", "4", seconds=11.0, silence_s=9.0),
    "abr_silence.mp3": with_lame("--abr", "96", seconds=11.0, silence_s=9.0),
    "vbr_silence_untagged.mp3": with_lame("-V", "4", "-t", seconds=7.0, silence_s=5.0),
    "tags.mp3": with_lame("-b", "96", "--add-id3v2", "--tt", "title", "--pad-id3v2-size", "3000", seconds=2.0),
    "ffmpeg.mp3": with_ffmpeg("-b:a", "96k", seconds=2.0),
    "crc.mp3": with_lame("-p", "-b", "64", "-m", "m", seconds=3.0),
    "layer2.mp2": with_ffmpeg("-b:a", "96k", "-f", "mp2", seconds=2.0, channels=1),
    "joined_tagged.mp3": joined(with_lame("-b", "64", seconds=1.0), with_lame("-b", "64", seconds=1.5)),
    "joined_untagged.mp3": joined(with_lame("-t", "-b", "64", seconds=1.0), with_lame("-t", "-b", "64", seconds=1.5)),
    "q-1_8000.ogg": oggenc(-1, 6.37, 8000, 1),
    "q0_44100.ogg": oggenc(0, 4.0 + 1 / 44100, 44100),
    "q3_22050.ogg": oggenc(3, 3.123, 22050, 1),
    "q5_48000.ogg": oggenc(5, 1.999, 48000, 1),
    "6k_mono.opus": opusenc(6, 10.0, 48000, 1),
    "12k_24000.opus": opusenc(12, 6.1, 24000),
    "64k_44100.opus": opusenc(64, 3.3, 44100),
    "aac.m4a": with_ffmpeg("-c:a", "aac", "-b:a", "48k", "-movflags", "+faststart", seconds=3.0),
    "alac.m4a": with_ffmpeg("-c:a", "alac", seconds=0.5, channels=1),
    "adts.aac": with_ffmpeg("-c:a", "aac", "-b:a", "48k", seconds=2.0),
    "case.wma": with_ffmpeg("-c:a", "wmav2", "-b:a", "48k", seconds=3.0),
    "case.webm": with_ffmpeg("-c:a", "libopus", "-b:a", "32k", seconds=3.0),
    "flac_in_ogg.ogg": with_ffmpeg("-c:a", "flac", seconds=0.5, channels=1),
}

if __name__ == "__main__":
    main()
