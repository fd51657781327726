"""Figures as files: grids of images, a plane, a search. Files appear whole or not at all."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jdiff.core.extras import needs
from jdiff.core.files import write
from jdiff.metrics import RankHistogram, TarpCoverage
from jdiff.runs.search import Choices, Range

TILE, LARGEST = 64, 6000  # pixels: the least height of an image in a grid, the largest side of a picture
FONT = 14  # pixels
TALLEST = 4  # classes to images of each, up to which a class has a row of its own
POINTS = 3000  # drawn in a panel
INK, ACCENT, FAINT = "#22313f", "#2a6f97", "#9aa5b1"


def image_grid(
    path,
    images: np.ndarray,
    columns: int | None = None,
    labels: Sequence[object] | None = None,
    *,
    captions: Sequence[object] | None = None,
    places: np.ndarray | None = None,
    scale: int | None = None,
    gap: int = 2,
) -> int:
    """Write images in rows, enlarged without smoothing. A picture has at most `LARGEST` pixels a side.

    Args:
        path: where to, a .png.
        images: uint8 (N, H, W, C), C of 1 or 3.
        columns: images in a row; None for about as many as there are rows.
        labels: a text for each row, at its left, as long as it may be; None for none.
        captions: a text for each image, below it; None for none.
        places: row and column of each image, (N, 2); None for one after the other.
        scale: how many times they are enlarged; None enlarges small ones to at least `TILE` pixels, and less where the
            picture would be too large.
        gap: pixels between two images.

    Returns:
        How many of the images the picture holds: those that have a place within `LARGEST` pixels.

    Raises:
        ValueError: the images have another shape or dtype.
        MissingExtra: Pillow is not installed.
    """
    with needs("pictures need"):
        from PIL import Image, ImageDraw, ImageFont

    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"image_grid: images are {images.dtype}{images.shape}; expected uint8 (N, H, W, 1 or 3)")
    n, height, width, _ = images.shape
    font = ImageFont.load_default(size=FONT)
    texts = [shortened(caption, 20) for caption in captions or ()]
    text_w, text_h = max((math.ceil(font.getlength(text)) + 4 for text in texts), default=0), FONT + 6 if texts else 0
    if places is None:
        columns = min(columns or near_square(n), max(1, (LARGEST - gap) // (max(width, text_w) + gap)))
        places = np.stack(np.divmod(np.arange(n), columns), axis=-1)
    names = [shortened(label, 60) for label in labels or ()]
    margin = max((math.ceil(font.getlength(name)) + 14 for name in names), default=0)

    def cell(scale):
        return np.array([height * scale + text_h + gap, max(width * scale, text_w) + gap])

    def sides(scale, places):
        return (places.max(0) + 1) * cell(scale) + [gap, margin + gap]

    scale = scale or max(1, -(-TILE // height))
    while scale > 1 and sides(scale, places).max() > LARGEST:
        scale -= 1
    most = np.maximum((LARGEST - gap - np.array([0, margin])) // cell(scale), 1)  # rows and columns with a place
    shown = np.flatnonzero((places < most).all(1))
    high, wide = (int(side) for side in sides(scale, places[shown]))
    canvas = Image.new("RGB", (wide, high), "white")
    draw = ImageDraw.Draw(canvas)
    for i in shown:
        tile = np.broadcast_to(images[i], (height, width, 3)).repeat(scale, 0).repeat(scale, 1)
        top, left = (int(a) for a in places[i] * cell(scale) + [gap, margin + gap])
        middle = (cell(scale)[1] - gap) // 2
        canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), (left + int(middle) - width * scale // 2, top))
        if texts:
            draw.text((left + middle, top + height * scale + text_h // 2), texts[i], fill=INK, font=font, anchor="mm")
    for row, name in enumerate(names[: most[0]]):
        at = (margin - 8, gap + row * int(cell(scale)[0]) + height * scale // 2)
        draw.text(at, name, fill=INK, font=font, anchor="rm")
    write(path, lambda file: canvas.save(file, "PNG"))
    return len(shown)


def class_grid(path, images: np.ndarray, labels: np.ndarray, names: Sequence[object] | None = None) -> int:
    """Write images by their class: rows for each one, with its name at the left, or a caption below each image.

    Where a class has so few images that its rows would make a tall and narrow picture, there are captions.

    Args:
        path: where to, a .png.
        images: as for `image_grid`.
        labels: the class of each image, (N,) whole numbers.
        names: of all classes; None for their numbers.

    Returns:
        How many of the images the picture holds, as for `image_grid`.

    Raises:
        ValueError, MissingExtra: as for `image_grid`.
    """
    images = images[: (LARGEST // min(images.shape[1:3])) ** 2]  # no more than that have a place
    labels = np.asarray(labels)[: len(images)]
    texts = [str(label if names is None else names[label]) for label in labels]
    asked = list(dict.fromkeys(labels.tolist()))  # the classes in the order of their first image
    count: Counter[int] = Counter()
    rank = np.zeros(len(labels), int)  # of each image within its class
    for i, label in enumerate(labels.tolist()):
        rank[i], count[label] = count[label], count[label] + 1
    most = int(rank.max()) + 1
    if len(asked) > TALLEST * most or 1 < len(asked) == len(labels):
        return image_grid(path, images, captions=texts)
    columns = -(-most // max(1, int(math.sqrt(most / len(asked)))))  # about as many as rows of all classes together
    first, rows = {}, 0
    for label in asked:
        first[label], rows = rows, rows - (-count[label] // columns)
    block = np.array([first[label] for label in labels.tolist()])
    left = [""] * rows
    for text, row in zip(texts, block.tolist(), strict=True):
        left[row] = text
    return image_grid(path, images, labels=left, places=np.stack([block + rank // columns, rank % columns], axis=-1))


def near_square(n: int) -> int:
    """How many columns make n images about as wide as high; up to 8 images are one row."""
    return n if n <= 8 else math.ceil(math.sqrt(n))


def shortened(text: object, length: int) -> str:
    """A text in one line, of at most so many letters."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: length - 3] + "..."


def plane_figure(path, forward, backward, losses=None) -> None:
    """Write the figure of a plane: data at rising noise above, samples at falling noise below, the loss at the foot.

    Each panel has its own scale, which is written below it: at the scale of the noise the data would be a dot.

    Args:
        path: where to, a .png.
        forward: [(t, points (N, 2)), ...] of the upper row.
        backward: [(t, points (N, 2)), ...] of the lower row.
        losses: (steps (M,), values (M,)), or None.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    with needs("figures need"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    columns = max(len(forward), len(backward))
    panel = min(3.6, max(2.1, 7 / columns))  # inches
    high = 2 * panel + 0.4 + (0 if losses is None else 2)
    figure = Figure(figsize=(panel * columns, high), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 if losses is None else 3, columns)
    for row, (title, panels, color) in enumerate((("data", forward, INK), ("samples", backward, ACCENT))):
        for column, (t, points) in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            shown = np.asarray(points)[np.random.default_rng(0).permutation(len(points))[:POINTS]]  # they may be sorted
            axes.scatter(shown[:, 0], shown[:, 1], s=1.2, color=color, alpha=0.35, linewidths=0, rasterized=True)
            reach = 1.1 * float(np.quantile(np.abs(points), 0.999)) or 1.0
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", yticks=[])
            axes.set_xticks([-reach / 1.1, 0, reach / 1.1], [f"{-reach / 1.1:.2g}", "0", f"{reach / 1.1:.2g}"])
            axes.tick_params(labelsize=8, color="#d5dbe1", labelcolor=INK)
            axes.set_title(f"t = {t:.2f}" if t else "t = 0", fontsize=9, color=INK)
            for spine in axes.spines.values():
                spine.set_color("#d5dbe1")
            if column == 0:
                axes.set_ylabel(title, fontsize=10, color=INK)
    if losses is not None:
        steps, values = (np.asarray(a) for a in losses)
        axes = figure.add_subplot(grid[2, :])
        dot = "o" if len(values) < 3 else None  # a line of one point cannot be seen
        axes.plot(steps, values, color=FAINT, linewidth=0.6, marker=dot, markersize=4, label="mean of a visit")
        if len(values) > 4:
            window = max(2, len(values) // 15)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axes.plot(steps[window - 1 :], smooth, color=ACCENT, linewidth=1.6, label=f"mean of {window} visits")
            axes.legend(frameon=False, fontsize=8)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel("loss", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    write(path, lambda file: figure.savefig(file, format="png"))


def calibration_figure(path, ranks: RankHistogram, coverage: TarpCoverage | None = None, names=None) -> None:
    """Write the figure of a posterior's calibration: a rank histogram for each number of theta, and TARP's coverage.

    What a calibrated sampler shows lies within the shaded bands.

    Args:
        path: where to, a .png.
        ranks: of `metrics.rank_histogram`.
        coverage: of `metrics.tarp_coverage`, or None.
        names: of the numbers of theta; theta 1, theta 2, ... if None.

    Raises:
        ValueError: there are not as many names as histograms.
        MissingExtra: Matplotlib is not installed.
    """
    with needs("figures need"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    D, bins = ranks.counts.shape
    names = [f"theta {i + 1}" for i in range(D)] if names is None else list(names)
    if len(names) != D:
        raise ValueError(f"calibration_figure: {len(names)} names for {D} histograms")
    panels = D + (coverage is not None)
    figure = Figure(figsize=(2.7 * panels, 2.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panes = np.atleast_1d(figure.subplots(1, panels))
    for axes, name, counts in zip(panes, names, ranks.counts, strict=False):
        axes.axhspan(ranks.low, ranks.high, color=FAINT, alpha=0.35, linewidth=0)
        axes.bar((np.arange(bins) + 0.5) / bins, counts, width=0.9 / bins, color=ACCENT)
        axes.axhline(ranks.expected, color=INK, linewidth=0.8)
        axes.set_xlabel(f"rank of {name}", fontsize=9, color=INK)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.1 * max(counts.max(), ranks.high))
    panes[0].set_ylabel("simulations", fontsize=9, color=INK)
    if coverage is not None:
        axes = panes[-1]
        axes.fill_between(coverage.level, coverage.low, coverage.high, color=FAINT, alpha=0.35, linewidth=0)
        axes.plot(coverage.level, coverage.level, color=INK, linewidth=0.8)
        axes.plot(coverage.level, coverage.coverage, color=ACCENT, linewidth=1.6)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_xlabel("level", fontsize=9, color=INK)
        axes.set_ylabel("coverage", fontsize=9, color=INK)
    for axes in panes:
        axes.tick_params(labelsize=7, color="#d5dbe1", labelcolor=INK)
        axes.spines[["top", "right"]].set_visible(False)
    write(path, lambda file: figure.savefig(file, format="png"))


def search_figure(path, rows: list[dict], space: dict[str, Range | Choices], metric: str) -> None:
    """Write the figure of a search: the metric against each setting.

    Trials at random, those of the grid and the best one have their own marks; failed ones are at the upper edge.

    Args:
        path: where to, a .png.
        rows: of `search.results`; one of them at least has a metric.
        space: {setting: its values}.
        metric: the name of what was minimised.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    with needs("figures need"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    done = [row for row in rows if row[metric] is not None]
    failed = [row for row in rows if row["state"] == "fail" and row[next(iter(space))] is not None]
    sheet = Figure(figsize=(3.2 * len(space) + 0.6, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(sheet)
    axes = np.atleast_1d(sheet.subplots(1, len(space), sharey=True))
    for column, (name, values) in enumerate(space.items()):
        a, place = axes[column], (lambda v: v)
        if isinstance(values, Choices):
            place = values.words.index
            a.set_xticks(range(len(values.words)), values.words)
            a.set_xlim(-0.5, len(values.words) - 0.5)
        else:
            _mark_range(a, values)
        for phase, color in (("random", FAINT), ("grid", ACCENT)):
            some = [row for row in done if row["phase"] == phase]
            if some:
                x = [place(row[name]) for row in some]
                a.scatter(x, [row[metric] for row in some], s=26, color=color, label=phase, zorder=2)
        best = done[0]
        style = dict(facecolors="none", edgecolors=INK, linewidths=1.4, zorder=3)
        a.scatter([place(best[name])], [best[metric]], s=90, label="best", **style)
        if failed:
            x = [place(row[name]) for row in failed]
            to_top = a.get_xaxis_transform()
            a.scatter(x, [0.97] * len(x), s=26, marker="x", color="#b3402e", label="failed", transform=to_top)
        a.set_xlabel(name, fontsize=9, color=INK)
        a.tick_params(labelsize=8, color="#d5dbe1", labelcolor=INK)
        a.spines[["top", "right"]].set_visible(False)
        a.margins(y=0.12)
    axes[0].set_ylabel(metric, fontsize=9, color=INK)
    sheet.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    write(path, lambda file: sheet.savefig(file, format="png"))


def _mark_range(axes, values: Range) -> None:
    """Show the whole range on the axis, and at most five numbers below it."""
    margin = 0.05
    if not values.log:
        margin *= values.high - values.low
        axes.set_xlim(values.low - margin, values.high + margin)
        axes.locator_params(axis="x", nbins=5)
        return
    margin = (values.high / values.low) ** margin
    axes.set_xscale("log")
    axes.set_xlim(values.low / margin, values.high * margin)
    if values.high / values.low < 100:  # too few powers of ten: matplotlib's own labels run into each other
        ticks = sorted({float(f"{v:.3g}") for v in np.geomspace(values.low, values.high, 4)})
        axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
        axes.minorticks_off()
