"""Backbones of the generator: shapes, stages, parameters of torchvision's ResNets."""

import pytest
import torch

from amil_fast.pose.models.backbones import make_backbone


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "resnet18s",
        "resnet34",
        "resnet50",
        "hourglass1",
        "hourglass2",
        "patchresnet8x2",
        "patchresnet8x1-1-2-1",
    ],
)
def test_backbones_give_a_quarter_of_the_resolution(backbone):
    net = make_backbone(backbone, 16).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 64, 128)).shape == (1, 16, 16, 32)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, H, W\) with H and W multiples of"):
        net(torch.randn(1, 3, 72, 64))


def test_patch_resnet():
    """Widths, depths and strides of the stages; the features see the whole crop."""
    net = make_backbone("patchresnet8x1-2-3-1", 16).eval()
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    assert [len(stage) for stage in stages] == [1, 2, 3, 1]
    assert [stage[-1].conv2.out_channels for stage in stages] == [8, 16, 32, 64]
    assert [stage[0].conv1.stride[0] for stage in stages] == [1, 2, 2, 2]
    assert net.stem.weight.shape == (8, 3, 4, 4) and net.stem.stride == (4, 4)
    assert len(make_backbone("patchresnet8x2", 16).layer4) == 2
    x = torch.randn(1, 3, 64, 64)
    other = x.clone()
    other[..., :4, :4] += 1
    with torch.no_grad():
        assert (net(x) - net(other))[..., -1, -1].abs().amax() > 1e-6
    for shape in ("0x2", "32", "32x2-2", "32x2-2-0-2", "32x2-2-2-2-2"):
        name = f"patchresnet{shape}"
        with pytest.raises(ValueError, match=f"backbone: expected one of .* 'patchresnet32x2', .*, got '{name}'"):
            make_backbone(name, 16)


# Number of parameters of torchvision's models without their classifier, from its documentation less 1000 (C + 1).
@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032)]
)
def test_resnets_have_torchvisions_parameters(name, count, tmp_path):
    from safetensors.torch import save_file

    net = make_backbone(name, 8)
    names = {key: value for key, value in net.state_dict().items() if not key.startswith(("lateral", "smooth"))}
    parameters = [value for key, value in names.items() if "running" not in key and "num_batches" not in key]
    assert sum(value.numel() for value in parameters) == count
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv2.weight", "layer4.1.bn1.bias"} <= names.keys()
    assert "layer2.0.downsample.0.weight" in names and "layer2.0.downsample.1.running_var" in names

    stored = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in names.items()}
    stored["fc.weight"] = torch.zeros(3, 3)
    save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / "resnet.safetensors")
    net.load_resnet(tmp_path / "resnet.safetensors")
    assert net.layer1[0].conv1.weight.equal(stored["layer1.0.conv1.weight"])
    del stored["layer3.0.conv1.weight"]
    save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"1 parameters differ, first layer3.0.conv1.weight"):
        net.load_resnet(tmp_path / "less.safetensors")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="expected a safetensors file of ResNet weights"):
        net.load_resnet(tmp_path / "pickle.pth")
