"""Reference implementations that continue each track alone, and the songs that they continue."""

from pathlib import Path

import soundfile
import torch
from torchmetrics import Metric

from musicgen_eval.api import generate
from musicgen_eval.inference.continuation import continue_codes
from musicgen_eval.inference.scoring import score_codes
from musicgen_eval.models.decoder.sampling import continuation_uniforms
from musicgen_eval.models.threads import single_threaded

HOP, RATE = 640, 32000
TEXTS = {"song 0": "drums", "song 1": None, "song 2": "slow piano with many strings", "song 3": "drums"}
NUM_FRAMES = {"song 0": 50, "song 1": 37, "song 2": 63, "song 3": 20}
DRAWING = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 40}
THREADS = {"threads": 1}  # the steps of a tiny model are too small for two threads


def continued(source, model, **settings):
    return generate(source, checkpoint=model, accelerator="cpu", **{**DRAWING, **THREADS, **settings})


def wave_of(songs: Path, track: str) -> torch.Tensor:
    """Returns the (1, N) float32 audio of a track, cut to whole frames."""
    index = list(NUM_FRAMES).index(track)
    wave = torch.from_numpy(soundfile.read(songs.parent / f"{index}.wav", dtype="float32")[0])
    return wave[None, : NUM_FRAMES[track] * HOP]


def encoded(model, wave: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.encode([wave])[0]


def text_states(model, text: str | None) -> torch.Tensor | None:
    with single_threaded():
        states = model.encode_text(text)
    return None if states is None else states[None]


def drawn(model, prompt: torch.Tensor, target_frames: int, *, track: str, text: str | None, seed=0, continuation=0):
    """Returns the codes of one track, processed alone, and its continuation in one window."""
    uniforms = torch.zeros(1, 4, prompt.shape[1] + target_frames)
    uniforms[0, :, prompt.shape[1] :] = continuation_uniforms(
        4, target_frames, seed=seed, track=track, continuation=continuation
    )
    return continued_alone(model, prompt, uniforms.shape[2], text, uniforms=uniforms, **DRAWING)


def continued_alone(model, prompt: torch.Tensor, total_frames: int, text: str | None, **drawing) -> torch.Tensor:
    """Continues one prompt in one window with one thread."""
    with single_threaded():
        return continue_codes(
            model.decoder, prompt[None], total_frames=total_frames, delays=(0, 1, 2, 3),
            encoder_hidden_states=text_states(model, text), **drawing,
        )[0]  # fmt: skip


def decoded(model, codes: torch.Tensor) -> torch.Tensor:
    with single_threaded():
        return model.decode(codes)


def nll_of(model, codes: torch.Tensor, known: int, text: str | None) -> torch.Tensor:
    """Returns the (K, T) nll of one window, NaN for the codes of the prompt."""
    with torch.inference_mode(), single_threaded():
        nll = score_codes(
            model.decoder, codes[None], delays=(0, 1, 2, 3), encoder_hidden_states=text_states(model, text)
        )[0]
        nll[:, :known] = float("nan")
    return nll


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return torch.equal(found.isnan(), expected.isnan()) and torch.allclose(
        found.nan_to_num(), expected.nan_to_num(), rtol=0, atol=tolerance
    )


def witness(*names: str) -> tuple[Metric, dict[tuple[str, int], dict]]:
    """Returns a metric with these inputs, and the inputs that it receives, by (track, continuation)."""
    seen: dict = {}
    given = ", ".join(dict.fromkeys(["window", *names]))
    space: dict = {"seen": seen}
    exec(f"def update(self, {given}):\n    seen[window.track, window.index] = dict(locals())", space)

    def init(self):
        Metric.__init__(self)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    made = type("Witness", (Metric,), {"__init__": init, "update": space["update"], "compute": lambda self: self.total})
    return made(), seen


def audio_files(run_dir: Path) -> list[str]:
    """Returns all files below audio/, hidden ones included, relative to the run folder."""
    return sorted(str(path.relative_to(run_dir)) for path in (run_dir / "audio").rglob("*") if not path.is_dir())


def read(path: Path) -> torch.Tensor:
    """Reads a file as (C, N) float32 audio."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == RATE
    return torch.from_numpy(wave.T)
