import pytest
import torch

from musicgen_eval.errors import MetricError
from musicgen_eval.models.embedders.registry import LOADERS, find_loader, load_embedder
from tests.support.embedder_checkpoints import noise, save_ast, save_clap, save_codec, save_hubert

SAVE = {"encodec": save_codec, "clap": save_clap, "ast": save_ast, "auto": save_hubert}


@pytest.mark.parametrize("kind", LOADERS)
def test_every_embedder_meets_the_contract(kind, tmp_path, one_thread):
    SAVE[kind](tmp_path)
    embedder = load_embedder(kind, {"checkpoint": tmp_path, **({"layer": 1} if kind == "auto" else {})})
    embeddings = embedder.embed(noise(round(2 * embedder.window_s * embedder.sample_rate_hz)))
    assert (embeddings.dtype, embeddings.device.type) == (torch.float32, "cpu")
    assert embeddings.shape == (2, embedder.dim)
    assert not embeddings.is_inference()
    assert embedder.name == kind
    assert (embedder.checkpoint, embedder.revision, embedder.commit) == (str(tmp_path), None, None)
    assert embedder.licence.name == "unknown"
    recipe = embedder.recipe()
    stated = {key: recipe[key] for key in ("sample_rate_hz", "dim", "window_s", "hop_s")}
    assert stated == {key: getattr(embedder, key) for key in stated}


def test_an_unknown_embedder_is_named_with_similar_names():
    with pytest.raises(MetricError, match=r"embedder 'clapp' does not exist; did you mean clap\?"):
        find_loader("clapp")
    with pytest.raises(MetricError, match="known: ast, auto, clap, encodec"):
        find_loader("vggish")


def test_an_unknown_or_missing_setting_is_named():
    with pytest.raises(MetricError, match=r"embedder clap has no setting 'hops'; did you mean hop_s\?"):
        load_embedder("clap", {"hops": 1.0})
    with pytest.raises(MetricError, match="embedder auto: checkpoint and layer must be given"):
        load_embedder("auto")
