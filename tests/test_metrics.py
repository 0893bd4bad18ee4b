"""Sums and counts to numbers, and the file that they are written to."""

import json
import math
import re
import struct
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dppo_jax.metrics import (
    CompilationCounter,
    JsonLines,
    RunLog,
    read_lines,
    reduce_metrics,
    tensorboard,
    weights_and_biases,
)
from dppo_jax.records import Max, Mean


def mean(total, count):
    return Mean(jnp.float32(total), jnp.float32(count))


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_mean_is_its_sum_by_its_count():
    numbers = reduce_metrics({"a": mean(6, 4), "b": Max(jnp.float32(-2)), "c": mean(0, 0)})
    assert numbers["a"] == 1.5 and numbers["b"] == -2 and math.isnan(numbers["c"])


def test_gradient_steps_combine_as_microbatches_do():
    """Sums and counts add: 1 of 1 and 3 of 9 is 4 of 10, and what counted nothing adds nothing."""
    first = {"a": mean(1, 1), "b": Max(jnp.float32(2)), "c": mean(0, 0)}
    second = {"a": mean(3, 9), "b": Max(jnp.float32(5)), "c": mean(2, 4)}
    assert reduce_metrics(first, second) == {"a": 0.4, "b": 5.0, "c": 0.5}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad):
    first, second = (
        {"a": mean(bad, 1), "b": Max(jnp.float32(bad))},
        {"a": mean(1, 1), "b": Max(jnp.float32(0))},
    )
    for numbers in (reduce_metrics(first, second), reduce_metrics(second, first)):
        assert not math.isfinite(numbers["a"]) and not math.isfinite(numbers["b"])


def test_lines_of_json(tmp_path):
    log = JsonLines(tmp_path / "m.jsonl")
    log.write(step=0, good=1.5, none=math.nan, endless=-math.inf, text="x\ny", yes=True, n=3)
    log.write(step=1, good=2.0)
    written = (tmp_path / "m.jsonl").read_text()  # flushed before it is closed
    log.close()
    first, second = map(json.loads, written.splitlines())
    assert first == dict(step=0, good=1.5, none=None, endless=None, text="x\ny", yes=True, n=3)
    assert second == dict(step=1, good=2.0)


def test_resuming_drops_the_steps_that_come_again(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 1, 2, 3)))
    log = JsonLines(path, resume_at=2)
    assert steps_in(path) == [0, 1, 1]
    log.write(step=2)
    log.close()
    assert steps_in(path) == [0, 1, 1, 2]


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "reward')
    log = JsonLines(path, resume_at=5)
    log.write(step=1)
    log.close()
    assert steps_in(path) == [0, 1]


@pytest.mark.parametrize("damaged", [b"\0\0\0", b"{}", b"[1]", b"\xff", b'{"step": null}'])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, damaged):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 0}\n' + damaged + b'\n{"step": 1}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match="m.jsonl, line 2: no line of a run") as error:
        JsonLines(path, resume_at=1)
    assert "\n" not in str(error.value) and path.read_bytes() == before


def test_lines_are_dropped_by_a_new_file(tmp_path, monkeypatch):
    """Whatever stops it, a full disk or a kill, leaves the file as it was."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    monkeypatch.setattr(Path, "replace", lambda *_: exit(1))
    with pytest.raises(SystemExit):
        JsonLines(path, resume_at=1)
    assert steps_in(path) == [0, 1]


def test_resuming_without_a_file_begins_one(tmp_path):
    JsonLines(tmp_path / "m.jsonl", resume_at=0).close()
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_a_quiet_log_leaves_the_file_to_another_process(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    log = JsonLines(path, resume_at=1, quiet=True)
    log.write(step=1)
    log.close()
    assert steps_in(path) == [0, 1]


def test_compilations_are_counted():
    counter, double = CompilationCounter(), jax.jit(lambda x: 2 * x)
    x = jnp.ones(3)
    before = counter.total
    double(x)
    assert counter.total == before + 1
    double(x)
    assert counter.total == before + 1


def events_in(folder):
    """(step, name, value) of TensorBoard's event files, which are TFRecords."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += length + 16
    return found


def test_tensorboard_mirrors_what_is_finite(tmp_path):
    log = RunLog(tmp_path, 0, [tensorboard()], quiet=False)
    log.write(0, **{"reward/mean": 0.25, "mask/logp": math.nan})
    log.write(1, **{"reward/mean": 0.5, "time/compilations": 0})
    log.close()
    assert events_in(tmp_path / "tensorboard") == [
        (0, "reward/mean", 0.25),
        (1, "reward/mean", 0.5),
        (1, "time/compilations", 0.0),
    ]
    assert read_lines(tmp_path / "metrics.jsonl")[0] == {
        "step": 0, "reward/mean": 0.25, "mask/logp": None,
    }  # fmt: skip


class FakeWandb(types.ModuleType):
    """The calls of wandb that a run makes, noted."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **settings):
        self.calls.append(("init", settings))
        return types.SimpleNamespace(
            log=lambda numbers, step: self.calls.append(("log", step, numbers)),
            finish=lambda: self.calls.append(("finish",)),
        )


def test_a_resumed_run_goes_on_in_wandb(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "config.gin").write_text("STEPS = 3\n")
    for step in range(2):
        log = RunLog(tmp_path, step, [weights_and_biases(project="mine")], quiet=False)
        log.write(step, loss=0.5)
        log.close()
    kept = (tmp_path / "wandb_id").read_text()
    settings = dict(
        project="mine", entity=None, group=None, name=tmp_path.name, id=kept, resume="allow",
        dir=str(tmp_path), config={"STEPS": "3"},
    )  # fmt: skip
    assert fake.calls == [
        call
        for step in range(2)
        for call in (("init", settings), ("log", step, {"loss": 0.5}), ("finish",))
    ]


def test_only_the_writing_process_has_mirrors(tmp_path):
    log = RunLog(tmp_path, 0, [tensorboard()], quiet=True)
    log.write(0, loss=1.0)
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [(tensorboard, "tensorboardX", "tensorboard"), (weights_and_biases, "wandb", "wandb")],
)
def test_a_mirror_that_is_not_installed(monkeypatch, make, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    message = f"{module} is not installed: pip install 'dppo-jax[{extra}]' or leave the mirror out"
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
