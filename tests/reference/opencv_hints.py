"""Hints as OpenCV makes them, written to tests/data/opencv_hints.npz: needs `pip install opencv-python-headless`."""

from pathlib import Path

import cv2
import numpy as np

FILE = Path(__file__).parents[1] / "data" / "opencv_hints.npz"
# Neighbours (1 set, -1 not) by which sd-webui-controlnet's scripts/lvminthin.py thins lines, then ends.
CORNERS = ([[-1, -1, -1], [0, 1, 0], [1, 1, 1]], [[0, -1, -1], [1, 1, -1], [0, 1, 0]])
ENDS = ([[-1, -1, -1], [-1, 1, -1], [0, 0, -1]], [[-1, -1, -1], [-1, 1, -1], [-1, 0, 0]])


def photograph() -> np.ndarray:
    """Smooth colours, edges and dark lines, of integers alone so that every machine has the same."""
    y, x = np.indices((48, 64))
    rings = (y - 20) ** 2 + (x - 30) ** 2
    channels = [(rings // 3) % 512, (rings // 5 + 40 * (x > 40)) % 512, (4 * x + 3 * y * (y > 30)) % 512]
    colors = 255 - np.abs(np.stack(channels, -1) - 255) // 2
    colors[((x + 2 * y) % 24 < 2) & (x > 20)] = (10, 30, 20)
    return np.clip(colors, 0, 255).astype(np.uint8)


def thin(lines: np.ndarray, patterns: tuple) -> np.ndarray:
    for turn in range(4):
        for pattern in patterns:
            kernel = np.ascontiguousarray(np.rot90(np.array(pattern), turn)).astype(np.int32)
            lines = lines & ~cv2.morphologyEx(lines, cv2.MORPH_HITMISS, kernel)
    return lines


def made() -> dict[str, np.ndarray]:
    image = photograph()
    floats, edges = image.astype(np.float32), cv2.Canny(image, 100, 200)
    dark = (cv2.GaussianBlur(floats, (0, 0), 6.0) - floats).min(-1).clip(0, 255)
    strokes = (cv2.GaussianBlur(floats, (0, 0), 5.0) - cv2.GaussianBlur(floats, (0, 0), 0.5)).min(-1)
    thinned = edges
    for _ in range(32):
        thinned = thin(thinned, CORNERS)
    return {
        "canny": edges,
        "canny:300:600": cv2.Canny(image, 300, 600),
        "lineart": (dark / max(16.0, np.median(dark[dark > 8])) * 127).clip(0, 255).astype(np.uint8),
        "scribble": np.where(2 * np.ceil(strokes.clip(0, 255)) > 32, 255, 0).astype(np.uint8),
        "blur": cv2.GaussianBlur(image, (0, 0), 9.0),
        "palette:16": cv2.resize(cv2.resize(image, (4, 3), interpolation=cv2.INTER_CUBIC), (64, 48), None, 0, 0, 0),
        "nearest": cv2.resize(image, (50, 61), interpolation=cv2.INTER_NEAREST),
        "area": cv2.resize(image, (30, 21), interpolation=cv2.INTER_AREA),
        "cubic": cv2.resize(image, (81, 50), interpolation=cv2.INTER_CUBIC),
        "otsu": np.array(cv2.threshold(image[..., 0], 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0]),
        "thinned": thinned,
        "without_ends": thin(thinned, ENDS),
    }


if __name__ == "__main__":
    np.savez_compressed(FILE, photograph=photograph(), **made())
