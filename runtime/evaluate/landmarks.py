"""Where a face is in each frame, by a model of landmarks where one is installed."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from magihuman.runtime.evaluate.clip_score import Array, Frames

# Of MediaPipe's 468 points: the inner lips, forehead and chin, and what no expression moves.
LIPS, HEIGHT = (13, 14), (10, 152)
STILL = (33, 133, 362, 263, 168, 6, 127, 356)  # corners of the eyes, bridge of the nose, temples
EYES = (0, 3)  # of `STILL`, the outer corners
LEAST_SEEN = 0.5  # share of frames with a face, for a figure
INSTALL = "install a mediapipe that carries FaceMesh: pip install 'mediapipe<=0.10.21'"
Points = npt.NDArray[np.float64]


class Landmarks(Protocol):
    """What finds a face's points. Any callable of this form will do."""

    def __call__(self, frames: Frames) -> Points:
        """MediaPipe's points of one face in each frame.

        frames: uint8 [T, H, W, 3]. Returns float64 [T, 468 or more, 2], x and y in pixels; NaN in
        frames without a face.
        """
        ...


class FaceMesh:
    """MediaPipe's FaceMesh, whose model comes with it. Raises `ImportError` where it is missing."""

    def __init__(self) -> None:
        self._module: Any = importlib.import_module("mediapipe.python.solutions.face_mesh")

    def __call__(self, frames: Frames) -> Points:
        """As of `Landmarks`."""
        height, width = frames.shape[1:3]
        points = np.full((len(frames), 468, 2), np.nan)
        with self._module.FaceMesh(max_num_faces=1) as mesh:
            for i, frame in enumerate(frames):
                faces = mesh.process(np.ascontiguousarray(frame)).multi_face_landmarks
                if faces:
                    found = faces[0].landmark[:468]
                    points[i] = [(point.x * width, point.y * height) for point in found]
        return points


def installed_landmarks() -> Landmarks | None:
    """The model of landmarks that is installed, if there is one."""
    try:
        return FaceMesh()
    except ImportError:
        return None


def opening(points: Points) -> Array | None:
    """[T]: distance of the lips as a share of the face's height; None where faces are too rare.

    Frames without a face have what lies between their neighbours.
    """
    lips, height = (_distance(points, *pair) for pair in (LIPS, HEIGHT))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = lips / height
    seen = np.isfinite(ratio)
    if seen.mean() < LEAST_SEEN:
        return None
    times = np.arange(len(ratio))
    filled: Array = np.interp(times, times[seen], ratio[seen])
    return filled


def geometry_drift(points: Points) -> float | None:
    """How far the shape of a face moves from its first quarter's, as a share of the distance
    between the eyes; None where faces are too rare.

    Of points that no expression moves, without place, size and turn in the picture: the largest of
    root mean square distances, between the mean shape of the first quarter's faces and those of
    the other three.
    """
    shapes = [
        None if (faces := part[np.isfinite(part).all((1, 2))]).size == 0 else _mean_shape(faces)
        for part in np.array_split(points[:, STILL], 4)
    ]
    if shapes[0] is None or np.isfinite(points).all((1, 2)).mean() < LEAST_SEEN:
        return None
    later = [shape for shape in shapes[1:] if shape is not None]
    return max((_rms(_aligned(shape, shapes[0]) - shapes[0]) for shape in later), default=0.0)


def _mean_shape(faces: Points) -> Points:
    """[points, 2]: the mean of faces, each laid on the first."""
    first = _normal(faces[0])
    mean: Points = np.mean([_aligned(_normal(face), first) for face in faces], axis=0)
    return _normal(mean)


def _normal(face: Points) -> Points:
    """A face around its middle, with 1 between the eyes."""
    eyes = np.linalg.norm(face[EYES[0]] - face[EYES[1]])
    shape: Points = (face - face.mean(0)) / max(float(eyes), 1e-9)
    return shape


def _aligned(face: Points, onto: Points) -> Points:
    """A face around its middle, turned so that it lies on another."""
    left, _, right = np.linalg.svd(face.T @ onto)
    turned: Points = face @ (left @ right)
    return turned


def _rms(away: Points) -> float:
    return float(np.sqrt(np.square(away).sum(-1).mean()))


def _distance(points: Points, a: int, b: int) -> Array:
    apart: Array = np.linalg.norm(points[:, a] - points[:, b], axis=-1)
    return apart
