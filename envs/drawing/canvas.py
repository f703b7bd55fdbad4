"""A picture on which lines, discs and polygons are drawn in the coordinates of the world.

Pillow is imported when one is made.
"""

from typing import Any

import numpy as np

SIDE = 320  # pixels of the longer side of a drawing of ours
SMOOTH = 2  # a drawing is made this many times as large and then reduced
PALETTE = ["#4878a8", "#e08a3c", "#5a9e5a", "#c85a54", "#8a6fb0", "#8c6d5c", "#d48abf", "#7a7a7a", "#b0b045", "#4fb0bd"]
INK, GREY, PALE, GOAL = "#303030", "#909090", "#e4e4e4", "#3a9a4a"


class Canvas:
    """A white picture with the coordinates of the world: a rectangle from (left, bottom) to (right, top)."""

    def __init__(self, left: float, bottom: float, right: float, top: float):
        from PIL import Image, ImageDraw

        self._left, self._top = left, top
        self._scale = SIDE * SMOOTH / max(right - left, top - bottom)
        size = (round((right - left) * self._scale), round((top - bottom) * self._scale))
        self._image = Image.new("RGB", size, "white")
        self._pen = ImageDraw.Draw(self._image)

    def _pixels(self, points: Any) -> list[tuple[float, float]]:
        """Pixel coordinates of points [n, 2]; a state that is not finite, where an episode may end, gives a picture too."""
        points = np.clip(np.nan_to_num(np.asarray(points, np.float64)), -1e3, 1e3)
        return [((x - self._left) * self._scale, (self._top - y) * self._scale) for x, y in points]

    def circle(self, centre: Any, radius: float, colour: str | tuple[int, ...], *, outline: str | None = None) -> None:
        """Fill a disc, perhaps with an outline."""
        ((x, y),) = self._pixels([centre])
        self._pen.circle((x, y), radius * self._scale, fill=colour, outline=outline, width=SMOOTH * 2)

    def polygon(self, points: Any, colour: str) -> None:
        """Fill a polygon [n, 2]."""
        self._pen.polygon(self._pixels(points), fill=colour)

    def line(self, points: Any, width: float, colour: str) -> None:
        """Draw a line through points [n, 2] with round ends; `width` is one of the world, 0: one pixel."""
        pixels = self._pixels(points)
        self._pen.line(pixels, fill=colour, width=max(SMOOTH, round(width * self._scale)), joint="curve")
        if width:
            for point in (points[0], points[-1]):
                self.circle(point, width / 2, colour)

    def text(self, point: Any, words: str) -> None:
        """Write from an upper left corner."""
        ((x, y),) = self._pixels([point])
        self._pen.text((x, y), words, fill=INK, font_size=13 * SMOOTH)

    def pixels(self) -> np.ndarray:
        """Return the picture, uint8 [height, width, 3]."""
        return np.asarray(self._image.reduce(SMOOTH))
