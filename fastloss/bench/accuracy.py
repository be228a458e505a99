"""`fastloss bench --suite accuracy`: errors of row losses and gradients, in units in the last place, beside the peers'.

The truth is computed from the same stored scores in a wider type: float64 for float32 scores, the x87's 64-bit mantissa
for float64 scores; `tests/test_accuracy.py` holds it against 50 digits. A row loss counts in units of max(1, |loss|), a
gradient entry in units of its row's largest true entry; a magnitude below the smallest normal number may be 0.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastloss as fl
from fastloss._checks import Array
from fastloss.model import replacing

SCALES = (1.0, 30.0, 1000.0)
OFFSETS = (0.0, 1e4)
CLASSES = (2, 3, 5, 10, 16, 37, 100, 1000, 32768)
FORMS = ("random", "target dominates", "target far below", "ties", "near ties", "levels")
#: Scores in one array of rows, unless one row alone has more.
SIZE = 2**17

#: The hinge losses of the table.
HINGES = tuple(fl.Hinge(over=over, power=power) for over in ("sum", "mean") for power in (1, 2))
#: Scores and targets to row losses and their gradients, both unscaled.
Computation = Callable[[Array, Array], tuple[Array, Array]]


# --- inputs --------------------------------------------------------------------------------------------------------
class Rows(NamedTuple):
    """Rows of one kind, drawn the same way whenever they are asked for."""

    form: str
    scale: float
    offset: float
    classes: int

    def draw(self, dtype: Any, size: int = SIZE, seed: int = 0) -> tuple[Array, Array]:
        """Scores (N, C) of `dtype` and targets (N,), about `size` scores and at least 2 rows."""
        c = self.classes
        n = max(2, min(4096, size // c))
        rng = np.random.default_rng([seed, FORMS.index(self.form), int(self.scale), int(self.offset), c])
        y, row = rng.integers(0, c, n), np.arange(n)
        s = self.scale * rng.standard_normal((n, c))
        top = s.max(axis=1)
        if self.form == "target dominates":
            s[row, y] = top + rng.uniform(3, -0.98 * np.log(float(np.finfo(dtype).smallest_normal)), n)
        elif self.form == "target far below":
            s[row, y] = top - rng.uniform(3, 3000, n)
        elif self.form in ("ties", "near ties", "levels"):
            # One class at the top, the others so far below that all together they weigh about as much.
            depth = np.log(c) + rng.uniform(-3, 3, n)
            levels = 1 + rng.uniform(0, 0.2, (n, 3)) * (self.form == "levels")
            s = (top - np.abs(depth))[:, None] * np.ones(c)
            if self.form == "levels":
                s = top[:, None] - np.abs(depth)[:, None] * np.take_along_axis(levels, rng.integers(0, 3, (n, c)), 1)
            s[row, rng.integers(0, c, n)] = top
            y = np.where(rng.random(n) < 0.5, s.argmax(axis=1), y)
        s = (s + self.offset).astype(dtype)
        if self.form == "near ties":
            s += s * (rng.integers(-2, 3, s.shape) * np.finfo(dtype).eps).astype(dtype)
        return s, y


def all_rows() -> Iterator[Rows]:
    for c in CLASSES:
        for scale in SCALES:
            for offset in OFFSETS:
                for form in FORMS:
                    yield Rows(form, scale, offset, c)


# --- the truth -----------------------------------------------------------------------------------------------------
def widened(array: Array) -> Array:
    """The array in the type that its truth is computed in."""
    if array.dtype.itemsize < 8:
        return array.astype(np.float64)
    if np.finfo(np.longdouble).nmant < 63:
        raise RuntimeError("the truth of float64 needs a long double wider than float64, which this platform lacks")
    return array.astype(np.longdouble)


class Parts(NamedTuple):
    """What softmax is made of, wide: s − m, its exponentials with 0 at the target, their sum, and Σ exp(s − m)."""

    shifted: Array
    exps: Array
    others: Array
    total: Array


def parts(scores: Array, targets: Array) -> Parts:
    s, row = widened(scores), np.arange(len(scores))
    shifted = s - s.max(axis=1, keepdims=True)
    exps = np.exp(shifted)
    at = exps[row, targets].copy()
    exps[row, targets] = 0
    others = exps.sum(axis=1)
    return Parts(shifted, exps, others, others + at)


def exact_softmax(scores: Array, targets: Array) -> tuple[Array, Array]:
    """Row losses and gradient of softmax cross-entropy, wide."""
    p, row = parts(scores, targets), np.arange(len(scores))
    below = p.shifted[row, targets]
    losses = np.where(below == 0, np.log1p(p.others), np.log(p.total) - below)
    gradient = p.exps / p.total[:, None]
    gradient[row, targets] = -p.others / p.total
    return losses, gradient


def exact_hinge(loss: fl.Hinge, scores: Array, targets: Array) -> tuple[Array, Array]:
    """Row losses and gradient of a hinge loss, wide."""
    s, row = widened(scores), np.arange(len(scores))
    m = np.maximum(s - s[row, targets][:, None] + s.dtype.type(loss.margin), 0)
    m[row, targets] = 0
    if loss.over == "max":
        m[np.arange(m.shape[1]) != m.argmax(axis=1)[:, None]] = 0
    gradient = (m > 0).astype(s.dtype) if loss.power == 1 else 2 * m
    gradient[row, targets] = -gradient.sum(axis=1)
    share = m.shape[1] if loss.over == "mean" else 1
    return (m**loss.power).sum(axis=1) / share, gradient / share


def exact_logistic(scores: Array, targets: Array) -> tuple[Array, Array]:
    """Row losses and gradient of the logistic loss, one class against the rest, wide."""
    s, row = widened(scores), np.arange(len(scores))
    s[row, targets] *= -1
    e = np.exp(-np.abs(s))
    gradient = np.where(s < 0, e, 1) / (1 + e)
    gradient[row, targets] *= -1
    return (np.maximum(s, 0) + np.log1p(e)).sum(axis=1), gradient


# --- errors --------------------------------------------------------------------------------------------------------
def unit(magnitude: Array, dtype: Any) -> Array:
    """The unit in the last place of `dtype` for a magnitude, at least the smallest normal number."""
    info = np.finfo(dtype)
    _, exponent = np.frexp(np.maximum(magnitude, magnitude.dtype.type(info.smallest_normal)))
    units: Array = np.ldexp(magnitude.dtype.type(info.eps), exponent - 1)
    return units


def _ulps(found: Array, true: Array, units: Array) -> Array:
    with np.errstate(invalid="ignore"):
        error = np.abs(found.astype(true.dtype) - true) / units
    return np.where(np.isnan(error), np.inf, error)


def loss_ulps(found: Array, true: Array) -> Array:
    """Errors (N,) of row losses, in units of max(1, |loss|)."""
    return _ulps(found, true, unit(np.maximum(np.abs(true), 1), found.dtype))


def gradient_ulps(found: Array, true: Array) -> Array:
    """Errors (N,) of the worst entry of each row, in units of the row's largest true entry."""
    magnitude = np.abs(true)
    error = _ulps(found, true, unit(magnitude.max(axis=1, keepdims=True), found.dtype))
    flushed = (found == 0) & (magnitude < np.finfo(found.dtype).smallest_normal)
    worst: Array = np.where(flushed, 0, error).max(axis=1)
    return worst


def dominated(gradient: Array) -> Array:
    """Rows whose target has all of the probability but a thousandth."""
    small: Array = np.abs(gradient).max(axis=1) < 2.0**-10
    return small


# --- who is compared -----------------------------------------------------------------------------------------------
def _fastloss(loss: fl.Loss = fl.Softmax()) -> Computation:  # noqa: B008  # frozen
    return lambda scores, targets: loss.value_and_grad(scores, targets, reduction="none")


def _numpy() -> Computation:
    """As it is usually written: shifted by the maximum, log of the sum, and 1 subtracted at the target."""

    def compute(scores: Array, targets: Array) -> tuple[Array, Array]:
        row = np.arange(len(scores))
        shifted = scores - scores.max(axis=1, keepdims=True)
        exps = np.exp(shifted)
        total = exps.sum(axis=1)
        gradient = exps / total[:, None]
        gradient[row, targets] -= 1
        return np.log(total) - shifted[row, targets], gradient

    return compute


def _numpy_hinge(loss: fl.Hinge) -> Computation:
    """As it is usually written."""

    def compute(scores: Array, targets: Array) -> tuple[Array, Array]:
        row = np.arange(len(scores))
        margins = np.maximum(scores - scores[row, targets][:, None] + scores.dtype.type(loss.margin), 0)
        margins[row, targets] = 0
        gradient = (margins > 0).astype(scores.dtype) if loss.power == 1 else 2 * margins
        gradient[row, targets] = -gradient.sum(axis=1)
        losses = (margins**loss.power).sum(axis=1)
        return (losses / scores.shape[1], gradient / scores.shape[1]) if loss.over == "mean" else (losses, gradient)

    return compute


def _numpy_logistic() -> Computation:
    """As it is usually written, without overflow."""

    def compute(scores: Array, targets: Array) -> tuple[Array, Array]:
        labels = np.zeros_like(scores)
        labels[np.arange(len(scores)), targets] = 1
        losses = np.maximum(scores, 0) - scores * labels + np.log1p(np.exp(-np.abs(scores)))
        return losses.sum(axis=1), 1 / (1 + np.exp(-scores)) - labels

    return compute


def _torch_logistic() -> Computation:
    torch: Any = import_module("torch")

    def compute(scores: Array, targets: Array) -> tuple[Array, Array]:
        s, labels = torch.from_numpy(scores).requires_grad_(), torch.zeros(scores.shape, dtype=torch.float64)
        labels[torch.arange(len(scores)), torch.from_numpy(targets)] = 1
        losses = torch.nn.functional.binary_cross_entropy_with_logits(s, labels.to(s.dtype), reduction="none").sum(1)
        (gradient,) = torch.autograd.grad(losses.sum(), s)
        return losses.detach().numpy(), gradient.numpy()

    return compute


def _scipy() -> Computation:
    log_softmax: Any = import_module("scipy.special").log_softmax

    def compute(scores: Array, targets: Array) -> tuple[Array, Array]:
        row, log_p = np.arange(len(scores)), log_softmax(scores, axis=1)
        gradient = np.exp(log_p)
        gradient[row, targets] -= 1
        return -log_p[row, targets], gradient

    return compute


def _torch() -> Computation:
    torch: Any = import_module("torch")

    def compute(scores: Array, targets: Array) -> tuple[Array, Array]:
        s = torch.from_numpy(scores).requires_grad_()
        losses = torch.nn.functional.cross_entropy(s, torch.from_numpy(targets), reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), s)
        return losses.detach().numpy(), gradient.numpy()

    return compute


def _torch_hinge(loss: fl.Hinge) -> Computation:
    """`multi_margin_loss`, which is a mean over classes."""
    torch: Any = import_module("torch")

    def compute(scores: Array, targets: Array) -> tuple[Array, Array]:
        s, y = torch.from_numpy(scores).requires_grad_(), torch.from_numpy(targets)
        losses = torch.nn.functional.multi_margin_loss(s, y, p=loss.power, margin=loss.margin, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), s)
        return losses.detach().numpy(), gradient.numpy()

    return compute


def _jax() -> Computation:
    jax: Any = import_module("jax")

    def row_losses(s: Any, y: Any) -> Any:
        return -jax.numpy.take_along_axis(jax.nn.log_softmax(s), y[:, None], axis=1)[:, 0]

    gradient = jax.jit(jax.grad(lambda s, y: row_losses(s, y).sum()))
    losses = jax.jit(row_losses)

    def compute(scores: Array, targets: Array) -> tuple[Array, Array]:
        jax.config.update("jax_enable_x64", scores.dtype == np.float64)  # off, it makes float32 of float64
        return np.asarray(losses(scores, targets)), np.asarray(gradient(scores, targets))

    return compute


#: Name, distribution (its module is called the same), and how it computes.
PEERS: tuple[tuple[str, str, Callable[[], Computation]], ...] = (
    ("fastloss", "fastloss", _fastloss),
    ("PyTorch", "torch", _torch),
    ("JAX", "jax", _jax),
    ("NumPy", "numpy", _numpy),
    ("SciPy", "scipy", _scipy),
)


def hinge_computations(loss: fl.Hinge, names: Sequence[str]) -> dict[str, Computation]:
    """Those of `names` that have this hinge loss."""
    builders = {"fastloss": _fastloss, "NumPy": _numpy_hinge} | (
        {"PyTorch": _torch_hinge} if loss.over == "mean" else {}
    )
    return {name: build(loss) for name, build in builders.items() if name in names}


def logistic_computations(names: Sequence[str]) -> dict[str, Computation]:
    """Those of `names` that have the logistic loss."""
    builders = {
        "fastloss": lambda: _fastloss(fl.Logistic()), "PyTorch": _torch_logistic, "NumPy": _numpy_logistic,
    }  # fmt: skip
    return {name: build() for name, build in builders.items() if name in names}


# --- the table -----------------------------------------------------------------------------------------------------
class Worst(NamedTuple):
    """The worst errors of some rows, in units in the last place."""

    loss: float = 0.0
    gradient: float = 0.0

    def __str__(self) -> str:
        return " / ".join("inf" if e == np.inf else f"{e:.1f}" if e < 100 else f"{e:.0e}" for e in self)


def lines_of(rows: Rows) -> tuple[str, ...]:
    """The lines of the table that rows count in, unless their target dominates."""
    return (
        f"scale {rows.scale:g}, offset {rows.offset:g}",
        f"C = {rows.classes}",
        "ties, near ties, few levels" if rows.form in FORMS[3:] else "random scores",
    )


def measure(dtype: Any, computations: dict[str, Computation], size: int = SIZE) -> dict[str, dict[str, Worst]]:
    """Line of the table → who → the worst errors over all forms of rows."""
    table: dict[str, dict[str, Worst]] = {}
    for rows in all_rows():
        scores, targets = rows.draw(dtype, size)
        losses, gradient = exact_softmax(scores, targets)
        alone = dominated(gradient)
        for name, compute in computations.items():
            with np.errstate(all="ignore"):
                found, found_gradient = compute(scores, targets)
            errors = np.stack([loss_ulps(found, losses), gradient_ulps(found_gradient, gradient)])
            parts_of = [(line, ~alone) for line in lines_of(rows)] + [("target dominates", alone)]
            for line, chosen in parts_of:
                before = table.setdefault(line, {}).get(name, Worst())
                worst = errors[:, chosen].max(axis=1, initial=0)
                table[line][name] = Worst(max(before.loss, float(worst[0])), max(before.gradient, float(worst[1])))
    lines = [line for kind in zip(*map(lines_of, all_rows()), strict=True) for line in kind]
    ordered = {line: table[line] for line in [*dict.fromkeys(lines), "target dominates"]}
    for loss in HINGES:
        line = f"hinge{' squared' if loss.power == 2 else ''}, {loss.over}"
        truth = functools.partial(exact_hinge, loss)
        ordered[line] = measure_all(truth, dtype, hinge_computations(loss, list(computations)), size)
    ordered["logistic"] = measure_all(exact_logistic, dtype, logistic_computations(list(computations)), size)
    return ordered


def measure_all(truth: Computation, dtype: Any, computations: dict[str, Computation], size: int) -> dict[str, Worst]:
    """Who → the worst errors over all rows."""
    cells = dict.fromkeys(computations, Worst())
    for rows in all_rows():
        scores, targets = rows.draw(dtype, size)
        losses, gradient = truth(scores, targets)
        for name, compute in computations.items():
            with np.errstate(all="ignore"):
                found, found_gradient = compute(scores, targets)
            worst = loss_ulps(found, losses).max(), gradient_ulps(found_gradient, gradient).max()
            cells[name] = Worst(*(max(a, float(b)) for a, b in zip(cells[name], worst, strict=True)))
    return cells


def run(dtypes: Sequence[str] = ("float32", "float64"), size: int = SIZE) -> dict[str, Any]:
    """Measure fastloss and the peers that are installed; ready for JSON."""
    present = [(name, module, build) for name, module, build in PEERS if find_spec(module)]
    computations = {name: build() for name, _, build in present}
    tables = {dtype: measure(np.dtype(dtype), computations, size) for dtype in dtypes}
    return {"versions": {name: version(module) for name, module, _ in present}, "worst ulps": tables}


def markdown(result: dict[str, Any]) -> str:
    """The tables of `run`: a cell is the worst row loss / the worst gradient entry."""
    versions: dict[str, str] = result["versions"]
    text = [", ".join(f"{name} {number}" for name, number in versions.items())]
    for dtype, table in result["worst ulps"].items():
        text += ["", f"| {dtype} | " + " | ".join(versions) + " |", "| --- |" + " --- |" * len(versions)]
        for line, cells in table.items():
            text.append(f"| {line} | " + " | ".join(str(cells.get(name, "–")) for name in versions) + " |")
    return "\n".join(text)


def main(json_path: Path | None = None) -> int:
    """Print the tables, and write them to a file; 0."""
    result = run()
    print(markdown(result))
    if json_path is not None:
        with replacing(json_path) as file:
            file.write(json.dumps(result, indent=1).encode())
    return 0
