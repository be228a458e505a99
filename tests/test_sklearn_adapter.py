"""The classifiers by scikit-learn's own checks and beside its own; its logistic regression within `accelerate()`."""

import importlib
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits, load_iris, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, _logistic
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastloss as fl
from fastloss.adapters.sklearn import (
    AccelerationWarning,
    HingeClassifier,
    SoftmaxClassifier,
    _accelerate,
    accelerate,
)
from fastloss.cli import main

ROOT = Path(__file__).parents[1]


def data(n_classes=3, n=200, d=6, seed=0, dtype=np.float64):
    X, y = make_classification(
        n, d, n_informative=d - 1, n_redundant=0, n_classes=n_classes, flip_y=0.1, random_state=seed
    )  # fmt: skip
    return (X + 3).astype(dtype), np.array([f"class {k}" for k in range(n_classes)])[y]


# --- scikit-learn's checks -------------------------------------------------------------------------------------------
CHECKED = [
    SoftmaxClassifier(),
    SoftmaxClassifier(solver="newton-cg"),
    SoftmaxClassifier(l1_ratio=0.5),
    HingeClassifier(),
    HingeClassifier(over="max"),
    HingeClassifier(over="mean"),
    HingeClassifier(power=1),
    HingeClassifier(power=1, over="max"),
    HingeClassifier(power=1, over="mean"),
    SoftmaxClassifier(solver="sgd"),
    HingeClassifier(solver="sgd"),
]


@pytest.mark.filterwarnings("default::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(CHECKED)
def test_estimator_checks(estimator, check):
    check(estimator)


# --- beside scikit-learn's own ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg", "fista"])
@pytest.mark.parametrize(
    "options", [{}, {"fit_intercept": False}, {"class_weight": "balanced", "C": 0.1}, {"C": np.inf}], ids=str
)
def test_softmax_is_logistic_regression(n_classes, solver, options):
    X, y = data(n_classes)
    weight = np.random.default_rng(1).random(len(y))
    theirs = LogisticRegression(tol=1e-8, max_iter=10000, **options).fit(X, y, weight)
    ours = SoftmaxClassifier(solver=solver, tol=1e-8, max_iter=20000, **options).fit(X, y, weight)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=2e-5)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=2e-3)
    assert ours.coef_.shape == theirs.coef_.shape
    assert ours.intercept_.shape == theirs.intercept_.shape
    assert (ours.predict(X) == theirs.predict(X)).all()


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_elastic_net_is_saga(n_classes, ratio):
    X, y = data(n_classes)
    X = StandardScaler().fit_transform(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs = LogisticRegression(C=0.05, solver="saga", l1_ratio=ratio, tol=1e-9, max_iter=20000).fit(X, y)
    ours = SoftmaxClassifier(C=0.05, l1_ratio=ratio, tol=1e-9, max_iter=20000).fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
    assert ((ours.coef_ == 0) == (theirs.coef_ == 0)).all()


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge"])
def test_two_classes_are_a_support_vector_machine(loss):
    """LinearSVC penalises the intercept: without one, the objectives are the same."""
    X, y = data(2)
    X = StandardScaler().fit_transform(X)
    dual = LinearSVC(loss=loss, fit_intercept=False, tol=1e-8, max_iter=100000, random_state=0).fit(X, y)
    ours = HingeClassifier(power=1 + (loss != "hinge"), fit_intercept=False, tol=1e-7).fit(X, y)
    np.testing.assert_allclose(ours.coef_, dual.coef_, atol=3e-3)


def test_crammer_singer_is_linear_svc():
    X, y = data(3)
    theirs = LinearSVC(multi_class="crammer_singer", fit_intercept=False, tol=1e-8, max_iter=100000).fit(X, y)
    ours = HingeClassifier(over="max", power=1, fit_intercept=False, tol=1e-7).fit(X, y)
    positions = np.searchsorted(ours.classes_, y)

    def value(W):
        return fl.Hinge(over="max").value(X @ W.T, positions, reduction="sum") + 0.5 * (W**2).sum()

    assert value(ours.coef_) <= value(theirs.coef_) * (1 + 1e-5)


# --- parameters and types --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint8, np.int32])
def test_types_of_features(dtype):
    digits = load_digits()
    X, y = digits.data.astype(dtype), digits.target
    model = SoftmaxClassifier(C=0.01).fit(X, y)
    wanted = np.float64 if dtype in (np.float64, np.int32) else np.float32
    assert model.coef_.dtype == model.intercept_.dtype == model.predict_proba(X).dtype == wanted
    exact = SoftmaxClassifier(C=0.01).fit(digits.data, y)
    np.testing.assert_allclose(model.predict_proba(X), exact.predict_proba(digits.data), atol=2e-2)
    assert model.score(X, y) > 0.97


def test_large_means_cost_no_digits_and_few_iterations():
    X, y = data(3)
    plain, moved = (SoftmaxClassifier(tol=1e-6).fit(Z, y) for Z in (X, X + 1e5))
    np.testing.assert_allclose(plain.coef_, moved.coef_, atol=1e-4)
    assert moved.n_iter_ <= plain.n_iter_ + 5


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (SoftmaxClassifier(C=0), "C is 0"),
        (SoftmaxClassifier(l1_ratio=2), "l1_ratio is 2"),
        (SoftmaxClassifier(solver="saga"), "solver is 'saga'"),
        (SoftmaxClassifier(solver="lbfgs", l1_ratio=0.5), "solver is 'lbfgs', which cannot train"),
        (SoftmaxClassifier(solver="smoothing"), "cannot train"),
        (SoftmaxClassifier(batch_size=32), "batch_size is 32, an option of solver=\"sgd\""),
        (SoftmaxClassifier(early_stopping=True), "early_stopping"),
        (SoftmaxClassifier(solver="sgd", batch_size=0), "batch_size is 0"),
        (SoftmaxClassifier(solver="sgd", momentum=1.0), "momentum"),
        (SoftmaxClassifier(fit_intercept=3), "fit_intercept is 3"),
        (SoftmaxClassifier(tol=-1), "tol is -1"),
        (SoftmaxClassifier(max_iter=1.5), "max_iter is 1.5"),
        (HingeClassifier(over="all"), "over is 'all'"),
        (HingeClassifier(power=1, solver="lbfgs"), "cannot train"),
        (HingeClassifier(power=2, solver="smoothing"), "cannot train"),
        (HingeClassifier(power=1, over="max", solver="dual"), "fit_intercept=True"),
        (HingeClassifier(power=1, over="max", fit_intercept=False, solver="dual"), "this X is dense"),
    ],
    ids=repr,
)
def test_parameters_that_do_not_fit(model, match):
    with pytest.raises((ValueError, TypeError), match=re.escape(match)):
        model.fit(*data())


def test_data_that_does_not_fit():
    X, y = data()
    with pytest.raises(ValueError, match="there is only 1 class"):
        SoftmaxClassifier().fit(X, np.zeros(len(X)))
    with pytest.raises(ValueError, match="at least one"):
        SoftmaxClassifier().fit(X, y, np.zeros(len(X)))
    with pytest.raises(ValueError, match=r"sample_weight\[0\] is -1"):
        SoftmaxClassifier().fit(X, y, -np.ones(len(X)))
    with pytest.raises(AttributeError, match="partial_fit"):
        _ = SoftmaxClassifier().partial_fit


def test_convergence_is_told_as_it_is():
    X, y = data()
    with pytest.warns(ConvergenceWarning, match="did not converge in 2 iterations"):
        SoftmaxClassifier(max_iter=2).fit(X, y)
    with pytest.warns(ConvergenceWarning, match="all 2 epochs"):
        SoftmaxClassifier(solver="sgd", early_stopping=True, max_iter=2).fit(X, y)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_warm_start(n_classes):
    X, y = data(n_classes)
    model = SoftmaxClassifier(warm_start=True).fit(X, y)
    first, coef = model.n_iter_[0], model.coef_
    model.fit(X, y)
    assert model.n_iter_[0] <= 1 < first
    np.testing.assert_allclose(model.coef_, coef, atol=1e-4)
    model.fit(X[:, :4], y)  # another shape: from the start
    assert model.coef_.shape[1] == 4


def test_verbose(capsys):
    SoftmaxClassifier(verbose=2).fit(*data())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("lbfgs: iteration 1, objective ")
    assert re.fullmatch(r"lbfgs: \d+ iterations, objective .*", lines[-1])


# --- sparse features -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("change", [scipy.sparse.csr_array, scipy.sparse.csc_matrix, scipy.sparse.coo_array])
@pytest.mark.parametrize(
    "model",
    [
        SoftmaxClassifier(tol=1e-8), SoftmaxClassifier(solver="newton-cg", tol=1e-8),
        SoftmaxClassifier(l1_ratio=0.5, tol=1e-8, max_iter=5000), SoftmaxClassifier(tol=1e-8, class_weight="balanced"),
        HingeClassifier(tol=1e-8), HingeClassifier(power=1, tol=1e-6), HingeClassifier(over="max", tol=1e-6),
        SoftmaxClassifier(solver="sgd", batch_size=32, step_size=0.01, fit_intercept=False, random_state=0),
    ],
    ids=repr,
)  # fmt: skip
def test_sparse_features_are_the_same_features(model, change, n_classes):
    X, y = data(n_classes)
    X[np.random.default_rng(0).random(X.shape) < 0.7] = 0
    dense = clone(model).fit(X, y)
    sparse = clone(model).fit(change(X), y)
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-3)
    found, wanted = sparse.decision_function(change(X)), dense.decision_function(X)
    if n_classes > 2:  # the softmax leaves open what all classes have in common
        found, wanted = (scores - scores.mean(axis=1, keepdims=True) for scores in (found, wanted))
    np.testing.assert_allclose(found, wanted, atol=5e-3)
    assert (sparse.predict(change(X)) == sparse.predict(X)).all()


def test_crammer_singer_in_the_dual():
    X, y = data(3)
    how = {"over": "max", "power": 1, "fit_intercept": False, "C": 0.01}
    sparse = HingeClassifier(**how, tol=1e-6).fit(scipy.sparse.csr_array(X), y)
    smooth = HingeClassifier(**how, tol=1e-6).fit(X, y)
    np.testing.assert_allclose(sparse.coef_, smooth.coef_, atol=5e-3)
    again = HingeClassifier(**how, tol=1e-6, solver="dual", random_state=3).fit(scipy.sparse.csr_array(X), y)
    np.testing.assert_allclose(again.coef_, sparse.coef_, atol=5e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_sparse_types_and_streams(dtype):
    X, y = load_digits(return_X_y=True)
    X, classes = scipy.sparse.csr_array(X.astype(dtype)), np.arange(10)
    stream = SoftmaxClassifier(solver="sgd", random_state=0)
    for part in np.array_split(np.random.default_rng(0).permutation(len(y)), 10):
        stream.partial_fit(X[part], y[part], classes=classes)
    assert stream.score(X, y) > 0.85
    stopped = SoftmaxClassifier(solver="sgd", early_stopping=True, random_state=0, max_iter=30, step_size=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        stopped.fit(X, y)
    assert stopped.score(X, y) > 0.9
    assert stopped.coef_.dtype == stopped.predict_proba(X).dtype == (np.float64 if dtype == np.float64 else np.float32)


# --- SGD -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_classes", [2, 3])
def test_sgd_comes_near_the_minimum(n_classes):
    X, y = data(n_classes, n=1000)
    X = StandardScaler().fit_transform(X)
    exact = SoftmaxClassifier().fit(X, y)
    model = SoftmaxClassifier(solver="sgd", batch_size=32, random_state=0, max_iter=50).fit(X, y)
    assert log_loss(y, model.predict_proba(X)) < log_loss(y, exact.predict_proba(X)) + 2e-3
    again = SoftmaxClassifier(solver="sgd", batch_size=32, random_state=0, max_iter=50).fit(X, y)
    assert model.coef_.tobytes() == again.coef_.tobytes()
    stopped = SoftmaxClassifier(solver="sgd", early_stopping=True, random_state=0, max_iter=200).fit(X, y)
    assert stopped.n_iter_[0] < 200


@pytest.mark.parametrize("make", [SoftmaxClassifier, HingeClassifier])
def test_partial_fit(make):
    X, y = data(3, n=1500)
    classes = np.unique(y)
    model = make(solver="sgd", batch_size=16, random_state=0)
    with pytest.raises(ValueError, match="classes is None"):
        model.partial_fit(X, y)
    for _ in range(5):
        for part in np.array_split(np.arange(len(X)), 3):  # the first call lacks no class, but could
            model.partial_fit(X[part], y[part], classes=classes)
    assert model.n_iter_[0] == 15
    assert model.score(X, y) > make().fit(X, y).score(X, y) - 0.05
    with pytest.raises(ValueError, match="earlier calls had"):
        model.partial_fit(X, y, classes=classes[:2])
    with pytest.raises(ValueError, match="not one of the classes"):
        model.partial_fit(X, np.where(np.arange(len(y)) == 7, "class 9", y))
    one = make(solver="sgd").partial_fit(X[:5], np.repeat(classes[:1], 5), classes=classes)
    assert one.decision_function(X).shape == (1500, 3)


# --- within scikit-learn ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_grid_search_in_parallel(backend):
    X, y = data(n=300)
    search = GridSearchCV(
        make_pipeline(StandardScaler().set_output(transform="pandas"), SoftmaxClassifier()),
        {"softmaxclassifier__C": [0.01, 1.0]},
        n_jobs=2,
        cv=3,
    )
    with joblib.parallel_config(backend):
        found = search.fit(X, y)
    assert found.best_score_ > 0.6
    alone = search.set_params(n_jobs=None).fit(X, y)
    np.testing.assert_allclose(found.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    assert found.best_estimator_[-1].feature_names_in_[0] == "x0"


def test_calibration_and_files(tmp_path):
    X, y = data(n=300)
    calibrated = CalibratedClassifierCV(HingeClassifier()).fit(X, y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(axis=1), 1)
    model = HingeClassifier(over="max").fit(X, y)
    joblib.dump(model, tmp_path / "model")
    for copy in (pickle.loads(pickle.dumps(model)), joblib.load(tmp_path / "model")):
        assert (copy.decision_function(X) == model.decision_function(X)).all()


def test_metadata_routing():
    from sklearn import config_context

    X, y = data(n=300)
    weight = np.where(y == "class 0", 100.0, 1.0)
    with config_context(enable_metadata_routing=True):
        model = SoftmaxClassifier().set_fit_request(sample_weight=True).set_score_request(sample_weight=False)
        found = cross_validate(model, X, y, params={"sample_weight": weight}, return_estimator=True)
    plain = cross_validate(SoftmaxClassifier(), X, y, return_estimator=True)
    weighted, unweighted = found["estimator"][0], plain["estimator"][0]
    assert (weighted.predict(X) == "class 0").sum() > (unweighted.predict(X) == "class 0").sum() + 30


# --- accelerate ------------------------------------------------------------------------------------------------------
NAMES = ("LinearModelLoss", "optimize", "_newton_cg")


def names():
    return [getattr(_logistic, name) for name in NAMES]


@pytest.fixture
def watched(monkeypatch):
    """Calls of the objectives within."""
    calls = []

    class Watched(fl.LinearObjective):
        def value_and_grad(self, *arguments):
            calls.append("value_and_grad")
            return super().value_and_grad(*arguments)

        def hessp(self, *arguments):
            calls.append("hessp")
            return super().hessp(*arguments)

    monkeypatch.setattr(_accelerate.fl, "LinearObjective", Watched)
    return calls


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("change", [np.asarray, scipy.sparse.csr_array, scipy.sparse.csr_matrix])
def test_accelerated_logistic_regression(watched, dtype, n_classes, solver, intercept, change):
    X, y = data(n_classes, n=300, dtype=dtype)
    weight = np.random.default_rng(0).random(len(y))
    X = change(X - X.mean(axis=0))
    tol = 1e-8 if dtype == np.float64 else 1e-5
    options = {"solver": solver, "C": 0.5, "fit_intercept": intercept, "tol": tol, "max_iter": 500}
    plain = LogisticRegression(**options).fit(X, y, weight)
    assert not watched
    before = names()
    with accelerate():
        fast = LogisticRegression(**options).fit(X, y, weight)
    assert names() == before
    assert set(watched) == ({"value_and_grad"} if solver == "lbfgs" else {"value_and_grad", "hessp"})
    # In float32 both end where rounding lets them.
    np.testing.assert_allclose(fast.coef_, plain.coef_, atol=1e-6 if dtype == np.float64 else 5e-3)
    np.testing.assert_allclose(fast.intercept_, plain.intercept_, atol=1e-6 if dtype == np.float64 else 2e-2)
    assert fast.coef_.dtype == plain.coef_.dtype


def test_accelerated_cross_validation(watched):
    X, y = data(3, n=200)
    options = {"Cs": 3, "l1_ratios": (0,), "use_legacy_attributes": False, "scoring": "neg_log_loss"}
    plain = LogisticRegressionCV(**options).fit(X, y)
    with accelerate():
        fast = LogisticRegressionCV(**options).fit(X, y)
    assert watched
    assert fast.C_ == plain.C_
    np.testing.assert_allclose(fast.coef_, plain.coef_, atol=2e-3)


def test_all_is_as_before_whatever_happened():
    before = names()

    def fails():
        with accelerate(), accelerate():
            assert names() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert names() == before
    leave, entered = threading.Event(), threading.Event()

    def other():
        with accelerate():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with accelerate():
        thread.start()
        entered.wait()
    assert names() != before  # the other block lasts
    leave.set()
    thread.join()
    assert names() == before


@pytest.mark.parametrize(
    ("weight", "solver", "match"),
    [
        (-0.1, "lbfgs", "negative"),
        (1.0, "newton-cholesky", "newton-cholesky takes whole Hessian matrices"),
    ],
)
def test_what_is_not_accelerated_says_why_once(weight, solver, match):
    X, y = data(3)
    weights = np.where(np.arange(len(y)) == 3, weight, 1.0)
    plain = LogisticRegression(solver=solver).fit(X, y, weights)
    with accelerate():
        with pytest.warns(AccelerationWarning, match=match):
            first = LogisticRegression(solver=solver).fit(X, y, weights)
        LogisticRegression(solver=solver).fit(X, y, weights)  # in silence: warnings are errors here
    assert (first.coef_ == plain.coef_).all()


def test_a_version_that_is_not_known(monkeypatch):
    monkeypatch.setattr(_accelerate.sklearn, "__version__", "2.0.dev0")
    before = names()
    with pytest.warns(AccelerationWarning, match=r"its version is 2\.0\.dev0"), accelerate():
        assert names() == before


def test_the_command(tmp_path, capsys, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent("""
        import sys
        import helper
        from sklearn.linear_model import _logistic
        print(sys.argv[1:], __name__, "fastloss" in _logistic.LinearModelLoss.__module__, helper.NUMBER)
        if "fail" in sys.argv:
            raise ValueError("the script's own")
        sys.exit(3)
    """))
    (tmp_path / "helper.py").write_text("NUMBER = 7\n")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        main(["accelerate", str(script), "--flag", "x"])
    assert ended.value.code == 3
    assert capsys.readouterr().out == "['--flag', 'x'] __main__ True 7\n"
    assert main(["accelerate", str(script), "fail"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("ValueError: the script's own\n")
    assert "cli.py" not in shown
    assert main(["accelerate", str(tmp_path / "none.py")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.full
def test_scikit_learns_own_tests_pass_within():
    """The same tests of logistic regression pass with and without."""
    code = """
        import sys, pytest
        from contextlib import nullcontext
        from fastloss.adapters.sklearn import accelerate
        with accelerate() if sys.argv[1] == "on" else nullcontext():
            options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "/", "-W", "ignore"]
            sys.exit(pytest.main(["--pyargs", "sklearn.linear_model.tests.test_logistic", *options]))
    """
    ended = []
    for mode in ("off", "on"):
        command = [sys.executable, "-c", textwrap.dedent(code), mode]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        ended.append(re.sub(r" in .*", "", run.stdout.strip().splitlines()[-1]))
    assert ended[0] == ended[1]
    assert "passed" in ended[0]


def test_iris_and_the_parameters_in_the_documents():
    X, y = load_iris(return_X_y=True)
    assert SoftmaxClassifier().fit(X, y).score(X, y) > 0.95
    for made in (SoftmaxClassifier, HingeClassifier):
        for name in made().get_params():
            assert re.search(rf"^    {name} : ", made.__doc__, re.MULTILINE), name
        assert "<" not in made.__doc__


def test_the_guide():
    """Its code runs, in order; its table of lines names what there is."""
    text = (ROOT / "docs/sklearn.md").read_text(encoding="utf-8")
    space = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "docs/sklearn.md", "exec"), space)
    for name in re.findall(r"fastloss\.adapters\.sklearn import (\w+)", text):
        assert hasattr(importlib.import_module("fastloss.adapters.sklearn"), name)
