"""A class axis split in shards: the stats of any split, merged in any order, give what the whole gives."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastloss as fl
from fastloss.backends import reference
from tests.conftest import BACKENDS, same_bits

LOSSES = {
    "plain": fl.Softmax(),
    "ignoring": fl.Softmax(ignore_index=3),
    "class weights": fl.Softmax(class_weight=[1, 0, 2, 0.5, 3, 1, 1, 2, 4, 0.25]),
    "z-loss": fl.Softmax(z_loss=0.1),
    "softcap": fl.Softmax(softcap=4.0, temperature=0.5),
    "smoothing": fl.Softmax(label_smoothing=0.2, ignore_index=7),
    "smoothing, class weights": fl.Softmax(label_smoothing=0.1, class_weight=[1, 0, 2, 0.5, 3, 1, 1, 2, 4, 0.25]),
    "all": fl.Softmax(
        label_smoothing=0.3, class_weight=[1, 0, 2, 0.5, 3, 1, 1, 2, 4, 0.25], z_loss=0.01, softcap=30.0,
        temperature=2.0, ignore_index=3,
    ),
}  # fmt: skip
CALLS = {
    "mean": {},
    "sum, weighted": {"reduction": "sum", "sample_weight": np.arange(12) % 4},
    "mean, scaled": {"upstream": -2.0, "sample_weight": 1e-30 * (1 + np.arange(12))},
    "rows": {"reduction": "none", "upstream": np.linspace(-1, 1, 12).round(2)},
}


def shards_of(scores, cuts):
    """(offset, scores) of each shard; `cuts` are where the class axis is cut, equal ones make empty shards."""
    edges = [0, *sorted(cuts), scores.shape[1]]
    return [(a, scores[:, a:b]) for a, b in itertools.pairwise(edges)]


def merged(parts, rng):
    """Merge in a random order: any two at a time."""
    parts = list(parts)
    while len(parts) > 1:
        a, b = (parts.pop(int(rng.integers(len(parts)))) for _ in range(2))
        parts.append(a.merge(b))
    return parts[0]


def split(loss, scores, targets, cuts, rng, **call):
    """Value and gradient by way of stats."""
    how = {"backend": call.pop("backend")} if "backend" in call else {}
    shards = shards_of(scores, cuts)
    stats = merged([loss.stats(part, targets, offset=offset, **how) for offset, part in shards], rng)
    value_call = {name: given for name, given in call.items() if name != "upstream"}
    grads = [loss.gradient_from_stats(part, targets, stats, offset=offset, **how, **call) for offset, part in shards]
    return loss.value_from_stats(stats, targets, **value_call), np.concatenate(grads, axis=1)


def whole(loss, scores, targets, **call):
    """The same unsplit, computed in float64."""
    return loss.value_and_grad(scores.astype(np.float64), targets, backend="reference", **call)


def rounding(loss, scores):
    """By how many eps exponentials of a rounded s − m may be off, together: the largest of all rows.

    A kernel's exponentials are of d = s − m in the compute type (contract item 1; only the plain form of a whole loss
    never rounds d). d is rounded by at most |d| eps / 2, and exp(d + δ) = exp(d) (1 + δ): that is the relative error of
    one exponential, up to 43.7 eps in float32, where exp(−87.3) is the smallest normal number. Σ exp(d) without the
    maximum's own term, which is all of the loss of a row whose target has the maximum (log1p gives it on undamped), is
    thus off by Σ |d| exp(d) / Σ exp(d) · eps / 2. In a split, d is made in steps, s to a shard's maximum to a larger
    one, all of one sign: their errors add up to no more. Targets' scores and the maps of m are float64, class weights
    and upstream factors multiply by 1 + eps / 2: they are within the few eps that a bound has besides.
    What is compared with is computed in float64: of float64 scores it rounds as much on its own.
    """
    mapped, _ = reference.map_scores(loss, scores.astype(np.float64))
    d = np.sort(mapped - mapped.max(axis=1, keepdims=True))[:, :-1]
    wide = scores.dtype == np.float64
    d = np.maximum(d, np.log(np.finfo(np.float64 if wide else np.float32).smallest_normal))  # below, they may be 0
    mean = (-d * np.exp(d)).sum(axis=1) / np.exp(d).sum(axis=1)
    return float(mean.max()) * (1.0 if wide else 0.5)


def assert_same(found, wanted, dtype=np.float64, rounded=0.0):
    """rounded: see `rounding`"""
    (value, grad), (wanted_value, wanted_grad) = found, wanted
    assert grad.dtype == dtype
    info, computed = np.finfo(dtype), np.finfo(np.float64 if dtype == np.float64 else np.float32)
    # Below, exponentials may be 0 (contract item 6): before they are multiplied by their rows' weights, up to 12 here.
    tiny = 2 * 12 * float(computed.smallest_normal)
    np.testing.assert_allclose(value, wanted_value, rtol=(16 + rounded) * float(computed.eps), atol=tiny)
    largest = np.nan_to_num(np.abs(wanted_grad)).max(axis=1, keepdims=True)
    units = np.maximum(0, np.abs(grad - wanted_grad) - tiny) / (
        float(info.eps) * np.maximum(largest, float(info.smallest_normal))
    )
    np.testing.assert_array_equal(np.isnan(grad), np.isnan(wanted_grad))
    assert np.nan_to_num(np.abs(units)).max(initial=0) <= max(64, 40 + rounded)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 10), max_size=6),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    dtype=st.sampled_from([np.float64, np.float32, np.float16]),
)
@example(seed=3011, cuts=[5], scale=100.0, dtype=np.float32)  # one row's loss is 4 exp(−67.3), 32 eps off
def test_any_split_gives_the_unsplit_result(name, loss, call, seed, cuts, scale, dtype):
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=scale, size=(12, 10)).astype(dtype)
    targets = rng.integers(0, 10, 12)
    found = split(loss, scores, targets, cuts, rng, backend=name, **call)
    assert_same(found, whole(loss, scores, targets, **call), dtype, rounding(loss, scores))


AWKWARD = np.array(
    [
        [np.nan, 0, 1, 2],
        [np.inf, 0, 1, 2],
        [0, 1, np.inf, np.inf],
        [-np.inf, 0, -np.inf, 2],
        [-np.inf, -np.inf, -np.inf, -np.inf],
        [0, -np.inf, -np.inf, -np.inf],
        [-np.inf, -np.inf, np.nan, -np.inf],
        [1e4, 1e4 - 20, -1e4, 1e4],
        [1e300, -1e300, 0, 1e300],
        [5, 5, 5, 5],
        [30, 10, 5, 0],
        [-800, 0, 0, -800],
    ]
)


@pytest.mark.parametrize("cuts", [[], [0], [1], [2], [1, 2], [1, 2, 3], [0, 2, 2, 4], [3]], ids=str)
@pytest.mark.parametrize("target", range(4))
def test_infinite_and_nan_scores_as_in_the_contract(backend, cuts, target):
    targets = np.full(len(AWKWARD), target)
    smoothed = fl.Softmax(label_smoothing=0.25), fl.Softmax(label_smoothing=0.25, class_weight=[0, 2, 0, 1])
    for seed, loss in itertools.product(range(3), (fl.Softmax(), *smoothed)):
        rng = np.random.default_rng(seed)
        found = split(loss, AWKWARD, targets, cuts, rng, reduction="none", backend=backend)
        assert_same(found, whole(loss, AWKWARD, targets, reduction="none"))


@pytest.mark.parametrize("c", [1, 17, 40, 70, 300])
def test_shards_of_any_width(backend, c):
    """In either layout of a tile, more rows than a batch, strided too; the same bits for any number of threads."""
    rng = np.random.default_rng(c)
    weight = rng.integers(0, 4, 2 * c) / 2
    losses = [fl.Softmax(), fl.Softmax(ignore_index=3), fl.Softmax(softcap=4.0, temperature=0.5)]
    if c > 1:  # (of two classes, what is added may cancel the gradient)
        losses += [fl.Softmax(label_smoothing=0.1), fl.Softmax(label_smoothing=0.1, class_weight=weight, softcap=20.0)]
    for dtype, loss in itertools.product((np.float32, np.float64), losses):
        scores, targets = rng.normal(scale=4, size=(300, 2 * c)).astype(dtype), rng.integers(0, 2 * c, 300)
        assert_same(split(loss, scores, targets, [c], rng, backend=backend), whole(loss, scores, targets), dtype)
    left = scores[:, :c].copy()
    stats = loss.stats(scores, targets, backend=backend)
    grads = [loss.gradient_from_stats(left, targets, stats, backend=backend, n_threads=k) for k in (1, 2, 3)]
    assert same_bits(grads[0], grads[1])
    assert same_bits(grads[0], grads[2])


def test_one_dominant_class_keeps_the_digits_of_the_others():
    scores, targets = np.array([[30.0, 10, 5, 0]]), np.array([0])
    for cuts in ([1], [2], [1, 2, 3]):
        value, grad = split(fl.Softmax(), scores, targets, cuts, np.random.default_rng(0))
        np.testing.assert_allclose([value, -grad[0, 0]], 2.0611538e-9 + 1.3887944e-11 + 9.35762e-14, rtol=1e-7)


@pytest.mark.parametrize("c", [2, 20, 70])
def test_smoothing_where_one_class_has_all_weight(backend, c):
    """It has nearly all probability too, and is not the target: the gradient is tiny, and exact to its last places."""
    rng = np.random.default_rng(c)
    scores, targets, weight = rng.normal(size=(50, c)), rng.integers(0, c - 1, 50), np.zeros(c)
    weight[-1] = 3
    scores[:, -1] += np.linspace(5, 30, 50)
    loss = fl.Softmax(label_smoothing=0.1, class_weight=weight)
    for dtype, cuts in itertools.product((np.float32, np.float64), ([], [1], [c - 1], [c // 2, c // 2])):
        some = scores.astype(dtype)
        found = split(loss, some, targets, cuts, rng, backend=backend, reduction="sum")
        value, wanted = whole(loss, some, targets, reduction="sum")
        largest = np.abs(wanted).max(axis=1, keepdims=True)
        assert (np.abs(found[1] - wanted) <= 64 * float(np.finfo(dtype).eps) * largest).all()
        np.testing.assert_allclose(found[0], value, rtol=16 * float(np.finfo(dtype).eps))


def test_rows_of_weight_0_are_skipped_with_nan_in_them():
    scores = np.array([[np.nan, 1.0, 2], [1, 2, 3]])
    call = {"sample_weight": [0, 2]}
    found = split(fl.Softmax(), scores, np.array([1, 2]), [1], np.random.default_rng(0), **call)
    assert_same(found, whole(fl.Softmax(), scores, np.array([1, 2]), **call))
    assert (found[1][0] == 0).all()
    assert np.isfinite(found[0])


def test_an_empty_shard_changes_no_bit():
    rng = np.random.default_rng(0)
    scores, targets, loss = rng.normal(size=(6, 5)), rng.integers(0, 5, 6), fl.Softmax()
    stats, nothing = loss.stats(scores, targets), loss.stats(scores[:, :0], targets, offset=5)
    for both in (stats.merge(nothing), nothing.merge(stats)):
        assert all(same_bits(a, b) for a, b in zip(both, stats, strict=True))
    assert loss.gradient_from_stats(scores[:, :0], targets, stats, offset=5).shape == (6, 0)


def test_no_rows():
    scores, targets = np.zeros((0, 4)), np.zeros(0, int)
    value, grad = split(fl.Softmax(), scores, targets, [1], np.random.default_rng(0))
    assert np.isnan(value)
    assert grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint64])
def test_targets_of_any_integer_type(dtype):
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(9, 6)), rng.integers(0, 6, 9)
    found = split(fl.Softmax(), scores, targets.astype(dtype), [1, 4], rng)
    assert_same(found, whole(fl.Softmax(), scores, targets))


def test_inputs_are_not_written_and_out_is():
    rng = np.random.default_rng(0)
    scores, targets, loss = rng.normal(size=(9, 6)).astype(np.float32), rng.integers(0, 6, 9), fl.Softmax()
    scores.flags.writeable = False
    stats = loss.stats(scores[:, :4], targets).merge(loss.stats(scores[:, 4:], targets, offset=4))
    wanted = loss.gradient_from_stats(scores[:, 4:], targets, stats, offset=4)
    mine = scores[:, 4:].copy()
    assert loss.gradient_from_stats(mine, targets, stats, offset=4, out=mine) is mine
    assert same_bits(mine, wanted)
    with pytest.raises(ValueError, match="out has shape"):
        loss.gradient_from_stats(mine, targets, stats, offset=4, out=np.empty((9, 3), np.float32))


S, Y = np.zeros((4, 3)), np.array([0, 1, 4, 2])
STATS = fl.Softmax().stats(S, np.zeros(4, int), backend="reference")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fl.Hinge().stats(S, Y), ValueError, "Hinge has no stats: every class is compared"),
        (lambda: fl.Hinge().value_from_stats(STATS, Y), ValueError, "Hinge has no stats"),
        (lambda: fl.Hinge().gradient_from_stats(S, Y, STATS), ValueError, "Hinge has no stats"),
        (lambda: fl.Softmax(label_smoothing=0.1).value_from_stats(STATS, Y % 3), ValueError, "without label_smoothing"),
        (lambda: fl.Softmax(class_weight=[1] * 5).value_from_stats(STATS, Y % 3), ValueError, "merged have 3 classes"),
        (lambda: fl.Softmax().stats(S, S), ValueError, r"targets has shape \(4, 3\); with shards"),
        (lambda: fl.Softmax().stats(S, Y[:3]), ValueError, r"targets has shape \(3,\); it must be \(4,\)"),
        (lambda: fl.Softmax().stats(S, Y, offset=-1), ValueError, "offset is -1"),
        (lambda: fl.Softmax().stats(S, Y, offset=0.5), TypeError, "offset is 0.5"),
        (lambda: fl.Softmax(class_weight=[1, 1]).stats(S, Y), ValueError, "classes 0 to 2, but class_weight has 2"),
        (lambda: fl.Softmax().value_from_stats(STATS[:2], Y), TypeError, "stats is tuple"),
        (lambda: fl.Softmax().value_from_stats(STATS, Y[:3]), ValueError, r"stats.maximum has shape \(4,\)"),
        (lambda: fl.Softmax().value_from_stats(STATS, Y, reduction="max"), ValueError, "reduction is 'max'"),
        (lambda: fl.Softmax().value_from_stats(STATS, Y, sample_weight=[1]), ValueError, "sample_weight has shape"),
        (lambda: fl.Softmax().gradient_from_stats(S, Y, STATS, upstream=Y), ValueError, "upstream has shape"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_target_must_have_a_class_weight():
    loss, stats = fl.Softmax(class_weight=np.ones(3)), fl.Softmax().stats(np.zeros((2, 10)), np.array([1, 9]))
    with pytest.raises(ValueError, match=r"targets\[1\] is 9, but scores have 3 classes"):
        loss.value_from_stats(stats, np.array([1, 9]))
    with pytest.raises(ValueError, match=r"targets\[1\] is 9, but scores have 3 classes"):
        loss.gradient_from_stats(np.zeros((2, 3)), np.array([1, 9]), stats)


def test_a_target_must_be_in_one_shard():
    loss, left, right = fl.Softmax(), S[:, :2], S[:, 2:]
    stats = loss.stats(left, Y).merge(loss.stats(right, Y, offset=2))
    for call in (
        lambda: loss.value_from_stats(stats, Y),
        lambda: loss.gradient_from_stats(left, Y, stats),
    ):
        with pytest.raises(ValueError, match=r"targets\[2\] is 4, a class of none of the shards that are merged"):
            call()
    overlapping = loss.stats(S, Y % 3).merge(loss.stats(left, Y % 3))
    with pytest.raises(ValueError, match=r"targets\[0\] is 0, a class of several shards, which overlap"):
        loss.value_from_stats(overlapping, Y % 3)
    assert np.isfinite(fl.Softmax(ignore_index=4).value_from_stats(stats, Y))
