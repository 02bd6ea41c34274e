"""The ARM form of the dot product, on any machine: its assembly, and its arithmetic with `sdot` spelled
out.
"""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
from llvmlite import binding, ir

from pyinfer.jit.dots import DOTS
from pyinfer.jit.llvm import i32x16, load, store, u8x64

ARM = "aarch64-unknown-linux-gnu"
SDOT = "llvm.aarch64.neon.sdot.v4i32.v16i8"
# What ARM defines sdot as: four neighbouring products of signed bytes, added to each 32-bit lane.
SDOT_BY_HAND = """
define <4 x i32> @sdot_by_hand(<4 x i32> %acc, <16 x i8> %a, <16 x i8> %b) {
  %wide_a = sext <16 x i8> %a to <16 x i32>
  %wide_b = sext <16 x i8> %b to <16 x i32>
  %p = mul <16 x i32> %wide_a, %wide_b
  %p0 = shufflevector <16 x i32> %p, <16 x i32> undef, <4 x i32> <i32 0, i32 4, i32 8, i32 12>
  %p1 = shufflevector <16 x i32> %p, <16 x i32> undef, <4 x i32> <i32 1, i32 5, i32 9, i32 13>
  %p2 = shufflevector <16 x i32> %p, <16 x i32> undef, <4 x i32> <i32 2, i32 6, i32 10, i32 14>
  %p3 = shufflevector <16 x i32> %p, <16 x i32> undef, <4 x i32> <i32 3, i32 7, i32 11, i32 15>
  %s0 = add <4 x i32> %p0, %p1
  %s1 = add <4 x i32> %p2, %p3
  %s2 = add <4 x i32> %s0, %s1
  %s = add <4 x i32> %acc, %s2
  ret <4 x i32> %s
}
"""


def dot_ir(level: str, wide: bool) -> str:
    """A function of four addresses: acc, codes, x, out."""
    module = ir.Module(name="dot")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4), "dot")
    builder = ir.IRBuilder(function.append_basic_block())
    acc, codes, x, out = function.args
    loaded = [
        load(builder, at, kind) for at, kind in ((acc, i32x16.llvm), (codes, u8x64.llvm), (x, u8x64.llvm))
    ]
    store(builder, DOTS[level](builder, *loaded, wide), out)
    builder.ret_void()
    return str(module)


def target_machine(triple: str, cpu: str, features: str):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    return binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)


def assembly(text: str, triple: str, cpu: str, features: str = "") -> str:
    machine = target_machine(triple, cpu, features)
    module = binding.parse_assembly(text)
    module.triple = triple
    module.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return machine.emit_assembly(module)


@pytest.mark.parametrize(
    ("cpu", "features"), [("apple-m1", ""), ("cortex-a76", "+dotprod"), ("neoverse-v2", "")]
)
@pytest.mark.parametrize(("wide", "instructions"), [(False, 4), (True, 12)])
def test_the_arm_form_becomes_sdot(cpu, features, wide, instructions):
    found = assembly(dot_ir("neondot", wide), ARM, cpu, features)
    assert len(re.findall(r"\bsdot\b", found)) == instructions


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("triple", [ARM, "arm64-apple-macosx11.0.0"])
def test_the_portable_form_compiles_for_arm(triple, wide):
    """On a processor without sdot: no call to a library, which would not be there."""
    found = assembly(dot_ir("portable", wide), triple, "generic")
    assert re.search(r"\bs?m(ul|la)\b|\bsml", found)
    assert not re.search(r"\bbl\b", found)


@pytest.mark.parametrize("wide", [False, True])
def test_the_arm_form_is_exact(wide):
    """Its instructions with sdot spelled out, run here."""
    text = re.sub(r"^declare .*sdot.*$", "", dot_ir("neondot", wide), flags=re.MULTILINE)
    text = re.sub(rf'@"?{re.escape(SDOT)}"?', "@sdot_by_hand", text) + SDOT_BY_HAND
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(opt=1)
    module = binding.parse_assembly(text)
    module.triple = binding.get_process_triple()
    module.verify()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    dot = ctypes.CFUNCTYPE(None, *([ctypes.c_int64] * 4))(engine.get_function_address("dot"))
    random = np.random.default_rng(5)
    for _ in range(200):
        codes = random.integers(0, 256 if wide else 128, 64).astype(np.uint8)
        x = random.integers(-127, 128, 64).astype(np.int8)
        acc, out = random.integers(-(2**20), 2**20, 16).astype(np.int32), np.zeros(16, np.int32)
        dot(*(array.ctypes.data for array in (acc, codes, x, out)))
        np.testing.assert_array_equal(out, acc + (codes.astype(np.int64) * x).reshape(16, 4).sum(1))
