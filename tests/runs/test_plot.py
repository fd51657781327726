"""Pictures of runs."""

import numpy as np
import pytest

from jdiff import metrics
from jdiff.runs import plot


def test_image_grid_holds_the_pixels(tmp_path):
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    plot.image_grid(tmp_path / "a" / "grid.png", images, columns=2, scale=3, gap=2)
    with Image.open(tmp_path / "a" / "grid.png") as picture:
        pixels = np.asarray(picture)
    for i, image in enumerate(images):
        y, x = 2 + i // 2 * 26, 2 + i % 2 * 26
        np.testing.assert_array_equal(pixels[y : y + 24, x : x + 24], image.repeat(3, 0).repeat(3, 1))


def test_pictures_that_cannot_be_written_leave_nothing(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="cannot write"):
        plot.image_grid(tmp_path / "file" / "x.png", np.zeros((1, 2, 2, 1), np.uint8), 1)
    with pytest.raises(RuntimeError):
        plot.write(tmp_path / "file", lambda handle: (_ for _ in ()).throw(RuntimeError()))
    assert (tmp_path / "file").read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="expected uint8"):
        plot.image_grid(tmp_path / "x.png", np.zeros((1, 2, 2, 1)), 1)


def tiles(path, rows, columns, side, gap=2, left=0, below=0):
    """The tiles of a picture as they are in it, by row and column."""
    from PIL import Image

    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    high, wide = side + below + gap, side + gap
    assert pixels.shape[0] == rows * high + gap
    return {
        (i, j): pixels[gap + i * high :, left + gap + j * wide :][:side, :side]
        for i in range(rows)
        for j in range(columns)
    }, pixels


@pytest.mark.parametrize("side,scale", [(8, 8), (28, 3), (32, 2), (64, 1), (100, 1)])
def test_a_tile_is_at_least_64_pixels_high(tmp_path, side, scale):
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    assert plot.image_grid(tmp_path / "x.png", images) == 3
    found, pixels = tiles(tmp_path / "x.png", 1, 3, side * scale)
    assert pixels.shape[1] == 3 * (side * scale + 2) + 2
    for i, image in enumerate(images):
        np.testing.assert_array_equal(found[0, i], image.repeat(scale, 0).repeat(scale, 1))


def test_each_class_has_its_rows_beside_its_name(tmp_path):
    """Image i is white to the degree i: the classes cycle, and 1 is asked for twice as often as 8."""
    labels = np.resize([1, 8, 1], 12)
    images = np.broadcast_to(np.arange(12, dtype=np.uint8)[:, None, None, None] * 20, (12, 64, 64, 1))
    names = {1: "automobile", 8: "ship"}
    assert plot.class_grid(tmp_path / "x.png", images, labels, names) == 12
    left = wide(tmp_path / "x.png") - (4 * 66 + 2)
    found, pixels = tiles(tmp_path / "x.png", 3, 4, 64, left=left)
    shown = {
        place: int(tile[0, 0, 0]) // 20 for place, tile in found.items() if tile.std() == 0 and tile[0, 0, 0] < 255
    }
    of_ones, of_eights = [0, 2, 3, 5, 6, 8, 9, 11], [1, 4, 7, 10]
    assert [shown[i, j] for i in (0, 1) for j in range(4)] == of_ones
    assert [shown[2, j] for j in range(4)] == of_eights
    written = (pixels[:, :left] < 128).any((1, 2)).nonzero()[0]  # at the first row of each class, and nowhere else
    assert {int(row) // 66 for row in written} == {0, 2}
    assert not (pixels[:, :4] < 255).any()  # the longest name has room


def wide(path):
    from PIL import Image

    with Image.open(path) as picture:
        return picture.width


def test_few_images_of_many_classes_have_captions(tmp_path):
    images = np.zeros((7, 8, 8, 1), np.uint8)
    plot.class_grid(tmp_path / "x.png", images, np.arange(7))
    found, pixels = tiles(tmp_path / "x.png", 1, 7, 64, below=plot.FONT + 6)
    assert pixels.shape[1] == 7 * 66 + 2 and all((tile == 0).all() for tile in found.values())
    below = pixels[66:-2]
    assert all((below[:, j * 66 + 2 : j * 66 + 66] < 128).any() for j in range(7))


def test_a_picture_has_a_largest_size(tmp_path):
    """What does not fit is left out at the end, and counted; small images are enlarged less."""
    images = np.zeros((3000, 256, 256, 1), np.uint8)
    assert plot.image_grid(tmp_path / "x.png", images) == 23 * 23 and wide(tmp_path / "x.png") <= plot.LARGEST
    images = np.zeros((3000, 8, 8, 1), np.uint8)
    assert plot.image_grid(tmp_path / "x.png", images) == 3000 and 3000 < wide(tmp_path / "x.png") <= plot.LARGEST


def test_columns_are_about_as_many_as_rows():
    assert [plot.near_square(n) for n in (1, 7, 8, 9, 100, 500)] == [1, 7, 8, 3, 10, 23]


def test_calibration_figure_has_a_pane_for_each_number(tmp_path):
    from PIL import Image

    ranks = np.random.default_rng(0).integers(0, 10, (200, 2))
    histogram = metrics.rank_histogram(ranks, 9)
    coverage = metrics.tarp_coverage(*(np.zeros(shape) for shape in ((4, 1), (4, 9, 1))))
    plot.calibration_figure(tmp_path / "two.png", histogram)
    plot.calibration_figure(tmp_path / "three.png", histogram, coverage, ["mass", "radius"])
    sizes = []
    for name in ("two", "three"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            sizes.append(picture.size)
    assert sizes[1][0] == pytest.approx(1.5 * sizes[0][0], abs=2) and sizes[0][1] == sizes[1][1]
    with pytest.raises(ValueError, match="1 names for 2 histograms"):
        plot.calibration_figure(tmp_path / "x.png", histogram, names=["mass"])
