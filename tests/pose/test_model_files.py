"""save_pretrained and from_pretrained of generator and discriminator, with built-in and custom skeletons."""

import dataclasses
import json

import pytest
import torch

from amil_fast import PoseDiscriminator, PoseGenerator
from amil_fast.pose import Skeleton
from amil_fast.pose.skeletons import MPII16, get_skeleton
from tests.pose.helpers import randomize, small_generator


@pytest.fixture(scope="module")
def generator():
    return small_generator()


@pytest.mark.parametrize("build", [PoseGenerator, PoseDiscriminator])
def test_save_and_load(build, tmp_path):
    torch.manual_seed(0)
    net = randomize(build("coco17", features=16, pooling="mean", mil_scale=0.7)).eval()
    net.save_pretrained(tmp_path / "net", notes={"score": 1})
    again = build.from_pretrained(tmp_path / "net")
    assert not again.training and again.config == net.config
    assert {n: v for n, v in again.state_dict().items() if not v.equal(net.state_dict()[n])} == {}
    assert build.from_pretrained(str(tmp_path / "net" / "model.safetensors")).config == net.config
    net.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = build.from_pretrained(tmp_path / "half")
    assert next(half.parameters()).dtype == torch.float32
    size = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("half", "net")]
    assert size[0] < 0.7 * size[1]
    assert not list(tmp_path.rglob("*.partial"))
    assert json.loads((tmp_path / "net" / "config.json").read_text())["notes"] == {"score": 1}


def test_load_errors(tmp_path, generator):
    with pytest.raises(ValueError, match=r"expected a folder with config.json and model.safetensors, config.json is m"):
        PoseGenerator.from_pretrained(tmp_path)
    generator.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="format: expected 'amil-pose-discriminator', got 'amil-pose-generator'"):
        PoseDiscriminator.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected the files of a model of format 'amil-pose-generator'"):
        PoseGenerator.from_pretrained(tmp_path, features=24)
    assert PoseGenerator.from_pretrained(tmp_path, input_size=96).input_size == 96
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "version": 99}))
    with pytest.raises(ValueError, match="version: expected at most 1, got 99"):
        PoseGenerator.from_pretrained(tmp_path)
    for damaged in ([], {**config, "arguments": None}, {"format": config["format"]}):
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"config\.json: expected a JSON object with 'format'"):
            PoseGenerator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON file"):
        PoseGenerator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="expected the files of a model"):
        PoseGenerator.from_pretrained(tmp_path)


def custom_skeleton(**changes):
    """Five joints, the trunk of LSP."""
    arguments = {
        "name": "trunk",
        "joints": ("right hip", "left hip", "right shoulder", "left shoulder", "neck"),
        "short_names": ("rhip", "lhip", "rsho", "lsho", "neck"),
        "limbs": ((0, 1), (2, 4), (3, 4)),
        "groups": {"hip": (0, 1), "shoulder": (2, 3)},
        "scored": (0, 1, 2, 3),
        "normalizer_pairs": {"paper": (1, 2)},
        "head_segment": (4, 4),
        "head_factor": 0.5,
        "derived": (4,),
    }
    return Skeleton(**{**arguments, **changes})


@pytest.mark.parametrize("build", [PoseGenerator, PoseDiscriminator])
def test_save_and_load_with_a_custom_skeleton(build, tmp_path):
    own = custom_skeleton()
    net = build(own, features=16).eval()
    net.save_pretrained(tmp_path)
    again = build.from_pretrained(tmp_path)
    for item in dataclasses.fields(Skeleton):
        assert getattr(again.skeleton, item.name) == getattr(own, item.name), item.name
    assert again.skeleton.flip_pairs == ((0, 1), (2, 3)) and again.config == net.config
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    heatmaps, images = torch.rand(1, 5, 16, 16), torch.randn(1, 3, 64, 64)
    inputs = (images,) if build is PoseGenerator else (heatmaps, images)
    with torch.no_grad():
        assert again(*inputs).equal(net(*inputs)) and again(*inputs).shape == heatmaps.shape


@pytest.mark.parametrize("build", [PoseGenerator, PoseDiscriminator])
def test_built_in_skeletons_are_stored_by_name(build, tmp_path):
    build("mpii16", features=16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["arguments"]["skeleton"] == "mpii16"
    assert build.from_pretrained(tmp_path).skeleton is MPII16
    # The name of a built-in skeleton does not make a custom one equal to it.
    build(custom_skeleton(name="lsp14"), features=16).save_pretrained(tmp_path)
    assert build.from_pretrained(tmp_path).skeleton.num_joints == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joints": None}, "joints: expected a list of names, got None"),
        ({"joints": ["a", "a", "b", "c", "d"]}, "joints: expected unique names"),
        ({"short_names": ["a"]}, "short_names: expected 5, one per joint, got 1"),
        ({"limbs": [[0, 5]]}, r"limbs: expected 2 joint indices from 0 to 4, got \[0, 5\]"),
        ({"limbs": [[0]]}, r"limbs: expected 2 joint indices from 0 to 4, got \[0\]"),
        ({"limbs": 3}, "limbs: expected pairs of joint indices, got 3"),
        ({"groups": {"hip": "ab"}}, r"groups\['hip'\]: expected joint indices from 0 to 4, got 'ab'"),
        ({"groups": [1]}, "groups: expected a mapping of names"),
        ({"scored": [-1]}, r"scored: expected joint indices from 0 to 4, got \[-1\]"),
        ({"normalizer_pairs": {"paper": [0, 1, 2]}}, r"normalizer_pairs\['paper'\]: expected 2 joint indices"),
        ({"head_segment": [0, 1.5]}, "head_segment: expected 2 joint indices"),
        ({"head_factor": "big"}, "head_factor: expected None or a positive number, got 'big'"),
        ({"name": ""}, "name: expected a non-empty string, got ''"),
        ({"colors": []}, "unexpected keyword argument 'colors'"),
        ("limbs", "missing 1 required positional argument: 'limbs'"),
    ],
)
def test_damaged_skeleton_definitions(change, message):
    definition = custom_skeleton().to_config()
    assert get_skeleton(json.loads(json.dumps(definition))).to_config() == definition
    if isinstance(change, dict):
        definition.update(change)
    else:
        del definition[change]
    with pytest.raises(ValueError, match=f"skeleton: expected the definition of a skeleton: .*{message}"):
        get_skeleton(definition)


@pytest.mark.parametrize("build", [PoseGenerator, PoseDiscriminator])
def test_load_with_a_damaged_skeleton_definition(build, tmp_path):
    build(custom_skeleton(), features=16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["arguments"]["skeleton"]["limbs"] = [[0, 9]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path}: .* limbs: expected 2 joint indices from 0 to 4"):
        build.from_pretrained(tmp_path)
    config["arguments"]["skeleton"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path}: .* skeleton: expected one of 'lsp14', .*, got 7"):
        build.from_pretrained(tmp_path)
