"""KANs as scikit-learn estimators: pipelines, cross-validation and grid search take them like any other."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kan_fast.history import History
from kan_fast.nn import KAN
from kan_fast.plotting import plot_kan
from kan_fast.pruning import node_scores
from kan_fast.training import train_kan
from kan_fast.traverse import network_layers

try:
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "KANRegressor and KANClassifier need scikit-learn 1.6 or newer: pip install 'kan_fast[sklearn]'"
    ) from error

# Rows of the training data that stay with an estimator: for importances, plots and formulas.
_KEPT_ROWS = 2000


# Target and weight of every row.
_Target = tuple[Tensor, Tensor]


class _Batches:
    """x (N, ...), y (N, ...) and weights (N) in random batches, an epoch at a time."""

    def __init__(self, x: Tensor, target: _Target, size: int) -> None:
        self.x, self.target, self.size = x, target, size

    def __iter__(self) -> Iterator[tuple[Tensor, _Target]]:
        order = torch.randperm(len(self.x), device=self.x.device)
        for part in order.split(self.size):
            yield self.x[part], _rows(self.target, part)


class _KANEstimator(BaseEstimator):
    """What regressor and classifier share.

    Inputs are mapped to [-1, 1] by the smallest and largest value of each feature in the training data; beyond them a
    spline goes on with its slope (outside="linear").
    """

    model_: KAN
    history_: History

    def __init__(
        self,
        hidden_layers: Sequence[int] = (8,),
        grid_size: int = 5,
        spline_order: int = 3,
        *,
        base_activation: Any = "silu",
        outside: str = "linear",
        epochs: int = 200,
        batch_size: int = 256,
        lr: float = 1e-2,
        optimizer: Any = "adamw",
        weight_decay: float = 1e-4,
        activation_l1: float = 0.0,
        activation_entropy: float = 0.0,
        early_stopping: int | None = None,
        validation_fraction: float = 0.1,
        dtype: str = "float32",
        device: Any = None,
        backend: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.hidden_layers = hidden_layers
        self.grid_size = grid_size
        self.spline_order = spline_order
        self.base_activation = base_activation
        self.outside = outside
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.activation_l1 = activation_l1
        self.activation_entropy = activation_entropy
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.dtype = dtype
        self.device = device
        self.backend = backend
        self.random_state = random_state

    @property
    def feature_importances_(self) -> Any:
        """Share of each feature in the outputs, (n_features,), summing to 1: attribution on training data (node_scores)."""
        check_is_fitted(self)
        scores = node_scores(self.model_, self._samples)[0].cpu().numpy()
        total = scores.sum()
        return scores / total if total > 0 else scores

    def plot(self, **options: Any) -> Any:
        """Draw the network, as it is on training data: see kan_fast.plot_kan. Returns the matplotlib Axes."""
        check_is_fitted(self)
        options = {"input_names": self._input_names(), "output_names": self._output_names(), **options}
        return plot_kan(self.model_, self._samples, **options)

    def _expressions(self) -> list[Any]:
        """SymPy expressions of the network's outputs in the units of the features."""
        from kan_fast.symbolic import symbolic_extraction

        check_is_fitted(self)
        import sympy

        names = self._input_names()
        found = symbolic_extraction(self.model_, names, data=self._samples).expressions
        scaled = {
            sympy.Symbol(name): (sympy.Symbol(name) - float(centre)) / float(half)
            for name, centre, half in zip(names, self._centre, self._half)
        }
        return [expression.xreplace(scaled) for expression in found]

    def _input_names(self) -> list[str]:
        return [str(name) for name in getattr(self, "feature_names_in_", [f"x_{i}" for i in range(self.n_features_in_)])]

    def _output_names(self) -> list[str]:
        raise NotImplementedError

    def _check_weights(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """X, y and weights, NumPy arrays, of the rows whose weight is not 0; the weights have mean 1."""
        if sample_weight is None:
            return X, y, np.ones(len(X))
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        kept = weight > 0
        if not kept.any():
            raise ValueError("sample_weight: expected a weight above zero at least, got all zero")
        weight = weight[kept]
        return X[kept], y[kept], weight / weight.mean()

    def _fit(self, X: Any, y: Tensor, weight: Any, outputs: int, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """X (n, features), weight (n), checked; y (n, ...) as the loss takes it, which gives a value for every row."""
        dtype = getattr(torch, str(self.dtype), None)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected 'float32' or 'float64', got {self.dtype!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {self.batch_size}")
        low, high = X.min(0), X.max(0)
        self._centre = low / 2 + high / 2
        self._half = np.where(high > low, high / 2 - low / 2, 1.0)
        device = torch.device("cpu" if self.device is None else self.device)
        seed = int(check_random_state(self.random_state).randint(2**31))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # torch.manual_seed would seed every GPU, those too whose states are not put back.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            self.model_ = KAN(
                [X.shape[1], *self.hidden_layers, outputs],
                self.grid_size,
                self.spline_order,
                base_activation=self.base_activation,
                outside=self.outside,
                bias=True,
                backend=self.backend,
                device=device,
                dtype=dtype,
            )
            x, target = self._scaled(X), (y.to(device), torch.tensor(weight, dtype=dtype, device=device))
            self._samples = x[_representative(weight).to(device)]
            held_out = None
            if self.early_stopping is not None:
                order = torch.randperm(len(x), device=device)
                count = max(1, round(self.validation_fraction * len(x)))
                if not 0 < self.validation_fraction < 1 or count == len(x):
                    raise ValueError(
                        "validation_fraction: expected a share of the samples that leaves some to train on, got"
                        f" {self.validation_fraction} of {len(x)}"
                    )
                held_out = [(x[order[:count]], _rows(target, order[:count]))]
                x, target = x[order[count:]], _rows(target, order[count:])

            def weighted(output: Tensor, target: _Target) -> Tensor:
                return (target[1] * loss(output, target[0])).mean()

            self.history_ = train_kan(
                self.model_,
                _Batches(x, target, len(x) if self.optimizer == "lbfgs" else self.batch_size),
                held_out,
                self.epochs,
                self.lr,
                weight_decay=self.weight_decay,
                optimizer=self.optimizer,
                loss=weighted,
                activation_l1=self.activation_l1,
                activation_entropy=self.activation_entropy,
                early_stopping=self.early_stopping,
                restore_best=held_out is not None,
                progress=False,
            )
        self.model_.eval()

    def _scaled(self, X: Any) -> Tensor:
        """(n, features) NumPy -> the network's input."""
        like = network_layers(self.model_)[0].spline_weight
        return torch.tensor((X - self._centre) / self._half, dtype=like.dtype, device=like.device)

    def _forward(self, X: Any) -> Tensor:
        """Raw data -> the network's output (n, outputs) on the CPU, float64."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with torch.no_grad():
            y: Tensor = self.model_(self._scaled(X))
        return y.double().cpu()


def _rows(target: _Target, index: Tensor) -> _Target:
    return target[0][index], target[1][index]


def _representative(weight: Any) -> Tensor:
    """Indices of up to _KEPT_ROWS rows, each as often as its weight (n) says, NumPy: at random where the weights are equal.

    Otherwise by systematic sampling: evenly spaced points of the line on which the weights lie one after the other.
    """
    if (weight == weight[0]).all():
        return torch.randperm(len(weight))[:_KEPT_ROWS]
    ends = np.cumsum(weight)
    points = (np.arange(_KEPT_ROWS) + 0.5) * (ends[-1] / _KEPT_ROWS)
    return torch.as_tensor(np.searchsorted(ends, points).clip(max=len(ends) - 1))


class KANRegressor(RegressorMixin, _KANEstimator):
    """A KAN that is trained to the least squared error: fit(X (n, features), y (n,) or (n, outputs)), predict(X), score(X, y).

    hidden_layers: widths between inputs and outputs. grid_size, spline_order, base_activation, outside, backend: see
    KANLayer. epochs, lr, optimizer, weight_decay, activation_l1, activation_entropy, early_stopping: see train_kan; with
    optimizer="lbfgs" a batch is all data. early_stopping holds out validation_fraction of the data and keeps the weights that
    were best on them. dtype: "float32" or "float64". random_state: int, RandomState or None; torch's global random
    numbers are neither used nor changed.

    A sample_weight of w counts a row as w rows. Where all rows fit into one batch and none are held out, integer weights and
    rows that are repeated or left out give the same fit, to the rounding of dtype; otherwise rows are dealt out to batches
    differently, and the fits agree in the gradient that they expect of a batch: the mean over its rows of w / mean(w) times
    the row's loss.

    Attributes after fit: model_ (the KAN of scaled inputs and targets), history_, n_features_in_, feature_names_in_,
    feature_importances_, formula_. plot() draws the network.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "KANRegressor":
        """X (n, features), y (n,) or (n, outputs), NumPy arrays, data frames or lists of finite numbers.

        sample_weight (n,): not negative, one for all rows, or None for equal weights.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, multi_output=True)
        X, y, weight = self._check_weights(X, y, sample_weight)
        self._one_output = y.ndim == 1
        y = y.reshape(len(y), -1).astype(np.float64)
        # In units of a power of two near the largest number squares neither overflow nor vanish, and rounding is the same.
        unit = np.ldexp(1.0, np.frexp(np.abs(y).max(0))[1] - 1)
        y = y / unit
        mean = np.average(y, axis=0, weights=weight)
        spread = np.sqrt(np.average((y - mean) ** 2, axis=0, weights=weight))
        spread = np.where(spread > 0, spread, 1.0)
        self._mean, self._spread = mean * unit, spread * unit
        dtype = getattr(torch, str(self.dtype), torch.float32)
        target = torch.tensor((y - mean) / spread, dtype=dtype)
        self._fit(X, target, weight, y.shape[1], lambda output, y: (output - y).square().mean(1))
        return self

    def predict(self, X: Any) -> Any:
        """X (n, features) -> (n,) or (n, outputs), as y was."""
        y = self._forward(X).numpy() * self._spread + self._mean
        return y[:, 0] if self._one_output else y

    @property
    def formula_(self) -> Any:
        """SymPy expression of the prediction, a list of them where y had two dimensions: see kan_fast.symbolic_extraction.

        Computed anew each time; few hidden units and activation_l1 make short formulas.
        """
        found = [m + s * e for m, s, e in zip(self._mean.tolist(), self._spread.tolist(), self._expressions())]
        return found[0] if self._one_output else found

    def _output_names(self) -> list[str]:
        return ["y"] if self._one_output else [f"y_{i}" for i in range(len(self._mean))]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class KANClassifier(ClassifierMixin, _KANEstimator):
    """A KAN that is trained to the least cross entropy: fit(X (n, features), y (n,)), predict(X), predict_proba(X).

    Parameters as KANRegressor's. Attributes after fit: classes_, and those of KANRegressor.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "KANClassifier":
        """X (n, features), NumPy array, data frame or lists of finite numbers; y (n,) labels of any kind.

        sample_weight (n,): not negative, one for all rows, or None for equal weights. A class whose rows all weigh nothing
        is not among classes_.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        X, y, weight = self._check_weights(X, y, sample_weight)
        self.classes_, index = np.unique(y, return_inverse=True)
        loss = functools.partial(nn.functional.cross_entropy, reduction="none")
        self._fit(X, torch.as_tensor(index), weight, len(self.classes_), loss)
        return self

    def predict_proba(self, X: Any) -> Any:
        """X (n, features) -> (n, classes), in the order of classes_."""
        return self._forward(X).softmax(1).numpy()

    def predict(self, X: Any) -> Any:
        """X (n, features) -> labels (n,)."""
        best = self._forward(X).argmax(1).numpy()
        return self.classes_[best]

    @property
    def formula_(self) -> list[Any]:
        """SymPy expressions of the classes' logits: predict_proba is their softmax. See kan_fast.symbolic_extraction."""
        return self._expressions()

    def _output_names(self) -> list[str]:
        return [str(label) for label in self.classes_]
