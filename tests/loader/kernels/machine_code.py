"""What the Triton kernels become on cards that are not here: compiled ahead of time, and read.

ptxas, cuobjdump and nvdisasm come with Triton, and so does LLVM's backend for AMD.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import triton
from auraflow_gguf.loader.kernels import triton_kernels
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from triton.backends.compiler import GPUTarget

CARDS = {
    name: GPUTarget(backend, architecture, warp)
    for name, backend, architecture, warp in (
        ("sm_75", "cuda", 75, 32),  # RTX 20
        ("sm_80", "cuda", 80, 32),  # A100
        ("sm_86", "cuda", 86, 32),  # RTX 30
        ("sm_89", "cuda", 89, 32),  # RTX 40
        ("sm_90", "cuda", 90, 32),  # H100, H200
        ("sm_100", "cuda", 100, 32),  # B200
        ("sm_120", "cuda", 120, 32),  # RTX 50
        ("gfx90a", "hip", "gfx90a", 64),  # MI200
        ("gfx942", "hip", "gfx942", 64),  # MI300
        ("gfx1100", "hip", "gfx1100", 32),  # RX 7900
        ("gfx1201", "hip", "gfx1201", 32),  # RX 9070
    )
}
DTYPES = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16}
MAXIMA, SMOOTHED = "maxima", "smoothed"
ROTATED = {"*i8": "*i8", MAXIMA: "*fp32", SMOOTHED: "*i8"}
MANY_BLOCKS = 1 << 20  # as a weight has


@dataclass(frozen=True)
class MachineCode:
    """A kernel on a card.

    Attributes:
        text: its assembly: PTX for NVIDIA, GCN for AMD.
        registers: vector registers of a thread.
        spilled: bytes of a thread's registers that are kept in memory.
        names: of the instructions, when they are wanted: taking NVIDIA's code apart takes longer than making it.
    """

    text: str
    registers: int
    spilled: int
    names: Callable[[], list[str]]

    @cached_property
    def instructions(self) -> Counter[str]:
        """How many of each there are, by name."""
        return Counter(self.names())

    def widest(self, kind: str) -> int:
        """Bytes that the widest ``load`` or ``store`` of global memory moves for a thread."""
        return max(_bytes_moved(name, kind) for name in self.instructions)


def _bytes_moved(instruction: str, kind: str) -> int:
    """Of NVIDIA's ``LDG.E.128``, AMD's ``global_load_b128`` or, on older cards, ``global_load_dwordx4``."""
    begin = {"load": r"(?:LDG\.|(?:global|buffer)_load_)", "store": r"(?:STG\.|(?:global|buffer)_store_)"}[kind]
    if not re.match(begin, instruction):
        return 0
    if words := re.search(r"dwordx?(\d*)", instruction):
        return 4 * int(words[1] or 1)
    bits = re.search(r"\d+", instruction)
    return int(bits[0]) // 8 if bits else 4


def compiled(card: str, type_name: str, dtype: str, input_rows: int = 0, *, bias: bool = False) -> MachineCode:
    """The code of a kernel, as a launch would have it in the end.

    Args:
        card: one of `CARDS`.
        type_name: of the packed weight.
        dtype: of ``out`` and of the input, one of `DTYPES`; ``"*i8"`` for the rotating kernel, and for the same
            ``MAXIMA`` when it looks for scales, ``SMOOTHED`` when it smooths columns.
        input_rows: of the multiplying kernel; 0 for the others.
        bias: whether that adds one.
    """
    target, formula = CARDS[card], triton_kernels.FORMULAS[type_name]
    if dtype in ROTATED:
        kernel = triton_kernels.rotate_kernel
        constants, options = triton_kernels.rotate_tile(QUANT_TYPES[type_name])
        constants |= {"scales": None} if dtype == MAXIMA else {}
        constants |= {} if dtype == SMOOTHED else {"smoothing": None}
        dtype = ROTATED[dtype]
    elif input_rows:
        kernel = triton_kernels.linear_kernel
        constants, options = triton_kernels.linear_tile(QUANT_TYPES[type_name], input_rows)
    else:
        kernel = triton_kernels.dequantize_kernel
        constants, options = triton_kernels.dequantize_tile(QUANT_TYPES[type_name], MANY_BLOCKS)
    constants = {"WEIGHTS": formula.weights, **constants}
    constants |= {} if formula.grid else {"table": None}
    constants |= {} if bias or not input_rows else {"bias": None}
    types = {"out": dtype, "input": dtype, "bias": dtype, "packed": "*u8", "table": "*i8", "scales": "*fp32"}
    types |= {"smoothing": "*fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    if target.backend == "hip":
        return _of_amd(triton.compile(source, target=target, options=options).asm)
    code = _of_nvidia(triton.compile(source, target=target, options=options).asm)
    if code.spilled:
        options = options | triton_kernels.ALL_REGISTERS
        code = _of_nvidia(triton.compile(source, target=target, options=options).asm)
    return code


def _of_nvidia(asm: dict) -> MachineCode:
    usage = _told_by("cuobjdump", "-res-usage", of=asm["cubin"])
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}

    def names() -> list[str]:
        code = _told_by("nvdisasm", "-c", of=asm["cubin"])
        return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code, re.MULTILINE)

    return MachineCode(asm["ptx"], numbers["REG"], numbers["STACK"] + numbers["LOCAL"], names)


def _told_by(tool: str, option: str, *, of: bytes) -> str:
    tools = Path(triton.backends.__file__).parent / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(of)
        return subprocess.run([tools / tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _of_amd(asm: dict) -> MachineCode:
    text = asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"^\s*\.{key}:\s+(\d+)", text, re.MULTILINE)[1])

    spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")) + number("private_segment_fixed_size")
    code = text.rpartition("s_endpgm")[0]
    return MachineCode(text, number("vgpr_count"), spilled, lambda: re.findall(r"^\t([a-z]\w+)", code, re.MULTILINE))
