"""MI-RNet: the paper's equations, its input forms, and many of them side by side."""

import math

import pytest
import torch

from amil_fast import adjust_pool
from amil_fast.nn import POOLINGS, AdjustPool, LogSumExpPool, MeanPool, MIRNet, StackedMIRNet, level_loss
from tests.helpers import relative_error

SIZES = [3, 0, 1, 7, 5]
CU = torch.tensor([0, 3, 3, 4, 11, 16])
F = 6


def net_and_bags(**kwargs):
    torch.manual_seed(0)
    net = MIRNet(F, hidden=8, backend="reference", **kwargs).double().eval()
    return net, torch.randn(16, F, dtype=torch.float64)


def test_is_the_papers_network():
    net, x = net_and_bags()
    output = net(x, cu_seqlens=CU, return_weights=True)
    X, probabilities = 0, 0
    h = x
    for level in range(3):
        h = torch.relu(h @ net.layers[level].weight.T + net.layers[level].bias)
        m, w = adjust_pool(h, cu_seqlens=CU, return_weights=True, backend="reference")
        X = X + m
        logits = X @ net.heads[level].weight[0] + net.heads[level].bias
        probabilities = probabilities + torch.sigmoid(logits) / 3
        assert relative_error(output.logits[level], logits) < 1e-14
        assert relative_error(output.pooled[level], m) < 1e-14
        assert relative_error(output.weights[level], w) < 1e-14
    assert relative_error(output.embedding, X) < 1e-14
    assert relative_error(output.probabilities, probabilities) < 1e-14


def test_without_residual_and_deep_supervision():
    net, x = net_and_bags(residual=False, deep_supervision=False, depth=2, pooling="max")
    output = net(x, cu_seqlens=CU)
    h = torch.relu(net.layers[1](torch.relu(net.layers[0](x))))
    largest = torch.stack([rows.amax(0) if len(rows) else torch.zeros(8).double() for rows in h.split(SIZES)])
    assert torch.equal(output.embedding, largest)
    assert torch.equal(output.logits, net.heads[0](largest).T)
    assert output.weights is None and len(net.heads) == 1


@pytest.mark.parametrize("pooling", ["adjust", "mean"])
def test_scales(pooling):
    """The pooled embeddings are scaled, the next layer's input is not; linear poolings are unaffected."""
    net, x = net_and_bags(pooling=pooling, instance_scale=0.25, bag_scale=4.0)
    plain, _ = net_and_bags(pooling=pooling)
    output, unscaled = net(x, cu_seqlens=CU), plain(x, cu_seqlens=CU)
    if pooling == "mean":
        assert relative_error(output.logits, unscaled.logits) < 1e-14
        return
    h, X = x, 0
    for level in range(3):
        h = torch.relu(net.layers[level](h))
        m = adjust_pool(0.25 * h, cu_seqlens=CU, backend="reference")
        X = X + 4 * m
        assert relative_error(output.pooled[level], m) < 1e-14
    assert relative_error(output.embedding, X) < 1e-14


def test_instance_norm_removes_the_scale_of_short_and_long_instances():
    net, x = net_and_bags(instance_norm=2.0)
    expected = net(x, cu_seqlens=CU)
    for factor in (0.05, 20.0):  # the biases are 0, so that the layers are homogeneous
        assert relative_error(net(factor * x, cu_seqlens=CU).logits, expected.logits) < 2e-3, factor
    lengths = net.layers[0](x).relu().norm(dim=1)
    assert 0.05 * lengths[lengths > 0].min() < 0.1


def test_classes():
    net, x = net_and_bags(num_classes=4)
    output = net(x, cu_seqlens=CU)
    assert output.logits.shape == (3, 5, 4) and output.probabilities.shape == (5, 4)
    assert torch.allclose(output.probabilities, torch.softmax(output.logits, -1).mean(0))
    level_loss(output.logits, torch.tensor([0, 1, 2, 3, 0])).backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_input_forms_agree_down_to_the_parameters(pooling):
    net, x = net_and_bags(pooling=pooling)
    grid = torch.full((5, 7, F), math.nan, dtype=torch.float64)
    for b, rows in enumerate(x.split(SIZES)):
        grid[b, : len(rows)] = rows
    lengths = torch.tensor(SIZES)
    mask = torch.arange(7) < lengths[:, None]
    labels = torch.tensor([1, 0, 1, 1, 0])

    def run(instances, **kwargs):
        instances = instances.clone().requires_grad_()
        output = net(instances, **kwargs)
        loss = level_loss(output.logits, labels)
        return output, torch.autograd.grad(loss, [instances, *net.parameters()])

    packed, (grad_packed, *parameters_packed) = run(x, cu_seqlens=CU)
    for kwargs in ({"mask": mask}, {"lengths": lengths}):
        output, (grad, *parameters) = run(grid, **kwargs)
        assert relative_error(output.logits, packed.logits) < 1e-13
        assert (grad[~mask] == 0).all()
        assert relative_error(grad[mask], grad_packed) < 1e-12
        for p, q in zip(parameters, parameters_packed, strict=True):
            assert torch.allclose(p, q, rtol=1e-10, atol=1e-14)
    nested = torch.nested.nested_tensor(list(x.split(SIZES)), layout=torch.jagged)
    assert relative_error(net(nested).logits, packed.logits) < 1e-13


def test_start_and_dropout():
    torch.manual_seed(0)
    net = MIRNet(400, hidden=300)
    assert all((layer.bias == 0).all() for layer in [*net.layers, *net.heads])
    assert abs(net.layers[0].weight.std().item() / (2 / 400) ** 0.5 - 1) < 0.02
    again = MIRNet(400, hidden=300)
    net.reset_parameters(torch.Generator().manual_seed(3))
    again.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    net = MIRNet(F, hidden=16, pooling="mean", dropout=0.5)
    x = torch.randn(2, 4, F)
    assert not torch.equal(net(x).logits, net(x).logits)
    net.eval()
    assert torch.equal(net(x).logits, net(x).logits)


def test_pooling_factory_and_errors():
    net = MIRNet(F, hidden=16, pooling=lambda features: LogSumExpPool(r=features))
    assert [pool.r for pool in net.pools] == [16] * 3
    with pytest.raises(ValueError, match="pooling: expected one of"):
        MIRNet(F, pooling="sum")
    with pytest.raises(ValueError, match="depth: expected an int of at least 1, got 0"):
        MIRNet(F, depth=0)
    with pytest.raises(ValueError, match="MaxPool has no single weight"):
        MIRNet(F, pooling="max")(torch.zeros(1, 2, F), return_weights=True)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_are_called_as_modules(pooling):
    net, x = net_and_bags(pooling=pooling)
    calls = []
    for pool in net.pools:
        pool.register_forward_hook(lambda module, args, output: calls.append((module, args[0].shape, output)))
    output = net(x, cu_seqlens=CU)
    assert [module for module, _, _ in calls] == list(net.pools)
    assert {shape for _, shape, _ in calls} == {(16, 8)}
    assert torch.equal(torch.stack([bag for _, _, bag in calls]), output.pooled)


@pytest.mark.parametrize("base", [AdjustPool, MeanPool])
def test_subclass_of_a_pooling_may_override_forward(base):
    class Doubled(base):
        def forward(self, instances, mask=None, *, cu_seqlens=None):
            return 2 * super().forward(instances, mask, cu_seqlens=cu_seqlens)

    net, x = net_and_bags(pooling=lambda features: Doubled(), residual=False)
    plain, _ = net_and_bags(pooling=lambda features: base(), residual=False)
    assert torch.equal(net(x, cu_seqlens=CU).pooled, 2 * plain(x, cu_seqlens=CU).pooled)
    grid, mask = x.view(2, 8, F), torch.arange(8) < torch.tensor([[8], [3]])
    assert torch.equal(net(grid, mask).pooled, 2 * plain(grid, mask).pooled)


@pytest.mark.parametrize("scoring", ["bag", "instances"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_compiles_to_one_graph(pooling, scoring):
    net, x = net_and_bags(pooling=pooling, scoring=scoring)
    grid = x.view(2, 8, F)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for instances, form in ((x, {"cu_seqlens": CU}), (grid, {"lengths": torch.tensor([8, 3])}), (grid, {})):
        assert torch.equal(compiled(instances, **form).logits, net(instances, **form).logits)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_stacked_members_are_independent_networks(pooling):
    torch.manual_seed(0)
    sizes = [[2, 3, 1], [4, 0, 6]]  # the first member's 4 last rows are padding
    stacked = StackedMIRNet(2, F, hidden=8, pooling=pooling, backend="reference").double()
    for member in range(2):
        stacked.reset_member(member, torch.Generator().manual_seed(member))
    x = torch.randn(2, 10, F, dtype=torch.float64)
    cu_seqlens = torch.tensor([[0, *torch.tensor(s).cumsum(0).tolist()] for s in sizes])
    labels = torch.tensor([1, 0, 1])
    output = stacked(x, cu_seqlens)
    assert output.probabilities.shape == (2, 3) and output.logits.shape == (3, 2, 3)
    sum(level_loss(output.logits[:, member], labels) for member in range(2)).backward()
    for member in range(2):
        alone = MIRNet(F, hidden=8, pooling=pooling, backend="reference").double()
        alone.load_state_dict(stacked.member(member))
        end = int(cu_seqlens[member, -1])
        expected = alone(x[member, :end], cu_seqlens=cu_seqlens[member])
        assert relative_error(output.logits[:, member], expected.logits) < 1e-13
        assert relative_error(output.probabilities[member], expected.probabilities) < 1e-13
        level_loss(expected.logits, labels).backward()
        gradients = dict(stacked.named_parameters())
        for name, parameter in alone.named_parameters():
            grad = gradients[name].grad[member].t()  # a stacked linear layer's weight is (in, out)
            assert torch.allclose(grad, parameter.grad, rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("pooling", ["adjust", "gated_attention"])
def test_stacked_member_starts_do_not_depend_on_the_others(pooling):
    nets = [StackedMIRNet(members, F, hidden=8, pooling=pooling) for members in (3, 1)]
    for net in nets:
        net.reset_member(0, torch.Generator().manual_seed(5))
    first, second = (net.member(0) for net in nets)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
