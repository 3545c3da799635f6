"""Drawings of a first layer's mask over the pixels it looks at.

A first-layer mask is bool [N, M]: N inputs (the pixels of an image [H, W] or [H, W, C] in row-major order), M units. A
stack of seeds is bool [S, N, M].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from tessera.reports.lottery_curves import pick
from tessera.reports.style import INK, MUTED, canvas

LETTERING: dict[str, Any] = {"fontsize": 9.5, "color": INK}


def pixel_use(mask_SNM: np.ndarray, image_shape: Sequence[int]) -> np.ndarray:
    """Surviving weights of each pixel, as a multiple of the average pixel's: float64 [H, W], mean 1.

    Counts are summed over seeds, units and colour channels. A layer with nothing left gives zeros.

    Raises:
      ValueError: the mask's inputs are not the image's pixels.
    """
    mask_SNM = np.asarray(mask_SNM, bool)
    if mask_SNM.ndim != 3 or len(image_shape) not in (2, 3) or mask_SNM.shape[1] != np.prod(image_shape):
        raise ValueError(
            f"a first-layer mask [seeds, pixels, units] is needed for images of shape {tuple(image_shape)}, "
            f"i.e. {int(np.prod(image_shape))} pixels in the middle; got shape {mask_SNM.shape}"
        )
    count_HWC = mask_SNM.sum((0, 2)).reshape(*image_shape[:2], -1).astype(float)
    count_HW = count_HWC.sum(-1)
    return count_HW / count_HW.mean() if count_HW.any() else count_HW


def show_image(ax: Axes, image_HW: np.ndarray, title: str, **how) -> AxesImage:
    """Draw an image without interpolation, ticks or frame."""
    shown = ax.imshow(image_HW, interpolation="nearest", **how)
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(title, **LETTERING, pad=5)
    return shown


def pixels_figure(
    masks: Mapping[int, np.ndarray],
    densities: Mapping[int, float],
    image_shape: Sequence[int],
    mean_image: np.ndarray | None = None,
    count: int = 5,
) -> Figure:
    """Which pixels the surviving first-layer weights look at, at `count` levels, on one colour scale.

    Args:
      masks: level -> bool [S, N, M], the first layer's mask of every seed.
      densities: level -> fraction of all weights remaining, for the titles.
      image_shape: (H, W) or (H, W, C).
      mean_image: mean of the training images, [H, W] or [H, W, C], drawn first for comparison.
      count: at most this many levels.
    """
    levels = pick(sorted(masks), count)
    uses = {level: pixel_use(masks[level], image_shape) for level in levels}
    extra = int(mean_image is not None)
    columns = len(levels) + extra
    figure, axes = canvas(columns, width=max(4.5, 1.9 * columns), height=2.35)
    if mean_image is not None:
        image_HW = np.asarray(mean_image, float).reshape(*image_shape[:2], -1).mean(-1)
        show_image(axes[0], image_HW, "mean image", cmap="gray")
    # Above the 99.5th percentile a few pixels would take the whole scale.
    top = max(1.5, float(np.quantile(np.concatenate([use.ravel() for use in uses.values()]), 0.995)))
    for ax, level in zip(axes[extra:], levels, strict=True):
        shown = show_image(ax, uses[level], f"{100 * densities[level]:.3g}%", cmap="cividis", vmin=0, vmax=top)
    bar = figure.colorbar(shown, ax=axes[extra:], shrink=0.85, aspect=14, pad=0.015)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("weights of a pixel\n(average pixel = 1)", fontsize=8.5, color=MUTED)
    bar.ax.tick_params(labelsize=8, colors=INK, length=2)
    return figure


def units_figure(
    masks: Mapping[int, np.ndarray],
    densities: Mapping[int, float],
    image_shape: Sequence[int],
    seed_index: int = 0,
    units: int = 10,
    count: int = 4,
) -> Figure:
    """The masks of single hidden units of one seed drawn as images: a row per level, a column per unit.

    The units shown are those with the most weights left at the sparsest level drawn. A filled pixel is a weight that
    survives (in any colour channel). Arguments as in `pixels_figure`.
    """
    levels = [level for level in pick(sorted(masks), count + 1) if level > 0] or sorted(masks)
    last_NM = np.asarray(masks[levels[-1]][seed_index], bool)
    busiest = np.argsort(-last_NM.sum(0), kind="stable")[:units]
    tiles: list[list[Any]] = [
        [np.asarray(masks[level][seed_index], bool)[:, unit].reshape(*image_shape[:2], -1).any(-1) for unit in busiest]
        for level in levels
    ]
    gap = 1 + image_shape[1] // 12
    figure, (ax,) = canvas(height=0.4 + 9.2 / len(busiest) * len(levels) * image_shape[0] / image_shape[1])
    # One image of all tiles: a drawing with an Axes for each takes seconds to lay out.
    show_image(ax, mosaic(tiles, gap), "", cmap=ListedColormap(["#e3e7eb", "#0b5c8e"]), vmin=0, vmax=1)
    for row, level in enumerate(levels):
        middle = row * (image_shape[0] + gap) + (image_shape[0] - 1) / 2
        ax.text(
            -1.0 - gap / 2, middle, f"{100 * densities[level]:.3g}%", **LETTERING, rotation=90, ha="right", va="center"
        )
    for column, unit in enumerate(busiest):
        middle = column * (image_shape[1] + gap) + (image_shape[1] - 1) / 2
        ax.text(middle, -1.0 - gap / 2, f"unit {unit}", **LETTERING, ha="center", va="bottom")
    return figure


def mosaic(tiles: Sequence[Sequence[np.ndarray]], gap: int) -> np.ndarray:
    """Rows of equally large images [h, w] as one float image, `gap` pixels of NaN (drawn as nothing) between them."""
    high, wide = tiles[0][0].shape
    image = np.full((len(tiles) * (high + gap) - gap, len(tiles[0]) * (wide + gap) - gap), np.nan)
    for row, line in enumerate(tiles):
        for column, tile in enumerate(line):
            top, left = row * (high + gap), column * (wide + gap)
            image[top : top + high, left : left + wide] = tile
    return image
