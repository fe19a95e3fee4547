"""The house: a floor imports lower floors only, and two libraries stay where they belong."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "musicgen_eval"
FLOORS = (
    ("errors", "records", "nameless_user"),
    ("audio", "windows", "delay", "sampling", "statistics", "redaction", "argument_types"),
    ("notes",),
    ("models",),
    ("scoring", "window_scoring", "continuation", "window_continuation", "readings", "metrics", "merging"),
    (
        "offers",
        "plans",
        "trial",
        "bank",
        "fingerprint",
        "number_table",
        "journal",
        "terminal",
        "stopping",
        "ranks",
        "sharing",
        "data",
        "continuing",
        "recipe",
        "results",
        "running",
        "module",
    ),
    (
        "result_files",
        "run_folder",
        "continuation_files",
        "progress",
        "tables",
        "writer",
        "wandb_logger",
        "result_logger",
        "tracking",
        "quiet",
        "one_process",
    ),
    ("runs", "api", "arguments", "parser_messages", "lightning_cli", "everyday", "cli"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
USES_LIGHTNING = {
    "stopping",
    "ranks",
    "sharing",
    "data",
    "module",
    "progress",
    "writer",
    "tracking",
    "wandb_logger",
    "result_logger",
    "one_process",
    "runs",
    "lightning_cli",
    "cli",
}


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_module_has_a_floor():
    assert {name for name, _ in modules() if name != "__init__"} <= FLOOR_OF.keys()


def test_a_floor_imports_lower_floors_only():
    wrong = []
    for name, path in modules():
        if name == "__init__":
            continue
        for target in imported(path):
            parts = target.split(".")
            if parts[0] != "musicgen_eval" or len(parts) < 2:
                continue
            if FLOOR_OF[parts[1]] > FLOOR_OF[name]:
                wrong.append(f"{path.name} imports {target}")
    assert not wrong


def test_lightning_and_wandb_stay_on_their_floors():
    for name, path in modules():
        roots = {target.split(".")[0] for target in imported(path)}
        assert "lightning" not in roots or name in USES_LIGHTNING, path
        assert "wandb" not in roots or name in ("tracking", "wandb_logger"), path


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, musicgen_eval; print([m for m in ('torch', 'lightning', 'transformers', 'wandb') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_public_name_can_be_imported():
    package = importlib.import_module("musicgen_eval")
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert package.MusicGen_Perplexity is package.perplexity
