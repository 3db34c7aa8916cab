"""BatchNorm over the batches of all processes together."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mimdet import processes


class SyncedBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d; with several processes it normalises by the statistics of all their batches.

    The state dict, the running statistics and, alone or in evaluation mode, every bit of the result
    are nn.BatchNorm2d's. While training, all processes must call it equally often; their batches
    may differ in size, and some or all may be empty. (nn.SyncBatchNorm refuses empty batches and
    tensors on the CPU.) A stem or neck of your own that needs BatchNorm should use this class.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) with N >= 0 -> the same shape and dtype."""
        if not self.training or processes.world() == 1:
            return super().forward(x)
        total, mean, variance = joint_statistics(x.detach())
        self.remember(total, mean, variance)
        return _Normalise.apply(x, self.weight, self.bias, total, mean, variance, self.eps)

    @torch.no_grad()
    def remember(self, total: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics as nn.BatchNorm2d does; an empty batch moves nothing."""
        unbiased = variance * total / (total - 1).clamp(min=1)
        share = self.momentum * (total > 0).to(mean.dtype)
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            running += share * (value - running)
        self.num_batches_tracked += 1


def joint_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values a channel (), mean (C,) and biased variance (C,) over the batches of all processes.

    x: (N, C, H, W), N >= 0. float32, or float64 where x is. One exchange: each process gives its
    count, mean and squared deviations, and these are combined as in Chan, Golub and LeVeque (1979).
    Sums of squares would be simpler, but lose their digits where the mean is far from zero.
    """
    x = _exact(x)
    count = x.numel() // x.shape[1]
    mean = variance = x.new_zeros(x.shape[1])
    if count:  # PyTorch's own pass over x: its mean and biased variance a channel
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    squares = variance * count
    everyone = processes.gather_rows(torch.cat([x.new_tensor([count]), mean, squares]))
    counts, means, squares = everyone.split([1, len(mean), len(mean)], dim=1)  # (world, ...)
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp(min=1)
    squares = (squares + counts * (means - mean).square()).sum(0)
    return total, mean, squares / total.clamp(min=1)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Normalise(torch.autograd.Function):
    """What evaluation computes, with mean and variance that came from all processes' x.

    x and the gradients are (N, C, H, W), everything else (C,) or a number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        total: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, total, mean, variance)
        ctx.eps = eps
        return F.batch_norm(_exact(x), mean, variance, weight, bias, eps=eps).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Weight and bias: the part of this process, as for every other parameter. x: all of it.

        x moves the mean and the variance, and so the outputs of every process: these two terms of
        the gradient (Ioffe and Szegedy 2015, section 3) need the sums over all processes.
        """
        x, weight, total, mean, variance = ctx.saved_tensors
        exact, grad_x, fixed, ours = _exact(x), _exact(grad), (mean, variance), (None, None, False)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        if len(x):  # as if mean and variance were constants
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad_x, exact, weight, *fixed, *ours, ctx.eps, [True, True, True]
            )
        average = torch.stack([grad_bias, grad_weight])
        processes.sum_in_place([average])
        average = average / total.clamp(min=1)
        scale = -weight * (variance + ctx.eps).rsqrt()
        grad_x = grad_x + F.batch_norm(
            exact, *fixed, scale * average[1], scale * average[0], eps=ctx.eps
        )
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None
