"""Training loops as people write them: mixed precision, loss scaling, fused and quasi-Newton optimisers, averaged weights."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from kan_fast import KAN, KANFeedForward, KANLayer


def data(rows=256, device="cpu", dtype=torch.float32):
    """y = exp(sin(pi x_0) + x_1^2)"""
    x = torch.rand(rows, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:] ** 2)
    return x.to(device, dtype), y.to(device, dtype)


def train(model, optimizer, x, y, steps, autocast=None, scaler=None):
    """Losses of the steps, in float32 or wider."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            output = model(x)
        loss = nn.functional.mse_loss(output.to(torch.promote_types(output.dtype, torch.float32)), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.bfloat16, False), (torch.float16, True)])
def test_autocast_and_loss_scaling(device, dtype, fused):
    """A loop ends as in float32: the rounding of activations, 2^-9 or 2^-12, is small beside the loss that is left."""
    x, y = data(device=device)
    start = KAN([2, 5, 1], device=device)
    finals = []
    for autocast in (None, dtype):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
        scaler = torch.amp.GradScaler(device) if autocast == torch.float16 else None
        losses = train(model, optimizer, x, y, 150, autocast, scaler)
        assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
        finals.append(losses[-10:].mean())
    variance = y.var()
    assert finals[0] < 0.05 * variance
    assert finals[1] < finals[0] + 0.01 * variance


def test_autocast_casts_as_for_linear(place):
    model = nn.Sequential(KANLayer(3, 4, device=place.device, bias=True), nn.Linear(4, 4, device=place.device))
    x = torch.rand(5, 3, device=place.device)
    with torch.autocast(place.device.type, torch.bfloat16):
        assert model[0](x).dtype == model[1](x.new_zeros(5, 4)).dtype == torch.bfloat16
        with torch.autocast(place.device.type, enabled=False):
            assert model[0](x).dtype == torch.float32


def test_an_overflow_skips_the_step_and_lowers_the_scale(place):
    x, y = data(device=place.device)
    model = KAN([2, 3, 1], device=place.device, backend=place.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler(place.device.type, init_scale=2.0**40, growth_interval=10**6)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, x, y, 1, torch.float16, scaler)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 2.0**39
    losses = train(model, optimizer, x, y, 100, torch.float16, scaler)
    assert 1 < scaler.get_scale() < 2.0**39 and losses.isfinite().all()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_fused_adamw_is_adamw(place64, amsgrad):
    """In float64 the two implementations differ by rounding only, which 50 steps magnify little on a smooth loss."""
    x, y = data(device=place64.device, dtype=torch.float64)
    start = KAN([2, 4, 1], bias=True, device=place64.device, dtype=torch.float64, backend=place64.backend)
    start.layers[0].edge_mask = torch.ones(2, 4, dtype=torch.bool, device=place64.device).tril()
    models = [copy.deepcopy(start), copy.deepcopy(start)]
    for model, options in zip(models, ({"fused": True}, {"foreach": False}), strict=True):
        train(model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, amsgrad=amsgrad, **options), x, y, 50)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert not torch.equal(ours, next(start.parameters()))


def test_lbfgs_converges(place64):
    """A sum of smooth functions of one input each, which the network can be to the error of its splines.

    Cubic splines of step h = 0.2 err by 5/384 h^4 max|f''''| = 2e-5 * pi^4 = 2e-3 at most for sin(pi x), a third of that in
    the mean; its square is 4e-7.
    """
    x, _ = data(device=place64.device, dtype=torch.float64)
    y = torch.sin(torch.pi * x[:, :1]) + x[:, 1:] ** 2
    model = KAN([2, 1], grid_size=10, device=place64.device, dtype=torch.float64, backend=place64.backend)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe", tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(10):
        optimizer.step(closure)
    assert closure().item() < 4e-7 < 1e-4 * first


@pytest.mark.parametrize("use_buffers", [False, True])
def test_weight_averaging(place64, use_buffers):
    """Stochastic weight averaging: the mean of the weights at the ends of the epochs; knots as they are."""
    x, y = data(device=place64.device, dtype=torch.float64)
    model = KAN([2, 4, 1], device=place64.device, dtype=torch.float64, backend=place64.backend)
    averaged = AveragedModel(model, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    states = []
    for _ in range(4):
        train(model, optimizer, x, y, 10)
        scheduler.step()
        averaged.update_parameters(model)
        states.append(copy.deepcopy(model.state_dict()))
    for name, value in averaged.module.state_dict().items():
        want = torch.stack([state[name] for state in states]).mean(0)
        # On CUDA torch divides by the count of averages in float32: some units of 2^-24 of the weights' range.
        close = 1e-13 if place64.device.type == "cpu" else 2.0**-22
        torch.testing.assert_close(value, want, rtol=close, atol=close)
    assert isinstance(averaged.module, KAN) and averaged(x).shape == (256, 1)
    update_bn([x], averaged)  # nothing to do, and nothing that breaks
    averaged.load_state_dict(copy.deepcopy(averaged.state_dict()))


def test_exponential_averaging_of_a_masked_model(place64):
    x, y = data(device=place64.device, dtype=torch.float64)
    model = KAN([2, 4, 1], device=place64.device, dtype=torch.float64, backend=place64.backend)
    model.layers[0].edge_mask = torch.ones(2, 4, dtype=torch.bool, device=place64.device).tril()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    want = None
    for _ in range(60):
        train(model, optimizer, x, y, 1)
        averaged.update_parameters(model)
        weight = model.layers[0].spline_weight.detach().clone()
        want = weight if want is None else 0.9 * want + 0.1 * weight
    torch.testing.assert_close(averaged.module.layers[0].spline_weight.data, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(averaged.module.layers[0].edge_mask, model.layers[0].edge_mask)
    assert nn.functional.mse_loss(averaged(x), y) < 0.5 * y.var()


def test_gradient_accumulation_and_clipping():
    """Four quarter batches are one batch."""
    x, y = data(dtype=torch.float64)
    model = nn.Sequential(nn.Linear(2, 6), KANFeedForward(6), KANLayer(6, 1)).double()
    nn.functional.mse_loss(model(x), y).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
        (nn.functional.mse_loss(model(part_x), part_y) / 4).backward()
    for parameter, want in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-12, atol=1e-12)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    clipped = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(clipped.norm(), torch.tensor(1e-3, dtype=torch.float64), rtol=1e-3, atol=0)
