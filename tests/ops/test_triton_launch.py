"""Host path of the Triton backend, over a CUDA driver without a device (stub_driver.py): which kernels are launched,
and with which arguments. The interpreter does not compile kernels, so that these paths do not run there.
"""

import os
import subprocess
import sys

import pytest

from tests.ops import stub_driver

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(stub_driver.COMPILER is None, reason="no C compiler (CC, gcc)")

PROGRAM = """
import itertools
import sys
import threading

import torch

from tests.ops import stub_driver

log = []
num_launches = stub_driver.activate(sys.argv[1], log)

from amil_fast.kernels import adjust_pool_launch, triton_launch

POOL = {}


def allocate(like, shape, dtype, zero):
    '''The same memory in every call, so that the addresses of two calls can be compared.'''
    key = threading.get_ident(), len(POOL["used"]), tuple(shape), dtype
    POOL["used"].append(key)
    return POOL.setdefault(key, torch.zeros(shape, dtype=dtype))


def call(f, mask=None, lengths=None, cu_seqlens=None, T=3, weights=False, max_seqlen=None, detach=False, v=False):
    '''Launches of a forward and a backward pass.'''
    POOL["used"] = []
    log.clear()
    before = num_launches()
    bags = f, mask, lengths, cu_seqlens
    bag, w, sigma, stats = adjust_pool_launch.forward(*bags, T, weights, max_seqlen)
    B = bag.shape[0]
    ones = torch.ones(B, f.shape[-1], dtype=f.dtype), torch.ones(f.shape[:-1])
    grad_bag, grad_weights = POOL.setdefault((B, f.shape, f.dtype), ones)
    grads = grad_bag, grad_weights if v else None
    grad = adjust_pool_launch.backward(*grads, *bags, sigma, stats, detach, max_seqlen)
    assert num_launches() - before == len(log) > 0
    outputs = {"bag": bag, "sigma": sigma, "grad": grad}
    pointers = {name: tensor.data_ptr() for name, tensor in outputs.items()}
    for name, pointer in pointers.items():
        assert any(pointer in values for _, _, values in log), name
    return list(log)


def flat(*shape, dtype=torch.bfloat16):
    return torch.ones(*shape, dtype=dtype)


def forget():
    adjust_pool_launch._record.cache_clear()
    triton_launch._compiled.clear()


f = flat(4, 64, 128)
lengths = torch.full((4,), 50)
cu_seqlens = torch.tensor([0, 64, 128, 200, 256])
packed = flat(256, 128)
wide = flat(4, 64, 256)
long = flat(2, 3000, 128)
unaligned = flat(4 * 64 * 128 + 1)[1:].view(4, 64, 128)
CALLS = {
    "full": dict(f=f),
    "other tensor": dict(f=f.clone()),
    "unaligned": dict(f=unaligned),
    "float32": dict(f=f.float()),
    "row stride": dict(f=wide[..., :128]),
    "bag stride": dict(f=flat(4, 128, 128)[:, :64]),
    "fewer bags": dict(f=f[:3]),
    "mask": dict(f=f, mask=torch.ones(4, 64, dtype=torch.bool)),
    "lengths": dict(f=f, lengths=lengths),
    "int32 lengths": dict(f=f, lengths=lengths.int()),
    "packed": dict(f=packed, cu_seqlens=cu_seqlens),
    "packed, int32": dict(f=packed, cu_seqlens=cu_seqlens.int()),
    "packed, fewer bags": dict(f=packed, cu_seqlens=cu_seqlens[:3]),
    "packed, bounded": dict(f=packed, cu_seqlens=cu_seqlens, max_seqlen=72),
    "more iterations": dict(f=f, T=4),
    "one iteration": dict(f=f, T=1),
    "weights": dict(f=f, weights=True),
    "gradient of weights": dict(f=f, weights=True, v=True),
    "detached": dict(f=f, detach=True),
    "split": dict(f=long),
    "split, gradient of weights": dict(f=long, weights=True, v=True),
    "split, longer": dict(f=flat(2, 3100, 128)),
}
"""

COMPARE = """
triton_launch._allocate = allocate
fresh = {}
for name, arguments in CALLS.items():
    forget()
    fresh[name] = call(**arguments)
forget()
for name in [*CALLS, *reversed(CALLS), *CALLS]:
    actual = call(**CALLS[name])
    assert actual == fresh[name], (name, actual, fresh[name])
recorded = adjust_pool_launch._record.cache_info()
# Calls that differ in addresses only share a record; so do passes on which detach, weights or v have no effect.
assert recorded.currsize == (len(CALLS) - 4) + (len(CALLS) - 3), recorded
assert [len(fresh[name]) for name in ("full", "split", "split, gradient of weights")] == [2, 6, 7], fresh
print("ok")
"""

BIND = """
import triton
calls = []
original = triton.JITFunction.run
triton.JITFunction.run = lambda self, *a, **k: (calls.append(self), original(self, *a, **k))[1]
for repetition in range(3):
    calls.clear()
    call(f)
    call(unaligned)
    # Bound by Triton: the first time both, then the unaligned tensors alone.
    assert len(calls) == (4, 2, 2)[repetition], (repetition, calls)
calls.clear()
call(flat(5, 64, 128))  # another shape, served by the same compiled kernels
call(f.half())
assert len(calls) == 2, calls
print("ok")
"""

THREADS = """
POOL["used"] = []
expected = {name: len(call(**CALLS[name])) for name in ("full", "mask", "packed", "split")}
forget()
before = num_launches()
failures = []


def work(name):
    try:
        arguments = dict(CALLS[name])
        for i in range(30):
            instances = arguments.pop("f")
            bags = [arguments.get(key) for key in ("mask", "lengths", "cu_seqlens")]
            bag, _, sigma, stats = adjust_pool_launch.forward(instances, *bags, 3, False)
            adjust_pool_launch.backward(bag, None, instances, *bags, sigma, stats, False)
            arguments["f"] = instances
    except BaseException as error:
        failures.append(error)


threads = [threading.Thread(target=work, args=(name,)) for name in expected for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
assert num_launches() - before == 60 * sum(expected.values()), expected
print("ok")
"""


@pytest.mark.parametrize("check", [COMPARE, BIND, THREADS], ids=["arguments", "binding", "threads"])
def test_host_path(check, tmp_path):
    """Recorded passes launch what the first call launched, whatever ran before; only the first call binds arguments."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the interpreter does not compile
    command = [sys.executable, "-c", PROGRAM + check, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "ok", result.stdout + result.stderr[-3000:]
