"""Recipes: what they build, what they refuse and in which words, and that they replay."""

import functools
import importlib
import pickle
import sys
from pathlib import Path

import pytest

from dppo_jax import annotations
from dppo_jax.config import ConfigError, Recipe, difference, load_recipe, split_overrides

PARTS = """
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True)
class Model:
    depth: int
    width: int = 8
    kind: Literal["dense", "moe"] = "dense"
    rope: float | None = None

@dataclass(frozen=True)
class Source:
    name: str
    size: int = 4

def sgd(lr: float, momentum: float = 0.0) -> Callable[[float], float]:
    if lr <= 0:
        raise ValueError("lr must be positive")
    return lambda gradient: lr * gradient

def adam(rate: float) -> Callable[[float], float]:
    return lambda gradient: rate

def exact(answer: str, reference: str, case: bool = True) -> float:
    return float(answer == reference)

SIZES = {"small": 1}
"""
LOOP = """
from collections.abc import Callable
from toyrl.parts import Model, Source

def train(*, model: Model, optimizer: Callable[[float], float], workdir: str, steps: int = 5,
          rewards: tuple[Callable[..., float], ...] = (), train_data: Source | None = None,
          eval_data: Source | None = None, resume: bool = False,
          betas: tuple[float, float] = (0, 1)):
    return dict(model=model, steps=steps, workdir=workdir, rewards=rewards, data=train_data,
                evaluation=eval_data, update=optimizer(2.0))
"""
HEAD = "from __gin__ import dynamic_registration\nfrom toyrl import loop\nfrom toyrl import parts\n"
BASE = (
    HEAD
    + """
STEPS = %gin.REQUIRED
LR = 0.5
MODEL = @parts.Model()
loop.train:
    model = %MODEL
    optimizer = @parts.sgd()
    steps = %STEPS
parts.Model.depth = 2
parts.sgd.lr = %LR
"""
)
IMPORTS = "from toyrl import loop\nfrom toyrl import parts\n"
TOP = "from __gin__ import dynamic_registration\ninclude 'configs/base.gin'\nSTEPS = 10\n"


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    package = tmp_path_factory.mktemp("path") / "toyrl"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "parts.py").write_text(PARTS)
    (package / "loop.py").write_text(LOOP)
    sys.path.insert(0, str(package.parent))
    yield importlib.import_module("toyrl.loop")
    sys.path.remove(str(package.parent))
    for name in [n for n in sys.modules if n.split(".")[0] == "toyrl"]:
        del sys.modules[name]


@pytest.fixture
def load(loop, tmp_path):
    """Loads a recipe text that may include configs/base.gin."""
    recipes = tmp_path / "configs" / "recipes"
    recipes.mkdir(parents=True)
    (recipes.parent / "base.gin").write_text(BASE)

    def run(text: str = TOP, *overrides: str, given: tuple[str, ...] = ("workdir",)) -> Recipe:
        (recipes / "top.gin").write_text(text)
        return load_recipe(recipes / "top.gin", loop.train, overrides, given)

    return run


def test_builds_the_arguments_and_calls(load, loop):
    recipe = load(TOP + IMPORTS + "MODEL/parts.Model.width = 16\n")
    parts = sys.modules["toyrl.parts"]
    result = recipe.call(workdir="run")
    assert result["model"] == parts.Model(depth=2, width=16)
    assert (result["steps"], result["workdir"], result["update"]) == (10, "run", 1.0)
    assert recipe.arguments("model", "resume") == {"model": result["model"], "resume": False}


def test_includes_are_found_from_any_directory(load, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert load(TOP.replace("configs/base.gin", "../base.gin")).arguments()["steps"] == 10
    assert load().arguments()["steps"] == 10
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load().arguments()["steps"] == 10


def test_bare_references_are_plain_functions(load, loop):
    with_case = IMPORTS + "loop.train.rewards = (@parts.exact, @loose/parts.exact)\n"
    rewards = load(TOP + with_case + "loose/parts.exact.case = False\n").arguments()["rewards"]
    exact = sys.modules["toyrl.parts"].exact
    assert rewards[0] is exact and pickle.loads(pickle.dumps(rewards[0])) is exact
    assert isinstance(rewards[1], functools.partial) and rewards[1].keywords == {"case": False}


SCOPED = """from toyrl import loop
from toyrl import parts
loop.train.train_data = @train/parts.Source()
loop.train.eval_data = @eval/parts.Source()
parts.Source.name = 'sums'
eval/parts.Source.size = 1
loop.train.rewards = (@parts.exact, @loose/parts.exact)
loose/parts.exact.case = False
"""


def test_operative_text_replays_the_run(load):
    recipe = load(TOP + SCOPED, "LR=0.25")
    first = recipe.call(workdir="run")
    asked, operative = recipe.config_text(), recipe.operative_config_text()
    assert "loop.train.resume = False" in operative, "defaults are part of what is in force"
    assert "eval/parts.Source.size = 1" in operative and "workdir" not in operative
    for text in (operative, asked):
        again = load(text)
        second = again.call(workdir="run")
        first["rewards"], second["rewards"] = str(first["rewards"]), str(second["rewards"])
        assert first == second
        assert again.operative_config_text() == operative
    assert load(asked).config_text() == asked


def test_texts_do_not_depend_on_what_was_loaded_before(load):
    recipe = load()
    recipe.arguments()
    aliases = HEAD.replace("parts", "parts as p").replace("loop", "loop as l")
    load(
        aliases + "l.train:\n  optimizer = @p.adam()\n  model = @p.Model()\n"
        "p.Model.depth = 1\np.adam.rate = 2\n"
    )
    with pytest.raises(RuntimeError, match="another recipe was loaded"):
        recipe.arguments()
    again = load()
    again.arguments()
    assert again.operative_config_text() == recipe.operative_config_text()


def test_an_overlay_replaces_a_part_together_with_its_settings(load):
    overlay = IMPORTS + "loop.train.optimizer = @parts.adam()\n"
    recipe = load(TOP + overlay + "parts.adam.rate = 3.0\n")
    assert recipe.call(workdir="run")["update"] == 3.0
    assert "sgd" not in recipe.config_text() and "LR" not in recipe.config_text()
    with pytest.raises(ConfigError, match=r"^--gin.LR=1: nothing uses this macro"):
        load(TOP + overlay + "parts.adam.rate = 3.0\n", "LR=1")


def test_overrides(load, loop):
    recipe = load(
        TOP + SCOPED,
        "STEPS=3",
        "loop.train.betas=(0.5, 1)",
        "parts.Source.name=data/sums-1.txt",
        "MODEL=@parts.Model()",
        "parts.Model.kind='moe'",
    )
    arguments = recipe.arguments()
    assert (arguments["steps"], arguments["betas"]) == (3, (0.5, 1))
    assert arguments["train_data"].name == "data/sums-1.txt"
    assert arguments["model"].kind == "moe"
    overrides, rest = split_overrides(["r.gin", "--gin.A=1", "--json", "--gin.x/f.B='a = b'"])
    assert (overrides, rest) == (["A=1", "x/f.B='a = b'"], ["r.gin", "--json"])
    with pytest.raises(ConfigError, match=r"^--gin.STEPS: write --gin.NAME=VALUE"):
        split_overrides(["--gin.STEPS", "3"])


# What follows the imports is line 6.
FILE_ERRORS = {
    "macro misspelt": (
        "STEP = 3",
        "top.gin:6: STEP = 3: nothing uses this macro; did you mean STEPS?",
    ),
    "macro undefined": (
        "loop.train.resume = %RESUM\n",
        "top.gin:6: loop.train.resume = %RESUM: no macro RESUM is set",
    ),
    "scope unused": (
        "eval/parts.Model.depth = 3",
        "top.gin:6: eval/parts.Model.depth = 3: no effect,"
        " nothing in force calls eval/toyrl.parts.Model",
    ),
    "configurable unused": (
        "parts.adam.rate = 1",
        "top.gin:6: parts.adam.rate = 1: no effect, nothing in force calls toyrl.parts.adam",
    ),
    "float for int": (
        "STEPS = 3.5",
        "top.gin:6: STEPS = 3.5: loop.train.steps wants int, not float",
    ),
    "bool for int": (
        "parts.Model.width = True",
        "top.gin:6: parts.Model.width = True: wants int, not bool",
    ),
    "str for float": ("LR = '0.3'", "top.gin:6: LR = '0.3': parts.sgd.lr wants float, not str"),
    "str for bool": (
        "loop.train.resume = 'true'",
        "wants bool, not str; write True without quotes",
    ),
    "literal": (
        "parts.Model.kind = 'dens'",
        "top.gin:6: parts.Model.kind = 'dens': wants Literal['dense', 'moe']; did you mean dense?",
    ),
    "optional": ("parts.Model.rope = 'x'", "parts.Model.rope = 'x': wants float | None, not str"),
    "list for tuple": (
        "loop.train.betas = [0.1, 0.2]",
        "wants tuple[float, float], not list; a tuple is written (a, b)",
    ),
    "tuple too long": ("loop.train.betas = (1, 2, 3)", "= (1, 2, 3): wants tuple[float, float]"),
    "macro cycle": ("LR = %RATE\nRATE = (%LR,)", "top.gin:7: RATE = (%LR,): refers to itself"),
    "object cycle": (
        "loop.train.train_data = @parts.Source()\nparts.Source.name = @parts.Source()",
        "top.gin:7: parts.Source.name = @parts.Source(): refers to itself",
    ),
    "name for callable": (
        "loop.train.optimizer = 'adam'",
        "wants Callable[[float], float], not str; a function or object is written @module.name",
    ),
    "wrong object": (
        "MODEL = @parts.Source()\nparts.Source.name = 'x'",
        "top.gin:6: MODEL = @parts.Source(): loop.train.model wants toyrl.parts.Model",
    ),
    "not called": (
        "loop.train.train_data = @parts.Source",
        "wants toyrl.parts.Source | None, not type; with () behind the name it is called",
    ),
    "infinite": (
        "LR = 1e999",
        "top.gin:6: LR = inf: gin cannot write inf back; bind a finite number",
    ),
    "macro required": (
        "LR = %gin.REQUIRED",
        "top.gin:6: LR = %gin.REQUIRED: required; set it, or give --gin.LR=VALUE",
    ),
    "parameter required": (
        "loop.train.train_data = @parts.Source()",
        "top.gin:6: loop.train.train_data = @parts.Source(): toyrl.parts.Source.name is required",
    ),
    "unknown parameter": (
        "loop.train.stepz = 3",
        "top.gin:6: loop.train has no parameter stepz; did you mean steps?",
    ),
    "unknown function": (
        "loop.train.optimizer = @parts.sgdd()",
        "top.gin:6: toyrl.parts has no sgdd; did you mean sgd?",
    ),
    "unknown module": ("part.sgd.lr = 1", "top.gin:6: part is not imported; did you mean parts?"),
    "module for function": ("loop.steps = 1", "top.gin:6: loop is not a function or class"),
    "not a function": ("loop.train.steps = @parts.SIZES", "parts.SIZES is not a function or class"),
    "import": ("import toyrl.nothing", "top.gin:6: No module named 'toyrl.nothing'"),
    "include": ("include 'bse.gin'", "top.gin:6: include 'bse.gin': no such file"),
    "syntax": ("STEPS = = 3", "top.gin:6: syntax: Unable to parse value."),
    "arithmetic": ("STEPS = 2*8", "top.gin:6: syntax: Expected newline."),
    "bare word": ("STEPS = ten", "top.gin:6: syntax: cannot read ten; strings need quotes"),
    "unclosed": ("STEPS = (1,\n", ": syntax: "),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_mistakes_in_files_are_one_line(load, name):
    line, message = FILE_ERRORS[name]
    with pytest.raises(ConfigError) as error:
        load(TOP + IMPORTS + line + "\n")
    assert message in str(error.value)
    assert ".gin:" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("STPES=3", "--gin.STPES=3: nothing uses this macro; did you mean STEPS?"),
        ("STEPS=3.5", "--gin.STEPS=3.5: loop.train.steps wants int, not float"),
        ("STEPS=ten", "--gin.STEPS=ten: loop.train.steps wants int, not str"),
        ("loop.train.resume=true", "wants bool, not str; write True without quotes"),
        ("LR=a b", """--gin.LR=a b: not a gin value; a string with blanks or symbols needs quotes \
inside the shell's: --gin.LR="'...'\""""),
        ("LR=@part.x", "--gin.LR=@part.x: part is not imported; did you mean parts?"),
        ("loop.train.stepz=3", "--gin.loop.train.stepz=3: loop.train has no parameter stepz"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_name_the_flag(load, override, message):
    with pytest.raises(ConfigError) as error:
        load(TOP, override)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_parts_of_the_whole(load, loop, tmp_path):
    with pytest.raises(ConfigError, match=r"top.gin: toyrl.loop.train.workdir is required"):
        load(given=())
    with pytest.raises(ConfigError, match=r"base.gin:5: STEPS = %gin.REQUIRED: required"):
        load(TOP.replace("STEPS = 10", ""))
    with pytest.raises(ConfigError, match=r"top.gin:1: begin with from __gin__ import dynamic"):
        load("STEPS = 10\n")
    with pytest.raises(ConfigError, match=r"top.gin: binds no parameter of toyrl.loop.train"):
        load(HEAD)
    with pytest.raises(ConfigError, match=r"nowhere.gin: no such recipe; there are: "):
        load_recipe(Path("nowhere.gin"), loop.train)


def test_a_constructor_that_refuses_is_named_with_its_binding(load):
    recipe = load(TOP, "LR=-1.0")
    where = r"base.gin:10: loop.train.optimizer = @parts.sgd\(\): lr must be positive$"
    with pytest.raises(ConfigError, match=where):
        recipe.arguments()


def test_difference_names_the_first_bindings(load):
    one, other = load(TOP + SCOPED), load(TOP + SCOPED, "STEPS=20", "MODEL/parts.Model.width=3")
    assert difference(one.config_text(), one.config_text()) is None
    assert difference(one.config_text(), other.config_text()) == (
        "STEPS is 10 here and 20 in the stored run; "
        "MODEL/parts.Model.width is unset here and 3 in the stored run"
    )
    assert "and 5 more" in (difference("", "".join(f"A{i} = @x.y()\n" for i in range(8))) or "")
    with pytest.raises(ConfigError, match=r"^the stored one:1: syntax"):
        difference("", "A = =")


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int | None, [None, 3], [3.0, True, "3"]),
        (float, [1, 1.5], [True, "1", None]),
        (list[int], [[1, 2], []], [[1.5], (1,)]),
        (dict[str, float], [{"a": 1}], [{"a": "b"}, {1: 1}]),
        (tuple[int, ...], [(), (1, 2)], [(1, "a")]),
        (tuple[()], [()], [(1,)]),
        (Path, [Path("a")], ["a"]),
    ],
)
def test_values_against_annotations(hint, good, bad):
    assert all(annotations.accepts(hint, value) for value in good)
    assert not any(annotations.accepts(hint, value) for value in bad)
