"""adjust_pool: the C++ backend against the reference, for all instruction sets and numbers of threads."""

import pytest
import torch

from amil_fast import adjust_pool
from amil_fast.ops.backends import native
from tests.helpers import assert_as_accurate, relative_error
from tests.ops.helpers import DTYPES, pool_and_grad, random_bags, random_lengths

# (B, N, D) by purpose. The kernel processes blocks of 16 rows and splits bags into chunks of 256 KiB in float32.
SIZES = {
    "one instance, one feature": (2, 1, 1),
    "fewer rows than a block": (3, 5, 7),
    "rows of whole vectors, read in place": (3, 40, 32),
    "odd number of features, last block of one row": (2, 33, 100),
    "wide": (2, 9, 1030),
    "several chunks, the last one partial": (2, 1500, 64),
    "one bag split across threads": (1, 5000, 48),
    "long and short bags": (40, 70, 16),
}

# (num_iters, form, detach_routing): each value is combined with most values of the others.
OPTIONS = [
    (1, "dense", False),
    (1, "mask", True),
    (2, "lengths", False),
    (2, "mask", True),
    (3, "dense", False),
    (3, "lengths", True),
    (3, "mask", False),
    (5, "mask", False),
]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request):
    usable = native().usable_instruction_sets()
    if request.param not in usable:
        pytest.skip(f"not supported by this processor, which supports {', '.join(usable)}")
    before = native().instruction_set()
    native().set_instruction_set(request.param)
    yield request.param
    native().set_instruction_set(before)


@pytest.mark.parametrize("size", SIZES, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_matches_reference(instruction_set, dtype, size):
    B, N, D = SIZES[size]
    lengths = random_lengths(B, N) if B > 1 else torch.tensor([N])
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(2)) < 0.6
    forms = {"dense": {}, "lengths": {"lengths": lengths}, "mask": {"mask": mask}}
    for num_iters, form, detach_routing in OPTIONS:
        options = {**forms[form], "num_iters": num_iters, "detach_routing": detach_routing}
        _compare(random_bags(B, N, D).to(dtype), f"{num_iters} iterations, {form}, {detach_routing=}", options)
    packed = random_bags(1, int(lengths.sum()), D)[0].to(dtype)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for index_dtype in (torch.int32, torch.int64):
        _compare(packed, "packed", {"cu_seqlens": cu_seqlens.to(index_dtype)})


@pytest.mark.parametrize("rise", [10.0, 40.0])
def test_cpp_with_increasing_logits(instruction_set, rise):
    """Logits increase from block to block, by less and by more than the kernel's threshold for rescaling."""
    N, D = 100, 16
    direction = torch.ones(D, dtype=torch.float64) / D**0.5
    heights = torch.linspace(0, rise, N, dtype=torch.float64)
    x = random_bags(2, N, D) + torch.stack([heights, heights.flip(0)])[..., None] * direction
    _compare(x.float(), f"{rise=}", {"num_iters": 3})


def _compare(x, what, options):
    for with_weights in (False, True):
        actual = pool_and_grad(x, with_weights=with_weights, backend="cpp", **options)
        reference = pool_and_grad(x, with_weights=with_weights, backend="reference", **options)
        truth = pool_and_grad(x.double(), with_weights=with_weights, backend="reference", **options)
        for name, a, r, t in zip(
            ("bag", "weights", "grad")[:: 1 if with_weights else 2], actual, reference, truth, strict=True
        ):
            if x.dtype == torch.float64:  # the reference is the ground truth; only the summation order differs
                assert relative_error(a, t) < 1e-11, f"{name} {what}"
            else:
                assert_as_accurate(a, r, t, factor=4, what=f"{name} {what}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cpp_converts_every_16_bit_float(instruction_set, dtype):
    """Includes subnormals, although float32 subnormals are flushed; a second feature of 1 keeps squash well scaled."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.abs() < 2]
    x = torch.stack([numbers, torch.ones_like(numbers)], 1)[:, None]
    bag = adjust_pool(x, num_iters=1, backend="cpp")
    expected = adjust_pool(x, num_iters=1, backend="reference")
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (bag.double() - expected.double()).abs()
    assert (error <= torch.finfo(dtype).eps * expected.double().abs() + max(step, 1e-37)).all()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_cpp_is_bit_identical_for_any_number_of_threads(num_threads):
    """Long bags are split across threads, which must not change the summation order."""
    x = random_bags(3, 6000, 40, dtype=torch.float32)
    lengths = torch.tensor([6000, 17, 3001])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = pool_and_grad(x, lengths=lengths, backend="cpp")
        torch.set_num_threads(num_threads)
        for _ in range(3):
            for a, e in zip(pool_and_grad(x, lengths=lengths, backend="cpp"), expected, strict=True):
                assert torch.equal(a, e)
    finally:
        torch.set_num_threads(before)


def test_cpp_with_more_threads_than_bags_and_cores():
    x = random_bags(2, 50, 8, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        many = adjust_pool(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(many, adjust_pool(x))
