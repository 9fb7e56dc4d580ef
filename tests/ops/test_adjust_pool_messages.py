"""adjust_pool: error messages."""

import sys

import pytest
import torch

import amil_fast
from amil_fast import adjust_pool
from amil_fast.ops.backends import native
from tests.ops.helpers import random_bags

cu = torch.tensor


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "instances: expected a torch.Tensor, got list", lambda x: adjust_pool([[1.0]])),
        (TypeError, "instances: expected dtype float16.*got torch.int64", lambda x: adjust_pool(x.long())),
        (ValueError, r"instances: expected shape \(B, N, D\).*got \(3, 5\)", lambda x: adjust_pool(x[:, :, 0])),
        (ValueError, r"instances: expected shape \(total, D\)", lambda x: adjust_pool(x, cu_seqlens=cu([0, 3]))),
        (ValueError, "instances: expected at least one feature", lambda x: adjust_pool(x[:, :, :0])),
        (ValueError, r"mask: expected shape \(3, 5\).*got \(3, 4\)", lambda x: adjust_pool(x, torch.ones(3, 4))),
        (TypeError, "mask: expected a torch.Tensor, got list", lambda x: adjust_pool(x, [[1] * 5] * 3)),
        (ValueError, "mask: expected mask or lengths, got both",
         lambda x: adjust_pool(x, torch.ones(3, 5), lengths=torch.tensor([1, 2, 3]))),
        (ValueError, "mask: expected the device of instances", lambda x: adjust_pool(x, torch.ones(3, 5).to("meta"))),
        (ValueError, r"lengths: expected shape \(3,\)", lambda x: adjust_pool(x, lengths=torch.tensor([1, 2]))),
        (TypeError, "lengths: expected dtype int32 or int64, got torch.float32",
         lambda x: adjust_pool(x, lengths=torch.ones(3))),
        (ValueError, r"lengths: expected values in 0..5, got lengths\[1\] = 6",
         lambda x: adjust_pool(x, lengths=torch.tensor([1, 6, 2]))),
        (ValueError, r"lengths: expected values in 0..5, got lengths\[2\] = -1",
         lambda x: adjust_pool(x, lengths=torch.tensor([1, 5, -1]))),
        (ValueError, "cu_seqlens: expected alone", lambda x: adjust_pool(x[0], torch.ones(5), cu_seqlens=cu([0, 5]))),
        (ValueError, r"cu_seqlens: expected cu_seqlens\[0\] = 0, got 1",
         lambda x: adjust_pool(x[0], cu_seqlens=torch.tensor([1, 5]))),
        (ValueError, "cu_seqlens: expected the last value to be at most the number of instances 5, got 6",
         lambda x: adjust_pool(x[0], cu_seqlens=torch.tensor([0, 6]))),
        (ValueError, r"cu_seqlens: expected non-decreasing values, got cu_seqlens\[1\] = 4, cu_seqlens\[2\] = 3",
         lambda x: adjust_pool(x[0], cu_seqlens=torch.tensor([0, 4, 3, 5]))),
        (ValueError, r"cu_seqlens: expected shape \(B \+ 1,\)", lambda x: adjust_pool(x[0], cu_seqlens=cu([[0, 5]]))),
        (ValueError, "max_seqlen: expected together with cu_seqlens only", lambda x: adjust_pool(x, max_seqlen=5)),
        (TypeError, "max_seqlen: expected an int, got float",
         lambda x: adjust_pool(x[0], cu_seqlens=cu([0, 5]), max_seqlen=5.0)),
        (ValueError, "max_seqlen: expected a non-negative int, got -1",
         lambda x: adjust_pool(x[0], cu_seqlens=cu([0, 5]), max_seqlen=-1)),
        (ValueError, r"cu_seqlens\[1\] = 2147483647, cu_seqlens\[2\] = -2",  # differences overflow int32
         lambda x: adjust_pool(x[0], cu_seqlens=torch.tensor([0, 2**31 - 1, -2, 5], dtype=torch.int32))),
        (ValueError, r"cu_seqlens\[1\] = 9223372036854775807, cu_seqlens\[2\] = -2",
         lambda x: adjust_pool(x[0], cu_seqlens=torch.tensor([0, 2**63 - 1, -2, 5]))),
        (ValueError, "num_iters: expected an int from 1 to 10000, got 0", lambda x: adjust_pool(x, num_iters=0)),
        (ValueError, "num_iters: expected an int from 1 to 10000, got 1099511627776",
         lambda x: adjust_pool(x, num_iters=2**40)),
        (TypeError, "return_weights: expected a bool, got 'no'", lambda x: adjust_pool(x, return_weights="no")),
        (TypeError, "detach_routing: expected a bool, got 1", lambda x: adjust_pool(x, detach_routing=1)),
        (TypeError, "instances: expected a dense tensor.*got layout torch.sparse_coo",
         lambda x: adjust_pool(x.to_sparse())),
        (TypeError, "mask: expected a dense tensor", lambda x: adjust_pool(x, torch.ones(3, 5).to_sparse())),
        (TypeError, "lengths: expected a dense tensor",
         lambda x: adjust_pool(x, lengths=torch.ones(3, dtype=torch.long).to_sparse())),
        (TypeError, "num_iters: expected an int, got float", lambda x: adjust_pool(x, num_iters=2.0)),
        (ValueError, "backend: expected one of 'auto', 'reference', 'cpp', 'triton', got 'fast'",
         lambda x: adjust_pool(x, backend="fast")),
        (ValueError, "nested tensor carries its own bag sizes",
         lambda x: adjust_pool(torch.nested.nested_tensor([x[0]], layout=torch.jagged), cu_seqlens=cu([0, 5]))),
        (ValueError, "layout torch.jagged", lambda x: adjust_pool(torch.nested.nested_tensor([x[0]]))),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_error_messages(error, message, make):
    with pytest.raises(error, match=message):
        make(random_bags(3, 5, 4))


def test_reference_checks_values():
    with pytest.raises(ValueError, match=r"lengths: expected values in 0\.\.5"):
        adjust_pool(random_bags(3, 5, 4), lengths=torch.tensor([1, 6, 2]), backend="reference")


def test_cpp_rejects_other_devices():
    with pytest.raises(ValueError, match="backend 'cpp' cannot serve this call: expected CPU tensors"):
        adjust_pool(torch.zeros(1, 2, 3, device="meta"), backend="cpp")


def test_missing_extension_error_suggests_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "amil_fast._C", None)
    monkeypatch.delattr(amil_fast, "_C")
    native.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"amil_fast\._C cannot be imported.*pip install.*backend='reference'"):
            adjust_pool(random_bags(3, 5, 4))
        assert "cannot be imported" in amil_fast.info()["backends"]["cpp"]
    finally:
        native.cache_clear()


def test_meta_tensors_give_shapes():
    bag, weights = adjust_pool(torch.empty(2, 3, 4, device="meta"), return_weights=True)
    assert bag.device.type == "meta" and bag.shape == (2, 4) and weights.shape == (2, 3)
    packed = torch.empty(6, 4, device="meta", requires_grad=True)
    assert adjust_pool(packed, cu_seqlens=torch.empty(3, dtype=torch.int64, device="meta")).shape == (2, 4)
