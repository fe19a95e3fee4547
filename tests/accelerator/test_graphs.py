"""Compares decode steps that are replayed from CUDA graphs with eager steps and the CPU, on the pretend device."""

import copy
import warnings

import pytest
import torch

from musicgen_eval.inference.continuation import continue_prompts
from musicgen_eval.models.decoder import static_steps
from musicgen_eval.models.decoder.fused_decoder import FusedDecoder, FusedLayer
from musicgen_eval.models.decoder.sampling import Sampling
from tests.support.pretend_cuda import pretend_cuda

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

GREEDY = Sampling(temperature=0)
TOP_K = Sampling(top_k=20)
TOP_P = Sampling(top_k=None, top_p=0.9)
BATCHES = {  # (frames of prompts, total frames, lengths of texts)
    "equal rows": ((20, 20, 20), (46, 46, 46), (5, 5, 5)),
    "mixed rows": ((20, 0, 31), (46, 30, 45), (5, 0, 2)),
    "no texts": ((9, 30, 2), (36, 40, 12), (0, 0, 0)),
    "sliding windows": ((4, 50, 30), (76, 62, 34), (3, 3, 0)),
}


@pytest.fixture
def decoder(tiny_model):
    return tiny_model.decoder


def batch(decoder, name, seed=0):
    prompts, totals, texts = BATCHES[name]
    generator = torch.Generator().manual_seed(seed)
    width = decoder.config.hidden_size
    return {
        "prompts": [torch.randint(0, 64, (4, frames), generator=generator) for frames in prompts],
        "total_frames": totals,
        "texts": [torch.randn(length, width, generator=generator) if length else None for length in texts],
        "uniforms": torch.rand(len(prompts), 4, max(totals), generator=generator),
        "delays": (0, 1, 2, 3),
        "max_frames": 46,
        "stride_frames": 28,
    }


def continued(decoder, given, *, sampling=TOP_K, guidance_scale=3.0, **settings):
    uniforms = None if sampling == GREEDY else given["uniforms"]
    given = {**given, "uniforms": uniforms, "sampling": sampling, "guidance_scale": guidance_scale, **settings}
    with torch.inference_mode():
        return continue_prompts(decoder, given.pop("prompts"), **given).cpu()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampling", [GREEDY, TOP_K, TOP_P], ids=["greedy", "top_k", "top_p"])
@pytest.mark.parametrize("name", BATCHES)
def test_replayed_steps_generate_the_codes_of_eager_steps(decoder, name, sampling, guidance_scale, monkeypatch):
    monkeypatch.setattr(static_steps, "BUCKET", 32)  # several graphs per window
    given, settings = batch(decoder, name), {"sampling": sampling, "guidance_scale": guidance_scale}
    expected = continued(decoder, given, **settings)
    with pretend_cuda() as log, warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = FusedDecoder(copy.deepcopy(decoder).to("cuda"), torch.float32)
        assert torch.equal(continued(fused, given, kernels="eager", **settings), expected)
        assert "graph_replay" not in log.kernels
        assert torch.equal(continued(fused, given, kernels="graph", **settings), expected)
        assert log.kernels["graph_replay"] > 20


def test_graphs_are_captured_once_and_replayed_for_later_batches(decoder):
    with pretend_cuda() as log:
        fused = FusedDecoder(copy.deepcopy(decoder).to("cuda"), torch.float32)
        continued(fused, batch(decoder, "mixed rows"))
        graphs = dict(fused.last_steps._graphs)
        replays = log.kernels["graph_replay"]
        found = continued(fused, batch(decoder, "mixed rows", seed=1))
        assert fused.last_steps._graphs == graphs
        assert log.kernels["graph_replay"] > replays
    assert torch.equal(found, continued(decoder, batch(decoder, "mixed rows", seed=1)))


def test_steps_are_captured_only_if_there_are_enough_of_them(decoder):
    given = batch(decoder, "equal rows")
    with pretend_cuda():
        fused = FusedDecoder(copy.deepcopy(decoder).to("cuda"), torch.float32)
        continued(fused, {**given, "total_frames": (25, 25, 25)})
        assert not fused.last_steps._graphs
        continued(fused, {**given, "total_frames": (40, 40, 40)})
        assert list(fused.last_steps._graphs) == [256]


def test_a_step_does_not_wait_and_has_the_same_kernels_in_every_bucket(decoder, monkeypatch):
    monkeypatch.setattr(static_steps, "BUCKET", 32)
    with pretend_cuda() as log:
        fused = FusedDecoder(copy.deepcopy(decoder).to("cuda"), torch.bfloat16)
        continued(fused, batch(decoder, "mixed rows"), kernels="eager")
        steps, launches = fused.last_steps, []
        for num_keys in (32, 64):
            with torch.inference_mode():
                steps._step.zero_()
                log.clear()
                steps._step_eagerly(num_keys)
            assert log.num_waits == 0
            launches.append(dict(log.kernels))
    assert launches[0] == launches[1]


def test_a_failed_capture_falls_back_to_eager_steps_with_one_warning(decoder, monkeypatch):
    class Refusing(static_steps.CudaGraph):
        def capture(self, function):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(static_steps, "CudaGraph", Refusing)
    monkeypatch.setattr(static_steps, "BUCKET", 32)
    given = batch(decoder, "mixed rows")
    with pretend_cuda() as log, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = FusedDecoder(copy.deepcopy(decoder).to("cuda"), torch.float32)
        found = continued(fused, given)
        continued(fused, given)
    assert [str(warning.message) for warning in caught if "CUDA graphs" in str(warning.message)] == [
        "decoding runs without CUDA graphs, which is slower: operation not permitted when stream is capturing"
    ]
    assert "graph_replay" not in log.kernels
    assert torch.equal(found, continued(decoder, given))


def test_a_step_that_waits_is_not_captured_and_the_warning_names_the_cause(decoder, monkeypatch):
    feed_forward = FusedLayer.feed_forward

    def waiting(self, x):
        return feed_forward(self, x) * float(x.sum() * 0 + 1)

    monkeypatch.setattr(FusedLayer, "feed_forward", waiting)
    given = batch(decoder, "mixed rows")
    with pretend_cuda():
        fused = FusedDecoder(copy.deepcopy(decoder).to("cuda"), torch.float32)
        with pytest.warns(UserWarning, match=r"without CUDA graphs.*capturing"):
            found = continued(fused, given)
    assert torch.equal(found, continued(decoder, given))


def test_an_out_of_memory_error_in_a_capture_is_raised(decoder, monkeypatch):
    def capture(self, function):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(static_steps.CudaGraph, "capture", capture)
    with pretend_cuda():
        fused = FusedDecoder(copy.deepcopy(decoder).to("cuda"), torch.float32)
        with pytest.raises(torch.OutOfMemoryError):
            continued(fused, batch(decoder, "mixed rows"))


def test_a_step_compiles_without_a_graph_break(decoder):
    fused = FusedDecoder(decoder, torch.float32)
    given = batch(decoder, "mixed rows")
    compile_turn = torch.compile

    def without_a_compiler(function, **settings):
        return compile_turn(function, backend="aot_eager", **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", without_a_compiler)
        assert torch.equal(continued(fused, given, kernels="compiled"), continued(decoder, given))
