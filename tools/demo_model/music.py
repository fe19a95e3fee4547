"""Synthesises songs: chords, melody, bass and drums in a key and a tempo, with a text that describes them.

A song is a pure function of its number. It repeats a loop, as much popular music does. Its sixteenth note is a whole number of
codec frames, and each note starts at the same phase. Therefore repeated bars have the same codes, and a small decoder can learn
within minutes to attend to the previous bar. Some songs are not aligned with the frames. Independent of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo_model.instruments import SAMPLE_RATE_HZ, drum, note

HOP_SAMPLES = 640
FRAMES_PER_SIXTEENTH = {5: "150", 6: "125", 8: "94", 10: "75"}
KEYS = ("c", "db", "d", "eb", "e", "f", "gb", "g", "ab", "a", "bb", "b")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
# mood -> (scale, degrees of the four chords of a loop)
MOODS = {
    "happy": ("major", (0, 3, 4, 3)),
    "bright": ("major", (0, 4, 5, 3)),
    "gentle": ("major", (0, 5, 3, 4)),
    "dreamy": ("major", (3, 0, 4, 5)),
    "sad": ("minor", (0, 3, 0, 4)),
    "dark": ("minor", (0, 5, 0, 6)),
    "epic": ("minor", (0, 5, 2, 6)),
    "tense": ("minor", (0, 6, 5, 4)),
}
CHORDS = ("piano", "organ", "strings", "guitar")
LEADS = ("flute", "bell", "synth", "violin")
BASSES = ("deep", "plucked", "buzzing")
# sixteenths of a bar with a stroke of kick, snare and hat
DRUMS = {
    "house": ((0, 4, 8, 12), (4, 12), (2, 6, 10, 14)),
    "rock": ((0, 8, 10), (4, 12), (0, 2, 4, 6, 8, 10, 12, 14)),
    "trap": ((0, 6, 11), (8,), tuple(range(16))),
    "latin": ((0, 3, 8, 11), (3, 6, 10, 12), (0, 4, 8, 12)),
}
SIXTEENTHS_PER_BAR = 16


@dataclass(frozen=True)
class Song:
    """The properties of a song.

    Attributes:
        number: Seed and name of the song.
        sixteenth_samples: Length of a sixteenth note in samples at 32 kHz.
        offset_samples: Number of samples that are cut from the start. Notes are not aligned with frames unless it is 0.
        key: Semitones above C, 0 to 11.
        mood: Name of the chord progression, a key of `MOODS`.
        chords: Instrument of the chords.
        lead: Instrument of the melody. None means no melody.
        bass: Instrument of the bass.
        drums: Name of the drum pattern. None means no drums.
        loop_bars: Length of the loop in bars, 1 or 2.
        gain: Level of the mix.
        text: Description of the song.
    """

    number: int
    sixteenth_samples: int
    offset_samples: int
    key: int
    mood: str
    chords: str
    lead: str | None
    bass: str
    drums: str | None
    loop_bars: int
    gain: float
    text: str

    @property
    def loop_samples(self) -> int:
        """Length of the loop in samples."""
        return self.sixteenth_samples * SIXTEENTHS_PER_BAR * self.loop_bars


def draw_song(number: int, *, on_grid: bool | None = None) -> Song:
    """Returns the random properties of a song.

    Args:
        number: Number of the song. The same number gives the same song.
        on_grid: True if notes start at frames. None means that this applies to nine of ten songs.
    """
    rng = np.random.default_rng([number, 1])
    frames = int(rng.choice(tuple(FRAMES_PER_SIXTEENTH)))
    off = rng.random() < 0.1 if on_grid is None else not on_grid
    stretch, offset = (int(rng.integers(-60, 61)), int(rng.integers(0, HOP_SAMPLES))) if off else (0, 0)
    mood = str(rng.choice(tuple(MOODS)))
    key = int(rng.integers(12))
    chords, bass = str(rng.choice(CHORDS)), str(rng.choice(BASSES))
    lead = str(rng.choice(LEADS)) if rng.random() < 0.85 else None
    drums = str(rng.choice(tuple(DRUMS))) if rng.random() < 0.85 else None
    loop_bars = int(rng.integers(1, 3)) if frames < 8 else 1
    gain = float(rng.uniform(0.75, 1.0))
    words = [
        f"{mood} music in {KEYS[key]} {MOODS[mood][0]}",
        f"at {FRAMES_PER_SIXTEENTH[frames]} bpm",
        f"{chords} chords",
    ]
    words += [f"{lead} melody" if lead else "no melody", f"{bass} bass", f"{drums} drums" if drums else "no drums"]
    if rng.random() < 0.25:  # some descriptions are incomplete and in another order
        kept = rng.permutation(len(words) - 1)[: int(rng.integers(2, len(words)))] + 1
        words = [words[0], *(words[i] for i in kept)]
    sixteenth = frames * HOP_SAMPLES + stretch
    return Song(number, sixteenth, offset, key, mood, chords, lead, bass, drums, loop_bars, gain, " , ".join(words))


def render(song: Song, *, num_samples: int, stereo: bool = False) -> np.ndarray:
    """Synthesises a song.

    Args:
        song: Song to synthesise.
        num_samples: Number of samples at 32 kHz.
        stereo: True for chords on the left, melody on the right and other parts in the middle. Their mean is the mono mix.

    Returns:
        (C, N) float32 in [-1, 1].
    """
    rng = np.random.default_rng([song.number, 2])
    loop, total = song.loop_samples, num_samples + song.offset_samples
    num_loops = -(-total // loop)
    mix = np.zeros((4, num_loops * loop + 2 * SAMPLE_RATE_HZ), np.float32)
    parts = [_chord_part(song, rng), _lead_part(song, rng), _bass_part(song, rng), _drum_part(song, fill=False)]
    # sections of four loops differ by a second melody and a drum fill
    other_lead, fill = _lead_part(song, rng), _drum_part(song, fill=True)
    for section in range(-(-num_loops // 4)):
        mute = int(rng.integers(4)) if rng.random() < 0.2 else None
        variant = section % 2 == 1 and rng.random() < 0.7
        for index in range(section * 4, min(section * 4 + 4, num_loops)):
            for row, part in enumerate(parts):
                if row == mute and mute != 0:
                    continue
                if row == 1 and variant:
                    part = other_lead
                if row == 3 and index % 4 == 3:
                    part = fill
                _add(mix[row], part, start=index * loop)
    # without reverberation, so that repetitions of a loop differ only by the end of the previous one
    rows = mix[:, song.offset_samples : song.offset_samples + num_samples] * song.gain
    if not stereo:
        return np.tanh(rows.sum(0, keepdims=True))
    left, right = (
        rows * np.array([1.4, 0.6, 1, 1], np.float32)[:, None],
        rows * np.array([0.6, 1.4, 1, 1], np.float32)[:, None],
    )
    return np.tanh(np.stack([left.sum(0), right.sum(0)]))


Part = list[tuple[int, np.ndarray]]


def _add(row: np.ndarray, part: Part, *, start: int) -> None:
    for at, samples in part:
        row[start + at : start + at + len(samples)] += samples


def _scale_pitch(song: Song, degree: int) -> int:
    """Returns the semitones above C of a scale degree, which may exceed an octave."""
    scale = SCALES[MOODS[song.mood][0]]
    return song.key + scale[degree % 7] + 12 * (degree // 7)


def _chord_degrees(song: Song) -> tuple[int, ...]:
    """Returns the degree of each quarter of the loop."""
    return MOODS[song.mood][1]


def _chord_part(song: Song, rng: np.random.Generator) -> Part:
    part: Part = []
    quarter = song.loop_bars * SIXTEENTHS_PER_BAR // 4
    twice = bool(rng.integers(2)) and quarter > 4
    for index, degree in enumerate(_chord_degrees(song)):
        for third in (0, 2, 4):
            pitch = 48 + _scale_pitch(song, degree + third)
            pitch -= 12 if pitch > 64 else 0
            length = quarter // 2 if twice else quarter
            for repeat in range(2 if twice else 1):
                at = (index * quarter + repeat * length) * song.sixteenth_samples
                part.append((at, 0.11 * note(song.chords, pitch, length * song.sixteenth_samples)))
    return part


def _lead_part(song: Song, rng: np.random.Generator) -> Part:
    """Returns notes of two or four sixteenths, which are chord tones on the beat and neighbouring tones off it."""
    part: Part = []
    num_sixteenths = song.loop_bars * SIXTEENTHS_PER_BAR
    at = 0
    while at < num_sixteenths:
        length = int(rng.choice((2, 2, 4)))
        length = min(length, num_sixteenths - at)
        degree = _chord_degrees(song)[at * 4 // num_sixteenths]
        degree += int(rng.choice((0, 2, 4, 7))) if at % 4 == 0 else int(rng.choice((0, 1, 2, 4, 5)))
        rest = rng.random() < 0.15
        pitch = 60 + _scale_pitch(song, degree)
        pitch -= 12 if pitch > 81 else 0
        if song.lead and not rest:
            part.append((at * song.sixteenth_samples, 0.2 * note(song.lead, pitch, length * song.sixteenth_samples)))
        at += length
    return part


def _bass_part(song: Song, rng: np.random.Generator) -> Part:
    part: Part = []
    num_sixteenths = song.loop_bars * SIXTEENTHS_PER_BAR
    step = int(rng.choice((2, 4)))
    for at in range(0, num_sixteenths, step):
        degree = _chord_degrees(song)[at * 4 // num_sixteenths]
        pitch = 36 + _scale_pitch(song, degree)
        pitch -= 12 if pitch > 47 else 0
        part.append((at * song.sixteenth_samples, 0.28 * note(song.bass, pitch, step * song.sixteenth_samples)))
    return part


def _drum_part(song: Song, *, fill: bool) -> Part:
    if song.drums is None:
        return []
    part: Part = []
    for bar in range(song.loop_bars):
        base = bar * SIXTEENTHS_PER_BAR
        last = fill and bar == song.loop_bars - 1
        for name, level, strokes in zip(("kick", "snare", "hat"), (0.5, 0.3, 0.12), DRUMS[song.drums], strict=True):
            strokes = (*(s for s in strokes if s < 12), 12, 13, 14, 15) if last and name == "snare" else strokes
            part += [((base + stroke) * song.sixteenth_samples, level * drum(name)) for stroke in strokes]
    return part
