"""Skeletons: joint names, flip pairs, limbs, colors and scoring groups.

Data sets, metrics and drawing take a :class:`Skeleton`; nothing else in the package depends on the meaning of a joint.
:data:`SKELETONS` holds the built-in ones.
"""

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# RGB colors of Fig. 1 and 4 of the publication: (upper, lower) limb of each side, head, neck.
_PURPLE, _RED, _GRAY = (142, 36, 190), (224, 32, 44), (196, 196, 204)
_LIMB_COLORS = {
    ("right", "arm"): ((20, 60, 210), (64, 146, 255)),
    ("right", "leg"): ((10, 112, 34), (58, 178, 62)),
    ("left", "arm"): ((150, 236, 130), (0, 206, 164)),
    ("left", "leg"): ((255, 216, 0), (255, 128, 0)),
}
_PART = {
    "shoulder": ("arm", 0),
    "elbow": ("arm", 0),
    "wrist": ("arm", 1),
    "hip": ("leg", 0),
    "knee": ("leg", 0),
    "ankle": ("leg", 1),
}


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A set of K joints.

    Attributes:
        name: the key in :data:`SKELETONS`, or any name of a custom skeleton.
        joints: K unique names; "left ..." and "right ..." are the person's own sides.
        short_names: K names of at most five letters for tables and axes (MPII's where they exist).
        limbs: pairs of joint indices to connect in drawings.
        groups: name of a joint group -> joint indices; the score of a group is the unweighted mean over its joints.
        scored: indices of the joints that enter the mean over joints.
        normalizer_pairs: name -> pair of joint indices whose distance normalizes PCK.
        head_segment: joint indices (neck end, top) of the head, or None.
        head_factor: head size of PCKh = ``head_factor`` x length of the head segment, used without a head box.
        derived: indices of joints that the data set computes from other annotations and that may therefore lie outside
            the image.
        flip_pairs: pairs of joint indices that swap in a horizontal flip, derived from the names.
        flip_index: the same as a permutation of length K.
        joint_colors: K colors, RGB in 0..255.
        limb_colors: one color per limb, RGB in 0..255.

    Raises:
        ValueError: duplicate names, lengths that differ or indices out of range.
    """

    name: str
    joints: tuple[str, ...]
    short_names: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...]
    groups: Mapping[str, tuple[int, ...]]
    scored: tuple[int, ...]
    normalizer_pairs: Mapping[str, tuple[int, int]]
    head_segment: tuple[int, int] | None = None
    head_factor: float | None = None
    derived: tuple[int, ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] = field(init=False)
    flip_index: tuple[int, ...] = field(init=False)
    joint_colors: tuple[tuple[int, int, int], ...] = field(init=False)
    limb_colors: tuple[tuple[int, int, int], ...] = field(init=False)

    def __post_init__(self):
        joints = _names("joints", self.joints)
        short_names = _names("short_names", self.short_names)
        K = len(joints)
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: expected a non-empty string, got {self.name!r}")
        if not K or len(set(joints)) != K:
            raise ValueError(f"joints: expected unique names, got {joints}")
        if len(short_names) != K:
            raise ValueError(f"short_names: expected {K}, one per joint, got {len(short_names)}")
        if self.head_factor is not None and not (isinstance(self.head_factor, (int, float)) and self.head_factor > 0):
            raise ValueError(f"head_factor: expected None or a positive number, got {self.head_factor!r}")
        if not isinstance(self.limbs, Iterable):
            raise ValueError(f"limbs: expected pairs of joint indices, got {self.limbs!r}")
        limbs = tuple(_indices("limbs", pair, K, 2) for pair in self.limbs)
        groups = {name: _indices(f"groups[{name!r}]", value, K) for name, value in _items("groups", self.groups)}
        pairs = {
            name: _indices(f"normalizer_pairs[{name!r}]", value, K, 2)
            for name, value in _items("normalizer_pairs", self.normalizer_pairs)
        }
        head = None if self.head_segment is None else _indices("head_segment", self.head_segment, K, 2)

        index = {name: k for k, name in enumerate(joints)}
        flip_index = tuple(index.get(_flipped_name(name), k) for k, name in enumerate(joints))
        for name, value in {
            "joints": joints,
            "short_names": short_names,
            "limbs": limbs,
            "groups": groups,
            "scored": _indices("scored", self.scored, K),
            "normalizer_pairs": pairs,
            "head_segment": head,
            "derived": _indices("derived", self.derived, K),
            "flip_index": flip_index,
            "flip_pairs": tuple((k, other) for k, other in enumerate(flip_index) if k < other),
            "joint_colors": tuple(_joint_color(name) for name in joints),
            "limb_colors": tuple(_limb_color(joints[a], joints[b]) for a, b in limbs),
        }.items():
            object.__setattr__(self, name, value)

    def __reduce__(self):
        # Built-in skeletons are compared by identity, so another process gets its own SKELETONS entry.
        if SKELETONS.get(self.name) is self:
            return get_skeleton, (self.name,)
        return super().__reduce__()

    def to_config(self) -> str | dict[str, Any]:
        """JSON-serializable form for :func:`get_skeleton`.

        Returns:
            The name of a built-in skeleton, otherwise a dict of the constructor's arguments.
        """
        if SKELETONS.get(self.name) is self:
            return self.name
        return {item.name: _as_json(getattr(self, item.name)) for item in dataclasses.fields(self) if item.init}

    @property
    def num_joints(self) -> int:
        """K."""
        return len(self.joints)

    def index(self, joint: str | int) -> int:
        """Index of a joint given by name or index; raises ValueError for an unknown joint."""
        if isinstance(joint, int):
            if not 0 <= joint < self.num_joints:
                raise ValueError(f"joint: expected 0 to {self.num_joints - 1} for {self.name}, got {joint}")
            return joint
        if joint not in self.joints:
            raise ValueError(f"joint: expected one of {', '.join(self.joints)} for {self.name}, got {joint!r}")
        return self.joints.index(joint)

    def normalizer_pair(self, pair: str | tuple[str | int, str | int]) -> tuple[int, int]:
        """Joint indices of ``pair``: a key of ``normalizer_pairs``, or two joints by name or index."""
        if isinstance(pair, str):
            if pair not in self.normalizer_pairs:
                known = ", ".join(map(repr, self.normalizer_pairs)) or "none"
                raise ValueError(f"pair: expected one of {known} for {self.name}, or two joints, got {pair!r}")
            return self.normalizer_pairs[pair]
        first, second = pair
        return self.index(first), self.index(second)


def _names(argument, value):
    names = () if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{argument}: expected a list of names, got {value!r}")
    return names


def _items(argument, value):
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{argument}: expected a mapping of names, got {value!r}")
    return value.items()


def _indices(argument, value, num_joints, count=None):
    """``value`` as a tuple of joint indices, of length ``count`` unless that is None."""
    try:
        indices = tuple(operator.index(k) for k in value)
    except TypeError:
        indices = None
    if indices is None or len(indices) != (count or len(indices)) or not all(0 <= k < num_joints for k in indices):
        expected = f"{count} joint indices" if count else "joint indices"
        raise ValueError(f"{argument}: expected {expected} from 0 to {num_joints - 1}, got {value!r}")
    return indices


def _as_json(value):
    if isinstance(value, Mapping):
        return {name: _as_json(item) for name, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value


def _flipped_name(name):
    side, _, rest = name.partition(" ")
    return f"{ {'left': 'right', 'right': 'left'}[side] } {rest}" if side in ("left", "right") else name


def _joint_color(name):
    side, _, part = name.partition(" ")
    if part in _PART and side in ("left", "right"):
        kind, level = _PART[part]
        return _LIMB_COLORS[side, kind][level]
    return _RED if name in ("neck", "upper neck", "thorax") else _GRAY if name == "pelvis" else _PURPLE


def _limb_color(a, b):
    parts = [name.partition(" ")[2] for name in (a, b)]
    side = a.partition(" ")[0]
    kinds = {_PART[part][0] for part in parts if part in _PART}
    if (
        len(kinds) == 1
        and side in ("left", "right")
        and all(part in _PART for part in parts)
        and side == b.partition(" ")[0]
    ):
        return _LIMB_COLORS[side, kinds.pop()][max(_PART[part][1] for part in parts)]
    if not kinds and "pelvis" not in (a, b):
        return _RED if "thorax" in (a, b) else _PURPLE
    if kinds == {"arm"} and {"neck", "upper neck", "thorax"} & {a, b}:
        return _RED
    return _GRAY


def _skeleton(name, joints, short_names, limbs, head, **options):
    joints = tuple(joints.split(", "))
    index = {joint: k for k, joint in enumerate(joints)}

    def indices(names):
        return tuple(index[joint] for joint in names)

    groups = {"head": indices(head)}
    for part in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle"):
        groups[part] = tuple(sorted(indices((f"left {part}", f"right {part}"))))
    unscored = set(options.pop("unscored", ()))
    options["derived"] = indices(options.get("derived", ()))
    if "head_segment" in options:
        options["head_segment"] = indices(options["head_segment"])
    return Skeleton(
        name=name,
        joints=joints,
        short_names=tuple(short_names.split()),
        limbs=tuple(indices(limb.split("-")) for limb in limbs.split(", ")),
        groups=groups,
        scored=tuple(k for k, joint in enumerate(joints) if joint not in unscored),
        # "paper" follows Eq. 21 of the AMIL publication, "lsp" the common LSP evaluation toolkit.
        normalizer_pairs={
            "paper": indices(("left hip", "right shoulder")),
            "lsp": indices(("left shoulder", "right hip")),
        },
        **options,
    )


_ARMS_AND_LEGS = (
    "right shoulder-right elbow, right elbow-right wrist, left shoulder-left elbow, left elbow-left wrist, "
    "right hip-right knee, right knee-right ankle, left hip-left knee, left knee-left ankle"
)
_TORSO = "right shoulder-right hip, left shoulder-left hip, right hip-left hip"

LSP14 = _skeleton(
    "lsp14",
    "right ankle, right knee, right hip, left hip, left knee, left ankle, right wrist, right elbow, right shoulder, "
    "left shoulder, left elbow, left wrist, neck, head top",
    "rank rkne rhip lhip lkne lank rwri relb rsho lsho lelb lwri neck head",
    f"{_TORSO}, right shoulder-neck, left shoulder-neck, neck-head top, {_ARMS_AND_LEGS}",
    head=("neck", "head top"),
    head_segment=("neck", "head top"),
)

MPII16 = _skeleton(
    "mpii16",
    "right ankle, right knee, right hip, left hip, left knee, left ankle, pelvis, thorax, upper neck, head top, "
    "right wrist, right elbow, right shoulder, left shoulder, left elbow, left wrist",
    "rank rkne rhip lhip lkne lank pelv thor neck head rwri relb rsho lsho lelb lwri",
    f"right hip-pelvis, left hip-pelvis, pelvis-thorax, right shoulder-thorax, left shoulder-thorax, "
    f"thorax-upper neck, upper neck-head top, {_ARMS_AND_LEGS}",
    head=("head top",),
    unscored=("pelvis", "thorax"),
    head_segment=("upper neck", "head top"),
    # Head size is 0.6 x the diagonal of the head box; upper neck and head top are derived from that box and lie
    # 0.8 x the diagonal apart.
    head_factor=0.75,
    derived=("upper neck", "head top"),
)

COCO17 = _skeleton(
    "coco17",
    "nose, left eye, right eye, left ear, right ear, left shoulder, right shoulder, left elbow, right elbow, "
    "left wrist, right wrist, left hip, right hip, left knee, right knee, left ankle, right ankle",
    "nose leye reye lear rear lsho rsho lelb relb lwri rwri lhip rhip lkne rkne lank rank",
    f"nose-left eye, nose-right eye, left eye-left ear, right eye-right ear, left shoulder-right shoulder, "
    f"{_TORSO}, {_ARMS_AND_LEGS}",
    head=("nose", "left eye", "right eye", "left ear", "right ear"),
)

SKELETONS: Mapping[str, Skeleton] = MappingProxyType({skeleton.name: skeleton for skeleton in (LSP14, MPII16, COCO17)})


def get_skeleton(skeleton: str | Mapping[str, Any] | Skeleton) -> Skeleton:
    """Skeleton of a name or a definition; a :class:`Skeleton` is returned unchanged.

    Args:
        skeleton: a key of :data:`SKELETONS`, a mapping as :meth:`Skeleton.to_config` returns, or a Skeleton.

    Raises:
        ValueError: unknown name, or a mapping that does not define a skeleton.
    """
    if isinstance(skeleton, Skeleton):
        return skeleton
    if isinstance(skeleton, Mapping):
        try:
            return Skeleton(**skeleton)
        except (TypeError, ValueError) as error:  # TypeError: missing or unknown arguments
            raise ValueError(f"skeleton: expected the definition of a skeleton: {error}") from None
    if not isinstance(skeleton, str) or skeleton not in SKELETONS:
        raise ValueError(f"skeleton: expected one of {', '.join(map(repr, SKELETONS))}, got {skeleton!r}")
    return SKELETONS[skeleton]
