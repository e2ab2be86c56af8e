"""kan_fast.info says what is there, and why the rest is not."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from kan_fast import available_backends, backends, info


def run_info(**environment):
    command = [sys.executable, "-m", "kan_fast.info"]
    done = subprocess.run(command, text=True, capture_output=True, check=True, env={**os.environ, **environment})
    return done.stdout


@pytest.fixture
def without_native(monkeypatch, tmp_path):
    """An installation whose build found no compiler."""
    (tmp_path / "_build_record.json").write_text('{"built": "none", "reason": "no C++ compiler at build time", "torch": null}')
    monkeypatch.setattr(info, "_PACKAGE", tmp_path)
    monkeypatch.setitem(sys.modules, "kan_fast._build_info", None)  # importing it raises ImportError


def test_info_agrees_with_the_table_of_backends():
    facts = info.info()
    assert tuple(facts["backends"]) == backends.NAMES
    assert facts["torch"] == torch.__version__
    on_cpu = [name for name, reasons in facts["backends"].items() if reasons["cpu"] is None]
    assert tuple(on_cpu) == available_backends("cpu")
    for reasons in facts["backends"].values():
        assert set(reasons) == {"cpu", "cuda"}
        assert all(reason is None or len(reason) > 10 for reason in reasons.values())
    if not torch.cuda.is_available():
        assert all(reasons["cuda"] is not None for reasons in facts["backends"].values())


def test_module_prints_every_backend():
    text = run_info()
    for name in backends.NAMES:
        assert f"\n  {name} " in text
    assert torch.__version__ in text


def test_native_build_is_described():
    native = info.info()["native"]
    if "missing" in native and os.environ.get("KAN_FAST_REQUIRE_NATIVE") != "1":
        pytest.skip("the native code is not built, and KAN_FAST_REQUIRE_NATIVE does not ask for it")
    assert native["isa_chosen"] in native["isa_built"]
    assert native["isa_built"][0] == "baseline"
    assert native["cuda_archs"] is None or native["cuda_archs"]
    assert "C++ 20" in native["compiler"]
    assert "runs baseline\n" in run_info(KAN_FAST_ISA="baseline")
    assert "expected baseline, avx2 or avx512" in run_info(KAN_FAST_ISA="mmx")


def test_missing_native_code_has_its_reason(without_native):
    facts = info.info()
    assert facts["backends"]["native"]["cpu"] == "it was not built: no C++ compiler at build time"
    assert facts["native"] == {"missing": "no C++ compiler at build time"}
    assert "missing           no C++ compiler at build time" in info.report()


def test_source_folder_without_a_build_says_so(without_native, monkeypatch, tmp_path):
    (tmp_path / "_build_record.json").unlink()
    assert "make build" in info.info()["native"]["missing"]


def test_a_library_without_the_record_of_its_build_is_asked(without_native, monkeypatch, tmp_path):
    if "native" not in available_backends("cpu"):
        pytest.skip("the native code is not built")
    (tmp_path / "_build_record.json").unlink()
    (tmp_path / "_native.so").touch()  # the library that is loaded stays the real one
    facts = info.info()
    assert facts["backends"]["native"]["cpu"] is None
    assert facts["build"]["reason"] == "the library is there, but _build_record.json, which says how it was built, is not"
    assert "_build_info" in facts["native"]["missing"]
    assert "not built" not in info.report()
    monkeypatch.setattr(backends.get("native"), "_not_loaded", "it was built against another torch")
    assert info.info()["backends"]["native"]["cpu"] == "it was built against another torch"


def test_plain_pytorch_chosen_for_want_of_kernels_is_said_once():
    program = (
        "import torch, warnings\n"
        "from kan_fast import KANLayer\n"
        "layer, x = KANLayer(2, 3), torch.zeros(4, 2)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    layer(x), layer(x), KANLayer(2, 3, backend='reference')(x)\n"
        "print(len(seen), seen[0].filename, seen[0].message)\n"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "KAN_FAST_NATIVE_LIBRARY": "absent.so"}
    said = subprocess.run(command, text=True, capture_output=True, check=True, env=environment).stdout
    assert said.startswith("1 ") and "plain PyTorch" in said and "absent.so, which does not exist" in said


def test_a_library_of_older_sources_says_so(tmp_path):
    """After an update of the sources alone: a library that loads and lacks an operator."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path / "_native.so"
    subprocess.run([compiler, "-shared", "-x", "c++", "/dev/null", "-o", library], check=True)
    program = "import torch, kan_fast.backends as b; print(b.reason_not('native', torch.device('cpu'), torch.float32))"
    environment = {**os.environ, "KAN_FAST_NATIVE_LIBRARY": str(library)}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
    assert "built from older sources" in said
    assert "contract_output" in said
