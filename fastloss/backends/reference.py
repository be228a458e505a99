"""The NumPy reference: plain, complete, and the definition of every result. All other backends are tested against it.

`row_math` gives, for each loss, the row losses, the gradient of each row with respect to its scores, and what else
can be asked for. The functions of the backend interface below it only multiply, sum and store.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss._checks import Array
from fastloss.backends import Backend, Stats


# --- softmax -------------------------------------------------------------------------------------------------------
def shifted_exp(s: Array) -> tuple[Array, Array, Array, Array]:
    """The parts of a stable softmax: s − m, exp(s − m), and of the latter the sum over all and over all but a maximum.

    m is the row's maximum. NaN or +inf in a row, or no finite score, makes all of them NaN.
    """
    shifted = s - s.max(axis=1, keepdims=True)
    exps = np.exp(shifted)
    others = exps.copy()
    np.put_along_axis(others, s.argmax(axis=1)[:, None], 0, axis=1)
    rest = others.sum(axis=1, keepdims=True)
    rest[np.isnan(shifted).any(axis=1)] = np.nan
    return shifted, exps, 1 + rest, rest


def softmax(s: Array) -> Array:
    """p_j = exp(s_j − m) / Σ_k exp(s_k − m)."""
    _, exps, total, _ = shifted_exp(s)
    return exps / total


def log_softmax(s: Array) -> Array:
    """log p_j = (s_j − m) − log(1 + Σ of the others than the maximum)."""
    shifted, _, _, rest = shifted_exp(s)
    return shifted - np.log1p(rest)


def logsumexp(s: Array) -> Array:
    """m + log(1 + Σ of the others); the limit where m is infinite."""
    m = s.max(axis=1)
    _, _, _, rest = shifted_exp(s)
    return np.where(np.isinf(m), np.where(np.isnan(s).any(axis=1), np.nan, m), m + np.log1p(rest[:, 0]))


def sum_of_others(x: Array) -> Array:
    """Σ_{k≠j} x_k for each j of a row of numbers ≥ 0; that of the largest is summed, not a difference that cancels."""
    top = x.argmax(axis=1)[:, None]
    others: Array = x.copy()
    np.put_along_axis(others, top, 0, axis=1)
    rest = others.sum(axis=1, keepdims=True)
    others = x.sum(axis=1, keepdims=True) - x
    np.put_along_axis(others, top, rest, axis=1)
    return others


def map_scores(loss: Any, s: Array) -> tuple[Array, Any]:
    """Softcap, then temperature; and the derivative of the mapped scores (1 − tanh² is 1 / cosh²)."""
    slope = 1.0 / loss.temperature
    if loss.softcap is not None:
        bent = s / loss.softcap
        slope = np.where(np.isinf(s), 1, 1 / np.square(np.cosh(bent))) * slope
        s = np.where(np.isinf(s), s, loss.softcap * np.tanh(bent))
    return s / loss.temperature, slope


def target_vectors(loss: Any, targets: Array, n: int, c: int) -> Array:
    """u: e_y for a class index, smoothed; class probabilities as they are; times the class weights where inside."""
    if targets.ndim == 2:
        u = targets.astype(np.float64)
    else:
        u = np.full((n, c), loss.label_smoothing / c)
        u[np.arange(n), targets] += 1 - loss.label_smoothing
    if loss.class_weight is not None and loss.weighs_inside(targets.ndim == 2):
        u *= loss.class_weight
    return u


def softmax_rows(loss: Any, scores: Array, targets: Array) -> tuple[Array, Array, dict[str, Array]]:
    """ℓ = U z − ⟨u, s⟩ + λ z² and its gradient (U + 2 λ z) p − u, each without cancellation.

    U z − ⟨u, s⟩ is Σ u_j (−log p_j), and U p_j − u_j is (U − u_j) p_j − u_j (1 − p_j), with sums in place of both
    differences.
    """
    n, c = scores.shape
    s, slope = map_scores(loss, scores)
    shifted, exps, total, rest = shifted_exp(s)
    p = exps / total
    negative_log = np.log1p(rest) - shifted
    u = target_vectors(loss, targets, n, c).astype(s.dtype)
    bad = np.isnan(total[:, 0])
    row_loss = np.where(u == 0, 0, u * negative_log).sum(axis=1)
    gradient = sum_of_others(u) * p - u * (sum_of_others(exps) / total)
    z = s.max(axis=1) + np.log1p(rest[:, 0])
    if loss.z_loss:
        row_loss = row_loss + loss.z_loss * z * z
        gradient = gradient + 2 * loss.z_loss * z[:, None] * p
    gradient = gradient * slope
    row_loss[bad] = np.nan
    gradient[bad] = np.nan
    entropy = np.where(p == 0, 0, p * negative_log).sum(axis=1)
    entropy[bad] = np.nan
    return row_loss, gradient, {"lse": z, "argmax": scores.argmax(axis=1), "entropy": entropy}


def shard_targets(loss: Any, scores: Array, targets: Array, offset: int) -> tuple[Array, Array, Array, Array]:
    """The rows whose target is one of a shard's classes, its column there, its mapped score, and the maps' slope."""
    column = targets.astype(np.int64) - offset
    rows = np.flatnonzero((column >= 0) & (column < scores.shape[1]))
    columns = column[rows]
    s, slope = map_scores(loss, scores[rows, columns].astype(np.float64))
    return rows, columns, s, np.broadcast_to(slope, s.shape)


def shard_weights(loss: Any, offset: int, n_classes: int) -> Array:
    """The class weights of a shard, as label smoothing takes them: (n_classes,)."""
    weights: Array = np.ones(n_classes) if loss.class_weight is None else loss.class_weight[offset : offset + n_classes]
    return weights


def softmax_stats(loss: Any, scores: Array, targets: Array, offset: int) -> Stats:
    """The stats of a shard of the classes; see `Stats`."""
    s, _ = map_scores(loss, scores.astype(np.float64))
    maximum = s.max(axis=1, initial=-np.inf)
    shifted = s - maximum[:, None]
    exps = np.exp(shifted)
    bad = np.isnan(exps).any(axis=1)
    if s.shape[1]:
        np.put_along_axis(exps, s.argmax(axis=1)[:, None], 0, axis=1)
    rest = np.where(maximum == -np.inf, 0, np.where(bad, np.nan, exps.sum(axis=1)))
    weights = shard_weights(loss, offset, s.shape[1])
    away = np.where(weights == 0, 0, weights * np.where(s == -np.inf, np.inf, -shifted)).sum(axis=1)
    return with_targets(loss, scores, targets, offset, maximum, rest, away)


def with_targets(
    loss: Any, scores: Array, targets: Array, offset: int, maximum: Array, rest: Array, away: Array
) -> Stats:
    """Stats of a shard, whose targets are still to be looked up."""
    n, n_classes = scores.shape
    target, found, classes = np.zeros(n), np.zeros(n, np.int64), np.full(n, n_classes, np.int64)
    rows, _, target_scores, _ = shard_targets(loss, scores, targets, offset)
    target[rows], found[rows] = target_scores, 1
    if not loss.label_smoothing:
        return Stats(maximum, rest, target, found, classes, np.full(n, np.nan), np.full(n, np.nan))
    weight = shard_weights(loss, offset, n_classes).sum()
    return Stats(maximum, rest, target, found, classes, np.full(n, weight), away)


def stats_of_sums(
    loss: Any, scores: Array, targets: Array, offset: int, tops: Array, rest: Array, away: Array
) -> Stats:
    """Stats of a shard from its rows' largest scores, Σ exp but for one that has it, and Σ w (m − s), in any type."""
    with np.errstate(all="ignore"):
        maximum = np.asarray(map_scores(loss, tops.astype(np.float64))[0])
        sums = rest.astype(np.float64), away.astype(np.float64)
        stats = with_targets(loss, scores, targets, offset, maximum, *sums)
        empty = np.flatnonzero(tops == -np.inf)  # exp(−inf − −inf) is NaN there, whether the row has one or not
        if len(empty):
            some = softmax_stats(loss, scores[empty], targets[empty], offset)
            stats.rest[empty], stats.away[empty] = some.rest, some.away
    return stats


def stats_shares(loss: Any, stats: Stats, targets: Array) -> tuple[Array, float]:
    """What u is: a number for each row at its target, and another, times the class weights, for all classes."""
    if not loss.label_smoothing:
        return np.ones(len(targets)), 0.0
    share = np.full(len(targets), 1 - loss.label_smoothing)
    if loss.class_weight is not None:
        share *= loss.class_weight[np.clip(targets, 0, len(loss.class_weight) - 1)]  # ignored targets may be outside
    return share, loss.label_smoothing / (stats.classes[0] if len(targets) else 1)


def softmax_stats_rows(loss: Any, stats: Stats, targets: Array) -> Array:
    """The row losses Σ u_j (z − s_j) + λ z², z = m + log(1 + rest), given the stats of all classes."""
    share, smooth = stats_shares(loss, stats, targets)
    log = np.log1p(stats.rest)
    row_loss = np.where(share == 0, 0, share * (log + (stats.maximum - stats.target)))
    if smooth:
        row_loss += smooth * (stats.weight * log + stats.away)
    if loss.z_loss:
        row_loss += loss.z_loss * np.square(stats.maximum + log)
    row_loss[np.isnan(log) | (stats.maximum == -np.inf)] = np.nan
    return row_loss


def stats_pull(loss: Any, stats: Stats) -> Array:
    """2 λ z: what the z-loss adds to Σ u in a gradient."""
    if not loss.z_loss:
        return np.zeros(len(stats.rest))
    return np.asarray(2 * loss.z_loss * (stats.maximum + np.log1p(stats.rest)))


def stats_factors(loss: Any, stats: Stats, targets: Array) -> Array:
    """(Σ u + 2 λ z) / Σ exp(s − m): what exponentials are multiplied by in the gradient."""
    share, smooth = stats_shares(loss, stats, targets)
    if smooth:
        share = share + smooth * stats.weight
    return np.asarray((share + stats_pull(loss, stats)) / (1 + stats.rest))


def stats_entries(loss: Any, stats: Stats, targets: Array, rows: Array, classes: Array, s: Array) -> Array:
    """The gradient at some classes of some rows, before the maps' slope.

    (Σ_{k≠j} u_k) p_j − u_j Σ_{k≠j} p_k + 2 λ z p_j: no difference cancels. s: the mapped scores there; rest +
    (1 − exp(s_j − m)) is the sum of the others' exponentials.
    """
    share, smooth = stats_shares(loss, stats, targets)
    d, rest = s - stats.maximum[rows], stats.rest[rows]
    is_target = targets[rows] == classes
    u, others = np.where(is_target, share[rows], 0), np.where(is_target, 0, share[rows])
    if smooth and loss.class_weight is None:
        u, others = u + smooth, others + smooth * (stats.classes[rows] - 1)
    elif smooth:
        weight = loss.class_weight
        u, others = u + smooth * weight[classes], others + smooth * sum_of_others(weight[None])[0, classes]
    pull = others + stats_pull(loss, stats)[rows]
    return np.asarray((pull * np.exp(d) + u * (np.expm1(d) - rest)) / (1 + rest))


def target_entries(loss: Any, scores: Array, targets: Array, offset: int, stats: Stats) -> tuple[Array, Array, Array]:
    """The gradient's entries at the targets in a shard: rows, columns, entries."""
    rows, columns, s, slope = shard_targets(loss, scores, targets, offset)
    return rows, columns, stats_entries(loss, stats, targets, rows, columns + offset, s) * slope


def heavy_entries(loss: Any, scores: Array, targets: Array, offset: int, stats: Stats) -> tuple[int, Array] | None:
    """The column of the class with the largest weight within label smoothing, and the gradient's entries there.

    Only there, and at the target, can one class have nearly all of Σ u, where a difference would cancel.
    """
    column = -1 if loss.class_weight is None or not loss.label_smoothing else int(loss.class_weight.argmax()) - offset
    if not 0 <= column < scores.shape[1]:
        return None
    s, slope = map_scores(loss, scores[:, column].astype(np.float64))
    rows = np.arange(len(scores))
    return column, stats_entries(loss, stats, targets, rows, rows * 0 + column + offset, s) * slope


def put_entries(grad: Array, entries: tuple[int, Array] | None, multiplier: Array | None, scale: float) -> None:
    """Write `heavy_entries`, times the multiplier and the scale, to the gradient of all rows."""
    if entries is None:
        return
    column, entry = entries
    with np.errstate(all="ignore"):
        weight = scale if multiplier is None else multiplier * scale
        grad[:, column] = np.where(weight == 0, 0, entry * weight)


def softmax_stats_gradient(loss: Any, scores: Array, targets: Array, offset: int, stats: Stats) -> Array:
    """(U + 2 λ z) p − u for a shard of the classes, given the stats of all."""
    s, slope = map_scores(loss, scores.astype(np.float64))
    rows, classes = np.arange(len(s))[:, None], offset + np.arange(s.shape[1])[None]
    return np.asarray(stats_entries(loss, stats, targets, rows, classes, s) * slope)


def softmax_hvp(loss: Any, scores: Array, targets: Array, direction: Array) -> Array:
    """The Hessian of a row loss times a direction: U (p ∘ v − p ⟨p, v⟩) / T²."""
    s, _ = map_scores(loss, scores)
    p = softmax(s)
    total_u = target_vectors(loss, targets, *scores.shape).sum(axis=1, keepdims=True)
    spread = p * direction - p * (p * direction).sum(axis=1, keepdims=True)
    return np.asarray(total_u * spread / loss.temperature**2)


# --- hinge ---------------------------------------------------------------------------------------------------------
def margins(loss: Any, s: Array, targets: Array) -> Array:
    """m_j = s_j − s_y + Δ; −inf (never active) at the target, unless it counts."""
    n = np.arange(len(s))
    delta = loss.margin if loss.pair_margins is None else loss.pair_margins[targets]
    m: Array = s - s[n, targets][:, None] + np.asarray(delta, s.dtype)
    m[n, targets] = np.broadcast_to(delta, s.shape)[n, targets] if loss.count_target else -np.inf
    return m


def hinge_rows(loss: Any, scores: Array, targets: Array) -> tuple[Array, Array, dict[str, Array]]:
    """Σ, mean or max over the wrong classes of max(0, m_j)^power; NaN is active, so that it propagates."""
    n, c = np.arange(len(scores)), scores.shape[1]
    m = margins(loss, scores, targets)
    if loss.over == "max":
        best = m.argmax(axis=1)  # the first NaN, else the lowest class that has the maximum
        kept = np.full_like(m, -np.inf)
        kept[n, best] = m[n, best]
        m = kept
    active = ~(m <= 0)
    clipped = np.where(active, m, 0)
    per_class = clipped**loss.power
    gradient = np.where(active, np.where(np.isnan(m), m, 1), 0) if loss.power == 1 else 2 * clipped
    gradient[n, targets] = 0
    gradient[n, targets] = -gradient.sum(axis=1)
    row_loss = per_class.sum(axis=1)
    if loss.over == "mean":
        row_loss, gradient = row_loss / c, gradient / c
    return row_loss, gradient.astype(scores.dtype), {"argmax": scores.argmax(axis=1)}


def hinge_hvp(loss: Any, scores: Array, targets: Array, direction: Array) -> Array:
    """The generalised Hessian of the squared hinge: Σ over active j of 2 (v_j − v_y)(e_j − e_y)."""
    n, c = np.arange(len(scores)), scores.shape[1]
    m = margins(loss, scores, targets)
    m[n, targets] = -np.inf
    if loss.over == "max":
        keep = np.zeros(m.shape, bool)
        keep[n, m.argmax(axis=1)] = True
        m = np.where(keep, m, -np.inf)
    curve = np.where(m <= 0, 0, 2 * (direction - direction[n, targets][:, None]) + np.where(np.isnan(m), m, 0))
    curve[n, targets] = -curve.sum(axis=1)
    return np.asarray(curve / (c if loss.over == "mean" else 1))


def softmax_hess_diag(loss: Any, scores: Array, targets: Array) -> Array:
    """∂²ℓ / ∂s_j²: U p_j (1 − p_j) / T², with Σ of the others for 1 − p_j."""
    s, _ = map_scores(loss, scores)
    _, exps, total, _ = shifted_exp(s)
    p = exps / total
    weighs = targets.ndim == 2 or loss.label_smoothing or (loss.class_weight is not None and loss.weighs_inside(False))
    total_u = target_vectors(loss, targets, *scores.shape).sum(axis=1, keepdims=True) if weighs else 1.0
    return np.asarray(total_u * p * (sum_of_others(exps) / total) / loss.temperature**2)


def hinge_hess_diag(loss: Any, scores: Array, targets: Array) -> Array:
    """The generalised diagonal for the squared hinge: 2 where a class is active, for the target twice their number."""
    n, c = np.arange(len(scores)), scores.shape[1]
    m = margins(loss, scores, targets)
    m[n, targets] = -np.inf
    if loss.over == "max":
        keep = np.zeros(m.shape, bool)
        keep[n, m.argmax(axis=1)] = True
        m = np.where(keep, m, -np.inf)
    curve = np.where(np.isnan(m), m, np.where(m > 0, 2.0, 0.0))
    curve[n, targets] = curve.sum(axis=1)
    return np.asarray(curve / (c if loss.over == "mean" else 1))


# --- logistic ------------------------------------------------------------------------------------------------------
def sigmoid(s: Array) -> Array:
    """1 / (1 + exp(−s)), accurate at both ends."""
    e = np.exp(-np.abs(s))
    return np.asarray(np.where(s < 0, e, 1) / (1 + e))


def two_sides(loss: Any, targets: Array, n: int, c: int) -> tuple[Array, Array]:
    """What log(1 + exp(−s)) and log(1 + exp(s)) are multiplied by in each row's loss: t and 1 − t, weighted."""
    if targets.ndim == 2:
        t = targets.astype(np.float64)
    elif c == 1:
        t = (targets == 1).astype(np.float64)[:, None]
    else:
        t = np.zeros((n, c))
        t[np.arange(n), targets] = 1
    high, low = loss.smoothed
    positive, negative = low + (high - low) * t, low + (high - low) * (1 - t)
    weights = loss.column_weights(targets.ndim == 2, c)
    return (positive, negative) if weights is None else (positive * weights[c:], negative * weights[:c])


def logistic_rows(loss: Any, scores: Array, targets: Array) -> tuple[Array, Array, dict[str, Array]]:
    """Σ_j α_j log(1 + exp(−s_j)) + β_j log(1 + exp(s_j)), and its gradient β_j σ(s_j) − α_j σ(−s_j).

    α and β are t and 1 − t, weighted. Where one is 0 its side counts nothing, however large the score.
    """
    n, c = scores.shape
    positive, negative = (side.astype(scores.dtype) for side in two_sides(loss, targets, n, c))
    per_class = np.where(positive == 0, 0, positive * np.logaddexp(0, -scores))
    per_class = per_class + np.where(negative == 0, 0, negative * np.logaddexp(0, scores))
    row_loss = np.where(np.isnan(scores), np.nan, per_class).sum(axis=1)
    gradient = negative * sigmoid(scores) - positive * sigmoid(-scores)
    if loss.over == "mean":
        row_loss, gradient = row_loss / c, gradient / c
    return row_loss, gradient, {"argmax": scores.argmax(axis=1) if c else np.zeros(n, np.intp)}


def logistic_hess_diag(loss: Any, scores: Array, targets: Array) -> Array:
    """∂²ℓ / ∂s_j²: (α + β) σ(s_j) σ(−s_j)."""
    weight = sum(two_sides(loss, targets, *scores.shape)) / (scores.shape[1] if loss.over == "mean" else 1)
    return np.asarray(weight * sigmoid(scores) * sigmoid(-scores))


def logistic_hvp(loss: Any, scores: Array, targets: Array, direction: Array) -> Array:
    """The Hessian of a row loss, which is diagonal, times a direction."""
    return np.asarray(logistic_hess_diag(loss, scores, targets) * direction)


ROWS = {"softmax": softmax_rows, "hinge": hinge_rows, "logistic": logistic_rows}
HVP = {"softmax": softmax_hvp, "hinge": hinge_hvp, "logistic": logistic_hvp}
HESS_DIAG = {"softmax": softmax_hess_diag, "hinge": hinge_hess_diag, "logistic": logistic_hess_diag}
TRANSFORMS = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp, "sigmoid": sigmoid}


def row_math(loss: Any, scores: Array, targets: Array) -> tuple[Array, Array, dict[str, Array]]:
    """Row losses (N,), row gradients (N, C) and extra outputs of a loss, in the dtype of the scores."""
    with np.errstate(all="ignore"):
        row_loss, gradient, extras = ROWS[loss.kind](loss, scores, targets)
    return row_loss.astype(scores.dtype), gradient.astype(scores.dtype), {"row_loss": row_loss, **extras}


def why_no_hessian(loss: Any) -> str | None:
    """Why a loss has no Hessian products; None if it has."""
    if loss.kind == "hinge" and loss.power == 1:
        return "Hinge(power=1) has no second derivative; use power=2"
    if loss.kind == "softmax" and (loss.z_loss or loss.softcap is not None):
        return "Hessian products are not defined here for Softmax with z_loss or softcap"
    return None


def hvp_rows(loss: Any, scores: Array, targets: Array, multiplier: Array | None, direction: Array) -> Array:
    """multiplier · (Hessian of ℓ) · direction, for each row."""
    live = live_rows(multiplier)
    product = np.zeros_like(direction)
    with np.errstate(all="ignore"):
        curve = HVP[loss.kind](loss, scores[live], targets[live], direction[live])
    product[live] = curve if multiplier is None else curve * multiplier[live, None]
    return product


# --- penalties -----------------------------------------------------------------------------------------------------
def wide(W: Array) -> Array:
    """W in a type that its squares and sums fit in."""
    return W if W.dtype in (np.float32, np.float64) else W.astype(np.float64)


def l2(W: Array, strength: float) -> tuple[float, Array]:
    """λ Σ W² and its gradient 2 λ W."""
    W = wide(W)
    return strength * float(np.sum(W * W, dtype=np.float64)), 2 * strength * W


def l1(W: Array, strength: float) -> tuple[float, Array]:
    """λ Σ |W| and its subgradient λ sign(W), 0 at 0."""
    W = wide(W)
    return strength * float(np.sum(np.abs(W), dtype=np.float64)), strength * np.sign(W)


def elastic_net(W: Array, strength: float, beta: float) -> tuple[float, Array]:
    """λ (β Σ W² + Σ |W|) and its subgradient."""
    (square, square_gradient), (absolute, absolute_gradient) = l2(W, strength * beta), l1(W, strength)
    return square + absolute, square_gradient + absolute_gradient


def soft_threshold(W: Array, threshold: float) -> Array:
    """The proximal step of threshold · Σ |W|: sign(W) max(0, |W| − threshold)."""
    return np.sign(W) * np.maximum(np.abs(W) - threshold, 0)


def max_norm(W: Array, radius: float) -> Array:
    """The projection of each class's weights (a row) onto the ball ‖w‖₂ ≤ radius."""
    norm = np.sqrt(np.sum(np.square(W, dtype=np.float64), axis=1, keepdims=True))
    return np.where(norm > radius, W * (radius / np.where(norm > 0, norm, 1)), W).astype(W.dtype)


def live_rows(multiplier: Array | None) -> Any:
    """An index of the rows that are not skipped."""
    return slice(None) if multiplier is None else np.flatnonzero(multiplier != 0)


# --- the backend interface -----------------------------------------------------------------------------------------
def load(variant: str) -> ReferenceBackend:
    """The only variant."""
    return ReferenceBackend()


class ReferenceBackend(Backend):
    """NumPy on whole arrays; see `Backend` for what each function is given."""

    name = "reference"

    def __str__(self) -> str:
        return "NumPy on whole arrays"

    def why_not(self, verb: str, loss: Any, dtype: np.dtype[Any], needs: tuple[str, ...]) -> str | None:
        return why_no_hessian(loss) if verb == "hvp" else None

    @np.errstate(all="ignore")
    def score_rows(
        self, loss: Any, scores: Array, targets: Array, multiplier: Array | None, scale: float,
        grad: Array | None, row_loss: Array | None, extras: dict[str, Array], n_threads: int,
    ) -> float:  # fmt: skip
        live = live_rows(multiplier)
        weight = None if multiplier is None else multiplier[live]
        losses, gradient, more = row_math(loss, scores[live], targets[live])
        if grad is not None:
            grad[...] = 0
            grad[live] = gradient * scale if weight is None else gradient * (weight * scale)[:, None]
        for name, array in ({"row_loss": row_loss} | extras).items():
            if array is not None:
                array[...] = 0
                array[live] = more[name]
        return float(np.sum(losses if weight is None else losses * weight, dtype=np.float64))

    @np.errstate(all="ignore")
    def linear_rows(
        self, loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
        multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: Array | None,
        row_loss: Array | None, chunk_rows: int | None, n_threads: int,
    ) -> float:  # fmt: skip
        if rows is not None:
            X, targets = X[rows], targets[rows]
            multiplier = None if multiplier is None else multiplier[rows]
        live = live_rows(multiplier)
        features = X[live].astype(W.dtype, copy=False)
        if centre is not None:
            features = features - centre
        scores = features @ W.T if b is None else features @ W.T + b
        gradient = np.empty_like(scores)
        losses = None if row_loss is None else np.empty_like(row_loss[live])
        kept = None if multiplier is None else multiplier[live]
        value = self.score_rows(loss, scores, targets[live], kept, 1.0, gradient, losses, {}, n_threads)
        if dW is not None:
            dW[...] = scale * (gradient.T @ features)
        if db is not None:
            db[...] = scale * gradient.sum(axis=0)
        if dX is not None:
            dX[...] = 0
            dX[live] = scale * (gradient @ W)
        if row_loss is not None:
            row_loss[...] = 0
            row_loss[live] = losses
        return value

    def hvp_rows(self, loss: Any, scores: Array, targets: Array, multiplier: Array | None, direction: Array) -> Array:
        return hvp_rows(loss, scores, targets, multiplier, direction)

    def stats_rows(self, loss: Any, scores: Array, targets: Array, offset: int, n_threads: int) -> Stats:
        with np.errstate(all="ignore"):
            return softmax_stats(loss, scores, targets, offset)

    def stats_gradient_rows(
        self, loss: Any, scores: Array, targets: Array, offset: int, stats: Stats, multiplier: Array | None,
        scale: float, grad: Array, n_threads: int,
    ) -> None:  # fmt: skip
        live = live_rows(multiplier)
        kept = Stats(*(array[live] for array in stats))
        with np.errstate(all="ignore"):
            gradient = softmax_stats_gradient(loss, scores[live], targets[live], offset, kept)
            grad[...] = 0
            grad[live] = scale * gradient if multiplier is None else scale * gradient * multiplier[live, None]

    def transform(self, kind: str, scores: Array, out: Array, n_threads: int) -> None:
        with np.errstate(all="ignore"):
            out[...] = TRANSFORMS[kind](scores) if scores.size else 0
