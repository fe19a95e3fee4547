import json
import shutil

import pytest

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import find_checkpoint
from musicgen_eval.records import CodecSpec


@pytest.fixture
def folder(oracle, tmp_path):
    """The configuration of a checkpoint, without weights."""
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(oracle / "tiny_musicgen" / name, target)
    return target


def edit(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_the_specification_is_read_without_weights(folder):
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


def test_the_limit_of_the_demo_model_comes_from_its_generation_config():
    found = find_checkpoint("demo")
    assert (found.spec.max_frames, found.spec.max_steps, found.max_frames_from) == (500, 503, "generation_config")


def test_the_delays_of_a_stereo_checkpoint_are_interleaved(folder):
    def to_stereo(config):
        config["decoder"]["num_codebooks"] = 8
        config["decoder"]["audio_channels"] = 2

    edit(folder / "config.json", to_stereo)
    spec = find_checkpoint(folder).spec
    assert (spec.channels, spec.delays) == (2, (0, 0, 1, 1, 2, 2, 3, 3))


def test_the_default_limit_is_30_seconds(folder):
    (folder / "generation_config.json").unlink()
    found = find_checkpoint(folder)
    assert (found.spec.max_frames, found.max_frames_from) == (1500, "default")


def test_max_frames_overrides_the_limit_of_the_checkpoint(folder):
    found = find_checkpoint(folder, max_frames=700)
    assert (found.spec.max_frames, found.max_frames_from) == (700, "given")
    with pytest.raises(CheckpointError, match="max_frames must be a positive whole number, got 0"):
        find_checkpoint(folder, max_frames=0)


def test_a_codec_that_does_not_match_the_decoder_is_refused(folder):
    edit(folder / "config.json", lambda config: config["audio_encoder"].update(codebook_size=32))
    with pytest.raises(CheckpointError, match="codec and decoder must have the same codebook size, got 32 and 64"):
        find_checkpoint(folder)


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(CheckpointError, match="has type 't5', but only 'musicgen' is supported"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere/at/all", "is not 'demo', an existing folder, or a hub name"),
        ("demmo", r"or a hub name such as 'facebook/musicgen-small'; did you mean demo\?"),
    ],
)
def test_an_unknown_checkpoint_is_named_in_the_error(name, message):
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(name)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        find_checkpoint(tmp_path)


def test_a_revision_is_refused_for_a_folder(folder):
    with pytest.raises(
        CheckpointError, match="is a folder, but revision is 'main', which is allowed for hub names only"
    ):
        find_checkpoint(folder, revision="main")


@pytest.mark.parametrize("name", ["~nobody", "~/nowhere", "~model", "x" * 5000, "a\0b"])
def test_a_name_that_is_not_a_valid_path_is_an_unknown_checkpoint(name, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(CheckpointError, match="is not 'demo', an existing folder, or a hub name"):
        find_checkpoint(name)


def test_a_folder_whose_name_starts_with_a_tilde_is_found(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("~model")
    assert find_checkpoint("~model").name == str(folder.parent / "~model")


def test_a_tilde_is_expanded_to_the_home_directory(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_checkpoint("~/model").name == str(folder)


@pytest.mark.parametrize("given", [None, 3, 2.5, ["demo"], {}])
def test_a_checkpoint_must_be_a_name_or_a_path(given):
    with pytest.raises(CheckpointError, match=f"checkpoint must be 'demo', .* got {type(given).__name__}"):
        find_checkpoint(given)


@pytest.mark.parametrize("part", ["text_encoder", "audio_encoder", "decoder"])
def test_a_configuration_without_one_of_its_parts_is_refused(folder, part):
    edit(folder / "config.json", lambda config: config.pop(part))
    with pytest.raises(CheckpointError, match=rf"config\.json does not describe {part}"):
        find_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"model_type": "musicgen", "decoder": 3}'])
def test_a_damaged_configuration_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_checkpoint(folder)


def test_a_configuration_with_a_value_of_the_wrong_type_is_refused(folder):
    edit(folder / "config.json", lambda config: config["decoder"].update(vocab_size="many"))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        find_checkpoint(folder)


def set_max_length(folder, length):
    edit(folder / "generation_config.json", lambda config: config.update(max_length=length))


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_generation_config_is_refused(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        find_checkpoint(folder)


@pytest.mark.parametrize("length", [0, -1, 1500.0, "1500", True, [1500]])
def test_a_max_length_that_is_not_a_positive_integer_is_refused(folder, length):
    set_max_length(folder, length)
    with pytest.raises(
        CheckpointError,
        match=r"max_length in generation_config\.json must be a positive whole number of frames, got ",
    ):
        find_checkpoint(folder)
    assert find_checkpoint(folder, max_frames=700).spec.max_frames == 700


def test_a_max_length_of_30_seconds_gives_no_note(folder):
    assert find_checkpoint(folder).notes == ()


def test_another_max_length_is_used_and_noted(folder):
    set_max_length(folder, 256)
    found = find_checkpoint(folder)
    assert (found.spec.max_frames, found.max_frames_from) == (256, "generation_config")
    (note,) = found.notes
    assert (
        "windows hold up to 5.12 s, because generation_config.json has max_length 256; MusicGen was trained on 30 s"
        in note
    )
    assert find_checkpoint(folder, max_frames=256).notes == ()


def test_a_max_length_that_matches_the_positions_of_the_decoder_gives_no_note(folder):
    set_max_length(folder, 500)
    assert find_checkpoint(folder).notes
    edit(folder / "config.json", lambda config: config["decoder"].update(max_position_embeddings=503))
    assert find_checkpoint(folder).notes == ()
    assert find_checkpoint("demo").notes == ()


def test_the_old_default_of_transformers_is_ignored(folder):
    set_max_length(folder, 20)
    found = find_checkpoint(folder)
    assert (found.spec.max_frames, found.max_frames_from) == (1500, "default")
    (note,) = found.notes
    assert "max_length 20 in generation_config.json is an old default of transformers" in note
    assert "windows hold up to 30 s" in note


def test_the_default_limit_does_not_exceed_the_positions_of_the_decoder(folder):
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", lambda config: config["decoder"].update(max_position_embeddings=503))
    found = find_checkpoint(folder)
    assert (found.spec.max_frames, found.max_frames_from) == (500, "default")
