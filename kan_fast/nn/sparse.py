"""Sparse layers: KANs with many inputs, where an output hears a few of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kan_fast import spline
from kan_fast.activations import activation
from kan_fast.autocast import autocast_dtype
from kan_fast.checks import DTYPES, check_int, check_layout, check_number, check_plain, expect
from kan_fast.edges import Edges, Features, edge_list, edge_output
from kan_fast.functional import BaseActivation
from kan_fast.nn import init
from kan_fast.nn.knots import KnotsStayWide
from kan_fast.nn.layer import KANLayer

_INDEX = ("_used", "_place", "_per_output", "_by_input", "_per_used")
_EDGES = ("edges", *_INDEX)


class SparseKANLayer(KnotsStayWide):
    """A KANLayer that has some of its edges only, and stores and computes no others.

    forward: (..., in_features) -> (..., out_features), the formula of KANLayer summed over the edges there are. Time and
    memory follow the number of edges E; kan_fast/edges.py says how.

    Either fan_in, the number of distinct inputs that every output hears, drawn at random; or edges, (2, E) int64, pairs of
    input and output in any order, or (in, out) of bool. The rest as for KANLayer, without `backend`.

    Parameters: spline_weight (E, grid_size + spline_order), base_weight (E,) unless base_activation is None, bias (out)
    with bias=True. Buffers: edges (2, E) int64, sorted by output, then input; grid (in, grid_size + 2 * spline_order + 1).
    Differentiable to any order; the results and gradients are the same bits on every run.

    Raises ValueError or TypeError for arguments out of bounds.
    """

    spline_weight: nn.Parameter
    base_weight: nn.Parameter | None
    bias: nn.Parameter | None
    grid: Tensor
    edges: Tensor
    _used: Tensor
    _place: Tensor
    _per_output: Tensor
    _by_input: Tensor
    _per_used: Tensor
    _numbers: dict[str, Tensor]  # of the edges while they are on the device "meta"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fan_in: int | None = None,
        *,
        edges: Tensor | None = None,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        base_activation: BaseActivation = "silu",
        bias: bool = False,
        outside: str = "zero",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # A layer of one edge checks the arguments that both kinds of layer have, and has the knots.
        shared: dict[str, Any] = {"grid_range": grid_range, "base_activation": base_activation, "outside": outside}
        like = KANLayer(1, 1, grid_size, spline_order, **shared, device=device, dtype=dtype)
        self.in_features = check_int("in_features", in_features, 0)
        self.out_features = check_int("out_features", out_features, 0)
        self.spline_order, self.grid_range, self.outside = like.spline_order, like.grid_range, like.outside
        self.base_activation = like.base_activation
        expect(edges is None or isinstance(edges, Tensor), "edges", "a tensor or None", edges)
        if (fan_in is None) == (edges is None):
            raise TypeError(f"fan_in: expected either fan_in or edges, got fan_in = {fan_in} and edges {_shown(edges)}")
        if edges is None:
            assert fan_in is not None
            edges = random_edges(in_features, out_features, fan_in)
        pairs = _sorted_pairs(edges, in_features, out_features)
        options: dict[str, Any] = {"device": like.grid.device, "dtype": like.spline_weight.dtype}
        num_edges = pairs.shape[1]
        self.spline_weight = nn.Parameter(torch.empty(num_edges, like.spline_weight.shape[1], **options))
        base_weight = None if base_activation is None else nn.Parameter(torch.empty(num_edges, **options))
        self.register_parameter("base_weight", base_weight)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None)
        self.register_buffer("grid", like.grid.repeat(in_features, 1))
        self.register_buffer("edges", pairs)
        self._index_edges()
        self._place_edges({name: getattr(self, name) for name in _EDGES}, self.grid.device)
        self.reset_parameters()

    @property
    def grid_size(self) -> int:
        """Number of intervals G on the range of the grid."""
        return self.spline_weight.shape[1] - self.spline_order

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform knots on `grid_range`, weights that keep the signal's variance, bias zero.

        KANLayer's rule (nn/init.py) with the number of edges that an output has in place of in_features. The edges stay, and
        have stayed where to_empty took the numbers of parameters. Raises ValueError for parametrized weights.
        """
        check_plain(self)
        if self.grid.is_meta:
            return
        k = self.spline_order
        grid = spline.uniform_grid(1, self.grid_size, k, self.grid_range, self.grid.device, self.grid.dtype)
        self.grid.copy_(grid.expand_as(self.grid))
        x = init.nodes(grid, k)
        name = self.base_activation
        base = None if name is None else activation(name, x, 0) if isinstance(name, str) else name(x)
        spline_std, base_std = init.standard_deviations(x, base, grid, k, self.outside)
        edges = self.edge_list()
        share = edges.per_output[edges.outputs].to(grid.dtype).rsqrt()
        self.spline_weight.normal_().mul_(spline_std * share[:, None])
        if self.base_weight is not None:
            self.base_weight.normal_().mul_(base_std * share)
        if self.bias is not None:
            self.bias.zero_()

    def edge_list(self) -> Edges:
        """The edges with what the contractions need to know of them."""
        return Edges(self._used, self._place, self.edges[1], self._per_output, self._by_input, self._per_used)

    def masked_weights(self) -> tuple[Tensor, Tensor | None]:
        """spline_weight (E, G + k) and base_weight (E,) or None, as KANLayer has them: no edge is masked."""
        return self.spline_weight, self.base_weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)"""
        expect(isinstance(x, Tensor), "x", "a tensor", x)
        check_layout("x", x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: expected shape (..., in_features) with in_features = {self.in_features}, got {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
        if (x.dtype == torch.float64) != (self.spline_weight.dtype == torch.float64):
            raise TypeError(f"x: float64 goes only with float64, got x of {x.dtype} and weights of {self.spline_weight.dtype}")
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
        edges = self.edge_list()
        dtype = autocast_dtype(x, self.spline_weight)
        weight: Tensor = self.spline_weight.to(dtype)
        base, bias = (None if given is None else given.to(dtype) for given in (self.base_weight, self.bias))
        function = self.base_activation
        fused = isinstance(function, str)
        features = Features(function if isinstance(function, str) else "none", self.grid, self.spline_order, self.outside)
        if fused and base is not None:
            weight = torch.cat([base[:, None], weight], 1)
        y = edge_output(rows, None, weight, edges, features)
        if not fused and base is not None:
            assert callable(function)
            y = y + edge_output(function(rows), None, base[:, None], edges, Features("identity", None, 0, self.outside))
        y = y.view(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias

    @classmethod
    @torch.no_grad()
    def from_dense(cls, layer: KANLayer) -> "SparseKANLayer":
        """The same function as a KANLayer's, with the edges that its edge_mask leaves (all of them without one).

        Raises ValueError for parametrized weights, which the new layer would not have.
        """
        check_plain(layer)
        mask = layer.edge_mask
        if mask is None:
            mask = torch.ones(layer.in_features, layer.out_features, dtype=torch.bool, device=layer.grid.device)
        sparse = cls(layer.in_features, layer.out_features, edges=mask, **_options(layer))
        inputs, outputs = sparse.edges
        sparse.spline_weight.copy_(layer.spline_weight[inputs, :, outputs])
        for mine, theirs in ((sparse.base_weight, layer.base_weight), (sparse.bias, layer.bias)):
            if mine is not None and theirs is not None:
                mine.copy_(theirs[inputs, outputs] if mine is sparse.base_weight else theirs)
        sparse.grid = layer.grid.clone()
        return sparse.train(layer.training)

    @torch.no_grad()
    def to_dense(self) -> KANLayer:
        """The same function as a KANLayer, whose edge_mask says which edges there are.

        Raises ValueError for parametrized weights, which the new layer would not have.
        """
        check_plain(self)
        layer = KANLayer(self.in_features, self.out_features, **_options(self))
        inputs, outputs = self.edges
        layer.spline_weight.zero_()
        layer.spline_weight[inputs, :, outputs] = self.spline_weight
        if layer.base_weight is not None and self.base_weight is not None:
            layer.base_weight.zero_()
            layer.base_weight[inputs, outputs] = self.base_weight
        if layer.bias is not None and self.bias is not None:
            layer.bias.copy_(self.bias)
        layer.grid = self.grid.clone()
        mask = torch.zeros(self.in_features, self.out_features, dtype=torch.bool, device=self.grid.device)
        mask[inputs, outputs] = True
        layer.edge_mask = None if bool(mask.all()) else mask
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, edges={self.edges.shape[1]},"
            f" grid_size={self.grid_size}, spline_order={self.spline_order}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseKANLayer":
        """Casts and moves, except that edges, which are no parameters to set anew, outlast "meta" and to_empty."""
        known = self._numbers or {name: getattr(self, name) for name in _EDGES}
        super()._apply(fn, recurse)
        self._place_edges(known, self.edges.device)
        return self

    def _place_edges(self, known: dict[str, Tensor], device: torch.device) -> None:
        for name, value in known.items():
            setattr(self, name, value.to(device))
        self._numbers = {name: value.cpu() for name, value in known.items()} if device.type == "meta" else {}

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
        """The edges come with the checkpoint, of the same number; with another one an error says what to do."""
        pairs = state_dict.get(prefix + "edges")
        if pairs is not None:
            if pairs.shape != self.edges.shape:
                error_msgs.append(
                    f"{prefix}edges: the checkpoint has edges of shape {tuple(pairs.shape)}, the layer has"
                    f" {self.edges.shape[1]} of them; make it with SparseKANLayer(..., edges=state_dict[{prefix + 'edges'!r}])"
                )
                return
            if not pairs.is_meta and not torch.equal(pairs, _sorted_pairs(pairs, self.in_features, self.out_features)):
                error_msgs.append(f"{prefix}edges: expected pairs sorted by output, then input")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if pairs is not None and not self.edges.is_meta:
            self._index_edges()
            self._numbers = {}

    def _index_edges(self) -> None:
        """What follows from `edges`, in buffers, so that it moves with the layer and tracers see tensors."""
        known = edge_list(self.edges, self.in_features, self.out_features)
        for name in _INDEX:
            self.register_buffer(name, getattr(known, name[1:]), persistent=False)


def sparsify(model: nn.Module, max_density: float = 0.25) -> list[str]:
    """Put SparseKANLayers, in place, where a KANLayer's edge_mask leaves at most that share of the edges.

    model: any module that holds KANLayers, after prune_kan. Returns the names of the layers; the function stays the same, and
    a layer that stands in several places, named by the first, is one layer in all of them again.
    Parameters are new: make the optimiser afterwards. layer.to_dense() goes back. Raises ValueError for parametrized weights.
    """
    expect(isinstance(model, nn.Module), "model", "a module", model)
    check_number("max_density", max_density)
    if not 0 <= max_density <= 1:
        raise ValueError(f"max_density: expected a number from 0 to 1, got {max_density}")
    names: dict[KANLayer, str] = {}
    for name, layer in model.named_modules():
        if name and isinstance(layer, KANLayer) and layer.edge_mask is not None:
            if float(layer.edge_mask.double().mean()) <= max_density:
                check_plain(layer, name)
                names[layer] = name
    successors: dict[nn.Module, SparseKANLayer] = {layer: SparseKANLayer.from_dense(layer) for layer in names}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if name and layer in successors:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, successors[layer])
    return list(names.values())


def random_edges(in_features: int, out_features: int, fan_in: int) -> Tensor:
    """`fan_in` distinct inputs for every output, each set as likely as any other: (2, out_features * fan_in) int64.

    Memory out_features * fan_in, whatever in_features is: R. Floyd, in J. Bentley, "Programming Pearls", CACM 30(9), 1987.
    """
    fan_in = check_int("fan_in", fan_in, 0)
    if not 1 <= fan_in <= in_features:
        raise ValueError(f"fan_in: expected 1 to in_features = {in_features}, got {fan_in}")
    on_cpu: dict[str, Any] = {"dtype": torch.long, "device": "cpu"}
    taken = torch.empty(out_features, 0, **on_cpu)
    for last in range(in_features - fan_in, in_features):
        drawn = torch.randint(0, last + 1, (out_features, 1), **on_cpu)
        repeated = (taken == drawn).any(1, keepdim=True)
        taken = torch.cat([taken, torch.where(repeated, last, drawn)], 1)
    outputs = torch.arange(out_features, **on_cpu)[:, None].expand_as(taken)
    return torch.stack([taken.flatten(), outputs.flatten()])


def _options(layer: "KANLayer | SparseKANLayer") -> dict[str, Any]:
    """The arguments that both kinds of layer take by name, as `layer` has them."""
    return {
        "grid_size": layer.grid_size,
        "spline_order": layer.spline_order,
        "grid_range": layer.grid_range,
        "base_activation": layer.base_activation,
        "bias": layer.bias is not None,
        "outside": layer.outside,
        "device": layer.grid.device,
        "dtype": layer.spline_weight.dtype,
    }


def _sorted_pairs(edges: Tensor, in_features: int, out_features: int) -> Tensor:
    """(2, E) int64 sorted by output, then input; from such pairs in any order, or from (in, out) of bool."""
    if edges.dtype == torch.bool:
        if edges.shape != (in_features, out_features):
            raise ValueError(f"edges: expected bool of shape (in_features, out_features) = {(in_features, out_features)},"
                             f" got {tuple(edges.shape)}")  # fmt: skip
        return edges.t().nonzero().t().flip(0).contiguous()
    if edges.dtype != torch.long or edges.dim() != 2 or edges.shape[0] != 2:
        raise ValueError(f"edges: expected (2, E) of int64 or (in_features, out_features) of bool, got {_shown(edges)}")
    inputs, outputs = edges
    for name, index, size in (("input", inputs, in_features), ("output", outputs, out_features)):
        if edges.shape[1] and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(f"edges: expected {name}s from 0 to {size - 1}, got {int(index.min())} to {int(index.max())}")
    key = (outputs * in_features + inputs).sort().values
    if bool((key.diff() == 0).any()):
        raise ValueError("edges: expected every pair once, got one twice")
    return torch.stack([key % in_features, key // in_features])


def _shown(edges: Tensor | None) -> str:
    return "None" if edges is None else f"of shape {tuple(edges.shape)} and {edges.dtype}"
