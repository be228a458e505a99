"""The CUDA kernels without a GPU: all of them run in numba-cuda's simulator, against the reference.

The simulator is chosen when numba.cuda is imported, so these tests run in a process of their own: the first one starts
it, and shows its summary. `NUMBA_ENABLE_CUDASIM=1 pytest -W ignore::RuntimeWarning tests/test_cuda.py` is the same.
What the kernels compile to is looked at in `test_ptx.py`.
"""

import functools
import gc
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fastloss as fl
from tests.conftest import one_core

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
INSTALLED = importlib.util.find_spec("numba_cuda") is not None

if not SIMULATED:

    class Said:
        """A line of the summary."""

        def __init__(self, line):
            self.line = line

        def pytest_terminal_summary(self, terminalreporter):
            terminalreporter.write_line(self.line)

    @pytest.mark.skipif(not INSTALLED, reason="no CUDA kernel has run: numba-cuda is not installed")
    def test_all_kernels_in_the_simulator(request):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
        command += ["-m", request.config.option.markexpr, str(Path(__file__))]
        with one_core():
            done = subprocess.run(
                command, env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
                cwd=request.config.rootpath, capture_output=True, text=True,
            )  # fmt: skip
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        summary = done.stdout.strip().splitlines()[-1]
        assert re.search(r"\d+ passed", summary), summary
        assert "skipped" not in summary, summary
        request.config.pluginmanager.register(Said(f"CUDA kernels of scores, in numba-cuda's simulator: {summary}"))

    def test_the_reason_is_said_where_there_is_no_gpu():
        (info,) = [info for info in fl.list_backends() if info.name == "cuda"]
        if info.available:
            assert "compute capability" in info.reason
            return
        assert ("NVIDIA driver" in info.reason) if INSTALLED else ("fastloss[cuda12]" in info.reason)
        with pytest.raises(fl.BackendError, match=re.escape(info.reason)):
            fl.Softmax().value(np.zeros((2, 3)), [0, 1], backend="cuda")
        fl.synchronize()  # there is nothing to wait for


if SIMULATED:
    import ml_dtypes
    from numba import cuda

    from fastloss.gpu import arrays, device, driver, host, scores

    sys.setswitchinterval(1e-5)  # the simulator's threads wait for each other by polling
    BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
    #: Relative, and of the largest entry: what results of a type are off by at most here.
    TOLERANCE = {"float64": 1e-13, "float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}
    RNG = np.random.default_rng(5)
    PAIRS = RNG.random((40, 40))
    LOSSES = {
        "softmax": fl.Softmax(),
        "smoothed": fl.Softmax(label_smoothing=0.1),
        "all options": fl.Softmax(label_smoothing=0.2, z_loss=0.01, softcap=3.0, temperature=2.0),
        "hinge": fl.Hinge(),
        "hinge mean": fl.Hinge(over="mean", power=2, count_target=True),
        "hinge max": fl.Hinge(over="max", margin=0.3),
        "hinge max 2": fl.Hinge(over="max", power=2),
        "logistic": fl.Logistic(),
        "logistic mean": fl.Logistic(over="mean", pos_weight=3.0, label_smoothing=0.2),
    }

    def of_classes(c):
        """Losses whose options are for c classes."""
        return {
            "weights inside": fl.Softmax(label_smoothing=0.2, class_weight=RNG.random(c), softcap=5.0),
            "pairs": fl.Hinge(pair_margins=PAIRS[:c, :c], count_target=True),
            "pairs max": fl.Hinge(pair_margins=PAIRS[:c, :c], over="max", power=2),
            "columns": fl.Logistic(pos_weight=RNG.random(c), label_smoothing=0.1),
        }

    def to_device(array):
        return cuda.to_device(np.asarray(array))

    def from_device(array):
        return arrays.view(array, "it").to_host()

    def sample(n, c, dtype):
        dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
        s = (RNG.integers(-64, 65, (n, c)) / 16).astype(dtype)
        return s, RNG.integers(0, c, n)

    def agree(found, wanted, dtype, name=""):
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert found.shape == wanted.shape
        if name == "argmax":
            np.testing.assert_array_equal(found, wanted)
            return
        finite = wanted[np.isfinite(wanted)]
        tolerance = TOLERANCE[dtype]
        np.testing.assert_allclose(
            found, wanted, rtol=4 * tolerance, atol=tolerance * np.abs(finite).max(initial=0.1), err_msg=name
        )

    def compare(loss, s, y, outputs=None, **options):
        """A call with arrays on the device against the reference in float64."""
        outputs = loss.extra_outputs if outputs is None else outputs
        dtype = s.dtype.name
        with np.errstate(all="ignore"):
            wanted = loss.value_and_grad(
                s.astype(np.float64), y, outputs=outputs, backend="reference", **options
            )  # fmt: skip
        on_device = {
            name: to_device(value.astype(device.REAL[dtype])) if isinstance(value, np.ndarray) else value
            for name, value in options.items()
        }
        given = np.asarray(y)
        given = given.astype(device.REAL[dtype]) if given.ndim == 2 else given
        found = loss.value_and_grad(to_device(s), to_device(given), outputs=outputs, check=True, **on_device)
        assert type(found[0]) is type(found[1]) is type(to_device(s))
        agree(from_device(found[0]), wanted[0], device.REAL[dtype], "value")
        assert found[1].dtype == s.dtype
        agree(from_device(found[1]), wanted[1], dtype, "gradient")
        for name in outputs:
            agree(from_device(found[2][name]), wanted[2][name], device.REAL[dtype], name)

    @pytest.fixture
    def long(monkeypatch):
        """Rows of more than 16 classes are split."""
        monkeypatch.setattr(scores, "LONGEST", 16)
        monkeypatch.setattr(scores, "BLOCK_CLASSES", 16)
        monkeypatch.setattr(scores, "BETWEEN_BYTES", 100)
        scores.layout.cache_clear()
        yield
        scores.layout.cache_clear()

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize(("n", "c"), [(1, 1), (5, 2), (11, 3), (13, 10), (3, 33), (1, 257)])
    def test_every_loss(name, n, c):
        compare(LOSSES[name], *sample(n, c, "float32"))

    @pytest.mark.parametrize("name", ["softmax", "all options", "hinge", "hinge max 2"])
    @pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
    def test_every_type(name, dtype):
        compare(LOSSES[name], *sample(9, 10, dtype))
        compare(LOSSES[name], *sample(3, 17, dtype), reduction="none")

    @pytest.mark.parametrize("name", ["weights inside", "pairs", "pairs max"])
    def test_options_for_each_class(name):
        compare(of_classes(7)[name], *sample(5, 7, "float32"))

    @pytest.mark.parametrize("name", [*LOSSES, *of_classes(40)])
    def test_rows_split_over_blocks(name, long):
        loss = (LOSSES | of_classes(40))[name]
        compare(loss, *sample(2, 40, "float32"))

    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_split_rows_of_every_type(dtype, long):
        compare(LOSSES["softmax"], *sample(3, 33, dtype), reduction="sum", sample_weight=np.array([0.0, 1.0, 0.5]))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("name", ["softmax", "hinge"])
    def test_weights(name, reduction):
        loss, (s, y) = LOSSES[name], sample(9, 5, "float32")
        y[3] = 4
        weight = RNG.random(9) + 0.5
        weight[2] = 0
        s[2] = np.nan  # skipped
        loss = type(loss)(class_weight=RNG.random(5), ignore_index=4)
        upstream = RNG.random(9) if reduction == "none" else -0.5
        if reduction == "none":
            upstream[5] = 0
        compare(loss, s, y, (), reduction=reduction, sample_weight=weight, upstream=upstream)

    def test_class_weights_within_smoothing_count_in_the_mean():
        s, y = sample(9, 5, "float32")
        compare(fl.Softmax(class_weight=RNG.random(5), label_smoothing=0.3), s, y)

    @pytest.mark.parametrize("c", [7, 33])
    def test_probabilities(c, long):
        s, _ = sample(5, c, "float32")
        q = RNG.dirichlet(np.ones(c), 5).astype(np.float32)
        q[0] = np.eye(c)[2]
        compare(fl.Softmax(), s, q)
        compare(fl.Softmax(class_weight=RNG.random(c), z_loss=0.1), s, q, sample_weight=RNG.random(5))

    @pytest.mark.parametrize("c", [1, 7, 33])
    def test_labels(c, long):
        """Targets (N, C) of the logistic loss; and of a single column, labels 0 and 1."""
        s, _ = sample(5, c, "float32")
        t = np.where(RNG.random((5, c)) < 0.5, RNG.random((5, c)), RNG.random((5, c)) < 0.5).astype(np.float32)
        compare(fl.Logistic(), s, t)
        compare(fl.Logistic(class_weight=RNG.random(c), pos_weight=RNG.random(c)), s, t, sample_weight=RNG.random(5))
        labels = np.array([0, 1, 1, 0, 1])
        compare(fl.Logistic(class_weight=RNG.random(max(2, c)), label_smoothing=0.1), s, labels)
        labels[3], t[2, 0] = max(2, c), 1.5
        with pytest.raises(ValueError, match=rf"targets\[3\] is {max(2, c)}, but scores have {max(2, c)} classes"):
            fl.Logistic().value(to_device(s), to_device(labels), check=True)
        with pytest.raises(ValueError, match=r"targets\[2\] is not finite, or negative \(Logistic: or above 1\)"):
            fl.Logistic().value(to_device(s), to_device(t), check=True)

    @pytest.mark.parametrize("c", [5, 20])
    @pytest.mark.parametrize("name", ["softmax", "all options", "hinge", "hinge mean", "hinge max", "logistic"])
    def test_infinite_scores_and_nan(name, c, long):
        s, y = sample(9, c, "float32")
        y[:] = 1
        s[0, 3] = np.nan
        s[1, 1] = np.nan
        s[2, 3], s[3, 1] = np.inf, np.inf
        s[4, 3], s[5, 1] = -np.inf, -np.inf
        s[6, 3], s[6, 1] = np.inf, np.inf
        s[7] = -np.inf
        compare(LOSSES[name], s, y, ("row_loss", "argmax"), reduction="none")

    def test_far_scores_keep_their_digits():
        s = np.array([[30, 10, 5, 0], [1e4, 1e4 + 1, 0, 0], [-3e4, 0, 1, 2]], np.float32)
        compare(fl.Softmax(), s, np.array([0, 0, 1]), reduction="none")

    @pytest.mark.parametrize("kind", ["softmax", "log_softmax", "logsumexp", "sigmoid"])
    @pytest.mark.parametrize("shape", [(2, 3, 10), (2, 40), (0, 3)])
    def test_transforms(kind, shape, long):
        s = RNG.standard_normal(shape).astype(np.float32)
        if s.size:
            s.reshape(-1, shape[-1])[0, 1] = -np.inf
            s.reshape(-1, shape[-1])[1, 1] = np.inf
        found = getattr(fl, kind)(to_device(s))
        with np.errstate(all="ignore"):
            agree(from_device(found), getattr(fl, kind)(s.astype(np.float64), backend="reference"), "float32")

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_no_rows(reduction):
        compare(fl.Softmax(), *sample(0, 3, "float32"), reduction=reduction)

    def test_no_weight_at_all():
        compare(fl.Softmax(), *sample(3, 4, "float32"), sample_weight=np.zeros(3))

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int32, np.uint64])
    def test_targets_of_every_type(dtype):
        s, y = sample(5, 4, "float32")
        compare(fl.Hinge(), s, y.astype(dtype))

    def test_ignored_targets_beyond_a_sign():
        s, y = sample(5, 4, "float32")
        y = y.astype(np.uint64)
        y[2] = 2**63
        compare(fl.Softmax(ignore_index=2**63), s, y)

    def test_pointers_are_to_memory_that_is_kept(monkeypatch):
        """On a GPU, a pointer does not keep what it points to: here its `Pointer` does."""
        made = []

        class Watched(device.Buffer):
            def __init__(self, numbers):
                super().__init__(numbers)
                made.append(weakref.ref(self))

        monkeypatch.setattr(device, "Buffer", Watched)
        driver._zeros.cache_clear()
        s, y = (to_device(array) for array in sample(6, 5, "float32"))
        loss = fl.Softmax(class_weight=np.arange(1.0, 6), label_smoothing=0.1)
        fl.softmax(s)
        loss.value_and_grad(s, y)
        loss.value_from_stats(loss.stats(s, y), y)
        gc.collect()
        assert len(made) > 4
        assert all(buffer() is not None for buffer in made)

    def test_each_thread_has_a_workspace_of_its_own():
        own = device.workspace(0, 0)
        assert device.workspace(0, 0) is own
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(device.workspace, 0, 0).result() is not own

    def test_memory_that_begins_anywhere():
        """Rows that begin past a multiple of 16 bytes, in the tile and in the array."""
        s, y = sample(9, 7, "float32")
        wanted = from_device(fl.Softmax().value_and_grad(to_device(s), to_device(y))[1])
        leads = set()
        for skip in range(4):
            given = to_device(np.concatenate([np.zeros(skip, np.float32), s.ravel()]))[skip:].reshape(9, 7)
            out = to_device(np.zeros(9 * 7 + 3 - skip, np.float32))[3 - skip :].reshape(9, 7)
            leads.add(arrays.view(given, "it").address() % 16)
            np.testing.assert_array_equal(
                from_device(fl.Softmax().value_and_grad(given, to_device(y), out=out)[1]), wanted
            )  # fmt: skip
        assert leads == {0, 4, 8, 12}

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_out_and_in_place(dtype):
        s, y = sample(6, 5, dtype)
        wanted = from_device(fl.Softmax().value_and_grad(to_device(s), to_device(y))[1])
        out = to_device(np.zeros_like(s))
        assert fl.Softmax().value_and_grad(to_device(s), to_device(y), out=out)[1] is out
        np.testing.assert_array_equal(from_device(out), wanted)
        given = to_device(s)
        assert fl.Softmax().value_and_grad(given, y, out=given)[1] is given  # targets of the host are taken too
        np.testing.assert_array_equal(from_device(given), wanted)
        strided = to_device(np.asfortranarray(np.zeros_like(s)))
        fl.Softmax().value_and_grad(to_device(np.asfortranarray(s)), to_device(y), out=strided)
        np.testing.assert_array_equal(from_device(strided), wanted)

    def test_bad_targets_give_nan_and_an_error_later():
        s, y = sample(6, 5, "float32")
        y[2], y[4] = 5, -1
        message = r"targets\[2\] is 5, but scores have 5 classes \(0 to 4\)"
        _, grad = fl.Softmax().value_and_grad(to_device(s), to_device(y))
        assert np.isnan(from_device(grad)).all(axis=1).tolist() == [False, False, True, False, True, False]
        with pytest.raises(ValueError, match=message):
            fl.synchronize()
        fl.synchronize()  # said once
        fl.Hinge().value(to_device(s), to_device(y))
        with pytest.raises(ValueError, match=message):
            fl.softmax(to_device(s))
        with pytest.raises(ValueError, match=message):
            fl.Hinge(over="max").value(to_device(s), to_device(y), check=True)
        with pytest.raises(ValueError, match=r"targets\[2\] is 5"):
            fl.Softmax().value(to_device(s), y)  # of the host: at once
        fl.Softmax(ignore_index=5).value(to_device(s[:4]), to_device(y[:4]), check=True)

    def test_bad_targets_of_split_rows(long):
        s, y = sample(2, 40, "float32")
        y[1] = 1 << 40
        _, grad = fl.Softmax().value_and_grad(to_device(s), to_device(y))
        assert np.isnan(from_device(grad)).all(axis=1).tolist() == [False, True]
        with pytest.raises(ValueError, match=r"targets\[1\] is 1099511627776"):
            fl.synchronize()

    def test_bad_weights_and_probabilities():
        s, y = sample(4, 5, "float32")
        with pytest.raises(ValueError, match=r"sample_weight\[1\] is not finite, or negative"):
            fl.Softmax().value(to_device(s), to_device(y), sample_weight=to_device([1.0, -1, 2, 3]), check=True)
        q = np.full((4, 5), 0.2, np.float32)
        q[3, 1] = np.inf
        with pytest.raises(ValueError, match=r"a probability of targets\[3\] is not finite"):
            fl.Softmax().value(to_device(s), to_device(q), check=True)
        with pytest.raises(ValueError, match="sample_weight"):
            fl.Softmax().value(to_device(s), to_device(y), sample_weight=[1.0, -1, 2, 3])

    def test_errors_are_raised_before_anything_is_computed():
        s, y = sample(4, 5, "float32")
        given, targets = to_device(s), to_device(y)
        loss = fl.Softmax()
        cases = [
            (ValueError, "scores has shape", lambda: loss.value(to_device(s[0]), targets)),
            (TypeError, "scores has dtype int64", lambda: loss.value(targets.reshape(4, 1), targets)),
            (ValueError, r"targets has shape \(3,\)", lambda: loss.value(given, to_device(y[:3]))),
            (TypeError, "targets has dtype float32", lambda: loss.value(given, to_device(s[:, 0].copy()))),
            (TypeError, "class probabilities on a GPU must be", lambda: loss.value(given, to_device(s.astype("f8")))),
            (ValueError, "sample_weight has shape", lambda: loss.value(given, targets, sample_weight=to_device(s[0]))),
            (ValueError, "out has shape", lambda: loss.value_and_grad(given, targets, out=to_device(s[:2]))),
            (TypeError, "out is ndarray", lambda: loss.value_and_grad(given, targets, out=np.zeros_like(s))),
            (ValueError, "reduction", lambda: loss.value(given, targets, reduction="all")),
            (ValueError, "upstream", lambda: loss.value_and_grad(given, targets, upstream=to_device(s[0]))),
            (fl.BackendError, "arrays are on a GPU", lambda: loss.value(given, targets, backend="reference")),
        ]
        for kind, message, call in cases:
            with pytest.raises(kind, match=message):
                call()
        buffer = np.zeros(25, np.float32)
        whole = cuda.to_device(buffer, copy=False)
        with pytest.raises(ValueError, match="out overlaps scores; it may be scores itself"):
            loss.value_and_grad(whole[:20].reshape(4, 5), targets, out=whole[5:].reshape(4, 5))

    @pytest.mark.parametrize("name", ["softmax", "all options", "hinge max"])
    def test_host_arrays_are_streamed(name, monkeypatch):
        monkeypatch.setattr(host, "CHUNK_BYTES", 4 * 5 * 3)  # three rows at a time
        loss, (s, y) = LOSSES[name], sample(10, 5, "float32")
        options = {"outputs": loss.extra_outputs, "sample_weight": RNG.random(10)}
        found = loss.value_and_grad(s, y, backend="cuda", **options)
        wanted = loss.value_and_grad(s.astype(np.float64), y, backend="reference", **options)
        agree(found[0], wanted[0], "float32")
        agree(found[1], wanted[1], "float32")
        for output in loss.extra_outputs:
            agree(found[2][output], wanted[2][output], "float32", output)
        agree(fl.logsumexp(s, backend="cuda"), fl.logsumexp(s), "float32")
        agree(fl.softmax(s.astype(BFLOAT16), backend="cuda"), fl.softmax(s), "bfloat16")

    def test_what_does_not_go_through_the_gpu_says_so():
        s, y = sample(4, 5, "float32")
        with pytest.raises(fl.BackendError, match="stats of host arrays do not go through the GPU"):
            fl.Softmax().stats(s, y, backend="cuda")

    CURVED = {
        "softmax": fl.Softmax(temperature=0.7),
        "smoothed": fl.Softmax(label_smoothing=0.2, class_weight=[1, 0, 2, 0.5, 3, 1, 1, 2, 1.5]),
        "weighing": fl.Softmax(class_weight=[1, 0, 2, 0.5, 3, 1, 1, 2, 1.5], ignore_index=3),
        "hinge": fl.Hinge(power=2),
        "pairs": fl.Hinge(power=2, over="mean", pair_margins=PAIRS[:9, :9]),
        "max": fl.Hinge(power=2, over="max"),
    }

    def compare_diagonal(loss, s, y, **how):
        with np.errstate(all="ignore"):
            wanted = loss.hess_diag(s.astype(np.float64), y, **how)
        there = {name: to_device(given) for name, given in how.items()}
        out = to_device(np.zeros_like(s))
        assert loss.hess_diag(to_device(s), to_device(y), out=out, **there) is out
        fl.synchronize()
        agree(from_device(out), wanted, s.dtype.name, "diagonal")

    @pytest.mark.parametrize("name", CURVED)
    def test_diagonals_of_hessians(name):
        loss, (s, y) = CURVED[name], sample(9, 9, "float32")
        s[0], s[1, 2], s[2, 3], s[3, 4], s[4] = 0, np.nan, np.inf, -np.inf, -np.inf
        y[4] = 3
        compare_diagonal(loss, s, y)
        weight = RNG.random(9) + 0.5
        weight[1] = 0
        compare_diagonal(loss, s, y, sample_weight=weight)
        if name == "smoothed":
            compare_diagonal(fl.Softmax(class_weight=loss.class_weight), s, RNG.dirichlet(np.ones(9), 9).astype("f4"))
        compare_diagonal(fl.Softmax(), *sample(3, 1, "float32"))

    @pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
    def test_diagonals_of_every_type(dtype):
        compare_diagonal(fl.Softmax(), *sample(5, 20, dtype))

    def test_diagonals_that_cannot_be():
        s, y = sample(4, 5, "float32")
        given, wrong = to_device(s), y.copy()
        wrong[1] = 5
        found = from_device(fl.Softmax().hess_diag(given, to_device(wrong)))
        assert np.isnan(found).all(axis=1).tolist() == [False, True, False, False]
        with pytest.raises(ValueError, match=r"targets\[1\] is 5"):
            fl.synchronize()
        for loss in (fl.Hinge(), fl.Softmax(z_loss=0.1)):
            with pytest.raises(fl.BackendError, match=r"second derivative|not defined here"):
                loss.hess_diag(given, y)
        with pytest.raises(ValueError, match="out overlaps scores"):
            fl.Softmax().hess_diag(given, y, out=given)
        with pytest.raises(TypeError, match="scores has dtype int64"):
            fl.Softmax().hess_diag(to_device(y.reshape(4, 1)), y)
        assert fl.Softmax().hess_diag(to_device(s[:0]), y[:0]).shape == (0, 5)

    SHARDED = {
        "softmax": fl.Softmax(),
        "ignoring": fl.Softmax(ignore_index=3, class_weight=[1, 0, 2, 0.5, 3, 1, 1, 2]),
        "smoothed": fl.Softmax(label_smoothing=0.2, temperature=0.5),
        "all options": fl.Softmax(
            label_smoothing=0.3, class_weight=[1, 0, 2, 0.5, 3, 1, 1, 2], z_loss=0.01, softcap=6.0, temperature=2.0
        ),
    }  # fmt: skip

    def by_stats(loss, s, y, cuts, out=False, **how):
        """Value and gradient on the device, by way of the stats of shards."""
        edges = [0, *cuts, s.shape[1]]
        shards = [(a, to_device(np.ascontiguousarray(s[:, a:b]))) for a, b in itertools.pairwise(edges)]
        stats = [loss.stats(part, to_device(y), offset=a) for a, part in shards]
        merged = functools.reduce(lambda a, b: b.merge(a), stats)
        value_how = {name: given for name, given in how.items() if name != "upstream"}
        value = loss.value_from_stats(merged, to_device(y), **value_how)
        grads = [
            loss.gradient_from_stats(part, to_device(y), merged, offset=a, out=part if out else None, **how)
            for a, part in shards
        ]
        assert all(isinstance(array, type(shards[0][1])) for array in (value, *merged, *grads))
        return from_device(value), np.concatenate([from_device(grad) for grad in grads], axis=1)

    def compare_stats(loss, s, y, cuts, out=False, **how):
        wanted = loss.value_and_grad(s.astype(np.float64), y, backend="reference", **how)
        there = {name: to_device(given) if isinstance(given, np.ndarray) else given for name, given in how.items()}
        found = by_stats(loss, s, y, cuts, out, **there)
        fl.synchronize()
        agree(found[0], wanted[0], device.REAL[s.dtype.name], "value")
        assert found[1].dtype == s.dtype
        agree(found[1], wanted[1], s.dtype.name, "gradient")

    @pytest.mark.parametrize("name", SHARDED)
    @pytest.mark.parametrize(
        "cuts", [*(pytest.param(cuts, marks=pytest.mark.full) for cuts in ([], [3])), [0, 3, 3]], ids=str
    )
    def test_stats_of_shards(name, cuts):
        loss, (s, y) = SHARDED[name], sample(9, 8, "float32")
        compare_stats(loss, s, y, cuts)
        weight, upstream = RNG.random(9) + 0.5, RNG.random(9)
        weight[2], upstream[5] = 0, 0
        s[2] = np.nan
        compare_stats(loss, s, y, cuts, True, sample_weight=weight, reduction="sum", upstream=-0.5)
        compare_stats(loss, s, y, cuts, sample_weight=weight, reduction="none", upstream=upstream)
        compare_stats(loss, s[3:], y[3:], cuts, sample_weight=weight[3:])

    @pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
    def test_stats_of_every_type(dtype):
        compare_stats(fl.Softmax(), *sample(5, 8, dtype), [5])

    @pytest.mark.parametrize("name", ["softmax", "all options"])
    def test_stats_of_split_rows(name, long):
        loss, (s, y) = SHARDED[name], sample(3, 40, "float32")
        if loss.class_weight is not None:
            loss = fl.Softmax(label_smoothing=0.3, class_weight=RNG.random(40), softcap=6.0)
        s[1, :18] = -np.inf  # a block without a finite score
        y[1] = 39
        if not loss.label_smoothing:
            compare_stats(loss, s, y, [20], reduction="none")
        s[1] = s[0]
        compare_stats(loss, s, y, [20], reduction="none")

    @pytest.mark.parametrize("name", ["softmax", "smoothed"])
    def test_stats_of_infinite_scores_and_nan(name):
        s, y = sample(8, 8, "float32")
        y[:] = 1
        s[0, 3], s[1, 1], s[2, 3], s[3, 1] = np.nan, np.nan, np.inf, np.inf
        s[4, 3], s[5, 1], s[7, 4:] = -np.inf, -np.inf, -np.inf
        s[6] = -np.inf
        for cuts in ([], [4]):
            compare_stats(SHARDED[name], s, y, cuts, reduction="none")

    def test_stats_of_no_rows():
        value, grad = by_stats(fl.Softmax(), *sample(0, 4, "float32"), [2])
        assert np.isnan(value)
        assert grad.shape == (0, 4)

    def test_stats_of_the_host_are_taken():
        loss, (s, y) = fl.Softmax(label_smoothing=0.1), sample(5, 6, "float32")
        stats = loss.stats(s[:, :2], y).merge(loss.stats(to_device(s[:, 2:].copy()), to_device(y), offset=2))
        agree(from_device(loss.value_from_stats(stats, y)), loss.value(s, y), "float32")
        there = loss.stats(s, y)
        found = loss.gradient_from_stats(to_device(s), to_device(y), there)
        agree(from_device(found), loss.value_and_grad(s, y)[1], "float32")

    def test_stats_that_do_not_fit():
        s, y = sample(6, 4, "float32")
        y[2] = 9
        given, targets, loss = to_device(s), to_device(y), fl.Softmax()
        stats = loss.stats(given, targets)
        message = r"targets\[2\] is 9, and the stats of this row do not fit"
        values = from_device(loss.value_from_stats(stats, targets, reduction="none"))
        assert np.isnan(values).tolist() == [False, False, True, False, False, False]
        with pytest.raises(ValueError, match=message):
            fl.synchronize()
        grad = from_device(loss.gradient_from_stats(given, targets, stats))
        assert np.isnan(grad).all(axis=1).tolist() == np.isnan(values).tolist()
        with pytest.raises(ValueError, match=message):
            fl.synchronize()
        assert np.isfinite(from_device(fl.Softmax(ignore_index=9).value_from_stats(stats, targets)))
        y[2] = 1
        stats = loss.stats(given, to_device(y))
        smoothed, weighing = fl.Softmax(label_smoothing=0.1), fl.Softmax(class_weight=np.ones(5))
        for other, more in ((smoothed, ""), (weighing, "; the shards must have 5 classes")):
            other.value_from_stats(stats, to_device(y))
            with pytest.raises(ValueError, match=rf"targets\[0\] is {y[0]}, .*{more}"):
                fl.synchronize()
        cases = [
            (ValueError, "Hinge has no stats", lambda: fl.Hinge().stats(given, y)),
            (ValueError, "offset is -1", lambda: loss.stats(given, y, offset=-1)),
            (ValueError, "class_weight has 5", lambda: weighing.stats(given, y, offset=2)),
            (ValueError, r"with shards of the classes it must be \(6,\)", lambda: loss.stats(given, given)),
            (TypeError, "scores has dtype int64", lambda: loss.stats(targets.reshape(6, 1), y)),
            (TypeError, "stats is tuple", lambda: loss.gradient_from_stats(given, y, tuple(stats))),
            (ValueError, r"stats.maximum has shape \(6,\)", lambda: loss.gradient_from_stats(given[:3], y[:3], stats)),
            (TypeError, "targets has dtype float32", lambda: loss.value_from_stats(stats, given[:, 0].copy_to_host())),
            (ValueError, "reduction", lambda: loss.value_from_stats(stats, y, reduction="all")),
            (ValueError, "upstream", lambda: loss.gradient_from_stats(given, y, stats, upstream=[1.0] * 6)),
            (fl.BackendError, "arrays are on a GPU", lambda: loss.stats(given, y, backend="reference")),
        ]
        for kind, words, call in cases:
            with pytest.raises(kind, match=words):
                call()

    def test_the_same_bits_every_time():
        s, y = sample(40, 12, "float32")
        first, second = (fl.Softmax().value_and_grad(to_device(s), to_device(y)) for _ in range(2))
        assert from_device(first[0]).tobytes() == from_device(second[0]).tobytes()
        assert from_device(first[1]).tobytes() == from_device(second[1]).tobytes()

    def test_the_simulator_is_named():
        (info,) = [info for info in fl.list_backends() if info.name == "cuda"]
        assert info.available
        assert "simulator" in info.reason
        assert driver.device.SIMULATED
