"""End-to-end prediction from image files to joints with the shipped generator: images per second, shares of the time.

One benchmark per precision, number of threads (1, all cores) and batch size (1, 16). An image is read, cropped and
normalized, passes through the network, and its heatmaps are decoded with DARK to image coordinates.
``pytest benchmarks/test_predict.py --benchmark-only``
"""

import time

import cv2
import numpy as np
import pytest
import torch

from amil_fast.pose.codec import crop_matrix
from amil_fast.pose.data import SyntheticFigures
from amil_fast.pose.data.augment import warp_crop
from amil_fast.pose.data.files import read_image
from amil_fast.pose.data.loader import cores
from amil_fast.pose.inference import predictor as module
from amil_fast.pose.inference.predictor import Predictor, load_model

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixteen JPEGs of 640 x 640 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    figures = SyntheticFigures(16, 640)
    paths = []
    for i in range(16):
        path = folder / f"{i}.jpg"
        cv2.imwrite(str(path), np.ascontiguousarray(figures[i]["image"].numpy().transpose(1, 2, 0)[:, :, ::-1]))
        paths.append(path)
    return paths


class Stopwatch:
    """Wraps a function and accumulates the time spent in it, in ``seconds``."""

    def __init__(self, function, device):
        self.function, self.device, self.seconds = function, device, 0.0

    def __call__(self, *args, **kwargs):
        began = time.perf_counter()
        result = self.function(*args, **kwargs)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("threads", sorted({1, cores()}))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_predict(benchmark, photos, monkeypatch, precision, threads, batch, device):
    benchmark.group = f"predict {device} {precision}"
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    predictor = Predictor(load_model(), device=device, dtype=getattr(torch, precision))
    network = Stopwatch(predictor.model, device)
    decoder = Stopwatch(module.decode_heatmaps, device)
    monkeypatch.setattr(predictor, "model", network)
    monkeypatch.setattr(module, "decode_heatmaps", decoder)

    def predict():
        for first in range(0, len(photos), batch):
            crops, matrices = [], []
            for path in photos[first : first + batch]:
                image, _ = read_image(path, upright=True)
                matrix = crop_matrix((0, 0, image.shape[1], image.shape[0]), predictor.size)
                crops.append(torch.from_numpy(warp_crop(image, matrix, predictor.size)))
                matrices.append(torch.from_numpy(matrix))
            coords, _ = predictor(torch.stack(crops), torch.stack(matrices))
        return coords

    try:
        assert predict().isfinite().all()
        network.seconds = decoder.seconds = 0.0
        benchmark.pedantic(predict, rounds=10, warmup_rounds=0)
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
    whole = sum(benchmark.stats.stats.data)
    benchmark.extra_info.update(
        operator="predict",
        device=device,
        precision=precision,
        threads=threads,
        batch=batch,
        size=predictor.size,
        flip_test=predictor.flip_test,
        images_per_second=len(photos) / benchmark.stats.stats.median,
        share_network=network.seconds / whole,
        share_decoder=decoder.seconds / whole,
        share_rest=1 - (network.seconds + decoder.seconds) / whole,
    )
