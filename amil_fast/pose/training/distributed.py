"""Batch normalization with statistics over all processes, on CPU and CUDA."""

import torch
from torch import nn


class _Average(torch.autograd.Function):
    """Mean over processes; since the losses of the processes are averaged too, so are the gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x / torch.distributed.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        return _Average.apply(gradient)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with statistics over all processes, for CPU tensors, which ``nn.SyncBatchNorm`` rejects.

    All processes must pass equally many samples. Statistics are accumulated in float32, or float64 for float64 inputs.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        world = torch.distributed.get_world_size()
        wide = x if x.dtype == torch.float64 else x.float()
        mean = _Average.apply(wide.mean((0, 2, 3)))
        centered = wide - mean[:, None, None]
        variance = _Average.apply(centered.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = world * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(variance.to(self.running_var) * (count / max(count - 1, 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronize_batch_norm(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Replaces every ``nn.BatchNorm2d`` by one with statistics over all processes; parameters and buffers are kept."""
    if torch.device(device).type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                synced = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum)
                for key, value in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
                    setattr(synced, key, value)
                setattr(parent, name, synced.train(child.training))
    return model
