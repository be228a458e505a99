"""PyTorch's multiclass losses on CPUs and NVIDIA GPUs, computed by fastloss: change the import, keep the training loop.

Signatures, shapes, dtypes, reductions and the denominators of means are PyTorch's. What differs, on purpose:

- `multi_margin_loss` and `linear_multi_margin_loss` give NaN for scores with NaN, which PyTorch drops.
- Targets may be of any integer type. A class outside the scores' is an IndexError that says where it stands.
- Rows that count nothing (class weight 0, or ignored) are skipped, even with NaN in them.
- Class weights must be finite; probability targets finite and not negative.
- Second derivatives, of scores alone, are PyTorch's; there is no forward mode. What there is not raises, as do tensors
  that are not on a CPU or an NVIDIA GPU.
- On a GPU nothing waits: a class outside the scores' gives NaN, and a ValueError in the next call or
  `fastloss.synchronize`. Negative class weights within label smoothing, or for probabilities, raise there.

How a call goes. In a plain eager call, loss and gradient of a matrix of scores come of one pass in forward; backward
hands the gradient on, scaled in place where its upstream factor is not 1. With `reduction="none"`, class weights,
probabilities or more dimensions, and wherever something watches (a compiler, a transform), forward computes the loss
alone; backward reads the scores again and writes their gradient, upstream factor included. Either way the gradient is
the only array of the scores' size. The linear losses compute their gradients in forward, where the scores of each chunk
of rows are at hand, and backward scales them; with `reduction="none"`, in float16, and if it runs again, it computes
them anew.

All this is in operators of `torch.library`, which `torch.compile` keeps as they are. Plain eager calls go to the
same functions without the dispatcher's Python, which would cost more than a small call itself.
"""

from fastloss.adapters.torch._arrays import empty_cache
from fastloss.adapters.torch._functions import (
    cross_entropy,
    linear_cross_entropy,
    linear_multi_margin_loss,
    multi_margin_loss,
)
from fastloss.adapters.torch._modules import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    LinearMultiMarginLoss,
    MultiMarginLoss,
)

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LinearMultiMarginLoss",
    "MultiMarginLoss",
    "cross_entropy",
    "empty_cache",
    "linear_cross_entropy",
    "linear_multi_margin_loss",
    "multi_margin_loss",
]
