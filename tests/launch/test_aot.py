"""Ahead-of-time compilation for absent TPUs: reading texts, and (-m tpu_aot) real compilations."""

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from kernels.flash_attention.blocks import choose_blocks
from launch import kernel_table
from launch.aot import hlo, profile, traffic
from launch.aot.chips import CHIPS, chip_of
from launch.aot.cost import KernelCost, Memory, StaticCost
from launch.aot.cycles import Cycles
from launch.aot.hlo_text import arrays, parse
from launch.aot.kept import digest, kept_cycles
from launch.aot.static_cost import describe, measure
from launch.aot.topology import environment
from launch.kernel_cases import CASES, Case, causal_flops, select
from launch.kernel_table import Row, in_short, table_of, time_of
from launch.tune_blocks import candidates

# What compilers and profilers write, cut down to what is read of it.
# loops.hlo: a scan of 12 steps calls a kernel and slices its weights; inside it a loop of 3, beside
# it one whose length is data; an operand of the last sum has been copied to VMEM.
# collectives.hlo: the all-gather overlaps with other work, so its start and end are two.
# reduce_scatters.hlo: one that the compiler made of an all-reduce, two of one shard_map.
TEXTS = Path(__file__).with_name("compiler_texts")
LOOPS = (TEXTS / "loops.hlo").read_text()
COLLECTIVES = (TEXTS / "collectives.hlo").read_text()
REDUCE_SCATTERS = (TEXTS / "reduce_scatters.hlo").read_text()
PROFILE = (TEXTS / "profile.textproto").read_text()
UTILIZATION = (TEXTS / "utilization.txt").read_text()
SCHEDULE = (TEXTS / "schedule.txt").read_text()

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
)


def test_chips_are_those_of_jax():
    tpu_info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")
    for chip in CHIPS.values():
        version = tpu_info.ChipVersion(chip.name.removeprefix("tpu"))
        info = tpu_info.get_tpu_info_for_chip(version, 1)
        assert chip.cores == version.num_physical_tensor_cores_per_chip
        assert (chip.matrix_units, chip.matrix_unit_width) == (info.num_mxus, info.mxu_column_size)
        assert chip.vmem_bytes == info.vmem_capacity_bytes
        assert chip.bf16_flops_per_core == pytest.approx(info.bf16_ops_per_second, rel=1e-6)
        assert chip.hbm_bytes / chip.cores == info.hbm_capacity_bytes
        bandwidth = chip.hbm_bytes_per_second / chip.cores
        assert bandwidth == pytest.approx(info.mem_bw_bytes_per_second, rel=1e-6)
        assert 1e9 < chip.clock_hz < 2.3e9


@pytest.mark.parametrize(
    "topology", ["v7x:2x2x1", "v5litepod:2x2", "v5e", "v5e:", "v5e:2", "v5e:axb"]
)
def test_a_bad_topology_is_refused(topology):
    with pytest.raises(ValueError, match="allowed: v4, v5e, v5p, v6e, tpu7x and a grid") as error:
        chip_of(topology)
    assert repr(topology) in str(error.value)


def test_chip_of_a_topology():
    chip = chip_of("v5p:16x16x24")
    assert chip.name == "v5p"
    assert chip.device_bf16_flops == 4.59e14 and chip.device_hbm_bytes_per_second == 2.46e12
    assert chip_of("tpu7x:2x2x1").device_hbm_bytes_per_second == 3.7e12


def test_environment_adds_to_what_is_there():
    made = environment({"LIBTPU_INIT_ARGS": "--a=1", "HOME": "h"}, ["--b=2"])
    assert made["LIBTPU_INIT_ARGS"] == "--a=1 --b=2" and made["HOME"] == "h"
    assert made["JAX_PLATFORMS"] == "cpu"


def test_arrays_take_the_room_of_their_tiles():
    (x,) = arrays("bf16[8,100,64]{2,1,0:T(8,128)(2,1)}")
    assert x.nbytes == 8 * 104 * 128 * 2 and x.in_hbm
    (x,) = arrays("bf16[64,100,8]{0,1,2:T(8,128)(2,1)}")
    assert x.nbytes == 8 * 104 * 128 * 2
    x, y, z = arrays("(s4[256]{0:T(128)E(4)S(1)}, pred[]{:T(128)}, /*index=2*/f8e4m3fn[2,3])")
    assert (x.nbytes, y.nbytes, z.nbytes) == (128, 1, 6)
    assert not x.in_hbm


def test_loops_are_counted():
    module = parse(LOOPS)
    runs = module.runs
    assert runs["main.1"] == 1 and runs["outer_body"] == 12 and runs["inner_body"] == 36
    assert runs["layer"] == 12 and runs["data_body"] == 1
    assert module.fused == {"bitcast_fusion", "slice_fusion", "layer", "bound"}
    assert module.loops_of_unknown_length() == ["while.3"]


def test_a_known_trip_count_is_believed():
    known = ', backend_config={"known_trip_count":{"n":"5"}}\n'
    before = "condition=%outer_condition, body=%outer_body"
    module = parse(LOOPS.replace(before + "\n", before + known))
    assert module.runs["outer_body"] == 5 and module.runs["inner_body"] == 15


def test_mosaic_calls():
    (call,) = hlo.mosaic_calls(parse(LOOPS))
    assert call == hlo.MosaicCall("flash_attention.1", "flash_attention", 12, 5000)
    text = LOOPS.replace('"cost_estimate"', '"something"')
    (call,) = hlo.mosaic_calls(parse(text))
    assert call.estimated_bytes is None


def test_hbm_traffic():
    """By hand: an array of 64 × 64 takes 64 × 128 × 2 bytes, a comparison of integers 4 + 4 + 1."""
    array, integer, comparison = 64 * 128 * 2, 4, 9
    layer = 3 * array + integer  # one slice of the weights, not all twelve
    inner = 3 * (array + comparison)  # the result of tanh stays in VMEM
    entry = array + 2 * array  # a copy to VMEM; the sum reads one operand from there
    outer = 12 * (layer + 5000 + inner + comparison)
    assert traffic.hbm_bytes(parse(LOOPS)) == outer + entry + comparison


def test_collectives():
    module = parse(COLLECTIVES)
    megabyte = 1 << 20
    assert hlo.collectives(module) == [
        hlo.Collective("all-gather", "all-gather.1", 8 * megabyte, 4, 6),
        hlo.Collective("all-reduce", "all-reduce.1", 256 * 128 * 4, 2, 6),
        hlo.Collective("collective-permute", "collective-permute-start", 2 * megabyte, None, 6),
        hlo.Collective("reduce-scatter", "reduce-scatter", 4 * 64 * 128 * 4, 4, 1),
    ]


def test_reduce_scatters():
    """One is a fusion; two share a channel, but are two."""
    whole = 4096 * 14336 * 4
    assert hlo.collectives(parse(REDUCE_SCATTERS)) == [
        hlo.Collective("reduce-scatter", "all-reduce.2", whole, 4, 1),
        hlo.Collective("all-reduce", "all-reduce.1", whole // 4, 4, 1),
        hlo.Collective("reduce-scatter", "reduce_scatter.14", whole, 4, 1),
        hlo.Collective("reduce-scatter", "reduce_scatter.15", whole // 4, 4, 1),
    ]


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no HLO module"):
        parse("nothing\n")


def test_profile(tmp_path):
    (tmp_path / "flash_attention.1_static_llo_profile.textproto").write_text(PROFILE)
    more = PROFILE.replace("flash_attention.1", "fusion.2").replace("503074", "7")
    (tmp_path / "fusion.2_TPU v5 lite_static_llo_profile.textproto").write_text(more)
    (tmp_path / "other.textproto").write_text(PROFILE)
    assert profile.read_cycles(tmp_path) == {"flash_attention.1": 503074, "fusion.2": 7}


def test_bundles(tmp_path):
    name = "1795526219251953489-flash_attention.1-01-final_hlo-static-per-bundle-utilization.txt"
    (tmp_path / name).write_text(UTILIZATION)
    stem = name.partition("-01-")[0]
    (tmp_path / f"{stem}-02-schedule-analysis_final_bundles.txt").write_text("")
    (tmp_path / f"{stem}-03-final_bundles.txt").write_text(SCHEDULE)
    (found,) = profile.read_bundles(tmp_path).items()
    assert found[0] == "flash_attention.1"
    bundles = found[1]
    assert (bundles.count, bundles.spill_stores, bundles.spill_fills) == (4, 2, 3)
    assert bundles.inner_spill_stores == 1
    assert bundles.use["MXU"] == 8 / 16 and bundles.use["VSTORE"] == 2 / 4
    assert bundles.use["VLOAD"] == 4 / 12 and "VLOAD:FILL" not in bundles.use
    assert bundles.busiest == "MXU"


def cost(microseconds, traffic=1.0, error=None, bundles=None):
    kernel = KernelCost("k.1", "k", 1, None, microseconds, bundles)
    memory = Memory(arguments=3 << 20, outputs=1 << 20, alias=1 << 20, temporaries=2 << 20)
    return StaticCost(
        "v5e:2x2",
        error=error,
        memory=memory if error is None else None,
        kernels=(kernel,),
        static_microseconds=microseconds,
        hbm_microseconds=traffic,
    )


def test_the_time_to_quote():
    assert cost(10.0, traffic=4.0).microseconds == 10.0
    assert cost(10.0, traffic=12.0).microseconds == 12.0
    assert cost(None, traffic=12.0).microseconds is None
    assert cost(None, traffic=12.0).at_least_microseconds == 12.0
    assert dataclasses.replace(cost(10.0), is_lower_bound=True).microseconds is None
    assert cost(10.0).memory.total == 5 << 20
    figures = json.loads(
        json.dumps(
            cost(10.0, 12.0, None, profile.parse_utilization(UTILIZATION, [0, 1, 2, 1])).to_json()
        )
    )
    assert figures["microseconds"] == 12.0 and figures["hbm_total"] == 5 << 20
    assert (figures["busiest_unit"], figures["busiest_share"]) == ("MXU", 0.5)
    assert (figures["bundles"], figures["spill_stores"]) == (4, 2)
    assert figures["inner_spill_stores"] == 1


CASE = Case(
    "ours 1", "ours", "[8]", useful_flops=1.97e9, function="kernels.a:b", peer="m:p", target=0.8
)


def shown(row):
    out = Console(width=200, record=True, file=io.StringIO())
    out.print(table_of([row], chip_of("v5e:2x2"), "title"))
    return out.export_text()


def test_table():
    slow, fast = ({"block": 512}, cost(40.0)), ({"block": 1024}, cost(30.0))
    row = Row(CASE, cost(20.0), (slow,))
    text = shown(row)
    assert row.ratio == (0.5, "") and not row.failed
    assert in_short(row) == "ours 1: 20.0 µs, ratio 0.50 (target 0.8)"
    assert "0.50 (target 0.8)" in text and "50%" in text and "peer: p 512" in text
    missed = shown(Row(CASE, cost(27.0), (slow, fast)))
    assert "0.90 (target 0.8, missed)" in missed and "peer: p 1024" in missed
    bound = Row(CASE, cost(36.0), (({}, cost(None, traffic=50.0)),))
    assert "≥ 50.0" in shown(bound) and "≤ 0.72 (target" in shown(bound)
    assert bound.to_json()["ratio_sign"] == "≤ "
    broken = Row(CASE, cost(None, error="VMEM"), (slow,))
    assert broken.failed and broken.ratio is None and "does not compile" in shown(broken)
    assert in_short(broken) == "ours 1: does not compile"
    assert Row(CASE, cost(20.0), (({}, cost(None, error="VMEM")),)).ratio is None
    most = dataclasses.replace(cost(20.0), is_lower_bound=True)  # one operation has no profile
    assert Row(CASE, most, (slow,)).ratio == (0.5, "≥ ")
    assert Row(CASE, most, (({}, cost(None, traffic=50.0)),)).ratio is None
    assert Row(CASE, cost(None), (slow,)).ratio is None


def test_a_peer_whose_length_is_data_walks_its_bundles_as_often_as_said():
    """4 bundles, 15,030 times, at 1.503 GHz; two cores share them."""
    bundles = profile.parse_utilization(UTILIZATION, [0, 1, 2, 1])
    peer = cost(1.0, traffic=30.0, bundles=bundles)
    row = Row(dataclasses.replace(CASE, peer_steps=15_030), cost(20.0), (({}, peer),))
    assert row.ratio == (pytest.approx(0.5, rel=1e-3), "≈ ")
    assert "≈ 40.0" in shown(row) and "≈ 0.50 (target 0.8)" in shown(row)
    assert in_short(dataclasses.replace(row, ours=None)).startswith("ours 1: ≈ 40.0 µs")
    assert time_of(peer, 7_515) == (30.0, "≈ ")
    two = dataclasses.replace(peer, topology="v5p:2x2x1")
    steps = 2 * chip_of("v5p:2x2x1").clock_hz * 40e-6 / 4
    assert time_of(two, steps).value == pytest.approx(40.0)


def test_one_program_of_two_cases_is_compiled_once(monkeypatch):
    calls = []

    def measured(function, kwargs, topology, scale, profile_too, profiles):
        calls.append((function, kwargs, profile_too))
        return cost(5.0)

    monkeypatch.setattr(kernel_table, "measure", measured)
    case = dataclasses.replace(CASE, kwargs={"a": 1, "b": 2}, peer_kwargs=({"c": 3},))
    other = dataclasses.replace(case, kwargs={"b": 2, "a": 1}, peer_steps=7)
    rows = list(kernel_table.compile_cases([case, other], "v5e:1x1", jobs=2))
    assert [row.case for row in rows] == [case, other] and rows[0].ratio == (1.0, "")
    assert sorted(calls, key=str) == [
        ("kernels.a:b", {"a": 1, "b": 2}, True),
        ("m:p", {"c": 3}, False),
        ("m:p", {"c": 3}, True),
    ]


def test_cycles_are_kept_but_unknown_ones(tmp_path):
    found = [Cycles(None, (), notes=("aborted",)), Cycles(7.0, (3.0, None), True, ("a note",))]
    calls = iter(found)
    for cycles in (*found, found[1]):
        assert kept_cycles(tmp_path / "new", "name", lambda: next(calls)) == cycles
    assert next(calls, None) is None
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["name.json"]


def test_cycles_are_those_of_one_program_by_one_compiler():
    line = '  ROOT %x = f32[8] add(%a, %b){metadata}, backend_config={{"k":1}}\n'
    moved = ', metadata={op_name="jit(f)/add" source_file="f.py" source_line=7}'
    name = digest(line.format(metadata=moved), "libtpu 1", "heads")
    assert name == digest(line.format(metadata=""), "libtpu 1", "heads")
    others = [
        digest(line.format(metadata="").replace("add", "multiply"), "libtpu 1", "heads"),
        digest(line.format(metadata=""), "libtpu 2", "heads"),
        digest(line.format(metadata=""), "libtpu 1", None),
    ]
    assert len({name, *others}) == 4


def test_cases_are_selected():
    assert len({case.name for case in CASES}) == len(CASES)
    groups = [case.group for case in select(None, quick=True)]
    assert len(groups) == len(set(groups)) == len({case.group for case in CASES})
    assert all("splash" in case.name for case in select("splash", quick=False))
    with pytest.raises(
        ValueError, match="only='tpyo' is part of no name; allowed: flash_attention"
    ):
        select("tpyo", quick=False)
    assert causal_flops(2, 1, 1, backward=False) == 12
    assert causal_flops(2, 1, 1, backward=True) == 36
    steps = {case.name: case.peer_steps for case in CASES}
    assert steps["splash_attention forward 4096"] == 8 * (1 + 2 + 3 + 4)
    assert steps["paged_decode 2048"] == 8 * 8 * 2048 // (64 * 8)
    assert steps["ragged_paged_decode 2048"] == 8 * 2048 // (64 * 8)


def test_sizes_to_try_fit_into_one_another():
    own = choose_blocks(1536, "v4", 256)[0]
    lists = [256, 512, 1024], [128, 512], [512], [2048, 8192], [0, 1]
    found = candidates(own, 1536, *lists)
    assert [(b.block_q, b.tile_q, b.early) for b in found] == [
        (512, 128, 0),
        (512, 128, 1),
        (512, 512, 0),
        (512, 512, 1),
    ]
    assert all(b.stretch == 1536 and b.tile_k == 512 == b.block_k for b in found)
    assert all(b.vmem_bytes == own.vmem_bytes < 16 << 20 for b in found)
    longer = candidates(own, 8192, *lists)
    assert {b.stretch for b in longer} == {2048, 8192}


SLOW = """
import sys
from launch import console
from launch.kernel_cases import Case
from launch.kernel_table import compile_cases

sys.executable = sys.argv[1]  # of the compiler's processes
cases = [Case(f"c{i}", "g", "s", 1.0, function="m:f", kwargs={"i": i}) for i in range(4)]
with console.clear_errors():
    print("begun", flush=True)
    list(compile_cases(cases, "v5e:1x1", jobs=2))
"""


def test_an_interrupted_table_waits_for_no_compiler(tmp_path):
    """Real processes: each compiler sleeps for ten minutes and would not hear of it."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nexec sleep 600\n")
    compiler.chmod(0o755)
    command = [sys.executable, "-c", SLOW, str(compiler)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        pids = tmp_path / "pids"
        while not pids.exists() or len(pids.read_text().split()) < 2:
            assert run.poll() is None
            time.sleep(0.05)
        run.terminate()
        assert run.wait(timeout=60) == 130
    for pid in pids.read_text().split():
        assert not Path(f"/proc/{pid}").exists()


HIDDEN = """
import importlib.util, runpy, sys
sys.modules["libtpu"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "libtpu" else find(name, *a)
sys.argv[1:] = ["kernels"]
runpy.run_module("launch.compile", run_name="__main__")
"""


def test_without_libtpu_one_line_says_what_to_install():
    env = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"}
    command = [sys.executable, "-c", HIDDEN]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == "error: compiling for TPUs needs libtpu: pip install -e '.[tpu]'\n"


COMPILE = "tests.launch.aot_cases"


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize(("topology", "size"), [("v5e:2x2", 2048), ("v6e:2x2", 4096)])
def test_a_matmul_is_near_the_peak(topology, size):
    found = measure(f"{COMPILE}:matmul", {"size": size}, topology)
    assert found.compiles, found.error
    peak = 1e6 * 2 * size**3 / chip_of(topology).device_bf16_flops
    assert peak < found.static_microseconds < 1.1 * peak
    assert found.microseconds == found.static_microseconds
    assert found.memory.total == 3 * 2 * size**2 == found.hbm_bytes
    assert found.kernels == () and found.notes == ()


@pytest.mark.tpu_aot
@needs_libtpu
def test_a_copy_takes_as_long_as_its_bytes():
    found = measure(f"{COMPILE}:copy", {"blocks": 4}, "v5e:2x2")
    (kernel,) = found.kernels
    assert kernel.kernel == "copy_rows" and kernel.bundles.spill_stores == 0
    assert found.microseconds == pytest.approx(1e6 * 2**24 / 8.2e11)
    assert kernel.microseconds == found.static_microseconds < found.microseconds


@pytest.mark.tpu_aot
@needs_libtpu
def test_cycles_on_a_line_through_one_head_and_two():
    whole = measure(f"{COMPILE}:products", {"heads": 6}, "v5e:2x2")
    found = measure(f"{COMPILE}:products", {"heads": 6}, "v5e:2x2", scale="heads")
    uncounted = "products has no cost_estimate: its operands and results are its bytes"
    assert whole.notes == (uncounted,)
    assert found.notes == ("cycles are extrapolated from heads=1 and heads=2", uncounted)
    assert found.hbm_bytes == whole.hbm_bytes and found.memory == whole.memory
    assert found.static_microseconds == pytest.approx(whole.static_microseconds, rel=0.05)
    assert found.kernels[0].bundles == whole.kernels[0].bundles


@pytest.mark.tpu_aot
@needs_libtpu
def test_what_was_profiled_before_is_not_profiled_again(tmp_path):
    given = (f"{COMPILE}:products", {"heads": 6}, "v5e:2x2", "heads")
    first = measure(*given, profiles=tmp_path)
    (path,) = tmp_path.iterdir()
    cycles = json.loads(path.read_text())
    path.write_text(json.dumps(cycles | {"total": 2 * cycles["total"]}))
    again = measure(*given, profiles=tmp_path)
    assert again.static_microseconds == 2 * first.static_microseconds
    same = dataclasses.replace(again, static_microseconds=first.static_microseconds)
    assert same == first
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.tpu_aot
@needs_libtpu
def test_bundles_remain_where_the_profiler_aborts():
    found = measure(f"{COMPILE}:copy", {"blocks": 4}, "v4:2x2x1")
    assert found.compiles and found.static_microseconds is None and found.microseconds is None
    assert found.hbm_microseconds == pytest.approx(1e6 * 2**24 / 6.15e11)
    assert found.largest.count > 0 and found.notes[0].startswith("the profiler aborted: ")
    found = measure(f"{COMPILE}:matmul", {"size": 1024}, "v4:2x2x1")
    assert found.is_lower_bound and found.microseconds is None
    assert "as fast as HBM, for want of a profile: " in found.notes[1]


@pytest.mark.tpu_aot
@needs_libtpu
def test_errors_are_results():
    found = measure(f"{COMPILE}:refused", {}, "v5e:2x2")
    assert found.error == "ValueError: length=7; allowed: multiples of 8"
    found = measure(f"{COMPILE}:copy", {"blocks": 1, "block": 2**16}, "v5e:2x2")
    assert "vmem" in found.error
    with pytest.raises(ValueError, match="topology='v5e:3x3' is refused by libtpu"):
        describe("v5e:3x3")
    assert describe("v5e:2x2")["devices"] == 4


PODS = """
from launch.aot.topology import pod_mesh
# 2 and 8 share an axis of 4x4, and 2 and 32 one of 4x4x4.
for topology, fsdp, tensor in (("v5e:8x16", 16, 8), ("v6e:4x4", 2, 8), ("v5p:4x4x4", 2, 32)):
    mesh = pod_mesh(topology, {"fsdp": fsdp, "tensor": tensor})
    print(dict(mesh.shape), len({d.id for d in mesh.devices.flat}))
pod_mesh("v5e:8x16", {"fsdp": 16, "tensor": 4})
"""


@pytest.mark.tpu_aot
@needs_libtpu
def test_the_mesh_of_a_pod():
    command = [sys.executable, "-c", PODS]
    env = environment(os.environ)
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == [
        "{'fsdp': 16, 'tensor': 8} 128",
        "{'fsdp': 2, 'tensor': 8} 16",
        "{'fsdp': 2, 'tensor': 32} 64",
    ]
    assert run.stderr.endswith(
        "ValueError: mesh: fsdp=16 × tensor=4 = 64; allowed: sizes whose product is the number of "
        "devices of v5e:8x16, 128\n"
    )
