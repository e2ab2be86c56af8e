"""Optimisers and schedulers by name, ready made, or by a function that makes them."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from kan_fast.checks import check_number


def make_optimizer(model: nn.Module, optimizer: Any, lr: float, weight_decay: float) -> Optimizer:
    """The optimiser that train_kan's argument stands for; lr and weight_decay go to those that it makes by name."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    if isinstance(optimizer, str):
        check_number("lr", lr, 0)
        check_number("weight_decay", weight_decay, 0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    if optimizer == "lbfgs":
        # The default tolerances end a float64 run at losses of 1e-6.
        return torch.optim.LBFGS(
            parameters, lr=lr, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )
    if callable(optimizer):
        made = optimizer(parameters)
        if isinstance(made, Optimizer):
            return made
    raise ValueError(f"optimizer: expected 'adamw', 'lbfgs', an Optimizer or a function that makes one, got {optimizer!r}")


def make_scheduler(optimizer: Optimizer, scheduler: Any) -> LRScheduler | None:
    """The scheduler that train_kan's argument stands for."""
    if scheduler is None or isinstance(scheduler, LRScheduler):
        return scheduler
    if scheduler == "plateau":
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=10)
    if callable(scheduler):
        made = scheduler(optimizer)
        if isinstance(made, LRScheduler):
            return made
    raise ValueError(f"scheduler: expected 'plateau', None, a scheduler or a function that makes one, got {scheduler!r}")
