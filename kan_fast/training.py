"""A training loop for networks of KANLayers, and of anything else."""

import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from kan_fast.checkpoints import load_model_state, load_optimizer_state, model_state, write
from kan_fast.checks import check_int, check_iterable, check_number, check_path, expect
from kan_fast.grid import InputsNotFinite, update_grid
from kan_fast.history import History
from kan_fast.optimizers import make_optimizer, make_scheduler
from kan_fast.ranks import rank, states_of_all_ranks, sum_over_ranks, world_size
from kan_fast.regularization import activation_regularization

Target = Tensor | tuple[Tensor, ...]
Loss = Callable[[Tensor, Any], Tensor]
Batches = Iterable[Any]

# Rows of the present epoch that a grid update sees, the latest ones.
_GRID_ROWS = 16384


def train_kan(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches | None = None,
    epochs: int = 100,
    lr: float = 1e-3,
    *,
    weight_decay: float = 1e-4,
    optimizer: str | Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] = "adamw",
    scheduler: str | LRScheduler | Callable[[Optimizer], LRScheduler] | None = "plateau",
    loss: Loss | None = None,
    clip_norm: float | None = 1.0,
    regularization: Callable[[nn.Module], Tensor] | None = None,
    activation_l1: float = 0.0,
    activation_entropy: float = 0.0,
    metrics: dict[str, Loss] | None = None,
    grid_update_every: int = 0,
    grid_update_until: int | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    early_stopping: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    restore_best: bool = False,
    progress: bool | None = None,
    callback: Callable[[int, History], None] | None = None,
) -> History:
    """Train a model and return its History, which unpacks as (train_losses, val_losses).

    train_loader, val_loader: iterables of (x (N, ...), y (N, ...)), gone through once an epoch; y may be a tuple or list of
    tensors (targets and weights, say), which loss and metrics get as a tuple. epochs counts from the very beginning, those
    before a resume included. Without val_loader the train loss stands for the validation loss.

    optimizer: "adamw" (lr, weight_decay), "lbfgs" (lr, strong Wolfe line search; 20 iterations a batch, so give it one batch
    that holds all data), an Optimizer, or a function of the parameters that makes one. scheduler: "plateau" (factor 0.5,
    patience 10), None, a scheduler, or a function of the optimizer; stepped once an epoch, on the validation loss if it is a
    ReduceLROnPlateau. loss(output, y): mean squared error by default.
    clip_norm: largest norm of the whole gradient, None for no clipping; L-BFGS is never clipped, its line search compares
    gradients.
    regularization(model): added to the loss, e.g. `lambda m: advanced_regularization(m)`. activation_l1, activation_entropy:
    factors of the KAN paper's penalty (activation_regularization), computed in the same forward pass.
    metrics: name -> f(output, y), averaged over the validation data.
    grid_update_every: update_grid after every so many optimizer steps, up to step grid_update_until, on the rows that the
    epoch has shown so far (the last 16384); the optimizer's state is carried over (reset with L-BFGS). Layers whose
    spline_weight does not require a gradient keep knots and weights.
    device: moved there before training. autocast: dtype of torch.autocast; float16 scales the loss, which L-BFGS, whose line
    search compares losses with gradients, does not bear.
    early_stopping: stop after that many epochs without a better validation loss.
    checkpoint_dir: best.pt (state_dict of the model at the best epoch) and last.pt (everything) are written there after
    every epoch, with whole tensors: sharded models and others read the same files. resume: go on from last.pt; model,
    optimizer, scheduler, random numbers of torch and Python, and a generator of the loader's own are as they were, so the run
    is the one that was never interrupted. On another kind of device, or with other ranks, it goes on too, to rounding, where
    no random numbers of the device or the ranks play a part.
    restore_best: end with the best weights instead of the last.
    progress: a bar by tqdm; None means if tqdm is there. callback(epoch, history): called after every epoch.

    In several processes (kan_fast.ranks) every rank calls it with its own part of the data and, for gradients, a model that is
    wrapped in DistributedDataParallel or fully_shard; losses are means over all ranks, rank 0 writes the checkpoints, for which
    sharded parameters and their optimizer states come together in its main memory.

    Raises FloatingPointError when a loss turns NaN or infinite, or the inputs of a layer whose grid is updated; it says where,
    and the model has its best weights back.
    """
    expect(isinstance(model, nn.Module), "model", "a module", model)
    check_iterable("train_loader", train_loader, "an iterable of batches (x, y)")
    if val_loader is not None:
        check_iterable("val_loader", val_loader, "None or an iterable of batches (x, y)")
    check_int("epochs", epochs, 0)
    check_int("grid_update_every", grid_update_every, 0)
    for name, count in (("grid_update_until", grid_update_until), ("early_stopping", early_stopping)):
        if count is not None:
            check_int(name, count, 0)
    check_number("activation_l1", activation_l1)
    check_number("activation_entropy", activation_entropy)
    if clip_norm is not None:
        check_number("clip_norm", clip_norm)
    for name, function in (("loss", loss), ("regularization", regularization), ("callback", callback)):
        expect(function is None or callable(function), name, "a function or None", function)
    expect(metrics is None or isinstance(metrics, Mapping), "metrics", "a dict of functions or None", metrics)
    expect(autocast is None or isinstance(autocast, torch.dtype), "autocast", "a torch.dtype or None", autocast)
    if checkpoint_dir is not None:
        check_path("checkpoint_dir", checkpoint_dir)
    if device is not None:
        model.to(device)
    run = _Run(model, make_optimizer(model, optimizer, lr, weight_decay), loss or nn.functional.mse_loss, autocast)
    run.scheduler = make_scheduler(run.optimizer, scheduler)
    run.clip_norm, run.regularization = clip_norm, regularization
    run.activation = (activation_l1, activation_entropy)
    run.grid_update_every, run.grid_update_until = grid_update_every, grid_update_until
    run.history.metrics = {name: [] for name in metrics or {}}
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if resume:
        if folder is None:
            raise ValueError("resume: needs checkpoint_dir, got None")
        run.load(folder, train_loader)
    history = run.history
    done = len(history.train_losses)
    bar = _progress_bar(progress, done, epochs)
    for epoch in range(done, epochs):
        if history.stopped_early:
            break
        start = time.perf_counter()
        history.learning_rates.append(float(run.optimizer.param_groups[0]["lr"]))
        run.train_epoch(epoch, train_loader)
        run.validate(epoch, val_loader, metrics or {})
        if isinstance(run.scheduler, ReduceLROnPlateau):
            run.scheduler.step(history.val_losses[-1])
        elif run.scheduler is not None:
            run.scheduler.step()
        history.seconds.append(time.perf_counter() - start)
        if early_stopping is not None and epoch - history.best_epoch >= early_stopping:
            history.stopped_early = True
        if folder is not None:
            run.save(folder, train_loader)
        if bar is not None:
            bar.set_postfix(train=f"{history.train_losses[-1]:.3g}", val=f"{history.val_losses[-1]:.3g}")
            bar.update()
        if callback is not None:
            callback(epoch, history)
    if bar is not None:
        bar.close()
    if restore_best:
        load_model_state(model, run.best_state)
    return history


class _Run:
    """A model in training with all that changes from step to step."""

    scheduler: LRScheduler | ReduceLROnPlateau | None = None
    clip_norm: float | None = None
    regularization: Callable[[nn.Module], Tensor] | None = None
    activation: tuple[float, float] = (0.0, 0.0)
    grid_update_every: int = 0
    grid_update_until: int | None = None

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss: Loss, autocast: torch.dtype | None) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.device = next(model.parameters()).device
        self.autocast = autocast
        if isinstance(optimizer, torch.optim.LBFGS):
            if autocast == torch.float16:
                raise ValueError("autocast: expected None or bfloat16 with L-BFGS, which cannot scale the loss, got float16")
            if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
                raise ValueError("optimizer: expected one that takes sharded parameters, got L-BFGS: use it with whole ones")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)
        self.history = History()
        self.steps = 0
        self.best_state = model_state(model)

    def train_epoch(self, epoch: int, loader: Batches) -> None:
        self.model.train()
        losses: list[Tensor] = []
        penalties: list[Tensor] = []
        sizes: list[int] = []
        finite: list[Tensor] = []
        recent: list[Tensor] = []
        for batch in loader:
            x, y = self._pair(batch)
            data_loss, penalty = self._step(x, y)
            losses.append(data_loss)
            penalties.append(penalty)
            sizes.append(len(x))
            finite.append(_finite(x, y))
            self.steps += 1
            if self.grid_update_every:
                recent = _latest([*recent, x.detach()])
                self._maybe_update_grid(epoch, recent, finite)
        if not sizes:
            raise ValueError("train_loader: expected at least one batch, got none")
        # One wait for the device an epoch.
        table = torch.stack([torch.stack(losses).double(), torch.stack(penalties).double(), torch.stack(finite).double()]).cpu()
        means = self._means("train", epoch, table[:2].t(), sizes, table[2])
        self.history.train_losses.append(means[0])
        self.history.penalties.append(means[1])

    @torch.no_grad()
    def validate(self, epoch: int, loader: Batches | None, metrics: dict[str, Loss]) -> None:
        history = self.history
        if loader is None:
            history.val_losses.append(history.train_losses[-1])
        else:
            self.model.eval()
            measures = [self.loss, *metrics.values()]
            rows, sizes, finite = [], [], []
            for batch in loader:
                x, y = self._pair(batch)
                with self._autocast():
                    output = self.model(x)
                    rows.append(torch.stack([measure(output, y).detach().double() for measure in measures]))
                sizes.append(len(x))
                finite.append(_finite(x, y))
            if not sizes:
                raise ValueError("val_loader: expected at least one batch, got none")
            means = self._means("validation", epoch, torch.stack(rows).cpu(), sizes, torch.stack(finite).cpu(), checked=1)
            history.val_losses.append(means[0])
            for name, value in zip(metrics, means[1:]):
                history.metrics[name].append(value)
        if history.val_losses[-1] < history.best_loss:
            history.best_epoch = epoch
            self.best_state = model_state(self.model)

    def _means(
        self, part: str, epoch: int, table: Tensor, sizes: list[int], finite: Tensor, checked: int | None = None
    ) -> list[float]:
        """Means over the rows of all ranks: table (batches, quantities), sizes of the batches -> one number per quantity.

        Raises on every rank where one of the first `checked` quantities is not finite on any. finite (batches): the data are.
        """
        weights = torch.tensor(sizes, dtype=torch.float64)
        bad = (~table[:, :checked].isfinite().all(1)).nonzero()
        sums = torch.cat([weights @ table, weights.sum()[None], torch.tensor([len(bad)], dtype=torch.float64)])
        *totals, rows, failures = sum_over_ranks(sums.to(self.device) if world_size() > 1 else sums).tolist()
        if len(bad):
            self._fail(f"the {part} loss is", f"epoch {epoch}, batch {int(bad[0])}", bool(finite[bad[0]]))
        if failures:
            self._fail(f"the {part} loss is", f"epoch {epoch} on another rank", True)
        return [total / rows for total in totals]

    def _step(self, x: Tensor, y: Target) -> tuple[Tensor, Tensor]:
        """One optimizer step; the loss and penalty before it."""
        first: list[Tensor] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            with self._autocast():
                data_loss, penalty = self._losses(x, y)
            self.scaler.scale(data_loss + penalty).backward()
            first[:] = first or [data_loss.detach(), penalty.detach()]
            return (data_loss + penalty).detach()

        if isinstance(self.optimizer, torch.optim.LBFGS):
            # Searching along a line, every rank must take the same steps; the gradient is a mean over ranks too.
            self.optimizer.step(lambda: float(sum_over_ranks(closure())) / world_size())
        else:
            closure()
            if self.clip_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return first[0], first[1]

    def _losses(self, x: Tensor, y: Target) -> tuple[Tensor, Tensor]:
        if any(self.activation):
            output, penalty = activation_regularization(self.model, x, *self.activation, return_output=True)
        else:
            output = self.model(x)
            penalty = output.new_zeros(())
        if self.regularization is not None:
            penalty = penalty + self.regularization(self.model)
        return self.loss(output, y), penalty

    def _maybe_update_grid(self, epoch: int, recent: list[Tensor], finite: list[Tensor]) -> None:
        until = self.grid_update_until
        if self.steps % self.grid_update_every or (until is not None and self.steps > until):
            return
        state = "reset" if isinstance(self.optimizer, torch.optim.LBFGS) else "carry"
        try:
            rows = torch.cat(recent)
            changes = update_grid(self.model, rows, trainable_only=True, optimizer=self.optimizer, optimizer_state=state)
        except InputsNotFinite as error:  # on every rank, since all see the rows of all
            where = f"epoch {epoch}, batch {len(finite) - 1}, where grids are updated"
            self._fail(f"inputs of layer {error.layer!r} are", where, bool(torch.stack(finite).all()))
        self.history.grid_changes.append((self.steps, changes))

    def _fail(self, what: str, where: str, data_finite: bool) -> NoReturn:
        best = self.history.best_epoch
        load_model_state(self.model, self.best_state)
        kept = f"its best weights, of epoch {best} (validation loss {self.history.best_loss:.6g})"
        kept = kept if best >= 0 else "its initial weights"
        reason = "the batch's data are finite" if data_finite else "the batch's data hold NaN or infinity"
        raise FloatingPointError(
            f"{what} not finite at {where} ({reason}); the model has {kept}, back"
        )

    def _pair(self, batch: Any) -> tuple[Tensor, Target]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"loader: expected batches (x, y), got {type(batch).__name__}")
        x, y = batch
        if isinstance(y, tuple | list):
            return self._placed(x), tuple(map(self._placed, y))
        return self._placed(x), self._placed(y)

    def _placed(self, tensor: Tensor) -> Tensor:
        expect(isinstance(tensor, Tensor), "loader", "batches (x, y) of tensors", tensor)
        return tensor.to(self.device, non_blocking=True)

    def _autocast(self) -> Any:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def save(self, folder: Path, loader: Batches) -> None:
        generator = getattr(loader, "generator", None)
        of_this_rank = {
            "random": random.getstate(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else None,
            "loader": None if generator is None else generator.get_state(),
        }
        state = {
            "model": model_state(self.model, copy=False),
            "best": self.best_state,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history.state_dict(),
            "steps": self.steps,
            "ranks": states_of_all_ranks(of_this_rank),
        }
        if self.history.best_epoch == len(self.history.val_losses) - 1:
            write(self.best_state, folder / "best.pt")
        write(state, folder / "last.pt")

    def load(self, folder: Path, loader: Batches) -> None:
        # By way of the CPU: optimisers keep step counts there, and know themselves what goes to the device.
        state = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
        load_model_state(self.model, state["model"])
        self.best_state = state["best"]
        load_optimizer_state(self.optimizer, state["optimizer"])
        if (self.scheduler is None) != (state["scheduler"] is None):
            raise ValueError("scheduler: expected one exactly if the interrupted run had one")
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = History(**state["history"])
        self.history.grid_changes = [(step, changes) for step, changes in self.history.grid_changes]
        self.steps = state["steps"]
        mine = state["ranks"][rank() % len(state["ranks"])]
        version, numbers, gauss = mine["random"]
        random.setstate((version, tuple(numbers), gauss))
        torch.set_rng_state(mine["torch"])
        if mine["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(mine["cuda"][: torch.cuda.device_count()])
        if mine["loader"] is not None:
            loader.generator.set_state(mine["loader"])  # type: ignore[attr-defined]


def _finite(x: Tensor, y: Target) -> Tensor:
    """Whether all numbers of a batch are: a scalar on the device."""
    return torch.stack([part.isfinite().all() for part in (x, *(y if isinstance(y, tuple) else (y,)))]).all()


def _latest(blocks: list[Tensor]) -> list[Tensor]:
    """The last blocks that hold _GRID_ROWS rows."""
    while len(blocks) > 1 and sum(map(len, blocks[1:])) >= _GRID_ROWS:
        blocks = blocks[1:]
    return blocks


def _progress_bar(progress: bool | None, done: int, epochs: int) -> Any:
    if progress is False or rank() > 0:
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        if progress is None:
            return None
        raise ImportError("progress=True needs tqdm: pip install 'kan_fast[train]'") from error
    return tqdm(total=epochs, initial=done, unit="epoch")
