"""What nvcc makes of the kernels: registers that do not spill, and the tensor instructions that each is written for."""

import re
import shutil
import subprocess

import pytest

from build_backend import find_nvcc
from tests.cuda_emulation.build import ROOT

offline = pytest.importorskip("benchmarks.offline", reason="disassembly needs the tools in the Triton wheel")

NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
SAMPLE = [
    ("wide_output_bfloat16", "80"), ("wide_output_tf32", "90a"), ("wide_backward_float16", "80"),
    ("contract_input", "80"), ("contract_output", "120"), ("contract_weight", "90a"), ("warpgroup_output_bfloat16", "90a"),
    ("warpgroup_backward_float16", "90a"), ("warpgroup_split", "90a"), ("cluster_bfloat16", "90a"),
    ("narrow_output", "90a"), ("narrow_input", "80"), ("narrow_weight", "120"), ("network", "90a"),
]  # fmt: skip


# What ptxas says of products of warpgroups that it makes wait for each other, at the level of an information only.
SERIALIZED = "wgmma.mma_async instructions are serialized"
WAITS = "warpgroup.wait is injected"


def compiled(source, architecture, folder, csrc=ROOT / "csrc"):
    """{kernel: (bytes of spills, registers)}, and the disassembly, kernel by kernel."""
    cubin = folder / f"{source}.cubin"
    command = [NVCC, "-std=c++20", "-O3", f"-I{csrc}", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
    said = subprocess.run(
        [*command, csrc / f"cuda/{source}.cu", "-o", cubin], capture_output=True, text=True, check=True
    ).stderr
    assert "warning" not in said
    assert SERIALIZED not in said
    assert WAITS not in said
    facts = {}
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    for match in re.finditer(pattern, said, re.S):
        facts[match[1]] = int(match[2]) + int(match[3]), int(match[4])
    code = subprocess.run([offline.TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\.section\s+\.text\.(\w+)", code)
    return facts, dict(zip(parts[1::2], parts[2::2], strict=True))


def expected(kernel, architecture):
    """The tensor instruction of a kernel, by its mangled name: kind, and whether its operand is sparse."""
    if re.search("(output|input|weight)_split", kernel):  # not what split.cu has; empty but on Hopper, as the next ones
        return r"HGMMA.64x128x16.F32 R\d+, gdesc" if architecture == "90a" else None
    if re.search("_warpgroup|_cluster", kernel):
        sparse = re.search(r"output_warpgroupILNS0_8ProductsE\dELb1E", kernel)
        shape = "HGMMA.SP.64x128x32" if sparse else "HGMMA.64x128x16"
        left = r"R\d+, R\d+, gdesc" if sparse or "weight" in kernel else r"R\d+, gdesc"  # from registers, or shared memory
        return rf"{shape}.F32{'.BF16' if 'ProductsE0E' in kernel else ''} {left}" if architecture == "90a" else None
    if "_wide" not in kernel:
        return None
    half = re.search(r"ProductsE[01]E", kernel)
    sparse = "output_wide" in kernel and "Lb1E" in kernel
    shape = {(True, False): "16816", (True, True): "16832", (False, False): "1688", (False, True): "16816"}[bool(half), sparse]
    return rf"HMMA{'.SP' if sparse else ''}\.{shape}\.F32"


def check(source, architecture, folder):
    facts, code = compiled(source, architecture, folder)
    assert facts
    assert facts.keys() == code.keys()
    for kernel, (spilled, registers) in facts.items():
        assert spilled == 0, kernel
        assert registers <= 255
        wanted = expected(kernel, architecture)
        assert (wanted is None) == (re.search("HG?MMA", code[kernel]) is None)
        if wanted is not None:
            assert re.search(wanted, code[kernel]), kernel
            assert ("UTMALDG.3D.MULTICAST" if "_cluster" in kernel else "LDGSTS") in code[kernel]  # asynchronous copies
        if wanted is not None and "HGMMA" in wanted:
            # One step's product, of one commit or of two, stays under way while the next one's is begun. Of float32 two steps
            # are begun before either is waited for; narrow tiles of contract_input wait for each, and leave it to another
            # block. With the left operand in registers those that are loaded next are waited for: of the four commits of a
            # step, all but one or three stay under way.
            narrow = "Li128E" in kernel
            if re.search("weight_(warpgroup|cluster)", kernel):
                commits, waits = 3 if narrow else 1, 4
            elif "_split" in kernel or ("input_warpgroup" in kernel and narrow):
                commits, waits = 0, 2
            else:
                commits, waits = 1 if "input" in kernel else 2, 1
            assert len(re.findall(rf"WARPGROUP\.DEPBAR\.LE gsb0, 0x{commits}", code[kernel])) == waits, kernel
            assert "FENCE.VIEW.ASYNC" in code[kernel] or "weight_cluster" in kernel  # which threads write nothing for
    if source.startswith("narrow"):
        kernels = [kernel for kernel in facts if "_narrowI" in kernel]
        assert len(kernels) == 7
        for kernel in kernels:
            # 16 bytes to an access of x, g and the tables; of y and dx too.
            assert re.search(r"LDGSTS\S*\.128", code[kernel]), kernel
            assert re.search(r"LDS\S*\.128", code[kernel]), kernel
            assert source == "narrow_weight" or re.search(r"STG\S*\.128", code[kernel]), kernel


@pytest.mark.parametrize(("source", "architecture"), SAMPLE)
def test_sample(source, architecture, tmp_path):
    check(source, architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_kernel_on_every_architecture(source, architecture, tmp_path):
    check(source, architecture, tmp_path)


@pytest.mark.slow
def test_serialized_products_would_be_seen(tmp_path):
    """A sum that is touched between two products."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernel = tmp_path / "csrc/cuda/warpgroup_tile.cuh"
    after = "if (k == kSets - 1) copy_now();"
    assert after in kernel.read_text()
    kernel.write_text(kernel.read_text().replace(after, f"sums[0][0] += 1.0f; {after}"))
    with pytest.raises(AssertionError, match="serialized"):
        compiled("warpgroup_backward_bfloat16", "90a", tmp_path, tmp_path / "csrc")


@pytest.mark.slow
def test_no_more_kernels_than_the_readme_says(tmp_path):
    number = size = 0
    for source in SOURCES:
        facts, _ = compiled(source, "90a", tmp_path)
        number += len(facts)
        size += (tmp_path / f"{source}.cubin").stat().st_size
    said = re.search(r"There are (\d+) kernels for each architecture", (ROOT / "README.md").read_text())
    assert number == int(said[1])
    # Of the 57 MB that README.md speaks of, 51 are code of seven architectures; the largest part is this one's.
    assert size < 10.4e6
