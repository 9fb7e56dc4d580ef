"""What a skeleton's joints are: names, mirror pairs, limbs, colors, and how it is scored.

This is the only place that knows one joint from another. Data sets, metrics and drawing take a :class:`Skeleton`; a new
joint set is one more entry of :data:`SKELETONS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# The paper's colors (Fig. 1 and 4), RGB: (upper limb, lower limb) of a side, the head and the neck.
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
        name: the key in :data:`SKELETONS`.
        joints: K names; left and right are the person's own.
        short_names: K names of at most five letters, for tables and axes (MPII's own where they exist).
        limbs: pairs of joint indices that are drawn as a line.
        groups: name of a joint group -> its joint indices; a group's score is the plain average over them.
        scored: joints that count in the mean over joints.
        normalizer_pairs: name -> pair of joints whose distance is the size of the person in PCK.
        head_segment: (neck end, top) of the head, or None.
        head_factor: head size of PCKh = ``head_factor`` x length of the head segment, where no head box is known.
        derived: joints that the annotators did not click on but computed, which may therefore lie outside the image.
        flip_pairs, flip_index: pairs ``(a, b)`` of joints that change places in a mirror image, and the same as a
            permutation of length K. Found from the names.
        joint_colors, limb_colors: RGB in 0..255.
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
        index = {name: k for k, name in enumerate(self.joints)}
        mirror = tuple(index.get(_mirrored_name(name), k) for k, name in enumerate(self.joints))
        pairs = tuple((k, other) for k, other in enumerate(mirror) if k < other)
        colors = tuple(_joint_color(name) for name in self.joints)
        limb_colors = tuple(_limb_color(self.joints[a], self.joints[b]) for a, b in self.limbs)
        for name, value in (
            ("flip_index", mirror),
            ("flip_pairs", pairs),
            ("joint_colors", colors),
            ("limb_colors", limb_colors),
        ):
            object.__setattr__(self, name, value)

    def __reduce__(self):
        # In another process (a worker of a loader) it is again the very object that SKELETONS has there.
        if SKELETONS.get(self.name) is self:
            return get_skeleton, (self.name,)
        return super().__reduce__()

    @property
    def num_joints(self):
        return len(self.joints)

    def index(self, joint):
        """Index of a joint given by name or index; ValueError names what there is."""
        if isinstance(joint, int):
            if not 0 <= joint < self.num_joints:
                raise ValueError(f"joint: expected 0 to {self.num_joints - 1} for {self.name}, got {joint}")
            return joint
        if joint not in self.joints:
            raise ValueError(f"joint: expected one of {', '.join(self.joints)} for {self.name}, got {joint!r}")
        return self.joints.index(joint)

    def normalizer_pair(self, pair):
        """``pair`` as two joint indices: a name of ``normalizer_pairs``, or two joints by name or index."""
        if isinstance(pair, str):
            if pair not in self.normalizer_pairs:
                known = ", ".join(map(repr, self.normalizer_pairs)) or "none"
                raise ValueError(f"pair: expected one of {known} for {self.name}, or two joints, got {pair!r}")
            return self.normalizer_pairs[pair]
        first, second = pair
        return self.index(first), self.index(second)


def _mirrored_name(name):
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
    if len(kinds) == 1 and all(part in _PART for part in parts) and a.split()[0] == b.split()[0]:
        return _LIMB_COLORS[side, kinds.pop()][max(_PART[part][1] for part in parts)]
    if not kinds and "pelvis" not in (a, b):
        return _RED if "thorax" in (a, b) else _PURPLE
    if kinds == {"arm"} and {"neck", "upper neck", "thorax"} & {a, b}:
        return _RED
    return _GRAY


def _skeleton(name, joints, short_names, limbs, head, scored=None, **options):
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
        # "paper" is Eq. 21 of AMIL, "lsp" what the usual LSP toolkit divides by.
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
    # Head size is 0.6 x the head box's diagonal; neck and head top are the box's mid-lines, 0.8 x that diagonal apart.
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

SKELETONS = MappingProxyType({skeleton.name: skeleton for skeleton in (LSP14, MPII16, COCO17)})


def get_skeleton(name):
    """The skeleton of that name, or ``name`` itself where it is a :class:`Skeleton`."""
    if isinstance(name, Skeleton):
        return name
    if name not in SKELETONS:
        raise ValueError(f"skeleton: expected one of {', '.join(map(repr, SKELETONS))}, got {name!r}")
    return SKELETONS[name]
