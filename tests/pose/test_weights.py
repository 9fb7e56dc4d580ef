"""The pretrained generator shipped with the package."""

import numpy as np
import pytest
import torch

from amil_fast.pose.data import PoseDataset, load
from amil_fast.pose.evaluation import GroundTruth, score
from amil_fast.pose.inference.predictor import SHIPPED, Predictor, load_model
from amil_fast.pose.skeletons import LSP14
from tests.helpers import SHARED

LSPET = SHARED / "data" / "lspet"


def test_shipped_files():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 20e6
    assert "licen" in (SHIPPED / "README.md").read_text().lower()
    generator = load_model()
    assert generator.skeleton is LSP14 and generator.config["pooling"] == "adjust" and not generator.training
    assert all(value.isfinite().all() for value in generator.state_dict().values())


@pytest.mark.skipif(not LSPET.is_dir(), reason=f"{LSPET} not found")
def test_accuracy():
    """PCK on 60 of the 500 validation images, close to the model card's result on all of them."""
    people = load("lspet", LSPET, "val", crop="joints", skip_bad=True, check_images=False).subset(np.arange(60))
    predictor = Predictor(load_model())
    samples = [PoseDataset(people, predictor.size)[i] for i in range(len(people))]
    images, matrices = (torch.stack([sample[name] for sample in samples]) for name in ("image", "to_image"))
    result = score(predictor(images, matrices)[0].numpy(), GroundTruth.of(people))
    assert result.summary["samples"] > 30 and result.summary["PCK@0.2"]["mean"] > 60
