"""Validation of a generator during training."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from amil_fast.pose.codec import invert, transform
from amil_fast.pose.data import PoseLoader
from amil_fast.pose.evaluation import GroundTruth, Result, predict_batches, score
from amil_fast.pose.inference.predictor import Predictor
from amil_fast.pose.skeletons import Skeleton
from amil_fast.pose.visualization import contact_sheet, pose_tile


class Validation:
    """Scores generators on the validation data, over all processes.

    Args:
        loader: this process's share of the validation data.
        skeleton: skeleton of the data.
        accelerator: precision and processes.
        either: normalize PCK by the flipped pair of joints where the pair is not annotated.
        stopped: called after each batch; True ends the validation without a result.
    """

    def __init__(
        self,
        loader: PoseLoader,
        skeleton: Skeleton,
        accelerator: Accelerator,
        *,
        either: bool = False,
        stopped: Callable[[], bool],
    ):
        self.loader, self.skeleton, self.accelerator = loader, skeleton, accelerator
        self.either, self.stopped = either, stopped

    def __call__(
        self, model: Any, *, overlays: int = 0, full_precision: bool = False
    ) -> tuple[Result | None, np.ndarray | None]:
        """Evaluates ``model`` and leaves it in the mode, training or evaluation, that it was in.

        Args:
            model: a generator.
            overlays: number of crops to draw with the predicted joints.
            full_precision: evaluate without autocast.

        Returns:
            The scores, None if stopped; and the drawn crops ``(H, W, 3)`` uint8 BGR, None if there are none.
        """
        training = model.training
        predictor = Predictor(model)
        tiles: list[np.ndarray] = []

        def on_batch(batch, coords):
            for i in range(min(overlays - len(tiles), len(coords))):
                joints = transform(invert(batch["to_image"][i].double().numpy()), coords[i].double().numpy())
                tiles.append(pose_tile(batch["image"][i], joints, skeleton=self.skeleton))
            return not self.stopped()

        with nullcontext() if full_precision else self.accelerator.autocast():
            found = predict_batches(predictor, self.loader, on_batch=on_batch)
        model.train(training)
        if found is None:
            return None, None
        sheet = contact_sheet([tiles[i : i + 4] for i in range(0, len(tiles), 4)]) if tiles else None
        shares = gather_object([found])
        samples = {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}
        order = samples["index"].argsort(kind="stable")
        samples = {name: value[order] for name, value in samples.items()}
        return score(samples["coords"], GroundTruth.of_samples(self.skeleton, samples), either=self.either), sheet
