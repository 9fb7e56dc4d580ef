"""UCF YouTube Action (UCF11): videos by class and group."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from amil_fast.pose.data.inputs import is_video
from amil_fast.pose.data.video import VideoFrames
from amil_fast.utils.files import DataError


@dataclass(frozen=True)
class Clip:
    """A video of UCF11: file, class, and group (clips of a group share actor or background)."""

    path: Path
    label: str
    group: str

    def frames(self) -> VideoFrames:
        """The frames of the clip."""
        return VideoFrames(self.path)


def find_ucf11(root: str | os.PathLike, classes: Collection[str] | None = None) -> list[Clip]:
    """Lists the videos ``<root>/<class>/<group>/<clip>.mpg`` (or .avi) in a deterministic order.

    Args:
        root: the data set's folder. Folders without videos (the annotations) are ignored.
        classes: names of the classes to list; None lists all.

    Raises:
        DataError: no videos, or none of one of ``classes``.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    clips = [
        Clip(path, path.parts[-3], path.parts[-2])
        for path in sorted(root.glob("*/*/*"))
        if is_video(path) and (classes is None or path.parts[-3] in classes)
    ]
    for label in classes or ():
        if not any(clip.label == label for clip in clips):
            raise DataError(f"{root / label}: expected videos at {label}/<group>/<clip>.mpg, found none")
    if not clips:
        raise DataError(f"{root}: expected videos at <class>/<group>/<clip>.mpg, found none")
    return clips
