"""Data sets by name, for the command line and training configurations."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.coco import load_coco
from amil_fast.pose.data.lsp import load_lsp, load_lspet
from amil_fast.pose.data.mpii import load_mpii, load_mpii_mat
from amil_fast.utils.files import DataError

# name -> (loader, training split, evaluation split)
DATASETS: Mapping[str, tuple[Callable[..., Annotations], str, str]] = {
    "lsp": (load_lsp, "train", "test"),
    "lspet": (load_lspet, "train", "val"),
    "mpii": (load_mpii, "train", "valid"),
    "mpii-mat": (load_mpii_mat, "train", "valid"),
    "coco": (load_coco, "train2017", "val2017"),
}


def load(
    name: str, root: str | os.PathLike, split: str | None = None, *, training: bool = False, **options: Any
) -> Annotations:
    """Loads the annotations of a data set.

    Args:
        name: a key of :data:`DATASETS`.
        root: its folder, in the published layout.
        split: a split of the data set; by default its evaluation split, or its training split with ``training``.
        training: selects the default split.
        options: arguments of the data set's loader (``skip_bad``, ``crop``, ``annotations``, ...).

    Raises:
        ValueError: unknown data set or split.
        DataError: invalid files, or no usable person; the message names file and entry.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(map(repr, DATASETS))}, got {name!r}")
    loader, train, test = DATASETS[name]
    people = loader(root, split or (train if training else test), **options)
    if not len(people):
        raise DataError(f"{people.source}: no usable person in the split {split or (train if training else test)!r}")
    return people
