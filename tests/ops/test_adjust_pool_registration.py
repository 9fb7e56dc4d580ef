"""torch.ops.amil_fast.adjust_pool under opcheck, torch.compile, export, fake tensors, autocast and DDP."""

import pytest
import torch
import torch.distributed as dist

from amil_fast import AdjustPool, adjust_pool
from tests.helpers import exit_worker
from tests.ops.helpers import random_bags

FORWARD = torch.ops.amil_fast.adjust_pool.default
BACKWARD = torch.ops.amil_fast.adjust_pool_backward.default


def operator_calls():
    """Returns named argument tuples of the registered operator."""
    x = random_bags(3, 7, 5, dtype=torch.float32)
    mask = torch.tensor([[True] * 7, [False] * 7, [True, False] * 3 + [True]])
    lengths = torch.tensor([7, 0, 3])
    cu_seqlens = torch.tensor([0, 4, 4, 21], dtype=torch.int32)
    return {
        "dense": (x, None, None, None, 3, False, False, "cpp"),
        "mask and weights": (x, mask, None, None, 3, True, False, "cpp"),
        "lengths, detached": (x, None, lengths, None, 2, True, True, "cpp"),
        "packed, half": (x.reshape(21, 5).half(), None, None, cu_seqlens, 1, True, False, "cpp"),
        "no bags": (x[:0], None, None, None, 3, True, False, "cpp"),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name):
    arguments = operator_calls()[name]
    x = arguments[0].clone().requires_grad_()
    torch.library.opcheck(FORWARD, (x, *arguments[1:]))
    bag, weights, sigma, softmax_stats = FORWARD(*arguments)
    instances, mask, lengths, cu_seqlens, _, return_weights, detach_routing, backend = arguments
    grad_weights = torch.randn_like(weights) if return_weights else None
    backward = (torch.randn_like(bag), grad_weights, instances, mask, lengths, cu_seqlens, sigma, softmax_stats)
    torch.library.opcheck(BACKWARD, (*backward, detach_routing, backend))


@pytest.mark.parametrize("name", operator_calls())
def test_function_matches_operator(name):
    """The public function, which bypasses the dispatcher, returns bit-identical results."""
    x, mask, lengths, cu_seqlens, num_iters, _, detach_routing, backend = operator_calls()[name]
    options = {"lengths": lengths, "cu_seqlens": cu_seqlens, "num_iters": num_iters, "detach_routing": detach_routing}
    results = []
    for through_operator in (False, True):
        leaf = x.clone().requires_grad_()
        if through_operator:
            bag, weights, _, _ = FORWARD(leaf, mask, lengths, cu_seqlens, num_iters, True, detach_routing, backend)
        else:
            bag, weights = adjust_pool(leaf, mask, return_weights=True, backend=backend, **options)
        upstream = torch.linspace(-1, 1, bag.numel(), dtype=bag.dtype).view_as(bag)
        results.append((bag, weights, *torch.autograd.grad(bag, leaf, upstream)))
        assert weights.requires_grad == (num_iters > 1 and not detach_routing)
    for direct, registered in zip(*results, strict=True):
        assert torch.equal(direct, registered)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(x, mask):
        bag, weights = adjust_pool(x * 2, mask, return_weights=True)
        return bag.sin(), weights

    for B, N in ((3, 7), (2, 9), (4, 12)):
        x = random_bags(B, N, 6, dtype=torch.float32).requires_grad_()
        mask = torch.rand(B, N, generator=torch.Generator().manual_seed(0)) < 0.7
        bag, weights = compiled(x, mask)
        expected, expected_weights = adjust_pool(x * 2, mask, return_weights=True)
        torch.testing.assert_close(bag, expected.sin())
        torch.testing.assert_close(weights, expected_weights)
        grads = [torch.autograd.grad(b.sum() + w.square().sum(), x)[0]
                 for b, w in ((bag, weights), (expected.sin(), expected_weights))]  # fmt: skip
        torch.testing.assert_close(*grads)


def test_compile_packed_with_inductor():
    @torch.compile(fullgraph=True)
    def compiled(x, cu_seqlens):
        return adjust_pool(x.relu(), cu_seqlens=cu_seqlens).square()

    x = random_bags(1, 20, 6, dtype=torch.float32)[0].requires_grad_()
    cu_seqlens = torch.tensor([0, 3, 3, 20])
    (grad,) = torch.autograd.grad(compiled(x, cu_seqlens).sum(), x)
    (expected,) = torch.autograd.grad(adjust_pool(x.relu(), cu_seqlens=cu_seqlens).square().sum(), x)
    torch.testing.assert_close(grad, expected)


def test_export():
    x = random_bags(3, 7, 6, dtype=torch.float32)
    lengths = torch.tensor([7, 2, 0])

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.pool = torch.nn.Linear(6, 8), AdjustPool()

        def forward(self, x, lengths):
            return self.pool(self.linear(x), lengths=lengths)

    net = Net()
    batch, rows = torch.export.Dim("batch"), torch.export.Dim("rows")
    program = torch.export.export(net, (x, lengths), dynamic_shapes={"x": {0: batch, 1: rows}, "lengths": {0: batch}})
    other = random_bags(5, 11, 6, dtype=torch.float32)
    other_lengths = torch.tensor([11, 1, 0, 4, 5])
    torch.testing.assert_close(program.module()(other, other_lengths), net(other, other_lengths))
    assert "amil_fast.adjust_pool" in str(program.graph)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        bag, weights = adjust_pool(torch.empty(3, 7, 5, dtype=torch.bfloat16), return_weights=True)
    assert bag.shape == (3, 5) and bag.dtype == torch.bfloat16
    assert weights.shape == (3, 7) and weights.dtype == torch.float32


def test_autocast_has_no_effect():
    """Pooling accumulates in float32 also under autocast and returns the dtype of its input."""
    x = random_bags(2, 9, 16, dtype=torch.float32)
    expected = {backend: adjust_pool(x, backend=backend) for backend in ("cpp", "reference")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend, bag in expected.items():
            assert torch.equal(adjust_pool(x, backend=backend), bag)
        half = torch.nn.Linear(16, 16)(x)
        assert half.dtype == torch.bfloat16 and adjust_pool(half).dtype == torch.bfloat16


def test_gradient_penalty():
    """Gradients taken with create_graph=True are differentiable; the second derivative comes from the reference."""
    penalties = []
    for backend in ("cpp", "reference"):
        x = random_bags(2, 6, 5).requires_grad_()
        bag, weights = adjust_pool(x, return_weights=True, backend=backend)
        (grad,) = torch.autograd.grad(bag.square().sum() + weights.cos().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*penalties)
    assert penalties[0].abs().max() > 0


def test_no_grad_and_inference_mode():
    x = random_bags(2, 6, 5).requires_grad_()
    with torch.no_grad():
        assert not adjust_pool(x).requires_grad
    with torch.inference_mode():
        assert adjust_pool(x).shape == (2, 5)


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 4))
    x = random_bags(4, 9, 6, dtype=torch.float32)[2 * rank : 2 * rank + 2]
    AdjustPool()(model(x)).square().mean().backward()
    torch.save(model.module.weight.grad, folder / f"grad-{rank}.pt")
    exit_worker(folder, rank)


def test_ddp(tmp_path):
    """Two processes with half of the bags each obtain the gradient of one process with all bags."""
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=_ddp_worker, args=(rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4)
    AdjustPool()(linear(random_bags(4, 9, 6, dtype=torch.float32))).square().mean().backward()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"grad-{rank}.pt", weights_only=True), linear.weight.grad)
