"""What is read of a compiler's text: recorded lines of each vendor's instruction set, and figures of memory."""

from __future__ import annotations

import pytest

from lineshaft_contract.errors import ContractViolation
from lineshaft_triton.inspection import amd_code, nvidia_code, read_amdgcn, read_ptx, unexpected
from lineshaft_triton.targets import TARGETS

TCGEN05 = """
	mov.b32 	%r84, {descriptor};
	@%p12 tcgen05.mma.cta_group::1.kind::{kind} [ %r411 + 0 ], %rd37, %rd38, %r84, %p11;
"""


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };", "mma.bf16"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 { %r1 }, { %r2 }, { %r3 }, { %r1 };", "mma.f16"),
        ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 { %r1 }, { %r2 }, { %r3 };", "mma.fp8"),
        ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 { %r1 }, { %r2 };", "mma.i8"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r1 }, { %r2 }, { %r3 };", "mma.tf32"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 { %r1 }, { %r2 }, { %r3 };", "mma.f64"),
        ("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%r1};", "mma.bf16"),
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r304,%r305}, %rd29, %rd32, %p3, 1, 1;", "wgmma.bf16"),
        ("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r304}, %rd29, %rd32, %p3, 1, 1;", "wgmma.fp8"),
        ("wgmma.mma_async.sync.aligned.m64n128k32.f32.e5m2.e5m2 {%r304}, %rd29, %rd32, %p3, 1, 1;", "wgmma.bf8"),
        (TCGEN05.format(kind="f16", descriptor=136316048), "tcgen05.bf16"),
        (TCGEN05.format(kind="f16", descriptor=136314896), "tcgen05.f16"),
        (TCGEN05.format(kind="f8f6f4", descriptor=136314896), "tcgen05.fp8"),
        (TCGEN05.format(kind="f8f6f4", descriptor=136314896 + (1 << 7)), "tcgen05.bf8"),
        (TCGEN05.format(kind="i8", descriptor=136316064), "tcgen05.i8"),
        (TCGEN05.format(kind="tf32", descriptor=136317200), "tcgen05.tf32"),
        ("@%p12 tcgen05.mma.cta_group::1.kind::f16 [ %r4 + 0 ], %rd37, %rd38, %r84, %p11;", "tcgen05.kind::f16"),
    ],
)
def test_classes_are_read_from_ptx(line: str, found: str) -> None:
    other = "\tldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1}, [%r2];\n\twgmma.fence.sync.aligned;\n"
    assert read_ptx(other) == ()
    assert read_ptx(f"{other}\t{line}\n{other}\t{line}\n") == (found,)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("v_mfma_f32_32x32x8bf16_1k v[48:63], v[122:123], v[126:127], v[48:63]", "mfma.bf16"),
        ("v_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], 0", "mfma.bf16"),
        ("v_mfma_f32_32x32x8f16 a[0:15], v[2:3], v[4:5], 0", "mfma.f16"),
        ("v_mfma_i32_32x32x8i8 v[16:31], v72, v74, v[16:31]", "mfma.i8"),
        ("v_mfma_f32_32x32x16_fp8_fp8 v[0:15], v[112:113], v[88:89], 0", "mfma.fp8"),
        ("v_mfma_f32_32x32x16_bf8_fp8 v[0:15], v[112:113], v[88:89], 0", "mfma.bf8"),
        ("v_mfma_f32_32x32x4_xf32 v[16:31], v[202:203], v[164:165], v[16:31]", "mfma.tf32"),
        ("v_mfma_f32_32x32x2f32 v[48:63], v66, v158, v[48:63]", "mfma.f32"),
        ("v_mfma_f64_16x16x4f64 v[0:7], v[8:9], v[10:11], 0", "mfma.f64"),
        ("v_mfma_f32_32x32x64_f8f6f4 v[48:63], v[98:105], v[80:87], v[48:63]", "mfma.fp8"),
        ("v_mfma_f32_32x32x64_f8f6f4 v[48:63], v[98:105], v[80:87], v[48:63] cbsz:1 blgp:1", "mfma.bf8"),
        ("v_mfma_scale_f32_32x32x64_f8f6f4 v[0:15], v[1:4], v[5:8], v[0:15], v1, v2 cbsz:4 blgp:4", "mfma.fp4"),
        ("v_smfmac_f32_16x16x32_bf16 v[0:3], v[4:5], v[6:9], v10", "mfma.bf16"),
        ("v_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]", "wmma.bf16"),
        ("v_wmma_i32_16x16x16_iu8 v[97:104], v[193:196], v[189:192], v[97:104] neg_lo:[1,1,0]", "wmma.i8"),
        ("v_wmma_f32_16x16x16_fp8_fp8 v[104:111], v[195:196], v[191:192], v[104:111]", "wmma.fp8"),
        ("v_swmmac_f32_16x16x32_f16 v[0:7], v[8:11], v[12:19], v20", "wmma.f16"),
    ],
)
def test_classes_are_read_from_amds_assembly(line: str, found: str) -> None:
    other = "\tv_fma_f32 v1, v2, v3, v4\n\tv_dot2_f32_f16 v1, v2, v3, v4\n\tv_cvt_pk_bf16_f32 v1, v2, v3\n"
    assert read_amdgcn(other) == ()
    assert read_amdgcn(f"{other}\t{line}\n\t{line}\n{other}") == (found,)


USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function mm:
  REG:{reg} STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.mark.parametrize(
    ("target", "reg", "shared", "warps", "occupancy"),
    [
        ("sm90", 32, 0, 4, 64),  # 64 warps of 32 x 32 registers are all that there are
        ("sm90", 128, 0, 4, 16), ("sm90", 129, 0, 4, 12),  # 129 take as much as 136: 15 warps, 3 in each quarter
        ("sm90", 255, 0, 8, 8), ("sm90", 32, 113 * 1024, 4, 8), ("sm90", 32, 114 * 1024, 4, 4),
        ("sm89", 32, 0, 1, 24),  # as many blocks as a multiprocessor takes
        ("sm80", 200, 0, 16, 0),  # a block of so many registers cannot run at all
    ],
)  # fmt: skip
def test_occupancy_of_nvidia_follows_from_registers_and_shared_memory(
    target: str, reg: int, shared: int, warps: int, occupancy: int
) -> None:
    code = nvidia_code(TARGETS[target], "", USAGE.format(reg=reg, stack=0), shared, warps)
    assert (code.registers, code.shared, code.occupancy, code.stack, code.classes) == (reg, shared, occupancy, 0, ())


def test_nvidias_stack_is_counted_and_a_tool_that_says_nothing_is_an_error() -> None:
    assert nvidia_code(TARGETS["sm80"], "", USAGE.format(reg=255, stack=336), 0, 4).stack == 336
    with pytest.raises(ContractViolation, match="tells no registers: 'cuobjdump fatal'"):
        nvidia_code(TARGETS["sm80"], "", "cuobjdump fatal", 0, 4)


ASSEMBLY = """
; ScratchSize: 0
; LDSByteSize: 0 bytes/workgroup (compile time only)
; Occupancy: {waves}
  - .agpr_count:     0
    .group_segment_fixed_size: {lds}
    .private_segment_fixed_size: {scratch}
    .sgpr_count:     24
    .sgpr_spill_count: {sgpr_spills}
    .vgpr_count:     200
    .vgpr_spill_count: {vgpr_spills}
"""
PLAIN = {"waves": 2, "lds": 0, "scratch": 0, "sgpr_spills": 0, "vgpr_spills": 0}


def test_amds_figures_are_those_of_its_text_and_of_the_shared_memory_that_is_asked_for() -> None:
    code = amd_code(TARGETS["gfx942"], ASSEMBLY.format(**PLAIN), 16 * 1024, 4)
    assert (code.registers, code.scalars, code.spills, code.stack) == (200, 24, 0, 0)
    assert (code.shared, code.occupancy) == (16 * 1024, 8)
    assert amd_code(TARGETS["gfx942"], ASSEMBLY.format(**PLAIN), 33 * 1024, 4).occupancy == 4
    assert amd_code(TARGETS["gfx942"], ASSEMBLY.format(**{**PLAIN, "lds": 65 * 1024}), 0, 4).occupancy == 0
    assert amd_code(TARGETS["gfx1100"], ASSEMBLY.format(**{**PLAIN, "waves": 16}), 0, 8).occupancy == 64
    spilled = amd_code(TARGETS["gfx942"], ASSEMBLY.format(**PLAIN | {"vgpr_spills": 8, "sgpr_spills": 3}), 0, 4)
    assert spilled.spills == 11
    assert amd_code(TARGETS["gfx942"], ASSEMBLY.format(**{**PLAIN, "scratch": 36}), 0, 4).stack == 36
    with pytest.raises(ContractViolation, match="tells no registers"):
        amd_code(TARGETS["gfx942"], "; Occupancy: 3", 0, 4)


def test_what_was_expected_is_there_and_nothing_that_loses() -> None:
    assert unexpected(["wgmma.bf16"], "wgmma.bf16") == ([], [])
    assert unexpected([], "") == ([], [])
    assert unexpected(["mfma.f16"], "mfma.fp8") == (["mfma.fp8"], ["mfma.f16"])
    assert unexpected(["mma.bf16", "wgmma.bf16"], "wgmma.bf16") == ([], ["mma.bf16"])
    assert unexpected(["mma.bf16", "wgmma.bf16"], "wgmma.bf16+mma.bf16") == ([], [])
    assert unexpected(["mfma.f32"], "") == ([], [])
    assert unexpected(["mma.tf32"], "") == ([], ["mma.tf32"])
