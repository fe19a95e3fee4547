"""Tests the GPU check on the pretend device, and sections that fail or exceed their time limit."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import DECODERS, load
from tests.support.pretend_cuda import pretend_cuda
from tools import gpu_check
from tools.gpu import command, cuda_tests, goals
from tools.gpu.baselines import plain_loop, score_by_transformers
from tools.gpu.costs import DecoderShape, mean_keys
from tools.gpu.findings import Findings, SectionResult
from tools.gpu.report import markdown_table
from tools.gpu.sections import Check, Section, run_sections
from tools.gpu.sizes import QUICK
from tools.gpu.timing import in_turns_or_alone, time_in_turns

TINY = replace(
    QUICK,
    shapes=("tiny",),
    batches=(2,),
    repeats=1,
    variant_s=1e-3,
    copy_bytes=1 << 16,
    matmul_sizes=((64, 64, 64),),
    oracle_cases=("stereo_T50",),
    oracle_precisions=("32-true", "16-mixed"),
    window_s=0.4,
    prompt_frames=5,
    num_turns=6,
    slow_turns=3,
    text_tokens=3,
    option_shape="tiny",
    kernels=("graph",),
    key_lengths=2,
    profiled_turns=2,
    precisions=("bf16-mixed",),
)

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_runs")


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(torch.device("cpu"), TINY, tmp_path)


def section(name: str, run, budget_s: float = 100.0) -> Section:
    return Section(name, name.capitalize(), budget_s, run)


def finds(check: Check, findings: Findings) -> None:
    findings.add("Figures", steps_per_s=12.5)


def fails(check: Check, findings: Findings) -> None:
    findings.add("Figures", steps_per_s=1.5)
    raise ValueError("no such kernel")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the pretend device replaces a missing GPU")
def test_the_whole_check_runs_on_the_pretend_device(tmp_path: Path):
    tests = tmp_path / "test_one.py"
    tests.write_text("import pytest\ndef test_one(): pass\n@pytest.mark.skip('later')\ndef test_two(): pass\n")
    sizes = replace(TINY, tests=(str(tests),))
    with pretend_cuda():
        status = command.check_device(
            "cuda",
            folder=tmp_path,
            sizes=sizes,
            names=gpu_check.SECTIONS,
            budget_s=1000,
            sections=without_time_limits(command.SECTIONS),
        )
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    sections = {result["name"]: result for result in content["sections"]}
    assert {name: result["status"] for name, result in sections.items()} == dict.fromkeys(gpu_check.SECTIONS, "passed")
    assert status == 0
    assert content["machine"]["device"] == "Pretend H100"
    assert {"driver", "cuda", "cudnn", "torch", "transformers", "commit", "sm_clock"} <= content["machine"].keys()
    tables = {name: result["findings"]["tables"] for name, result in sections.items()}

    assert {row["operation"].split()[0] for row in tables["peaks"]["Memory"]} == {"copy", "sum", "row"}
    assert [row["dtype"] for row in tables["peaks"]["Products"]] == ["bfloat16", "float32"]
    assert all(row["TFLOP_per_s"] > 0 for row in tables["peaks"]["Products"])

    exact = [row for row in tables["oracle"]["Differences"] if row["precision"] == "32-true"]
    assert {row["computed_by"] for row in exact} == {"transformers", "package"}
    assert all(row["nll_difference"] < 1e-5 for row in exact)

    steps = {row["variant"]: row for row in tables["continuation"][goals.CONTINUATION]}
    others = {"transformers, bfloat16", "plain loop, bfloat16", "transformers, float32"}
    assert set(steps) == {*others, "this package, bfloat16", "this package, float32"}
    assert steps["this package, float32"]["ms_per_step"]["min"] > 0
    assert steps["this package, float32"]["share_of_bandwidth"] > steps["this package, float32"]["share_needed"] > 0

    scored = {row["variant"]: row for row in tables["scoring"][goals.SCORING]}
    assert len(scored) == 5
    assert scored["this package, float32"]["nll_difference"] < 1e-5
    assert 0 < scored["this package, bfloat16"]["nll_difference"] < 0.1
    assert scored["this package, float32"]["share_of_peak"] > 0
    assert [row["codes_that_differ"] for row in tables["scoring"]["Encoded windows"]] == [0, 0]

    assert [(row["task"], row["differing"]) for row in tables["determinism"]["Two equal runs"]] == [
        ("test", "none"),
        ("predict", "none"),
    ]
    assert [row["kernels"] for row in tables["profile"]["Steps"]] == ["graph", "eager"]
    assert tables["tests"]["Tests"][0] == {"files": str(tests), "passed": 1, "failed": 0, "skipped": 1}
    assert [row["codes_as_eager"] for row in tables["options"]["Kernels of decode steps"]] == [1.0, 1.0]
    assert [row["cudnn"] for row in tables["options"]["Attention to new key lengths"]] == [
        "off, as in this package",
        "allowed",
    ]

    report = (tmp_path / "gpu_check.md").read_text()
    for heading in ("## Goals", "## Continuation", "### Decode steps", "## Two equal runs", "## Options"):
        assert heading in report
    assert "Bytes read per step" in report
    assert "Operations per window" in report
    assert "| tiny | 2 | this package, bfloat16 |" in report


def without_time_limits(sections):
    """Returns the sections with long time limits, so that a busy machine does not cause failures."""
    return [replace(each, budget_s=1000.0) for each in sections]


def test_a_failed_section_keeps_its_rows_and_the_others_run(check: Check):
    kept: list[SectionResult] = []
    sections = [section("first", finds), section("second", fails), section("third", finds)]
    results = run_sections(check, sections, budget_s=100, keep=kept.append)
    assert [result.status for result in results] == ["passed", "failed", "passed"]
    assert kept == results
    assert results[1].findings.tables == {"Figures": [{"steps_per_s": 1.5}]}
    assert results[1].error is not None
    assert results[1].error.startswith("ValueError: no such kernel")
    assert "in fails" in results[1].error


def test_a_failed_case_fails_its_section_after_the_other_cases_have_run(check: Check):
    def run(check: Check, findings: Findings) -> None:
        for number in (1, 0, 2):
            with findings.case("Cases", number=number) as row:
                row["inverse"] = 1 / number

    (result,) = run_sections(check, [section("cases", run)], budget_s=100, keep=lambda result: None)
    assert result.status == "failed"
    assert result.findings.tables["Cases"] == [
        {"number": 1, "inverse": 1.0},
        {"number": 0, "error": "ZeroDivisionError: division by zero"},
        {"number": 2, "inverse": 0.5},
    ]


def test_a_section_that_exceeds_its_time_is_stopped_and_keeps_its_rows(check: Check):
    def run(check: Check, findings: Findings) -> None:
        findings.add("Figures", steps_per_s=1.0)
        try:
            time.sleep(60)
        except Exception:  # as a library might do
            findings.add("Figures", steps_per_s=2.0)

    started = time.monotonic()
    results = run_sections(
        check, [section("slow", run, 0.2), section("next", finds)], budget_s=100, keep=lambda result: None
    )
    assert time.monotonic() - started < 30
    assert [result.status for result in results] == ["out of time", "passed"]
    assert results[0].findings.tables == {"Figures": [{"steps_per_s": 1.0}]}


def test_sections_without_remaining_time_are_skipped(check: Check):
    def run(check: Check, findings: Findings) -> None:
        time.sleep(0.3)

    sections = [section("first", run), section("second", finds)]
    results = run_sections(check, sections, budget_s=2.1, keep=lambda result: None)
    assert [result.status for result in results] == ["passed", "skipped"]
    assert results[0].budget_s <= 2.1


def test_the_report_contains_the_findings_before_a_failure(tmp_path: Path, capsys):
    sections = [section("first", finds), section("second", fails)]
    settings = {"sizes": TINY, "budget_s": 100, "sections": sections}
    status = command.check_device("cpu", folder=tmp_path, names=["first", "second"], **settings)
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert status == 1
    assert [result["status"] for result in content["sections"]] == ["passed", "failed"]
    report = (tmp_path / "gpu_check.md").read_text()
    assert "| 12.5 |" in report
    assert "ValueError: no such kernel" in report
    assert "ValueError: no such kernel" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.md"]
    assert command.check_device("cpu", folder=tmp_path, names=["first"], **settings) == 0


@pytest.mark.slow
def test_failed_tests_fail_their_section(check: Check, tmp_path: Path):
    tests = tmp_path / "test_wrong.py"
    tests.write_text("def test_wrong(): assert 1 == 2\n")
    check.sizes, findings = replace(TINY, tests=(str(tests),)), Findings()
    check.ends_at = time.monotonic() + 100
    cuda_tests.run(check, findings)
    assert findings.tables["Tests"][0]["failed"] == 1
    assert "test_wrong" in findings.tables["Not passed"][0]["test"]
    assert "assert 1 == 2" in findings.failures[0]


def test_the_help_lists_all_sections():
    assert tuple(each.name for each in command.SECTIONS) == gpu_check.SECTIONS
    for name in gpu_check.SECTIONS:
        assert f"\n    {name} " in gpu_check.__doc__


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name in ("lightning", "soxr") else name)
    assert gpu_check.main([]) == 2
    assert "gpu_check needs lightning, soxr; install: " in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "finds no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("shape", "num_bytes"), [("small", 738e6), ("medium", 3221e6), ("large", 5704e6)])
def test_a_step_reads_all_weights_and_the_heads_in_float32(shape: str, num_bytes: float):
    sizes = DECODERS[shape]
    decoder = DecoderShape(
        sizes["num_hidden_layers"], sizes["hidden_size"], sizes["ffn_dim"], sizes["num_attention_heads"], 4, 2048
    )
    found = decoder.step_bytes(itemsize=2, rows=0, keys=0, text_rows=0, text_keys=0, head_width=64)
    assert found == pytest.approx(num_bytes, abs=1e6)


def test_keys_and_values_of_small_at_1000_steps_and_2_rows_are_197_megabytes():
    decoder = DecoderShape(24, 1024, 4096, 16, 4, 2048)
    settings = {"itemsize": 2, "text_rows": 0, "text_keys": 0, "head_width": 64}
    assert (
        decoder.step_bytes(rows=2, keys=1000, **settings) - decoder.step_bytes(rows=0, keys=0, **settings)
        == 196_608_000
    )


def test_operations_of_a_window_equal_the_count_of_torch():
    decoder = load("tiny").decoder
    shape = DecoderShape.of(decoder.config)
    codes, texts = torch.zeros(1, 4, 20, dtype=torch.int64), torch.zeros(1, 5, shape.width)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        score_by_transformers(decoder, codes, texts)
    above_the_diagonal = shape.num_layers * 2 * 23**2 * shape.width
    heads_of_delay = 2 * 3 * shape.head_weights
    counted = shape.window_flop(num_frames=20, text_tokens=5) + above_the_diagonal + heads_of_delay
    assert counter.get_total_flops() == counted


def test_keys_are_rounded_up_to_a_bucket():
    assert mean_keys(10, 3) == 12
    assert mean_keys(10, 3, bucket=8) == 16
    assert mean_keys(15, 2, bucket=8) == 20


def test_the_plain_loop_selects_the_most_likely_codes_of_a_forward_pass(tiny_model, generator):
    decoder, texts = tiny_model.decoder, torch.randn(2, 3, tiny_model.decoder.config.hidden_size, generator=generator)
    prompt = torch.randint(0, 64, (2, 4, 6), generator=generator)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.gpu.baselines.TOP_K", 1)
        columns = plain_loop(decoder, prompt, texts, num_turns=3)
        steps = torch.cat([torch.full((2, 4, 1), 64), prompt, torch.full((2, 4, 2), 64)], 2)
        for k in range(4):
            steps[:, k] = 64
            steps[:, k, 1 + k : 7] = prompt[:, k, : 6 - k]
        steps[:, :, 7:] = columns[:, :, :2]
        states = torch.cat([texts, torch.zeros_like(texts)])
        logits = decoder(input_ids=steps.repeat(2, 1, 1).reshape(16, -1), encoder_hidden_states=states).logits
        own, twins = logits.view(2, 2, 4, -1, 64)
        expected = torch.lerp(twins, own, 3.0).argmax(-1)[:, :, 6:9]
    assert torch.equal(columns, expected)


def test_variants_run_in_turns_and_slow_ones_are_not_repeated(monkeypatch):
    calls, seconds = [], {"fast": 0.1, "slow": 5.0}
    monkeypatch.setattr("tools.gpu.timing.seconds_of", lambda function, device: seconds[function()])
    variants = {name: lambda name=name: calls.append(name) or name for name in seconds}
    timings = time_in_turns(variants, torch.device("cpu"), repeats=3, variant_s=0.15)
    assert calls == ["fast", "slow", "fast", "fast"]
    assert (timings["fast"].seconds, timings["slow"].seconds) == ([0.1, 0.1], [5.0])
    assert timings["fast"].spread(1e3)["median"] == 100


def test_variants_that_do_not_fit_together_are_measured_alone():
    released = []

    def measure(names):
        if len(names) > 1 or names == ["large"]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {name: len(name) for name in names}

    found = in_turns_or_alone(["small", "large"], measure, lambda: released.append(True))
    assert found == {"small": 5, "large": None}
    assert released


def test_goals_are_compared_with_their_rows():
    row = {"shape": "medium", "batch": 1, "variant": goals.OURS, "steps_per_s": 200.0}
    findings = Findings(tables={goals.CONTINUATION: [row, {**row, "batch": 8, "steps_per_s": 999.0}]})
    reached = goals.reached_goals([SectionResult("continuation", "", "passed", 1.0, 1.0, findings)])
    assert (reached[0]["found"], reached[0]["reached"]) == ("200", "yes")
    assert {goal["reached"] for goal in reached[1:]} == {"not measured"}


def test_a_table_has_the_columns_of_all_rows():
    rows = [
        {"shape": "small", "ms": {"median": 1.0, "min": 0.5, "max": 20_000.0}},
        {"shape": "a|b", "share_needed": 0.256},
    ]
    assert markdown_table(rows).splitlines() == [
        "| shape | ms | share needed |",
        "| --- | --- | --- |",
        "| small | 1 (0.5 to 20,000) |  |",
        "| a\\|b |  | 26% |",
    ]
