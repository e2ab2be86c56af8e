"""A network twice, on the CPU by the reference and on a device by its preferred backend, and what it means that they agree."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from kan_fast import KAN, train_kan

# In float64 sums in another order differ by a few eps = 2.2e-16 of terms of order 1. Conditions of what is done with them
# (spreads of differences, refits with a ridge of 1e-4, divisions by small gradients in Adam) blow that up by 1e4 at most.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def data(rows=400, features=3, device="cpu", dtype=torch.float64):
    """Normal values, so that no two intervals of a grid hold equally many; y = sin(2 x_0) + x_1^2"""
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
    return x.to(device, dtype), (torch.sin(2 * x[:, :1]) + x[:, 1:2] ** 2).to(device, dtype)


def pair(device, dims=(3, 4, 2), **options):
    """The same network twice: the reference on the CPU, the preferred backend on the device."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64, **options}
    truth = KAN(dims, backend="reference", **options)
    model = KAN(dims, device=device, **options)
    model.load_state_dict(truth.state_dict())
    return truth, model


def close(ours, theirs, **tolerance):
    """Tensors on any device, numbers, and dicts and lists of them."""
    if isinstance(theirs, torch.Tensor):
        ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list | tuple):
        for mine, other in zip(ours, theirs, strict=True):
            close(mine, other, **tolerance)
    else:
        torch.testing.assert_close(ours, theirs, **(tolerance or CLOSE))


def close_networks(model, truth, device, **tolerance):
    state = model.state_dict()
    assert {value.device.type for value in state.values()} == {device}
    close(state, truth.state_dict(), **tolerance)
    x = 2 * data(100, truth.layer_dims[0])[0]
    close(model(x.to(device)), truth(x), **tolerance)


def fit(model, epochs=4, **options):
    """As users have it: the data wait on the CPU, in batches that their own generator shuffles."""
    dtype = next(model.parameters()).dtype
    x, y = data(dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    loader = DataLoader(TensorDataset(x, y), options.pop("batch", 100), shuffle=True, generator=generator)
    return train_kan(model, loader, [data(80, dtype=dtype)], epochs, options.pop("lr", 0.01), progress=False, **options)
