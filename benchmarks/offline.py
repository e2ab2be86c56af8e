"""Compiling kernel launches without a GPU: what the compiler made of them.

A launch of kan_fast.backends.triton.launch, planned on meta tensors, is compiled for a target by the rules of Triton's own
launcher: integers equal to 1 are compile-time constants, pointers and multiples of 16 are known to be such (tensors of the
meta device count as aligned). The resources come from the tools inside the Triton wheel.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kan_fast.backends.triton.launch import Launch
from kan_fast.backends.triton.tiles import Target

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR_TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
}  # fmt: skip
TENSOR_CORE = re.compile(r"HGMMA|HMMA|DMMA|UTC\w*MMA|UTCHMMA")

# Multiprocessors of the cards that the architectures stand for: A100, H100, B200, MI300X.
PROCESSORS: dict[int | str, int] = {80: 108, 90: 132, 100: 148, 120: 170, "gfx942": 304}


@dataclass
class Resources:
    """One kernel compiled for one target."""

    name: str
    arch: int | str
    seconds: float
    registers: int
    spills: int  # bytes of stack on NVIDIA, spilled registers on AMD
    shared: int  # bytes of shared memory
    warps: int
    instructions: int
    tensor: dict[str, int] = field(default_factory=dict)  # tensor-core instructions by name
    ptx: str = ""

    def blocks_per_processor(self) -> int:
        """How many blocks fit on a multiprocessor of an A100, H100 or B200, by registers, shared memory and warps."""
        registers = -(-self.registers * 32 // 256) * 256 * self.warps
        memory = (164 if self.arch == 80 else 228) * 1024
        return min(65536 // max(1, registers), memory // (self.shared + 1024), 64 // self.warps, 32)


def target(arch: int | str) -> Target:
    """The Target of an architecture: 80, 90, 100 (NVIDIA) or "gfx942" (AMD)."""
    return Target("hip" if isinstance(arch, str) else "cuda", arch, PROCESSORS[arch])


def compile_launch(launch: Launch, name: str, arch: int | str) -> Resources:
    """Compile one launch for an architecture and take stock."""
    kernel = launch.kernel
    unknown = launch.arguments.keys() - {parameter.name for parameter in kernel.params}
    if unknown:  # the launcher refuses them too
        raise TypeError(f"{kernel.__name__}: has no arguments {sorted(unknown)}")
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TENSOR_TYPES[value.dtype]
            divisible = True
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    start = time.perf_counter()
    compiled = triton.compile(source, target=gpu, options=dict(launch.options))
    seconds = time.perf_counter() - start
    found = {"name": name, "arch": arch, "seconds": seconds, "shared": compiled.metadata.shared}
    found["warps"] = compiled.metadata.num_warps
    read = _read_amd(compiled.asm["amdgcn"]) if isinstance(arch, str) else _read_nvidia(compiled.asm)
    return Resources(**found, **read)


def _read_nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG and STACK, got {usage[-300:]!r}")
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)", sass, re.M)
    return {
        "registers": int(numbers[1]),
        "spills": int(numbers[2]),
        "instructions": len(instructions),
        "tensor": dict(collections.Counter(name for name in instructions if TENSOR_CORE.match(name))),
        "ptx": asm["ptx"],
    }


def _read_amd(text: str) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"amdgcn: expected .{name} in the metadata")
        return int(found[1])

    return {
        "registers": number("vgpr_count") + number("agpr_count"),
        "spills": number("vgpr_spill_count"),
        "instructions": len(re.findall(r"^\t[a-z]", text, re.M)),
        "tensor": dict(collections.Counter(re.findall(r"^\t(v_mfma\w+)", text, re.M))),
    }


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


