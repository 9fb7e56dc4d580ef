"""Data sets and transforms: bag files, pose data sets, videos, drawn figures."""

import importlib

# Public name -> module; what needs OpenCV or SciPy is imported when first asked for.
_LAZY = {
    "Annotations": "annotations",
    "Augmentation": "augment",
    "SPORTS": "augment",
    "warp_batch": "augment",
    "Boxes": "video",
    "DataError": "errors",
    "DATASETS": "registry",
    "load": "registry",
    "PoseDataset": "dataset",
    "PoseLoader": "loader",
    "PoseSampler": "loader",
    "PackedDataset": "packed",
    "pack": "packed",
    "DrawnFigures": "synthetic",
    "VideoFrames": "video",
    "VideoPeople": "video",
    "find_ucf11": "video",
    "heatmap_to_image": "geometry",
    "load_coco": "coco",
    "load_folder": "folder",
    "load_lsp": "lsp",
    "load_lspet": "lsp",
    "load_mpii": "mpii",
    "load_mpii_mat": "mpii",
}

__all__ = sorted(_LAZY)


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_LAZY})
