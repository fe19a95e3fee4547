"""Strategies with wrong results are refused. The processes of a sharded model share its layers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from musicgen_eval.cli.main import lightning_main
from musicgen_eval.errors import RunError
from musicgen_eval.runs.processes.rank_messages import StoppedElsewhere
from musicgen_eval.runs.processes.strategy import refuse_strategy
from tests.support.programs import ROOT, run_ranks, run_script

SHARDED = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.models.sharding import is_sharded, shard_decoder
from musicgen_eval.inference.batch_scoring import score_windows

dist.init_process_group("gloo")
model = load_model(sys.argv[1])
codes = [torch.randint(0, 64, (4, num_frames), generator=torch.Generator().manual_seed(num_frames)) for num_frames in (9, 20)]
scored = [torch.ones_like(window, dtype=torch.bool) for window in codes]
whole = score_windows(model, codes, scored=scored, texts=["drums", None])
num_whole = sum(parameter.numel() for parameter in model.decoder.model.decoder.layers.parameters())
shard_decoder(model.decoder, init_device_mesh("cpu", (dist.get_world_size(),)))
model.prepare("32-true")
parts = [parameter.to_local().numel() for parameter in model.decoder.model.decoder.layers.parameters()]
sharded = score_windows(model, codes, scored=scored, texts=["drums", None])
print(json.dumps({
    "is_sharded": is_sharded(model.decoder), "share": sum(parts) / num_whole, "arithmetic": model.arithmetic,
    "error": max((one.nll - other.nll).abs().max().item() for one, other in zip(whole, sharded)),
}))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_each_process_has_a_part_of_every_layer(oracle, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    for process in run_ranks(str(oracle / "tiny_musicgen"), world_size=2, script=script, timeout=120):
        assert process.returncode == 0, process.stderr[-2000:]
        found = json.loads(process.stdout.splitlines()[-1])
        assert found["is_sharded"]
        assert found["share"] == pytest.approx(0.5, abs=0.02)
        assert found["arithmetic"] == "transformers, sharded"
        assert found["error"] < 1e-5


def arguments(oracle: Path, folder: Path, *further: str) -> list[str]:
    return [
        f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--data.source=demo", "--data.limit=1", "--data.context_s=1",
        "--data.target_s=1", "--data.num_workers=0", "--trainer.enable_progress_bar=false", f"--run_dir={folder}", *further,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_sharded_model_is_refused_in_predict(oracle, tmp_path):
    config = str(ROOT / "configs" / "hardware" / "model_parallel.yaml")
    command = ["predict", "--config", config, *arguments(oracle, tmp_path / "x", "--trainer.accelerator=cpu")]
    command += ["--model.continuation.top_k=20"]
    done = run_script(*command, "--trainer.devices=2", "--trainer.precision=32-true", num_launched=1, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("error: predict does not support a sharded model") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_fsdp_is_refused_on_a_cpu_in_one_line(oracle, tmp_path, capsys):
    command = ["test", *arguments(oracle, tmp_path / "x", "--trainer.accelerator=cpu", "--trainer.strategy=fsdp")]
    assert lightning_main(command) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "FSDP" in printed
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_strategies_that_would_hang_are_refused(strategy):
    """The ranks of these strategies measure different batches, so they would gather a layer at different times."""
    made = {"fsdp": FSDPStrategy, "deepspeed": DeepSpeedStrategy}[strategy]
    trainer = SimpleNamespace(strategy=made.__new__(made), is_global_zero=True)
    with pytest.raises(
        RunError, match=f"trainer.strategy {made.__name__} is not supported; set trainer.strategy to auto, ddp, or"
    ):
        refuse_strategy(trainer, "score")
    trainer.is_global_zero = False
    with pytest.raises(StoppedElsewhere):
        refuse_strategy(trainer, "score")
