"""Training a bag classifier (MI-RNet with adjust pooling) on synthetic bags, and finding the instances it relies on.

A bag is positive if at least one of its instances is a key instance. Runs in less than a minute on a CPU:

    python examples/train_bag_classifier.py
"""

import torch

import amil_fast
from amil_fast.nn import level_loss

FEATURES = 16


def make_bags(num_bags, generator):
    """Packed features ``(total, 16)``, ``cu_seqlens (num_bags + 1,)``, labels and key instances (bool)."""
    sizes = torch.randint(5, 40, (num_bags,), generator=generator)
    cu_seqlens = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    features = torch.randn(int(cu_seqlens[-1]), FEATURES, generator=generator)
    labels = torch.arange(num_bags) % 2
    key = torch.zeros(len(features), dtype=torch.bool)
    for b in range(1, num_bags, 2):
        instance = cu_seqlens[b] + torch.randint(int(sizes[b]), (), generator=generator)
        features[instance, :3] += torch.tensor([3.0, -3.0, 3.0])
        key[instance] = True
    return features, cu_seqlens, labels, key


def main():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = amil_fast.MIRNet(in_features=FEATURES, hidden=32, bag_scale=4.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    features, cu_seqlens, labels, _ = make_bags(400, generator)
    for epoch in range(40):
        loss = level_loss(net(features, cu_seqlens=cu_seqlens).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 10 == 0:
            print(f"epoch {epoch}: loss {loss:.3f}")

    features, cu_seqlens, labels, key = make_bags(400, generator)
    with torch.no_grad():
        output = net(features, cu_seqlens=cu_seqlens, return_weights=True)
    predicted = output.probabilities > 0.5
    print(f"accuracy on 400 new bags: {(predicted == labels.bool()).float().mean():.3f}")
    weights = output.weights[-1]  # of the last level
    found = sum(
        bool(key[begin + weights[begin:end].argmax()])
        for begin, end, positive in zip(cu_seqlens[:-1], cu_seqlens[1:], labels, strict=True)
        if positive
    )
    print(f"instance of largest weight is the key instance in {found} of {int(labels.sum())} positive bags")


if __name__ == "__main__":
    main()
