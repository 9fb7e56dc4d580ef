"""Synthetic figures: articulated people rendered on the fly from a seed, for demos and tests without a download.

A figure has the joints of all skeletons. The limbs of its right side are blue, those of its left side orange, which
determines left and right in every pose. A horizontal flip therefore does not preserve the labels: networks trained on
these figures are evaluated without the flip test. Limbs occlude each other, objects occlude limbs, and the background
contains distractors of the limbs' shape and colors.
"""

import cv2
import numpy as np
import torch

from amil_fast.pose.codec import crop_matrix
from amil_fast.pose.data.augment import Augmentation, cut_out, warp_crop
from amil_fast.pose.data.dataset import ground_truth
from amil_fast.pose.skeletons import Skeleton, get_skeleton

_SIDES = (("right", -1.0), ("left", 1.0))
# Lengths and limb widths in units of the body height; widths at the upper, middle and lower end of a limb.
_LENGTH = {
    "upper arm": 0.17,
    "forearm": 0.155,
    "thigh": 0.235,
    "shin": 0.23,
    "trunk": 0.29,
    "neck": 0.055,
    "head": 0.14,
}
_WIDTH = {"arm": (0.042, 0.034, 0.025), "leg": (0.068, 0.048, 0.034)}
# BGR of sleeves and trousers, by side.
_CLOTH = {-1: (215.0, 120.0, 35.0), 1: (60.0, 165.0, 235.0)}
# The half of the unit circle with x <= 0.
_HALF_CIRCLE = np.stack([np.cos(np.linspace(0.5, 1.5, 9) * np.pi), np.sin(np.linspace(0.5, 1.5, 9) * np.pi)], -1)
_SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates


class SyntheticFigures(torch.utils.data.Dataset):
    """Map-style data set of ``length`` synthetic figures, rendered when they are read.

    Args:
        length: number of samples.
        size: side of the square crop in pixels.
        skeleton: a :class:`~amil_fast.pose.skeletons.Skeleton` or its name.
        seed: sample ``index`` depends on (seed, index) only.
        occlusion: probability that one or two objects are rendered in front of the figure.
        augmentation: an :class:`~amil_fast.pose.data.augment.Augmentation` applied to the rendered image, a function of
            (seed, epoch, index).

    Samples have the entries of :class:`~amil_fast.pose.data.dataset.PoseDataset`; ``visibility`` is 1 for an occluded
    joint, else 2. The source image has ``size`` x ``size`` pixels.
    """

    def __init__(
        self,
        length: int = 1000,
        size: int = 128,
        *,
        skeleton: str | Skeleton = "lsp14",
        seed: int = 0,
        occlusion: float = 0.25,
        augmentation: Augmentation | None = None,
    ):
        self.length, self.size, self.skeleton, self.seed = length, size, get_skeleton(skeleton), seed
        self.occlusion, self.augmentation = occlusion, augmentation

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -self.length <= index < self.length:
            raise IndexError(f"index: expected less than {self.length}, got {index}")
        index = int(index) % self.length
        image, joints, visibility, head_size = self.draw(index)
        geometry, color = ({}, None) if self.augmentation is None else self.augmentation.draw(self.seed, epoch, index)
        matrix = crop_matrix((0, 0, self.size, self.size), self.size, **geometry)
        truth = ground_truth(
            joints,
            visibility,
            matrix,
            self.size,
            skeleton=self.skeleton,
            flip=geometry.get("flip", False),
            head_size=head_size,
            index=index,
        )
        crop = warp_crop(image, matrix, self.size, color)
        if self.augmentation is not None:
            cut_out(crop, self.augmentation.draw_cutouts(self.seed, epoch, index))
        return {"image": torch.from_numpy(crop), **truth}

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Renders a figure.

        Returns:
            Image ``(size, size, 3)`` uint8 BGR, joints ``(K, 2)`` float64 in pixels, visibility ``(K,)`` uint8, and the
            head size in pixels.
        """
        rng = np.random.default_rng((self.seed, index))
        body, from_behind = _pose(rng)
        turn = np.deg2rad(rng.normal(0, 25) if rng.random() < 0.9 else rng.uniform(-180, 180))
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        points = {name: rotation @ place for name, place in body.items()}
        cloud = np.array(list(points.values()))
        low, high = cloud.min(0), cloud.max(0)
        # The figure covers 60 to 85 % of the image's side, at a random position inside the image.
        scale = self.size * rng.uniform(0.6, 0.85) / max((high - low).max(), 0.6)
        room = self.size - scale * (high - low)
        offset = room * rng.uniform(0.3, 0.7, 2) - scale * low
        points = {name: scale * place + offset for name, place in points.items()}

        canvas = _Canvas(self.size, rng)
        canvas.background()
        canvas.figure(points, scale, from_behind)
        if rng.random() < self.occlusion:
            canvas.objects(points, scale)
        joints = np.array([points[name] for name in self.skeleton.joints])
        hidden = canvas.hidden(self.skeleton.joints, points)
        if from_behind:
            hidden |= np.isin(self.skeleton.joints, ("nose", "left eye", "right eye"))
        return canvas.finish(), joints, np.where(hidden, 1, 2).astype(np.uint8), 0.75 * _LENGTH["head"] * scale


def _pose(rng):
    """Random pose: joint name -> ``(2,)`` in body heights from the pelvis; and True for a back view."""

    def along(angle):  # unit vector; 0 points down
        return np.array([np.sin(angle), np.cos(angle)])

    facing = 1.0 if rng.random() < 0.75 else -1.0  # in a front view the person's right side is on the image's left
    breadth = rng.uniform(0.35, 1.0)  # a side view narrows the shoulders
    lean = rng.normal(0, 0.22)
    trunk = _LENGTH["trunk"] * rng.uniform(0.85, 1.1)
    places = {"pelvis": np.zeros(2)}
    up = -along(lean)
    across = np.array([-up[1], up[0]]) * facing
    places["thorax"] = trunk * up
    nod = -along(lean + rng.normal(0, 0.2))
    places["neck"] = places["upper neck"] = places["thorax"] + _LENGTH["neck"] * nod
    places["head top"] = places["neck"] + _LENGTH["head"] * nod
    middle = places["neck"] + 0.42 * _LENGTH["head"] * nod
    level = np.array([-nod[1], nod[0]]) * facing
    turned = rng.uniform(-0.02, 0.02)
    places["nose"] = middle + turned * level
    for side, sign in _SIDES:
        places[f"{side} eye"] = middle + 0.02 * nod + (sign * 0.02 + turned) * level
        places[f"{side} ear"] = middle + 0.006 * nod + sign * 0.046 * level
        shoulder = places["thorax"] + sign * 0.105 * breadth * across
        hip = sign * 0.062 * max(breadth, 0.5) * across
        outward = sign * facing
        arm = lean + outward * abs(rng.normal(0.5, 0.9))
        forearm = arm + rng.normal(0.35, 0.8) * outward
        leg = 0.4 * lean + outward * rng.normal(0.14, 0.38)
        shin = leg - outward * abs(rng.normal(0, 0.45))
        if rng.random() < 0.15:  # a kick, or a jump
            leg += outward * rng.uniform(0.4, 1.3)
        shorten = rng.uniform(0.55, 1.0, 4)  # foreshortening of limbs that point toward the camera
        shorten[2:] = np.sqrt(shorten[2:])
        places[f"{side} shoulder"], places[f"{side} hip"] = shoulder, hip
        places[f"{side} elbow"] = shoulder + _LENGTH["upper arm"] * shorten[0] * along(arm)
        places[f"{side} wrist"] = places[f"{side} elbow"] + _LENGTH["forearm"] * shorten[1] * along(forearm)
        places[f"{side} knee"] = hip + _LENGTH["thigh"] * shorten[2] * along(leg)
        places[f"{side} ankle"] = places[f"{side} knee"] + _LENGTH["shin"] * shorten[3] * along(shin)
    return places, facing < 0


class _Canvas:
    """Image under construction, rendered at twice its size and averaged at the end."""

    def __init__(self, size, rng):
        self.size, self.rng = size, rng
        self.factor = 2
        self.image = np.zeros((size * 2, size * 2, 3), np.uint8)
        # Number of the body part or object rendered last at each pixel; it determines the joints' visibility.
        self.owner = np.zeros((size * 2, size * 2), np.uint8)
        self.parts = {}

    def background(self):
        rng, n = self.rng, self.size * 2
        corners = rng.integers(30, 225, (2, 2, 1)) + rng.normal(0, 16, (2, 2, 3))
        corners = np.clip(corners, 0, 255).astype(np.float32)
        self.image = cv2.resize(corners, (n, n), interpolation=cv2.INTER_LINEAR)
        coarse = rng.normal(0, 7, (n // 16 + 1, n // 16 + 1, 3)).astype(np.float32)
        self.image = np.clip(self.image + cv2.resize(coarse, (n, n), interpolation=cv2.INTER_CUBIC), 0, 255)
        self.image = self.image.astype(np.uint8)
        for _ in range(rng.integers(2, 7)):
            self._object(rng.uniform(0, n, 2), n * rng.uniform(0.03, 0.16))
        for _ in range(rng.integers(0, 3)):  # distractors that resemble limbs
            a = rng.uniform(0, n, 2)
            b = a + n * rng.uniform(0.08, 0.25) * _direction(rng)
            self._limb(
                a, b, n * rng.uniform(0.01, 0.025), n * rng.uniform(0.008, 0.02), self._cloth(rng.choice([-1, 1]))
            )

    def figure(self, points, scale, from_behind):
        rng = self.rng
        skin = np.array([[90, 130, 180], [130, 170, 225], [60, 85, 120], [150, 190, 240]])[rng.integers(4)]
        skin = np.clip(skin + rng.normal(0, 10, 3), 20, 245)
        shirt, unit = rng.integers(40, 220, 3).astype(float), scale * self.factor
        places = {name: place * self.factor + 0.5 for name, place in points.items()}
        order = [*_SIDES] if rng.random() < 0.5 else [*reversed(_SIDES)]
        cloth = {sign: self._cloth(sign) for _, sign in _SIDES}
        trousers = {sign: np.clip(self._cloth(sign) * 0.75, 0, 255) for _, sign in _SIDES}
        behind, before = order
        arm_behind = rng.random(2) < (0.5, 0.2)
        self._leg(behind, places, unit, trousers)
        self._leg(before, places, unit, trousers)
        for (side, sign), is_behind in zip(order, arm_behind, strict=True):
            if is_behind:
                self._arm((side, sign), places, unit, cloth, skin)
        self._trunk(places, unit, shirt)
        self._head(places, unit, skin, from_behind)
        for (side, sign), is_behind in zip(order, arm_behind, strict=True):
            if not is_behind:
                self._arm((side, sign), places, unit, cloth, skin)

    def objects(self, points, scale):
        """Renders one or two objects in front of the figure, near joints."""
        rng = self.rng
        names = [name for name in points if name.split()[-1] in ("elbow", "wrist", "knee", "ankle", "hip")]
        for _ in range(rng.integers(1, 3)):
            place = points[names[rng.integers(len(names))]] * self.factor + rng.normal(0, 0.03 * scale, 2)
            self._object(place, scale * self.factor * rng.uniform(0.04, 0.1), part="object")

    def hidden(self, names, points):
        """``(K,)`` bool: joints covered by something rendered later than the limbs that meet in them."""
        places = [np.clip(np.round(points[name] * self.factor).astype(int), 0, len(self.owner) - 1) for name in names]
        owners = [self.owner[y, x] for x, y in places]
        names_of = {number: part for part, number in self.parts.items()}
        return np.array([not _belongs(name, names_of.get(o, "")) for name, o in zip(names, owners, strict=True)])

    def finish(self):
        image = cv2.resize(self.image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        noise = self.rng.standard_normal(image.shape, np.float32) * np.float32(self.rng.uniform(1, 7))
        noise += image
        return np.clip(noise, 0, 255, out=noise).astype(np.uint8)

    def _cloth(self, sign):
        """BGR of the right (-1) or left (+1) side's clothes, with random variation."""
        base = np.asarray(_CLOTH[1 if sign > 0 else -1])
        return np.clip(base + self.rng.normal(0, 22, 3), 0, 255)

    def _leg(self, side_sign, places, unit, cloth):
        side, sign = side_sign
        hip, knee, ankle = (places[f"{side} {part}"] for part in ("hip", "knee", "ankle"))
        wide, middle, thin = (unit * width / 2 for width in _WIDTH["leg"])
        self._limb(hip, knee, wide, middle, cloth[sign], f"{side} leg")
        self._limb(knee, ankle, middle, thin, cloth[sign] * 0.85, f"{side} leg")
        foot = ankle + unit * 0.028 * np.array([1.0 if ankle[0] > hip[0] else -1.0, 0.25])
        self._limb(ankle, foot, thin, thin * 0.8, np.array([35, 35, 40]), f"{side} leg")

    def _arm(self, side_sign, places, unit, cloth, skin):
        side, sign = side_sign
        shoulder, elbow, wrist = (places[f"{side} {part}"] for part in ("shoulder", "elbow", "wrist"))
        wide, middle, thin = (unit * width / 2 for width in _WIDTH["arm"])
        self._limb(shoulder, elbow, wide, middle, cloth[sign], f"{side} arm")
        self._limb(elbow, wrist, middle, thin, cloth[sign] * 0.85, f"{side} arm")
        hand = wrist + (wrist - elbow) * 0.12
        self._limb(wrist, hand, thin, thin, skin, f"{side} arm")

    def _trunk(self, places, unit, shirt):
        corners = [places[name] for name in ("right shoulder", "left shoulder", "left hip", "right hip")]
        middle = np.mean(corners, 0)
        corners = [
            corner + (corner - middle) / (np.linalg.norm(corner - middle) + 1e-9) * 0.02 * unit for corner in corners
        ]
        self._polygon(np.array(corners), shirt, "trunk")
        self._limb(places["thorax"], places["pelvis"], 0.055 * unit, 0.05 * unit, shirt, "trunk")
        self._limb(places["thorax"], places["neck"], 0.022 * unit, 0.022 * unit, shirt * 0.8, "trunk")

    def _head(self, places, unit, skin, from_behind):
        neck, top = places["neck"], places["head top"]
        middle, axis = (neck + top) / 2, (top - neck) / 2
        angle = np.degrees(np.arctan2(axis[1], axis[0]))
        length = np.linalg.norm(axis)
        self._ellipse(middle, (length, length * 0.72), angle, skin, "head")
        hair = np.array([[20, 30, 45], [30, 60, 100], [70, 130, 190]])[self.rng.integers(3)]
        if from_behind:
            self._ellipse(middle + 0.15 * axis, (length * 0.85, length * 0.7), angle, hair, "head")
            return
        self._ellipse(middle + 0.5 * axis, (length * 0.5, length * 0.66), angle, hair, "head")
        for side, color in (("right", (150, 60, 20)), ("left", (20, 90, 200))):
            self._ellipse(places[f"{side} eye"], (0.008 * unit, 0.008 * unit), 0, np.array(color), "head")

    def _object(self, place, radius, part=""):
        rng = self.rng
        color = rng.integers(0, 255, 3)
        if rng.random() < 0.5:
            self._ellipse(place, radius * rng.uniform(0.5, 1.3, 2), rng.uniform(0, 180), color, part)
        else:
            a, b = _direction(rng) * radius, radius * rng.uniform(0.4, 1.2)
            normal = np.array([-a[1], a[0]]) / radius * b
            self._polygon(place + np.array([a + normal, a - normal, -a - normal, -a + normal]), color, part)

    def _limb(self, a, b, wide, thin, color, part=""):
        """Renders a limb: the convex hull of a circle at each end, with a brighter core."""
        along = b - a
        length = np.hypot(*along)
        x, y = along / length if length > 1e-6 else (1.0, 0.0)
        ends = _HALF_CIRCLE @ np.array([[x, y], [-y, x]])
        for shade, share in ((0.72, 1.0), (1.0, 0.7)):
            outline = np.concatenate([a + max(wide * share, 0.5) * ends, b - max(thin * share, 0.5) * ends])
            self._polygon(outline, np.clip(np.asarray(color) * shade, 0, 255), part if share == 1.0 else "")

    def _number(self, part):
        return self.parts.setdefault(part, len(self.parts) + 1)

    def _polygon(self, corners, color, part=""):
        """Renders a convex polygon."""
        points = np.round(corners * (1 << _SHIFT)).astype(np.int32)
        cv2.fillConvexPoly(self.image, points, _scalar(color), cv2.LINE_AA, _SHIFT)
        if part:
            cv2.fillConvexPoly(self.owner, points, self._number(part), cv2.LINE_8, _SHIFT)

    def _ellipse(self, middle, axes, angle, color, part=""):
        points = tuple(np.round(np.asarray(value) * (1 << _SHIFT)).astype(int).tolist() for value in (middle, axes))
        cv2.ellipse(self.image, *points, float(angle), 0, 360, _scalar(color), -1, cv2.LINE_AA, _SHIFT)
        if part:
            cv2.ellipse(self.owner, *points, float(angle), 0, 360, self._number(part), -1, cv2.LINE_8, _SHIFT)


def _belongs(joint, part):
    """True if ``part`` is a body part that contains the joint."""
    side, _, name = joint.partition(" ")
    own = {"shoulder": "arm", "elbow": "arm", "wrist": "arm", "hip": "leg", "knee": "leg", "ankle": "leg"}.get(name)
    if own is None:
        return part in ("trunk", "head")
    return part == f"{side} {own}" or (name in ("shoulder", "hip") and part == "trunk")


def _direction(rng):
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


def _scalar(color):
    return np.asarray(color, float).tolist()
