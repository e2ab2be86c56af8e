"""What sample-based tools do where several processes train one model.

update_grid, adaptive_grid_refinement, edge_scores, node_scores, prune_kan, activation_regularization and train_kan take
the data of all ranks together, once torch.distributed has a process group: every rank must call them, with data of its own,
and each gets the same result. Inside `with on_this_rank():` they look at this rank's data alone, and wait for nobody.
Plots and symbolic extraction never look at other ranks.

They work on models under fully_shard if every layer is a group of its own, except that a sharded weight keeps its shape
(refine before) and pruning masks edges (branch="both"). Tensor-parallel layers, whose knots are sharded, are refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone: ContextVar[bool] = ContextVar("kan_fast_on_this_rank", default=False)


def world_size() -> int:
    """Number of ranks whose data count: 1 without a process group, and inside on_this_rank."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """This process's rank, 0 where world_size() is 1."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def on_this_rank() -> Iterator[None]:
    """Tools called inside do not wait for other ranks."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over ranks, the same bits on each of them: any shape -> the same.

    Differentiable: the gradient is summed over ranks too. A loss that every rank computes from the sum has, after
    DistributedDataParallel's or fully_shard's mean over ranks, the gradient that one process with all data would have.
    """
    if world_size() == 1:
        return tensor
    result: Tensor = _Sum.apply(tensor)
    return result


def rows_of_all_ranks(x: Tensor) -> Tensor:
    """x (N, ...) of every rank, N its own, one after the other: (sum of N, ...), the same on every rank."""
    size = world_size()
    if size == 1:
        return x
    counts = [0] * size
    dist.all_gather_object(counts, len(x))
    parts = [x.new_zeros(max(counts), *x.shape[1:]) for _ in counts]
    padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def states_of_all_ranks(state: Any) -> list[Any]:
    """A picklable object of every rank, in the order of the ranks."""
    states = [state] * world_size()
    if len(states) > 1:
        dist.all_gather_object(states, state)
    return states


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over ranks in full on each of them; a plain one as it is."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has in full, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient)
