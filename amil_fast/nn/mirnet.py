"""MI-RNet, the residual multiple-instance network (Eq. 1)."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree

from amil_fast.nn.bag_view import BagView
from amil_fast.nn.feature_normalization import FeatureNormalization
from amil_fast.nn.losses import noisy_or_of
from amil_fast.nn.pooling import AdjustPool, BasePool, make_pooling
from amil_fast.ops.bags import accumulation_dtype
from amil_fast.utils import pretrained

TASKS = ("classification", "one_vs_rest", "regression")
_FORMAT = "amil_fast.MIRNet"


class MIROutput(NamedTuple):
    """Output of :class:`MIRNet`, for L scored levels, B bags and C classes (without C for ``num_classes=1``).

    Attributes:
        logits: ``(L, B)`` or ``(L, B, C)``, scores of every level, for :func:`level_loss`.
        probabilities: ``(B,)`` or ``(B, C)``, mean over the levels' probabilities (sigmoid or softmax); for
            ``task="regression"`` the predicted values.
        embedding: ``(B, hidden)``, bag vector X^L of the last level.
        pooled: ``(depth, B, hidden)``, pooled vector of every level before the residual sum, for
            :func:`margin_loss`.
        weights: ``(depth, B, N)`` or ``(depth, total)``, instance weights of the poolings, or None.
        instance_logits: ``(L, B, N)`` or ``(L, total)`` with ``scoring="instances"``, for
            :func:`noisy_or_loss`; otherwise None.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    embedding: torch.Tensor
    pooled: torch.Tensor
    weights: torch.Tensor | None
    instance_logits: torch.Tensor | None


# Exported programs contain the output type by this name; torch.export.save needs it.
_pytree._register_namedtuple(MIROutput, serialized_type_name=f"{_FORMAT}.MIROutput")


class MIRNet(nn.Module):
    r"""Bag classifier: fully connected layers over instances, each followed by a pooling; bag vectors are summed.

    .. math::
        x_{ij}^l = \mathrm{ReLU}(W_l x_{ij}^{l-1} + b_l), \quad X_i^1 = M^1(\{x_{ij}^1\}_j), \quad
        X_i^l = M^l(\{x_{ij}^l\}_j) + X_i^{l-1}

    with a classifier head on every :math:`X^l`. ``pooling="mean"`` with ``residual=False`` is MI-Net.

    Args:
        in_features: width of an instance.
        num_classes: 1 for binary labels (one output and a sigmoid), C >= 2 for class indices (C outputs, softmax).
        hidden: width of every layer.
        depth: number of layers.
        pooling: name in :data:`POOLINGS`, or a callable ``features -> module``.
        num_iters: iterations of adjust pooling.
        residual: add the bag vector of the previous level.
        deep_supervision: score every level; otherwise the last one only (L = 1).
        dropout: dropout probability of hidden units.
        input_dropout: dropout probability of features.
        instance_norm: length to which every embedding is scaled before pooling; None, as in the paper, does not scale.
            With it, instances are weighted by direction, not by magnitude.
        instance_scale: factor on the embeddings before pooling; 1 in the paper. Squash preserves little more than the
            direction of vectors much longer than 1; a factor that brings them to about 1 preserves the length as well.
        bag_scale: factor on the pooled vectors before the sum and the heads; 1 in the paper. Squashed vectors have
            length < 1, from which a head with small initial weights learns slowly.
        scoring: ``"bag"``: the heads score :math:`X^l`. ``"instances"``: they score every instance and its bag,
            :math:`x_{ij}^l + X_i^l`, and the probability of a bag is the noisy-or over its instances
            (:func:`noisy_or`, λ = 1).
        task: ``"classification"``; ``"one_vs_rest"``: a sigmoid per class instead of the softmax;
            ``"regression"``: the prediction is the mean over the levels' scores, times ``target_std``, plus
            ``target_mean``.
        normalization: normalization of the features within the model
            (:class:`~amil_fast.nn.FeatureNormalization`, to be fitted: ``net.normalization.fit(batches)``); None: off.
        soft_clip: bound of the smooth clipping after the normalization; 0: off.
        label_names: names of the classes; for ``num_classes=1`` those of the negative and the positive class.
        threshold: least probability of the positive class for which a bag is called positive.
        target_mean: see ``task``.
        target_std: see ``task``.
        backend: backend of adjust pooling.

    Raises:
        ValueError: a size below 1, an unknown name, ``scoring="instances"`` with several classes.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int = 1,
        hidden: int = 128,
        depth: int = 3,
        pooling: str | Callable[[int], nn.Module] = "adjust",
        num_iters: int = 3,
        residual: bool = True,
        *,
        deep_supervision: bool = True,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        instance_norm: float | None = None,
        instance_scale: float = 1.0,
        bag_scale: float = 1.0,
        scoring: str = "bag",
        task: str = "classification",
        normalization: str | None = None,
        soft_clip: float = 0.0,
        label_names: Sequence[str] = (),
        threshold: float = 0.5,
        target_mean: float = 0.0,
        target_std: float = 1.0,
        backend: str = "auto",
    ):
        super().__init__()
        arguments = dict(locals())
        self._arguments = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        sizes = {"in_features": in_features, "num_classes": num_classes, "hidden": hidden, "depth": depth}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if scoring not in ("bag", "instances"):
            raise ValueError(f"scoring: expected 'bag' or 'instances', got {scoring!r}")
        if scoring == "instances" and num_classes != 1:
            raise ValueError(f"scoring: 'instances' is for num_classes=1, got num_classes={num_classes}")
        if instance_norm is not None and not instance_norm > 0:
            raise ValueError(f"instance_norm: expected None or a positive number, got {instance_norm}")
        if task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
        expected = {"classification": max(num_classes, 2), "one_vs_rest": num_classes, "regression": 0}[task]
        if len(label_names) not in (0, expected):
            raise ValueError(f"label_names: expected {expected} names, got {len(label_names)}")
        self.in_features = in_features
        self.num_classes = num_classes
        self.task, self.label_names, self.threshold = task, tuple(label_names), threshold
        self.target_mean, self.target_std = target_mean, target_std
        self.normalization = None
        if normalization is not None:
            self.normalization = FeatureNormalization(in_features, normalization, soft_clip)
        self.residual = residual
        self.deep_supervision = deep_supervision
        self.layers = nn.ModuleList(self._linear(hidden if level else in_features, hidden) for level in range(depth))
        self.pools = nn.ModuleList(self._pooling(pooling, hidden, num_iters, backend) for _ in range(depth))
        self.heads = nn.ModuleList(self._linear(hidden, num_classes) for _ in range(depth if deep_supervision else 1))
        self.dropout = nn.Dropout(dropout)
        self.input_dropout = nn.Dropout(input_dropout)
        self.instance_norm = instance_norm
        self.instance_scale = instance_scale
        self.bag_scale = bag_scale
        self.scoring = scoring
        self.reset_parameters()

    # Factories of the layers, overridden by StackedMIRNet.
    def _linear(self, in_features: int, out_features: int) -> nn.Module:
        return nn.Linear(in_features, out_features)

    def _pooling(self, pooling, features, num_iters, backend) -> nn.Module:
        return make_pooling(pooling, features, num_iters, backend)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initializes weights from a normal distribution (variance 2/fan-in, 1/fan-in in the heads) and biases to 0.

        Parameters of the poolings keep the initialization of their modules.
        """
        layer: Any
        with torch.no_grad():
            for layers, gain in ((self.layers, 2.0), (self.heads, 1.0)):
                for layer in layers:
                    layer.weight.normal_(0, (gain / layer.in_features) ** 0.5, generator=generator)
                    layer.bias.zero_()

    @property
    def config(self) -> dict[str, Any]:
        """JSON-serializable arguments of the constructor, with the current values of those that training sets."""
        if callable(self._arguments["pooling"]):
            raise ValueError("pooling: expected a name in POOLINGS to store the model, got a callable")
        current: dict[str, Any] = {name: getattr(self, name) for name in ("threshold", "target_mean", "target_std")}
        current["normalization"] = None if self.normalization is None else self.normalization.kind
        return {**self._arguments, **current, "label_names": list(self.label_names)}

    def save_pretrained(self, folder: str | os.PathLike, *, notes: dict[str, Any] | None = None) -> None:
        """Writes ``config.json`` and ``model.safetensors``, including the normalization, to a folder.

        Args:
            folder: created if necessary.
            notes: JSON-serializable, stored in ``config.json``.

        Raises:
            ValueError: the pooling is a callable.
        """
        pretrained.save(self, folder, _FORMAT, notes=notes)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> "MIRNet":
        """Loads a model that :meth:`save_pretrained` wrote, float32 and in evaluation mode.

        Args:
            path: the folder; or the name of a repository on the Hugging Face hub (``"owner/name"``), which is
                downloaded with the package huggingface_hub.
            options: constructor arguments to override, such as ``backend="reference"``.

        Raises:
            ValueError: missing or damaged files, or files of another model.
        """
        folder = pretrained.local_folder(path)
        return pretrained.load(lambda **arguments: cls(**{**arguments, **options}), folder, _FORMAT)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Uploads the files of :meth:`save_pretrained` to the Hugging Face hub; returns the address.

        Args:
            repository: ``"owner/name"``, created if necessary.
            options: arguments of ``huggingface_hub.HfApi.create_repo``, such as ``private=True``.
        """
        return pretrained.push(self.save_pretrained, repository, **options)

    def forward(
        self,
        instances: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        lengths: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        return_weights: bool = False,
    ) -> MIROutput:
        """Classifies bags.

        Args:
            instances: ``(B, N, in_features)``, ``(total, in_features)`` or a jagged nested tensor, as for
                :func:`amil_fast.ops.adjust_pool`. Padding has no effect and gets zero gradient; an empty bag is scored
                by the biases of the heads.
            mask: ``(B, N)``.
            lengths: ``(B,)``.
            cu_seqlens: ``(B + 1,)``.
            return_weights: also return the instance weights of every level.
        """
        bags = BagView(instances, mask, lengths, cu_seqlens)
        if bags.instances.shape[-1] != self.in_features:
            raise ValueError(
                f"instances: expected {self.in_features} features (in_features), got {bags.instances.shape[-1]}"
            )
        # x has zeros in the padding, where 0 · NaN would otherwise reach the weight gradients of the layers.
        x = bags.x
        dtype, device = self.heads[0].weight.dtype, self.heads[0].weight.device
        if x.device != device:
            raise ValueError(f"instances: expected device {device} of the network's parameters, got {x.device}")
        if self.normalization is not None:
            x = self.normalization(x).to(dtype)
        elif x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"instances: expected dtype {dtype} of the network's parameters, got {x.dtype}")
        return self._levels(x, bags, return_weights)

    def _levels(self, x, bags, return_weights):
        pooled, weights, logits, instance_logits = [], [], [], []
        x = self.input_dropout(x)
        X = None
        for level, (layer, pool) in enumerate(zip(self.layers, self.pools, strict=True)):
            x = self.dropout(torch.relu(layer(x)))
            f = x if self.instance_norm is None else _scaled_to(x, self.instance_norm)
            to_pool = f if self.instance_scale == 1 else f * self.instance_scale
            m, w = self._pool(pool, to_pool, bags, return_weights)
            if return_weights:
                weights.append(w)
            pooled.append(m)
            if self.bag_scale != 1:
                m = m * self.bag_scale
            X = m if X is None or not self.residual else X + m
            if self.deep_supervision or level == len(self.layers) - 1:
                head = self.heads[level if self.deep_supervision else 0]
                if self.scoring == "bag":
                    logits.append(head(X))
                else:
                    bag_logits, z = self._score_instances(head, f, X, bags)
                    logits.append(bag_logits)
                    instance_logits.append(z)
        logits = torch.stack(logits)
        if self.num_classes == 1:
            logits = logits[..., 0]
        if self.task == "regression":
            probabilities = logits.mean(0) * self.target_std + self.target_mean
        elif self.num_classes == 1 or self.task == "one_vs_rest":
            probabilities = torch.sigmoid(logits).mean(0)
        else:
            probabilities = torch.softmax(logits, -1).mean(0)
        return MIROutput(
            logits,
            probabilities,
            X,
            torch.stack(pooled),
            torch.stack(weights) if weights else None,
            torch.stack(instance_logits)[..., 0] if instance_logits else None,
        )

    def _pool(self, pool, x, bags, return_weights):
        if type(pool).forward in (AdjustPool.forward, BasePool.forward):
            result = pool(x, bags=bags, return_weights=return_weights)
        else:  # a custom pooling, or a subclass that overrides forward: it takes tensors and validates them
            result = pool(
                x, mask=bags.mask, cu_seqlens=bags.cu_seqlens, **({"return_weights": True} if return_weights else {})
            )
        return result if return_weights else (result, None)

    def _score_instances(self, head, f, X, bags):
        z = head(f + bags.spread(X))
        log_p, log_not_p = noisy_or_of(bags.with_instances(z))
        return log_p - log_not_p, z


def _scaled_to(x, length):
    """Scales the last axis of ``x`` to ``length``; 0 stays 0, with a bounded gradient near 0."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * (length * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6))).to(x.dtype)
