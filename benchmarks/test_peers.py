"""pytest-benchmark over the same cases and the same table of peers as `fastloss bench`: `pytest benchmarks/`.

For comparing a library with itself, before and after a change (`--benchmark-autosave`, `--benchmark-compare`), and
for looking closely at one case (`-k "softmax-65536x10 and numpy"`). All runs in this one process, one at a time, but
thread pools of one library spin on after its work and slow the next one down, and JAX takes all CPUs: numbers that
compare libraries come from `fastloss bench`, which gives each a process of its own. Every benchmark asserts its answer.
"""

import functools

import numpy as np
import pytest

import fastloss as fl
from fastloss.bench import cases, peers

THREADS = min(2, fl.get_num_threads())
PEERS = [peer for peer in peers.table().values() if peer.default and not peer.control]


# One case at a time is kept: the largest takes hundreds of megabytes.
@functools.lru_cache(maxsize=1)
def _inputs(case):
    return case.inputs()


@functools.lru_cache(maxsize=1)
def _expected(case):
    work = peers.table()["fastloss-reference"].variants[case.kind]["out="](_inputs(case), THREADS)
    return work.answer(work.run())


def _grid():
    for case in cases.FULL:
        for peer in PEERS:
            if peer.why_not() is None and peer.lack(case) is None:
                for variant in peer.variants[case.kind]:
                    yield pytest.param(case, peer, variant, id=f"{case.name}-{peer.name}-{variant.replace(' ', '_')}")


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peer_is_here(peer):
    if reason := peer.why_not():
        pytest.skip(f"no benchmarks of {peer.name}: {reason}")


@pytest.mark.benchmark(min_rounds=3, max_time=0.3)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its compiler's own code warns of its own code
@pytest.mark.parametrize(("case", "peer", "variant"), list(_grid()))
def test_loss_and_gradient(benchmark, case, peer, variant):
    work = peer.variants[case.kind][variant](_inputs(case), THREADS)
    work.run()
    benchmark.group = case.name
    loss, *gradients = work.answer(benchmark(work.run))
    wanted_loss, *wanted = _expected(case)
    assert float(loss) == pytest.approx(wanted_loss, rel=1e-4)
    for gradient, reference in zip(gradients, wanted, strict=True):
        # At sizes like these a margin of the hinge that rounds to the other side of 0 changes an entry by 1/N.
        error = np.linalg.norm(gradient - reference)
        assert error <= 1e-3 * np.linalg.norm(reference)
