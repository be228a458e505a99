"""Every backend and instruction-set level against the reference, and the registry that chooses among them."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from tests.conftest import BACKENDS, COMPILED, ONE_OF_EACH, cpu_levels, grid_scores, layouts

# Around the widths of vectors (2 to 16), of tiles (16), of the change from few classes to many (64), and of blocks.
ROWS = (0, 1, 2, 3, 15, 16, 17, 31, 33, 64, 65, 127, 1000)
CLASSES = (1, 2, 3, 5, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 1000, 1025)
LEAN = sorted(
    {(17, c) for c in CLASSES} | {(n, c) for n in ROWS for c in (3, 10, 70)} | {(3, 5003), (1, 1025), (1025, 1)}
)
FULL = sorted(set(itertools.product((*ROWS, 1025), CLASSES)) - set(LEAN))


def agree(loss, scores, targets, backend, note="", **more):
    """The backend's results are the reference's, to the accuracy that test_contract asserts of each."""
    expected = loss.value_and_grad(np.array(scores, copy=True), targets, backend="reference", **more)
    more.setdefault("out", None)
    found = loss.value_and_grad(scores, targets, backend=backend, **more)
    eps = float(np.finfo(found[1].dtype).eps)
    for a, b in zip(found, expected, strict=True):
        tolerance = 0 if loss == fl.Hinge() else 16 * eps
        # Below the smallest normal number a backend may give 0, also for the terms of a sum.
        tiny = float(np.finfo(found[1].dtype).smallest_normal) * scores.shape[1]
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tiny, err_msg=f"{scores.shape}, {note}")
    return found


def sizes(sizes, loss, dtype, backend):
    rng = np.random.default_rng(20)
    for n, c in sizes:
        scores, y = grid_scores(rng, n, c, dtype), rng.integers(0, c, n)
        agree(loss, scores, y, backend, reduction="none")
        _, grad = agree(loss, scores, y, backend, reduction="sum")
        in_place = scores.copy()
        _, result = loss.value_and_grad(in_place, y, reduction="sum", out=in_place, backend=backend)
        assert result is in_place
        np.testing.assert_array_equal(in_place, grad, err_msg=f"in place, {scores.shape}")
        value = loss.value(scores, y, reduction="sum", backend=backend)
        expected = loss.value(scores, y, reduction="sum", backend="reference")
        assert value == pytest.approx(expected, rel=8 * float(np.finfo(dtype).eps)), scores.shape


def test_sizes(compiled, loss, dtype):
    sizes(LEAN, loss, dtype, compiled)


@pytest.mark.full
def test_all_sizes(compiled, loss, dtype):
    sizes(FULL, loss, dtype, compiled)


def test_transform_sizes(compiled, dtype):
    rng = np.random.default_rng(21)
    for n, c in LEAN:
        scores = grid_scores(rng, n, c, dtype)
        for kind in ("softmax", "log_softmax", "logsumexp", "sigmoid"):
            expected = getattr(fl, kind)(scores, backend="reference")
            found = getattr(fl, kind)(scores, backend=compiled)
            atol = 16 * float(np.finfo(dtype).eps) if kind == "logsumexp" else float(np.finfo(dtype).smallest_normal)
            tolerance = {"rtol": 16 * float(np.finfo(dtype).eps), "atol": atol}
            np.testing.assert_allclose(found, expected, **tolerance, err_msg=f"{kind}, {scores.shape}")


@pytest.mark.parametrize("shape", [(), (2,), (0,), (2, 3), (2, 0)])
def test_transforms_along_the_last_axis(backend, shape):
    scores = np.random.default_rng(0).standard_normal((*shape, 5))
    for kind in (fl.softmax, fl.log_softmax, fl.logsumexp):
        rows = kind(scores.reshape(-1, 5), backend=backend)
        found = kind(scores, backend=backend)
        assert found.shape == (shape if kind is fl.logsumexp else scores.shape)
        np.testing.assert_array_equal(found.ravel(), rows.ravel())


# --- layouts ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "c"), [(37, 10), (9, 100), (1, 6), (5, 1)])
def test_layouts(backend, loss, dtype, n, c):
    rng = np.random.default_rng(22)
    base, y = grid_scores(rng, n, c, dtype), rng.integers(0, c, n)
    for name, scores in layouts(base):
        _, grad = agree(loss, scores, y, backend, name, reduction="none")
        _, plain = agree(loss, base, y, backend, name, reduction="none")
        np.testing.assert_allclose(grad, plain, rtol=16 * float(np.finfo(dtype).eps), err_msg=name)
        if scores.flags.writeable and scores.flags.aligned:
            _, result = loss.value_and_grad(scores, y, reduction="none", out=scores, backend=backend)
            assert result is scores
            np.testing.assert_array_equal(scores, grad, err_msg=f"in place, {name}")
    for name, out in layouts(np.full((n, c), 9, dtype)):
        if out.flags.writeable and out.flags.aligned:
            _, result = agree(loss, base, y, backend, f"out in {name}", reduction="none", out=out)
            assert result is out


def test_layouts_leave_the_gaps_of_out_alone(backend, loss, dtype):
    rng = np.random.default_rng(23)
    for n, c in ((37, 10), (9, 100)):
        scores, y = grid_scores(rng, n, c, dtype), rng.integers(0, c, n)
        for view in (np.s_[1:-1, 2:-1], np.s_[:-2, 3:], np.s_[2:, :-3]):
            whole = np.full((n + 2, c + 3), 9, dtype)
            loss.value_and_grad(scores, y, out=whole[view], backend=backend)
            whole[view] = 9
            assert (whole == 9).all()
        wide = np.full((2 * n, 3 * c), 9, dtype)
        loss.value_and_grad(scores, y, out=wide[::2, ::3], backend=backend)
        wide[::2, ::3] = 9
        assert (wide == 9).all()


def test_transform_layouts(backend, dtype):
    for shape in ((37, 10), (9, 100)):
        base = grid_scores(np.random.default_rng(24), *shape, dtype)
        for kind in (fl.softmax, fl.log_softmax, fl.logsumexp):
            expected = kind(base, backend=backend)
            for name, scores in layouts(base):
                found = kind(scores, backend=backend)
                np.testing.assert_allclose(found, expected, rtol=16 * float(np.finfo(dtype).eps), err_msg=name)
                if scores.flags.writeable and scores.flags.aligned and kind is not fl.logsumexp:
                    assert kind(scores, out=scores, backend=backend) is scores
                    np.testing.assert_array_equal(scores, found, err_msg=f"in place, {name}")
            out = np.full(2 * expected.size, 9, dtype)[::-2].reshape(expected.shape)
            assert kind(base, out=out, backend=backend) is out
            np.testing.assert_allclose(out, expected, rtol=16 * float(np.finfo(dtype).eps))


def test_one_row_for_all(backend, loss):
    """Strides of 0: a row broadcast, a weight broadcast."""
    row = np.array([1.0, -2, 3, 0.5])
    scores, weight, y = np.broadcast_to(row, (20, 4)), np.broadcast_to(2.0, 20), np.broadcast_to(np.int8(1), 20)
    value, grad = loss.value_and_grad(scores, y, sample_weight=weight, backend=backend)
    assert value == pytest.approx(loss.value([row], [1], backend=backend), rel=1e-14)
    np.testing.assert_allclose(grad.sum(axis=0), loss.value_and_grad([row], [1], backend=backend)[1][0], rtol=1e-13)


def test_other_array_types(backend):
    """Lists, subclasses and memory maps are taken for the arrays that they are."""
    base, y = np.random.default_rng(0).standard_normal((4, 3)), [0, 2, 1, 0]
    expected, expected_grad = fl.Softmax().value_and_grad(base, y, backend=backend)

    class Subclass(np.ndarray):
        pass

    for scores in (base.tolist(), base.view(Subclass), memoryview(base)):
        value, grad = fl.Softmax().value_and_grad(scores, tuple(y), backend=backend)
        assert value == expected
        assert type(grad) is np.ndarray
        np.testing.assert_array_equal(grad, expected_grad)


# --- targets ----------------------------------------------------------------------------------------------------
INTEGERS = [np.dtype(kind + size) for kind in "iu" for size in "1248"]


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_targets_of_any_integer_type(backend, loss, kind):
    rng = np.random.default_rng(25)
    for n, c in ((0, 4), (1, 4), (50, 10), (20, 100)):
        scores, y = rng.standard_normal((n, c)), rng.integers(0, c, n)
        value, grad = loss.value_and_grad(scores, y, backend=backend)
        spread = np.full((n, 3), 99, kind)
        spread[:, 1] = y
        readonly = y.astype(kind)
        readonly.flags.writeable = False
        packed = np.zeros(n * kind.itemsize + 1, np.uint8)[1:].view(kind)
        packed[:] = y
        for targets in (
            readonly,
            spread[:, 1],
            y.astype(kind)[::-1].copy()[::-1],
            packed,
            y.astype(kind.newbyteorder()),
        ):
            found, found_grad = loss.value_and_grad(scores, targets, backend=backend)
            np.testing.assert_equal(found, value)
            np.testing.assert_array_equal(found_grad, grad)


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
@pytest.mark.parametrize("ignored", [-100, 2, 255, 2**63])
def test_ignored_targets_of_any_integer_type(backend, kind, ignored):
    """Also an ignore_index that the type of the targets cannot hold: then no row is ignored."""
    info = np.iinfo(kind)
    holds = info.min <= ignored <= info.max
    scores, y = np.random.default_rng(26).standard_normal((40, 4)), np.array([0, 1, 3, 1] * 10, kind)
    if holds:
        y[::3] = ignored
    loss, kept = fl.Softmax(ignore_index=ignored), y != ignored if holds else np.ones(40, bool)
    scores[~kept] = np.nan
    value, grad = loss.value_and_grad(scores, y, backend=backend)
    expected, expected_grad = fl.Softmax().value_and_grad(scores[kept], y[kept], backend=backend)
    assert value == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(grad[kept], expected_grad, rtol=1e-14)
    assert not grad[~kept].any()


def test_options_keep_their_digits(compiled):
    """A margin is not rounded to float32 on the way to a float64 kernel."""
    scores, y = grid_scores(np.random.default_rng(25), 9, 5, np.float64), np.arange(9) % 5
    for loss in (fl.Hinge(margin=0.1), fl.Hinge(margin=0.1, over="max"), fl.Hinge(margin=0.1, count_target=True)):
        expected = loss.value(scores, y, backend="reference")
        assert loss.value(scores, y, backend=compiled) == pytest.approx(expected, rel=1e-14)


# --- few rows of very many classes, split into blocks of classes ---------------------------------------------------
@pytest.mark.parametrize("special", [0.0, np.nan, np.inf])
@pytest.mark.parametrize(("n", "c"), [(1, 65537), (3, 70001)])
def test_long_rows(compiled, loss, dtype, n, c, special):
    """The largest scores are tied over blocks; the target is in the first block, in the last, and beside a special."""
    rng = np.random.default_rng(28)
    scores, y, weight = grid_scores(rng, n, c, dtype), np.array([c - 1, 7, 3])[:n], np.array([1.0, 0.5, 0.0])[:n]
    scores[:, [20000, 50000, 5]] = 9
    scores[0, 60000] += special
    expected = loss.value_and_grad(scores, y, sample_weight=weight, reduction="none", backend="reference")
    found = [
        loss.value_and_grad(scores, y, sample_weight=weight, reduction="none", backend=compiled, n_threads=threads)
        for threads in (1, 2, 3)
    ]
    eps = float(np.finfo(dtype).eps)
    for k in range(2):
        np.testing.assert_allclose(found[0][k], expected[k], rtol=16 * eps, atol=float(np.finfo(dtype).smallest_normal))
        assert found[0][k].tobytes() == found[1][k].tobytes() == found[2][k].tobytes()
    alone = loss.value(scores, y, sample_weight=weight, reduction="none", backend=compiled)
    np.testing.assert_array_equal(alone, found[0][0])
    _, in_place = loss.value_and_grad(scores, y, sample_weight=weight, reduction="none", out=scores, backend=compiled)
    np.testing.assert_array_equal(in_place, found[0][1])


def test_transforms_of_long_rows(compiled, dtype):
    scores = np.random.default_rng(29).normal(scale=5, size=(2, 70001)).astype(dtype)
    scores[0, [3, 69999]] = -np.inf
    for transform in (fl.softmax, fl.log_softmax, fl.logsumexp):
        expected = transform(scores, backend="reference")
        found = transform(scores, backend=compiled, n_threads=1)
        np.testing.assert_allclose(found, expected, rtol=64 * np.finfo(dtype).eps)
        assert found.tobytes() == transform(scores, backend=compiled, n_threads=2).tobytes()


# --- row multipliers --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "c"), [(37, 10), (9, 100)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_row_multipliers(backend, loss, dtype, n, c, reduction):
    """Sample weight × class weight × not ignored × upstream, together and alone, on top of the plain row results."""
    rng = np.random.default_rng(27)
    scores, y = grid_scores(rng, n, c, dtype), rng.integers(0, c, n)
    y[:3] = 2
    row_losses, row_grads = loss.value_and_grad(scores, y, reduction="none", backend=backend)
    row_losses, row_grads = row_losses.astype(float), row_grads.astype(float)
    sample, classes = rng.integers(0, 4, n) / 2, rng.integers(0, 4, c) / 4
    options = {f: getattr(loss, f) for f in ("margin", "power", "over") if hasattr(loss, f)}
    for use in itertools.product((False, True), repeat=4):
        weighted, by_class, ignoring, pulled = use
        some = {"class_weight": classes} if by_class else {}
        some |= {"ignore_index": 2} if ignoring else {}
        weight = (
            np.ones(n) * (sample if weighted else 1) * (classes[y] if by_class else 1) * (y != 2 if ignoring else 1)
        )
        factor = (rng.integers(-2, 3, n) / 2 if reduction == "none" else -1.5) if pulled else 1
        value, grad, extras = type(loss)(**options, **some).value_and_grad(
            scores, y, sample_weight=sample if weighted else None, upstream=factor if pulled else None,
            reduction=reduction, outputs=("row_loss",), backend=backend,
        )  # fmt: skip
        scale = 1 / weight.sum() if reduction == "mean" else 1
        eps = float(np.finfo(dtype).eps)
        expected = weight * row_losses if reduction == "none" else scale * (weight @ row_losses)
        np.testing.assert_allclose(value, expected, rtol=4 * eps, err_msg=str(use))
        np.testing.assert_allclose(grad, (scale * weight * factor)[:, None] * row_grads, rtol=6 * eps, err_msg=str(use))
        np.testing.assert_allclose(
            extras["row_loss"], np.where(weight > 0, row_losses, 0), rtol=4 * eps, err_msg=str(use)
        )
        assert not grad[weight * factor == 0].any()


# --- the registry -----------------------------------------------------------------------------------------------
def test_every_level_of_this_cpu_is_available():
    """A build without kernels would be slow in silence, and all tests of `compiled` would be skipped."""
    assert COMPILED
    assert set(COMPILED) == {"numba"} | {f"cython-{level}" for level in cpu_levels()}
    assert {"cython", "reference"} <= {info.name for info in fl.list_backends() if info.available}


def test_list_backends_gives_reasons():
    infos = {info.name: info for info in fl.list_backends()}
    assert {"cython", "cython-v2", "cython-v3", "cython-v4", "cython-base", "numba", "reference"} <= set(infos)
    assert all(isinstance(info.available, bool) and info.reason for info in infos.values())


def test_the_best_level_is_chosen():
    scores, y = np.random.default_rng(0).standard_normal((50, 9)), np.arange(50) % 9
    best = f"cython-{cpu_levels()[-1]}"
    value, grad = fl.Softmax().value_and_grad(scores, y, backend="cython")
    expected, expected_grad = fl.Softmax().value_and_grad(scores, y, backend=best)
    assert value == expected
    np.testing.assert_array_equal(grad, expected_grad)


@pytest.mark.parametrize("info", [i for i in fl.list_backends() if not i.available], ids=lambda info: info.name)
def test_backend_that_is_not_available_raises_with_the_reason(info):
    with pytest.raises(fl.BackendError) as error:
        fl.Softmax().value([[1.0, 2]], [0], backend=info.name)
    assert info.name in str(error.value)
    assert info.reason in str(error.value)


def test_use_backend():
    loss, scores = fl.Softmax(label_smoothing=0.1), [[1.0, 2.0, 3.0]]
    with fl.use_backend("reference"):
        inside = loss.value(scores, [0])
        with fl.use_backend(BACKENDS[0]):
            assert fl.Softmax().value(scores, [0]) == pytest.approx(2.4076, abs=1e-4)
        assert loss.value(scores, [0]) == inside
    assert inside == loss.value(scores, [0], backend="reference")
    with pytest.raises(KeyError), fl.use_backend("reference"):
        raise KeyError
    with pytest.raises(fl.BackendError, match="'no such'"), fl.use_backend("no such"):
        pass


# --- in a process of its own --------------------------------------------------------------------------------------
def python(code, **environment):
    """Run code in a fresh interpreter, with warnings shown; returns what it prints."""
    root = str(Path(fl.__file__).parents[1])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FASTLOSS_")}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=kept | {"PYTHONPATH": root} | environment,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def called(preparation, **environment):
    """What three calls print whose backend is chosen, after some lines of code."""
    code = "import sys, fastloss as fl, fastloss.backends as backends\n" + preparation
    text = python(code + "for _ in range(3): print(fl.Softmax().value([[1.0, 2.0]], [0]))", **environment)
    assert text.count("1.3132") == 3, text
    return text


REFUSE = "backends.get({!r}).why_not = lambda *call: 'it is {}'\n"


def test_automatic_choice_warns_once():
    """With made-up refusals: the plain call is served by every compiled backend."""
    text = called(REFUSE.format("cython", "Sunday"))
    assert text.count("BackendWarning") == 1, text
    assert "backend 'numba' is used" in text
    assert "'cython': it is Sunday" in text
    text = called(REFUSE.format("cython", "Sunday") + REFUSE.format("numba", "noon"))
    assert text.count("BackendWarning") == 1, text
    assert "backend 'reference' is used" in text
    assert "'cython': it is Sunday; 'numba': it is noon" in text


NO_EXTENSION = "sys.modules['fastloss._kernels.cpu'] = None\n"
NO_NUMBA = "sys.modules['numba'] = None\n"


def test_without_the_extension_numba_takes_over_in_silence():
    text = called(NO_EXTENSION + "print({i.name: i for i in fl.list_backends()}['cython'])\n")
    assert "available=False, reason='this is a pure-Python build (FASTLOSS_NO_EXT), without compiled kernels'" in text
    assert "Warning" not in text
    text = python(f"import sys\n{NO_EXTENSION}from fastloss.cli import main; main(['info'])")
    assert re.search(r"^kernels +none: .*pure-Python build", text, re.MULTILINE), text
    assert re.search(r"^backend +numba", text, re.MULTILINE), text
    text = python(f"import sys\n{NO_EXTENSION}import fastloss; fastloss.softmax([[1.0]], backend='cython-v2')")
    assert "BackendError: backend 'cython-v2' is not available: this is a pure-Python build" in text


def test_without_numba():
    """No reason to warn where the compiled kernels are; without them, the warning says what would help."""
    assert "Warning" not in called(NO_NUMBA)
    text = called(NO_EXTENSION + NO_NUMBA)
    assert text.count("BackendWarning") == 1, text
    assert "backend 'reference' is used" in text
    assert 'pip install "fastloss[numba]"' in text
    text = python(f"import sys\n{NO_NUMBA}import fastloss; fastloss.softmax([[1.0]], backend='numba')")
    assert "BackendError: backend 'numba' is not available: numba is not installed" in text


def test_automatic_choice_is_silent_where_it_is_served():
    text = python("import fastloss as fl; print(fl.Softmax().value([[1.0, 2.0]], [0]))")
    assert "1.3132" in text
    assert "Warning" not in text


def test_environment_variable_forces_a_backend():
    code = "import fastloss as fl\nprint(fl.Softmax(label_smoothing=0.5, z_loss=0.25).value([[1.0, 2.0]], [0]))"
    expected = fl.Softmax(label_smoothing=0.5, z_loss=0.25).value([[1.0, 2.0]], [0], backend="reference")
    assert python(code, FASTLOSS_BACKEND="reference").strip() == repr(expected)
    missing = [info.name for info in fl.list_backends() if not info.available]
    for name in missing[:1]:
        assert f"BackendError: backend '{name}' is not available" in python(code, FASTLOSS_BACKEND=name)
    text = python(code, FASTLOSS_BACKEND="fastest")
    assert "BackendError: FASTLOSS_BACKEND is 'fastest'" in text
    assert "reference" in text.splitlines()[-1]


@pytest.mark.parametrize("name", BACKENDS)
def test_environment_variable_takes_every_level(name):
    code = """
import fastloss as fl, fastloss.backends as backends
fl.Softmax().value([[1.0, 2.0]], [0])
print(backends.choose(None, "transform", "softmax", backends.np.dtype("f4"), ()).name)
"""
    assert python(code, FASTLOSS_BACKEND=name).strip() == name


@pytest.mark.parametrize("level", [name.removeprefix("cython-") for name in COMPILED if name != "numba"])
def test_environment_variable_forces_a_level(level):
    code = "import fastloss as fl\nprint({info.name: info.reason for info in fl.list_backends()}['cython'])"
    expected = {info.name: info.reason for info in fl.list_backends()}[f"cython-{level}"]
    assert python(code, FASTLOSS_LEVEL=level).strip() == expected
    assert "FASTLOSS_LEVEL is 'v9'" in python("import fastloss; fastloss.softmax([[1.0]])", FASTLOSS_LEVEL="v9")


def test_import_is_light():
    """Optional and slow modules are imported where they are used."""
    code = """
import sys, fastloss
slow = "scipy.optimize scipy.sparse sklearn matplotlib torch jax numba threadpoolctl tqdm"
print([name for name in slow.split() if name in sys.modules])
"""
    assert python(code).strip() == "[]"


# --- 64-bit indices ---------------------------------------------------------------------------------------------
def available_gigabytes():
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    return int(text.partition("MemAvailable:")[2].split()[0]) / 2**20


def needs_memory(gigabytes):
    return pytest.mark.skipif(available_gigabytes() < gigabytes, reason=f"needs {gigabytes} GB of free memory")


@pytest.mark.full
@needs_memory(11)
@pytest.mark.parametrize("level", ONE_OF_EACH)
@pytest.mark.parametrize("shape", [(32769, 65537), (214748365, 10)], ids=["many classes", "many rows"])
def test_scores_beyond_2_to_the_31(level, shape):
    n, c = shape
    assert n * c > 2**31
    scores, y = np.zeros(shape, np.float32), np.zeros(n, np.uint8)
    scores[-1, -1] = 50
    value, _ = fl.Softmax().value_and_grad(scores, y, reduction="sum", out=scores, backend=level)
    assert value == pytest.approx((n - 1) * np.log(c) + 50, rel=1e-6)
    np.testing.assert_allclose(scores[-2], np.array([1 / c - 1] + [1 / c] * (c - 1)), rtol=1e-5)
    assert scores[-1, 0] == -1
    assert scores[-1, -1] == 1


@pytest.mark.full
@needs_memory(4)
@pytest.mark.parametrize("level", ONE_OF_EACH)
def test_features_beyond_2_to_the_31(level):
    n, d = 2**31 // 3072 + 5, 3072
    X, y = np.zeros((n, d), np.uint8), np.zeros(n, np.uint8)
    X[-1], y[-1] = 1, 2
    W = np.zeros((3, d), np.float32)
    W[1] = 1
    value, grad = fl.LinearObjective(fl.Hinge(), X, y, bias=False, reduction="sum", backend=level).value_and_grad(W)
    assert value == 2 * (n - 1) + (d + 1) + 1
    np.testing.assert_array_equal(grad, np.outer([1, 1, -2], np.ones(d)))
    some = fl.LinearObjective(fl.Hinge(), X, y, bias=False, reduction="sum", backend=level).value(W, rows=[n - 1, 0])
    assert some == 2 + d + 2


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("n_classes", [1, 2, 10, 17, 49, 100, 1000])
@pytest.mark.parametrize("backend", COMPILED)
def test_scores_of_16_bits_are_read_and_written_as_they_are(backend, n_classes, name):
    """Computed in float32 from the exact scores; each gradient entry is rounded once, to nearest."""
    dtype = np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" else np.dtype(name)
    eps = float(ml_dtypes.finfo(dtype).eps)
    rng = np.random.default_rng(0)
    scores = (3 * rng.standard_normal((33, n_classes))).astype(dtype)
    scores[1, n_classes // 2], scores[2, 0] = np.nan, -np.inf
    targets = rng.integers(0, n_classes, len(scores))

    def close(found, wanted):
        a, b = found.astype(np.float64), wanted.astype(np.float64)
        with np.errstate(invalid="ignore"):
            near = np.abs(a - b) <= eps * np.abs(b) + 1e-7  # neighbours, where the float32 sums differ
        return bool(np.all((a == b) | near | (np.isnan(a) & np.isnan(b))))

    for loss in (fl.Softmax(), fl.Hinge(), fl.Hinge(power=2, over="mean"), fl.Hinge(over="max")):
        for layout in "CF":
            given = np.asarray(scores, order=layout)
            wanted, gradient = loss.value_and_grad(given, targets, reduction="sum", backend="reference")
            for out in (np.full_like(given, 7), given.copy(order="K")):
                source = out if out[0, 0] == given[0, 0] else given  # in place, where it is a copy
                value, found = loss.value_and_grad(source, targets, reduction="sum", backend=backend, out=out)
                assert found is out
                assert close(found, gradient), (loss, layout)
                np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for transform in (fl.softmax, fl.log_softmax, fl.logsumexp):
        found = transform(scores, backend=backend)
        assert found.dtype == dtype
        assert close(found, transform(scores, backend="reference"))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", COMPILED)
def test_every_number_of_16_bits_is_read_exactly(backend, name):
    dtype = np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" else np.dtype(name)
    infinity = np.array(np.inf, dtype).view(np.uint16)
    tiny = np.array(np.finfo(np.float32).smallest_normal).astype(dtype).view(np.uint16)  # below, kernels may take 0
    sizes = np.arange(max(tiny, 1), infinity, dtype=np.uint16)
    numbers = np.concatenate([sizes, sizes | 1 << 15]).view(dtype)
    for layout in "CF":
        scores = np.asarray(np.stack([numbers, np.zeros_like(numbers)], axis=1), order=layout)
        # margins s − 0 + 0: the loss of class 1 is the number itself, where it is positive
        losses = fl.Hinge(margin=0.0).value(scores, np.ones(len(scores), int), reduction="none", backend=backend)
        np.testing.assert_array_equal(losses, np.maximum(numbers.astype(np.float32), 0))
