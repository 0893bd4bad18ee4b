"""Who may import whom: the rules that keep the house's data flow visible."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dppo_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a part of the package may import of the package itself; parts that are not named may do more.
OWN = {
    "records": set(),
    "divergence": {"records"},
    "advantages": {"records", "advantages"},
    "bounds": set(),
    "objectives": {"records", "divergence", "bounds", "objectives"},
    "kernels": {"kernels"},
    "rewards": {"rewards", "prompts"},
    "optimizer": set(),
}
# Modules outside the package that one part alone may import.
SOLE_IMPORTER = {
    "gin": {"config", "recipe_checks"},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"prompts"},
    "grain": {"prompts"},
    "sentencepiece": {"prompts"},
    "rich": {"console"},
    "tensorboardX": {"metrics"},
    "wandb": {"metrics"},
}
FORBIDDEN = {
    "rewards": {"jax", "jaxlib", "flax", "optax"},
    "objectives": {"flax", "optax", "numpy"},
    "divergence": {"flax", "optax", "numpy"},
    "bounds": {"flax", "optax", "numpy"},
    "advantages": {"flax", "optax", "numpy"},
    "kernels": {"flax", "optax", "numpy"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            # `from dppo_jax import divergence` imports a module by name
            if node.module == "dppo_jax":
                names |= {f"dppo_jax.{alias.name}" for alias in node.names}
    return names - {"dppo_jax"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_rules(path):
    part, names = part_of(path), imports_of(path)
    own = {name.split(".")[1] for name in names if name.startswith("dppo_jax.")}
    outside = {name.split(".")[0] for name in names if not name.startswith("dppo_jax.")}
    if part in OWN:
        assert own <= OWN[part], f"{part} may import {OWN[part]} only"
    if part not in ("verbs", "train"):
        assert "train" not in own, "nothing but a verb imports train"
    if part in ("sampling", "scoring", "models"):
        assert "objectives" not in own
    assert not outside & FORBIDDEN.get(part, set())
    for module, importers in SOLE_IMPORTER.items():
        assert module not in outside or part in importers, f"{module} belongs to {importers}"


def test_rewards_load_without_jax():
    """Verifiers run in worker processes that must not start an accelerator."""
    import subprocess
    import sys

    code = "import sys, dppo_jax.rewards.verifiers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_file_is_a_drawer():
    assert not [p for p in FILES if p.stem in ("utils", "helpers", "misc", "common")]
    long = {
        str(p.relative_to(PACKAGE)): n
        for p in FILES
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long, f"split these: {long}"
