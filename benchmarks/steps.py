"""The calls that are timed: forward, step (forward plus backward), optimiser step, second-derivative step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.timing import Call


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


@contextlib.contextmanager
def unchanged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Parameters, their gradients and buffers are afterwards what they were before, whatever trains the modules meanwhile."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    before = [(tensor.detach().clone(), tensor.grad) for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None  # the next backward would add to it in place
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, (value, gradient) in zip(tensors, before, strict=True):
                tensor.copy_(value)
                tensor.grad = gradient


def forward(module: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """From x (batch, in) to y (batch, out), without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return module(x)

    return call


def step(module: nn.Module, x: Tensor, cotangent: Tensor) -> Call:
    """Forward plus backward from `cotangent` (the shape of y): gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    wanted = [x, *parameters_of(module)]

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), wanted, cotangent)

    return call


def parameter_step(module: nn.Module, x: Tensor, cotangent: Tensor) -> Call:
    """Forward plus backward without the gradient of x, as a first layer runs it."""
    wanted = parameters_of(module)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), wanted, cotangent)

    return call


def optimiser_step(module: nn.Module, x: Tensor, target: Tensor) -> Call:
    """A training step: forward, mean squared error to `target`, backward, Adam, gradients cleared."""
    fused = x.device.type == "cuda"
    optimiser = torch.optim.Adam(parameters_of(module), lr=1e-6, fused=fused)

    def call() -> Tensor:
        loss = nn.functional.mse_loss(module(x), target)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss

    return call


def second_derivative_step(module: nn.Module, x: Tensor) -> Call:
    """A physics-informed step: the residual u_x + u_xx along the first input, squared; gradients of the parameters."""
    x = x.detach().clone().requires_grad_()
    wanted = parameters_of(module)

    def call() -> tuple[Tensor | None, ...]:
        u = module(x).sum()
        (first,) = torch.autograd.grad(u, x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        residual = (first[:, 0] + second[:, 0]).square().mean()
        return torch.autograd.grad(residual, wanted, allow_unused=True)

    return call
