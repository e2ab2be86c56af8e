"""What every rank runs under torchrun: each check trains or measures with all ranks, and again as one process would.

Run: torchrun --nproc-per-node N distributed_worker.py FOLDER CHECK...; rank 0 writes FOLDER/CHECK.pt, a list of pairs of
tensors (by the ranks together, by one process).
"""

import copy
import itertools
import os
import sys
from pathlib import Path

import distributed_training  # noqa: F401  its checks enter the table
import pytest
import torch
import torch.distributed as dist
from distributed_common import CHECKS, ROWS, by_layer, check, data, mine, network, whole
from samples import OPERATIONS, make_problem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from kan_fast import (
    activation_regularization,
    adaptive_grid_refinement,
    edge_scores,
    node_scores,
    ops,
    prune_kan,
    train_kan,
    update_grid,
)
from kan_fast.checkpoints import load_model_state
from kan_fast.parallel import ShardInputs, ShardOutputs, parallelize_kan
from kan_fast.ranks import on_this_rank, rows_of_all_ranks


def train(model, x, y, penalty=None):
    """Losses of five steps, and the parameters after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        if penalty is None:
            total = loss = (model(x) - y).square().mean()
        else:
            output, size = activation_regularization(model, x, *penalty, return_output=True)
            loss = (output - y).square().mean()
            total = loss + size
        total.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), *map(whole, model.parameters())


def mean_of_ranks(losses):
    dist.all_reduce(losses)
    return losses / dist.get_world_size()


def data_parallel(wrap, penalty=None, **options):
    """Each rank has its rows; the mean of the ranks' losses is the loss of all rows."""
    x, y = data()
    model = network(**options)
    with on_this_rank():
        want = train(copy.deepcopy(model), x, y, penalty)
    losses, *parameters = train(wrap(model), mine(x), mine(y), penalty)
    return list(zip((mean_of_ranks(losses), *parameters), want, strict=True))


@check
def ddp():
    return data_parallel(DistributedDataParallel, bias=True)


@check
def fsdp():
    return data_parallel(by_layer, bias=True)


@check
def fsdp_of_the_whole_model():
    return data_parallel(fully_shard, outside="linear")


@check
def penalty_of_all_rows():
    return data_parallel(DistributedDataParallel, penalty=(0.1, 0.3))


@check
def penalty_of_all_rows_under_fsdp():
    return data_parallel(by_layer, penalty=(0.1, 0.3))


def with_sharded_weights(tool):
    """A tool on a model under fully_shard, after some training, against the same on a plain one; then more training."""
    x, y = data()
    pairs = []
    model, alone = by_layer(network(bias=True)), network(bias=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, alone)]

    def step(m, optimizer, x, y):
        optimizer.zero_grad()
        (m(x) - y).square().mean().backward()
        optimizer.step()

    for _ in range(2):
        for _ in range(3):
            step(model, optimizers[0], mine(x), mine(y))
            step(alone, optimizers[1], x, y)
        got = tool(model, mine(x), optimizers[0])
        with on_this_rank():
            want = tool(alone, x, optimizers[1])
        pairs += zip(got, want, strict=True)
    step(model, optimizers[0], mine(x), mine(y))
    step(alone, optimizers[1], x, y)
    state = {name: whole(value) for name, value in model.state_dict().items() if value is not None}
    return pairs + [(state[name], value) for name, value in alone.state_dict().items()]


@check
def update_grid_under_fsdp():
    return with_sharded_weights(lambda m, x, optimizer: [torch.tensor(update_grid(m, x, grid_eps=0.3, optimizer=optimizer))])


@check
def pruning_under_fsdp():
    return with_sharded_weights(
        lambda m, x, _: [
            *edge_scores(m, x).values(),
            *edge_scores(m).values(),
            *prune_kan(m, 0.3, data=x, relative=True).scores.values(),
        ]
    )


@check
def what_sharded_models_refuse():
    model = by_layer(network())
    x, _ = data()
    with pytest.raises(ValueError, match="^model: expected plain weights, whose shape can change"):
        adaptive_grid_refinement(model, x)
    with pytest.raises(ValueError, match="^branch: expected 'both' for sharded weights"):
        prune_kan(model, 0.3, data=x, branch="spline")
    with pytest.raises(ValueError, match=r"^model: layers.0.spline_weight is sharded .* has \(5, 10, 7\)"):
        load_model_state(model, network(grid_size=7).state_dict())
    with pytest.raises(ValueError, match="^optimizer: expected one that takes sharded parameters, got L-BFGS"):
        train_kan(model, [data()], epochs=1, optimizer="lbfgs")
    parallel = parallelize_kan(network(), init_device_mesh("cpu", (dist.get_world_size(),)))
    for tool in (update_grid, edge_scores):
        with pytest.raises(ValueError, match="^model: expected layers with all of their inputs and outputs"):
            tool(parallel, x)
    return [(torch.tensor(0), torch.tensor(0))]


def tensor_parallel(*dims, **options):
    """Every rank has all rows; losses, parameters, and the first two derivatives by x are those of one process."""
    model = network(*dims, **options)
    x, y = data()
    y = y[:, : model.layer_dims[-1]]
    sharded = parallelize_kan(copy.deepcopy(model), init_device_mesh("cpu", (dist.get_world_size(),)))
    return list(
        zip((*derivatives(sharded, x), *train(sharded, x, y)), (*derivatives(model, x), *train(model, x, y)), strict=True)
    )


def derivatives(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return y.detach(), first.detach(), second


@check
def every_sharding_of_every_contraction():
    """Whatever way the arguments lie, the result is right."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    pairs = []
    for operation in OPERATIONS:
        problem = make_problem(shape=(6, 5, 4), outside="linear")
        contraction = getattr(ops, operation)
        for with_scale, n in ((True, 1), (False, 0)):
            args = problem.args(operation, n, with_scale)
            want = as_tuple(contraction(*args, "reference"))
            *splittable, last = [place for place, value in enumerate(args) if isinstance(value, torch.Tensor)]
            assert args[last] is problem.grid
            for placements in itertools.product((Replicate(), Shard(0), Shard(1)), repeat=len(splittable)):
                split = list(args)
                for place, placement in zip((*splittable, last), (*placements, Replicate()), strict=True):
                    split[place] = distribute_tensor(args[place], mesh, [placement])
                got = as_tuple(contraction(*split, "reference"))
                pairs += zip(map(whole, got), want, strict=True)
    return pairs


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@check
def tensor_parallel_pair():
    return tensor_parallel(5, 7, 2, bias=True)


@check
def tensor_parallel_odd():
    return tensor_parallel(5, 7, 6, 2, outside="linear")


@check
def tensor_parallel_of_one_layer():
    return tensor_parallel(5, 2)


@check
def tensor_parallel_refuses_narrow_layers():
    ranks = dist.get_world_size()
    with pytest.raises(ValueError, match=rf"^model: expected widths of at least the {ranks} ranks .* got 5 -> 1 in layer 0"):
        tensor_parallel(5, 1, 2)
    return [(torch.tensor(ranks), torch.tensor(ranks))]


@check
def tensor_parallel_without_base():
    return tensor_parallel(5, 7, 2, base_activation=None)


@check
def tensor_parallel_of_any_activation():
    return tensor_parallel(5, 7, 2, base_activation=torch.sin)


@check
def tensor_parallel_pruned():
    model = network(bias=True)
    for layer in model.layers:
        layer.edge_mask = torch.rand(layer.in_features, layer.out_features) > 0.3
    x, y = data()
    sharded = parallelize_kan(copy.deepcopy(model), init_device_mesh("cpu", (dist.get_world_size(),)))
    return list(zip(train(sharded, x, y), train(model, x, y), strict=True))


@check
def what_tensor_parallelism_costs():
    """A pair of layers: one sum forward, one backward, and every rank holds its share of the weights."""
    ranks = dist.get_world_size()
    model = network(ranks * 2, ranks * 3, 2)
    total = sum(p.numel() for p in model.parameters())
    parallelize_kan(model, init_device_mesh("cpu", (ranks,)))
    x = torch.randn(ROWS, ranks * 2).double().requires_grad_()
    with CommDebugMode() as counts:
        model(x).sum().backward()
    here = sum(p.to_local().numel() for p in model.parameters())
    calls = {str(name): calls for name, calls in counts.get_comm_counts().items()}
    assert calls == {"c10d_functional.all_reduce": 2}, calls
    return [(torch.tensor(here * ranks), torch.tensor(total))]


@check
def styles_gather_what_is_asked_for():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, _ = data()
    pairs = []
    for style in (ShardOutputs, ShardInputs):
        layer = network(5, 6, bias=True).layers[0]
        want = layer(x)
        sharded = torch.distributed.tensor.parallel.parallelize_module(
            copy.deepcopy(layer), mesh, style(use_local_output=False)
        )
        rows = x if style is ShardOutputs else distribute_tensor(x, mesh, [Shard(1)])
        got = sharded(rows)
        assert isinstance(got, DTensor)
        pairs.append((whole(got), want.detach()))
    return pairs


@check
def data_and_tensor_parallel():
    """A mesh of two dimensions; needs four ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = network(bias=True)
    x, y = data()
    want = train(copy.deepcopy(model), x, y)
    parallelize_kan(model, mesh["tensor"])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    part = mesh.get_local_rank("data")
    losses, *parameters = train(model, x.chunk(2)[part], y.chunk(2)[part])
    return list(zip((mean_of_ranks(losses), *parameters), want, strict=True))


def with_tool(tool):
    """A tool on this rank's rows of data that are not spread evenly, against the tool on all rows."""
    x, _ = data()
    sizes = [ROWS - 3 * (dist.get_world_size() - 1)] + [3] * (dist.get_world_size() - 1)
    rows = x.split(sizes)[dist.get_rank()]
    assert torch.equal(rows_of_all_ranks(rows), x)
    model = network(bias=True)
    alone = copy.deepcopy(model)
    got = tool(model, [rows[:2], rows[2:]])
    with on_this_rank():
        want = tool(alone, x)
    pairs = list(zip(got, want, strict=True))
    return pairs + list(zip(model.state_dict().values(), alone.state_dict().values(), strict=True))


@check
def update_grid_on_all_rows():
    return with_tool(lambda model, x: [torch.tensor(update_grid(model, x, grid_eps=0.3), dtype=torch.float64)])


@check
def refinement_on_all_rows():
    return with_tool(lambda model, x: [torch.tensor(adaptive_grid_refinement(model, x))])


@check
def scores_on_all_rows():
    return with_tool(
        lambda model, x: [
            *edge_scores(model, x).values(),
            *edge_scores(model, x, "attribution").values(),
            *node_scores(model, x),
        ]
    )


@check
def pruning_on_all_rows():
    return with_tool(lambda model, x: list(prune_kan(model, 0.3, data=x, relative=True).removed.values()))


def main():
    folder, *names = sys.argv[1:]
    dist.init_process_group("gloo")
    for name in names:
        pairs = CHECKS[name]()
        # Ranks agree to the last bit, so each of them may be asked.
        for got, _ in pairs:
            others = [torch.empty_like(got) for _ in range(dist.get_world_size())]
            dist.all_gather(others, got.contiguous())
            assert all(torch.equal(other, got) for other in others), f"{name}: ranks differ"
        if dist.get_rank() == 0:
            torch.save(pairs, Path(folder) / f"{name}.pt")
    dist.barrier()  # a rank that leaves early takes gloo's threads from the others
    dist.destroy_process_group()
    # DTensor's caches keep meshes, and these their groups: gloo's threads outlive the line above, and one that lets go of a
    # tensor while the interpreter is taken down aborts the process (pytorch pull request 179291). So it is not taken down.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
