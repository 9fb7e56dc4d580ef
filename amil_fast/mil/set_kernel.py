"""Kernel between bags with a least-squares classifier, averaged with the network's output (``kernel_weight``)."""

import torch

from amil_fast.nn import MaxPool, MeanPool

_CHUNK = 64  # bags compared with the training instances at a time; bounds the memory
_MEDIAN_SAMPLES = 2000  # evenly spaced instances from which the median distance is computed


class SetKernel:
    r"""Classifies bags by the similarity of their instances to those of the training bags.

    The similarity of two instances is :math:`r(x, z) = \exp(-\|x - z\|^2 / 2 c^2 m^2)` with m the median distance of
    training instances. The kernel between bags A and B is the sum of

    - the set kernel: the mean of r over the pairs of an instance of A and one of B, and
    - the inner product of the bags' vectors :math:`v_z = \max_{x \in A} r(x, z)` over all training instances z,

    each centered and scaled to a mean diagonal of 1/2 on the training bags. The classifier is kernel ridge regression
    on labels ±1. The fit is deterministic.

    It compares bags with training bags as a whole, so it does not respect the multiple-instance assumption.

    Args:
        instances: ``(n, features)``, instances of the training bags, packed.
        cu_seqlens: int64 ``(num_bags + 1,)``.
        labels: ``(num_bags,)``, 0 or 1.
        width: c.
        ridge: penalty on the squared norm in the feature space of the kernel.
    """

    def __init__(
        self,
        instances: torch.Tensor,
        cu_seqlens: torch.Tensor,
        labels: torch.Tensor,
        *,
        width: float = 0.7,
        ridge: float = 0.03,
    ):
        self._instances, self._cu_seqlens = instances, cu_seqlens
        some = instances[:: max(1, -(-len(instances) // _MEDIAN_SAMPLES))]
        median = torch.pdist(some).median() if len(some) > 1 else some.new_tensor(1.0)
        self._factor = -0.5 / (width * median.clamp(min=1e-6)) ** 2
        mean, self._largest = self._similarities(instances, cu_seqlens)
        kernels = (mean, self._largest @ self._largest.T)
        self._columns = [kernel.mean(0) for kernel in kernels]
        centered = [self._centered(kernel, columns) for kernel, columns in zip(kernels, self._columns, strict=True)]
        self._scales = [1 / kernel.diagonal().mean().clamp(min=1e-12) for kernel in centered]
        kernel = self._sum(centered)
        y = 2.0 * labels.to(kernel.dtype) - 1
        self._offset = y.mean()
        self._dual = torch.linalg.solve(kernel + ridge * torch.eye(len(y), dtype=kernel.dtype), y - self._offset)

    def decision(self, instances: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Regression value of each bag ``(B,)``: about 1 for positive, about -1 for negative bags."""
        mean, largest = self._similarities(instances, cu_seqlens)
        kernels = (mean, largest @ self._largest.T)
        centered = [self._centered(kernel, columns) for kernel, columns in zip(kernels, self._columns, strict=True)]
        return self._sum(centered) @ self._dual + self._offset

    def probabilities(self, instances: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """``sigmoid(2.5 · decision)`` of each bag ``(B,)``, which maps the targets ±1 to .92 and .08."""
        return torch.sigmoid(2.5 * self.decision(instances, cu_seqlens))

    def _similarities(self, instances, cu_seqlens):
        """Mean similarity to each training bag ``(B, num_bags)``, maximum to each training instance ``(B, n)``."""
        mean, largest = [], []
        for begin in range(0, len(cu_seqlens) - 1, _CHUNK):
            cu = cu_seqlens[begin : begin + _CHUNK + 1]
            similarity = torch.cdist(instances[cu[0] : cu[-1]], self._instances).square_().mul_(self._factor).exp_()
            chunk_seqlens = cu - cu[0]
            to_instances = MeanPool()(similarity, cu_seqlens=chunk_seqlens)
            mean.append(MeanPool()(to_instances.T.contiguous(), cu_seqlens=self._cu_seqlens).T)
            largest.append(MaxPool()(similarity, cu_seqlens=chunk_seqlens))
        return torch.cat(mean), torch.cat(largest)

    def _sum(self, centered):
        return sum(scale * kernel for scale, kernel in zip(self._scales, centered, strict=True)) / 2

    @staticmethod
    def _centered(kernel, columns):
        """Centers ``kernel (B, num_bags)`` at the training bags; ``columns``: column means of their kernel."""
        return kernel - kernel.mean(1, keepdim=True) - columns + columns.mean()
