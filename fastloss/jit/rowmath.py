"""Row losses as steps with one number each: what kernels do with a row, whatever holds it, and on whatever they run.

`build(plan, jit, tools)` makes the functions of one row loss in one type (`tools.real`); `jit` compiles them (on the
CPU they are inlined; in a simulator of GPUs, and in tests, it is the identity: they run on NumPy's scalars). In order:

top          (where `looks`) the larger of two scores, NaN if one is: the maximum m of the row, over all its classes
aim          what the walk starts from: `known`, of a row's m and target's score
step         one class: what the walk keeps of it, and TERMS terms. Terms of all classes are added up, in any order, in
             any parts, wider if that is to be had; for "hinge max" the first is instead the larger of all (`top`)
settle       the row's loss, what else can be asked for, the gradient's entry at the target, and numbers for `close`
close        (where `closes`) one class's entry of the gradient, from what was kept

A walk on a CPU adds a block's terms in the type, blocks in float64. On a GPU each thread adds the terms of some
classes, and partial sums are merged by adding them, those of the first term with what is rounded off (`exact_sum`).

Numbers are never of mixed types: constants are made in the type. The mathematics is that of `backends/reference.py`;
no term cancels another:

- Exponentials of the plain softmax are of s less a multiple of log 2 near the maximum, a difference that is never
  rounded, and are raised by a power of two, so that sums of the smallest lose nothing (`origin`).
- Its loss is log1p of the sum of the others over that of the maximum; the target's entry is −Σ of the others.
- The general softmax takes exponentials of d_j = (bent(s_j) − bent(m)) / T, where bent(s) = softcap tanh(s / softcap).
  With u the target vector, U = Σ u, L = log Σ exp(d) and z = bent(m) / T + L:
      ℓ = U L − Σ u_j d_j + λ z²     gradient = ((U + 2 λ z) p − u) / T · bent'(s)     entropy = L − Σ p_j d_j
  U p − u cancels only where one class has nearly all of both: its entry is made of sums. If u is the same for all
  classes but the target ("flat"), or made of class weights none of which is more than all others together ("even"),
  only the target can be that class.
- Hinge: m_j = (s_j + edge) − rest, where s_y − Δ is −edge + rest, exactly. The sum is exact where m_j is small beside
  s_j; `not m_j <= 0` is active, so that NaN is never swallowed.
- Logistic: with e = exp(−|s|), `away` the weight of the side that s is on and `near` that of the other,
      ℓ = Σ away |s| + (away + near) log(1 + e)        gradient ± (away − near e) / (1 + e)
  Where all weights of a class are 1 together (`grows`), walks may take the logarithm of a product of many 1 + e: `open`
  gives `away` |s| and e, `grow` has the product in twice the precision, `logged` is its logarithm plus a number.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

#: Numbers that `step` returns beside what is kept.
TERMS = 6
#: Numbers in `known`.
KNOWN = 3
#: Where options are in the tuple of numbers that helpers get.
MARGIN, PER_CLASS, CLASSES, AT_TARGET, ELSEWHERE, Z_LOSS, SOFTCAP, PER_TEMPERATURE = range(8)
#: With a softcap, in places that only other losses have: 1 / softcap, and softcap / T.
PER_SOFTCAP, UNIT = MARGIN, PER_CLASS
#: Of the softmax CLASSES is Σ class weights, where these are even.
#: Of the softcap: scores less than that are bent by a polynomial alone.
NEAR = 0.5


class Plan(NamedTuple):
    """What is compiled for; all of it constant when it is."""

    kind: str  # "softmax", "hinge", "hinge max", "logistic"; or a transform: "p", "log p", "lse", "sigmoid"
    general: bool = False  # softmax: options or an extra output beyond the plain form
    probabilities: bool = False  # u comes with the rows
    weights: bool = False  # class weights are part of u; logistic: of targets 0 and of targets 1
    pivots: bool = False  # general: sums leave out the target (else, how many have the maximum is counted)
    smooths: bool = False  # u of other classes than the target is not 0 (not with probabilities)
    softcap: bool = False
    entropy: bool = False
    z_loss: bool = False
    shard: bool = False  # stats of some of the classes are wanted, no loss
    power: int = 1
    mean: bool = False
    pairs: bool = False  # margins of class pairs come with the rows
    counts_target: bool = False

    @property
    def dense(self) -> bool:
        """Whether walks go over u."""
        return self.probabilities or self.weights

    @property
    def has_target(self) -> bool:
        """Whether the gradient's entry at the target is settled with the row, and the walk must know the class."""
        return self.kind in ("softmax", "hinge", "hinge max") and (self.pivots or not self.dense) and not self.shard

    @property
    def even(self) -> bool:
        """Whether of class weights none is more than all others together, which is made use of."""
        return self.pivots and self.weights

    @property
    def has_own(self) -> bool:
        """Whether `settle` takes a number of the target's own: its class weight, or its margin with itself."""
        return self.even or self.counts_target

    @property
    def has_index(self) -> bool:
        """Whether targets are class indices."""
        known = self.kind in ("softmax", "hinge", "hinge max", "logistic")
        return known and not self.probabilities and not self.shard

    @property
    def looks(self) -> bool:
        """Whether the walk starts from the maximum."""
        return not self.is_apart and not self.kind.startswith("hinge")

    @property
    def is_apart(self) -> bool:
        """Whether each class is for itself: with one class, labels are 0 and 1."""
        return self.kind in ("logistic", "sigmoid")

    @property
    def grows(self) -> bool:
        """Whether logarithms may be those of products of classes."""
        return self.kind == "logistic" and not self.weights

    @property
    def closes(self) -> bool:
        """Whether the gradient takes a second walk."""
        return self.kind not in ("hinge", "lse") and not self.is_apart

    @property
    def bends_again(self) -> bool:
        """Whether a softcap is computed once more for the gradient: where walks go over u."""
        return self.softcap and (self.dense or self.smooths)

    @property
    def unit(self) -> int:
        """The option that differences of bent scores are multiplied by (general softmax)."""
        return UNIT if self.softcap else PER_TEMPERATURE

    @property
    def terms(self) -> int:
        """How many of the terms are not 0."""
        if self.is_apart:
            return 1
        if self.kind == "hinge":
            return 2 if self.power == 1 else 3
        return 6 if self.general else 2 if self.kind in ("log p", "lse") else 1


def plan_of(
    loss: Any, probabilities: bool, z: bool = False, entropy: bool = False, shard: bool = False, whole: bool = False
) -> Plan:
    """The plan of a loss; `z` and `entropy`: the row's log Σ exp or entropy is wanted too; `whole`: the terms of all
    classes of a row are of the row's maximum (else, of parts of a row, Σ u of each part is wanted)."""
    if loss.kind == "softmax":
        weights = loss.class_weight is not None and bool(loss.weighs_inside(probabilities))
        general = bool(loss.general) or probabilities or z or entropy or shard
        leaves_one = not (probabilities or shard) and (not weights or are_even(loss.class_weight))
        return Plan(
            "softmax",
            general=general,
            probabilities=probabilities,
            weights=weights,
            pivots=whole and general and leaves_one,
            smooths=loss.label_smoothing > 0,
            softcap=loss.softcap is not None,
            entropy=entropy,
            z_loss=loss.z_loss > 0,
            shard=shard,
        )
    if loss.kind == "logistic":
        return Plan(
            "logistic",
            probabilities=probabilities,
            weights=loss.pos_weight is not None or (loss.class_weight is not None and probabilities),
            smooths=loss.label_smoothing > 0,
            mean=loss.over == "mean",
        )
    return Plan(
        "hinge max" if loss.over == "max" else "hinge",
        power=loss.power,
        mean=loss.over == "mean",
        pairs=loss.pair_margins is not None,
        counts_target=loss.count_target,
    )


def are_even(weights: np.ndarray[Any, Any]) -> bool:
    """Whether no class has more than half of all class weights, whose sum is a number of every compute type."""
    total = float(weights.sum(dtype=np.float64))
    return bool(weights.max(initial=0) <= total / 2 <= np.finfo(np.float32).max / 4)


def numbers_of(loss: Any, classes: int, real: Any) -> np.ndarray[Any, Any]:
    """The options of a loss that are numbers, as the helpers take them (as a tuple of `real`)."""
    found = np.zeros(8)
    found[CLASSES] = classes
    found[PER_CLASS] = found[PER_TEMPERATURE] = 1
    if loss.kind == "softmax":
        if loss.class_weight is not None and are_even(loss.class_weight):
            found[CLASSES] = loss.class_weight.sum(dtype=np.float64)
        found[ELSEWHERE] = loss.label_smoothing / classes
        found[AT_TARGET] = 1 - loss.label_smoothing + loss.label_smoothing / classes
        found[Z_LOSS], found[PER_TEMPERATURE] = loss.z_loss, 1 / loss.temperature
        if loss.softcap is not None:
            found[SOFTCAP], found[PER_SOFTCAP] = loss.softcap, 1 / loss.softcap
            found[UNIT] = loss.softcap / loss.temperature
            found = np.minimum(found, np.finfo(real).max)
    elif loss.kind == "logistic":
        found[AT_TARGET], found[ELSEWHERE] = loss.smoothed
        found[PER_CLASS] = 1 / classes if loss.over == "mean" else 1
    else:
        found[MARGIN] = 0 if loss.pair_margins is not None else loss.margin
        found[PER_CLASS] = 1 / classes if loss.over == "mean" else 1
    return found.astype(real)


def shard_options(loss: Any, plan: Plan, share: float, weights: np.ndarray[Any, Any], real: Any) -> Any:
    """The options of a shard of classes; u, without a target, is `share`, times the class weights if it has them."""
    table = numbers_of(loss, len(weights), real)
    table[ELSEWHERE] = table[AT_TARGET] = share
    return np.concatenate([table, weights.astype(real)]) if plan.weights else table


def table_of(loss: Any, classes: int, plan: Plan) -> np.ndarray[Any, Any] | None:
    """The options of a loss that are numbers of classes, or of class pairs row by row; None if it has none."""
    if plan.pairs:
        return np.asarray(loss.pair_margins).ravel()
    if plan.kind == "logistic":
        found: np.ndarray[Any, Any] | None = loss.column_weights(plan.probabilities, classes)
        return found
    return np.asarray(loss.class_weight) if plan.weights else None


# --- what helpers are made of, in plain NumPy ----------------------------------------------------------------------
def _larger(a: Any, b: Any) -> Any:
    return np.maximum(a, b)


def choose(whether: Any, a: Any, b: Any) -> Any:
    """The tool of that name where numbers are not vectors."""
    return a if whether else b


def plain_tools(real: Any) -> SimpleNamespace:
    """The tools of a type on NumPy's scalars.

    A set of tools has `real` (np.float32 or np.float64); `larger(a, b)`, NaN if one is; `bits(x)`, the number as an
    integer of its size; `number(i)`, the reverse; `choose(whether, a, b)`, a function that `build` compiles; and `exp`,
    quicker for each class than what `functions` makes, though off by up to a unit; or None.
    """
    integer = np.int32 if real is np.float32 else np.int64

    def bits(x: Any) -> Any:
        return real(x).view(integer)

    def number(i: Any) -> Any:
        return integer(i).view(real)

    return SimpleNamespace(
        real=real, integer=integer, larger=_larger, bits=bits, number=number, choose=choose, exp=None
    )  # fmt: skip


class Constants(NamedTuple):
    """What depends on the type alone."""

    mantissa: int
    bias: int
    rounder: float  # adding it rounds to an integer, held in the low bits
    near: float  # see `origin`
    raised: int  # steps by which exponentials are raised
    log2_high: float  # so few bits that its products with numbers of steps are exact
    log2_low: float
    sqrt_half: int
    exp: tuple[float, ...]  # (exp(r) − 1 − r) / r² for at most half a step, at Chebyshev points
    log: tuple[float, ...]  # fdlibm's series
    tanh: tuple[float, ...]  # (tanh(x) / x − 1) / x² below NEAR, at Chebyshev points of x²


CONSTANTS = {
    np.float32: Constants(
        23, 127, 1.5 * 2.0**23, 256.0, 32, 0.693359375, -2.12194440e-4, 0x3F3504F3,
        tuple(map(float.fromhex, ("0x1.6d1109p-10", "0x1.120b6ep-7", "0x1.555519p-5", "0x1.5554ddp-3", "0x1p-1"))),
        (0xF89E26 / 2.0**26, 0x91E9EE / 2.0**25, 0xCCCE13 / 2.0**25, 0xAAAAAA / 2.0**24),
        tuple(map(float.fromhex, (
            "-0x1.c7033cp-8", "0x1.5fc692p-6", "-0x1.b9d2aep-5", "0x1.11108p-3", "-0x1.555554p-2",
        ))),
    ),
    np.float64: Constants(
        52, 1023, 1.5 * 2.0**52, 1536.0, 64, 6.93147180369123816490e-01, 1.90821492927058770002e-10, 0x3FE6A09E667F3BCD,
        tuple(map(float.fromhex, (
            "0x1.af38a9b0ec855p-26", "0x1.289185613a3d6p-22", "0x1.71de0dae63bb3p-19", "0x1.a019b90d2ae7ap-16",
            "0x1.a01a01a7c41d5p-13", "0x1.6c16c1788bd90p-10", "0x1.11111111109b3p-7", "0x1.5555555553d63p-5",
            "0x1.5555555555556p-3", "0x1.0000000000001p-1",
        ))),
        (1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01,
         2.857142874366239149e-01, 3.999999999940941908e-01, 6.666666666666735130e-01),
        tuple(map(float.fromhex, (
            "0x1.f2ddeb9a07da7p-15", "-0x1.cf9f3fe656023p-13", "0x1.32b0b92ad1a40p-11", "-0x1.7d68abe445c4bp-10",
            "0x1.d6d0a485132ebp-9", "-0x1.226e27ed0ac68p-7", "0x1.664f484114832p-6", "-0x1.ba1ba1b9783d6p-5",
            "0x1.1111111110c21p-3", "-0x1.5555555555555p-2",
        ))),
    ),
}  # fmt: skip


def _polynomial(jit: Callable[..., Any], coefficients: tuple[Any, ...]) -> Any:
    """Horner's rule, written out: a loop over a tuple is not unrolled by every compiler."""
    scope = {f"c{k}": c for k, c in enumerate(coefficients)}
    expression = "c0"
    for k in range(1, len(coefficients)):
        expression = f"({expression}) * x + c{k}"
    exec(f"def polynomial(x):\n    return {expression}\n", scope)
    return jit(scope["polynomial"])


def functions(jit: Callable[..., Any], tools: SimpleNamespace) -> SimpleNamespace:
    """exp, log and tanh in plain arithmetic, which compilers turn into vectors; and the exact sum."""
    real, bits, number, integer, choose = tools.real, tools.bits, tools.number, tools.integer, tools.choose
    k = CONSTANTS[real]
    zero, one, two, half = real(0), real(1), real(2), real(0.5)
    mantissa, bias, sqrt_half = integer(k.mantissa), integer(k.bias << k.mantissa), integer(k.sqrt_half)
    rounder, per_log2, high, low = real(k.rounder), real(1.4426950408889634), real(k.log2_high), real(k.log2_low)
    least = real(k.rounder - (k.bias - 1))
    near = real(k.near * k.near)
    raised, limit = real(k.raised), real(NEAR)
    exp_series = _polynomial(jit, tuple(map(real, k.exp)))
    log_series = _polynomial(jit, tuple(map(real, k.log)))
    tanh_series = _polynomial(jit, tuple(map(real, k.tanh)))
    rounder_bits = integer(np.array(k.rounder, real).view(integer))

    def exact_sum(a, b):
        # a + b, and what that, as rounded, lacks (2Sum).
        found = a + b
        part = found - a
        return found, (a - (found - part)) + (b - part)

    exact_sum = jit(exact_sum)

    def number_or_zero(x):
        return choose(x == x, x, zero)

    number_or_zero = jit(number_or_zero)

    def per_class(total, rest, options):
        # A sum over the classes and what it lacks, as rounded, together divided by their number.
        loss = total + rest
        lost = ((total - loss) + rest) * options[PER_CLASS]
        return loss / options[CLASSES] + number_or_zero(lost)

    per_class = jit(per_class)

    def exp(x, start):
        # exp(x − steps · log 2), where start is `rounder` − steps: for results below 2^(raised + 1), or NaN. Below the
        # smallest normal number 0. x − steps · log 2 is never rounded.
        t = x * per_log2 + start
        n = t - start
        r = (x - n * high) - n * low
        q = (exp_series(r) * r + one) * r + one
        found = q * number((bits(t) << mantissa) + bias)
        return choose(t < least, zero, found)

    exp = jit(exp)
    quick_exp = tools.exp or exp

    def origin(m):
        # (shift, start) of a row with maximum m: its exponentials are exp(s − shift, start), at m 2^raised but for half
        # a step. If m is near 0, shift is 0: s − m would be rounded. If it is far, s − m is exact wherever it matters.
        is_near = m * m <= near
        steps = (m * per_log2 + rounder) - rounder
        return choose(is_near, zero, m), rounder - (choose(is_near, steps, zero) - raised)

    origin = jit(origin)

    def log(u, low_part, plus):
        # plus + log(u) + low_part, for normal u > 0, and what that lacks; NaN for u NaN or inf. As fdlibm does it:
        # u = 2^e (1 + f), s = f / (2 + f), a series in s². e · high is exact.
        e_bits = (bits(u) - sqrt_half) >> mantissa
        f = number(bits(u) - (e_bits << mantissa)) - one
        e = number(rounder_bits + e_bits) - rounder
        s = f / (two + f)
        z = s * s
        h = f * f * half
        base, lost = exact_sum(e * high, plus)
        small = low_part + lost
        small = choose(base - base == zero, small, zero)
        part = f - (h - (s * (h + z * log_series(z)) + (e * low + small)))
        found, rest = exact_sum(base, part)
        return found + (u - u), rest

    log = jit(log)

    def tanh_near(x):
        # tanh(x) and its slope, for |x| < NEAR.
        z = x * x
        t = tanh_series(z) * z * x + x
        return t, one - t * t

    tanh_near = jit(tanh_near)

    def tanh(x):
        # Both for any x: the slope is in full, however small it is.
        size = choose(x >= zero, x, -x)
        e = exp(-two * size, rounder)
        r = one / (one + e)
        t, slope = tanh_near(x)
        far, short = (one - e) * r, two * e * r
        is_near = size < limit
        return choose(is_near, t, choose(x >= zero, far, -far)), choose(is_near, slope, short * (two - short))

    tanh = jit(tanh)
    return SimpleNamespace(
        exact_sum=exact_sum, number_or_zero=number_or_zero, exp=exp, quick_exp=quick_exp, origin=origin, log=log,
        tanh=tanh, tanh_near=tanh_near, rounder=rounder, per_class=per_class,
    )  # fmt: skip


def build(plan: Plan, jit: Callable[..., Any], tools: SimpleNamespace, near: bool = False) -> SimpleNamespace:
    """The helpers of a plan; see the module.

    Parameters
    ----------
    plan : Plan
    jit : callable
        Compiles a function for calls from kernels, without any leave to reorder arithmetic; or the identity.
    tools : namespace
        As `plain_tools` describes.
    near : bool
        For rows all of whose scores are less than NEAR of the softcap: `step` and `close`, with half the work.

    Returns
    -------
    namespace with
        top(a, b)
        aim(m, sy, factor, options) → known, a tuple of KNOWN numbers. `m` is 0 where the plan does not look, `sy` where
            it has no target; `factor` multiplies the row's gradient.
        step(x, q, w, is_target, known, options) → kept, and TERMS terms. q: the class's probability, or margin of the
            pair; w: its weight (logistic: what targets 0 and 1 count there); each is 0 where the plan has none.
        settle(m, sy, own, known, sums, low, factor, options) → loss, z, entropy, entry, and 4 numbers for `close`.
            sums: TERMS numbers; low: what the first lacks, as rounded; own: see `Plan.has_own`.
            With `plan.shard`, z is m, entropy the sum of the exponentials but for one maximum, and loss Σ u (−d).
        close(kept, q, w, is_target, known, numbers, options) → an entry of the gradient. Where the plan has a target,
            its entry there is `entry` instead.
        from_stats(x, w, m, pull, share, options) → (general softmax) an entry from stats: m is the maximum times the
            temperature, pull the factor of exponentials, share that of u; without a target.

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.jit import rowmath
    >>> tools = rowmath.plain_tools(np.float64)
    >>> row = rowmath.build(rowmath.Plan("softmax"), lambda f: f, tools)
    >>> options, zero, s = (0.0,) * 8, np.float64(0), np.array([3.2, 5.1, -1.7])
    >>> known = row.aim(s.max(), s[0], 1.0, options)
    >>> steps = [row.step(x, zero, zero, j == 0, known, options) for j, x in enumerate(s)]
    >>> sums = tuple(np.sum([step[1:] for step in steps], axis=0))
    >>> settled = row.settle(s.max(), s[0], zero, known, sums, zero, 1.0, options)
    >>> round(float(settled[0]), 2)
    2.04
    """
    tools = SimpleNamespace(**{**vars(tools), "choose": jit(tools.choose)})
    f = functions(jit, tools)
    made = SimpleNamespace(top=tools.larger, functions=f)
    if plan.kind == "hinge":
        _hinge(plan, jit, tools, f, made)
    elif plan.kind == "hinge max":
        _hinge_max(plan, jit, tools, f, made)
    elif plan.kind == "softmax" and plan.general:
        _general(plan, jit, tools, f, made, near)
    elif plan.kind == "softmax":
        _softmax(jit, tools, f, made)
    elif plan.kind == "logistic":
        _logistic(plan, jit, tools, f, made)
    elif plan.kind == "sigmoid":
        _sigmoid(jit, tools, f, made)
    else:
        _transform(plan, jit, tools, f, made)
    return made


# --- softmax -------------------------------------------------------------------------------------------------------
# Terms: Σ exp but for the target's.
def _softmax(jit: Callable[..., Any], tools: SimpleNamespace, f: SimpleNamespace, made: SimpleNamespace) -> None:
    real, choose = tools.real, tools.choose
    zero, one = real(0), real(1)
    exp, quick_exp, log, exact_sum, origin = f.exp, f.quick_exp, f.log, f.exact_sum, f.origin

    def aim(m, sy, factor, options):
        shift, start = origin(m)
        return shift, start, zero

    def step(x, q, w, is_target, known, options):
        e = quick_exp(x - known[0], known[1])
        return e, choose(is_target, zero, e), zero, zero, zero, zero, zero

    def settle(m, sy, own, known, sums, low, factor, options):
        at_top, at = exp(m - known[0], known[1]), exp(sy - known[0], known[1])
        others = sums[0] + low
        rest = ((sums[0] + (at - at_top)) + low) / at_top  # Σ exp(s − m) − 1
        r = factor / (others + at)
        whole, lost = exact_sum(one, rest)
        above, under = exact_sum(m, -sy)
        loss, _ = log(whole, lost / whole + under, above)
        return loss, zero, zero, -(others * r), r, zero, zero, zero

    def close(kept, q, w, is_target, known, numbers, options):
        return kept * numbers[0]

    made.aim, made.step, made.settle, made.close = jit(aim), jit(step), jit(settle), jit(close)


# Probabilities: Σ exp. Log-probabilities and log-sum-exp: Σ exp of scores that are not m, and how many are.
def _transform(
    plan: Plan, jit: Callable[..., Any], tools: SimpleNamespace, f: SimpleNamespace, made: SimpleNamespace
) -> None:
    real, choose = tools.real, tools.choose
    zero, one = real(0), real(1)
    exp, quick_exp, log, exact_sum, origin = f.exp, f.quick_exp, f.log, f.exact_sum, f.origin

    def aim(m, sy, factor, options):
        shift, start = origin(m)
        return shift, start, m

    def step_p(x, q, w, is_target, known, options):
        e = quick_exp(x - known[0], known[1])
        return e, e, zero, zero, zero, zero, zero

    def settle_p(m, sy, own, known, sums, low, factor, options):
        return zero, zero, zero, zero, one / (sums[0] + low), zero, zero, zero

    def close_p(kept, q, w, is_target, known, numbers, options):
        return kept * numbers[0]

    def step_log(x, q, w, is_target, known, options):
        is_top = x == known[2]
        e = quick_exp(x - known[0], known[1])
        return x, choose(is_top, zero, e), choose(is_top, one, zero), zero, zero, zero, zero

    def settle_log(m, sy, own, known, sums, low, factor, options):
        rest = (sums[0] + low) / exp(m - known[0], known[1]) + (sums[1] - one)
        whole, lost = exact_sum(one, rest)
        z, under = log(whole, lost / whole, m)
        # Where the maximum is infinite, exponentials of all other scores are 0, or NaN.
        is_limit = (m - m != zero) & (m == m) & (sums[0] == sums[0])
        return choose(is_limit, m, z), zero, zero, zero, z, under, zero, zero

    def close_log(kept, q, w, is_target, known, numbers, options):
        return (kept - numbers[0]) - numbers[1]

    made.aim = jit(aim)
    if plan.kind == "p":
        made.step, made.settle, made.close = jit(step_p), jit(settle_p), jit(close_p)
    else:
        made.step, made.settle, made.close = jit(step_log), jit(settle_log), jit(close_log)


# The general form. Terms: Σ e of those that are not 1, and how many are (`pivots`: Σ e but for the target's, and 0);
# Σ u (−d), flat: Σ (−d); dense, but not even: Σ u where e is not 1, and where it is; Σ e (−d). With a softcap, known[0]
# is tanh of the maximum; what is kept are exponentials times slopes or, where u is not 0 but at the target, the scores.
def _general(
    plan: Plan, jit: Callable[..., Any], tools: SimpleNamespace, f: SimpleNamespace, made: SimpleNamespace, near: bool
) -> None:
    real, choose = tools.real, tools.choose
    zero, one, two, nan = real(0), real(1), real(2), real(np.nan)
    exp, log, exact_sum, rounder, tanh, tanh_near = f.quick_exp, f.log, f.exact_sum, f.rounder, f.tanh, f.tanh_near
    dense, probabilities, weights, smooths = plan.dense, plan.probabilities, plan.weights, plan.smooths
    pivots, even, sums_u = plan.pivots, plan.even, plan.dense and not plan.even
    entropy, has_cap, z_loss, shard = plan.entropy, plan.softcap, plan.z_loss, plan.shard
    keeps_slope, unit = has_cap and not plan.bends_again, plan.unit

    def bent(s, options):
        # What is in units of T, or with a softcap of softcap / T; and the slope. Infinite scores stay as they are.
        if near:
            return tanh_near(s * options[PER_SOFTCAP])
        if has_cap:
            t, slope = tanh(s * options[PER_SOFTCAP])
            is_finite = s - s == zero
            return choose(is_finite, t, s), choose(is_finite, slope, one)
        return s, one

    bent = jit(bent)

    def target_part(q, w, is_target, options):
        u = q if probabilities else choose(is_target, options[AT_TARGET], options[ELSEWHERE])
        return u * w if weights else u

    target_part = jit(target_part)

    def product(weight, d):
        # d may be −inf where the weight is 0.
        return choose(weight == zero, zero, weight * d)

    product = jit(product)

    def aim(m, sy, factor, options):
        return bent(m, options)[0], zero, zero

    def step(x, q, w, is_target, known, options):
        at, slope = bent(x, options)
        d = (at - known[0]) * options[unit]
        e = exp(d, rounder)
        is_top = is_target if pivots else e == one
        away, u_others, u_tops, spread = zero, zero, zero, zero
        if dense:
            u = target_part(q, w, is_target, options)
            away = -product(u, d)
            if sums_u:
                u_others, u_tops = choose(is_top, zero, u), choose(is_top, u, zero)
        elif smooths:
            away = -d
        if entropy:
            spread = -product(e, d)
        kept = e * slope if keeps_slope else x if has_cap else e
        count = zero if pivots else choose(is_top, one, zero)
        return kept, choose(is_top, zero, e), count, away, u_others, u_tops, spread

    def settle(m, sy, own, known, sums, low, factor, options):
        others, tops, away, u_others, u_tops = sums[0] + low, sums[1], sums[2], sums[3], sums[4]
        rest = others + (tops - one)
        e, d, slope, least = zero, zero, one, options[AT_TARGET]
        if not sums_u:
            at, slope = bent(sy, options)
            d = (at - known[0]) * options[unit]
            e = exp(d, rounder)
        top = e if pivots else one
        total, lost = exact_sum(e if pivots else tops, others)
        size, _ = log(total, lost / total, zero)
        if sums_u:
            u = u_others + u_tops
        else:
            weight = own if even else one
            u_others = options[ELSEWHERE] * (options[CLASSES] - weight)
            if even:
                least = least * weight
            else:  # least is (1 − ε) + ε / C, whose second part is among the others
                away = (options[ELSEWHERE] * away if smooths else zero) - product(least - options[ELSEWHERE], d)
            u_tops = least
            u = least + u_others
        z = known[0] * options[unit] + size
        loss = u * size + away
        top_pull = u_others * top - u_tops * others
        if z_loss:
            loss += options[Z_LOSS] * (z * z)
            more = two * options[Z_LOSS] * z
            u += more
            top_pull += more * top
        factor = factor * options[PER_TEMPERATURE]
        pull, top, mark = factor * u / total, factor * top_pull / total, choose(tops == one, one, nan)
        entry = (top if pivots else choose(e == mark, top, pull * e - factor * least)) * slope
        if shard:
            return away, m, rest, zero, zero, zero, zero, zero
        return loss, z, size + sums[5] / total, entry, pull, top, factor, mark

    def close(kept, q, w, is_target, known, numbers, options):
        e, slope = kept, one
        if has_cap and not keeps_slope:
            at, slope = bent(kept, options)
            e = exp((at - known[0]) * options[unit], rounder)
        if dense:
            u = target_part(q, w, is_target, options)
            g = numbers[0] * e - numbers[2] * u
            if sums_u:
                g = choose(e == numbers[3], numbers[1], g)
        elif smooths:
            g = numbers[0] * e - numbers[2] * options[ELSEWHERE]
        else:
            g = numbers[0] * e
        return g * slope

    def from_stats(x, w, m, pull, share, options):
        s, slope = bent(x, options)
        if has_cap:
            s = s * options[SOFTCAP]
        g = exp((s - m) * options[PER_TEMPERATURE], rounder) * pull
        if weights or smooths:
            g -= target_part(zero, w, False, options) * share
        return g * slope

    made.aim, made.step, made.settle, made.close = jit(aim), jit(step), jit(settle), jit(close)
    made.from_stats = jit(from_stats)


# --- hinge ---------------------------------------------------------------------------------------------------------
# known: edge, rest, and what an active class's gradient is, or twice its margin is multiplied by.
# Terms, over the active: Σ m_j before the rest is taken off, and their number; or that squared, Σ m_j, and what
# the squares lack.
def _hinge(
    plan: Plan, jit: Callable[..., Any], tools: SimpleNamespace, f: SimpleNamespace, made: SimpleNamespace
) -> None:
    real, choose = tools.real, tools.choose
    zero, one, power = real(0), real(1), real(plan.power)
    exact_sum, number_or_zero, per_class = f.exact_sum, f.number_or_zero, f.per_class
    pairs, linear, mean, counts = plan.pairs, plan.power == 1, plan.mean, plan.counts_target

    def aim(m, sy, factor, options):
        edge, rest = exact_sum(sy, -options[MARGIN])
        return -edge, number_or_zero(rest), factor * (power * options[PER_CLASS])

    def step(x, q, w, is_target, known, options):
        s = x + q if pairs else x
        if linear:
            d = s + known[0]
            idle = is_target | (d <= known[1])
            share = choose(d > known[1], known[2], d)
            return choose(idle, zero, share), choose(idle, zero, d), choose(idle, zero, one), zero, zero, zero, zero
        d, rest = exact_sum(s, known[0])
        idle = is_target | (d <= known[1])
        m = choose(idle, zero, d - known[1])
        d = choose(idle, zero, d)
        rest -= known[1]
        low = choose(idle, zero, rest * ((d + d) + rest))
        return m * known[2], d * d, m, low, zero, zero, zero

    def settle(m, sy, own, known, sums, low, factor, options):
        total, pull = sums[0], sums[1]
        finite = total - total == zero  # of an infinite sum, what it lacks may be any
        rest = choose(finite, low, zero)
        if linear:
            rest -= pull * known[1]
        else:
            rest += choose(finite, sums[2], zero)
        if counts:
            own = choose(own > zero, own, zero)
            total, lost = exact_sum(total, own if linear else own * own)
            rest += number_or_zero(lost)
        loss = total + rest
        entry = choose(loss == loss, -(pull * known[2]), loss)
        if mean:
            loss = per_class(total, rest, options)
        return loss, zero, zero, entry, zero, zero, zero, zero

    def close(kept, q, w, is_target, known, numbers, options):
        return kept

    made.aim, made.step, made.settle, made.close = jit(aim), jit(step), jit(settle), jit(close)


# The first term is the largest s_j − s_y of a wrong class, NaN if one is; margins are kept. The gradient, numbers[0],
# goes to the lowest class whose margin is the largest, numbers[1], or to the first NaN.
def _hinge_max(
    plan: Plan, jit: Callable[..., Any], tools: SimpleNamespace, f: SimpleNamespace, made: SimpleNamespace
) -> None:
    real, choose = tools.real, tools.choose
    zero, one, two, none = real(0), real(1), real(2), real(-np.inf)
    exact_sum, number_or_zero = f.exact_sum, f.number_or_zero
    pairs, linear = plan.pairs, plan.power == 1

    def aim(m, sy, factor, options):
        return sy, options[MARGIN], zero

    def step(x, q, w, is_target, known, options):
        d = (x + q if pairs else x) - known[0]
        d = choose(is_target, none, d)
        return d + known[1], d, zero, zero, zero, zero, zero

    def settle(m, sy, own, known, sums, low, factor, options):
        top, rest = exact_sum(sums[0], known[1])
        active = choose(top <= zero, zero, top)
        slope = two * active
        if linear:
            slope = choose(top > zero, one, active)
        loss = active if linear else active * active + number_or_zero(two * active * rest)
        g = slope * factor
        return loss, zero, zero, -g, g, top, zero, zero

    def close(kept, q, w, is_target, known, numbers, options):
        return kept

    made.aim, made.step, made.settle, made.close = jit(aim), jit(step), jit(settle), jit(close)


# --- logistic ------------------------------------------------------------------------------------------------------
# known: what a class's gradient is multiplied by. Terms: the loss. What is kept is the gradient.
def _logistic(
    plan: Plan, jit: Callable[..., Any], tools: SimpleNamespace, f: SimpleNamespace, made: SimpleNamespace
) -> None:
    real, choose = tools.real, tools.choose
    zero, one = real(0), real(1)
    exp, log, number_or_zero, per_class, rounder = f.quick_exp, f.log, f.number_or_zero, f.per_class, f.rounder
    probabilities, weights, smooths, mean = plan.probabilities, plan.weights, plan.smooths, plan.mean
    is_plain = not (probabilities or weights or smooths)

    def aim(m, sy, factor, options):
        return factor * options[PER_CLASS], zero, zero

    def smoothed(t, options):
        return options[ELSEWHERE] + (options[AT_TARGET] - options[ELSEWHERE]) * t

    smoothed = jit(smoothed)

    def open_plain(x, q, w, is_target, known, options):
        # The gradient, what is not in the logarithm, and e: s counts as −s at the target.
        s = choose(is_target, -x, x)
        e = exp(-choose(s > zero, s, -s), rounder)
        g = choose(s < zero, e * known[0], known[0]) / (one + e)
        return choose(is_target, -g, g), choose(s > zero, s, zero), e, one

    def open_general(x, q, w, is_target, known, options):
        t = q if probabilities else choose(is_target, one, zero)
        positive, negative = t, one - t
        if smooths:
            positive, negative = smoothed(positive, options), smoothed(negative, options)
        if weights:
            positive, negative = positive * w[1], negative * w[0]
        is_positive = x > zero
        away, near = choose(is_positive, negative, positive), choose(is_positive, positive, negative)
        size = choose(is_positive, x, -x)
        e = exp(-size, rounder)
        g = (away - near * e) * known[0] / (one + e)
        return choose(is_positive, g, -g), choose(away == zero, zero, away * size), e, away + near

    open_ = jit(open_plain if is_plain else open_general)

    def logarithm(high, low, plus):
        return log(high, low / high, plus)

    logarithm = jit(logarithm)

    def grow(high, low, e):
        # Times 1 + e.
        found = high + high * e
        return found, (low + ((high - found) + high * e)) + low * e

    def step(x, q, w, is_target, known, options):
        g, loss, e, weight = open_(x, q, w, is_target, known, options)
        whole = one + e
        size, _ = logarithm(whole, (one - whole) + e, zero)
        return g, loss + weight * size, zero, zero, zero, zero, zero

    def settle(m, sy, own, known, sums, low, factor, options):
        total, rest = sums[0], number_or_zero(low)
        loss = total + rest
        if mean:
            loss = per_class(total, rest, options)
        return loss, zero, zero, zero, zero, zero, zero, zero

    def close(kept, q, w, is_target, known, numbers, options):
        return kept

    made.aim, made.step, made.settle, made.close = jit(aim), jit(step), jit(settle), jit(close)
    made.open, made.grow, made.logged = open_, jit(grow), logarithm


def _sigmoid(jit: Callable[..., Any], tools: SimpleNamespace, f: SimpleNamespace, made: SimpleNamespace) -> None:
    real, choose = tools.real, tools.choose
    zero, one = real(0), real(1)
    exp, rounder = f.quick_exp, f.rounder

    def aim(m, sy, factor, options):
        return zero, zero, zero

    def step(x, q, w, is_target, known, options):
        e = exp(-choose(x > zero, x, -x), rounder)
        return choose(x < zero, e, one) / (one + e), zero, zero, zero, zero, zero, zero

    def settle(m, sy, own, known, sums, low, factor, options):
        return zero, zero, zero, zero, zero, zero, zero, zero

    def close(kept, q, w, is_target, known, numbers, options):
        return kept

    made.aim, made.step, made.settle, made.close = jit(aim), jit(step), jit(settle), jit(close)
