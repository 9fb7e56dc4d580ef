"""MI-RNet on disk: normalization, folders, the Hugging Face hub, exported programs."""

import json
import shutil

import huggingface_hub
import pytest
import torch

import amil_fast
from amil_fast.nn import FeatureNormalization, FeatureStatistics, MIRNet, StackedMIRNet
from amil_fast.nn.feature_normalization import soft_clip
from tests.helpers import relative_error

CU = torch.tensor([0, 3, 4, 9])


def instances(n=9, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator) * torch.logspace(-2, 3, width) + torch.linspace(-50, 900, width)


def trained_net(**kwargs):
    torch.manual_seed(0)
    net = MIRNet(5, hidden=8, normalization="standard", soft_clip=3.0, instance_scale=0.1, bag_scale=10.0, **kwargs)
    net.normalization.fit([instances(40, seed=1), instances(25, seed=2)])
    return net.eval()


def test_statistics_are_those_of_all_instances_at_once():
    parts = [instances(n, seed=n) + 1e4 for n in (1, 30, 0, 9000)]
    whole = torch.cat(parts).double()
    statistics = FeatureStatistics(5)
    for part in parts:
        statistics.update(part)
    halves = [FeatureStatistics(5), FeatureStatistics(5)]
    halves[0].update(parts[0])
    halves[1].update(torch.cat(parts[1:]))
    halves[0].merge(halves[1])
    halves[0].merge(FeatureStatistics(5))
    for found in (statistics, halves[0]):
        assert found.count == len(whole)
        assert relative_error(found.mean, whole.mean(0)) < 1e-13
        assert relative_error(found.std(), whole.std(0, correction=0)) < 1e-11


def test_normalization():
    x = instances(20)
    x[:, 2] = 7
    layer = FeatureNormalization(5).fit([x])
    y = layer(x)
    assert torch.allclose(y.mean(0), torch.zeros(5), atol=1e-3) and (y[:, 2] == 0).all()
    assert torch.allclose(y.std(0, correction=0)[[0, 1, 3, 4]], torch.ones(4), atol=1e-3)
    clipped = FeatureNormalization(5, soft_clip=1.5).fit([x])
    assert torch.allclose(clipped(x), soft_clip(y, 1.5)) and clipped(100 * x).abs().max() <= 1.5
    # In parts for large inputs, at once with autograd; float16 in, float32 out.
    large = instances(20000)
    assert torch.equal(layer(large), layer(large.clone().requires_grad_()).detach())
    assert layer(large.half()[None]).dtype == torch.float32 and layer(large[None]).shape == (1, 20000, 5)
    assert layer(large.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="normalization: expected one of auto, standard, scale, got 'unit'"):
        FeatureNormalization(5, "unit")
    with pytest.raises(ValueError, match="soft_clip: expected a number of at least 0, got -1"):
        FeatureNormalization(5, soft_clip=-1)
    with pytest.raises(ValueError, match="instances: expected at least one instance"):
        layer.fit([])


def test_normalization_of_sparse_features():
    x = torch.zeros(50, 8)
    x[torch.arange(40), torch.arange(40) % 8] = torch.arange(1.0, 41.0)  # 90 % of 400 values are 0
    layer = FeatureNormalization(8, "auto", soft_clip=3.0).fit([x[:20], x[20:]])
    assert layer.kind == "scale"
    y = layer(x)
    torch.testing.assert_close(y, x / x.square().mean().sqrt())  # no clipping, one factor, zeros stay zeros
    assert y.max() > 3 and ((y == 0) == (x == 0)).all()
    # Not sparse: a negative value, or fewer zeros.
    for row, value in ((0, -1.0), (49, 1.0)):
        other = x.clone()
        other[row, (row + 1) % 8] = value
        assert FeatureNormalization(8, "auto").fit([other]).kind == "standard"
    halves = [FeatureStatistics(8), FeatureStatistics(8)]
    halves[0].update(x[:20])
    halves[1].update(x[20:])
    halves[0].merge(halves[1])
    assert halves[0].sparse and halves[0].root_mean_square() == pytest.approx(float(x.square().mean().sqrt()))
    assert (FeatureNormalization(8, "scale").fit([torch.zeros(4, 8)])(x) == 0).all()


def test_chosen_normalization_is_stored(tmp_path):
    net = MIRNet(8, hidden=4, normalization="auto", soft_clip=3.0)
    x = torch.zeros(8, 8)
    x[1, 7] = 20
    net.normalization.fit([x])
    net.save_pretrained(tmp_path)
    again = MIRNet.from_pretrained(tmp_path)
    assert again.normalization.kind == net.normalization.kind == "scale"
    assert torch.equal(again(x[None]).logits, net.eval()(x[None]).logits)


def test_model_normalizes_by_itself():
    net = trained_net()
    plain = MIRNet(5, hidden=8, instance_scale=0.1, bag_scale=10.0)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "normalization" not in k})
    x = instances()
    assert torch.equal(net(x, cu_seqlens=CU).logits, plain(net.normalization(x), cu_seqlens=CU).logits)
    assert net(x.half(), cu_seqlens=CU).logits.dtype == torch.float32
    # Values of the padding have no effect.
    padded = torch.full((3, 5, 5), torch.nan)
    for b in range(3):
        padded[b, : CU[b + 1] - CU[b]] = x[CU[b] : CU[b + 1]]
    assert torch.allclose(net(padded, lengths=CU.diff()).logits, net(x, cu_seqlens=CU).logits, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"label_names": ("normal", "tumor")},
        {"num_classes": 3, "task": "one_vs_rest", "label_names": list("abc"), "pooling": "gated_attention"},
        {"task": "regression", "target_mean": 3.0, "target_std": 0.5, "deep_supervision": False},
    ],
)
def test_round_trip(tmp_path, options):
    net = trained_net(**options)
    net.threshold = 0.25
    net.save_pretrained(tmp_path / "model", notes={"epoch": 3})
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["notes"] == {"epoch": 3}
    again = amil_fast.MIRNet.from_pretrained(tmp_path / "model", backend="reference")
    assert again.label_names == net.label_names and again.threshold == 0.25 and again.task == net.task
    assert not again.training and again.normalization.soft_clip == 3
    x = instances()
    found, expected = again(x, cu_seqlens=CU), net(x, cu_seqlens=CU)
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    torch.testing.assert_close(found.logits, expected.logits)
    if net.task == "regression":
        torch.testing.assert_close(found.probabilities, found.logits.mean(0) * 0.5 + 3)
    if net.task == "one_vs_rest":
        torch.testing.assert_close(found.probabilities, torch.sigmoid(found.logits).mean(0))


def test_what_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match="pooling: expected a name in POOLINGS to store the model, got a callable"):
        MIRNet(5, pooling=lambda features: amil_fast.AdjustPool()).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="StackedMIRNet has no file format"):
        StackedMIRNet(2, 5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder with config\.json and model\.safetensors"):
        MIRNet.from_pretrained(tmp_path)
    for options, message in [
        ({"task": "ranking"}, "task: expected one of classification"),
        ({"label_names": ["a"]}, "label_names: expected 2 names, got 1"),
        ({"label_names": ["a"], "task": "regression"}, "label_names: expected 0 names, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            MIRNet(5, **options)


def test_wrong_inputs():
    net = MIRNet(5, hidden=8)
    for error, message, x in [
        (ValueError, r"instances: expected 5 features \(in_features\), got 4", torch.ones(1, 2, 4)),
        (TypeError, "instances: expected dtype torch.float32 of the network's parameters", torch.ones(1, 2, 5).half()),
        (
            TypeError,
            "instances: expected a dense tensor, got layout torch.sparse_coo",
            torch.ones(1, 2, 5).to_sparse(),
        ),
        (ValueError, "expected device cpu of the network's parameters, got meta", torch.ones(1, 2, 5, device="meta")),
    ]:
        with pytest.raises(error, match=message):
            net(x)
    assert net.to("meta")(torch.ones(3, 2, 5, device="meta")).logits.shape == (3, 3)


def test_hub(tmp_path, monkeypatch):
    """Without the network: the hub's functions are replaced by ones that copy folders."""
    uploaded = tmp_path / "hub"

    class Api:
        def create_repo(self, repository, *, exist_ok, private):
            assert repository == "lab/tumor" and exist_ok and private
            return f"https://hub/{repository}"

        def upload_folder(self, *, repo_id, folder_path):
            shutil.copytree(folder_path, uploaded)

    def download(repository, allow_patterns):
        if repository != "lab/tumor":
            raise OSError("not found")
        return str(uploaded)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    net = trained_net()
    assert net.push_to_hub("lab/tumor", private=True) == "https://hub/lab/tumor"
    again = MIRNet.from_pretrained("lab/tumor")
    torch.testing.assert_close(again(instances(), cu_seqlens=CU).logits, net(instances(), cu_seqlens=CU).logits)
    with pytest.raises(ValueError, match="lab/other: no such folder, and no such model on the Hugging Face hub: not f"):
        MIRNet.from_pretrained("lab/other")


def test_exported_program_is_stored(tmp_path):
    net = trained_net()
    x = instances()[None].repeat(2, 1, 1)
    program = torch.export.export(net, (x,))
    torch.export.save(program, tmp_path / "net.pt2")
    output = torch.export.load(tmp_path / "net.pt2").module()(x)
    assert type(output).__name__ == "MIROutput"
    torch.testing.assert_close(output.probabilities, net(x).probabilities)
