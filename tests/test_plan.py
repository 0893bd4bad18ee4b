"""What a plan reads from a compiled program, against counts by hand and XLA's own; its verb."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from plan_verb import dppo_plan

from dppo_jax.kernels.chips import CHIPS
from dppo_jax.plan import cuda, topology
from dppo_jax.plan.assigned import sizes_of
from dppo_jax.plan.hlo import costs_of
from dppo_jax.plan.hlo_text import beyond, group_size
from dppo_jax.plan.report import table
from dppo_jax.plan.scaling import exceptions
from dppo_jax.plan.scaling import text_of as scaling_text

V5P = CHIPS["v5p"]
REPOSITORY = Path(__file__).parent.parent

# A loop of five trips around a product of [8, 16] by [16, 32] and an all-gather of four devices;
# then a loop whose length is data around a reduce-scatter of two.
BY_HAND = """HloModule by_hand

%body (p: (s32[], f32[8,16], f32[16,32])) -> (s32[], f32[8,16], f32[16,32]) {
  %p = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %w = f32[16,32]{1,0} get-tuple-element(%p), index=2
  %dot = f32[8,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all = f32[32,16]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %t = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}) tuple(%i, %x, %w)
}

%condition (p.1: (s32[], f32[8,16], f32[16,32])) -> pred[] {
  %five = s32[] constant(5)
  %p.1 = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

%body.2 (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %y = f32[8]{0} get-tuple-element(%q), index=1
  %part = f32[4]{0} reduce-scatter(%y), replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %t.2 = (s32[], f32[8]{0}) tuple(%j, %y)
}

%condition.2 (q.1: (s32[], f32[8])) -> pred[] {
  %q.1 = (s32[], f32[8]{0}) parameter(0)
  %j.1 = s32[] get-tuple-element(%q.1), index=0
  ROOT %go = pred[] compare(%j.1, %j.1), direction=LT
}

ENTRY %main (a: f32[8,16], b: f32[16,32], c: f32[8], n: s32[]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,32]{1,0} parameter(1)
  %c = f32[8]{0} parameter(2)
  %n = s32[] parameter(3)
  %zero = s32[] constant(0)
  %in = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}) tuple(%zero, %a, %b)
  %loop = (s32[], f32[8,16]{1,0}, f32[16,32]{1,0}) while(%in), condition=%condition, body=%body
  %in.2 = (s32[], f32[8]{0}) tuple(%n, %c)
  %loop.2 = (s32[], f32[8]{0}) while(%in.2), condition=%condition.2, body=%body.2
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""

INNER = """%y = f32[8]{0} get-tuple-element(%q), index=1
  %in.3 = (s32[], f32[8]{0}) tuple(%j, %y)
  %loop.3 = (s32[], f32[8]{0}) while(%in.3), condition=%condition.2, body=%body.3"""
INNER_BODY = """
%body.3 (r: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = (s32[], f32[8]{0}) parameter(0)
  %z = f32[8]{0} get-tuple-element(%r), index=1
  ROOT %exchanged = f32[8]{0} all-to-all(%z), replica_groups=[2,2]<=[4], dimensions={0}
}
"""


def test_loops_products_and_transfers_by_hand():
    total, once = costs_of(BY_HAND, V5P, unknown_trips=3)
    product = 2 * 8 * 16 * 32
    assert (total.flops, once.flops) == (5 * product, product)
    assert total.bytes == 5 * 4 * (8 * 16 + 16 * 32 + 8 * 32)
    gathered, scattered = total.collectives["all-gather"], total.collectives["reduce-scatter"]
    # Each of four sends its part to three others; of two, half goes to the other.
    assert (gathered.count, gathered.bytes) == (5, 5 * 3 * 4 * 8 * 16)
    assert (scattered.count, scattered.bytes) == (3, 3 * 4 * 8 / 2)
    assert (total.unknown_loops, once.unknown_loops) == (1, 0)
    assert total.sent == gathered.bytes + scattered.bytes
    # A loop of unknown length within another one: the outer one's trips are told apart.
    nested = BY_HAND.replace("%y = f32[8]{0} get-tuple-element(%q), index=1", INNER)
    assert nested != BY_HAND
    total_nested, _ = costs_of(nested + INNER_BODY, V5P, unknown_trips=3, outer_trips=7)
    assert total_nested.collectives["reduce-scatter"].count == 7
    assert total_nested.collectives["all-to-all"].count == 7 * 3
    slow = V5P._replace(link_bytes=1.0)
    assert total.roofline(slow) == total.sent  # transfers take longer than the work beside them


def test_the_limit_of_a_loop_whose_condition_is_fused():
    """As XLA's GPU compiler writes it: within the fusion, or given to it."""
    counted = costs_of(BY_HAND, V5P, unknown_trips=3)[0]
    less = "ROOT %less = pred[] compare(%i.1, %five), direction=LT"
    inner = """
%fused (f.0: s32[], f.1: s32[]) -> pred[] {{
  %f.0 = s32[] parameter(0)
  %f.1 = s32[] {limit}
  ROOT %compare = pred[] compare(%f.0, %f.1), direction=LT
}}
"""
    for given, limit in (("%i.1, %five", "parameter(1)"), ("%i.1", "constant(5)")):
        fusion = f"ROOT %less = pred[] fusion({given}), kind=kLoop, calls=%fused"
        fused = BY_HAND.replace(less, fusion) + inner.format(limit=limit)
        assert fusion in fused
        if limit != "parameter(1)":
            fused = fused.replace("  %five = s32[] constant(5)\n", "")
        assert costs_of(fused, V5P, unknown_trips=3)[0] == counted


def test_an_attribute_of_many_lines_ends_no_computation():
    """As XLA prints the metadata of splash attention."""
    attribute = ' frontend_attributes={m={\n"xprof_metadata":"{}"\n}}, metadata={op_name="x"}'
    broken = BY_HAND.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(0)," + attribute)
    assert broken != BY_HAND
    total, _ = costs_of(broken, V5P, unknown_trips=3)
    assert total == costs_of(BY_HAND, V5P, unknown_trips=3)[0]


def test_a_gather_behind_products_counts_once():
    """As libtpu writes it: begun, again within the fusion of a product, and ended."""
    gather = (
        "  %gather = f32[64]{0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}, "
        'frontend_attributes={chain_id="0"}\n'
    )

    def part(name, after):
        head = f"%{name} (x: f32[16]) -> f32[64] {{\n  %x = f32[16]{{0}} parameter(0)\n"
        return head + gather + after + "}\n"

    def custom(target):
        return f'  ROOT %out = f32[64]{{0}} custom-call(%gather), custom_call_target="{target}"\n'

    text = part("start", custom("AsyncCollectiveStart")) + part("behind", "")
    text += part("done", custom("AsyncCollectiveDone"))
    text += "ENTRY %main (x: f32[16]) -> f32[64] {\n  %x = f32[16]{0} parameter(0)\n"
    for name in ("start", "behind", "done"):
        text += f"  %{name}.1 = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%{name}\n"
    total, _ = costs_of(text + "}\n", V5P)
    gathered = total.collectives["all-gather"]
    assert (gathered.count, gathered.bytes) == (1, 3 * 4 * 16)


@pytest.mark.parametrize(
    ("attributes", "size", "share"),
    [
        ("replica_groups={{0,1},{2,3}}", 2, 0.0),
        ("replica_groups={{0,2},{1,3}}", 2, 1.0),  # each to the other node
        ("replica_groups={{0,1,2,3}}", 4, 0.5),  # two rings, one over each link between the nodes
        ("replica_groups=[2,2]<=[4]", 2, 0.0),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", 2, 1.0),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}", 2, 0.0),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}, dimensions={0}", 2, 1.0),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}", 2, 0.0),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}", 4, 0.5),
        ("source_target_pairs={{0,1},{1,0}}", 1, 0.0),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 1, 1.0),
    ],
)
def test_groups_of_devices_and_what_leaves_a_node_of_two(attributes, size, share):
    assert (group_size(attributes), beyond(attributes, 2)) == (size, share)


def test_of_a_slice_in_a_fusion_in_a_fusion_only_the_slice_is_read():
    """As libtpu writes a product with some rows of a large matrix."""
    text = """
%inner (m: bf16[4096,64], at: s32[]) -> bf16[32,64] {
  %m = bf16[4096,64]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %some = bf16[32,64]{1,0} dynamic-slice(%m, %at, %zero), dynamic_slice_sizes={32,64}
}

%outer (w: bf16[4096,64], x: bf16[8,64], n: s32[]) -> bf16[8,32] {
  %w = bf16[4096,64]{1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %rows = bf16[32,64]{1,0} fusion(%w, %n), kind=kLoop, calls=%inner
  ROOT %y = bf16[8,32]{1,0} dot(%x, %rows), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (a: bf16[4096,64], b: bf16[8,64], c: s32[]) -> bf16[8,32] {
  %a = bf16[4096,64]{1,0} parameter(0)
  %b = bf16[8,64]{1,0} parameter(1)
  %c = s32[] parameter(2)
  ROOT %out = bf16[8,32]{1,0} fusion(%a, %b, %c), kind=kOutput, calls=%outer
}
"""
    total, _ = costs_of(text, V5P)
    assert total.bytes == 2 * (32 * 64 + 8 * 64 + 8 * 32) + 4
    assert total.flops == 2 * 8 * 32 * 64


def test_memory_as_xla_assigns_it():
    """A donated argument is no output; what is on the chip or lives for a call counts nowhere."""
    assignment = """BufferAssignment:
allocation 0: size 4096, parameter 1, shape |bf16[8,256]| at ShapeIndex {}:
 value: <70 param.3 @0> (size=4096,offset=0): bf16[8,256]{1,0:T(8,128)(2,1)}
allocation 1: size 8192, parameter 0, shape |f32[2048]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 100, maybe-live-out:
allocation 3: size 512, output shape is |(bf16[50], f32[2048])|, maybe-live-out:
allocation 4: size 64, constant:
allocation 5: size 512, thread-local:
allocation 6: size 7000, color 1, preallocated-temp:
allocation 7: size 3000, preallocated-temp:
"""
    expected = dict(arguments=4096 + 8192, output=612, temporaries=3000, code=64)
    assert sizes_of(assignment) == expected


@pytest.mark.parametrize("layers", [1, 7])
def test_flops_of_a_compiled_scan_grow_with_its_length(layers):
    width, rows = 48, 32

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), ()), x, weights)[0].sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, width), (layers, width, width))]
    compiled = jax.jit(jax.grad(run, (0, 1))).lower(*shapes).compile()
    total, once = costs_of(compiled.as_text(), V5P)
    assert total.unknown_loops == 0
    assert total.flops == 3 * layers * 2 * rows * width * width  # forward, and twice that backward
    # XLA counts a body once, and the elements of everything else too.
    assert once.flops <= compiled.cost_analysis()["flops"] < 1.2 * once.flops


def test_a_batched_product_as_a_tpu_writes_it():
    """[8, 2, 4, 768, 128] by [8, 2, 1535, 128], its batch as windows over a dilated operand."""
    line = (
        "  ROOT %c = f32[8,2,4,768,1535]{4,3,2,1,0} convolution(%q, %k), window={size=8x2x1 "
        "stride=7x1x1 lhs_dilate=8x2x1}, dim_labels=012bf_01oi2->012bf"
    )
    text = f"""ENTRY %main (q: f32[8,2,4,768,128], k: f32[8,2,1535,128,1]) -> f32[8,2,4,768,1535] {{
  %q = f32[8,2,4,768,128]{{4,3,2,1,0}} parameter(0)
  %k = f32[8,2,1535,128,1]{{3,2,1,0,4}} parameter(1)
{line}
}}
"""
    total, _ = costs_of(text, V5P)
    assert total.flops == 2 * 8 * 2 * 4 * 768 * 1535 * 128


@pytest.mark.parametrize("name", ["v5p:4x4", "v9:2x2", "v5p", "h100:0", "h100:2x2", "v6e:0x2", ""])
def test_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="known: v4:{2x2x1.*v5p:{.*4x4x4.*v6e.*h100:{1,8"):
        topology.parse(name)


def test_names_of_topologies():
    found = topology.parse("v5p:4x4x4")
    assert (found.chips, found.platform, found.chip) == (64, "tpu", V5P)
    cards = topology.parse("h100:16")
    assert (cards.chips, cards.platform) == (16, "gpu")


def test_tpus_need_their_compiler(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dppo-jax\[plan\]'"):
        topology.prepare([topology.parse("v6e:2x2")])


def test_columns_of_a_table():
    assert table([["", "a"], ["long", "12"]]) == "       a\nlong  12"


def test_a_scaling_table_says_what_does_not_scale():
    def row(program, chips, flops, gib, sent):
        share, mesh = flops * chips / 16e12, {"fsdp": chips}
        return dict(
            program=program, chips=chips, mesh=mesh, flops=flops, flops_share=share, fits=True,
            bytes=gib * 2**30, sent=sent * 1e9, seconds=1.0,
        )  # fmt: skip

    decode = [row("decode", 16, 1e12, 10, 5), row("decode", 64, 0.26e12, 4, 9)]
    update = [row("update", 16, 1e12, 10, 5), row("update", 64, 0.5e12, 10, 11)]
    assert exceptions(decode) == []
    assert scaling_text(decode).endswith("is bounded")
    told = scaling_text(decode + update).splitlines()[-3:]
    assert told == [
        "update on 64 chips: flops a chip are 2.00 of 1/chips",
        "update on 64 chips: memory a chip does not fall",
        "update on 64 chips: a chip sends 2.2 times what it does on the first",
    ]


def test_a_plan_for_gpus_by_the_verb():
    """Two cards: every program of the arithmetic recipe, by whichever compiler is here."""
    overrides = ["PROMPTS_PER_STEP=8", "decoder.DecoderConfig.layers=2", "MAX_NEW_TOKENS=9"]
    done = dppo_plan(overrides, "--topology", "h100:2", "--price", "3.6", "--json")
    plan = json.loads(done.stdout)
    assert (plan["chips"], plan["mesh"]) == (2, {"fsdp": 2})
    assert plan["estimated_memory"] == (not cuda.installed())
    programs = plan["programs"]
    assert list(programs) == ["weight sync", "prefill", "decode", "scoring", "update"]
    assert plan["fits"] and all(p["left"] > 0 for p in programs.values())
    # 4 sequences of 8 prompts x 8 samples / 2 devices... keys and values, 2 layers of 4 heads x 32
    cache = 2 * 2 * 4 * 32 * 4 * (4 * 6 + 32 * 9)
    assert programs["decode"]["cache"] == cache
    # Parameters, two moments and the tables of an update are all split in two.
    parameters = 2 * 128 * (4 * 128 + 3 * 384) + 16 * 128
    assert 12 * parameters / 2 < programs["update"]["arguments"] < 1.2 * 12 * parameters / 2
    assert programs["update"]["runs"] == 4 and programs["update"]["collectives"]["all-gather"]
    tokens = 8 * (6 + 8 * 8)  # of a step's update; the head and attention come on top
    least = 6 * tokens * 2 * 128 * (4 * 128 + 3 * 384) / 2 / 4
    assert least < programs["update"]["flops"] < 1.3 * least
    step = sum(
        p["runs"] * max(p["roofline_seconds"], p["compiler_seconds"] or 0)
        for p in programs.values()
    )
    assert plan["step_seconds"] == pytest.approx(step)
    assert plan["cost"]["run"] == pytest.approx(140 * 2 * 3.6 * step / 3600)


# A process of its own: the tests' checks of records refuse shapes in the place of arrays.
TRIED = """
import dataclasses, json, pathlib, tempfile
from dppo_jax.plan.assigned import in_child

def refuse():
    raise ValueError("does not fit")

assert in_child(lambda: dict(a=[1.5])) == dict(a=[1.5])
try:
    in_child(refuse)
except ValueError as error:
    assert str(error) == "does not fit"
else:
    raise AssertionError("it went on")
from dppo_jax.plan import topology
card = topology.parse("h100:1")
topology.prepare([card])
from dppo_jax.config import load_recipe
from dppo_jax.models.grouped import grouped_product
from dppo_jax.plan.kept import Kept
from dppo_jax.plan.programs import Settings
from dppo_jax.plan.scaling import spread
from dppo_jax.plan.step_plan import plan_step
from dppo_jax.plan.suggest import suggestions
from dppo_jax.sampling.engine import EngineConfig
from dppo_jax.sampling.rollouts import continuous
from dppo_jax.train import train

overrides = ["PROMPTS_PER_STEP=16", "MAX_NEW_TOKENS=16", "MAX_PROMPT_TOKENS=8", "MINIBATCHES=2"]
overrides += ["decoder.DecoderConfig.layers=1"]
path = "configs/recipes/arithmetic_cpu.gin"
recipe = load_recipe(path, train, overrides, ("workdir", "console", "configuration"))
settings = Settings(**recipe.arguments(*Settings.names()))
folder = pathlib.Path(tempfile.mkdtemp())
first = plan_step(settings, card, ("update",), kept=Kept(folder)).programs[0]
needed = first.total
again = plan_step(settings, card, ("update",), kept=Kept(folder)).programs[0]
(file,) = folder.glob("*.json")
file.write_text(json.dumps(json.loads(file.read_text()) | {"temporaries": 0.0}))
read = plan_step(settings, card, ("update",), kept=Kept(folder)).programs[0]
kept = dict(again=again == first, read=read.total == needed - first.temporaries)
small = dataclasses.replace(card, chip=card.chip._replace(hbm_bytes=0.5 * needed))
plan = plan_step(settings, small, ("update",))
found = [vars(each) | {"said": str(each)} for each in suggestions(plan)]
packed = dataclasses.replace(settings, tokens_per_microbatch=16 * 23)
packed = plan_step(packed, card, ("update",)).programs[0]
packed = dict(flops=packed.flops, turns=packed.outer_trips)
engine = EngineConfig(slots=8, max_context=32, chunk=4, page_size=8, prefill_buckets=(8, 32))
by_engine = dataclasses.replace(settings, rollouts=continuous(engine))
sampling = plan_step(by_engine, card, ("prefill", "recompute", "decode")).programs
by_engine = {p.name: dict(runs=p.runs, cache=p.cache, flops=p.flops) for p in sampling}
try:
    short = dataclasses.replace(engine, max_context=16, prefill_buckets=())
    plan_step(dataclasses.replace(settings, rollouts=continuous(short)), card, ("decode",))
except ValueError as error:
    too_short = str(error)
spreads = {chips: spread(settings, chips) for chips in (2, 8, 32)}
try:
    spread(settings, 3)
except ValueError as error:
    refused = str(error)
sizes = {n: (s.microbatches, s.mesh.fsdp, s.mesh.sequence) for n, s in spreads.items()}
seen = dict(needed=needed, fits=plan.fits, found=found, sizes=sizes, refused=refused)
print(json.dumps(seen | dict(packed=packed, kept=kept, engine=by_engine, too_short=too_short)))
"""


def test_changes_are_compiled_before_they_are_told():
    """A card with half of the memory that the update needs; the step on more and more chips."""
    done = subprocess.run(
        [sys.executable, "-c", TRIED],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=900,  # the machine may be busy
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tried = json.loads(done.stdout)
    assert tried["kept"] == {"again": True, "read": True}  # numbers of the file, not compiled anew
    assert tried["found"] and not tried["fits"]
    for each in tried["found"]:
        program = each["programs"]["update"]
        assert program["after"] < program["before"] == tried["needed"]
        assert each["fits"] == (program["after"] <= 0.5 * tried["needed"])
        assert each["change"] in each["said"] and each["change"].startswith("--gin.")
    halved = next(each for each in tried["found"] if "microbatches=2" in each["change"])
    room = 2**25 if cuda.installed() else 0  # that cuBLAS works in, whatever the sizes
    assert halved["programs"]["update"]["after"] - room < 0.8 * (tried["needed"] - room)
    # 64 sequences of 8 + 15 cells, 16 rows at once, every one of them with its prompt.
    assert tried["packed"]["turns"] == 4
    least = 6 * 64 * 23 * 128 * (4 * 128 + 3 * 384)
    assert least < tried["packed"]["flops"] < 1.3 * least
    # 128 sequences of 16 tokens through 8 slots, 4 tokens a chunk; 32 pages of 8 tokens.
    engine = tried["engine"]
    assert {name: p["runs"] for name, p in engine.items()} == dict(
        prefill=2, recompute=0, decode=64
    )
    assert {p["cache"] for p in engine.values()} == {32 * 8 * 2 * 4 * 32 * 4}
    drawn = 2 * 4 * 8 * 128 * (4 * 128 + 3 * 384)
    assert drawn < engine["decode"]["flops"] < 1.5 * drawn
    assert "max_context=16 is less than" in tried["too_short"]
    # 8 prompts a gradient step: microbatches, fsdp, sequence.
    assert tried["sizes"] == {"2": [4, 2, 1], "8": [1, 8, 1], "32": [1, 8, 4]}
    assert "3 chips do not take 8 prompts" in tried["refused"]


def test_a_run_takes_the_files_that_its_plan_took():
    """--over of dppo train: here a mesh that one device does not have."""
    command = [sys.executable, "-m", "dppo_jax", "train", "configs/recipes/arithmetic_cpu.gin"]
    done = subprocess.run(
        [*command, "--over", "configs/mesh/cpu8.gin"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        timeout=900,  # the machine may be busy
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "fsdp=4 x tensor=2 does not fit" in done.stderr and "Traceback" not in done.stderr
