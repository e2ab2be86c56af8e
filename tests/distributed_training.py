"""train_kan in several processes, for distributed_worker.py: losses, failures, checkpoints."""

import copy
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_common import ROWS, by_layer, check, data, mine, network, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from kan_fast import train_kan
from kan_fast.parallel import parallelize_kan
from kan_fast.ranks import on_this_rank


@check
def failure_of_one_rank():
    """NaN in the data of one rank ends the training of all, with the best weights back."""
    x, y = (mine(tensor).clone() for tensor in data())
    if dist.get_rank() == 1:
        x[0, 0] = torch.nan
    model = network()
    message = "the batch's data hold NaN" if dist.get_rank() == 1 else "on another rank"
    with pytest.raises(FloatingPointError, match=message):
        train_kan(DistributedDataParallel(model), [(x, y)], epochs=2, progress=False)
    return list(zip(model.state_dict().values(), network().state_dict().values(), strict=True))


@check
def training_loop():
    """train_kan with a penalty, grid updates and a plateau: every rank sees the losses of all rows."""
    x, y = data()
    options = {"epochs": 6, "lr": 2e-2, "activation_l1": 0.01, "activation_entropy": 0.02, "progress": False}
    options |= {"grid_update_every": 2, "grid_update_until": 4, "scheduler": functools.partial(ReduceLROnPlateau, patience=0)}
    model = network()
    with on_this_rank():
        want = copy.deepcopy(model)
        alone = train_kan(want, [(x, y)], [(x, y)], **options)
    loader = DataLoader(TensorDataset(mine(x), mine(y)), batch_size=ROWS)
    together = train_kan(DistributedDataParallel(model), loader, [(mine(x), mine(y))], **options)
    pairs = [
        (torch.tensor(getattr(together, name)), torch.tensor(getattr(alone, name)))
        for name in ("train_losses", "val_losses", "penalties", "learning_rates")
    ]
    return pairs + list(zip(model.state_dict().values(), want.state_dict().values(), strict=True))


def interrupted(wrap, rows=mine, **options):
    """Six epochs of train_kan, against two, two more by a new model, and two more by each rank alone with all rows."""
    options = {"lr": 2e-2, "progress": False, **options}
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    x, y = data()

    def run(model, rows, epochs, folder=None, resume=False):
        history = train_kan(model, [(rows(x), rows(y))], epochs=epochs, checkpoint_dir=folder, resume=resume, **options)
        dist.barrier()  # no rank goes on before rank 0 has written
        return [torch.tensor(history.train_losses), *map(whole, model.parameters()), *map(whole, model.buffers())]

    want = run(wrap(network(bias=True)), rows, 6)
    run(wrap(network(bias=True)), rows, 2, folders[0])
    four = run(wrap(network(bias=True)), rows, 4, folders[0], resume=True)
    own = shutil.copytree(folders[0], tempfile.mkdtemp(), dirs_exist_ok=True)
    with on_this_rank():
        six = run(network(bias=True), lambda tensor: tensor, 6, own, resume=True)
    network(bias=True).load_state_dict(torch.load(Path(folders[0]) / "best.pt", weights_only=True))
    back = run(wrap(network(bias=True)), rows, 4, folders[0], resume=True)  # nothing more to do: what was written
    return [*zip(six, want, strict=True), *zip(back, four, strict=True), (four[0], want[0][:4])]


@check
def checkpoints_of_ddp():
    return interrupted(DistributedDataParallel)


@check
def lbfgs():
    """Two iterations an epoch, far from the end of the search."""
    optimizer = functools.partial(torch.optim.LBFGS, max_iter=2, line_search_fn="strong_wolfe")
    return interrupted(DistributedDataParallel, optimizer=optimizer)


@check
def checkpoints_under_fsdp():
    return interrupted(by_layer, grid_update_every=3)


@check
def checkpoints_of_tensor_parallel():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return interrupted(lambda model: parallelize_kan(model, mesh), rows=lambda tensor: tensor)


@check
def checkpoints_of_data_and_tensor_parallel():
    """A mesh of two dimensions; needs four ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def wrap(model):
        parallelize_kan(model, mesh["tensor"])
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])

    return interrupted(wrap, rows=lambda tensor: tensor.chunk(2)[mesh.get_local_rank("data")])
