"""What training workers share: sums over all of them, rows gathered from all of them, and batch statistics.

A worker is a process of torch's default process group; without one there is one worker, and nothing here does anything.
Gradients flow through what is shared, so that the mean over the workers of their losses, which is what DDP follows, has
the gradient that one worker would find on the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


def workers() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, counted from 0."""
    return distributed.get_rank() if workers() > 1 else 0


def total(x: Tensor) -> Tensor:
    """The sum of a tensor over all workers, which each get; without gradient."""
    x = x.detach().clone()
    if workers() > 1:
        distributed.all_reduce(x)
    return x


def gather(x: Tensor) -> Tensor:
    """The rows (N, ...) of all workers one below the other, (workers * N, ...), in the order of their ranks.

    All workers must give as many rows.
    """
    if workers() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(workers())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every worker made something of these rows.
        return total(gradients[0].contiguous()).chunk(workers())[rank()]


def synchronise_batchnorm(module: nn.Module) -> None:
    """Let all batch normalisations within a module take their statistics over all workers.

    Parameters and buffers stay the same tensors under the same names.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm3d):
            synchronised = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            for tensor, value in [*child.named_parameters(), *child.named_buffers()]:
                setattr(synchronised, tensor, value)
            setattr(module, name, synchronised)
        else:
            synchronise_batchnorm(child)


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation with the statistics of all workers' batches, which must be of one size.

    In evaluation, and with one worker, it is torch's plain one. (torch's own over workers knows GPUs only.) Each
    worker's means and variances are put together as Chan, Golub and LeVeque do (1979), which loses no digits where the
    mean is large.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) to the same, of the same type."""
        if not self.training or workers() == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        # Statistics of half floats would be rounded to their few digits.
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        own_variance, own_mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
        means, variances = gather(torch.stack([own_mean, own_variance])[None]).unbind(dim=1)  # (workers, C)
        mean = means.mean(dim=0)
        variance = (variances + (means - mean).square()).mean(dim=0)
        with torch.no_grad():
            n = workers() * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / max(n - 1, 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return torch.addcmul((self.bias - mean * scale).view(shape), x, scale.view(shape)).to(input.dtype)
