"""Bags as arguments of the adjust pooling kernels."""

import functools

import torch
from amil_fast.kernels.adjust_pool_config import MAX_FEATURES, TritonPlan, pick_plan


@functools.lru_cache
def _device_limits(device):
    """Multiprocessors, shared memory per program, compute capability; of an H200 for tensors that are not on a GPU."""
    if device.type != "cuda":
        return 132, 227 << 10, 90
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, capability


class KernelBags:
    """Bags as kernel arguments: sizes and strides; ``inputs`` of :func:`bag_inputs`."""

    def __init__(
        self,
        instances: torch.Tensor,
        mask: torch.Tensor | None,
        lengths: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> None:
        self.packed = cu_seqlens is not None
        self.masked = mask is not None
        self.ragged = self.packed or lengths is not None
        self.D = instances.shape[-1]
        if cu_seqlens is not None:
            self.B, self.N, self.rows = cu_seqlens.shape[0] - 1, instances.shape[0], instances.shape[0]
            stride_b, stride_n = 0, instances.stride(0)
        else:
            self.B, self.N = instances.shape[:2]
            self.rows = self.B * self.N
            stride_b, stride_n = instances.stride()[:2] if self.B > 1 else (0, instances.stride(1))
        if self.N <= 1:
            stride_n = 0
        if self.D > MAX_FEATURES:
            raise ValueError(
                f"instances: backend 'triton' serves up to {MAX_FEATURES} features, got {self.D}; use 'reference'"
            )
        if max(self.N, self.B) >= 2**31:
            raise ValueError(
                "instances: backend 'triton' serves fewer than 2**31 bags and instances (per bag if padded), got "
                f"{self.B} bags and {self.N} instances; use 'reference'"
            )
        # Largest power of two, up to 16 bytes in elements, that divides both strides.
        self.itemsize = instances.element_size()
        strides = stride_b | stride_n | (16 // self.itemsize)
        unit = strides & -strides
        self.contiguous = stride_n == self.D or self.N <= 1
        self.device = instances.device
        self.arguments = {
            "B": self.B,
            "N": self.N,
            "stride_b": stride_b // unit,
            "stride_n": stride_n // unit,
            "D": self.D,
            "UNIT": unit,
        }

    def plan(
        self, backward: bool, num_iters: int = 3, routing: bool = True, max_seqlen: int | None = None
    ) -> TritonPlan:
        """Default plan of a pass on the device of the instances."""
        multiprocessors, *limits = _device_limits(self.device)
        sizes = self.packed, self.B, self.N, self.D, self.itemsize
        return pick_plan(*sizes, backward, multiprocessors, None, num_iters, routing, max_seqlen, *limits)


def bag_inputs(
    instances: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Bags with unit stride along the features, the other tensors contiguous and the mask as bytes."""
    if instances.stride(-1) != 1 and instances.shape[-1] > 1:
        instances = instances.contiguous()
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    if lengths is not None:
        lengths = lengths.contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    return instances, mask, lengths, cu_seqlens
