"""A kernel between bags with a least-squares classifier, to stand beside the network (``kernel_weight``)."""

import torch

from amil_fast.nn import MaxPool, MeanPool

_AT_ONCE = 64  # bags whose instances are compared with the training instances at once: bounds the memory
_FOR_WIDTH = 2000  # instances, evenly spaced, that the median distance is taken over


class SetKernel:
    r"""Classifies bags by how similar their instances are to those of the training bags.

    Two instances are similar by :math:`r(x, z) = \exp(-\|x - z\|^2 / 2 c^2 m^2)`, m the median distance of training
    instances. The kernel between bags A and B is the sum of

    - the set kernel: the mean of r over the pairs of an instance of A and one of B, and
    - the inner product of the bags' vectors :math:`v_z = \max_{x \in A} r(x, z)` over all training instances z,

    each centered and scaled to a mean of 1/2 for the training bags with themselves. The classifier is ridge regression
    of the labels ±1 on it. Nothing is drawn at random.

    Args:
        instances: ``(n, features)``, the instances of the training bags, one bag behind the other.
        cu_seqlens: int64 ``(bags + 1,)``.
        labels: ``(bags,)``, 0 or 1.
        width: c.
        ridge: penalty on the squared norm in the kernel's space.
    """

    def __init__(self, instances, cu_seqlens, labels, *, width=0.7, ridge=0.03):
        self._instances, self._cu_seqlens = instances, cu_seqlens
        some = instances[:: max(1, -(-len(instances) // _FOR_WIDTH))]
        median = torch.pdist(some).median() if len(some) > 1 else some.new_tensor(1.0)
        self._factor = -0.5 / (width * median.clamp(min=1e-6)) ** 2
        mean, self._largest = self._compared(instances, cu_seqlens)
        kernels = (mean, self._largest @ self._largest.T)
        self._columns = [kernel.mean(0) for kernel in kernels]
        centered = [self._centered(kernel, columns) for kernel, columns in zip(kernels, self._columns, strict=True)]
        self._scales = [1 / kernel.diagonal().mean().clamp(min=1e-12) for kernel in centered]
        kernel = self._sum(centered)
        y = 2.0 * labels.to(kernel.dtype) - 1
        self._offset = y.mean()
        self._dual = torch.linalg.solve(kernel + ridge * torch.eye(len(y), dtype=kernel.dtype), y - self._offset)

    def decision(self, instances, cu_seqlens):
        """The regression's value for each bag: about 1 for positive, -1 for negative ones."""
        mean, largest = self._compared(instances, cu_seqlens)
        kernels = (mean, largest @ self._largest.T)
        centered = [self._centered(kernel, columns) for kernel, columns in zip(kernels, self._columns, strict=True)]
        return self._sum(centered) @ self._dual + self._offset

    def probabilities(self, instances, cu_seqlens):
        """``sigmoid(2.5 · decision)``, which takes the targets ±1 to .92 and .08."""
        return torch.sigmoid(2.5 * self.decision(instances, cu_seqlens))

    def _compared(self, instances, cu_seqlens):
        """Mean similarity to each training bag ``(B, bags)``, largest one to each training instance ``(B, n)``."""
        mean, largest = [], []
        for begin in range(0, len(cu_seqlens) - 1, _AT_ONCE):
            cu = cu_seqlens[begin : begin + _AT_ONCE + 1]
            similarity = torch.cdist(instances[cu[0] : cu[-1]], self._instances).square_().mul_(self._factor).exp_()
            bags = {"cu_seqlens": cu - cu[0]}
            to_instances = MeanPool()(similarity, **bags)
            mean.append(MeanPool()(to_instances.T.contiguous(), cu_seqlens=self._cu_seqlens).T)
            largest.append(MaxPool()(similarity, **bags))
        return torch.cat(mean), torch.cat(largest)

    def _sum(self, centered):
        return sum(scale * kernel for scale, kernel in zip(self._scales, centered, strict=True)) / 2

    @staticmethod
    def _centered(kernel, columns):
        """``kernel (B, bags)`` with the training bags' mean as origin; ``columns``: the training bags' mean of each."""
        return kernel - kernel.mean(1, keepdim=True) - columns + columns.mean()
