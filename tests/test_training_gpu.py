"""Training on a GPU: the losses and weights that the reference has on the CPU, checkpoints, graphs.

Every test runs on the CPU as well, where it compares the preferred backend with the reference.
"""

import copy

import pytest
import torch
from torch import nn
from twins import CLOSE, close, close_networks, data, fit, pair

from kan_fast import advanced_regularization, prune_kan, sparsify


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"regularization": advanced_regularization, "activation_l1": 1e-3, "activation_entropy": 1e-3},
        {"grid_update_every": 3},
        {"optimizer": lambda parameters: torch.optim.AdamW(parameters, fused=True), "metrics": {"l1": nn.functional.l1_loss}},
        {"optimizer": "lbfgs", "batch": 400, "lr": 1.0, "epochs": 2},
    ],
    ids=["adamw", "penalties", "grid updates", "fused", "lbfgs"],
)
def test_training(device, options):
    truth, model = pair("cpu", (3, 4, 1))
    histories = [fit(truth, **options), fit(model, device=device, **options)]
    # Forty steps of L-BFGS with searches along lines multiply differences by a hundred or two.
    tolerance = {"rtol": 1e-7, "atol": 1e-8} if options.get("optimizer") == "lbfgs" else CLOSE
    want, got = (vars(history) for history in histories)
    for name in ("train_losses", "val_losses", "penalties", "metrics", "grid_changes"):
        close(got[name], want[name], **tolerance)
    close_networks(model, truth, device, **tolerance)


@pytest.mark.parametrize("options", [{"autocast": torch.bfloat16}, {"autocast": torch.float16}], ids=["bfloat16", "float16"])
def test_training_in_mixed_precision(device, options):
    """The rounding of activations, 2^-9 or 2^-12, is small beside the loss that is left."""
    start = pair(device, (3, 4, 1), dtype=torch.float32)[1]
    finals = []
    for chosen in ({}, options):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
        history = fit(model, 60, optimizer=optimizer, scheduler=None, activation_l1=1e-4, batch=400, **chosen)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        finals.append(history.val_losses[-1])
    variance = float(data(80)[1].var())
    assert finals[0] < 0.2 * variance
    assert finals[1] < finals[0] + 0.01 * variance


def test_the_loss_of_lbfgs_is_not_scaled(device):
    with pytest.raises(ValueError, match="autocast: expected None or bfloat16 with L-BFGS"):
        fit(pair(device, (3, 4, 1))[1], optimizer="lbfgs", autocast=torch.float16)


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "lbfgs", "batch": 400}, {"autocast": torch.float16, "dtype": torch.float32}],
    ids=["adamw", "lbfgs", "float16"],
)
def test_resume(device, options, tmp_path):
    options = dict(options)
    dtype = options.pop("dtype", torch.float64)
    whole, first, second = (pair(device, (3, 4, 1), dtype=dtype)[1] for _ in range(3))
    noisy = options.get("optimizer") is None  # random numbers of the device, as dropout takes them

    def penalty(model):
        weight = model.layers[0].spline_weight
        return 1e-2 * (weight * torch.rand_like(weight)).sum() if noisy else 0 * weight.sum()

    torch.manual_seed(3)
    want = fit(whole, 4, regularization=penalty, **options)
    torch.manual_seed(3)
    fit(first, 2, regularization=penalty, checkpoint_dir=tmp_path, **options)
    torch.manual_seed(4)
    got = fit(second, 4, regularization=penalty, checkpoint_dir=tmp_path, resume=True, **options)
    assert (got.train_losses, got.val_losses) == (want.train_losses, want.val_losses)
    for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert ours.device.type == device and torch.equal(ours, theirs)
    best = torch.load(tmp_path / "best.pt", weights_only=True, map_location="cpu")
    assert best["layers.0.grid"].shape == (3, 12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("there", [True, False], ids=["from the CPU", "to the CPU"])
def test_resume_on_another_device(device, there, fused, tmp_path):
    truth, whole = pair(device, (3, 4, 1))
    models = [truth, whole] if there else [whole, truth]
    options = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=fused)}
    want = fit(copy.deepcopy(whole), 4, **options)
    fit(models[0], 2, checkpoint_dir=tmp_path, **options)
    got = fit(models[1], 4, checkpoint_dir=tmp_path, resume=True, restore_best=True, **options)
    close((got.train_losses, got.val_losses), (want.train_losses, want.val_losses))


def test_a_compiled_training_step(device):
    """Model, loss and penalty in one graph, and the optimiser's step in another."""
    torch.compiler.reset()
    truth, model = pair(device, (3, 4, 1))
    x, y = data()

    def loss(network, x, y):
        return nn.functional.mse_loss(network(x), y) + network.regularization_loss(1e-3) + advanced_regularization(network)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for network, function in ((truth, loss), (model, compiled)):
        place = network.layers[0].grid.device
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            function(network, x.to(place), y.to(place)).backward()
            optimizer.step()
    close_networks(model, truth, device)


def test_sparsified_networks_train(device):
    truth, model = pair(device, (3, 4, 1))
    for network in (truth, model):
        prune_kan(network, 0.6, relative=True)
        assert sparsify(network, 1.0)
    close((fit(model).train_losses), fit(truth).train_losses)
    close(model.state_dict(), truth.state_dict())
