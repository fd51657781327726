"""Pictures: grids of images and the figure of a plane. Files appear whole or not at all."""

import numpy as np

from jdiff.core.files import write

POINTS = 3000  # drawn in a panel
INK, ACCENT, FAINT = "#22313f", "#2a6f97", "#9aa5b1"


def image_grid(path, images: np.ndarray, columns: int, labels=None, scale: int | None = None, gap: int = 2) -> None:
    """Write a PNG of uint8 images (N, H, W, C), C of 1 or 3, row by row, enlarged `scale` times without smoothing.

    `labels`: a text for each row, at its left. Small images are enlarged to about 32 pixels when `scale` is None.
    """
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

    Each panel has its own scale, written below it: the data would be a dot at the scale of the noise.
    `forward`, `backward`: lists of (t, points (N, 2)); `losses`: (steps (M,), values (M,)), or None.
    """
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
            axes.scatter(*shown.T, s=1.2, color=color, alpha=0.35, linewidths=0, rasterized=True)
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
