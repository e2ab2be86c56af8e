"""The Triton kernels compiled for GPUs that are not here: resources and instructions of what the compiler made.

By default a covering sample: every kernel, every way of computing products, four architectures, narrow and wide. Marked
slow: all of benchmarks.kernels.all_configurations.
"""

import dataclasses
import functools
import os
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted in this process cannot be compiled", allow_module_level=True)

from triton.backends.amd.compiler import HIPOptions
from triton.backends.nvidia.compiler import CUDAOptions, get_ptxas

from benchmarks.kernels import (
    ARCHITECTURES,
    KERNELS,
    Configuration,
    all_configurations,
    compile_configuration,
    default_configurations,
)

# Bytes that a block may ask of a multiprocessor: CUDA's programming guide, table of technical specifications; AMD's LDS.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
NARROW = {"batch": 1_000_000, "in_features": 2, "out_features": 5}
UNALIGNED = {"batch": 200, "in_features": 300, "out_features": 500}

SAMPLE = [
    *(Configuration(kernel, arch, n=int(kernel == "contract_input")) for arch in ARCHITECTURES for kernel in KERNELS),
    Configuration("contract_output", 90, torch.float32),
    Configuration("contract_input", 90, torch.float32, n=1),
    Configuration("contract_weight", 90, torch.float32),
    Configuration("contract_output", 80, torch.float32),
    Configuration("contract_output", 90, torch.float32, "high", scaled=True, n=2, outside="linear", activation="gelu"),
    Configuration("contract_weight", 80, torch.float64, spline_order=2, activation="tanh"),
    Configuration("contract_output", "gfx942", torch.float32),
    Configuration("contract_output", 90, torch.float32, **NARROW),
    Configuration("contract_input", 80, torch.float32, **NARROW, n=1),
    Configuration("contract_weight", 90, torch.float32, **NARROW),
    Configuration("contract_output", 90, grid_size=1),  # bases_per_step: 4
    Configuration("contract_weight", 90, **UNALIGNED),
    Configuration("contract_output", 90, torch.float32, **UNALIGNED),
    Configuration("contract_input", 80, batch=1_000_000, in_features=64, out_features=1, n=1),
]


@functools.cache
def compiled(configuration):
    return compile_configuration(configuration)


def main_kernel(configuration):
    return next(r for r in compiled(configuration) if configuration.kernel in r.name.rsplit(": ", 1)[1])


def check_resources(configuration):
    for resources in compiled(configuration):
        assert resources.spills == 0, resources.name
        assert resources.shared <= SHARED[configuration.arch], resources.name
        if configuration.arch in (80, 90, 100):
            assert resources.blocks_per_processor() >= 1, resources.name
            # Sums over the batch are deterministic: nothing is added in memory.
            assert not re.search(r"\b(atom|red)\.", resources.ptx), resources.name


@pytest.mark.parametrize("configuration", SAMPLE, ids=lambda c: f"{c.arch} {c.name}")
def test_sample(configuration):
    check_resources(configuration)


def test_options_are_known_to_the_compiler_that_gets_them():
    # Triton's launcher raises KeyError for others; its compiler, asked directly, drops them.
    for configuration in all_configurations():
        options = HIPOptions if isinstance(configuration.arch, str) else CUDAOptions
        known = {field.name for field in dataclasses.fields(options)}
        for step in configuration.plan():
            assert step.options.keys() <= known, configuration


def test_default_layer_is_in_the_sample():
    for arch in (80, 90):
        for kernel in KERNELS:
            assert any(c in SAMPLE for c in default_configurations([arch]) if c.kernel == kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_runs_on_the_tensor_cores(kernel):
    n = int(kernel == "contract_input")
    hopper = main_kernel(Configuration(kernel, 90, n=n))
    assert "wgmma.mma_async" in hopper.ptx
    assert any(name.startswith("HGMMA") for name in hopper.tensor), hopper.tensor
    assert not any(name.startswith("HMMA") for name in hopper.tensor), hopper.tensor
    assert "HMMA.16816.F32.BF16" in main_kernel(Configuration(kernel, 80, n=n)).tensor
    assert any(name.startswith("UTC") for name in main_kernel(Configuration(kernel, 100, n=n)).tensor)
    assert any("bf16" in name for name in main_kernel(Configuration(kernel, "gfx942", n=n)).tensor)


@pytest.mark.parametrize("kernel", KERNELS)
def test_products_of_bfloat16_go_on_while_more_is_made(kernel, tmp_path):
    # Where the accumulator is touched by anything else, the assembler waits for each instruction by itself, and says so.
    made = main_kernel(Configuration(kernel, 90, n=int(kernel == "contract_input")))
    source = tmp_path / "kernel.ptx"
    source.write_text(made.ptx)
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", source, "-o", tmp_path / "kernel.cubin"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Compiling entry function" in told.stderr
    assert "serialized" not in told.stderr


@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_is_several_products_of_bfloat16_or_true_float32(kernel):
    def products(precision):
        made = main_kernel(Configuration(kernel, 90, torch.float32, precision, n=int(kernel == "contract_input"))).ptx
        assert set(re.findall(r"wgmma\.mma_async\S*\.(\w+)\.\w+ ", made)) == {"bf16"}
        return made.count("wgmma.mma_async")

    # Six products of three parts, three of two.
    assert products("highest") >= 2 * products("high")
    amd = main_kernel(Configuration("contract_output", "gfx942", torch.float32)).tensor
    assert amd and all(name.endswith("f32") and "xf32" not in name for name in amd), amd


def test_narrow_kernels_use_no_tensor_instruction():
    for configuration in SAMPLE:
        if configuration.out_features == 5:
            resources = main_kernel(configuration)
            assert resources.name.endswith("_narrow") and not resources.tensor


@pytest.mark.parametrize("configuration", [c for c in SAMPLE if c.arch == 90], ids=lambda c: c.name)
def test_what_tensor_cores_read_is_fenced(configuration):
    # wgmma reads shared memory by another path than the threads that wrote it there with ordinary stores.
    ptx = main_kernel(configuration).ptx
    if "wgmma.mma_async" in ptx and re.search(r"stmatrix|st\.shared", ptx):
        assert "fence.proxy.async" in ptx


def test_the_report_has_every_kernel_and_way():
    made = default_configurations([90])
    assert len(made) == 12 and {c.kernel for c in made} == set(KERNELS)
    everything = all_configurations()
    assert len(everything) > 500 and set(default_configurations()) <= set(everything)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_everything_compiles(kernel, arch):
    defaults = set(default_configurations([arch]))
    for configuration in all_configurations([arch]):
        if configuration.kernel != kernel:
            continue
        if configuration in defaults:
            check_resources(configuration)
            continue
        for resources in compile_configuration(configuration):
            assert resources.shared <= SHARED[arch], resources.name
            # Unusual orders and modes keep more tiles alive; a few registers on the stack are no disaster.
            assert resources.spills <= 192, resources.name
