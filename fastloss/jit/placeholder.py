"""Row losses of plain options, until those of all are there."""

import math

import numba


@numba.njit(error_model="numpy", fastmath={"contract"})
def softmax(scores, n, y, more, weight, lost, wants_gradient, options):
    """log Σ exp(s) − s_y."""
    c = len(scores)
    for r in range(n):
        m = scores[0, r]
        for k in range(1, c):
            if scores[k, r] > m:
                m = scores[k, r]
        own = scores[y[r], r]
        t, others = 0 * m, 0 * m
        for k in range(c):
            e = math.exp(scores[k, r] - m)
            t += e
            if k != y[r]:
                others += e
            scores[k, r] = e
        lost[r] = math.log(t) - (own - m)
        f = weight[r] / t
        for k in range(c):
            scores[k, r] *= f
        scores[y[r], r] = -others * f


LOSSES = {"softmax": softmax}
