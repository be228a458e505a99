"""What a loss is: its options, their checks, and the methods that compute it. No loop over elements is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np

from fastloss import _checks as checks
from fastloss import driver
from fastloss._checks import Array
from fastloss.backends import Stats, reference

#: How much a loss keeps of what is made of it: for as many types, numbers of classes, and shapes of a backend's calls.
KEPT = 256


def _frozen_array(value: object) -> Array:
    array = np.array(value, dtype=np.float64)
    array.flags.writeable = False
    return array


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """A multiclass loss of scores `(N, C)` and targets `(N,)`.

    Parameters
    ----------
    class_weight : array (C,), optional
        A finite weight, at least 0, for each class: a row counts with the weight of its target.
    ignore_index : int, optional
        Rows with this target are skipped: no loss, no gradient, no weight. It may be outside `[0, C)`.
    """

    class_weight: Any = None
    ignore_index: int | None = None

    #: What the backends know the loss by.
    kind: ClassVar[str]
    #: Extra outputs that have a meaning for this loss.
    extra_outputs: ClassVar[tuple[str, ...]] = ("row_loss", "argmax")
    #: Options in use that need the general form of a kernel; filled in by `__post_init__`.
    general: tuple[str, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.class_weight is not None:
            weight = checks.as_array(self.class_weight, "class_weight")
            if weight.ndim != 1:
                raise ValueError(f"class_weight has shape {weight.shape}; it must be (C,): one for each class")
            checks.finite_nonnegative(weight, "class_weight")
            self._set("class_weight", _frozen_array(weight))
        if self.ignore_index is not None:
            self._set("ignore_index", checks.integer(self.ignore_index, "ignore_index"))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _key(self) -> tuple[object, ...]:
        values = (getattr(self, f.name) for f in fields(self))
        return (type(self), *((v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loss) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __getstate__(self) -> dict[str, object]:
        """The options alone: what calls keep with a loss, such as addresses, is of no use to a copy."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def converted(self, name: str, dtype: np.dtype[Any]) -> Array | None:
        """An option that is an array, or None, in a dtype: converted once."""

        def convert() -> Array | None:
            value = getattr(self, name)
            return None if value is None else np.ascontiguousarray(value, dtype)

        found: Array | None = self.once((name, dtype), convert)
        return found

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What is made of the options for a purpose, kept with the loss from its first use on."""
        kept: dict[tuple[Any, ...], Any] = self.__dict__.setdefault("_kept", {})
        try:
            return kept[key]
        except KeyError:
            made = make()
        if len(kept) >= KEPT:
            kept.clear()
        kept[key] = made
        return made

    def labels(self, n_classes: int) -> int:
        """How many class indices there are for scores of `n_classes` columns: targets are below this."""
        return n_classes

    def check_classes(self, n_classes: int, probabilities: bool = False) -> None:
        """Raise if an option does not fit scores of `n_classes` classes, and targets that are indices or (N, C)."""
        wanted = n_classes if probabilities else self.labels(n_classes)
        if self.class_weight is not None and self.class_weight.shape != (wanted,):
            raise ValueError(
                f"class_weight has shape {self.class_weight.shape}, but scores have {n_classes} classes: "
                f"it must be ({wanted},)"
            )

    #: What each number of targets (N, C) may be at most.
    most_of_targets: ClassVar[float] = np.inf

    def check_probabilities(self) -> None:
        """Raise unless the targets may be class probabilities."""
        raise ValueError(f"targets are class probabilities; {type(self).__name__} takes class indices (N,)")

    def check_shards(self) -> None:
        """Raise unless the class axis may be split in shards."""
        raise ValueError(
            f"{type(self).__name__} has no stats: every class is compared with the target's score, which one shard has"
        )

    def rows_from_stats(self, stats: Stats, targets: Array) -> Array:
        """The row losses from the stats of all classes."""
        raise NotImplementedError

    def weighs_inside(self, probabilities: bool) -> bool:
        """Whether class weights are part of the row loss itself, not one multiplier for each row."""
        return False

    def value(
        self,
        scores: object,
        targets: object,
        *,
        sample_weight: object = None,
        reduction: str = "mean",
        outputs: tuple[str, ...] = (),
        backend: str | None = None,
        n_threads: int | None = None,
        check: bool = False,
    ) -> Any:
        """The loss.

        Parameters
        ----------
        scores : array (N, C)
            Float16, bfloat16, float32, float64 or integers; computed in float32 or float64.
        targets : array (N,) of any integer type
            Class indices in `[0, C)`; for `Softmax` also probabilities `(N, C)`, for `Logistic` labels `(N, C)`.
        sample_weight : array (N,), optional
            Finite, at least 0. Rows of weight 0 are skipped, even with NaN in them.
        reduction : {"mean", "sum", "none"}
            With w the applied weights: Σ w ℓ / Σ w, Σ w ℓ, or the array w ℓ. A mean over no weight is NaN.
        outputs : tuple of str
            Extra results: "row_loss" (unweighted), "argmax", and for `Softmax` "lse" and "entropy"; each `(N,)`.
        backend : str, optional
            A backend by name (see `fastloss.list_backends`), instead of the automatic choice.
        n_threads : int, optional
            Threads to use, instead of `fastloss.get_num_threads()`. Results do not depend on it; nor does a GPU.
        check : bool
            Of arrays on a GPU: wait for it, and raise for what it found to be wrong with them (see below).

        Arrays may be on a GPU: CuPy's, PyTorch's CUDA tensors, numba-cuda's device arrays, or others with
        `__cuda_array_interface__` (float16 to float64 scores). The call is then queued on the current stream of their
        library, and does not wait; results are arrays of the same kind, the value one without dimensions (float64).
        Targets outside the classes, and weights that are no weights, give rows of NaN there; the error is raised by the
        next call, by `fastloss.synchronize()`, or at once with `check=True`.

        Returns
        -------
        value : float, or array (N,) for `reduction="none"`
        extras : dict of arrays, only if `outputs` is not empty

        Raises
        ------
        ValueError, TypeError
            For arguments that do not fit; before anything is computed.
        fastloss.BackendError
            If the named backend cannot serve the call.

        Examples
        --------
        >>> import fastloss as fl
        >>> round(fl.Softmax().value([[3.2, 5.1, -1.7]], [0]), 2)
        2.04
        >>> round(fl.Hinge().value([[3.2, 5.1, -1.7]], [0]), 2)
        2.9
        """
        value, _, extras = driver.scores_call(
            self, scores, targets, False, None, sample_weight, reduction, None, outputs, backend, n_threads, check
        )
        return (value, extras) if outputs else value

    def value_and_grad(
        self,
        scores: object,
        targets: object,
        *,
        out: Array | None = None,
        sample_weight: object = None,
        reduction: str = "mean",
        upstream: object = None,
        outputs: tuple[str, ...] = (),
        backend: str | None = None,
        n_threads: int | None = None,
        check: bool = False,
    ) -> Any:
        """The loss and its gradient with respect to the scores.

        Parameters
        ----------
        out : array (N, C), optional
            Receives the gradient; of the scores' dtype (float64 for integers). `out=scores` works in place.
        upstream : float, or array (N,) with `reduction="none"`, optional
            The gradient is multiplied by it, as in the chain rule. The value is not.

        The other parameters, and what is raised, are those of `value`.

        Returns
        -------
        value : float, or array (N,) for `reduction="none"`
        grad : array (N, C)
        extras : dict of arrays, only if `outputs` is not empty

        Examples
        --------
        >>> import fastloss as fl
        >>> value, grad = fl.Softmax().value_and_grad([[30.0, 10.0, 5.0, 0.0]], [0])
        >>> print(f"{grad[0, 0]:.1e}")
        -2.1e-09
        """
        value, grad, extras = driver.scores_call(
            self, scores, targets, True, out, sample_weight, reduction, upstream, outputs, backend, n_threads, check
        )
        return (value, grad, extras) if outputs else (value, grad)

    def hess_diag(
        self,
        scores: object,
        targets: object,
        *,
        out: Array | None = None,
        sample_weight: object = None,
        n_threads: int | None = None,
    ) -> Array:
        """The diagonal of each row's Hessian with respect to its scores, times the row's weight: what boosting needs.

        For `Hinge(power=2)` a generalised one: 2 for each class whose margin is above 0.

        Parameters
        ----------
        scores, targets, sample_weight, n_threads
            As in `value`; scores are computed in float32 or float64, on the host in NumPy, by blocks of rows.
        out : array (N, C), optional
            Receives the result, of any float type (on a GPU of the scores').

        Returns
        -------
        array (N, C) of the scores' float type

        Raises
        ------
        BackendError
            If the loss has no second derivative: Hinge(power=1), and Softmax with z_loss or softcap.

        Examples
        --------
        >>> import fastloss as fl
        >>> fl.Softmax().hess_diag([[0.0, 0.0], [0.0, 0.0]], [0, 1]).tolist()
        [[0.25, 0.25], [0.25, 0.25]]
        """
        return driver.hess_diag_call(self, scores, targets, out, sample_weight, n_threads)

    def stats(
        self,
        scores: object,
        targets: object,
        *,
        offset: int = 0,
        backend: str | None = None,
        n_threads: int | None = None,
    ) -> Stats:
        """What the scores of some of the classes tell about each row, where the class axis is split in shards.

        Merge the stats of all shards, then ask for the value and, with each shard's scores again, for its gradient.
        Scores may be on a GPU: then so are stats, the value and the gradients, and what is wrong with targets is raised
        by a later call.

        Parameters
        ----------
        scores : array (N, any number of classes)
            The scores of the shard.
        targets : array (N,) of any integer type
            Class indices among all classes; most are in other shards.
        offset : int
            The index of the shard's first class.
        backend, n_threads
            As in `value`.

        Returns
        -------
        Stats

        Raises
        ------
        ValueError, TypeError
            For arguments that do not fit, and for losses and options that cannot be split.

        Examples
        --------
        >>> import numpy as np, fastloss as fl
        >>> scores, targets, loss = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([3]), fl.Softmax()
        >>> left, right = scores[:, :2], scores[:, 2:]
        >>> stats = loss.stats(left, targets).merge(loss.stats(right, targets, offset=2))
        >>> loss.gradient_from_stats(right, targets, stats, offset=2).round(4).tolist()
        [[0.2369, -0.3561]]
        """
        return driver.stats_call(self, scores, targets, offset, backend, n_threads)

    def value_from_stats(
        self, stats: Stats, targets: object, *, sample_weight: object = None, reduction: str = "mean"
    ) -> Any:
        """The loss, from the stats of all classes; see `stats`. Weights and reductions are those of `value`.

        Returns
        -------
        value : float, or array (N,) of float64 for `reduction="none"`

        Raises
        ------
        ValueError
            If a target's class is in none of the merged shards, or in several.
        """
        return driver.stats_value_call(self, stats, targets, sample_weight, reduction)

    def gradient_from_stats(
        self,
        scores: object,
        targets: object,
        stats: Stats,
        *,
        offset: int = 0,
        out: Array | None = None,
        sample_weight: object = None,
        reduction: str = "mean",
        upstream: object = None,
        backend: str | None = None,
        n_threads: int | None = None,
    ) -> Array:
        """The gradient with respect to a shard's scores, from the stats of all classes; see `stats`.

        Parameters
        ----------
        scores, targets, offset
            As they were given to `stats`.
        stats : Stats
            Of all shards, merged.
        out : array like scores, optional
            Receives the gradient; `out=scores` works in place.
        sample_weight, reduction, upstream, backend, n_threads
            As in `value_and_grad`.

        Returns
        -------
        array like scores, of their dtype (float64 for integers)

        Raises
        ------
        ValueError
            If a target's class is in none of the merged shards, or in several.
        """
        return driver.stats_gradient_call(
            self, scores, targets, stats, offset, out, sample_weight, reduction, upstream, backend, n_threads
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Softmax(Loss):
    """Softmax cross-entropy: `log Σ_j exp(s_j) − s_y`, computed with the row's maximum shifted out.

    With u the target vector of a row (`e_y` for a class index), U = Σ u and z = log Σ exp(s), every option is one
    formula: loss = U z − ⟨u, s⟩ + λ z², gradient = (U + 2 λ z) p − u, where p = softmax(s).

    Parameters
    ----------
    label_smoothing : float in [0, 1]
        ε: u = (1 − ε) e_y + ε / C, times the class weights, as in PyTorch.
    z_loss : float, at least 0
        λ: adds λ z² to each row.
    softcap : float above 0, optional
        Scores become `softcap · tanh(s / softcap)` first; infinite scores stay as they are.
    temperature : float above 0
        Scores (after the softcap) are divided by it.
    class_weight, ignore_index
        See `Loss`. With probabilities q as targets, u = class_weight · q, and the mean is over sample weights alone.

    References
    ----------
    Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.4; CS231n, "Linear Classification".

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> round(fl.Softmax().value(np.zeros((5, 10)), np.arange(5)) / float(np.log(10)), 12)
    1.0
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0

    kind: ClassVar[str] = "softmax"
    extra_outputs: ClassVar[tuple[str, ...]] = ("row_loss", "lse", "argmax", "entropy")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("label_smoothing", checks.number(self.label_smoothing, "label_smoothing", low=0, high=1))
        self._set("z_loss", checks.number(self.z_loss, "z_loss", low=0))
        if self.softcap is not None:
            self._set("softcap", checks.number(self.softcap, "softcap", low=0, above=True))
        self._set("temperature", checks.number(self.temperature, "temperature", low=0, above=True))
        off = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "temperature": 1.0}
        self._set("general", tuple(name for name, value in off.items() if getattr(self, name) != value))

    def check_probabilities(self) -> None:
        used = {"label_smoothing": self.label_smoothing > 0, "ignore_index": self.ignore_index is not None}
        for name in used:
            if used[name]:
                raise ValueError(f"{name} has no meaning for targets that are class probabilities")

    def check_shards(self) -> None:
        """The class axis may be split, whatever the options are."""

    def rows_from_stats(self, stats: Stats, targets: Array) -> Array:
        with np.errstate(all="ignore"):
            return reference.softmax_stats_rows(self, stats, targets)

    def weighs_inside(self, probabilities: bool) -> bool:
        return probabilities or self.label_smoothing > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Hinge(Loss):
    """Multiclass hinge (SVM) loss over the margins `m_j = s_j − s_y + Δ` of the wrong classes j ≠ y.

    The subgradient at the kink m_j = 0 is 0.

    Parameters
    ----------
    margin : float
        Δ.
    power : {1, 2}
        `max(0, m_j)` or its square.
    over : {"sum", "mean", "max"}
        "sum": Weston–Watkins, Σ_j max(0, m_j)^power. "mean": the same divided by C, as PyTorch's
        `multi_margin_loss`. "max": Crammer–Singer, max(0, max_j m_j)^power; the lowest class wins a tie.
    pair_margins : array (C, C), optional
        Δ[y, j] in place of `margin`: what it costs to take class y for class j. The diagonal is not used.
    count_target : bool
        Count the target's own term, which adds max(0, Δ)^power to each row (a slip that the lecture on loss
        functions discusses); not with `over="max"`.
    class_weight, ignore_index
        See `Loss`.

    References
    ----------
    Weston and Watkins, 1999; Crammer and Singer, 2001; CS231n, "Linear Classification".

    Examples
    --------
    >>> import fastloss as fl
    >>> scores = [[3.2, 5.1, -1.7], [1.3, 4.9, 2.0], [2.2, 2.5, -3.1]]
    >>> fl.Hinge().value(scores, [0, 1, 2], reduction="none").round(1).tolist()
    [2.9, 0.0, 12.9]
    """

    margin: float = 1.0
    power: int = 1
    over: str = "sum"
    pair_margins: Any = None
    count_target: bool = False

    kind: ClassVar[str] = "hinge"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("margin", checks.number(self.margin, "margin"))
        checks.one_of(self.power, "power", (1, 2))
        checks.one_of(self.over, "over", ("sum", "mean", "max"))
        if not isinstance(self.count_target, bool):
            raise TypeError(f"count_target is {self.count_target!r}; it must be True or False")
        if self.count_target and self.over == "max":
            raise ValueError('count_target has no meaning with over="max": use over="sum" or "mean"')
        general = ["count_target"] if self.count_target else []
        if self.pair_margins is not None:
            pairs = checks.matrix(self.pair_margins, "pair_margins", "(C, C)")
            if pairs.shape[0] != pairs.shape[1]:
                raise ValueError(f"pair_margins has shape {pairs.shape}; it must be square, (C, C)")
            checks.finite(pairs, "pair_margins")
            self._set("pair_margins", _frozen_array(pairs))
            general.append("pair_margins")
        self._set("general", tuple(general))

    def check_classes(self, n_classes: int, probabilities: bool = False) -> None:
        super().check_classes(n_classes, probabilities)
        if self.pair_margins is not None and len(self.pair_margins) != n_classes:
            raise ValueError(
                f"pair_margins has shape {self.pair_margins.shape}, but scores have {n_classes} classes: "
                f"it must be {(n_classes, n_classes)}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Logistic(Loss):
    """Binary logistic loss of each column for itself: `Σ_j log(1 + exp(s_j)) − t_j s_j`.

    For binary problems (one column of scores), for one-vs-rest, and for examples with any number of labels. Targets are

    - class indices (N,): t is 1 in the target's column and 0 elsewhere (one-vs-rest). With a single column the labels
      are 0 and 1, and t is the label itself;
    - or (N, C), of any number type: t itself, labels or probabilities in [0, 1].

    The gradient is σ(s) − t, with σ(s) = 1 / (1 + exp(−s)) (see `fastloss.sigmoid`); for t = 1 it is computed as
    −σ(−s), so that no digits are lost where the score is right. The mean is over rows, not over numbers: with
    `over="mean"` it is that of PyTorch's `binary_cross_entropy_with_logits`.

    Parameters
    ----------
    pos_weight : number or array (C,), optional
        How many times as much a target of 1 counts as one of 0, in each column: the loss is
        `(1 − t) log(1 + exp(s)) + pos_weight · t log(1 + exp(−s))`, as in PyTorch. Finite, at least 0.
    label_smoothing : float in [0, 1]
        ε: t becomes (1 − ε) t + ε / 2.
    over : {"sum", "mean"}
        The sum over the columns, or that divided by C.
    class_weight : array, optional
        For class indices: a weight for each label, (C,), or (2,) with a single column; a row counts with the weight of
        its label. For targets (N, C): a weight for each column, (C,), which multiplies its loss; the mean is over
        sample weights alone.
    ignore_index
        See `Loss`; for class indices.

    References
    ----------
    Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.2.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> fl.Logistic().value([[0.0], [2.0]], [0, 1], reduction="none").round(4).tolist()
    [0.6931, 0.1269]
    >>> value, grad = fl.Logistic().value_and_grad([[40.0, -1.0, 0.5]], [[1, 0, 1]])
    >>> print(f"{value:.4f}", [f"{g:.2g}" for g in grad[0]])
    0.7873 ['-4.2e-18', '0.27', '-0.38']
    """

    pos_weight: Any = None
    label_smoothing: float = 0.0
    over: str = "sum"

    kind: ClassVar[str] = "logistic"
    most_of_targets: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("label_smoothing", checks.number(self.label_smoothing, "label_smoothing", low=0, high=1))
        checks.one_of(self.over, "over", ("sum", "mean"))
        if np.ndim(self.pos_weight):
            weight = checks.as_array(self.pos_weight, "pos_weight")
            if weight.ndim != 1:
                raise ValueError(
                    f"pos_weight has shape {weight.shape}; it must be a number, or (C,): one for each column"
                )
            checks.finite_nonnegative(weight, "pos_weight")
            self._set("pos_weight", _frozen_array(weight))
        elif self.pos_weight is not None:
            self._set("pos_weight", checks.number(self.pos_weight, "pos_weight", low=0))
        used = {"pos_weight": self.pos_weight is not None, "label_smoothing": self.label_smoothing > 0}
        self._set("general", tuple(name for name in used if used[name]))

    def labels(self, n_classes: int) -> int:
        return max(2, n_classes)

    def check_classes(self, n_classes: int, probabilities: bool = False) -> None:
        super().check_classes(n_classes, probabilities)
        if np.ndim(self.pos_weight) and self.pos_weight.shape != (n_classes,):
            raise ValueError(
                f"pos_weight has shape {self.pos_weight.shape}, but scores have {n_classes} columns: it must be "
                f"a number, or ({n_classes},)"
            )

    def check_probabilities(self) -> None:
        if self.ignore_index is not None:
            raise ValueError(
                "ignore_index has no meaning for targets (N, C); give rows that are to be skipped sample_weight 0"
            )

    def check_shards(self) -> None:
        raise ValueError(
            "Logistic has no stats, and needs none: its columns have nothing to do with each other. Give each shard "
            "its columns of targets (N, C), and add the values"
        )

    def weighs_inside(self, probabilities: bool) -> bool:
        return probabilities

    @property
    def smoothed(self) -> tuple[float, float]:
        """What label smoothing makes of targets 1 and 0."""
        return 1 - self.label_smoothing / 2, self.label_smoothing / 2

    def column_weights(self, probabilities: bool, n_classes: int) -> Array | None:
        """What targets 0, then targets 1 count in each column, inside of a row's loss: (2 C,); None if all count 1."""
        inside = self.class_weight if self.weighs_inside(probabilities) else None
        if inside is None and self.pos_weight is None:
            return None
        weights = np.ones(n_classes) if inside is None else inside
        return np.concatenate([weights, weights * (1 if self.pos_weight is None else self.pos_weight)])


def softmax(
    scores: object, *, out: Array | None = None, backend: str | None = None, n_threads: int | None = None
) -> Array:
    """`exp(s_j) / Σ_k exp(s_k)` along the last axis, with the maximum shifted out.

    Parameters
    ----------
    scores : array (N, C)
        Real numbers; −inf is a masked class, of probability exactly 0.
    out : array (N, C), optional
        Receives the result; `out=scores` works in place.

    Returns
    -------
    array (N, C) of the scores' float dtype (float64 for integers)

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.softmax([[123.0, 456.0, 789.0]]).round(3).tolist()
    [[0.0, 0.0, 1.0]]
    """
    return driver.transform_call("softmax", scores, out, backend, n_threads)


def log_softmax(
    scores: object, *, out: Array | None = None, backend: str | None = None, n_threads: int | None = None
) -> Array:
    """`s_j − log Σ_k exp(s_k)` along the last axis. Parameters and result as for `softmax`.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.log_softmax([[1000.0, 0.0]]).tolist()
    [[0.0, -1000.0]]
    """
    return driver.transform_call("log_softmax", scores, out, backend, n_threads)


def logsumexp(
    scores: object, *, out: Array | None = None, backend: str | None = None, n_threads: int | None = None
) -> Array:
    """`log Σ_k exp(s_k)` along the last axis: array (N,). Parameters as for `softmax`, with `out` (N,).

    A row of −inf alone gives −inf and a +inf score gives +inf, as the limits are, and as in SciPy.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.logsumexp([[1000.0, 1000.0]]).round(4).tolist()
    [1000.6931]
    """
    return driver.transform_call("logsumexp", scores, out, backend, n_threads)


def sigmoid(
    scores: object, *, out: Array | None = None, backend: str | None = None, n_threads: int | None = None
) -> Array:
    """`1 / (1 + exp(−s))` of each score: the probabilities of `Logistic`. Parameters and result as for `softmax`.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.sigmoid([[0.0, 2.0, -1000.0]]).round(4).tolist()
    [[0.5, 0.8808, 0.0]]
    """
    return driver.transform_call("sigmoid", scores, out, backend, n_threads)
