"""Solve the heat equation u_t = u_xx with a physics-informed [2, 10, 10, 1] network: no data but the equation.

Run: python examples/heat_equation.py

On 0 <= x <= 1, 0 <= t <= 0.5 with u(x, 0) = sin(pi x) and u(0, t) = u(1, t) = 0, the solution is exp(-pi^2 t) sin(pi x).
Derivatives of any order go through the same kernels: the loss below needs the third derivatives of the splines.
"""

import math
import time

import torch
from _shared import check, save_picture
from torch import Tensor

from kan_fast import KAN, update_grid


def solution(points: Tensor) -> Tensor:
    return torch.exp(-math.pi**2 * points[:, 1:]) * torch.sin(math.pi * points[:, :1])


def residual(model: KAN, points: Tensor) -> Tensor:
    """u_t - u_xx at the points (N, 2) of (x, t): (N, 1)."""
    u = model(points)
    slope = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
    u_xx = torch.autograd.grad(slope[:, 0].sum(), points, create_graph=True)[0][:, :1]
    u_t: Tensor = slope[:, 1:]
    return u_t - u_xx


def main(steps: int = 20) -> float:
    torch.manual_seed(0)
    line = torch.linspace(0, 1, 31, dtype=torch.float64)
    inside = torch.cartesian_prod(line, line / 2).requires_grad_()
    zero, one = torch.zeros_like(line), torch.ones_like(line)
    walls = [torch.stack(pair, 1) for pair in ((line, zero), (zero, line / 2), (one, line / 2))]
    given = torch.cat(walls)
    values = solution(given)
    fine = torch.linspace(0, 1, 101, dtype=torch.float64)
    everywhere = torch.cartesian_prod(fine, fine / 2)

    model = KAN([2, 10, 10, 1], grid_size=5, dtype=torch.float64)
    start = time.perf_counter()

    def make_optimizer() -> torch.optim.LBFGS:
        return torch.optim.LBFGS(
            model.parameters(),
            max_iter=50,
            history_size=50,
            tolerance_grad=0,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = 0.01 * residual(model, inside).square().mean() + (model(given) - values).square().mean()
        loss.backward()
        return loss

    for step in range(steps):
        # Knots follow the hidden values while these still move; a margin, because they will move on.
        if step < 4:
            update_grid(model, inside.detach(), grid_eps=1.0, margin=0.3)
        if step <= 4:
            optimizer = make_optimizer()
        loss = optimizer.step(closure).item()
        with torch.no_grad():
            error = float((model(everywhere) - solution(everywhere)).norm() / solution(everywhere).norm())
        if step % 4 == 3:
            print(f"{50 * (step + 1):5d} iterations: loss {loss:.2e}, relative L2 error {error:.2e}")
    print(f"{time.perf_counter() - start:.0f} s")
    plot(model, everywhere)
    check("relative L2 error", error, 1e-3)
    return error


def plot(model: KAN, points: Tensor) -> None:
    import matplotlib.pyplot as plt

    with torch.no_grad():
        u, exact = (field.view(101, 101).numpy() for field in (model(points), solution(points)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for ax, field, title, colours in ((left, u, "u", "inferno"), (right, u - exact, "error", "RdBu")):
        reach = float(abs(field).max())
        low = -reach if title == "error" else 0.0
        image = ax.imshow(field, origin="lower", extent=(0, 0.5, 0, 1), aspect="auto", cmap=colours, vmin=low, vmax=reach)
        ax.set(xlabel="t", ylabel="x", title=title)
        figure.colorbar(image, ax=ax)
    save_picture(figure, "heat_equation")


if __name__ == "__main__":
    main()
