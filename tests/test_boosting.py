"""The objectives for XGBoost and LightGBM: the trees of the libraries' own, and what those lack."""

import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import fastloss as fl
from fastloss.adapters import lightgbm as for_lightgbm
from fastloss.adapters import xgboost as for_xgboost

lightgbm = pytest.importorskip("lightgbm", reason="LightGBM is not installed")
xgboost = pytest.importorskip("xgboost", reason="XGBoost is not installed")

ROUNDS = 4


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X, y, np.random.default_rng(0).random(len(y)) + 0.5


# --- the diagonal of the Hessian -------------------------------------------------------------------------------------
LOSSES = [
    fl.Softmax(),
    fl.Softmax(label_smoothing=0.2, class_weight=[1, 2, 0.5, 3], temperature=1.7),
    fl.Softmax(class_weight=[1, 2, 0.5, 3], ignore_index=2),
    fl.Hinge(power=2),
    fl.Hinge(power=2, over="mean", pair_margins=np.arange(16).reshape(4, 4) / 8),
    fl.Hinge(power=2, over="max", margin=0.5),
    fl.Logistic(pos_weight=[1, 2, 0.5, 3], label_smoothing=0.1, over="mean"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("order", ["C", "F"])
def test_diagonal_is_the_difference_of_gradients(loss, order):
    rng = np.random.default_rng(1)
    scores, y, weight = rng.normal(size=(50, 4)), rng.integers(4, size=50), rng.integers(3, size=50) / 2
    found = loss.hess_diag(np.asarray(scores, order=order), y, sample_weight=weight)
    for j in range(4):
        h = np.zeros(4)
        h[j] = 1e-6
        more = {"sample_weight": weight, "reduction": "sum"}
        after, before = (loss.value_and_grad(s, y, **more)[1][:, j] for s in (scores + h, scores - h))
        np.testing.assert_allclose(found[:, j], (after - before) / 2e-6, atol=1e-6)


def test_diagonal_at_the_edges():
    assert fl.Softmax().hess_diag(np.zeros((0, 3)), np.zeros(0, int)).shape == (0, 3)
    sure = fl.Softmax().hess_diag([[40.0, 0.0]], [0])  # 1 − p is no difference of numbers near 1
    np.testing.assert_allclose(sure, np.exp(-40), rtol=1e-12)
    assert np.isnan(fl.Softmax().hess_diag([[np.nan, 0.0]], [0])).all()
    out = np.empty((5, 3), np.float32, order="F")
    scores = np.random.default_rng(0).normal(size=(5, 3))
    assert fl.Softmax().hess_diag(scores, np.arange(5) % 3, out=out) is out
    probabilities = np.full((5, 3), 0.5)
    np.testing.assert_allclose(fl.Softmax().hess_diag(scores, probabilities), 1.5 * out, rtol=1e-6)
    for loss in (fl.Hinge(), fl.Softmax(z_loss=1.0), fl.Softmax(softcap=1.0)):
        with pytest.raises(fl.BackendError, match=r"second derivative|Hessian"):
            loss.hess_diag(scores, np.arange(5) % 3)
    with pytest.raises(ValueError, match=r"targets\[3\] is 3"):
        fl.Softmax().hess_diag(scores, np.arange(5))
    with pytest.raises(ValueError, match="out must be"):
        fl.Softmax().hess_diag(scores, np.arange(5) % 3, out=np.empty((5, 2)))
    with pytest.raises(ValueError, match="out overlaps"):
        fl.Softmax().hess_diag(scores, np.arange(5) % 3, out=scores)
    one, two = (fl.Softmax().hess_diag(np.ones((9000, 20)), np.zeros(9000, int), n_threads=n) for n in (1, 2))
    assert one.tobytes() == two.tobytes()


# --- XGBoost ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weighted", [False, True])
def test_xgboost_grows_the_same_trees(digits, weighted):
    X, y, weight = digits
    data = xgboost.DMatrix(X, y, weight=weight if weighted else None)
    common = {"num_class": 10, "max_depth": 3, "base_score": 0.5, "nthread": 1}
    own = xgboost.train({**common, "objective": "multi:softprob"}, data, ROUNDS)
    record = {}
    ours = xgboost.train(
        {**common, "disable_default_eval_metric": 1}, data, ROUNDS, obj=for_xgboost.softmax_objective(),
        custom_metric=for_xgboost.softmax_metric(name="mine"), evals=[(data, "train")], evals_result=record,
        verbose_eval=False,
    )  # fmt: skip
    scores = [model.predict(data, output_margin=True) for model in (own, ours)]
    np.testing.assert_allclose(*scores, atol=1e-4)
    frames = [model.trees_to_dataframe() for model in (own, ours)]
    assert (frames[0]["Feature"] == frames[1]["Feature"]).all()
    value = fl.Softmax().value(scores[1], y, sample_weight=weight if weighted else None)
    assert record["train"]["mine"][-1] == pytest.approx(value, rel=1e-5)


def test_xgboost_wrapper(digits):
    X, y, weight = digits
    models = [
        xgboost.XGBClassifier(n_estimators=ROUNDS, max_depth=3, base_score=0.5, n_jobs=1, objective=objective)
        for objective in ("multi:softprob", for_xgboost.softmax_objective())
    ]
    own, ours = (model.fit(X, y, sample_weight=weight).predict(X, output_margin=True) for model in models)
    np.testing.assert_allclose(own, ours, atol=1e-4)


# --- LightGBM --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weighted", [False, True])
def test_lightgbm_grows_the_same_trees(digits, weighted):
    X, y, weight = digits
    common = {"num_class": 10, "num_leaves": 8, "verbosity": -1, "num_threads": 1, "boost_from_average": False}
    common |= {"deterministic": True, "force_col_wise": True}

    def train(objective, **more):
        data = lightgbm.Dataset(X, y, weight=weight if weighted else None)
        return lightgbm.train({**common, "objective": objective}, data, ROUNDS, valid_sets=[data], **more)

    record = {}
    own = train("multiclass")
    ours = train(
        for_lightgbm.softmax_objective(), feval=for_lightgbm.softmax_metric(name="mine"),
        callbacks=[lightgbm.record_evaluation(record)],
    )  # fmt: skip
    scores = [model.predict(X, raw_score=True) for model in (own, ours)]
    np.testing.assert_allclose(*scores, atol=1e-4)
    value = fl.Softmax().value(scores[1], y, sample_weight=weight if weighted else None)
    assert record["training"]["mine"][-1] == pytest.approx(value, rel=1e-5)


def test_lightgbm_wrapper(digits):
    X, y, weight = digits
    options = {"n_estimators": ROUNDS, "num_leaves": 8, "verbosity": -1, "boost_from_average": False, "n_jobs": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LightGBM's, on names of features and on raw scores
        scores = [
            lightgbm.LGBMClassifier(objective=objective, **options).fit(X, y, sample_weight=weight)
            for objective in ("multiclass", for_lightgbm.softmax_objective())
        ]
        scores = [model.predict(X, raw_score=True) for model in scores]
    np.testing.assert_allclose(*scores, atol=1e-4)


# --- what the libraries lack, and errors -----------------------------------------------------------------------------
@pytest.mark.parametrize("module", [for_xgboost, for_lightgbm])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax_objective", {"label_smoothing": 0.1}),
        ("softmax_objective", {"class_weight": np.linspace(1, 2, 10)}),
        ("squared_hinge_objective", {"over": "max"}),
        ("squared_hinge_objective", {}),
    ],
)
def test_other_objectives_learn(digits, module, name, options):
    X, y, _ = digits
    objective = pickle.loads(pickle.dumps(getattr(module, name)(**options)))
    if module is for_xgboost:
        matrix = xgboost.DMatrix(X, y)
        model = xgboost.train({"num_class": 10, "base_score": 0.0, "nthread": 1}, matrix, 10, obj=objective)
        scores = model.predict(matrix, output_margin=True)
    else:
        params = {"num_class": 10, "objective": objective, "verbosity": -1, "num_leaves": 15, "num_threads": 1}
        scores = lightgbm.train(params, lightgbm.Dataset(X, y), 10).predict(X, raw_score=True)
    assert (scores.argmax(axis=1) == y).mean() > 0.9


@pytest.mark.parametrize("module", [for_xgboost, for_lightgbm])
def test_what_does_not_fit_is_said(module):
    objective = module.softmax_objective()
    with pytest.raises(ValueError, match="set num_class"):
        objective(np.zeros(5), np.zeros(5))
    with pytest.raises(ValueError, match=r"label\[1\] is 0.5"):
        objective(np.array([0, 0.5]), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"targets\[1\] is 3"):
        objective(np.array([0.0, 3.0]), np.zeros((2, 3)))
    scores = np.zeros((4, 3))
    scores.flags.writeable = False
    grad, hess = objective(np.zeros(4), scores)
    assert grad.dtype == hess.dtype == np.float32
    assert (hess > 0).all()


def test_the_guide():
    """Its code runs, in order."""
    text = (Path(__file__).parents[1] / "docs/boosting.md").read_text(encoding="utf-8")
    space = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "docs/boosting.md", "exec"), space)
