"""Calls operators in a process whose address space is limited; see test_memory.py.

Prints one line per case and limit, "<case> <MiB> <name of the exception>", and per case whether the result is correct
once the limit is lifted.
"""

import resource

import torch

from amil_fast import adjust_pool, decode_heatmaps

MIB = 2**20
MASK = torch.arange(6000000) % 2 == 0
PAGE = resource.getpagesize()


def random(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def gradient(x, num_iters):
    """The scratch of a bag has 2 (num_iters - 1) numbers per instance."""
    x = x.requires_grad_()
    return torch.autograd.grad(adjust_pool(x, num_iters=num_iters).sum(), x)[0]


def masked(x):
    """The scratch of a bag includes the positions of its instances."""
    B, N, _ = x.shape
    return adjust_pool(x, MASK[: B * N].view(B, N), num_iters=2)


def decoded(maps):
    """The scratch of a map that is not contiguous is a copy."""
    return decode_heatmaps(maps.transpose(2, 3), refine="dark")[0]


# name -> function, shape of its argument, and limits in MiB above the current size, below the scratch of one bag or map
CASES = {
    "bags": (lambda x: gradient(x, 100), (6, 20000, 1), (1, 4, 12)),
    "shared_bag": (lambda x: gradient(x, 20), (1, 200000, 8), (1, 4, 20)),
    "mask": (masked, (6, 1000000, 1), (1, 2)),
    "maps": (decoded, (4, 1, 1500, 1500), (1, 4)),
}


def run(name):
    function, shape, limits = CASES[name]
    x = random(*shape)
    torch.set_num_threads(2)
    function(random(4, 3, 60, 60) if name == "maps" else random(6, 3000, 3))  # OpenMP creates its threads
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    for extra in limits:
        with open("/proc/self/statm") as f:
            size = int(f.read().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (size + extra * MIB, unlimited[1]))
        try:
            function(x)
            raised = None
        except Exception as error:
            raised = error
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        print(name, extra, type(raised).__name__)
    result = function(x)
    torch.set_num_threads(1)
    print(name, "correct", torch.equal(result, function(x)))


if __name__ == "__main__":
    for name in CASES:
        run(name)
