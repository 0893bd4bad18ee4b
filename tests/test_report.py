"""The HTML page of runs: by hand from small run directories, then by the command."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from dppo_jax import report

SVG = "{http://www.w3.org/2000/svg}"
EVALUATION = {"accuracy_low": 0.1, "accuracy_high": 0.9}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def a_run(directory, rewards=(0.25, 0.5, 1.0), learning_rate=1e-3, accuracy=(0.5, 0.75), **more):
    directory.mkdir(parents=True)
    steps = [
        {"step": i, "reward/mean": r, "mismatch/prob_abs_mean": 0.0, "mask/fraction": None} | more
        for i, r in enumerate(rewards)
    ]
    write_lines(directory / "metrics.jsonl", steps)
    text = f"train.train.steps = {len(rewards)}\noptimizer.adamw.learning_rate = {learning_rate}\n"
    (directory / "config.gin").write_text(text)
    if accuracy:
        before, after = ({"sums": EVALUATION | {"accuracy": x}} for x in accuracy)
        summary = {"wall_seconds": 61.0, "seed": 0, "before": before, "after": after}
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def tables(page):
    """The cells of each table, by rows."""
    root = ElementTree.fromstring(page)
    return [
        [["".join(cell.itertext()) for cell in row] for row in table]
        for table in root.iter("table")
    ]


def titles(page):
    """Of the panels: the first text of each drawing."""
    root = ElementTree.fromstring(page)
    return [next(svg.iter(f"{SVG}text")).text for svg in root.iter(f"{SVG}svg")]


def test_a_finished_run(tmp_path):
    page = report.page(report.read([a_run(tmp_path / "a")]))
    outcome, bindings, metrics = tables(page)
    assert dict(zip(*outcome, strict=True)) == {
        "run": "a",
        "steps": "3",
        "sums, before": "0.500 [0.100, 0.900]",
        "sums, after": "0.750 [0.100, 0.900]",
        "reward, last 10 steps": "0.5833",
        "best reward": "1",
        "collapsed at": "",
        "time": "1:01",
        "devices": "",
    }
    assert titles(page) == ["accuracy, sums", "reward/mean", "mismatch/prob_abs_mean"]
    assert ["optimizer.adamw.learning_rate", "0.001"] in bindings
    assert ["reward/mean", "0.5833"] in metrics and ["mask/fraction", ""] in metrics
    assert "In what the recipes differ" not in page


def test_runs_side_by_side(tmp_path):
    """Only what differs stands in the table of differences; a run may lack a binding."""
    faster = a_run(tmp_path / "faster", learning_rate=2e-3)
    with (faster / "config.gin").open("a") as file:
        file.write("train.train.microbatches = 2\n")
    page = report.page(report.read([a_run(tmp_path / "slow"), faster]))
    assert tables(page)[1] == [
        ["binding", "slow", "faster"],
        ["optimizer.adamw.learning_rate", "0.001", "0.002"],
        ["train.train.microbatches", "unset", "2"],
    ]
    alike = [a_run(tmp_path / "x" / "same"), a_run(tmp_path / "y" / "same")]
    runs = report.read(alike)
    assert [run.name for run in runs] == [str(path) for path in alike]
    assert "<p>In nothing.</p>" in report.page(runs)


def test_a_run_that_goes_on(tmp_path):
    """No summary yet, an evaluation on the way, and a last line that is not written whole."""
    run = a_run(tmp_path / "on", accuracy=(), **{"eval/sums/accuracy": 0.5})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    page = report.page(report.read([run]))
    assert tables(page)[0][1][:2] == ["on", "3, not finished"]
    assert titles(page)[0] == "accuracy, sums"


def test_a_damaged_line_is_named(tmp_path):
    run = a_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("garbage\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 4: no line of a run"):
        report.read([run])


def test_texts_stay_texts(tmp_path):
    """Whatever a policy writes; the newest samples, and the tokens most masked."""
    run = a_run(tmp_path / "a")
    hostile = "<script>alert(1)</script> & \"'"
    sample = {"prompt": "2+2", "response": hostile, "score": 1.0, "reason": "correct"}
    samples = [{"step": step} | sample for step in range(report.SAMPLES + 5)]
    write_lines(run / "samples.jsonl", samples)
    counts = {"masked_positive": 2, "masked_negative": 1, "occurrences": 300, "share": 0.01}
    (run / "masked_tokens.json").write_text(json.dumps([{"text": "<s>"} | counts]))
    page = report.page(report.read([run]))
    assert "<script" not in page
    masked, shown = tables(page)[2:4]
    assert masked[1] == ["'<s>'", "2", "1", "300", "0.01"]
    assert [row[0] for row in shown[1:]] == [str(step) for step in range(5, report.SAMPLES + 5)]
    assert shown[1][1:] == ["1", "2+2", hostile, "correct"]


def test_the_command(dppo, tmp_path):
    run, other = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    done = dppo("report", str(run))
    assert done.out == f"{run / 'report.html'}\n"
    assert ElementTree.parse(run / "report.html")
    assert not dppo("report", str(run), str(other), "-o", str(tmp_path / "two.html")).status
    assert "b" in tables((tmp_path / "two.html").read_text(encoding="utf-8"))[0][2]


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (("a", "b"), "which file is the page of several runs? Give it with -o FILE.html"),
        (("nowhere",), "nowhere holds no run: it has no metrics.jsonl"),
    ],
)
def test_bad_input(dppo, tmp_path, monkeypatch, runs, words):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "a"), a_run(tmp_path / "b")
    done = dppo("report", *runs)
    assert (done.status, done.err) == (2, f"dppo: {words}\n")
    assert not list(tmp_path.rglob("*.html"))
