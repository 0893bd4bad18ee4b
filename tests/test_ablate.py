"""Grids of runs: the numbers of a table by hand, then the command on the toy recipe."""

import json
import math
import shutil
import xml.etree.ElementTree as ElementTree

import pytest

from dppo_jax import ablate
from dppo_jax.curves import Panel, draw

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("rewards", "step"),
    [
        ([], None),
        ([0.2, 0.4, 0.8, 0.5, 0.41], None),  # never below half of 0.8
        ([0.2, 0.8, 0.3, 0.1], 2),
        ([0.2, 0.8, 0.3, 0.4, 0.1, 0.39], 4),  # back at exactly half, then gone for good
        ([0.2, 0.8, 0.3, 0.41], None),
        ([0.8, 0.1], 1),
        ([0.0, 0.0, -1.0], None),  # the best is not positive
        ([-1.0, 0.4, 0.1], 2),
    ],
)
def test_collapse_step(rewards, step):
    assert ablate.collapse_step(rewards) == step


def test_interval_is_students():
    """t(0.975, 2 degrees of freedom) = 4.302653; the deviation of (1, 2, 6) is sqrt(7)."""
    found = ablate.interval([1.0, 2.0, 6.0])
    half = 4.302653 * math.sqrt(7) / math.sqrt(3)
    assert found == pytest.approx({"mean": 3, "low": 3 - half, "high": 3 + half}, rel=1e-6)
    assert ablate.interval([0.5]) == {"mean": 0.5, "low": None, "high": None}
    assert ablate.interval([]) == {"mean": None, "low": None, "high": None}


def finished(workdir, rewards, accuracy, mismatch=0.01):
    workdir.mkdir(parents=True)
    lines = [
        {"step": i, "reward/mean": r, "mismatch/prob_abs_mean": mismatch * (i + 1)}
        for i, r in enumerate(rewards)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "summary.json").write_text(json.dumps({"accuracy_after": accuracy}))


def test_a_grid_goes_on_after_a_failure(tmp_path):
    """One cell finished before, one fails, two run."""
    cells = ablate.grid(["algorithms/a.gin", "b.gin"], 2, tmp_path)
    assert [(c.algorithm, c.seed) for c in cells] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    finished(cells[0].workdir, [0.2, 0.9, 0.1], 0.75)
    ran, said = [], []

    def run(cell):
        ran.append(cell)
        if cell == cells[2]:
            raise FloatingPointError("loss/total is nan\nat step 7")
        finished(cell.workdir, [0.2, 0.4, 0.6], 0.25)

    outcomes = ablate.run_grid(cells, run, said.append)
    assert ran == cells[1:] and "finished before" in said[0]
    first, second = ablate.write(tmp_path, outcomes)
    assert first["accuracy"]["mean"] == 0.5 and second["accuracy"] == {
        "mean": 0.25, "low": None, "high": None,
    }  # fmt: skip
    assert first["reward_best"]["mean"] == pytest.approx(0.75)
    assert first["mismatch_max"]["mean"] == pytest.approx(0.03)
    assert [cell["collapse_step"] for cell in first["cells"]] == [2, None]
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| a | 2 of 2 | 0.500 [-2.677, 3.677] |" in text and "| 1, at 2 |" in text
    assert "| b | 1 of 2 | 0.250 | 0.400 | 0.600 | 0.03 | 0 |" in text
    assert "b, seed 0 failed: loss/total is nan at step 7" in text
    assert json.loads((tmp_path / "table.json").read_text()) == [first, second]


def test_curves_are_an_svg_with_a_line_each():
    runs = {"a & b": [[0.0, 1.0, 2.0], [2.0, 3.0]], "c": [[math.nan, 5.0, 1.0]], "nothing": [[]]}
    root = ElementTree.fromstring(draw([Panel("reward", runs), Panel("<mismatch>", {})]))
    lines = root.findall(f".//{SVG}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 2]
    # the mean of (0, 2), (1, 3), (2): 1, 2, 2 on axes from 0 (bottom) to 5
    ys = [float(point.split(",")[1]) for point in lines[0].attrib["points"].split()]
    assert ys == [208.0, 156.0, 156.0]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a & b", "c", "nothing", "reward", "<mismatch>", "step"} <= set(texts)


@pytest.fixture(scope="module")
def overlays(tmp_path_factory):
    """An algorithm that trains, and one that gin accepts and the run refuses."""
    folder = tmp_path_factory.mktemp("over")
    start = "from __gin__ import dynamic_registration\nfrom dppo_jax import objectives\n"
    start += "from dppo_jax import train\n"
    (folder / "good.gin").write_text(start + "train.train.objective = @objectives.grpo()\n")
    (folder / "bad.gin").write_text(start + "TOP_K_CAPTURE = 17\n")
    return [folder / "good.gin", folder / "bad.gin"]


def test_a_grid_of_runs(dppo, toy_recipe, overlays, tmp_path):
    workdir = tmp_path / "grid"
    command = ["ablate", toy_recipe, "--over", *overlays, "--seeds", 2, "--workdir", workdir,
               "--gin.STEPS=2"]  # fmt: skip
    done = dppo(*command)
    assert done.status == 1
    assert done.err == f"dppo: 2 of 4 cells failed: see {workdir / 'table.md'}\n"
    assert "| good | 2 of 2 |" in done.out and "| bad | 0 of 2 | - | - |" in done.out
    assert "bad, seed 1 failed: top_k_capture=17 is not within 1..16" in done.out
    assert {path.name for path in workdir.iterdir()} == {
        "good-seed0", "good-seed1", "table.json", "table.md", "curves.svg",
    }  # fmt: skip
    good = json.loads((workdir / "table.json").read_text())[0]
    for cell in good["cells"]:
        summary = json.loads((workdir / f"good-seed{cell['seed']}" / "summary.json").read_text())
        assert summary["seed"] == cell["seed"]
        assert summary["accuracy_after"] == cell["accuracy"]
        assert cell["steps"] == 2
    assert len({cell["reward_last"] for cell in good["cells"]}) == 2

    stopped = workdir / "good-seed1"
    shutil.rmtree(stopped / "checkpoints" / "2")
    (stopped / "summary.json").unlink()
    again = dppo(*command, "--json")
    rows = json.loads(again.out)["table"]
    assert again.status == 1 and rows[0] == good

    refused = dppo(*command, "--gin.LEARNING_RATE=1e-3")
    assert refused.status == 2 and "holds a run of another configuration" in refused.err
    assert refused.err.count("\n") == 1 and not refused.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--over", "nothing.gin"], "over the recipe: include 'nothing.gin': no such file"),
        (["--over", "configs/algorithms/grpo.gin", "--seeds", "0"], "--seeds 0: give at least 1"),
        (["--over", "configs/algorithms/grpo.gin", "grpo.gin"], "two files are called grpo.gin"),
        (["--over", "configs/algorithms/grpo.gin", "--gin.SETPS=3"], "did you mean STEPS"),
    ],
)
def test_ablate_refuses(dppo, toy_recipe, tmp_path, flags, message):
    workdir = tmp_path / "grid"
    refused = dppo("ablate", toy_recipe, *flags, "--workdir", workdir)
    assert refused.status == 2 and refused.err.count("\n") == 1, refused.err
    assert message in refused.err and not workdir.exists() and not refused.out


def test_a_folder_that_is_no_grid(dppo, toy_recipe, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    refused = dppo(
        "ablate", toy_recipe, "--over", "configs/algorithms/grpo.gin", "--workdir", tmp_path
    )
    assert refused.status == 2 and "holds no run of this grid" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
