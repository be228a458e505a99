"""Bad input raises before anything is computed or written: the argument's name, what came, and what would do."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse

import fastloss as fl
from tests.conftest import BACKENDS, COMPILED

N, C, D = 5, 3, 4
SCORES, TARGETS = np.arange(15.0).reshape(N, C), np.array([0, 1, 2, 1, 0])
X, W = np.arange(20.0).reshape(N, D), np.ones((C, D))


def with_entry(array, position, value):
    array = np.array(array)
    array[position] = value
    return array


class NotAnArray:
    pass


# What is passed in place of a good argument → the error, and what its message must say.
BAD_SCORES = {
    "1-D": (SCORES[0], ValueError, ["scores", "(3,)", "(N, C)"]),
    "3-D": (SCORES[None], ValueError, ["scores", "(1, 5, 3)"]),
    "scalar": (1.0, ValueError, ["scores", "()"]),
    "no classes": (SCORES[:, :0], ValueError, ["scores", "(5, 0)", "class"]),
    "complex": (SCORES + 0j, TypeError, ["scores", "complex128"]),
    "strings": (SCORES.astype(str), TypeError, ["scores", "<U"]),
    "objects": (SCORES.astype(object), TypeError, ["scores", "object"]),
    "ragged": ([[1.0, 2.0], [3.0]], TypeError, ["scores"]),
    "none": (None, TypeError, ["scores"]),
    "foreign": (NotAnArray(), TypeError, ["scores"]),
    "dates": (np.zeros((5, 3), "datetime64[s]"), TypeError, ["scores", "datetime64"]),
    "long double": (SCORES.astype(np.clongdouble), TypeError, ["scores"]),
    "sparse": (scipy.sparse.csr_matrix(SCORES), TypeError, ["scores", "sparse", "toarray"]),
}
BAD_TARGETS = {
    "too few": (TARGETS[:-1], ValueError, ["targets", "(4,)", "(5,)"]),
    "too many": ([0] * 6, ValueError, ["targets", "(6,)", "(5,)"]),
    "scalar": (1, ValueError, ["targets", "()", "(5,)"]),
    "column": (TARGETS[:, None], ValueError, ["targets", "(5, 1)"]),
    "too large": (with_entry(TARGETS, 2, 3), ValueError, ["targets[2] is 3", "3 classes", "0 to 2"]),
    "too large in the first row": (with_entry(TARGETS, 0, 3), ValueError, ["targets[0] is 3"]),
    "too large in the last row": (with_entry(TARGETS, -1, 99), ValueError, ["targets[4] is 99"]),
    "negative": (with_entry(TARGETS, 3, -1), ValueError, ["targets[3] is -1"]),
    "the first of many": ([0, 7, -3, 8, 9], ValueError, ["targets[1] is 7"]),
    "beyond 32 bits": (with_entry(TARGETS, 1, 2**32), ValueError, ["targets[1] is 4294967296"]),
    "beyond 32 bits, negative": (with_entry(TARGETS, 1, -(2**32)), ValueError, ["targets[1] is -4294967296"]),
    "uint64": (with_entry(TARGETS.astype(np.uint64), 1, 2**64 - 1), ValueError, ["targets[1] is 18446744073709551615"]),
    "uint64 that is −2⁶³ as int64": (
        with_entry(TARGETS.astype(np.uint64), 1, 2**63),
        ValueError,
        ["targets[1] is 9223372036854775808"],
    ),
    "int8": (with_entry(TARGETS.astype(np.int8), 1, -128), ValueError, ["targets[1] is -128"]),
    "floats": (TARGETS.astype(float), TypeError, ["targets", "float64", "integer"]),
    "booleans": (TARGETS > 0, TypeError, ["targets", "bool", "integer"]),
    "complex": (TARGETS + 0j, TypeError, ["targets", "complex128"]),
    "strings": (TARGETS.astype(str), TypeError, ["targets", "<U"]),
    "objects": (TARGETS.astype(object), TypeError, ["targets", "object"]),
    "none": (None, TypeError, ["targets"]),
    "dates": (TARGETS.astype("timedelta64[s]"), TypeError, ["targets", "timedelta64"]),
    "probabilities of another shape": (np.ones((N, C + 1)) / 4, ValueError, ["targets", "(5, 4)", "(5, 3)"]),
}
BAD_PROBABILITIES = {
    "negative": (with_entry(np.full((N, C), 0.5), (2, 1), -0.1), ValueError, ["targets[2, 1] is -0.1", "negative"]),
    "NaN": (with_entry(np.full((N, C), 0.5), (4, 2), np.nan), ValueError, ["targets[4, 2] is nan"]),
    "inf": (with_entry(np.full((N, C), 0.5), (0, 0), np.inf), ValueError, ["targets[0, 0] is inf"]),
}
BAD_WEIGHTS = {
    "negative": (with_entry(np.ones(N), 3, -0.5), ValueError, ["sample_weight[3] is -0.5", "negative"]),
    "NaN": (with_entry(np.ones(N), 4, np.nan), ValueError, ["sample_weight[4] is nan", "finite"]),
    "inf": (with_entry(np.ones(N), 0, np.inf), ValueError, ["sample_weight[0] is inf", "finite"]),
    "too few": (np.ones(4), ValueError, ["sample_weight", "(4,)", "(5,)"]),
    "scalar": (1.0, ValueError, ["sample_weight", "()", "(5,)"]),
    "matrix": (np.ones((N, 1)), ValueError, ["sample_weight", "(5, 1)"]),
    "complex": (np.ones(N) + 0j, TypeError, ["sample_weight", "complex128"]),
    "strings": (["1"] * N, TypeError, ["sample_weight"]),
}
BAD_COMMON = {
    "reduction": ({"reduction": "average"}, ValueError, ["reduction", "'average'", "'mean'", "'sum'"]),
    "reduction none": ({"reduction": None}, ValueError, ["reduction", "None"]),
    "backend": ({"backend": "fast"}, fl.BackendError, ["backend", "'fast'", "reference"]),
    "no threads": ({"n_threads": 0}, ValueError, ["n_threads", "0", "at least 1"]),
    "negative threads": ({"n_threads": -2}, ValueError, ["n_threads", "-2"]),
    "half a thread": ({"n_threads": 1.5}, TypeError, ["n_threads", "1.5", "integer"]),
    "threads in words": ({"n_threads": "two"}, TypeError, ["n_threads", "'two'"]),
    "true threads": ({"n_threads": True}, TypeError, ["n_threads", "True"]),
}
BAD_SCORES_CALLS = {
    "outputs": ({"outputs": ("row_loss", "loss")}, ValueError, ["outputs", "'loss'", "'row_loss'"]),
    "outputs as text": ({"outputs": "row_loss"}, TypeError, ["outputs", "'row_loss'", "tuple"]),
}
BAD_UPSTREAM = {
    "per row with mean": ({"upstream": np.ones(N)}, ValueError, ["upstream", "(5,)", "mean"]),
    "too few": ({"upstream": np.ones(4), "reduction": "none"}, ValueError, ["upstream", "(4,)", "(5,)"]),
    "NaN": ({"upstream": np.nan}, ValueError, ["upstream", "nan", "finite"]),
    "NaN in a row": (
        {"upstream": with_entry(np.ones(N), 2, np.nan), "reduction": "none"},
        ValueError,
        ["upstream[2] is nan", "finite"],
    ),
    "matrix": ({"upstream": np.ones((N, 1)), "reduction": "none"}, ValueError, ["upstream", "(5, 1)"]),
    "text": ({"upstream": "1"}, TypeError, ["upstream", "'1'", "number"]),
    "complex": ({"upstream": 1j}, TypeError, ["upstream", "1j"]),
}


def table(*tables):
    """One parameter for each row of the tables, called by its name."""
    return [pytest.param(*row, id=name) for some in tables for name, row in some.items()]


def assert_raises(error, said, call, *untouched):
    """`call` raises `error`, its message says all that it must, and the arrays are as they were."""
    before = [array.tobytes() for array in untouched]
    with pytest.raises(error) as caught:
        call()
    for part in said:
        assert part in str(caught.value)
    assert [array.tobytes() for array in untouched] == before


# --- the scores level ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", [fl.Softmax(), fl.Hinge()], ids=["softmax", "hinge"])
@pytest.mark.parametrize(("scores", "error", "said"), table(BAD_SCORES))
def test_scores(backend, loss, scores, error, said):
    out = np.full((N, C), 7.0)
    assert_raises(error, said, lambda: loss.value_and_grad(scores, TARGETS, out=out, backend=backend), out)
    assert_raises(error, said, lambda: loss.value(scores, TARGETS, backend=backend))


@pytest.mark.parametrize(
    ("scores", "error", "said"), [row for row in table(BAD_SCORES) if row.id not in ("1-D", "3-D")]
)
def test_scores_of_transforms(backend, scores, error, said):
    for kind in (fl.softmax, fl.log_softmax, fl.logsumexp):
        assert_raises(error, said, lambda kind=kind: kind(scores, backend=backend))


@pytest.mark.parametrize("loss", [fl.Softmax(), fl.Hinge()], ids=["softmax", "hinge"])
@pytest.mark.parametrize(("targets", "error", "said"), table(BAD_TARGETS))
def test_targets(backend, loss, targets, error, said):
    out, in_place = np.full((N, C), 7.0), SCORES.copy()
    assert_raises(error, said, lambda: loss.value_and_grad(SCORES, targets, out=out, backend=backend), out)
    assert_raises(error, said, lambda: loss.value_and_grad(in_place, targets, out=in_place, backend=backend), in_place)
    assert_raises(error, said, lambda: loss.value(SCORES, targets, backend=backend))
    assert_raises(error, said, lambda: fl.linear_value_and_grad(loss, X, W, targets, backend=backend))


@pytest.mark.parametrize("n", [16, 17, 1000, 100_003])
def test_one_bad_target_anywhere(backend, n):
    """Also far into the array, where other threads or vectors look; also in a row of weight 0."""
    for position in (0, n // 2, n - 1):
        for kind in (np.int64, np.int8, np.uint16):
            scores, y = np.zeros((n, 2), np.float32), np.zeros(n, kind)
            y[position] = 2
            out = np.full((n, 2), 7, np.float32)
            said = [f"targets[{position}] is 2, but scores have 2 classes (0 to 1)"]
            weight = (np.arange(n) != position).astype(float)
            assert_raises(
                ValueError, said,
                lambda scores=scores, y=y, out=out, weight=weight: fl.Softmax().value_and_grad(
                    scores, y, sample_weight=weight, out=out, backend=backend
                ),
                out,
            )  # fmt: skip


def test_message_of_one_class_and_of_an_ignored_index(backend):
    with pytest.raises(ValueError, match=r"targets\[0\] is 1, but scores have 1 class \(0 only\)"):
        fl.Softmax().value([[1.0]], [1], backend=backend)
    with pytest.raises(ValueError, match=r"targets\[1\] is -2, .* ignore_index is -100"):
        fl.Softmax(ignore_index=-100).value(SCORES, [-100, -2, 0, 0, 0], backend=backend)


@pytest.mark.parametrize(("targets", "error", "said"), table(BAD_PROBABILITIES))
def test_probabilities(targets, error, said):
    out = np.full((N, C), 7.0)
    assert_raises(error, said, lambda: fl.Softmax().value_and_grad(SCORES, targets, out=out, backend="reference"), out)


def test_probabilities_where_they_have_no_meaning():
    q = np.full((N, C), 1 / 3)
    for loss, said in (
        (fl.Hinge(), ["targets", "probabilities", "Hinge"]),
        (fl.Softmax(label_smoothing=0.1), ["label_smoothing"]),
        (fl.Softmax(ignore_index=-100), ["ignore_index"]),
        (fl.Softmax(ignore_index=0), ["ignore_index"]),
        (fl.Logistic(ignore_index=0), ["ignore_index"]),
    ):
        assert_raises(ValueError, said, lambda loss=loss: loss.value(SCORES, q, backend="reference"))
        assert_raises(ValueError, said, lambda loss=loss: fl.LinearObjective(loss, X, q, backend="reference"))
        assert_raises(ValueError, said, lambda loss=loss: fl.linear_value_and_grad(loss, X, W, q, backend="reference"))


@pytest.mark.parametrize(("weight", "error", "said"), table(BAD_WEIGHTS))
def test_sample_weight(backend, weight, error, said):
    out = np.full((N, C), 7.0)
    more = {"sample_weight": weight, "backend": backend}
    assert_raises(error, said, lambda: fl.Hinge().value_and_grad(SCORES, TARGETS, out=out, **more), out)
    assert_raises(error, said, lambda: fl.LinearObjective(fl.Softmax(), X, TARGETS, **more))
    assert_raises(error, said, lambda: fl.linear_value_and_grad(fl.Softmax(), X, W, TARGETS, **more))


@pytest.mark.parametrize(("more", "error", "said"), table(BAD_COMMON, BAD_SCORES_CALLS, BAD_UPSTREAM))
def test_scores_options(more, error, said):
    out = np.full((N, C), 7.0)
    assert_raises(error, said, lambda: fl.Softmax().value_and_grad(SCORES, TARGETS, out=out, **more), out)


@pytest.mark.parametrize(("more", "error", "said"), table(BAD_COMMON, BAD_UPSTREAM))
def test_linear_layer_options(more, error, said):
    assert_raises(error, said, lambda: fl.linear_value_and_grad(fl.Softmax(), X, W, TARGETS, **more))


@pytest.mark.parametrize(("more", "error", "said"), table(BAD_COMMON))
def test_linear_objective_options(more, error, said):
    assert_raises(error, said, lambda: fl.LinearObjective(fl.Softmax(), X, TARGETS, **more))


# --- out --------------------------------------------------------------------------------------------------------
def unaligned(shape):
    return np.zeros(8 * math.prod(shape) + 1, np.uint8)[1:].view(float).reshape(shape)


def readonly(array):
    array.flags.writeable = False
    return array


BAD_OUT = {
    "dtype": (np.zeros((N, C), np.float32), ValueError, ["out", "float32", "float64"]),
    "integers": (np.zeros((N, C), int), ValueError, ["out", "int64", "float64"]),
    "byte order": (np.zeros((N, C), ">f8"), ValueError, ["out", ">f8"]),
    "too few rows": (np.zeros((N - 1, C)), ValueError, ["out", "(4, 3)", "(5, 3)"]),
    "transposed": (np.zeros((C, N)), ValueError, ["out", "(3, 5)", "(5, 3)"]),
    "flat": (np.zeros(N * C), ValueError, ["out", "(15,)", "(5, 3)"]),
    "read-only": (readonly(np.zeros((N, C))), ValueError, ["out", "read-only", "writeable"]),
    "unaligned": (unaligned((N, C)), ValueError, ["out", "aligned"]),
    "list": ([[0.0] * C] * N, TypeError, ["out", "list", "array"]),
}


@pytest.mark.parametrize(("out", "error", "said"), table(BAD_OUT))
def test_out(backend, out, error, said):
    arrays = [out] if isinstance(out, np.ndarray) else []
    for call in (
        lambda: fl.Softmax().value_and_grad(SCORES, TARGETS, out=out, backend=backend),
        lambda: fl.softmax(SCORES, out=out, backend=backend),
        lambda: fl.log_softmax(SCORES, out=out, backend=backend),
        lambda: fl.LinearObjective(fl.Softmax(), X[:, :2], TARGETS, backend=backend).value_and_grad(
            np.ones((N, C)), out=out
        ),
    ):
        assert_raises(error, said, call, *arrays)


def test_out_of_logsumexp(backend):
    for out, said in (
        (np.zeros((N, 1)), ["out", "(5, 1)", "(5,)"]),
        (np.zeros((N, C)), ["out", "(5, 3)", "(5,)"]),
        (np.zeros(N, np.float32), ["out", "float32"]),
    ):
        assert_raises(ValueError, said, lambda out=out: fl.logsumexp(SCORES, out=out, backend=backend), out)


@pytest.mark.parametrize(("n", "c"), [(5, 3), (40, 100), (1, 4), (6, 1)])
def test_partial_overlap_of_out(backend, n, c):
    whole, k = np.random.default_rng(0).standard_normal((2 * n + 2, 2 * c + 2)), 2 * min(n, c)
    pairs = {
        "one row on": (whole[:n, :c], whole[1 : n + 1, :c]),
        "one column on": (whole[:n, :c], whole[:n, 1 : c + 1]),
        "upside down": (whole[:n, :c], whole[:n, :c][::-1]),
        "left to right": (whole[:n, :c], whole[:n, :c][:, ::-1]),
        "spread": (whole[:n, :c], whole[: 2 * n : 2, :c]),
        "flat, one on": (whole.ravel()[: n * c].reshape(n, c), whole.ravel()[1 : n * c + 1].reshape(n, c)),
        "transposed": (whole[:k, :k], whole[:k, :k].T),
    }
    for scores, out in pairs.values():
        same = scores.__array_interface__["data"] == out.__array_interface__["data"] and 1 in scores.shape
        if same or not np.shares_memory(scores, out):
            continue  # one row, or one column, of this kind is the same or apart
        y = np.zeros(len(scores), int)
        for call in (
            lambda s=scores, o=out, y=y: fl.Hinge().value_and_grad(s, y, out=o, backend=backend),
            lambda s=scores, o=out: fl.softmax(s, out=o, backend=backend),
        ):
            assert_raises(ValueError, ["out", "overlaps scores"], call, whole)


def test_out_that_overlaps_other_inputs(backend):
    memory = np.zeros(N * C)
    out = memory.reshape(N, C)
    targets = memory.view(np.int64)[:N]
    assert_raises(
        ValueError,
        ["out", "targets"],
        lambda: fl.Softmax().value_and_grad(SCORES, targets, out=out, backend=backend),
        memory,
    )
    weight = memory[3 : 3 + N]
    assert_raises(
        ValueError, ["out", "sample_weight"],
        lambda: fl.Softmax().value_and_grad(SCORES, TARGETS, sample_weight=weight, out=out, backend=backend), memory,
    )  # fmt: skip
    assert_raises(
        ValueError, ["out", "upstream"],
        lambda: fl.Softmax().value_and_grad(
            SCORES, TARGETS, upstream=memory[:N], reduction="none", out=out, backend=backend
        ),
        memory,
    )  # fmt: skip
    assert_raises(ValueError, ["out", "scores"], lambda: fl.logsumexp(out, out=memory[:N], backend=backend), memory)


def test_out_that_overlaps_scores_given_as_another_kind_of_array(backend):
    """A memoryview, as any object with a buffer, shares its memory with the array made of it."""
    memory = np.arange(30.0)
    scores, out = memoryview(memory[:15].reshape(N, C)), memory[3:18].reshape(N, C)
    assert_raises(
        ValueError,
        ["out", "overlaps scores"],
        lambda: fl.Softmax().value_and_grad(scores, TARGETS, out=out, backend=backend),
        memory,
    )


def test_out_of_a_linear_objective_that_overlaps(backend):
    memory = np.random.default_rng(0).standard_normal(200)
    features, weights = memory[:20].reshape(N, D), memory[50:65].reshape(C, D + 1)
    objective = fl.LinearObjective(fl.Softmax(), features, TARGETS, backend=backend)
    for out, name in ((memory[10:25], "X"), (memory[51:66], "W"), (memory[50:65], "W")):
        assert_raises(
            ValueError,
            ["out", name],
            lambda out=out: objective.value_and_grad(weights, out=out.reshape(C, D + 1)),
            memory,
        )


def test_interleaved_views_do_not_overlap(backend):
    for n, c in ((5, 3), (40, 100), (700, 33)):
        base, y = np.random.default_rng(0).standard_normal((n, c)), np.arange(n) % c
        _, expected = fl.Softmax().value_and_grad(base, y, backend=backend)
        for make in (
            lambda n, c: (lambda m: (m[:, ::2], m[:, 1::2]))(np.zeros((n, 2 * c))),
            lambda n, c: (lambda m: (m[::2], m[1::2]))(np.zeros((2 * n, c))),
            lambda n, c: (lambda m: (m[:, :c], m[:, c:]))(np.zeros((n, 2 * c))),
            lambda n, c: (lambda m: (m[::-2, ::-2], m[::2, ::2]))(np.zeros((2 * n, 2 * c))),
        ):
            scores, out = make(n, c)
            scores[...] = base
            fl.Softmax().value_and_grad(scores, y, out=out, backend=backend)
            np.testing.assert_allclose(out, expected, rtol=1e-13)
            np.testing.assert_array_equal(scores, base)


def test_out_that_is_the_scores_by_another_name(backend):
    """The same elements in the same places: in place, however the view was made."""
    y = np.arange(6) % 4
    for view in (lambda a: a[:], lambda a: a.view(), lambda a: a.reshape(6, 4), lambda a: a.T.T):
        scores = np.random.default_rng(0).standard_normal((6, 4))
        _, expected = fl.Softmax().value_and_grad(scores, y, backend=backend)
        fl.Softmax().value_and_grad(scores, y, out=view(scores), backend=backend)
        np.testing.assert_array_equal(scores, expected)
    one_row = np.random.default_rng(0).standard_normal((4, 10))[:1, :5]  # its row stride is any number
    _, expected = fl.Softmax().value_and_grad(one_row, [0], backend=backend)
    fl.Softmax().value_and_grad(one_row, [0], out=one_row[0][None], backend=backend)
    np.testing.assert_array_equal(one_row, expected)


# --- options of the losses and penalties --------------------------------------------------------------------------
BAD_OPTIONS = [
    (fl.Softmax, {"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1", "at least 0", "at most 1"]),
    (fl.Softmax, {"label_smoothing": 1.1}, ValueError, ["label_smoothing", "1.1"]),
    (fl.Softmax, {"label_smoothing": math.nan}, ValueError, ["label_smoothing", "nan"]),
    (fl.Softmax, {"label_smoothing": "0.1"}, TypeError, ["label_smoothing", "'0.1'", "number"]),
    (fl.Softmax, {"label_smoothing": True}, TypeError, ["label_smoothing", "True"]),
    (fl.Softmax, {"label_smoothing": None}, TypeError, ["label_smoothing", "None"]),
    (fl.Softmax, {"z_loss": -1}, ValueError, ["z_loss", "-1"]),
    (fl.Softmax, {"z_loss": math.inf}, ValueError, ["z_loss", "inf"]),
    (fl.Softmax, {"temperature": 0}, ValueError, ["temperature", "0", "above 0"]),
    (fl.Softmax, {"temperature": math.inf}, ValueError, ["temperature", "inf"]),
    (fl.Softmax, {"softcap": 0.0}, ValueError, ["softcap", "above 0"]),
    (fl.Softmax, {"softcap": -3}, ValueError, ["softcap", "-3"]),
    (fl.Softmax, {"softcap": 1j}, TypeError, ["softcap", "1j"]),
    (fl.Softmax, {"z_loss": 10**400}, ValueError, ["z_loss", "finite"]),
    (fl.Hinge, {"margin": math.nan}, ValueError, ["margin", "nan"]),
    (fl.Hinge, {"margin": "1"}, TypeError, ["margin", "'1'"]),
    (fl.Hinge, {"power": 3}, ValueError, ["power", "3", "1, 2"]),
    (fl.Hinge, {"power": 1.5}, ValueError, ["power", "1.5"]),
    (fl.Hinge, {"over": "min"}, ValueError, ["over", "'min'", "'sum'", "'mean'", "'max'"]),
    (fl.Hinge, {"pair_margins": np.ones((2, 3))}, ValueError, ["pair_margins", "(2, 3)", "(C, C)"]),
    (fl.Hinge, {"pair_margins": np.ones(3)}, ValueError, ["pair_margins", "(3,)"]),
    (fl.Hinge, {"pair_margins": [[0, math.nan], [1, 0]]}, ValueError, ["pair_margins", "nan", "finite"]),
    (fl.Hinge, {"count_target": 1}, TypeError, ["count_target", "1"]),
    (fl.Hinge, {"count_target": True, "over": "max"}, ValueError, ["count_target", "max"]),
    (fl.Logistic, {"label_smoothing": 1.1}, ValueError, ["label_smoothing", "1.1"]),
    (fl.Logistic, {"over": "max"}, ValueError, ["over", "'max'", "'sum'", "'mean'"]),
    (fl.Logistic, {"pos_weight": -1}, ValueError, ["pos_weight", "-1", "at least 0"]),
    (fl.Logistic, {"pos_weight": [1, math.nan]}, ValueError, ["pos_weight[1] is nan", "finite"]),
    (fl.Logistic, {"pos_weight": [[1, 2]]}, ValueError, ["pos_weight", "(1, 2)", "(C,)"]),
    (fl.Logistic, {"pos_weight": "many"}, TypeError, ["pos_weight", "'many'"]),
    *[
        (loss, options, error, said)
        for loss in (fl.Softmax, fl.Hinge, fl.Logistic)
        for options, error, said in [
            ({"class_weight": [1, -1]}, ValueError, ["class_weight[1] is -1", "negative"]),
            ({"class_weight": [1, math.nan]}, ValueError, ["class_weight[1] is nan", "finite"]),
            ({"class_weight": [[1, 2]]}, ValueError, ["class_weight", "(1, 2)", "(C,)"]),
            ({"class_weight": "balanced"}, TypeError, ["class_weight"]),
            ({"class_weight": {0: 1.0}}, TypeError, ["class_weight"]),
            ({"ignore_index": 1.0}, TypeError, ["ignore_index", "1.0", "integer"]),
            ({"ignore_index": True}, TypeError, ["ignore_index", "True"]),
        ]
    ],
    (fl.L2, {"strength": -1}, ValueError, ["strength", "-1"]),
    (fl.L1, {"strength": math.nan}, ValueError, ["strength", "nan"]),
    (fl.ElasticNet, {"strength": 1, "beta": -1}, ValueError, ["beta", "-1"]),
    (fl.MaxNorm, {"strength": 0}, ValueError, ["strength", "0", "above 0"]),
    (fl.L2, {"strength": "1e-3"}, TypeError, ["strength", "'1e-3'"]),
]


@pytest.mark.parametrize(
    ("kind", "options", "error", "said"),
    BAD_OPTIONS,
    ids=[f"{k.__name__}, {list(o)[-1]}, {i}" for i, (k, o, _, _) in enumerate(BAD_OPTIONS)],
)
def test_options(kind, options, error, said):
    assert_raises(error, said, lambda: kind(**options))


def test_options_are_keywords_and_known():
    for call in (
        lambda: fl.Softmax(0.1),
        lambda: fl.Hinge(1.0),
        lambda: fl.Softmax(smoothing=0.1),
        lambda: fl.Hinge(delta=1),
    ):
        with pytest.raises(TypeError):
            call()


def test_options_of_other_number_types():
    assert fl.Softmax(label_smoothing=np.float32(0.5)) == fl.Softmax(label_smoothing=Fraction(1, 2))
    assert fl.Hinge(power=np.int64(2)) == fl.Hinge(power=2)
    assert fl.Softmax(ignore_index=np.int8(-1)).ignore_index == -1


def test_options_that_do_not_fit_the_classes(backend):
    for loss, said in (
        (fl.Softmax(class_weight=[1.0, 2]), ["class_weight", "(2,)", "3 classes", "(3,)"]),
        (fl.Hinge(class_weight=[1.0, 2, 3, 4]), ["class_weight", "(4,)", "(3,)"]),
        (fl.Hinge(pair_margins=np.ones((2, 2))), ["pair_margins", "(2, 2)", "(3, 3)"]),
        (fl.Logistic(pos_weight=[1.0, 2]), ["pos_weight", "(2,)", "3 columns", "(3,)"]),
    ):
        assert_raises(ValueError, said, lambda loss=loss: loss.value(SCORES, TARGETS, backend="reference"))
        assert_raises(
            ValueError, said, lambda loss=loss: fl.linear_value_and_grad(loss, X, W, TARGETS, backend="reference")
        )
        objective = fl.LinearObjective(loss, X, TARGETS, backend="reference")
        assert_raises(ValueError, said, lambda objective=objective: objective.value(np.ones((C, D + 1))))


def test_losses_are_values():
    """Frozen, equal by their options, usable as keys; later changes to an array given as an option do not count."""
    classes = np.array([1.0, 2, 3])
    loss = fl.Softmax(class_weight=classes, label_smoothing=0.1)
    classes[:] = -7
    assert loss == fl.Softmax(class_weight=[1, 2, 3], label_smoothing=0.1)
    assert hash(loss) == hash(fl.Softmax(class_weight=[1, 2, 3], label_smoothing=0.1))
    assert loss != fl.Softmax(class_weight=[1, 2, 4], label_smoothing=0.1)
    assert fl.Softmax() != fl.Hinge()
    with pytest.raises(AttributeError):
        loss.label_smoothing = 0.5
    with pytest.raises(ValueError, match="read-only"):
        loss.class_weight[0] = 9


# --- the linear layer -------------------------------------------------------------------------------------------
BAD_LINEAR = {
    "loss": ({"loss": fl.Softmax}, TypeError, ["loss", "Softmax()"]),
    "loss by name": ({"loss": "softmax"}, TypeError, ["loss", "'softmax'"]),
    "X 1-D": ({"X": X[0]}, ValueError, ["X", "(4,)", "(N, D)"]),
    "X complex": ({"X": X + 0j}, TypeError, ["X", "complex128"]),
    "X strings": ({"X": X.astype(str)}, TypeError, ["X", "<U"]),
    "X objects": ({"X": X.astype(object)}, TypeError, ["X", "object"]),
    "X sparse, complex": ({"X": scipy.sparse.csr_matrix(X + 0j)}, TypeError, ["X", "complex128"]),
    "fewer targets": ({"targets": TARGETS[:3]}, ValueError, ["targets", "(3,)", "(5,)"]),
    "float targets": ({"targets": TARGETS.astype(float)}, TypeError, ["targets", "float64", "integer"]),
}
BAD_OBJECTIVE = {
    "penalty": ({"penalty": 0.1}, TypeError, ["penalty", "0.1"]),
    "penalty class": ({"penalty": fl.L2}, TypeError, ["penalty", "L2"]),
    "bias": ({"bias": 1}, TypeError, ["bias", "1", "True or False"]),
    "reduction none": ({"reduction": "none"}, ValueError, ["reduction", "'none'", "'mean'", "'sum'"]),
    "shift shape": ({"shift": np.ones(3)}, ValueError, ["shift", "(3,)", "(4,)"]),
    "shift NaN": ({"shift": [0, 0, np.nan, 0]}, ValueError, ["shift[2] is nan", "finite"]),
    "scale inf": ({"scale": [1, np.inf, 1, 1]}, ValueError, ["scale[1] is inf", "finite"]),
    "scale 0": ({"scale": [1, 1, 1, 0]}, ValueError, ["scale[3] is 0"]),
    "scale scalar": ({"scale": 2.0}, ValueError, ["scale", "()", "(4,)"]),
    "chunk 0": ({"chunk_rows": 0}, ValueError, ["chunk_rows", "0", "at least 1"]),
    "chunk float": ({"chunk_rows": 10.0}, TypeError, ["chunk_rows", "10.0", "integer"]),
}
BAD_LAYER = {
    "W width": ({"W": np.ones((C, D + 1))}, ValueError, ["W", "(3, 5)", "(C, 4)"]),
    "W 1-D": ({"W": np.ones(D)}, ValueError, ["W", "(4,)"]),
    "W without classes": ({"W": np.ones((0, D))}, ValueError, ["W", "(0, 4)"]),
    "W complex": ({"W": W + 0j}, TypeError, ["W", "complex128"]),
    "b shape": ({"b": np.ones(D)}, ValueError, ["b", "(4,)", "(3,)"]),
    "b objects": ({"b": np.ones(C, object)}, TypeError, ["b", "object"]),
    "wrt": ({"wrt": ("W", "c")}, ValueError, ["wrt", "'c'"]),
    "wrt text": ({"wrt": "W"}, ValueError, ["wrt", "'W'", "tuple"]),
    "chunk": ({"chunk_rows": -1}, ValueError, ["chunk_rows", "-1"]),
    "label": ({"targets": with_entry(TARGETS, 4, 3)}, ValueError, ["targets[4] is 3"]),
}


@pytest.mark.parametrize(("bad", "error", "said"), table(BAD_LINEAR, BAD_OBJECTIVE))
def test_linear_objective(bad, error, said):
    arguments = {"loss": fl.Softmax(), "X": X, "targets": TARGETS} | bad
    assert_raises(error, said, lambda: fl.LinearObjective(**arguments))


@pytest.mark.parametrize(("bad", "error", "said"), table(BAD_LINEAR, BAD_LAYER))
def test_linear_layer(bad, error, said):
    arguments = {"loss": fl.Softmax(), "X": X, "W": W, "targets": TARGETS} | bad
    assert_raises(error, said, lambda: fl.linear_value_and_grad(**arguments))


BAD_W = {
    "without bias": (np.ones((C, D)), ValueError, ["W", "(3, 4)", "(C, 5)", "4 features"]),
    "too wide": (np.ones((C, D + 2)), ValueError, ["W", "(3, 6)", "(C, 5)"]),
    "1-D": (np.ones(D + 1), ValueError, ["W", "(5,)"]),
    "3-D": (np.ones((2, C, D + 1)), ValueError, ["W", "(2, 3, 5)"]),
    "no classes": (np.ones((0, D + 1)), ValueError, ["W", "(0, 5)"]),
    "too few classes": (np.ones((C - 1, D + 1)), ValueError, ["targets[2] is 2", "2 classes"]),
    "complex": (np.ones((C, D + 1)) + 0j, TypeError, ["W", "complex128"]),
    "strings": (np.full((C, D + 1), "1"), TypeError, ["W", "<U1"]),
    "objects": (np.ones((C, D + 1), object), TypeError, ["W", "object"]),
}
BAD_ROWS = {
    "floats": ([0.0, 1.0], TypeError, ["rows", "float64", "integer"]),
    "mask": (TARGETS > 0, TypeError, ["rows", "bool", "integer"]),
    "matrix": ([[0, 1]], ValueError, ["rows", "(1, 2)", "one-dimensional"]),
    "scalar": (3, ValueError, ["rows", "()"]),
    "too large": ([0, 1, 5], IndexError, ["rows[2] is 5", "5 rows", "0 to 4"]),
    "negative": ([0, -1, 1], IndexError, ["rows[1] is -1"]),
    "strings": (["0"], TypeError, ["rows"]),
    "slice": (slice(0, 2), ValueError, ["rows", "one-dimensional"]),
}


@pytest.mark.parametrize(("bad", "error", "said"), table(BAD_W))
def test_weights_of_an_objective(backend, bad, error, said):
    objective = fl.LinearObjective(fl.Softmax(), X, TARGETS, backend=backend)
    out = np.full((C, D + 1), 7.0)
    assert_raises(error, said, lambda: objective.value_and_grad(bad, out=out), out)
    assert_raises(error, said, lambda: objective.value(bad))
    if bad.ndim == 2:
        assert_raises(
            error,
            [
                "W_stack" if part == "W" else part.replace("(C", "(K, C")
                for part in said
                if "(3" not in part and "(0" not in part
            ],
            lambda: objective.values(bad[None]),
        )


@pytest.mark.parametrize(("bad", "error", "said"), table(BAD_ROWS))
def test_rows_of_an_objective(backend, bad, error, said):
    objective = fl.LinearObjective(fl.Softmax(), X, TARGETS, backend=backend)
    out = np.full((C, D + 1), 7.0)
    assert_raises(error, said, lambda: objective.value_and_grad(np.ones((C, D + 1)), rows=bad, out=out), out)
    assert_raises(error, said, lambda: objective.value(np.ones((C, D + 1)), rows=bad))


def test_rows_out_of_range_of_empty_features(backend):
    objective = fl.LinearObjective(fl.Softmax(), np.empty((0, 2)), [], backend=backend)
    with pytest.raises(IndexError, match=r"rows\[0\] is 0, but X has 0 rows"):
        objective.value(np.ones((3, 3)), rows=[0])


@pytest.mark.parametrize("name", COMPILED)
def test_errors_are_the_same_on_every_backend(name):
    """A check belongs to the driver: what one backend says, all say."""
    for targets in ([0, 1, 2, 3, 0], np.array([0, 1, 2, 300, 0], np.uint16), [0.5] * 5):
        said = []
        for backend in (name, "reference"):
            with pytest.raises((ValueError, TypeError)) as caught:
                fl.Softmax().value(SCORES, targets, backend=backend)
            said.append(str(caught.value))
        assert said[0] == said[1]
    assert BACKENDS[-1] == "reference"
