import json
from pathlib import Path

import pytest

from musicgen_eval import perplexity
from musicgen_eval.cli.main import lightning_main, main
from musicgen_eval.runs import runner

pytestmark = pytest.mark.usefixtures("cheap_runs")

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DEMO = ["test", "--config", str(ROOT / "configs" / "demo.yaml")]


def refusal(capsys, *arguments: str, command=lightning_main) -> str:
    """Returns the one-line error of a command with invalid arguments."""
    status = command(list(arguments))
    said = capsys.readouterr()
    assert status != 0
    assert "usage:" not in said.err
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.foo=3"],
            "--data.foo is not an option of test; known: --data.allow_beyond_limit, --data.batch_size, ",
        ),
        (["--model.tail=keep"], "model.tail: expected one of 'score', 'drop', got 'keep'"),
        (
            ["--model.metrics.x=musicgen_eval.metrics.CodebookPerplexty"],
            "did you mean musicgen_eval.metrics.CodebookPerplexity",
        ),
        (["--model.metrics.x=TextGian"], "did you mean musicgen_eval.metrics.TextGain"),
        (["--model.metrics.x.class_path=torchmetrics.MeanMetrik"], "did you mean torchmetrics.MeanMetric"),
        (["--data.contxt_s=3"], "--data.contxt_s is not an option of test; did you mean --data.context_s?"),
        (["--data.contxt_s", "3"], "--data.contxt_s is not an option of test; did you mean --data.context_s?"),
        (["--data={contxt_s: 3}"], "data.contxt_s is not a setting; did you mean data.context_s?"),
        (["--dta.context_s=3"], "--dta is not an option of test; did you mean --data?"),
        (
            ["--trainer.logger=CSVLogger", "--trainer.logger.save_di=x"],
            "trainer.logger: lightning.pytorch.loggers.CSVLogger: save_di is not a setting; did you mean save_dir?",
        ),
        (["--ckpt_path=some.ckpt"], "--ckpt_path is not an option of test; known: "),
        (["--trainer.precision=16-mixed"], "16-mixed needs a GPU"),
        (["--trainer.use_distributed_sampler=true"], "would score some windows twice"),
        (["--trainer.limit_test_batches=2"], "use data.limit"),
        (["--trainer.limit_test_batches=0"], "use data.limit"),
        (["--trainer.fast_dev_run=true"], "use data.limit"),
        (["--model.metrics.x.class_path=torchmetrics.MeanMetric", "--model.metrics.x.init_args.foo=3"], "foo"),
        (["--model.metrics.x={}"], "model.metrics: musicgen_eval.MetricEntry requires metric"),
        (["--model.metrics=3"], "model.metrics: expected dict or null, got '3'"),
        (["--model.seed=1e400"], "model.seed: expected int, got 'inf'"),
        (["--model=3"], "model: expected a mapping of settings, or the path of a YAML file, got '3'"),
        (["--trainer.devices=0"], "devices"),
        (["--trainer.devices=-1"], "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
        (["--trainer.devices=[0,0]"], "trainer: `devices`"),
        (["--trainer.accelerator=tpu"], "trainer: Requirement 'torch_xla"),
        (["--trainer.strategy=foo"], "foo"),
        (
            ["--trainer.strategy=ddp_spawn", "--trainer.devices=2"],
            "ddp_spawn, ddp_fork and ddp_notebook are not supported",
        ),
        (
            ["--trainer.strategy=ddp_fork", "--trainer.devices=2"],
            "set trainer.strategy to ddp, which starts the command once per process",
        ),
        (["--trainer.logger=CSVLogger"], "trainer.logger: lightning.pytorch.loggers.CSVLogger requires save_dir"),
        (["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=x"], "pip install -U 'tensorboard"),
        (
            ["--trainer.callbacks+=EarlyStopping"],
            "trainer.callbacks: lightning.pytorch.callbacks.EarlyStopping requires monitor",
        ),
        (["--wandb.tags=x"], "wandb.tags: expected list or null, got 'x'"),
        (["--data.text=\udcff"], r"data.text must be UTF-8 text, got '\udcff'"),
        (["--run_dir="], "run_dir is an empty string; specify a folder, or remove run_dir"),
        (["--run_dir=/dev/null/x"], "run_dir /dev/null/x cannot be used: Not a directory"),
        (["--data.context_s=9"], "is 700 frames, which exceeds the checkpoint's limit of 500 frames (10 s)"),
        (["--data.context_s=0.33"], "context_s=0.33 s is 16.5 frames"),
        (["--data.batch_size=0"], "batch_size must be at least 1"),
        (["--data.limit=0"], "limit must be at least 1"),
        (["--data.max_failures=-1"], "max_failures must be at least 0"),
        (["--data.source="], "the source is empty"),
        (["--data.num_workers=-1"], "num_workers must be at least 0"),
        (["--data.source=/nowhere"], "/nowhere"),
        (["--model.checkpoint=demmo"], "did you mean demo?"),
    ],
)
def test_invalid_settings_are_one_line_errors(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *DEMO, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_command_fit_does_not_exist(capsys):
    assert "invalid choice: 'fit'" in refusal(capsys, "fit")


def test_the_error_names_an_unknown_key_of_a_config(capsys, tmp_path):
    (tmp_path / "my.yaml").write_text("data:\n  sauce: x.wav\n")
    message = "data.sauce is not a setting; did you mean data.source?"
    assert message in refusal(capsys, "test", "--config", str(tmp_path / "my.yaml"))


def test_an_option_before_the_command_of_lightning_is_an_error(capsys):
    assert "--data.limit must follow the command test" in refusal(capsys, "--data.limit=3", "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: 3\n", "data: expected a mapping of settings, got 3"),
        (b"data:\n  text: caf\xe9\n", "my.yaml: the file is not UTF-8 text (invalid continuation byte at byte 17)"),
        (b"data: [\n", "Problems parsing config: while parsing a flow node"),
        (b"run_dir: 'a\\0b'\n".replace(b"'", b'"'), r"run_dir 'a\x00b' contains a null character"),
    ],
)
def test_an_invalid_config_is_a_one_line_error(capsys, tmp_path, content, message):
    (tmp_path / "my.yaml").write_bytes(content)
    assert message in refusal(capsys, "test", "--config", str(tmp_path / "my.yaml"))


@pytest.mark.slow
def test_a_tilde_means_the_home_directory_in_all_paths(capsys, tmp_path, monkeypatch, oracle):
    home = tmp_path / "home"
    home.mkdir()
    (home / "model").symlink_to(oracle / "tiny_musicgen")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    common = ["--data.limit=1", "--data.context_s=1", "--data.target_s=1", "--trainer.accelerator=cpu"]
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=~/logs"]
    (home / "my.yaml").write_text("run_dir: ~/yaml\nmodel:\n  checkpoint: ~/model\n")
    assert lightning_main(["test", "--config=~/my.yaml", *common, *logger]) == 0, capsys.readouterr().err
    assert main(["evaluate", "--audio", "demo", "--limit=1", "--checkpoint=~/model", "--run_dir=~/command"]) == 0
    assert main(["evaluate", "--resume=~/command"]) == 0
    perplexity("demo", "~/model", limit=1, run_dir="~/python")
    assert sorted(path.name for path in home.iterdir()) == ["command", "logs", "model", "my.yaml", "python", "yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_run_dir_with_other_files_is_an_error(capsys, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    assert "is not empty (precious.txt)" in refusal(capsys, *DEMO, f"--run_dir={tmp_path}")
    assert (tmp_path / "precious.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "--audio is required unless --resume specifies a run folder"),
        (["evaluate", "--audio"], "argument --audio: expected at least one argument"),
        (["evaluate", "--audio", "a.wav", "--audio", "b.wav"], "--audio is specified more than once"),
        (["evaluate", "--audio", "x", "--text", "\udcff"], r"--text must be UTF-8 text, got '\udcff'"),
        (["evaluate", "--audio", "x", "--retry_failures=maybe"], "retry_failures: expected bool, got 'maybe'"),
        (["--resume", "x"], "--resume must follow a command"),
        (["evaluate", "--audio", "/nowhere.wav"], "/nowhere.wav"),
        (["evalute"], "invalid choice: 'evalute'"),
        (["evaluate", "--audio", "x", "--foo", "1"], "--foo is not an option of evaluate; known: --accelerator, "),
        (["--foo"], "--foo is not an option of musicgen-eval; known: --help, --version"),
        (
            ["--limit=1", "evaluate", "--audio", "x"],
            "--limit must follow the command, as in musicgen-eval evaluate --limit",
        ),
    ],
)
def test_invalid_arguments_of_musicgen_eval_are_one_line_errors(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *arguments, command=main)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", CONFIGS, ids=[str(path.relative_to(ROOT)) for path in CONFIGS])
def test_every_shipped_config_contains_existing_settings_only(capsys, config):
    base = [] if config.parent.name == "configs" else DEMO[1:]
    with pytest.raises(SystemExit) as stopped:
        lightning_main(["test", *base, "--config", str(config), "--print_config"])
    assert stopped.value.code == 0
    assert "checkpoint:" in capsys.readouterr().out


def test_evaluate_prints_a_table_and_writes_a_run(capsys, tmp_path, oracle):
    clip = next((ROOT / "musicgen_eval" / "data" / "demo").glob("*.wav"))
    status = main(
        ["evaluate", "--audio", str(clip), "--text", "drums", "--checkpoint", str(oracle / "tiny_musicgen"),
         "--context_s", "2", "--target_s", "2", "--run_dir", str(tmp_path / "x")]
    )  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "bits/s" in said.out
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert summary["counts"]["tracks_ok"] == 1
    assert f"{summary['metrics']['perplexity']['ppl']['value']:.2f}" in said.out
    assert str(tmp_path / "x" / "summary.json") in said.out.replace("\n", "")
    config = (tmp_path / "x" / "config.yaml").read_text()
    assert str(clip) in config


@pytest.mark.slow
def test_the_config_of_a_run_reproduces_the_run(capsys, tmp_path, oracle):
    arguments = [
        *DEMO, f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--data.limit=1", "--data.context_s=2",
        "--data.target_s=2", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    assert lightning_main([*arguments, f"--run_dir={tmp_path / 'a'}"]) == 0, capsys.readouterr().err
    again = ["test", "--config", str(tmp_path / "a" / "config.yaml"), f"--run_dir={tmp_path / 'b'}"]
    assert lightning_main(again) == 0, capsys.readouterr().err
    assert (tmp_path / "a" / "summary.json").read_bytes() == (tmp_path / "b" / "summary.json").read_bytes()


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_audio_accepts_several_files(monkeypatch, tmp_path, command):
    """The shell replaces a glob pattern by several files."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.wav", "b.wav", "[c].wav"):
        (tmp_path / name).touch()
    sources = []
    run = "run_evaluation" if command == "evaluate" else "run_continuation"
    monkeypatch.setattr(runner, run, lambda module, data, *settings, **further: sources.append(data.settings.source))
    assert main([command, "--audio", "a.wav", "b.wav", "[c].wav", "--limit", "2"]) == 0
    assert main([command, "--audio", "[c].wav"]) == 0
    assert sources == [["a.wav", "b.wav", "[c].wav"], "[c].wav"]


@pytest.mark.slow
def test_several_files_are_one_run_that_can_be_resumed(capsys, tmp_path, monkeypatch, oracle):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes((ROOT / "musicgen_eval" / "data" / "demo" / "dreamy_01.wav").read_bytes())
    monkeypatch.chdir(tmp_path)
    checkpoint = str(oracle / "tiny_musicgen")
    for command in ("evaluate", "generate"):
        arguments = [command, "--audio", "a.wav", "b.wav", "--checkpoint", checkpoint, "--run_dir", command]
        extra = ["--max_new_frames", "5", "--top_k", "20"] if command == "generate" else []
        assert main([*arguments, *extra]) == 0, capsys.readouterr().err
        assert "2 of 2 tracks" in capsys.readouterr().out
        assert main([command, "--resume", command]) == 0
        said = capsys.readouterr()
        assert "2 of 2 tracks" in said.out
        assert "contains a finished run" in said.err
    recipe = json.loads((tmp_path / "evaluate" / "summary.json").read_text())["recipe"]
    assert recipe["source"] == [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]


def tiny(oracle: Path) -> list[str]:
    """Arguments of `generate` with a model of 64 codes per codebook, whose limit is 30 s."""
    return ["generate", "--audio", "demo", "--checkpoint", str(oracle / "tiny_musicgen"), "--top_k", "40"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top_k", "999"], "top_k must be between 1 and 256, the checkpoint's codebook size, got 999"),
        (["--top_k", "0"], "top_k must be at least 1, got 0"),
        (["--top_p", "0"], "top_p must be above 0 and at most 1, got 0"),
        (["--temperature", "-1"], "temperature must be finite and at least 0"),
        (["--guidance_scale", "0.5"], "guidance_scale must be at least 1"),
        (["--stride_s", "0"], "stride_s must be above 0, got 0"),
        (["--stride_s", "10"], "stride_s must be above 0 and below the checkpoint's window of 10 s, got 10"),
        (["--stride_s", "0.01"], "stride_s=0.01 s is 0.5 frames"),
        (["--context", "0"], "context_s=0 is shorter than one frame (0.02 s)"),
        (["--context", "0.01"], "context_s=0.01 is shorter than one frame (0.02 s)"),
        (["--context", "-1"], "context_s must be at least 0, got -1"),
        (
            ["--context", "9", "--duration", "20"],
            "context_s=9 and a continuation of 20 s together exceed the checkpoint's limit of 10 s",
        ),
        (["--duration", "0"], "duration_s must be above 0, got 0"),
        (["--duration", "0.03"], "duration_s=0.03 s is 1.5 frames"),
        (["--max-new-frames", "0"], "max_new_frames must be at least 1, got 0"),
        (["--duration", "3", "--max-new-frames", "10"], "duration_s=3 and max_new_frames=10 both set the length"),
        (["--num_continuations", "0"], "num_continuations must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--threads", "99999999999"], "threads must be at most 1024, got 99999999999"),
        (["--format", "ogg"], "format"),
        (["--layout", "both"], "layout"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--audio", "/nowhere.wav"], "/nowhere.wav"),
        (["--target_s", "3"], "--target_s is not an option of generate; it applies to evaluate only"),
        (["--checkpoint", "demmo"], "did you mean demo?"),
    ],
)
def test_invalid_arguments_of_generate_are_one_line_errors_and_write_no_files(
    capsys, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    source = [] if "--audio" in arguments else ["--audio", "demo"]
    said = refusal(capsys, "generate", *source, *arguments, command=main)
    assert message in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.continuation.top_k=999"],
            "top_k must be between 1 and 256, the checkpoint's codebook size, got 999",
        ),
        (["--model.continuation.temperature=-1"], "temperature must be finite and at least 0"),
        (["--model.continuation.guidance_scale=0.5"], "guidance_scale must be at least 1"),
        (["--model.continuation.stride_s=0"], "stride_s must be above 0"),
        (["--model.continuation.stride_s=10"], "below the checkpoint's window of 10 s"),
        (["--model.continuation.num_continuations=0"], "num_continuations must be at least 1, got 0"),
        (["--model.continuation.threads=0"], "threads must be at least 1, got 0"),
        (["--model.continuation.topk=5"], "topk"),
        (["--data.context_s=0"], "context_s=0 is shorter than one frame"),
        (["--data.context_s=0.01"], "context_s=0.01 is shorter than one frame"),
        (
            ["--data.context_s=9", "--data.target_s=20"],
            "context_s=9 and a continuation of 20 s together exceed the checkpoint's limit of 10 s",
        ),
        (["--data.target_s=0"], "target_s must be above 0, got 0"),
        (["--data.head=skip"], "data.head does not apply to predict"),
        (["--data.allow_beyond_limit=true"], "data.allow_beyond_limit does not apply to predict"),
        (["--model.tail=drop"], "model.tail does not apply to predict; remove it"),
        (["--model.save_nll=true"], "model.save_nll does not apply to predict"),
        (["--trainer.limit_predict_batches=1", "--data.limit=1", "--data.target_s=0.1"], "use data.limit"),
        (["--trainer.limit_predict_batches=2"], "would leave out windows of a track; remove it and use data.limit"),
        (["--trainer.fast_dev_run=true"], "use data.limit"),
        (["--audio.format=ogg"], "format"),
        (["--audio.layout=both"], "layout"),
        (["--return_predictions=true"], "--return_predictions is not an option of predict; known: "),
        (["--trainer.precision=16-mixed"], "16-mixed needs a GPU"),
        (["--model.metrics.gain=ContextGain"], "asks for the reading 'no_context'"),
    ],
)
def test_invalid_settings_of_predict_are_one_line_errors_and_write_no_files(
    capsys, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, "predict", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *arguments)
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_generate_continues_a_folder_and_prints_the_run_folder(capsys, tmp_path, oracle):
    arguments = ["--limit", "2", "--context", "0.2", "--max-new-frames", "10", "--text", "EDM"]
    status = main([*tiny(oracle), *arguments, "--threads", "1", "--run-dir", str(tmp_path / "x")])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "2 continuations, 0.40 s generated" in " ".join(said.out.split())
    assert str(tmp_path / "x" / "continuations.csv") in said.out.replace("\n", "")
    assert len(list((tmp_path / "x" / "audio").rglob("continuation_0.flac"))) == 2
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert summary["metrics"] == {}
    assert summary["counts"]["generated_seconds"] == 0.4


CONTINUATION = ["predict", "--config", str(ROOT / "configs" / "continuation.yaml")]


def test_predict_parses_the_shipped_continuation_config(capsys):
    with pytest.raises(SystemExit) as stopped:
        lightning_main([*CONTINUATION, "--print_config"])
    assert stopped.value.code == 0
    assert "continuation:" in capsys.readouterr().out


@pytest.mark.slow
def test_the_shipped_continuation_config_runs(capsys, tmp_path, oracle):
    arguments = [
        *CONTINUATION, f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--model.continuation.top_k=40",
        "--model.continuation.threads=1", "--data.source=demo", "--data.limit=2", "--data.context_s=0.2",
        "--data.target_s=0.2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    assert lightning_main([*arguments, f"--run_dir={tmp_path / 'a'}"]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert set(summary["metrics"]) == {"perplexity", "true_perplexity", "seam", "true_seam"}
    assert summary["counts"]["tracks_ok"] == 2
    assert len(list((tmp_path / "a" / "audio").rglob("*.flac"))) == 2 * 3


@pytest.mark.slow
def test_the_config_of_a_predict_run_reproduces_the_run(capsys, tmp_path, oracle):
    arguments = [
        "predict", f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--model.continuation.top_k=40",
        "--model.continuation.threads=1", "--model.seed=5", "--data.limit=1", "--data.context_s=0.2", "--data.target_s=0.2",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--audio.layout=joined",
    ]  # fmt: skip
    assert lightning_main([*arguments, f"--run_dir={tmp_path / 'a'}"]) == 0, capsys.readouterr().err
    again = ["predict", "--config", str(tmp_path / "a" / "config.yaml"), f"--run_dir={tmp_path / 'b'}"]
    assert lightning_main(again) == 0, capsys.readouterr().err
    names = ["summary.json", "continuations.csv", "tracks.csv", "windows.csv"]
    names += [str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a" / "audio").rglob("*.flac")]
    assert len(names) == 4 + 3
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_configuration_file_cannot_resume_a_run(capsys, tmp_path):
    (tmp_path / "resume.yaml").write_text("resume: runs/x\n")
    error = refusal(capsys, *DEMO, "--config", str(tmp_path / "resume.yaml"))
    assert "use the option --resume instead" in error
