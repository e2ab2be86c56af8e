"""What the checks of several processes share: the network, its data, and the table of checks."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kan_fast import KAN

ROWS = 12
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def network(*dims, **options):
    torch.manual_seed(0)
    return KAN(dims or (5, 7, 2), dtype=torch.float64, **options)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, generator=generator).double(), torch.randn(ROWS, 2, generator=generator).double()


def mine(tensor):
    """This rank's rows, as many as the others'."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def by_layer(model):
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)
