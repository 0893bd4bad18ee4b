"""Where recipes and the files they include are looked for, whatever the current directory."""

from collections.abc import Sequence
from pathlib import Path

from dppo_jax.recipe_checks import ConfigError

_PACKAGE = Path(__file__).resolve().parent  # holds `configs`, in a checkout by a link


def find_recipe(path: Path) -> Path:
    """A path from the current directory, or else one of the package's."""
    for candidate in (path, _PACKAGE / path):
        if candidate.is_file():
            return candidate.resolve()
    recipes = sorted((_PACKAGE / "configs" / "recipes").glob("*.gin"))
    names = ", ".join(str(recipe.relative_to(_PACKAGE)) for recipe in recipes)
    raise ConfigError(f"{path}: no such recipe; there are: {names or 'none'}")


def find_include(name: str, including: Sequence[Path], where: str) -> Path:
    """Beside the including file or above it, then so for the files that include that one.

    The files that are being read, `including` (outermost first), are passed over: none can
    include itself. `where` begins the message of the error.
    """
    folders = [folder for path in reversed(including) for folder in _up_to_configs(path.parent)]
    for folder in [*folders, Path.cwd(), _PACKAGE]:
        path = (folder / name).resolve()
        if path.is_file() and path not in including:
            return path
    raise ConfigError(f"{where}: include {name!r}: no such file here or above, up to configs/")


def display(path: Path) -> str:
    """The path as seen from the current directory, if it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _up_to_configs(folder: Path) -> list[Path]:
    """A folder and its parents, up to the one that holds `configs`, if there is such a one."""
    above = [folder, *folder.parents]
    for depth, parent in enumerate(above):
        if (parent / "configs").is_dir():
            return above[: depth + 1]
    return [folder]
