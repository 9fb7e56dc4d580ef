"""Multiple-instance learning on feature vectors: bag files, bag classifiers, cross-validation."""

from amil_fast.mil.bag_files import BagData, check_bag_data, load_bags, save_bags, stratified_folds
from amil_fast.mil.bag_sources import BagFileSource, BagFolder, BagSource, open_bags
from amil_fast.mil.classifiers import BagClassifiers
from amil_fast.mil.cross_validation import area_under_roc, cross_validate
from amil_fast.mil.labels import LabeledBags, Targets, load_labeled_bags, make_targets, split_groups
from amil_fast.mil.set_kernel import SetKernel
from amil_fast.mil.settings import PAPER_SETTINGS, MilSettings

__all__ = [
    "BagData",
    "load_bags",
    "save_bags",
    "check_bag_data",
    "stratified_folds",
    "BagSource",
    "BagFolder",
    "BagFileSource",
    "open_bags",
    "LabeledBags",
    "load_labeled_bags",
    "Targets",
    "make_targets",
    "split_groups",
    "MilSettings",
    "PAPER_SETTINGS",
    "BagClassifiers",
    "SetKernel",
    "cross_validate",
    "area_under_roc",
]
