"""Private members of libraries are used in one module per library, which a test of its own holds to the library's version."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "musicgen_eval"
ADAPTERS = {
    "metrics/plugin/metric_internals.py",
    "models/torch_internals.py",
    "models/transformers_internals.py",
    "runs/processes/lightning_internals.py",
    "runs/wandb_internals.py",
}
ALLOWED = {
    "runs/processes/signals.py": {"_exit"},  # os._exit, which is documented
}


def modules() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") and part != "_" for part in name.split("."))


def named_members(tree: ast.AST) -> Iterator[str]:
    """Private names that are read from, or written to, any object, or imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in GETTERS:
            yield from (part.value for part in node.args[1:2] if isinstance(part, ast.Constant))


GETTERS = {"getattr", "setattr", "hasattr", "delattr"}


def defined_members(tree: ast.AST) -> set[str]:
    """Names that classes of this source define: methods, class attributes, and attributes that are set on `self`."""
    names = set()
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        for node in ast.walk(owner):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_itself(node):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def on_itself(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def members_of_others(module: str) -> set[str]:
    """Private members of objects whose classes are defined elsewhere."""
    tree = ast.parse((PACKAGE / module).read_text())
    return {name for name in named_members(tree) if is_private(name)} - defined_members(tree)


def inherited_members(module: str) -> set[str]:
    """Private members of a library's base classes that a class of ours uses, overrides or shadows."""
    tree = ast.parse((PACKAGE / module).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
    if not classes:
        return set()
    name = "musicgen_eval." + module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    found = set()
    for node in classes:
        names = defined_members(node) | set(named_members(node))
        for base in getattr(importlib.import_module(name), node.name).__mro__[1:]:
            if base.__module__.partition(".")[0] in LIBRARIES:
                found |= names & defined_members(ast.parse(inspect.getsource(inspect.getmodule(base))))
    return {name for name in found if is_private(name)}


LIBRARIES = {"lightning", "torch", "torchmetrics", "transformers", "wandb"}


@pytest.mark.parametrize("module", sorted(set(modules()) - ADAPTERS))
def test_private_members_are_used_in_the_adapters_only(module: str):
    assert members_of_others(module) | inherited_members(module) <= ALLOWED.get(module, set())


def test_each_adapter_exists_and_uses_private_members():
    for module in ADAPTERS:
        assert members_of_others(module) | inherited_members(module)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("metric._defaults", "_defaults"),
        ("getattr(model, '_commit_hash', None)", "_commit_hash"),
        ("import torch._dynamo", "torch._dynamo"),
        (
            "from lightning.pytorch.strategies.launchers import _Launcher",
            "lightning.pytorch.strategies.launchers._Launcher",
        ),
    ],
)
def test_a_private_member_is_found_in_each_form(line: str, name: str):
    assert name in {found for found in named_members(ast.parse(line)) if is_private(found)}
