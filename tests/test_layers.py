"""The package's layers: a package imports packages of lower layers only, and two libraries are imported in few places."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "musicgen_eval"
LAYERS = (
    ("errors",),
    ("records",),
    ("files",),
    ("audio", "models"),
    ("metrics",),
    ("data", "inference"),
    ("results",),
    ("runs",),
    ("api",),
    ("cli",),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
USES_LIGHTNING = {"runs", "cli"}


def entries() -> list[str]:
    """The top level of the package, without what every package has."""
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    packages = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    return sorted(modules - {"__init__"} | packages)


def modules() -> list[tuple[str, Path]]:
    paths = (path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in paths]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "musicgen_eval"}
    return names


def test_the_package_has_twelve_entries_and_each_has_a_layer():
    assert len(entries()) == 12
    assert set(entries()) == LAYER_OF.keys()


def test_a_package_imports_lower_layers_only():
    wrong = []
    for name, path in modules():
        for target in imported(path):
            parts = target.split(".")
            if parts[0] != "musicgen_eval" or len(parts) < 2 or parts[1] == name:
                continue
            if LAYER_OF[parts[1]] >= LAYER_OF[name]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {target}")
    assert not wrong


@pytest.mark.parametrize("library", ["lightning", "wandb"])
def test_lightning_and_wandb_are_imported_in_few_places(library: str):
    found = {path.relative_to(PACKAGE) for _, path in modules() if library in {t.split(".")[0] for t in imported(path)}}
    if library == "wandb":
        assert found == {Path("runs/wandb_logger.py")}
    else:
        assert {path.parts[0] for path in found} <= USES_LIGHTNING


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
