"""torch.func through layers and networks: every nesting against plain autograd, sample by sample."""

import pytest
import torch
from samples import OPERATIONS, make_problem
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from kan_fast import KAN, KANLayer, batching, ops

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums of a few dozen terms in another order


@pytest.fixture(params=["layer", "network"])
def model(request, place64):
    options = {"backend": place64.backend, "device": place64.device, "dtype": torch.float64}
    model = KANLayer(3, 2, **options) if request.param == "layer" else KAN([3, 4, 2], **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def x(place64):
    return (torch.rand(6, 3, dtype=torch.float64) * 2.4 - 1.2).to(place64.device)


def plain_hessian(f, x):
    return torch.autograd.functional.hessian(f, x)


def test_grad_jvp_vjp(model, x):
    def f(x):
        return model(x).sin().sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(grad(f)(x), want, **EXACT)
    tangent = torch.randn_like(x)
    torch.testing.assert_close(jvp(f, (x,), (tangent,))[1], (want * tangent).sum(), **EXACT)
    value, pull = vjp(f, x)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], want, **EXACT)


def test_vjp_called_after_its_transform_has_ended(model, x):
    """Saved tensors come back as wrappers of a level that is gone."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    value, pull = vjp(lambda p, x: functional_call(model, p, (x,)), parameters, x)
    d_parameters, dx = pull(torch.ones_like(value))
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(model(leaf).sum(), [leaf, *model.parameters()])
    torch.testing.assert_close(dx, want[0], **EXACT)
    for got, true in zip(d_parameters.values(), want[1:], strict=True):
        torch.testing.assert_close(got, true, **EXACT)


@pytest.mark.parametrize(
    "twice",
    [hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))],
    ids=["jacfwd-jacrev", "jacfwd-jacfwd", "jacrev-jacrev", "jacrev-jacfwd"],
)
def test_hessian_of_every_sample(model, x, twice):
    def f(row):
        return model(row).square().sum()

    want = torch.stack([plain_hessian(f, row) for row in x])
    torch.testing.assert_close(vmap(twice(f))(x), want, **EXACT)
    torch.testing.assert_close(torch.stack([twice(f)(row) for row in x]), want, **EXACT)


def test_jacobians(model, x):
    want = torch.stack([torch.autograd.functional.jacobian(model, row) for row in x])
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(vmap(jacobian(model))(x), want, **EXACT)
        torch.testing.assert_close(vmap(jacobian(model), chunk_size=2)(x), want, **EXACT)


def test_third_order(x):
    """jvp of a Hessian, as in the Korteweg-de Vries equation, against three nested autograd calls."""
    model = KANLayer(3, 1, dtype=torch.float64, spline_order=4)

    def f(row):
        return model(row).sum()

    direction = torch.ones(3, dtype=torch.float64)
    x = x.cpu()
    got = vmap(lambda row: jvp(hessian(f), (row,), (direction,))[1])(x)
    leaf = x.clone().requires_grad_()
    value = model(leaf).sum()
    (first,) = torch.autograd.grad(value, leaf, create_graph=True)
    for i in range(3):
        (second,) = torch.autograd.grad(first[:, i].sum(), leaf, create_graph=True)
        for j in range(3):
            if not second[:, j].requires_grad:
                continue
            (third,) = torch.autograd.grad(second[:, j].sum(), leaf, retain_graph=True)
            torch.testing.assert_close(got[:, i, j], third.sum(1), **EXACT)


@pytest.mark.parametrize("nesting", ["jjj", "jjg", "jgj", "gjj", "jgg", "gjg", "ggj", "ggg"])
def test_three_derivatives_in_every_nesting(place64, nesting):
    """torch's own autograd.Function gives zeros in silence where jvp meets jvp (pytorch issue 197867)."""
    layer = KANLayer(1, 1, spline_order=4, backend=place64.backend, device=place64.device, dtype=torch.float64)
    steps = {
        "j": lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))[1],
        "g": lambda f: lambda x: grad(lambda x: f(x).sum())(x),
    }
    function = layer
    for step in nesting:
        function = steps[step](function)
    x = torch.linspace(-1.5, 1.5, 11, dtype=torch.float64, device=place64.device)[:, None]
    want = layer.edge(0, 0)(x, 3)
    assert want.abs().min() > 0
    torch.testing.assert_close(function(x), want, **EXACT)


def test_jvp_of_grad_and_grad_of_jvp(model, x):
    """Both are Hessian-vector products, by the input and by the weights."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    tangent = torch.randn_like(x)

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    both = grad(loss, argnums=(0, 1))
    _, forward_over_reverse = jvp(both, (parameters, x), (tangents, tangent))
    reverse_over_forward = grad(lambda p, x: jvp(loss, (p, x), (tangents, tangent))[1], argnums=(0, 1))(parameters, x)
    for mine, other in ((forward_over_reverse[1], reverse_over_forward[1]),):
        torch.testing.assert_close(mine, other, **EXACT)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    leaf = x.clone().requires_grad_()
    all_leaves = [*leaves.values(), leaf]
    first = torch.autograd.grad(loss(leaves, leaf), all_leaves, create_graph=True)
    product = sum((g * t).sum() for g, t in zip(first, [*tangents.values(), tangent], strict=True))
    want = torch.autograd.grad(product, all_leaves)
    for name, true in zip(leaves, want[:-1], strict=True):
        torch.testing.assert_close(forward_over_reverse[0][name], true, **EXACT)
        torch.testing.assert_close(reverse_over_forward[0][name], true, **EXACT)
    torch.testing.assert_close(forward_over_reverse[1], want[-1], **EXACT)


def test_mixed_residual_of_a_differential_equation(model, x):
    """r = x u_x + u_xx and its gradient by the weights, where rivals are silently wrong; truth: finite differences."""

    def residual(parameters, x):
        def u(row):
            return functional_call(model, parameters, (row,)).sum()

        def at(row):
            return (row * grad(u)(row)).sum() + hessian(u)(row).diagonal().sum()

        return vmap(at)(x).square().mean()

    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    names = list(parameters)
    assert torch.autograd.gradcheck(
        lambda *p: residual(dict(zip(names, p, strict=True)), x), tuple(parameters.values()), fast_mode=True
    )

    def eager(*values):
        leaf = x.clone().requires_grad_()
        u = functional_call(model, dict(zip(names, values, strict=True)), (leaf,)).sum()
        (u_x,) = torch.autograd.grad(u, leaf, create_graph=True)
        u_xx = sum(torch.autograd.grad(u_x[:, i].sum(), leaf, create_graph=True)[0][:, i] for i in range(3))
        return ((leaf * u_x).sum(1) + u_xx).square().mean()

    torch.testing.assert_close(eager(*parameters.values()), residual(parameters, x), **EXACT)
    assert torch.autograd.gradcheck(eager, tuple(parameters.values()), fast_mode=True)


def test_residual_of_an_analytic_function():
    """A spline of order 3 holds x^3 exactly: r = x u_x + u_xx = 3 x^3 + 6 x, and dr by its coefficients is that of x^3."""
    layer = KANLayer(1, 1, base_activation=None, dtype=torch.float64)
    knots = layer.grid[0]
    with torch.no_grad():  # the blossom of x^3 at three neighbouring knots (de Boor, XI)
        layer.spline_weight[0, :, 0] = torch.stack([knots[f + 1] * knots[f + 2] * knots[f + 3] for f in range(8)])
    x = torch.linspace(-0.9, 0.9, 13, dtype=torch.float64)[:, None].requires_grad_()
    u = layer(x)
    torch.testing.assert_close(u, x**3, **EXACT)
    (u_x,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    residual = x * u_x + u_xx
    torch.testing.assert_close(residual, 3 * x**3 + 6 * x, **EXACT)
    (slope,) = torch.autograd.grad(residual.sum(), x, create_graph=True)
    torch.testing.assert_close(slope, 9 * x**2 + 6, **EXACT)


def test_per_sample_gradients(model, x):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        return functional_call(model, parameters, (row,)).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for sample, row in enumerate(x):
        want = torch.autograd.grad(model(row).square().sum(), list(model.parameters()))
        for name, true in zip(parameters, want, strict=True):
            torch.testing.assert_close(got[name][sample], true, **EXACT)


def test_ensembles(place64, x):
    """Weights and grids batched: models stacked by torch.func."""
    options = {"backend": place64.backend, "device": place64.device, "dtype": torch.float64}
    models = [KAN([3, 4, 2], grid_range=(-1.0 - 0.1 * m, 1.0), **options) for m in range(3)]
    parameters, buffers = stack_module_state(models)

    def call(p, b, x):
        return functional_call(models[0], (p, b), (x,))

    want = torch.stack([model(x) for model in models])
    torch.testing.assert_close(vmap(call, in_dims=(0, 0, None))(parameters, buffers, x), want, **EXACT)
    grads = vmap(grad(lambda p, b: call(p, b, x).square().sum()))(parameters, buffers)
    for m, model in enumerate(models):
        true = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for (name, _), want in zip(model.named_parameters(), true, strict=True):
            torch.testing.assert_close(grads[name][m], want, **EXACT)


@pytest.mark.parametrize("size", [0, 1, 4])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_combination_of_batched_arguments(operation, size):
    """vmap over any subset of arguments, at any dimension, is a loop."""
    problem = make_problem(shape=(5, 3, 2))
    args = [*problem.args(operation, 0), "reference"]
    tensors = [p for p, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    for mask in range(1, 2 ** len(tensors)):
        batched = [p for bit, p in enumerate(tensors) if mask >> bit & 1]
        values, dims = list(args), [None] * len(args)
        for p in batched:
            dims[p] = (mask + p) % (args[p].dim() + 1)
            empty = args[p].new_empty(0, *args[p].shape)
            stacked = torch.stack([args[p] * (1 + 0.1 * s) for s in range(size)]) if size else empty
            values[p] = stacked.movedim(0, dims[p])
        got = vmap(lambda *t: getattr(ops, operation)(*t), in_dims=tuple(dims))(*values)
        for sample in range(size):
            one = [value.select(d, sample) if d is not None else value for value, d in zip(values, dims, strict=True)]
            want = getattr(ops, operation)(*one)
            for mine, true in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
                torch.testing.assert_close(mine[sample], true, **EXACT)
        if size == 0:
            want = getattr(ops, operation)(*args)
            for mine, true in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
                assert mine.shape == (0, *true.shape)


def test_per_sample_gradients_hold_no_second_copy(monkeypatch):
    """Results go straight into their place; a stack of them would hold everything twice."""

    class TorchWithoutStack:
        def __getattr__(self, name):
            assert name != "stack"
            return getattr(torch, name)

    problem = make_problem(shape=(8, 3, 2))
    monkeypatch.setattr(batching, "torch", TorchWithoutStack())
    args = [*problem.args("contract_weight", 0), "reference"]
    args[0], args[1], args[2] = (t[:, None] for t in args[:3])
    d_spline, _ = vmap(ops.contract_weight, in_dims=(0, 0, 0, *[None] * 6))(*args)
    summed, _ = ops.contract_weight(*problem.args("contract_weight", 0), "reference")
    torch.testing.assert_close(d_spline.sum(0), summed, **EXACT)


def test_randomness_of_batches_is_not_needed(x):
    """vmap over a network whose input is shared is the network."""
    model = KAN([3, 2], dtype=torch.float64)
    x = x.cpu()
    torch.testing.assert_close(vmap(lambda s: model(x) * s)(torch.ones(2, dtype=torch.float64))[1], model(x))
