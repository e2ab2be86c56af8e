"""Artefacts that need no kan_fast: standard operators only, the numbers of the model."""

import subprocess
import sys

import pytest
import torch
from samples import KINDS, OPERATIONS, every_activation, every_outside, make_grid, make_problem

from kan_fast import KAN, KANLayer, ops, prune_kan
from kan_fast.backends import available_backends
from kan_fast.export import export_aoti, export_onnx, export_program

# torch 2.13 warns about its own use of its own pytrees.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*torch.*:DeprecationWarning")

# Forbids the package, as an environment without it would.
WITHOUT_KAN_FAST = """
import sys
sys.modules["kan_fast"] = None
import torch
try:
    import kan_fast
except ImportError:
    pass
else:
    raise AssertionError("kan_fast is there")
assert not hasattr(torch.ops.kan_fast, "contract_output")
"""


def network(kind="uneven", activation="silu", outside="zero", dtype=torch.float32, backend="reference", **options):
    """Artefacts are made of the reference, which differs from other backends where x is infinite."""
    base_activation = None if activation == "none" else activation
    model = KAN([3, 4, 2], 5, 3, base_activation=base_activation, outside=outside, dtype=dtype, backend=backend, **options)
    for layer in model.layers:
        layer.set_grid(make_grid(kind, layer.in_features, 5, 3).to(layer.grid.dtype))
    return model


def inputs(rows=64):
    """On the range, on knots, at its ends, beyond every knot, and what is no number."""
    x = torch.randn(rows, 3) * 1.5
    x[:9, 0] = torch.tensor([-1.0, 1.0, -0.2, 0.2, 7.0, -7.0, float("nan"), float("inf"), -float("inf")])
    return x


def assert_same(got, model, x):
    """NaN and infinity where the model has them; else the rounding of float32 sums.

    Both compute the same terms and sum them in another order. A layer sums at most 4 * 9 terms below 8 (inputs below 7 times
    weights of order 1), so it differs by at most 36 eps sum |term| = 36 * 1.2e-7 * 8 = 3.5e-5 in the worst case, and by
    sqrt(36) eps 8 = 6e-6 typically; the second layer's slope, of order 1, passes the first one's difference on.
    """
    with torch.no_grad():
        want = model(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    infinite = want.isinf()
    assert torch.equal(got[infinite], want[infinite])
    finite = want.isfinite()
    assert finite.any()
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-5, atol=1e-5)


def targets(program):
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("backend", available_backends("cpu"))
def test_a_program_of_standard_operators_in_a_process_without_kan_fast(backend, tmp_path):
    model = network(outside="linear", bias=True, backend=backend)
    program = export_program(model, inputs())
    for target in targets(program):
        assert str(target).startswith("aten.") or getattr(target, "__module__", "") == "_operator", target
    torch.export.save(program, tmp_path / "model.pt2")
    x = inputs(9)[:7]  # without infinities
    torch.save(x, tmp_path / "x.pt")
    code = WITHOUT_KAN_FAST + "y = torch.export.load('model.pt2').module()(torch.load('x.pt')); torch.save(y.detach(), 'y.pt')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    assert_same(torch.load(tmp_path / "y.pt"), model, x)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_derivatives_are_decomposed_too(operation, n):
    """An exported residual of a differential equation holds every contraction, of any order."""
    problem = make_problem(outside="linear")

    class Contraction(torch.nn.Module):
        def forward(self, *args):
            return getattr(ops, operation)(*args, "reference")

    args = problem.args(operation, n)
    program = export_program(Contraction(), args, dynamic_batch=False)
    assert not [target for target in targets(program) if "kan_fast" in str(target)]
    torch.testing.assert_close(program.module()(*args), Contraction()(*args), rtol=1e-10, atol=1e-10)


def test_dropout_is_off_and_the_mode_of_the_model_stays():
    model = torch.nn.Sequential(KANLayer(3, 2), torch.nn.Dropout(0.5))
    program = export_program(model, inputs())
    assert model.training and model[1].training
    x = torch.rand(8, 3)
    torch.testing.assert_close(program.module()(x), model[0](x))


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a name that ends with .pt2, got '.*model.so'"):
        export_aoti(network(), tmp_path / "model.so", inputs())
    with pytest.raises(ValueError, match="^example: expected tensors"):
        export_program(network(), torch.tensor(1.0))


class TestOnnx:
    @pytest.fixture(autouse=True)
    def _needs(self):
        for extra in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(extra)

    def run(self, path, x):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = [value.name for value in session.get_inputs()]
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    def check(self, model, path):
        import onnx

        export_onnx(model, path, inputs(9))
        onnx.checker.check_model(path, full_check=True)
        assert {node.domain for node in onnx.load(path).graph.node} == {""}
        for rows in (64, 9, 12):
            x = inputs(rows)
            assert_same(self.run(path, x), model, x)
        one = torch.tensor([[0.3, -0.2, 0.9]])
        assert_same(self.run(path, one), model, one)

    @pytest.mark.parametrize(
        ("kind", "outside", "activations"),
        [
            ("uniform", "zero", ("silu", "none")),
            ("uneven", "linear", ("gelu", "relu")),
            ("repeated", "clamp", ("tanh", "identity")),
        ],
    )
    def test_every_kind_of_layer(self, kind, outside, activations, tmp_path):
        first, second = (
            network(kind, activation, outside, bias=True).layers[place] for place, activation in enumerate(activations)
        )
        self.check(torch.nn.Sequential(first, second), tmp_path / "model.onnx")

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    @every_outside
    @every_activation
    def test_every_combination(self, activation, outside, kind, tmp_path):
        self.check(network(kind, activation, outside), tmp_path / "model.onnx")

    def test_pruned(self, tmp_path):
        model = network("uniform", bias=True)
        report = prune_kan(model, 0.4, relative=True)
        assert all(len(edges) for edges in report.removed.values())
        self.check(model, tmp_path / "model.onnx")

    def test_a_fixed_batch_and_names(self, tmp_path):
        import onnxruntime

        path = tmp_path / "model.onnx"
        export_onnx(network(), path, inputs(10), dynamic_batch=False, input_names=["x"], output_names=["y"])
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [(v.name, v.shape) for v in session.get_inputs()] == [("x", [10, 3])]
        assert [(v.name, v.shape) for v in session.get_outputs()] == [("y", [10, 2])]

    def test_float16(self, tmp_path):
        model = network("uniform", dtype=torch.float16)
        path = tmp_path / "model.onnx"
        x = inputs(32).half()
        export_onnx(model, path, x)
        with torch.no_grad():
            want = model(x)
        got = self.run(path, x)
        assert got.dtype == torch.float16 and torch.equal(got.isnan(), want.isnan())
        finite = want.isfinite()
        # Sums are in float32; the hidden and the final values are rounded to float16, where both may round either way.
        torch.testing.assert_close(got[finite], want[finite], rtol=4 * 2**-10, atol=4 * 2**-10)


@pytest.mark.slow
def test_an_aoti_package_in_a_process_without_kan_fast(tmp_path):
    model = network(outside="linear", bias=True)
    prune_kan(model, 0.3, relative=True)
    export_aoti(model, tmp_path / "model.pt2", inputs())
    x = inputs(9)
    torch.save(x, tmp_path / "x.pt")
    code = WITHOUT_KAN_FAST + (
        "model = torch._inductor.aoti_load_package('model.pt2')\n"
        "x = torch.load('x.pt')\n"
        "torch.save([model(x), model(x[:1])], 'y.pt')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    whole, one = torch.load(tmp_path / "y.pt")
    assert_same(whole, model, x)
    assert_same(one, model, x[:1])
