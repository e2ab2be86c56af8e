"""KANLayer: kan_linear with its parameters, knots and mask."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kan_fast import ops, spline
from kan_fast.activations import ACTIVATIONS, activation
from kan_fast.autocast import beneath_autocast
from kan_fast.backends import NAMES, choose
from kan_fast.checks import DTYPES, check_int, check_layout, check_plain, expect
from kan_fast.functional import BaseActivation, kan_linear
from kan_fast.nn import init
from kan_fast.nn.knots import KnotsStayWide, at_least_float32


class KANLayer(KnotsStayWide):
    """One Kolmogorov-Arnold layer: a learnable function on every edge between inputs and outputs, summed per output.

    forward: (..., in_features) -> (..., out_features), see `kan_fast.functional.kan_linear` for formula, dtypes,
    base_activation, outside and backend.

    Parameters: spline_weight (in, grid_size + spline_order, out), base_weight (in, out) unless base_activation is None,
    bias (out) with bias=True. Buffers: grid (in, grid_size + 2 * spline_order + 1), which stays float32 or wider
    whatever the module is cast to; edge_mask (in, out) of bool, None until edges are pruned: where it is False the
    edge is zero and stays so.

    in_features and out_features may be given as input_dim and output_dim. grid_range is the range [a, b] of the
    initial, uniform grid. Raises ValueError or TypeError for arguments out of bounds.
    """

    spline_weight: nn.Parameter
    base_weight: nn.Parameter | None
    bias: nn.Parameter | None
    grid: Tensor
    edge_mask: Tensor | None

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        grid_size: int = 5,
        spline_order: int = 3,
        *,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        base_activation: BaseActivation = "silu",
        bias: bool = False,
        outside: str = "zero",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        input_dim: int | None = None,
        output_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _one_of("in_features", in_features, "input_dim", input_dim)
        self.out_features = _one_of("out_features", out_features, "output_dim", output_dim)
        grid_size = check_int("grid_size", grid_size, 1)
        self.spline_order = check_int("spline_order", spline_order, 0)
        self.grid_range = _check_range(grid_range)
        self.base_activation = _check_activation(base_activation)
        self.outside = _check_name("outside", outside, spline.OUTSIDE)
        self.backend = _check_name("backend", backend, ("auto", *NAMES))
        options: dict[str, Any] = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        if options["dtype"] not in DTYPES:
            raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
        shape = self.in_features, self.out_features
        self.spline_weight = nn.Parameter(torch.empty(shape[0], grid_size + spline_order, shape[1], **options))
        base_weight = None if base_activation is None else nn.Parameter(torch.empty(shape, **options))
        self.register_parameter("base_weight", base_weight)
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[1], **options)) if bias else None)
        options["dtype"] = at_least_float32(options["dtype"])
        knots = torch.empty(shape[0], grid_size + 2 * spline_order + 1, **options)
        self.register_buffer("grid", knots)
        self.register_buffer("edge_mask", None)
        self.reset_parameters()

    @property
    def input_dim(self) -> int:
        """in_features"""
        return self.in_features

    @property
    def output_dim(self) -> int:
        """out_features"""
        return self.out_features

    @property
    def grid_size(self) -> int:
        """Number of intervals G on the range of the grid."""
        return self.spline_weight.shape[1] - self.spline_order

    def reset_parameters(self) -> None:
        """Uniform knots on `grid_range`, weights that keep the signal's variance (nn/init.py), bias zero. The mask stays.

        Raises ValueError for parametrized weights.
        """
        check_plain(self)
        if self.grid.is_meta:  # no numbers to set, and a base activation may have some that are not meta
            return
        grid = spline.uniform_grid(
            self.in_features, self.grid_size, self.spline_order, self.grid_range, self.grid.device, self.grid.dtype
        )
        with torch.no_grad():
            self.grid.copy_(grid)
            x = init.nodes(grid, self.spline_order)
            base = None if self.base_activation is None else self._base(x, 0)
            spline_std, base_std = init.standard_deviations(x, base, grid, self.spline_order, self.outside)
            self.spline_weight.normal_().mul_(spline_std[:, None, None])
            if self.base_weight is not None:
                self.base_weight.normal_().mul_(base_std[:, None])
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)"""
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        try:  # nn.Module's attribute access costs 0.5 us each, which small layers feel
            spline_weight, base_weight = parameters["spline_weight"], parameters["base_weight"]
            bias = parameters["bias"]
        except KeyError:  # parametrized
            spline_weight, base_weight, bias = self.spline_weight, self.base_weight, self.bias
        if buffers["edge_mask"] is not None:
            spline_weight, base_weight = self.masked_weights()
        return kan_linear(
            x,
            spline_weight,
            buffers["grid"],
            base_weight,
            bias,
            base_activation=self.base_activation,
            outside=self.outside,
            backend=self.backend,
        )

    def masked_weights(self) -> tuple[Tensor, Tensor | None]:
        """spline_weight (in, G + k, out) and base_weight (in, out) or None, zero at edges that are masked."""
        return masked(self.spline_weight, self.base_weight, self.edge_mask)

    def edge_values(self, x: Tensor, derivative: int = 0) -> Tensor:
        """Value, or derivative of that order, of every edge's function: (N, in) -> (N, in, out). No bias.

        Differentiable. The sum over `in` is forward(x) without bias. Computed in float32 or wider, under autocast too; of
        the dtype of the weights.
        """
        expect(isinstance(x, Tensor), "x", "a tensor", x)
        check_layout("x", x)
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x: expected shape (N, in_features) with in_features = {self.in_features}, got {tuple(x.shape)}")
        derivative = check_int("derivative", derivative, 0)
        spline_weight, base_weight = self.masked_weights()
        dtype = at_least_float32(x.dtype)
        x = x.to(dtype)
        phi = spline.bases(x, self.grid.to(dtype), self.spline_order, self.outside, derivative)
        values = beneath_autocast(torch.bmm)(phi.transpose(0, 1), spline_weight.to(dtype)).transpose(0, 1)
        if base_weight is not None:
            values = values + self._base(x, derivative)[..., None] * base_weight.to(dtype)
        return values.to(self.spline_weight.dtype)

    def edge(self, i: int, j: int) -> Callable[..., Tensor]:
        """The function of the edge from input i to output j: f(x, derivative=0), any shape -> same shape.

        It reads the layer's weights when called, so it follows training, and is differentiable. Raises IndexError for
        an edge that does not exist.
        """
        for name, index, size in (("i", i, self.in_features), ("j", j, self.out_features)):
            expect(hasattr(index, "__index__"), name, "an int", index)
            if not -size <= index < size:
                raise IndexError(f"{name}: expected an index of {size} features, got {index}")
        i, j = i % self.in_features, j % self.out_features

        def function(x: Tensor, derivative: int = 0) -> Tensor:
            expect(isinstance(x, Tensor), "x", "a tensor", x)
            check_layout("x", x)
            derivative = check_int("derivative", derivative, 0)
            spline_weight, base_weight = self.masked_weights()
            spline_weight = spline_weight[i : i + 1, :, j : j + 1]
            base_weight = None if base_weight is None else base_weight[i : i + 1, j : j + 1]
            fused = self.base_activation if isinstance(self.base_activation, str) else "none"
            backend = choose(self.backend, x.device, spline_weight.dtype)
            y = ops.contract_output(
                x.reshape(-1, 1),
                None,
                spline_weight,
                None if fused == "none" else base_weight,
                self.grid[i : i + 1],
                fused,
                self.outside,
                derivative,
                backend,
            ).view(x.shape)
            if base_weight is not None and fused == "none":
                y = y + self._base(x, derivative) * base_weight[0, 0]
            return y

        return function

    def set_grid(self, grid: Tensor, spline_weight: Tensor | None = None) -> None:
        """Replace the knots, and with them the spline weights where they are given.

        grid (in, G' + 2k + 1), non-decreasing, of any G' >= 1; spline_weight (in, G' + k, out), needed where G' is not the
        present grid size. The Parameter stays the same object, so optimisers keep it; in a
        new shape it has no gradient. Raises ValueError or TypeError, for a parametrized spline_weight too.
        """
        expect(isinstance(grid, Tensor), "grid", "a tensor", grid)
        expect(spline_weight is None or isinstance(spline_weight, Tensor), "spline_weight", "a tensor or None", spline_weight)
        spline.check_grid(grid, self.in_features, self.spline_order)
        num_bases = grid.shape[1] - self.spline_order - 1
        if spline_weight is None and num_bases != self.spline_weight.shape[1]:
            raise ValueError(
                f"spline_weight: needed for a grid of another size: the layer has grid_size = {self.grid_size},"
                f" got knots of grid_size = {num_bases - self.spline_order}"
            )
        shape = self.in_features, num_bases, self.out_features
        if spline_weight is not None and spline_weight.shape != shape:
            raise ValueError(
                f"spline_weight: expected shape (in_features, grid_size + spline_order, out_features) = {shape},"
                f" got {tuple(spline_weight.shape)}"
            )
        if spline_weight is not None:
            check_plain(self, weights=("spline_weight",))
        weight = self.spline_weight
        self.grid = grid.detach().to(self.grid.device, self.grid.dtype, copy=True)
        if spline_weight is None:
            return
        if spline_weight.shape == weight.shape:
            with torch.no_grad():
                weight.copy_(spline_weight)
        else:
            weight.grad = None
            new = spline_weight.detach().to(weight.device, weight.dtype, copy=True)
            # While some graph of the old shape is alive, autograd would go on to expect gradients of that shape. A change of
            # dtype makes it forget.
            weight.data = weight.new_empty(0, dtype=torch.float64 if weight.dtype == torch.float32 else torch.float32)
            weight.data = new

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses."""
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, grid_size={self.grid_size}",
            f"spline_order={self.spline_order}",
        ]
        if not isinstance(self.base_activation, nn.Module):  # a module is listed below
            parts.append(f"base_activation={self.base_activation!r}")
        if self.outside != "zero":
            parts.append(f"outside={self.outside!r}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join([*parts, f"bias={self.bias is not None}"])

    def _base(self, x: Tensor, n: int) -> Tensor:
        """n-th derivative of the base activation at x, of x's shape."""
        if isinstance(self.base_activation, str):
            return activation(self.base_activation, x, n)
        function = self.base_activation
        assert function is not None
        for _ in range(n):
            function = _derivative(function)
        return function(x)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A mask comes and goes with the checkpoint; another grid size is an error that says so."""
        weight, knots = state_dict.get(prefix + "spline_weight"), state_dict.get(prefix + "grid")
        if weight is not None and knots is not None and weight.dim() == 3 and knots.dim() == 2:
            order = knots.shape[1] - weight.shape[1] - 1
            theirs, ours = (weight.shape[1] - order, order), (self.grid_size, self.spline_order)
            if theirs != ours:
                error_msgs.append(
                    f"{prefix}spline_weight, {prefix}grid: the checkpoint has grid_size = {theirs[0]} and spline_order ="
                    f" {theirs[1]}, the layer has grid_size = {ours[0]} and spline_order = {ours[1]}"
                )
                return
        if weight is not None or any(key.startswith(f"{prefix}parametrizations.spline_weight.") for key in state_dict):
            mask = state_dict.get(prefix + "edge_mask")
            if mask is None:
                self.edge_mask = None
            elif self.edge_mask is None:
                shape = self.in_features, self.out_features
                self.edge_mask = torch.ones(shape, dtype=torch.bool, device=self.spline_weight.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Elementwise derivative of an elementwise function, differentiable again."""

    def derivative(x: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
        return tangent

    return derivative


def masked(spline_weight: Tensor, base_weight: Tensor | None, edge_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights (in, G + k, out) and (in, out), zero where edge_mask (in, out) is; without one as they are."""
    if edge_mask is None:
        return spline_weight, base_weight
    pruned = ~edge_mask
    base_weight = None if base_weight is None else base_weight.masked_fill(pruned, 0)
    return spline_weight.masked_fill(pruned[:, None, :], 0), base_weight


def _one_of(name: str, value: int | None, alias: str, alias_value: int | None) -> int:
    if (value is None) == (alias_value is None):
        raise TypeError(f"{name}: expected it once, as {name} or {alias}, got {value} and {alias_value}")
    return check_int(name, alias_value if value is None else value, 0)


def _check_range(grid_range: Any) -> tuple[float, float]:
    try:
        a, b = (float(end) for end in grid_range)
    except (TypeError, ValueError):
        raise TypeError(f"grid_range: expected two numbers, got {grid_range!r}") from None
    if not (math.isfinite(a) and math.isfinite(b) and a < b):
        raise ValueError(f"grid_range: expected finite a < b, got ({a:g}, {b:g})")
    return a, b


def _check_name(argument: str, name: Any, names: tuple[str, ...]) -> str:
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, names))}, got {name!r}")
    return name


def _check_activation(base_activation: Any) -> BaseActivation:
    if isinstance(base_activation, type):
        raise TypeError(
            f"base_activation: expected an instance, a function or a name, got the class {base_activation.__name__}"
        )
    if base_activation is None:
        return None
    if callable(base_activation):
        activation: Callable[[Tensor], Tensor] = base_activation
        return activation
    return _check_name("base_activation", base_activation, ACTIVATIONS[1:])
