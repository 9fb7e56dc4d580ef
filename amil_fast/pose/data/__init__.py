"""Pose data sets (LSP, LSPET, MPII, COCO, videos, synthetic figures), augmentation, loaders and crop archives."""

from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.augment import SPORTS, STRONG, STRONG_UPRIGHT, Augmentation, warp_batch, warp_crop
from amil_fast.pose.data.boxes import Boxes
from amil_fast.pose.data.coco import load_coco
from amil_fast.pose.data.crop_archive import CropArchive, pack
from amil_fast.pose.data.dataset import PoseDataset
from amil_fast.pose.data.errors import LeftOut
from amil_fast.pose.data.folder import load_folder
from amil_fast.pose.data.inputs import find_inputs
from amil_fast.pose.data.loader import PoseLoader, PoseSampler
from amil_fast.pose.data.lsp import load_lsp, load_lspet
from amil_fast.pose.data.mpii import load_mpii, load_mpii_mat
from amil_fast.pose.data.registry import DATASETS, load
from amil_fast.pose.data.synthetic import SyntheticFigures
from amil_fast.pose.data.ucf11 import Clip, find_ucf11
from amil_fast.pose.data.video import VideoFrames, VideoPeople
from amil_fast.utils.files import DataError

__all__ = [
    # data sets
    "Annotations",
    "LeftOut",
    "DATASETS",
    "load",
    "load_coco",
    "load_folder",
    "load_lsp",
    "load_lspet",
    "load_mpii",
    "load_mpii_mat",
    # crops
    "PoseDataset",
    "SyntheticFigures",
    "CropArchive",
    "pack",
    "PoseLoader",
    "PoseSampler",
    "Augmentation",
    "SPORTS",
    "STRONG",
    "STRONG_UPRIGHT",
    "warp_batch",
    "warp_crop",
    # images and videos
    "Boxes",
    "Clip",
    "VideoFrames",
    "VideoPeople",
    "find_inputs",
    "find_ucf11",
    "DataError",
]
