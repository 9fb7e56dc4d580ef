"""Small synthetic pose data sets in the published layouts."""

import json

import cv2
import numpy as np
from scipy.io import savemat


def picture(path, width, height, seed=0):
    """Writes a smooth random image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3)).astype(np.uint8)
    cv2.imwrite(str(path), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _joints(rng, S, K, width, height):
    return rng.uniform((4, 4), (width - 4, height - 4), (S, K, 2))


def lsp(root, S=6, width=80, height=60):
    """Returns joints ``(S, 14, 2)`` and occluded ``(S, 14)``."""
    rng = np.random.default_rng(1)
    joints, hidden = _joints(rng, S, 14, width, height), rng.random((S, 14)) < 0.3
    for i in range(S):
        picture(root / f"images/im{i + 1:04d}.jpg", width, height, i)
    savemat(root / "joints.mat", {"joints": np.concatenate([joints.transpose(2, 1, 0), hidden.T[None] * 1.0])})
    return joints, hidden


def lspet(root, S=6, width=80, height=60):
    """Returns joints ``(S, 14, 2)`` and annotated ``(S, 14)``; the others are (0, -10), an arbitrary position."""
    rng = np.random.default_rng(2)
    joints, annotated = _joints(rng, S, 14, width, height), rng.random((S, 14)) < 0.8
    joints[~annotated] = (0, -10)
    for i in range(S):
        picture(root / f"images/im{i + 1:05d}.jpg", width, height, i)
    savemat(root / "joints.mat", {"joints": np.concatenate([joints.transpose(1, 2, 0), annotated.T[:, None] * 1.0], 1)})
    return joints, annotated


def mpii_rows(root, S=4, width=400, height=300, split="valid"):
    """HRNet's JSON file. Returns its rows; the wrists of the last person are not annotated."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(S):
        joints = np.round(_joints(rng, 1, 16, width, height)[0], 1)
        visible = np.ones(16, int)
        visible[[10, 15]] = i != S - 1
        name = f"{i // 2:09d}.jpg"  # two people to an image
        if i % 2 == 0:
            picture(root / "images" / name, width, height, i)
        rows.append(
            {
                "image": name,
                "center": [float(rng.integers(100, 300)), float(rng.integers(100, 200))],
                "scale": 1.0 + 0.25 * i,
                "joints": np.where(visible[:, None] > 0, joints, -1).tolist(),
                "joints_vis": visible.tolist(),
            }
        )
    (root / "annot").mkdir(parents=True, exist_ok=True)
    (root / f"annot/{split}.json").write_text(json.dumps(rows))
    return rows


def mpii_gt(path, rows):
    """``gt_valid.mat`` for ``rows``. Returns head boxes ``(S, 4)``."""
    rng = np.random.default_rng(4)
    S = len(rows)
    corners = rng.uniform(20, 80, (S, 2, 2)) + np.array([[0, 0], [40, 50]])
    joints = np.array([row["joints"] for row in rows])
    missing = 1 - np.array([row["joints_vis"] for row in rows])
    content = {
        "headboxes_src": corners.transpose(1, 2, 0),
        "pos_gt_src": joints.transpose(1, 2, 0),
        "jnt_missing": missing.T,
    }
    savemat(path, content)
    return corners.reshape(S, 4)


def _struct(**fields):
    result = np.empty((1, 1), dtype=[(name, object) for name in fields])
    for name, value in fields.items():
        result[name][0, 0] = value
    return result


def _structs(rows):
    """MATLAB array of structures from a list of dicts."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    result = np.empty((1, len(rows)), dtype=[(name, object) for name in names])
    for i, row in enumerate(rows):
        for name in names:
            result[name][0, i] = row.get(name, np.empty((0, 0)))
    return result


def mpii_mat(root, rows):
    """The official MATLAB file: the people of ``rows`` in training images, and one test image."""
    images = {}
    for row in rows:
        points = [
            {"x": x, "y": y, "id": k, "is_visible": "0" if k == 0 else "1"}
            for k, ((x, y), visible) in enumerate(zip(row["joints"], row["joints_vis"], strict=True))
            if visible
        ]
        rect = {
            "x1": 10.0,
            "y1": 20.0,
            "x2": 40.0,
            "y2": 60.0,
            "annopoints": _struct(point=_structs(points)),
            "scale": row["scale"],
            "objpos": _struct(x=row["center"][0], y=row["center"][1]),
        }
        images.setdefault(row["image"], []).append(rect)
    # A person in a crowd, without position and scale, and a test image with a person without points.
    next(iter(images.values())).append({"x1": 1.0})
    test = {"scale": 2.0, "objpos": _struct(x=50.0, y=40.0)}
    picture(root / "images/test.jpg", 120, 90)
    annolist = [{"image": _struct(name=name), "annorect": _structs(rects)} for name, rects in images.items()]
    annolist.append({"image": _struct(name="test.jpg"), "annorect": _structs([test])})
    training = np.array([[1] * len(images) + [0]])
    savemat(
        root / "mpii_human_pose_v1_u12_1.mat",
        {"RELEASE": _struct(annolist=_structs(annolist), img_train=training)},
    )


def coco(root, split="val2017"):
    """Two images, three people with joints, a crowd and a person without joints. Returns the content."""
    rng = np.random.default_rng(5)
    images = [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 39, "file_name": "000000000039.jpg"}]
    for image in images:
        picture(root / split / image["file_name"], 160, 120, image["id"])
    annotations = []
    for number, image_id in enumerate((7, 7, 39)):
        visibility = rng.integers(0, 3, 17)
        visibility[0] = 2
        points = np.column_stack([np.round(_joints(rng, 1, 17, 160, 120)[0]), visibility])
        points[visibility == 0] = 0
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": [20.0 + number, 10.0, 50.0, 80.0],
                "keypoints": points.reshape(-1).tolist(),
                "num_keypoints": int((visibility > 0).sum()),
            }
        )
    annotations.insert(1, {**annotations[0], "iscrowd": 1})
    annotations.insert(2, {**annotations[0], "keypoints": [0] * 51})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"annotations/person_keypoints_{split}.json").write_text(json.dumps(content))
    return content


def video(path, frames=12, width=96, height=64, rate=10):
    """Writes a video whose frames become brighter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".avi": "MJPG", ".mpg": "MPG1"}.get(path.suffix, "mp4v")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, (width, height))
    assert writer.isOpened(), f"OpenCV cannot write {path.suffix}"
    for number in range(frames):
        frame = np.full((height, width, 3), min(10 + 15 * number, 250), np.uint8)
        frame[: height // 2] //= 2
        writer.write(frame)
    writer.release()
    return path
