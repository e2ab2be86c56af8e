"""Scores of edges and nodes, silencing the weak ones, and a smaller network of the same function."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kan_fast.checks import check_iterable, check_number, check_plain
from kan_fast.chunks import chunks
from kan_fast.nn import KAN, KANLayer
from kan_fast.ranks import sum_over_ranks
from kan_fast.spline import bases
from kan_fast.traverse import Data, kan_layers, network_layers, watch_inputs, whole_weights

METHODS = ("coefficient", "activation", "attribution")


@dataclass
class PruningReport:
    """What prune_kan did.

    removed: layer name -> (M, 2) int64, the (input, output) pairs that were silenced by this call.
    remaining: layer name -> number of edges still alive. scores: layer name -> (in, out), those that were compared.
    unused_inputs: names of the model's inputs that no longer reach any output; used_inputs: of the others.
    dead_nodes: name of each layer after the first -> its inputs that carry nothing from input to output.
    """

    removed: dict[str, Tensor]
    remaining: dict[str, int]
    scores: dict[str, Tensor]
    unused_inputs: list[str] = field(default_factory=list)
    used_inputs: list[str] = field(default_factory=list)
    dead_nodes: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = (f"{name}: {len(edges)} edges removed, {self.remaining[name]} left" for name, edges in self.removed.items())
        return "; ".join([*counts, f"unused inputs: {', '.join(self.unused_inputs) or 'none'}"])


@torch.no_grad()
def edge_scores(
    model: nn.Module, data: Data | None = None, method: str | None = None, *, include_base: bool = True
) -> dict[str, Tensor]:
    """How much every edge matters: layer name -> (in, out), float64, 0 for masked edges.

    model: any module with KANLayers. data: inputs (N, ...), or an iterable of inputs or (input, ...) tuples; of all ranks.
    method, by default "activation" with data and "coefficient" without:
    "coefficient": sqrt(mean c^2 + w^2) of an edge's spline coefficients c and its base weight w.
    "activation": root mean square of the edge's values on the data that reach its layer.
    "attribution": what an edge gives to the outputs: backwards from score 1 at each output, an edge has the score of the node
    it leads to times std(edge) / std(node), and a node the sum over the edges that leave it. For a KAN only.
    (Z. Liu et al., "KAN 2.0", arXiv 2408.10205, section 4.)
    include_base=False scores the splines alone.

    Moments of an edge come from the second moments of its layer's bases, (in, bases, bases) numbers: no (samples, in, out)
    tensor is built.
    """
    method = method or ("coefficient" if data is None else "activation")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    layers = kan_layers(model)
    if method == "coefficient":
        return {name: _coefficient_norm(layer, include_base) for name, layer in layers.items()}
    if data is None:
        raise ValueError(f"data: needed for method {method!r}, got None")
    moments = _Moments(layers)
    watch_inputs(model, data, layers.values(), moments.add)
    moments.reduce()
    if method == "activation":
        return {name: moments.edge_moments(layer, include_base)[1].sqrt() for name, layer in layers.items()}
    return _attribution(model, layers, moments, include_base)


@torch.no_grad()
def node_scores(model: KAN, data: Data) -> list[Tensor]:
    """Attribution of every node: for each layer the scores (in,) of its inputs, float64; the first entry scores the inputs.

    model: a KAN. data: inputs (N, in), or an iterable of inputs or (input, ...) tuples. See edge_scores, "attribution".
    """
    return [score.sum(1) for score in edge_scores(model, data, "attribution").values()]


@torch.no_grad()
def prune_kan(
    model: nn.Module,
    threshold: float = 1e-2,
    *,
    data: Data | None = None,
    method: str | None = None,
    relative: bool = False,
    branch: str = "both",
    node_threshold: float | None = None,
    input_names: Sequence[str] | None = None,
) -> PruningReport:
    """Silence, in place, the edges whose score lies below `threshold`.

    model: any module with KANLayers. data, method: see edge_scores; scores count spline and base branch together.
    relative: compare the score over the highest one of its layer. node_threshold: also silence every edge into and out of the
    hidden nodes whose attribution on `data` lies below it (a KAN only).
    branch "both": the edge goes into the layer's edge_mask and stays zero through training and checkpoints.
    branch "spline": scores count, and the call sets to zero, the spline coefficients alone; they are not masked.
    input_names: names for the report, x_0, x_1, ... by default.

    Raises ValueError when a layer would lose all its edges, and with branch "spline" for parametrized spline weights.
    """
    if branch not in ("both", "spline"):
        raise ValueError(f"branch: expected 'both' or 'spline', got {branch!r}")
    check_number("threshold", threshold, 0)
    if node_threshold is not None:
        check_number("node_threshold", node_threshold)
    if input_names is not None:
        check_iterable("input_names", input_names, "names")
    layers = kan_layers(model)
    if branch == "spline":
        for name, layer in layers.items():
            check_plain(layer, name, ("spline_weight",))
    scores = edge_scores(model, data, method, include_base=branch == "both")
    weak = {}
    for name, score in scores.items():
        limit = threshold * score.max() if relative else threshold
        weak[name] = score < limit
    if node_threshold is not None:
        if not isinstance(model, KAN) or data is None:
            raise ValueError("node_threshold: needs a KAN and data, to attribute the outputs to its hidden nodes")
        names = list(layers)
        for place, node_score in enumerate(node_scores(model, data)[1:], 1):
            weak[names[place]] |= (node_score < node_threshold)[:, None]
            weak[names[place - 1]] |= (node_score < node_threshold)[None, :]
    removed = {}
    for name, layer in layers.items():
        alive = _alive(layer)
        if branch == "both" and bool((weak[name] | ~alive).all()):
            raise ValueError(
                f"threshold: {threshold:g} would silence every edge of layer {name!r}, whose highest score is"
                f" {float(scores[name].max()):.3g}"
            )
        removed[name] = (weak[name] & alive).nonzero()
    for name, layer in layers.items():
        if branch == "spline":
            if hasattr(layer.spline_weight, "full_tensor"):
                raise ValueError("branch: expected 'both' for sharded weights, got 'spline'")
            layer.spline_weight.masked_fill_(weak[name][:, None, :], 0)
        elif len(removed[name]) or layer.edge_mask is not None:
            mask = torch.ones_like(weak[name]) if layer.edge_mask is None else layer.edge_mask
            layer.edge_mask = mask & ~weak[name]
    remaining = {name: int(_alive(layer).sum()) for name, layer in layers.items()}
    report = PruningReport(removed, remaining, scores)
    if isinstance(model, KAN):
        used = _reachable(model)
        given = list(input_names) if input_names is not None else [f"x_{i}" for i in range(len(used[0]))]
        if len(given) != len(used[0]):
            raise ValueError(f"input_names: expected {len(used[0])} names, got {len(given)}")
        report.used_inputs = [name for name, kept in zip(given, used[0].tolist()) if kept]
        report.unused_inputs = [name for name, kept in zip(given, used[0].tolist()) if not kept]
        dead = ((~kept).nonzero()[:, 0].tolist() for kept in used[1:-1])
        report.dead_nodes = {f"layers.{place}": nodes for place, nodes in enumerate(dead, 1)}
    return report


@torch.no_grad()
def compact(model: KAN, drop_inputs: bool = False) -> KAN:
    """A new, smaller KAN that computes the same function: dead edges and nodes are gone.

    Inputs and outputs stay as they are. With drop_inputs the inputs that reach no output are gone too, and the result has
    the buffer `input_index` (used inputs,) int64: compact(model, True)(x[..., index]) equals model(x).
    A hidden node that nothing feeds is a constant; what its edges make of that constant goes into a bias of the next layer.
    Edges that are masked between nodes that stay remain masked.
    Raises ValueError for parametrized weights, which the new network would not have.
    """
    if not isinstance(model, KAN):
        raise TypeError(f"model: expected a KAN, got {type(model).__name__}")
    for place, layer in enumerate(network_layers(model)):
        check_plain(layer, f"layers.{place}")
    used = _reachable(model)
    keep = [torch.nonzero(u)[:, 0] for u in used]
    if not drop_inputs:
        keep[0] = torch.arange(len(used[0]), device=used[0].device)
    keep[-1] = torch.arange(len(used[-1]), device=used[-1].device)
    # A layer of width 0 would compute nothing: one dead node stays.
    keep = [index if len(index) else torch.zeros(1, dtype=torch.long, device=index.device) for index in keep]
    constant: Tensor | None = None  # the values of the layer's inputs if nothing fed them, (in,)
    layers = []
    for place, layer in enumerate(network_layers(model)):
        alive = _alive(layer)
        bias = _bias(layer)
        if constant is not None:
            fixed = ~_fed(model, place)
            rows = fixed.nonzero()[:, 0]
            values = layer.edge_values(constant.to(layer.spline_weight.dtype)[None])[0].double()
            bias = bias + values[rows].sum(0)
            alive = alive & ~fixed[:, None]
        smaller = _slice(layer, keep[place], keep[place + 1], alive, bias)
        layers.append(smaller)
        constant = bias
    result = KAN.from_layers(layers).train(model.training)
    if drop_inputs:
        result.register_buffer("input_index", keep[0])
    return result


def _coefficient_norm(layer: KANLayer, include_base: bool) -> Tensor:
    spline, base = whole_weights(layer)
    square = spline.double().square().mean(1)
    if include_base and base is not None:
        square = square + base.double().square()
    return square.sqrt()


class _Moments:
    """Running first and second moments of the features (base, bases) of every layer: the statistics of all edges."""

    def __init__(self, layers: dict[str, KANLayer]) -> None:
        self.count: dict[KANLayer, Tensor] = {}
        self.first: dict[KANLayer, Tensor] = {}
        self.second: dict[KANLayer, Tensor] = {}
        self.output_first: dict[KANLayer, Tensor] = {}
        self.output_second: dict[KANLayer, Tensor] = {}
        for layer in layers.values():
            num_features = layer.spline_weight.shape[1] + 1
            zeros = functools.partial(torch.zeros, dtype=torch.float64, device=layer.grid.device)
            self.count[layer] = zeros(())
            self.first[layer] = zeros(layer.in_features, num_features)
            self.second[layer] = zeros(layer.in_features, num_features, num_features)
            self.output_first[layer], self.output_second[layer] = zeros(layer.out_features), zeros(layer.out_features)

    def add(self, layer: KANLayer, x: Tensor) -> None:
        num_features = layer.spline_weight.shape[1] + 1
        for rows in chunks(len(x), layer.in_features * num_features):
            block = x[rows].double()
            spline = bases(block, layer.grid.double(), layer.spline_order, layer.outside, 0)
            base = torch.zeros_like(block) if layer.base_weight is None else layer._base(block, 0)
            features = torch.cat([base[..., None], spline], 2).transpose(0, 1)
            self.first[layer] += features.sum(1)
            self.second[layer] += features.mT @ features
            self.count[layer] += len(block)
            output = layer.forward(x[rows]).double()  # not layer(...), whose hook brought us here
            self.output_first[layer] += output.sum(0)
            self.output_second[layer] += output.square().sum(0)

    def reduce(self) -> None:
        """The sums over all ranks."""
        for sums in (self.count, self.first, self.second, self.output_first, self.output_second):
            for layer in sums:
                sums[layer] = sum_over_ranks(sums[layer])

    def output_spread(self, layer: KANLayer) -> Tensor:
        """Standard deviation of every output of a layer: (out,)."""
        mean, square = self.output_first[layer] / self.count[layer], self.output_second[layer] / self.count[layer]
        return (square - mean * mean).clamp(min=0).sqrt()

    def edge_moments(self, layer: KANLayer, include_base: bool = True) -> tuple[Tensor, Tensor]:
        """Mean and mean square of every edge: two (in, out) tensors."""
        count = self.count[layer]
        if not count:
            raise ValueError("data: expected at least one sample for every layer, got none")
        spline, base = whole_weights(layer)
        if base is None or not include_base:
            base = torch.zeros_like(spline[:, 0])
        weight = torch.cat([base[:, None], spline], 1).double()
        mean = (self.first[layer][..., None] * weight).sum(1) / count
        square = (weight * (self.second[layer] @ weight)).sum(1) / count
        return mean, square.clamp(min=0)


def _attribution(model: nn.Module, layers: dict[str, KANLayer], moments: "_Moments", include_base: bool) -> dict[str, Tensor]:
    if not isinstance(model, KAN):
        raise TypeError(f"model: expected a KAN for method 'attribution', got {type(model).__name__}")
    if len(layers) != len(model.layers):  # its edges have a score in each of its places
        raise ValueError("model: expected every layer in one place for method 'attribution', got one in several")
    result: dict[str, Tensor] = {}
    node: Tensor | None = None
    for name, layer in reversed(layers.items()):
        mean, square = moments.edge_moments(layer, include_base)
        spread = (square - mean * mean).clamp(min=0).sqrt()
        # A node that does not vary, or varies by the rounding of its edges only, has nothing to hand out.
        node_spread = moments.output_spread(layer)
        varies = node_spread > 1e-7 * spread.amax(0)
        share = torch.where(varies, spread / torch.where(varies, node_spread, 1), 0)
        result[name] = share if node is None else share * node
        node = result[name].sum(1)
    return {name: result[name] for name in layers}


def _bias(layer: KANLayer) -> Tensor:
    """(out,), float64; zeros where the layer has none."""
    weight = layer.spline_weight
    return weight.new_zeros(layer.out_features, dtype=torch.float64) if layer.bias is None else layer.bias.double()


def _alive(layer: KANLayer) -> Tensor:
    """(in, out) of bool: edges that are not identically zero."""
    spline, base = whole_weights(layer)
    alive = (spline != 0).any(1)
    return alive if base is None else alive | (base != 0)


def _fed(model: KAN, place: int) -> Tensor:
    """(in,) of bool: inputs of layer `place` that some input of the model reaches."""
    layers = network_layers(model)
    fed = torch.ones(layers[0].in_features, dtype=torch.bool, device=layers[0].grid.device)
    for layer in layers[:place]:
        fed = (_alive(layer) & fed[:, None]).any(0)
    return fed


def _reachable(model: KAN) -> list[Tensor]:
    """For every width of the model, (width,) of bool: nodes that lie on a living path from an input to an output."""
    layers = network_layers(model)
    fed = [_fed(model, place) for place in range(len(layers) + 1)]
    heard = torch.ones_like(fed[-1])
    used = [fed[-1]]
    for place in range(len(layers) - 1, -1, -1):
        heard = (_alive(layers[place]) & heard).any(1)
        used.insert(0, fed[place] & heard)
    return used


def _slice(layer: KANLayer, inputs: Tensor, outputs: Tensor, alive: Tensor, bias: Tensor) -> KANLayer:
    """The part of a layer between some of its inputs and outputs; edges not alive are zero and masked."""
    weight = layer.spline_weight
    alive = alive[inputs][:, outputs]
    bias = bias[outputs]
    smaller = KANLayer(
        len(inputs),
        len(outputs),
        layer.grid_size,
        layer.spline_order,
        grid_range=layer.grid_range,
        base_activation=layer.base_activation,
        bias=layer.bias is not None or bool((bias != 0).any()),
        outside=layer.outside,
        backend=layer.backend,
        device=weight.device,
        dtype=weight.dtype,
    )
    spline, base = layer.masked_weights()
    smaller.spline_weight.copy_(spline[inputs][:, :, outputs].masked_fill(~alive[:, None], 0))
    if base is not None and smaller.base_weight is not None:
        smaller.base_weight.copy_(base[inputs][:, outputs].masked_fill(~alive, 0))
    if smaller.bias is not None:
        smaller.bias.copy_(bias)
    smaller.grid = layer.grid[inputs].clone()
    smaller.edge_mask = None if bool(alive.all()) else alive
    smaller.spline_weight.requires_grad_(weight.requires_grad)
    return smaller
