"""Data sets by name, as the command line knows them."""

from amil_fast.pose.data.coco import load_coco
from amil_fast.pose.data.errors import DataError
from amil_fast.pose.data.lsp import load_lsp, load_lspet
from amil_fast.pose.data.mpii import load_mpii, load_mpii_mat

# name -> (loader, the split that is trained on, the split that is scored)
DATASETS = {
    "lsp": (load_lsp, "train", "test"),
    "lspet": (load_lspet, "train", "val"),
    "mpii": (load_mpii, "train", "valid"),
    "mpii-mat": (load_mpii_mat, "train", "valid"),
    "coco": (load_coco, "train2017", "val2017"),
}


def load(name, root, split=None, *, training=False, **options):
    """The people of a data set.

    Args:
        name: a key of :data:`DATASETS`.
        root: its folder, in the layout it was published in.
        split: one of the data set's; by default the one that is trained on or scored.
        training: which default.
        options: for the data set's loader (``skip_bad``, ``crop``, ``annotations``, ...).

    Returns :class:`~amil_fast.pose.data.annotations.Annotations`. Raises DataError naming file and entry.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(map(repr, DATASETS))}, got {name!r}")
    loader, train, test = DATASETS[name]
    people = loader(root, split or (train if training else test), **options)
    if not len(people):
        raise DataError(f"{people.source}: no usable person is left in the split {split or 'chosen by default'!r}")
    return people
