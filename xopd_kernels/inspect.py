"""What the compiler makes of every kernel and tile: `python -m xopd_kernels.inspect`.

Compiles ahead of time for sm_80, sm_90 and sm_100, with the tools inside the triton wheel (no
GPU needed), and prints registers, spills, stack, shared memory, tensor-core instructions and
global atomics. A kernel with a problem (see `problems`) is named, and the exit status is 1.
"""

import argparse
import collections
import itertools
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xopd_kernels.chunk import config, triton_sparse
from xopd_kernels.chunk.config import Stage
from xopd_kernels.tile.divergence import divergence_kernel, topk_divergence_kernel
from xopd_kernels.tile.entries import entry_hidden_kernel, entry_weight_kernel
from xopd_kernels.tile.matmul import matmul_kernel
from xopd_kernels.tile.scoring import fold_kernel, persistent_kernel
from xopd_kernels.tile.softmax import gradient_kernel, logits_kernel, statistics_kernel
from xopd_kernels.tile.sparse import (
    draw_kernel,
    keep_kernel,
    list_kernel,
    rest_kernel,
)
from xopd_kernels.tile.token_loss import policy_kernel

SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # CUDA programming guide
_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTC"}  # prefixes of SASS opcodes
_GLOBAL_ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")  # ATOMS and REDUX touch no global memory
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Job:
    """One kernel to compile; `types` of its arguments in order, None for an argument of None."""

    name: str
    arch: int  # compute capability, 90 = 9.0
    kernel: Any
    types: tuple[str | None, ...]
    constants: tuple[int | bool, ...]  # the constexpr arguments that follow
    warps: int
    stages: int
    has_dot: bool  # on half-precision or TF32 operands: tensor cores must do it


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs."""

    job: Job
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    global_atomics: int

    def problems(self) -> list[str]:
        """Why this kernel must not ship; empty if it may."""
        limit = SHARED_LIMIT_BYTES[self.job.arch]
        found = []
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, limit {limit}")
        if self.spill_bytes or self.stack_bytes:
            found.append(f"spills {self.spill_bytes} bytes, stack {self.stack_bytes} bytes")
        if self.job.has_dot and self.tensor_core_instructions == 0:
            found.append("no tensor-core instruction")
        if self.global_atomics:
            found.append(f"{self.global_atomics} global atomics: not deterministic")
        return found


def jobs(arch: int) -> Iterator[Job]:
    """Every kernel with every tile of the tables that `arch` selects."""
    for dtype, name in _NAMES.items():
        is_fast = dtype != torch.float32  # full fp32 products are not for tensor cores
        p = f"*{name}"
        tile = config.select(Stage.LOGITS, dtype, arch)
        constants = (tile.rows, tile.columns, tile.inner, tile.slab_tiles, tile.group)
        scalars = ("i32", "i32", "i32", "i32", "fp32")
        # Bias and softcap are on: the variants without them need less.
        score = (p, p, p, "*i64", "*i32", None, "*fp32", "*fp32", *scalars, "fp32")
        logits = (p, p, p, "*i64", "*i32", "*fp32", "*fp32", "*fp32", *scalars, "fp32")
        for label, types, has_moment in (("score", score, True), ("logits", logits, False)):
            yield Job(
                f"{label} {name}",
                arch,
                logits_kernel,
                types,
                (*constants, has_moment),
                tile.warps,
                tile.stages,
                is_fast,
            )
        yield from _gradient_gemm_jobs(arch, dtype)
    yield from _persistent_jobs(arch)
    yield from _row_jobs(arch)


def _persistent_jobs(arch: int) -> Iterator[Job]:
    """Persistent scoring, in every variant: here it is not the fullest one that spills first."""
    if arch < min(oldest for oldest, _ in config.PERSISTENT_TABLE):
        return
    for dtype in (torch.bfloat16, torch.float16):
        tile, name = config.select_persistent(dtype, arch), _NAMES[dtype]
        blocks = ((tile.rows, tile.inner), (tile.columns, tile.inner))
        operands = tuple(f"tensordesc<{name}[{rows}, {inner}]>" for rows, inner in blocks)
        outputs = ("*i64", "*i32", "*fp32", "*fp32")
        sizes = (tile.rows, tile.columns, tile.inner, tile.slab_tiles, tile.group)
        for has_bias, has_cap, has_moment in itertools.product((False, True), repeat=3):
            bias = f"*{name}" if has_bias else None
            scalars = ("i32", "i32", "i32", "i32", "fp32", "fp32" if has_cap else None)
            flags = (has_bias, "bias"), (has_cap, "softcap"), (has_moment, "moment")
            yield Job(
                " ".join(["persistent", name, *(label for flag, label in flags if flag)]),
                arch,
                persistent_kernel,
                (*operands, bias, *outputs, *scalars),
                (*sizes, has_moment),
                tile.warps,
                tile.stages,
                has_dot=True,
            )


def _gradient_gemm_jobs(arch: int, dtype: torch.dtype) -> Iterator[Job]:
    """The GEMMs for d_hidden and d_weight, into every kind of result that GradientSum has."""
    f, name = "*fp32", _NAMES[dtype]
    p = f"*{name}"
    gradient = f if dtype == torch.float16 else p  # as narrow_view
    results: list[tuple[str, Stage, str | None, str, bool]] = [
        ("d_hidden", Stage.D_HIDDEN, None, p, False),
        ("d_weight", Stage.D_WEIGHT, f, f, True),
        ("d_weight first", Stage.D_WEIGHT, None, f, False),
    ]
    if dtype != torch.float32:
        results += [
            ("d_hidden held", Stage.D_HIDDEN, None, f, False),
            ("d_weight only", Stage.D_WEIGHT, None, p, False),
            ("d_weight last", Stage.D_WEIGHT, f, p, False),
        ]
    for label, stage, base, c, in_place in results:
        is_weight = stage is Stage.D_WEIGHT
        tile = config.select(stage, dtype, arch)
        # Row indices are on: rows without a gradient are left out.
        pointers = (gradient, p, base, c, "*i64", None if is_weight else "*i64", "*i32")
        yield Job(
            f"{label} {name}",
            arch,
            matmul_kernel,
            (*pointers, *_matmul_scalars(is_weight)),
            (is_weight, in_place, tile.rows, tile.columns, tile.inner, tile.group),
            tile.warps,
            tile.stages,
            dtype != torch.float32,
        )


def _matmul_scalars(is_weight: bool) -> tuple[str, ...]:
    """M, N, K, stride_am, stride_ak, stride_bk, stride_cm; "1" is a stride known to be 1."""
    strides = ("1", "i32") if is_weight else ("i32", "1")
    return ("i32", "i32", "i32", *strides, "i32", "i32")


def _row_jobs(arch: int) -> Iterator[Job]:
    """The kernels without a GEMM."""
    f = "*fp32"
    types: tuple[str | None, ...] = (f, f, "*i32", f, f, f, f, f, "i32", "i32")
    block = (config.ROWS_PER_PROGRAM,)
    yield Job("statistics", arch, statistics_kernel, types, block, 4, 3, False)
    types = (f, f, "*i32", f, None, f, f, f, "i32", "i32", "i32", "fp32", "fp32", "fp32")
    yield Job("policy", arch, policy_kernel, types, block, 4, 3, False)
    types = (f, "*bf16", "*i64", "*i32", f, f, "i32", "i32", "i32", "i32", "fp32", "fp32")
    fold = (config.FOLD_BLOCK_V, True)
    yield Job("fold", arch, fold_kernel, types, fold, config.FOLD_WARPS, 3, False)
    yield from _divergence_jobs(arch)
    rows = (f,) * 7
    types = (f, "*bf16", "*i64", "*i64", "*i32", *rows, "i32", "i32", "fp32", "fp32")
    block, warps = (config.GRADIENT_BLOCK_V,), config.GRADIENT_WARPS
    yield Job("gradient", arch, gradient_kernel, types, block, warps, 1, False)
    yield from _list_jobs(arch)
    yield from _entry_jobs(arch)


def _list_jobs(arch: int) -> Iterator[Job]:
    """The lists of sparse rows: without a target; with one and an entropy; with a softcap."""
    f, ids, warps = "*fp32", "*i32", triton_sparse.LIST_WARPS
    block, entries = (triton_sparse.LIST_BLOCK_V,), (triton_sparse.KEEP_BLOCK,)
    sizes = ("i32", "i32", "i32", "fp32")
    for has_cap, label in ((False, ""), (True, " with softcap")):
        cap, slopes = ("fp32", f) if has_cap else (None, None)
        for has_target in (False, True):
            row = ("*i64" if has_target else None, ids, f, f, f)
            lists: tuple[str | None, ...] = (ids, f, slopes, ids, f, f if has_target else None)
            name = "list" + " and entropy" * has_target + label
            types = (f, *row, *lists, *sizes, cap)
            yield Job(name, arch, list_kernel, types, block, warps, 1, False)
        types = (ids, f, slopes, ids, "*i64", f, f, f, f, "i32", "fp32")
        yield Job(f"keep{label}", arch, keep_kernel, types, entries, 4, 3, False)
        types = (f, ids, f, ids, "*fp64", f, f, f, "i32", "i32", "fp32", cap)
        blocks = (*block, *entries)
        yield Job(f"draw{label}", arch, draw_kernel, types, blocks, warps, 1, False)
        types = (f, "*i64", ids, f, f, "i32", "i32", cap)
        yield Job(f"rest{label}", arch, rest_kernel, types, blocks, warps, 1, False)


def _entry_jobs(arch: int) -> Iterator[Job]:
    """The products over the entries of sparse rows."""
    f, ids, index = "*fp32", "*i32", "*i64"
    blocks = (triton_sparse.ENTRY_BLOCK_E, triton_sparse.ENTRY_BLOCK_D)
    warps, sizes = triton_sparse.ENTRY_WARPS, ("i32", "i32", "i32")
    for name in _NAMES.values():
        p = f"*{name}"
        types: tuple[str | None, ...] = (ids, f, ids, p, f, index, p, *sizes, "i32")
        yield Job(
            f"entry d_hidden {name}", arch, entry_hidden_kernel, types, blocks, warps, 3, False
        )
        types = (index, index, f, p, f, "i32", *sizes, "i32")
        yield Job(
            f"entry d_weight {name}",
            arch,
            entry_weight_kernel,
            types,
            (triton_sparse.CLASS_GROUP, *blocks),
            warps,
            3,
            False,
        )


def _divergence_jobs(arch: int) -> Iterator[Job]:
    """The row kernels of the divergences, with a softcap on both sides."""
    f, sizes = "*fp32", ("i32", "i32")
    block, warps = config.GRADIENT_BLOCK_V, config.GRADIENT_WARPS
    types: tuple[str | None, ...]
    for kind, label in enumerate(("forward", "reverse", "mixed")):
        types = (f, f, "*bf16", "*i32", *(f,) * 6, *sizes, *("fp32",) * 4)
        name = f"{label} divergence"
        yield Job(name, arch, divergence_kernel, types, (kind, block), warps, 1, False)
        types = (f, "*bf16", "*i64", f, "*i32", *(f,) * 5, "i32", *sizes, *("fp32",) * 3)
        for has_tail, ids in ((False, 256), (True, 512)):
            name = f"{label} top-k" + " with tail" * has_tail
            constants = (kind, has_tail, ids, block)
            yield Job(name, arch, topk_divergence_kernel, types, constants, warps, 1, False)


def compile_job(job: Job) -> Resources:
    """Compile one kernel and read its resources from the machine code."""
    names = job.kernel.arg_names
    values: list[Any] = [1 if t == "1" else t for t in job.types]
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(names, [*values, *job.constants], strict=True)):
        is_constant = index >= len(job.types) or value is None or value == 1
        signature[name] = "constexpr" if is_constant else value
        if is_constant:
            constants[name] = value
        elif value != "fp32" and not value.startswith("tensordesc"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(job.kernel, signature, constants, attributes)
    options = {"num_warps": job.warps, "num_stages": job.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    return _read(job, compiled)


def _read(job: Job, compiled: Any) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        sass = _run("nvdisasm", "-c", str(cubin))
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    if not {"REG", "STACK", "LOCAL"} <= fields.keys():
        raise RuntimeError(f"cuobjdump printed no resource usage for {job.name}: {usage[:500]}")
    opcode = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    counts = collections.Counter(re.findall(opcode, sass))
    prefix = _TENSOR_CORE[job.arch]
    # A spilled register is stored to local memory (STL) and loaded back (LDL), 4 bytes at least.
    return Resources(
        job,
        registers=int(fields["REG"]),
        spill_bytes=4 * (counts["STL"] + counts["LDL"]) + int(fields["LOCAL"]),
        stack_bytes=int(fields["STACK"]),
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=sum(
            count for name, count in counts.items() if name.startswith(prefix)
        ),
        global_atomics=sum(counts[name] for name in _GLOBAL_ATOMICS),
    )


def _run(tool: str, *arguments: str) -> str:
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Print the table; 1 if a kernel has a problem, 2 if nothing can be compiled here."""
    argparse.ArgumentParser(prog="python -m xopd_kernels.inspect", description=__doc__).parse_args()
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
        return 2
    print(f"triton {triton.__version__}")
    header = ("sm", "kernel", "warps", "stages", "regs", "spill", "stack", "shared", "mma", "atom")
    layout = "{:>4} {:<35}" + " {:>7}" * 8
    print(layout.format(*header))
    has_problem = False
    for job in (job for arch in config.ARCHITECTURES for job in jobs(arch)):
        r = compile_job(job)
        numbers = (r.registers, r.spill_bytes, r.stack_bytes, r.shared_bytes)
        counts = (r.tensor_core_instructions, r.global_atomics)
        print(layout.format(job.arch, job.name, job.warps, job.stages, *numbers, *counts))
        for problem in r.problems():
            has_problem = True
            print(f"     problem: {problem}")
    return int(has_problem)


if __name__ == "__main__":
    sys.exit(main())
