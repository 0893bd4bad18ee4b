"""The golden checker: on the stored recordings, on the full ones, and on files that lie."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
FULL = Path(__file__).parents[2] / "shared" / "data" / "golden"
sys.path.insert(0, str(GOLDEN))

import check  # noqa: E402

STORED = GOLDEN / "policy_losses.jsonl.gz"
INPUTS = GOLDEN / "inputs.json"
ROWS = [json.loads(line) for line in gzip.decompress(STORED.read_bytes()).splitlines()]


def run(tmp_path, capsys, *lines, options=()):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    status = check.main([str(path), "--inputs", str(INPUTS), *options])
    return status, capsys.readouterr()


def row_of(mode, impl="Stable-RL"):
    return next(row for row in ROWS if (row["impl"], row["loss_mode"]) == (impl, mode))


def test_stored_goldens(capsys):
    assert check.main([str(STORED)]) == 0
    out = capsys.readouterr().out
    assert f"checked {len(ROWS)} of {len(ROWS)} rows" in out
    assert "k=1:" in out and "k=20:" in out


@pytest.mark.skipif(not FULL.is_dir(), reason=f"no full recordings at {FULL}")
def test_full_goldens(capsys):
    assert (
        check.main([str(FULL / "policy_losses.jsonl.gz"), "--inputs", str(FULL / "inputs.json")])
        == 0
    )
    out = capsys.readouterr().out
    assert "checked 156 of 156 rows" in out
    for mode in ("dppo_topk_kl", "dppo_binary_tv_recompute", "ppo_recompute", "pg_no_mask"):
        assert f"Stable-RL      {mode} " in out


@pytest.mark.parametrize("folder", [GOLDEN, FULL], ids=["stored", "full"])
def test_advantages_kl_penalties_and_aggregations(folder, capsys):
    path = folder / "advantages_kl_agg.json"
    if not path.exists():
        pytest.skip(f"no recordings at {folder}")
    assert check.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "checked 26 rows" in out
    for name in ("reinforce_plus_plus_baseline", "gae gamma=0.99 lam=0.9", "KL low_var_kl+"):
        assert f"{name} " in out


@pytest.mark.parametrize(
    "part, index, name",
    [("advantages", 4, "advantages"), ("advantages", 8, "returns"), ("kl_penalty", 10, "value"),
     ("kl_penalty", 10, "grad_log_prob"), ("agg_loss", 1, "loss")],
)  # fmt: skip
def test_a_wrong_advantage_fails(tmp_path, capsys, part, index, name):
    recorded = json.loads((GOLDEN / "advantages_kl_agg.json").read_text())
    rows = recorded[part]["rows"] if part == "kl_penalty" else recorded[part]
    if name == "loss":
        rows[index][name] += 1e-3
    else:
        rows[index][name][0][0] += 1e-3
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(recorded))
    assert check.main([str(path), "--inputs", str(INPUTS)]) == 1
    recorded["advantages"][0]["estimator"] = "remax"
    path.write_text(json.dumps(recorded))
    assert check.main([str(path), "--inputs", str(INPUTS)]) == 2
    assert "'remax' is not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mode", ["dppo_binary_tv", "dppo_binary_kl_recompute", "dppo_topk_tv", "ppo", "ppo_recompute"]
)
@pytest.mark.parametrize("what", ["loss", "token_mask", "d_log_prob", "clip_ratio_c"])
def test_a_wrong_figure_fails(tmp_path, capsys, mode, what):
    """Off by 1e-4, one mask bit flipped, or another cap than the one that made the row."""
    row = json.loads(json.dumps(row_of(mode)))
    if what == "token_mask":
        row["token_mask"][1][0] = 1 - row["token_mask"][1][0]
    elif what == "d_log_prob":
        row["d_log_prob"][1][0] += 1e-4
    elif what == "clip_ratio_c":
        row["clip_ratio_c"] = 0.5
    else:
        row["loss"] += 1e-4 * max(1, abs(row["loss"]))
    status, captured = run(tmp_path, capsys, row)
    assert status == 1
    assert "checked 1 of 1 rows" in captured.out


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "geo_mean", "sapo", "dro"])
def test_a_wrong_gradient_fails(tmp_path, capsys, mode):
    row = json.loads(json.dumps(row_of(mode, "verl")))
    assert run(tmp_path, capsys, row)[0] == 0
    row["d_log_prob"][1][0] += 1e-4
    assert run(tmp_path, capsys, row)[0] == 1


def test_not_a_number_fails(tmp_path, capsys):
    assert run(tmp_path, capsys, row_of("ppo") | {"loss": float("nan")})[0] == 1


def test_unknown_modes_are_counted_not_failed(tmp_path, capsys):
    row = row_of("ppo")
    strange = [row | {"loss_mode": "nft"}, row | {"loss_agg_mode": "median"}, row | {"impl": "x"}]
    status, captured = run(tmp_path, capsys, row, *strange)
    assert status == 0
    assert "checked 1 of 4 rows" in captured.out
    assert "Stable-RL nft, 1 rows: mode is not known" in captured.out
    assert "aggregation median is not known" in captured.out


def test_rows_without_topk_inputs_are_named(tmp_path, capsys):
    topk = row_of("dppo_topk_kl") | {"case": "synthetic_a"}
    other = row_of("dppo_binary_kl")
    topk["d_log_prob"] = other["d_log_prob"]
    status, captured = run(tmp_path, capsys, topk, other)
    assert status == 0
    assert "not checked: Stable-RL dppo_topk_kl, 1 rows: no top-K log-probabilities" in captured.out


@pytest.mark.parametrize(
    "broken, complaint",
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ({"loss": None}, "line 1: 'loss' is None"),
        ({"case": "nowhere"}, "case 'nowhere' is not in the inputs"),
        ({"old_is": "ref_log_prob"}, "old_is is 'ref_log_prob'"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"d_log_prob": [[0.0]]}, "d_log_prob has shape (1, 1)"),
        ({"d_log_prob": [["a"]]}, "d_log_prob is not an array of numbers"),
    ],
)
def test_bad_rows_are_one_clear_line(tmp_path, capsys, broken, complaint):
    line = broken if isinstance(broken, str) else row_of("ppo") | broken
    status, captured = run(tmp_path, capsys, line)
    assert status == 2
    assert complaint in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "content", [None, b"", b"\x1f\x8bnot gzip", b"\xff\xfe", b"[]", b'{"a": {}}']
)
def test_bad_inputs_are_one_clear_line(tmp_path, capsys, content):
    path = tmp_path / "inputs.json"
    if content is not None:
        path.write_bytes(content)
    assert check.main([str(STORED), "--inputs", str(path)]) == 2
    error = capsys.readouterr().err
    assert "inputs.json" in error and error.count("\n") == 1


def test_explicit_topk_file_must_be_usable(tmp_path, capsys):
    path = tmp_path / "topk.json"
    path.write_text('[{"k": 1}]')
    status, captured = run(tmp_path, capsys, row_of("ppo"), options=["--topk", str(path)])
    assert status == 2 and "topk_ids" in captured.err


def test_runs_as_a_script():
    """From another directory, without the package installed or on the path."""
    done = subprocess.run(
        [sys.executable, GOLDEN / "check.py", "absent.jsonl"],
        capture_output=True,
        text=True,
        cwd="/",
        env={"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read absent.jsonl") and not done.stdout
