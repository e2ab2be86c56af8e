import copy
import math
import random

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kan_fast import KAN
from kan_fast.checkpoints import load_model_state
from kan_fast.history import History
from kan_fast.regularization import activation_regularization, advanced_regularization
from kan_fast.training import train_kan


def make_data(samples=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(samples, 2, generator=generator, dtype=torch.float64) - 1
    return x, torch.sin(2 * x[:, :1]) * x[:, 1:]


def make_loaders(batch_size=50):
    return (
        DataLoader(TensorDataset(*make_data()), batch_size, shuffle=True),
        DataLoader(TensorDataset(*make_data(80, 1)), 30),
    )


def make_model():
    torch.manual_seed(0)
    return KAN([2, 4, 1], dtype=torch.float64)


def train(model, *args, **options):
    return train_kan(model, *args, progress=False, **options)


def test_defaults_are_those_of_a_plain_loop():
    # The same run written out: AdamW with weight decay 1e-4, clipping at 1, MSE, plateau on the validation loss.
    loaders = [make_data()], [make_data(80, 1)]
    model, plain = make_model(), make_model()
    history = train(model, *loaders, epochs=40, lr=3.0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3.0, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=10)
    train_losses, val_losses = [], []
    for _ in range(40):
        (x, y), (x_val, y_val) = loaders[0][0], loaders[1][0]
        loss = (plain(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        train_losses.append(float(loss.detach()))
        with torch.no_grad():
            val_losses.append(float((plain(x_val) - y_val).square().mean()))
        scheduler.step(val_losses[-1])
    got_train, got_val = history
    assert got_train == pytest.approx(train_losses, rel=1e-12)
    assert got_val == pytest.approx(val_losses, rel=1e-12)
    assert history.learning_rates[-1] == optimizer.param_groups[0]["lr"] < 3.0
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert history.best_epoch == min(range(40), key=val_losses.__getitem__)
    assert history.best_loss == min(got_val)


def test_uneven_batches_are_weighted_by_their_size():
    model = make_model()
    x, y = make_data()
    metrics = {"l1": torch.nn.functional.l1_loss}
    history = train(model, [(x, y)], [(x[:30], y[:30]), (x[30:], y[30:])], epochs=1, metrics=metrics)
    assert history.val_losses[0] == pytest.approx(float((model(x) - y).square().mean().detach()), rel=1e-12)
    assert history.metrics["l1"][0] == pytest.approx(float((model(x) - y).abs().mean().detach()), rel=1e-12)


def test_targets_in_parts():
    """Weights beside the targets."""
    x, y = make_data()
    weight = torch.rand(len(x), dtype=torch.float64)

    def weighted(output, target):
        assert isinstance(target, tuple)
        return (target[1] * (output - target[0]).square().squeeze(1)).mean()

    model, plain = make_model(), make_model()
    loader = DataLoader([(x[i], (y[i], weight[i])) for i in range(len(x))], 50)
    history = train(model, loader, [(x, [y, weight])], epochs=2, loss=weighted, metrics={"same": weighted})
    want = float((weight * (model(x) - y).square().squeeze(1)).mean().detach())
    assert history.val_losses[-1] == pytest.approx(want, rel=1e-12)
    assert history.metrics["same"] == history.val_losses
    train(plain, [(part, (a, b)) for part, a, b in zip(x.split(50), y.split(50), weight.split(50))], epochs=2, loss=weighted)
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        assert torch.equal(ours, theirs)
    with pytest.raises(FloatingPointError, match="hold NaN"):
        train(model, [(x, (y, weight * torch.nan))], epochs=1, loss=weighted)


def test_lbfgs_with_full_batches():
    model = make_model()
    history = train(model, [make_data()], epochs=5, lr=1.0, optimizer="lbfgs", scheduler=None)
    assert history.train_losses[-1] < 1e-3 * history.train_losses[0]
    assert history.val_losses == history.train_losses


def test_any_optimizer_scheduler_and_loss():
    model = make_model()
    history = train(
        model,
        [make_data()],
        epochs=4,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1),
        loss=torch.nn.functional.l1_loss,
        clip_norm=None,
    )
    assert history.learning_rates == pytest.approx([0.1, 0.1, 0.01, 0.01])
    plain = make_model()
    x, y = make_data()
    assert history.train_losses[0] == pytest.approx(float((plain(x) - y).abs().mean().detach()), rel=1e-12)


def test_penalties_enter_the_gradient():
    x, y = make_data()
    model, plain = make_model(), make_model()
    history = train(
        model, [(x, y)], epochs=1, regularization=advanced_regularization, activation_l1=0.1, activation_entropy=0.2
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=1e-4)
    penalty = activation_regularization(plain, x, 0.1, 0.2) + advanced_regularization(plain)
    ((plain(x) - y).square().mean() + penalty).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    assert history.penalties[0] == pytest.approx(float(penalty.detach()), rel=1e-12)
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "lbfgs"])
def test_grid_updates_during_training(optimizer):
    model = make_model()
    before = model.layers[0].grid.clone()
    loader = DataLoader(TensorDataset(*make_data()), 100)
    history = train(model, loader, epochs=4, optimizer=optimizer, lr=0.01, grid_update_every=2, grid_update_until=5)
    assert [step for step, _ in history.grid_changes] == [2, 4]
    assert all(len(changes) == 2 for _, changes in history.grid_changes)
    assert not torch.equal(model.layers[0].grid, before)
    assert history.val_losses[-1] < history.val_losses[0]


@pytest.mark.parametrize("frozen", [0, 1])
def test_grid_updates_leave_frozen_layers(frozen):
    model = make_model()
    model.layers[frozen].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    history = train(model, [make_data()], epochs=2, grid_update_every=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(f"layers.{frozen}."), name
    assert [changes[frozen] for _, changes in history.grid_changes] == [0.0, 0.0]


def test_no_grid_updates_after_the_last_step_for_them():
    history = train(make_model(), [make_data()], epochs=2, grid_update_every=1, grid_update_until=0)
    assert history.grid_changes == []


def test_losses_stay_low_through_grid_updates():
    # Normal data with far tails: the refit is ill-conditioned there, and the optimizer's moments go through it.
    torch.manual_seed(0)
    x = torch.randn(500, 2, dtype=torch.float64)
    y = torch.sin(x[:, :1]) + x[:, 1:]
    model = KAN([2, 5, 1], grid_size=10, grid_range=(-4, 4), dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, y), 50, shuffle=True)
    history = train(model, loader, epochs=30, lr=2e-2, grid_update_every=40, grid_update_until=200)
    assert len(history.grid_changes) == 5
    assert max(history.train_losses) < 2 * history.train_losses[0]
    assert history.train_losses[-1] < 0.1 * history.train_losses[0]


@pytest.mark.parametrize("options", [{}, {"optimizer": "lbfgs", "scheduler": None}, {"grid_update_every": 3}])
def test_resume_is_exact(tmp_path, options):
    whole = make_model()
    torch.manual_seed(5)
    random.seed(5)
    expected = train(whole, *make_loaders(), epochs=6, lr=0.05, **options)

    class InterruptionError(Exception):
        pass

    def interrupt(epoch, history):
        if epoch == 2:
            raise InterruptionError

    first = make_model()
    torch.manual_seed(5)
    random.seed(5)
    with pytest.raises(InterruptionError):
        train(first, *make_loaders(), epochs=6, lr=0.05, checkpoint_dir=tmp_path, callback=interrupt, **options)
    second = make_model()
    torch.manual_seed(99)
    random.seed(99)
    history = train(second, *make_loaders(), epochs=6, lr=0.05, checkpoint_dir=tmp_path, resume=True, **options)
    assert history.train_losses == expected.train_losses
    assert history.val_losses == expected.val_losses
    assert history.grid_changes == expected.grid_changes
    for name, value in whole.state_dict().items():
        if value is not None:
            assert torch.equal(second.state_dict()[name], value), name
    best = torch.load(tmp_path / "best.pt")
    load_model_state(second, best)
    x, y = make_data(80, 1)
    assert float((second(x) - y).square().mean().detach()) == pytest.approx(expected.best_loss, rel=1e-12)


def test_resume_with_the_loaders_own_generator(tmp_path):
    def loader():
        return DataLoader(TensorDataset(*make_data()), 50, shuffle=True, generator=torch.Generator().manual_seed(3))

    expected = train(make_model(), loader(), epochs=4)
    train(make_model(), loader(), epochs=2, checkpoint_dir=tmp_path)
    assert train(make_model(), loader(), epochs=4, checkpoint_dir=tmp_path, resume=True).train_losses == expected.train_losses


def test_resume_into_another_grid_size(tmp_path):
    from kan_fast.grid import adaptive_grid_refinement

    model = make_model()
    adaptive_grid_refinement(model, make_data()[0])
    train(model, [make_data()], epochs=2, checkpoint_dir=tmp_path)
    again = make_model()
    train(again, [make_data()], epochs=3, checkpoint_dir=tmp_path, resume=True)
    assert [layer.grid_size for layer in again.layers] == [10, 10]


@pytest.mark.parametrize("where", ["loss", "data", "validation"])
def test_nan_says_where_and_keeps_the_best_weights(where):
    model = make_model()
    kept = []

    def remember(epoch, history):
        if history.best_epoch == epoch:
            kept[:] = [p.detach().clone() for p in model.parameters()]

    x, y = make_data()
    spoiled = x.clone()
    spoiled[3, 0] = math.nan
    epochs = {"n": 0}

    class Loader:
        def __iter__(self):
            epochs["n"] += 1
            yield x, y
            yield (spoiled if where == "data" and epochs["n"] == 4 else x), y

    class Validation:
        def __iter__(self):
            yield (spoiled if where == "validation" and epochs["n"] == 4 else x), y

    def loss(output, target):
        value = (output - target).square().mean()
        return value / 0 if where == "loss" and epochs["n"] == 4 and output.requires_grad else value

    batch, data = {"loss": (0, "are finite"), "data": (1, "hold NaN"), "validation": (0, "hold NaN")}[where]
    with pytest.raises(FloatingPointError, match=f"epoch 3, batch {batch} .*{data}.*epoch 2"):
        train(model, Loader(), Validation(), epochs=9, loss=loss, callback=remember)
    for now, best in zip(model.parameters(), kept):
        assert torch.equal(now, best)


@pytest.mark.parametrize("cause", ["data", "weights"])
def test_numbers_that_are_not_finite_where_grids_are_updated(cause):
    model, (x, y) = make_model(), make_data()
    spoiled = x.clone()
    spoiled[0, 0] = torch.nan
    at_the_start = copy.deepcopy(model.state_dict())

    def spoil(optimizer, *_):
        if cause == "weights":
            optimizer.param_groups[0]["params"][0].data.fill_(torch.inf)

    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    optimizer.register_step_post_hook(spoil)
    where, data = (1, "hold NaN") if cause == "data" else (0, "are finite")
    message = f"^inputs of layer 'layers.[01]' are not finite at epoch 0, batch {where}, .*{data}.* initial weights"
    with pytest.raises(FloatingPointError, match=message):
        train(model, [(x, y), (spoiled, y)], optimizer=optimizer, scheduler=None, grid_update_every=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, at_the_start[name])


def test_early_stopping_and_best_weights():
    model = make_model()
    losses = iter([5.0, 3.0, 4.0, 4.0, 4.0, 1.0])
    states = []

    def validation_loss(output, target):
        if output.requires_grad:
            return (output - target).square().mean()
        states.append([p.detach().clone() for p in model.parameters()])
        return torch.tensor(next(losses))

    history = train(model, [make_data()], [make_data()], epochs=6, loss=validation_loss, early_stopping=3, restore_best=True)
    assert history.val_losses == [5, 3, 4, 4, 4]
    assert history.stopped_early
    assert history.best_epoch == 1
    for now, best in zip(model.parameters(), states[1]):
        assert torch.equal(now, best)


def test_autocast_trains():
    torch.manual_seed(0)
    model = KAN([2, 4, 1])
    x, y = (t.float() for t in make_data())
    history = train(model, [(x, y)], epochs=30, lr=0.02, autocast=torch.bfloat16)
    assert history.train_losses[-1] < 0.5 * history.train_losses[0]
    assert model.layers[0].spline_weight.dtype == torch.float32


def test_progress_bar_needs_tqdm(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    train_kan(make_model(), [make_data()], epochs=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"kan_fast\[train\]"):
        train_kan(make_model(), [make_data()], epochs=1, progress=True)
    train_kan(make_model(), [make_data()], epochs=1)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"optimizer": "adam"}, ValueError, "optimizer"),
        ({"scheduler": "cosine"}, ValueError, "scheduler"),
        ({"resume": True}, ValueError, "resume"),
        ({"epochs": -1}, ValueError, "epochs"),
    ],
)
def test_errors_name_the_argument(options, error, match):
    with pytest.raises(error, match=match):
        train(make_model(), [make_data()], **options)


def test_bad_loaders():
    with pytest.raises(TypeError, match="loader"):
        train(make_model(), [make_data()[0]])
    with pytest.raises(ValueError, match="train_loader"):
        train(make_model(), [])
    with pytest.raises(ValueError, match="val_loader"):
        train(make_model(), [make_data()], [], epochs=1)


def test_history_unpacks():
    train_losses, val_losses = History([1.0], [2.0])
    assert (train_losses, val_losses) == ([1.0], [2.0])
