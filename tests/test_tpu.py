"""What XLA compiles for TPUs, read from its text; and compiled here, where libtpu is installed."""

import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from ml_collections import ConfigDict

from mros_jax import console
from mros_jax.retrieval import blocks, evaluate_distances
from scripts import compile_for_tpu, hlo
from tests.training import ROOT

# As libtpu writes them, shortened.
TEXT = """HloModule jit_step, is_scheduled=true

%fused (param_0: u8[1000,64], param_1: s32[2]) -> u8[2,64] {
  %param_0 = u8[1000,64]{1,0:T(32,128)(4,1)} parameter(0)
  %param_1 = s32[2]{0:T(128)} parameter(1)
  ROOT %gather.1 = u8[2,64]{1,0:T(8,128)(4,1)} gather(%param_0, %param_1), offset_dims={1}
}

%region (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%body (x: (f32[8,128])) -> (f32[8,128]) {
  %x = (f32[8,128]{1,0:T(8,128)}) parameter(0)
  %get = f32[8,128]{1,0:T(8,128)} get-tuple-element(%x), index=0
  %w8 = f32[128,128]{1,0:T(8,128)S(1)} constant({...})
  %negate = f32[8,128]{1,0:T(8,128)} negate(%get), backend_config={"estimated_cycles":"10"}
  %product = f32[8,128]{1,0:T(8,128)S(1)} convolution(%get, %w8), dim_labels=bf_io->bf
  ROOT %tuple.1 = (f32[8,128]{1,0:T(8,128)}) tuple(%negate)
}

ENTRY %main (data: u8[1000,64], indices: s32[2], w: bf16[10,64]) -> bf16[10,64] {
  %data = u8[1000,64]{1,0:T(32,128)(4,1)} parameter(0)
  %indices = s32[2]{0:T(128)} parameter(1)
  %w = bf16[10,64]{1,0:T(8,128)(2,1)} parameter(2)
  %rows = u8[2,64]{1,0:T(8,128)(4,1)S(1)} fusion(%data, %indices), kind=kCustom, calls=%fused
  %copy-start = (bf16[10,64]{1,0:T(8,128)S(1)}, bf16[10,64]{1,0:T(8,128)}, u32[]) copy-start(%w)
  %done = bf16[10,64]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-start = ((bf16[10,64]{1,0:T(8,128)}), bf16[5,64]{1,0:T(8,128)S(1)}, s32[]) slice-start(%w)
  %loop = (f32[8,128]{1,0:T(8,128)}) while(%w), body=%body, b={"known_trip_count":{"n":"3"}}
  %sum = bf16[10,64]{1,0:T(8,128)} all-reduce(%done), metadata={op_name="transpose(jvp(A))/psum"}
}
"""


def test_bytes_of_a_program():
    moves = {move.instruction.name: move for move in hlo.Program(TEXT).moves()}
    padded = 16 * 128 * 2  # 10 x 64 in tiles of 8 x 128
    sizes = {name: move.size for name, move in moves.items()}
    assert sizes == {
        "negate": 3 * 2 * 8 * 128 * 4,  # three times round, read and written
        "product": 3 * 8 * 128 * 4,  # but for one operand all of it is on the chip
        "rows": 8 * 128 + 128 * 4,  # of `data` the gathered rows alone, and the indices
        "copy-start": padded,  # onto the chip
        "slice-start": 8 * 128 * 2,
        "sum": padded,  # its operand is on the chip
    }
    assert moves["negate"].cycles == 30
    assert hlo.Program(TEXT).moves()[-1].size == min(sizes.values())
    assert moves["sum"].instruction.source == "transpose(jvp(A))/psum"


def test_bytes_of_a_program_in_any_memory():
    sizes = {
        move.instruction.name: move.size for move in hlo.Program(TEXT, everywhere=True).moves()
    }
    block, padded = 8 * 128 * 4, 16 * 128 * 2
    assert sizes == {
        "negate": 3 * 2 * block,
        "product": 3 * (2 * block + 128 * 128 * 4),
        "rows": 2 * 8 * 128 + 128 * 4,  # the gathered rows still, not all of `data`
        "copy-start": 2 * padded,
        "slice-start": 2 * 8 * 128 * 2,  # a piece, read and written
        "sum": 2 * padded,
    }


def test_products_of_a_program():
    once = 2 * 8 * 128 * 128
    assert hlo.Program(TEXT).count_products() == (once, 3 * once)


def test_collectives_of_a_program():
    assert hlo.Program(TEXT).count_collectives() == {"all-reduce": (1, 640)}


def test_where_the_bytes_go():
    lines = compile_for_tpu.format_moves(hlo.Program(TEXT), 9).splitlines()
    assert any(line.startswith("| backward/psum | all-reduce | ") for line in lines)
    lines = compile_for_tpu.format_moves(hlo.Program(TEXT), 1).splitlines()
    assert lines[2] == "| negate | negate | 0.0 | 50.5 | 0 |"  # 24,576 bytes of 48,640
    assert lines[3].startswith("| all 1 | negate |")


def test_largest_batch_that_fits():
    """On the line through two compilations, and tried by a third; here for a CPU."""

    def lower(images):
        x = jax.ShapeDtypeStruct((images, 1000), np.float32)
        return jax.jit(lambda x: x[::-1] * 2).lower(x)

    def describe(fit):
        line, _ = compile_for_tpu.describe(compile_for_tpu.Job("x", lower, 8, 1), chip, fit)
        return line[:6]

    chip = compile_for_tpu.Chip(1e12, 1e9, 1e6)  # each image takes 4,000 bytes, and gives as many
    assert describe(fit=True) == ["x", 8, "0.000", "0.000", "0.000", "125, compiled"]
    assert describe(fit=False)[-1] == ">= 242"  # as if the arguments did not grow


def test_gradients_that_are_not_shared_are_told():
    def lower(images):
        return jax.jit(lambda x: x * 2).lower(jax.ShapeDtypeStruct((images,), np.float32))

    chip = compile_for_tpu.Chip(1e12, 1e9, 1e6)
    job = compile_for_tpu.Job("train", lower, 8, 2, learned=10**6)
    assert compile_for_tpu.describe(job, chip, fit=False)[0][-1] == "0.0 of 1.0 M MISSING"


def test_frozen_numbers_are_not_learned():
    params = {"network": {"trunk": np.zeros((3, 4)), "head": np.zeros(5)}, "objective": {}}
    groups = {
        "trunk": {"params": ("network/trunk",), "kind": "frozen"},
        "head": {"params": ("network/head",), "kind": "sgd", "lr": 0.1},
    }
    assert compile_for_tpu.count_learned(params, ConfigDict({"optimizer": groups})) == 5


def test_a_topology_that_is_none(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("Invalid TPU external name")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    words = ["--config=configs/demo.py", "--topology=v0:1x1"]
    monkeypatch.chdir(ROOT)
    assert console.run(compile_for_tpu.main, words) == console.MISUSE
    assert "--topology is 'v0:1x1'; expected" in capsys.readouterr().err


class Device:
    platform = "tpu"


def test_float64_distances_are_ranked_where_there_are_tpus(unchecked):
    """Distances that float32 cannot tell apart, given to TPUs."""
    distance = np.array([[1.0, 1 + 1e-12, 1 + 2e-12]])
    result = evaluate_distances(
        distance, [7], [5, 7, 6], [1], [2, 2, 2], placement=blocks.Placement([Device()])
    )
    assert result.first_match_rank.tolist() == [2]


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"
)


def compile_demo(table, *options):
    """What the script says of the demo's programs, as text."""
    command = [sys.executable, "-m", "scripts.compile_for_tpu", "--config=configs/demo.py"]
    words = [*command, f"--markdown={table}", *options]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return table.read_text()


@needs_libtpu
@pytest.mark.parametrize(
    ("step", "topology", "program"),
    [("train", "v5e:4x4", "train"), ("search", "v5e:2x2", "scores after ECN, one program")],
)
def test_a_small_system_compiles(step, topology, program, tmp_path):
    """Its training on four hosts, and all that an evaluation runs on a device."""
    options = (f"--topology={topology}", f"--step={step}", "--by-fusion=3")
    text = compile_demo(tmp_path / "table.md", *options)
    assert f"| {program} |" in text
    assert "MISSING" not in text
    assert f"{program}, main memory:" in text
    assert f"{program}, any memory:" in text


@needs_libtpu
@pytest.mark.parametrize("batch_norm", ["per_device", "synchronised"])
def test_synchronised_statistics_are_seen_in_the_collectives(batch_norm, tmp_path):
    """Nine normalizations of the tiny trunk follow one another: none can share an all-reduce."""
    options = ("--step=train", f"--config.batch_norm={batch_norm}")
    lines = compile_demo(tmp_path / "table.md", *options).splitlines()
    head, row = ([x.strip() for x in line.split("|")] for line in (lines[-3], lines[-1]))
    reduces = int(row[head.index("all-reduces")])
    assert reduces >= 18 if batch_norm == "synchronised" else reduces < 9  # forward and backward
