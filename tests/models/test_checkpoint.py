import json
import shutil

import pytest

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import find_checkpoint
from musicgen_eval.records import CodecSpec


@pytest.fixture
def folder(oracle, tmp_path):
    """A checkpoint's configuration without its weights."""
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(oracle / "tiny_musicgen" / name, target)
    return target


def edit(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_the_specification_needs_no_weights(folder):
    assert find_checkpoint(folder).spec == CodecSpec(
        sample_rate_hz=32000,
        frame_rate_hz=50,
        hop_samples=640,
        num_codebooks=4,
        codebook_size=64,
        channels=1,
        delays=(0, 1, 2, 3),
        max_frames=1500,
    )
    assert find_checkpoint(folder).spec.max_steps == 1503


def test_the_demo_states_its_own_limit():
    found = find_checkpoint("demo")
    assert (found.spec.max_frames, found.spec.max_steps, found.max_frames_from) == (500, 503, "generation_config")


def test_a_stereo_checkpoint_interleaves_its_delays(folder):
    def to_stereo(config):
        config["decoder"]["num_codebooks"] = 8
        config["decoder"]["audio_channels"] = 2

    edit(folder / "config.json", to_stereo)
    spec = find_checkpoint(folder).spec
    assert (spec.channels, spec.delays) == (2, (0, 0, 1, 1, 2, 2, 3, 3))


def test_a_missing_limit_is_30_seconds_and_said_so(folder):
    (folder / "generation_config.json").unlink()
    found = find_checkpoint(folder)
    assert (found.spec.max_frames, found.max_frames_from) == (1500, "default")


def test_a_given_limit_wins(folder):
    found = find_checkpoint(folder, max_frames=700)
    assert (found.spec.max_frames, found.max_frames_from) == (700, "given")
    with pytest.raises(CheckpointError, match="max_frames must be at least 1, got 0"):
        find_checkpoint(folder, max_frames=0)


def test_a_codec_that_does_not_fit_the_decoder_is_refused(folder):
    edit(folder / "config.json", lambda config: config["audio_encoder"].update(codebook_size=32))
    with pytest.raises(CheckpointError, match="codec has 32 entries a codebook, its decoder 64"):
        find_checkpoint(folder)


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(CheckpointError, match="is of type 't5'; expected 'musicgen'"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere/at/all", "neither 'demo', nor a folder, nor a hub name"),
        ("demmo", r"nor a hub name such as 'facebook/musicgen-small'; did you mean demo\?"),
    ],
)
def test_an_unknown_checkpoint_is_named(name, message):
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(name)


def test_a_folder_without_configuration_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        find_checkpoint(tmp_path)


def test_a_revision_goes_with_a_hub_name_only(folder):
    with pytest.raises(CheckpointError, match="goes with a hub name"):
        find_checkpoint(folder, revision="main")
