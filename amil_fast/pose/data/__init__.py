"""Data sets and augmentation: LSP, LSPET, MPII, COCO, videos, crop archives, synthetic figures."""

from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.augment import SPORTS, Augmentation, warp_batch
from amil_fast.pose.data.coco import load_coco
from amil_fast.pose.data.crop_archive import CropArchive, pack
from amil_fast.pose.data.dataset import PoseDataset
from amil_fast.pose.data.errors import DataError
from amil_fast.pose.data.folder import load_folder
from amil_fast.pose.data.loader import PoseLoader, PoseSampler
from amil_fast.pose.data.lsp import load_lsp, load_lspet
from amil_fast.pose.data.mpii import load_mpii, load_mpii_mat
from amil_fast.pose.data.registry import DATASETS, load
from amil_fast.pose.data.synthetic import SyntheticFigures
from amil_fast.pose.data.video import Boxes, VideoFrames, VideoPeople, find_ucf11

__all__ = [
    "Annotations",
    "Augmentation",
    "SPORTS",
    "warp_batch",
    "Boxes",
    "DataError",
    "DATASETS",
    "load",
    "PoseDataset",
    "PoseLoader",
    "PoseSampler",
    "CropArchive",
    "pack",
    "SyntheticFigures",
    "VideoFrames",
    "VideoPeople",
    "find_ucf11",
    "load_coco",
    "load_folder",
    "load_lsp",
    "load_lspet",
    "load_mpii",
    "load_mpii_mat",
]
