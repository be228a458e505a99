"""What options cost: loss and gradient of scores, plain and with each option. `pytest benchmarks/test_options.py`."""

import numpy as np
import pytest

import fastloss as fl

SHAPES = [(65536, 10), (65536, 100), (16384, 1000)]
RNG = np.random.default_rng(0)


def losses(c):
    """Loss, kind of targets, extra outputs of each case, for c classes."""
    weight = RNG.random(c)
    return {
        "softmax": (fl.Softmax(), "index", ()),
        "softmax, class weight": (fl.Softmax(class_weight=weight), "index", ()),
        "softmax, label smoothing": (fl.Softmax(label_smoothing=0.1), "index", ()),
        "softmax, label smoothing, class weight": (fl.Softmax(label_smoothing=0.1, class_weight=weight), "index", ()),
        "softmax, temperature": (fl.Softmax(temperature=2.0), "index", ()),
        "softmax, z-loss": (fl.Softmax(z_loss=0.1), "index", ()),
        "softmax, softcap": (fl.Softmax(softcap=30.0), "index", ()),
        "softmax, probabilities": (fl.Softmax(), "probabilities", ()),
        "softmax, lse": (fl.Softmax(), "index", ("lse",)),
        "softmax, entropy": (fl.Softmax(), "index", ("entropy",)),
        "softmax, argmax": (fl.Softmax(), "index", ("argmax",)),
        "hinge": (fl.Hinge(), "index", ()),
        "hinge, count_target": (fl.Hinge(count_target=True), "index", ()),
        "hinge, pair margins": (fl.Hinge(pair_margins=RNG.random((c, c))), "index", ()),
        "hinge, argmax": (fl.Hinge(), "index", ("argmax",)),
    }


@pytest.mark.benchmark(min_rounds=15, max_time=0.5)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("case", losses(2))
def test_option(benchmark, case, shape):
    benchmark.group = f"{case.partition(',')[0]}, {shape[0]} x {shape[1]}"
    loss, kind, outputs = losses(shape[1])[case]
    scores = RNG.standard_normal(shape, np.float32)
    targets = RNG.integers(0, shape[1], shape[0])
    if kind == "probabilities":
        targets = RNG.dirichlet(np.ones(shape[1]), shape[0]).astype(np.float32)
    out = np.empty_like(scores)
    result = benchmark(loss.value_and_grad, scores, targets, out=out, outputs=outputs)
    assert result[1] is out
