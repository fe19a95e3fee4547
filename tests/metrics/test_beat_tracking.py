import pickle
import sys
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import TempoAgreement, beat_tracking
from musicgen_eval.metrics.beat_tracking import BeatTracker, tempo_of_beats


class FakeAudio2Beats:
    """Stands in for `beat_this.inference.Audio2Beats`: finds a beat at each sample above 0.5."""

    loaded: list[str] = []  # noqa: RUF012

    def __init__(self, checkpoint_path: str, device: str) -> None:
        assert device == "cpu"
        self.loaded.append(checkpoint_path)

    def __call__(self, signal: np.ndarray, sr: int) -> tuple[np.ndarray, np.ndarray]:
        assert signal.dtype == np.float32
        assert signal.ndim == 1
        return np.nonzero(signal > 0.5)[0] / sr, np.zeros(0)


@pytest.fixture
def fake_package(monkeypatch, tmp_path):
    package, module = ModuleType("beat_this"), ModuleType("beat_this.inference")
    module.Audio2Beats = FakeAudio2Beats
    monkeypatch.setitem(sys.modules, "beat_this", package)
    monkeypatch.setitem(sys.modules, "beat_this.inference", module)
    monkeypatch.setattr(beat_tracking, "find_spec", lambda name: object())
    beat_tracking._load.cache_clear()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    FakeAudio2Beats.loaded.clear()


def pulses(bpm: float, duration_s: float = 5.0) -> torch.Tensor:
    audio = torch.zeros(1, round(8000 * duration_s))
    audio[:, torch.arange(0, audio.shape[1], 60 * 8000 / bpm).long()] = 1.0
    return audio


def test_a_missing_package_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setattr(beat_tracking, "find_spec", lambda name: None)
    with pytest.raises(MetricError, match=r"install it with pip install 'musicgen-eval\[tempo\]'"):
        TempoAgreement(estimator="beat_this")


def test_the_tempo_is_that_of_the_median_interval():
    found = tempo_of_beats([0.0, 0.5, 1.0, 1.52, 2.0, 3.5])
    assert found.tempi_bpm == pytest.approx((120,))
    assert (found.weight, found.clarity, found.is_confident) == (1, 0.8, True)
    assert not tempo_of_beats([0.0, 0.5, 1.0, 1.5]).is_confident  # too few beats
    assert not tempo_of_beats([0.0, 0.5, 1.2, 1.5, 2.5, 2.8]).is_confident  # irregular
    assert tempo_of_beats([0.0]) is None
    assert tempo_of_beats([]) is None


def test_the_beat_tracker_is_used_and_loaded_once(fake_package, tmp_path):
    path = tmp_path / "own.ckpt"
    path.write_bytes(b"")
    metric = TempoAgreement(estimator="beat_this", checkpoint=str(path))
    assert FakeAudio2Beats.loaded == []
    for generated in (pulses(120), pulses(150), torch.zeros(1, 40000)):
        metric.update(generated, pulses(120), 8000)
    found = {name: value.item() for name, value in metric.compute().items()}
    values = dict.fromkeys(("same_tempo", "one_correct", "both_correct", "p_score"), 0.5)
    assert found == pytest.approx(values | {"coverage": 2 / 3})
    assert FakeAudio2Beats.loaded == [str(path)]
    assert metric.recipe.settings["checkpoint"] == str(path)


def test_a_metric_can_be_copied_before_the_tracker_is_loaded(fake_package):
    metric = TempoAgreement(estimator="beat_this")
    assert deepcopy(metric).checkpoint == "small0"
    assert pickle.loads(pickle.dumps(metric)).estimator == "beat_this"


def test_a_missing_checkpoint_is_an_error(fake_package):
    with pytest.raises(MetricError, match=r"the checkpoint nowhere.ckpt does not exist"):
        BeatTracker("nowhere.ckpt").estimate(pulses(120), sample_rate_hz=8000)


def test_small0_is_downloaded_once_and_its_content_is_checked(fake_package, monkeypatch, tmp_path):
    downloads = []

    def download(url: str, path: str, progress: bool) -> None:
        downloads.append(url)
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(MetricError, match=r"beat_this-small0.ckpt has the SHA-256 .*, expected 6074be2c"):
        BeatTracker().estimate(pulses(120), sample_rate_hz=8000)
    monkeypatch.setattr(beat_tracking, "SMALL0_SHA256", sha256(b"weights").hexdigest())
    assert BeatTracker().estimate(pulses(120), sample_rate_hz=8000).tempi_bpm == pytest.approx((120,))
    assert len(downloads) == 1
    assert FakeAudio2Beats.loaded == [str(tmp_path / "checkpoints" / "beat_this-small0.ckpt")]


def test_a_failed_download_is_an_error_with_the_path(fake_package, monkeypatch):
    def download(url: str, path: str, progress: bool) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(MetricError, match=r"cannot download https.*no network.*save it as .*beat_this-small0.ckpt"):
        BeatTracker().estimate(pulses(120), sample_rate_hz=8000)
