"""What a training run leaves behind."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """Losses and more, one entry per epoch; unpacks as (train_losses, val_losses).

    train_losses: mean data loss of the epoch, each batch before its step, without penalties. val_losses: mean loss on the
    validation data after the epoch; the train losses where there are none. penalties: mean penalty of the epoch.
    learning_rates: of the first parameter group, during the epoch. metrics: name -> mean on the validation data.
    seconds: wall time. grid_changes: (step, relative change per layer) of every grid update.
    best_epoch: index of the lowest validation loss, -1 before the first epoch. stopped_early: by early stopping.
    """

    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    grid_changes: list[tuple[int, list[float]]] = field(default_factory=list)
    best_epoch: int = -1
    stopped_early: bool = False

    def __iter__(self) -> Iterator[list[float]]:
        yield self.train_losses
        yield self.val_losses

    @property
    def best_loss(self) -> float:
        """The lowest validation loss; infinity before the first epoch."""
        return self.val_losses[self.best_epoch] if self.best_epoch >= 0 else float("inf")

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return dataclasses.asdict(self)

    def plot(self, **options: Any) -> Any:
        """Draw it: see kan_fast.plotting.plot_history. Needs matplotlib."""
        from kan_fast.plotting import plot_history

        return plot_history(self, **options)
