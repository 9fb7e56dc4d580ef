"""Multiple-instance learning on feature vectors: bag files, bag classifiers, cross-validation."""

from amil_fast.mil.bag_cross_validation import cross_validate_bags
from amil_fast.mil.bag_files import BagData, check_bag_data, load_bags, save_bags, stratified_folds
from amil_fast.mil.bag_sources import BagFileSource, BagFolder, BagSource, open_bags
from amil_fast.mil.classifiers import BagClassifiers
from amil_fast.mil.cross_validation import area_under_roc, cross_validate
from amil_fast.mil.heatmap import draw_heatmap, instance_values, scaled_values
from amil_fast.mil.labels import LabeledBags, Targets, load_labeled_bags, make_targets, split_groups
from amil_fast.mil.metrics import best_threshold, curves, evaluate_scores
from amil_fast.mil.packing import PackedBags, PackedLoader, TorchmilDataset, pack_by_size, packed_collate
from amil_fast.mil.prediction import BagPredictions, collapse_warning, effective_instances, predict_bags
from amil_fast.mil.settings import PAPER_SETTINGS, MilSettings, TrainSettings
from amil_fast.mil.training import BagTraining

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
    "packed_collate",
    "PackedBags",
    "PackedLoader",
    "TorchmilDataset",
    "pack_by_size",
    "TrainSettings",
    "BagTraining",
    "BagPredictions",
    "predict_bags",
    "effective_instances",
    "collapse_warning",
    "evaluate_scores",
    "best_threshold",
    "curves",
    "instance_values",
    "scaled_values",
    "draw_heatmap",
    "MilSettings",
    "PAPER_SETTINGS",
    "BagClassifiers",
    "cross_validate",
    "cross_validate_bags",
    "area_under_roc",
]
