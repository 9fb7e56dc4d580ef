"""Adjust pooling inside a network of your own: classifies ragged bags of points without padding.

A bag holds 20 to 200 points in the plane; it is positive if they lie on a ring. Runs in seconds on a CPU:

    python examples/pool_in_your_network.py
"""

import torch
from torch import nn

import amil_fast


class RingClassifier(nn.Module):
    """Instance embedding, adjust pooling over each bag, linear classifier."""

    def __init__(self, hidden=64):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.pool = amil_fast.AdjustPool(num_iters=3)
        self.classify = nn.Linear(hidden, 1)

    def forward(self, points, cu_seqlens):
        """``points (total, 2)`` of all bags, ``cu_seqlens (B + 1,)`` -> logits ``(B,)``."""
        bag = self.pool(self.embed(points), cu_seqlens=cu_seqlens)
        return self.classify(bag)[:, 0]


def make_batch(num_bags, generator):
    """Points of all bags, their offsets and labels."""
    sizes = torch.randint(20, 200, (num_bags,), generator=generator)
    labels = torch.randint(0, 2, (num_bags,), generator=generator)
    bags = []
    for size, label in zip(sizes.tolist(), labels.tolist(), strict=True):
        points = torch.randn(size, 2, generator=generator)
        bags.append(nn.functional.normalize(points, dim=1) + 0.1 * points if label else points)
    return torch.cat(bags), nn.functional.pad(sizes.cumsum(0), (1, 0)), labels.float()


def main():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = RingClassifier()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(200):
        points, cu_seqlens, labels = make_batch(32, generator)
        loss = nn.functional.binary_cross_entropy_with_logits(net(points, cu_seqlens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.3f}")
    points, cu_seqlens, labels = make_batch(500, generator)
    with torch.no_grad():
        accuracy = ((net(points, cu_seqlens) > 0) == (labels > 0)).float().mean().item()
    print(f"accuracy on 500 new bags: {accuracy:.3f}")


if __name__ == "__main__":
    main()
