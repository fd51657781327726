"""Figures as files: grids of images, a plane, a search. Files appear whole or not at all."""

import numpy as np

from jdiff.core.extras import needs
from jdiff.core.files import write
from jdiff.runs.search import Choices, Range

POINTS = 3000  # drawn in a panel
INK, ACCENT, FAINT = "#22313f", "#2a6f97", "#9aa5b1"


def image_grid(path, images: np.ndarray, columns: int, labels=None, scale: int | None = None, gap: int = 2) -> None:
    """Write images in rows, enlarged without smoothing.

    Args:
        path: where to, a .png.
        images: uint8 (N, H, W, C), C of 1 or 3.
        columns: images in a row.
        labels: a text for each row, at its left; None for none.
        scale: how many times they are enlarged; None enlarges small ones to about 32 pixels.
        gap: pixels between two images.

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
    scale = scale or max(1, 32 // height)
    rows = -(-n // columns)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    margin = 0 if labels is None else 22
    canvas = Image.new("RGB", (margin + columns * cell_w + gap, rows * cell_h + gap), "white")
    for i, image in enumerate(images):
        tile = np.broadcast_to(image, (height, width, 3)).repeat(scale, 0).repeat(scale, 1)
        at = (margin + gap + i % columns * cell_w, gap + i // columns * cell_h)
        canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), at)
    if labels is not None:
        draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
        for row, text in enumerate(labels):
            at = (margin // 2 + 1, gap + row * cell_h + height * scale // 2)
            draw.text(at, str(text), fill=INK, font=font, anchor="mm")
    write(path, lambda file: canvas.save(file, "PNG"))


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
    figure = Figure(figsize=(2.1 * columns, 4.6 if losses is None else 6.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 if losses is None else 3, columns)
    for row, (title, panels, color) in enumerate((("data", forward, INK), ("samples", backward, ACCENT))):
        for column, (t, points) in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            shown = np.asarray(points)[np.random.default_rng(0).permutation(len(points))[:POINTS]]  # they may be sorted
            axes.scatter(shown[:, 0], shown[:, 1], s=1.2, color=color, alpha=0.35, linewidths=0, rasterized=True)
            reach = 1.1 * float(np.quantile(np.abs(points), 0.999))
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", yticks=[])
            axes.set_xticks([-reach / 1.1, 0, reach / 1.1], [f"{-reach / 1.1:.2g}", "0", f"{reach / 1.1:.2g}"])
            axes.tick_params(labelsize=7, color="#d5dbe1", labelcolor=FAINT)
            axes.set_title(f"t = {t:.2f}" if t else "t = 0", fontsize=9, color=INK)
            for spine in axes.spines.values():
                spine.set_color("#d5dbe1")
            if column == 0:
                axes.set_ylabel(title, fontsize=10, color=INK)
    if losses is not None:
        steps, values = (np.asarray(a) for a in losses)
        axes = figure.add_subplot(grid[2, :])
        axes.plot(steps, values, color=FAINT, linewidth=0.6, label="mean of a visit")
        if len(values) > 4:
            window = max(2, len(values) // 15)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axes.plot(steps[window - 1 :], smooth, color=ACCENT, linewidth=1.6, label=f"mean of {window} visits")
            axes.legend(frameon=False, fontsize=8)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel("loss", fontsize=9)
        axes.tick_params(labelsize=8)
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
