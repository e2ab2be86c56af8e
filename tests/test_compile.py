"""torch.compile and torch.export: whole graphs, the same numbers, derivatives of every order."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from kan_fast import KAN, KANLayer

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.fixture
def model(place64):
    return KAN([3, 4, 2], backend=place64.backend, device=place64.device, dtype=torch.float64, bias=True)


@pytest.fixture
def x(place64):
    return (torch.rand(6, 3, dtype=torch.float64) * 2.4 - 1.2).to(place64.device)


def gradients(model, x):
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    return y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])


def compiled(function, **options):
    """The graph is captured whole and lowered to ATen and our operators, without generating code."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def test_forward_and_backward(model, x):
    for mine, want in zip(gradients(compiled(model), x), gradients(model, x), strict=True):
        torch.testing.assert_close(mine, want, **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")
def test_with_generated_code(place):
    model = KAN([3, 4, 2], backend=place.backend, device=place.device)
    x = torch.rand(6, 3, device=place.device)
    with_code = torch.compile(model, fullgraph=True)
    for mine, want in zip(gradients(with_code, x), gradients(model, x), strict=True):
        torch.testing.assert_close(mine, want)
    with torch.no_grad():
        torch.testing.assert_close(with_code(x), model(x))


def test_dynamic_shapes_are_compiled_once(model, x):
    counter = CompileCounterWithBackend("aot_eager")
    dynamic = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for rows in (6, 5, 3):
        batch = x[:rows].clone()  # a view would be compiled once more for its base of another size
        torch.testing.assert_close(dynamic(batch), model(batch), **EXACT)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "options",
    [{"base_activation": None}, {"base_activation": torch.sin}, {"outside": "linear"}],
    ids=["no base", "torch.sin", "linear outside"],
)
def test_layers_of_every_kind(options, x):
    layer = KANLayer(3, 2, dtype=torch.float64, **options)
    layer.edge_mask = torch.tensor([[True, False], [True, True], [False, True]])
    x = x.cpu()
    for mine, want in zip(gradients(compiled(layer), x), gradients(layer, x), strict=True):
        torch.testing.assert_close(mine, want, **EXACT)
    leading = torch.rand(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(compiled(layer)(leading), layer(leading), **EXACT)


def test_autocast(x):
    layer = KANLayer(3, 2)
    x = x.cpu().float()

    def narrow(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    got = compiled(narrow)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, narrow(x))


def test_per_sample_gradients_inside(model, x):
    def gradients_of_rows(x):
        return vmap(grad(lambda row: model(row).square().sum()))(x)

    torch.testing.assert_close(compiled(gradients_of_rows)(x), gradients_of_rows(x), **EXACT)


def test_transforms_inside(model, x):
    def f(row):
        return model(row).sum()  # torch 2.13 does not compile forward over reverse of a square, for any model

    tangent = torch.randn_like(x)
    for function in (
        lambda x: vmap(hessian(f))(x),
        lambda x: vmap(jacrev(jacrev(lambda row: model(row).square().sum())))(x),
        lambda x: jvp(model, (x,), (tangent,))[1],
        lambda x: vmap(lambda row, t: jvp(grad(f), (row,), (t,))[1])(x, tangent),
    ):
        torch.testing.assert_close(compiled(function)(x), function(x), **EXACT)


def test_training_step_of_a_differential_equation(model, x):
    """Second derivatives by x inside, gradients by the weights outside, in one graph."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        def u(row):
            return functional_call(model, parameters, (row,)).sum()

        u_x, u_xx = vmap(grad(u))(x), vmap(hessian(u))(x)
        return ((x * u_x).sum(1) + u_xx.diagonal(dim1=1, dim2=2).sum(1)).square().mean()

    def step(parameters, x):
        return grad(loss)(parameters, x)

    got, want = compiled(step)(parameters, x), step(parameters, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], **EXACT)


def test_a_training_step_in_one_graph(model, x):
    """Forward, backward and update; fullgraph raises at a graph break."""
    twin, target = copy.deepcopy(model), torch.rand(6, 2, dtype=torch.float64, device=x.device)

    def make_step(model):
        def step(x, target):
            loss = (model(x) - target).square().mean()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
            return loss.detach()

        return step

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        plain, fast = make_step(model), compiled(make_step(twin))
        losses = [(plain(x, target), fast(x, target)) for _ in range(4)]
    for want, got in losses:
        torch.testing.assert_close(got, want, **EXACT)
    assert losses[-1][0] < losses[0][0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_training_step_in_a_cuda_graph():
    """Captured once, replayed on other data: no allocation on the host's side, no wait for the device."""
    model = KAN([3, 4, 2], device="cuda")
    twin = copy.deepcopy(model)
    batches = [(torch.rand(32, 3, device="cuda") * 2 - 1, torch.rand(32, 2, device="cuda")) for _ in range(6)]

    def make_step(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)

        def step(x, y):
            optimizer.zero_grad(set_to_none=True)
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    plain, captured = make_step(model), make_step(twin)
    x, y = (torch.empty_like(part) for part in batches[0])
    want, got = [], []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches[:3]:  # warm-up, which trains too
            want.append(plain(*batch))
            x.copy_(batch[0]), y.copy_(batch[1])
            got.append(captured(x, y).clone())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured(x, y)
    for batch in batches[3:]:
        want.append(plain(*batch))
        x.copy_(batch[0]), y.copy_(batch[1])
        graph.replay()
        got.append(loss.clone())
    torch.testing.assert_close(torch.stack(got), torch.stack(want))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11's own way of loading
@pytest.mark.parametrize("strict", [False, True])
def test_export(model, x, strict, tmp_path):
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (6, 4):
        torch.testing.assert_close(loaded(x[:rows]), model(x[:rows]), **EXACT)
    leaf = x.clone().requires_grad_()  # an exported program is differentiable still
    (got,) = torch.autograd.grad(loaded(leaf).sum(), leaf)
    (want,) = torch.autograd.grad(model(leaf).sum(), leaf)
    torch.testing.assert_close(got, want, **EXACT)


def test_an_exported_program_chooses_its_backend_where_it_runs():
    layer = KANLayer(3, 2)
    program = torch.export.export(layer, (torch.rand(4, 3),))
    calls = [node for node in program.graph.nodes if node.target is torch.ops.kan_fast.contract_output.default]
    assert [node.args[-1] for node in calls] == ["auto"]
    named = torch.export.export(KANLayer(3, 2, backend="reference"), (torch.rand(4, 3),))
    calls = [node for node in named.graph.nodes if node.target is torch.ops.kan_fast.contract_output.default]
    assert [node.args[-1] for node in calls] == ["reference"]


def test_compiled_models_can_be_copied_and_loaded(model, x):
    fast = compiled(model)
    fast(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    fast.load_state_dict({f"_orig_mod.{name}": value for name, value in other.state_dict().items()})
    torch.testing.assert_close(fast(x), other(x), **EXACT)
