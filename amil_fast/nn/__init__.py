"""Layers, networks and losses over bags of instances."""

from amil_fast.nn.feature_normalization import FeatureNormalization, FeatureStatistics
from amil_fast.nn.losses import NoisyOrLoss, level_loss, margin_loss, noisy_or, noisy_or_loss
from amil_fast.nn.mirnet import MIRNet, MIROutput
from amil_fast.nn.pooling import (
    POOLINGS,
    AdjustPool,
    AttentionPool,
    GatedAttentionPool,
    LogSumExpPool,
    MaxPool,
    MeanPool,
    make_pooling,
)
from amil_fast.nn.stacked import StackedMIRNet

__all__ = [
    "AdjustPool",
    "MeanPool",
    "MaxPool",
    "LogSumExpPool",
    "AttentionPool",
    "GatedAttentionPool",
    "POOLINGS",
    "make_pooling",
    "FeatureNormalization",
    "FeatureStatistics",
    "MIRNet",
    "MIROutput",
    "StackedMIRNet",
    "margin_loss",
    "level_loss",
    "noisy_or",
    "noisy_or_loss",
    "NoisyOrLoss",
]
