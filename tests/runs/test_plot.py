"""Pictures of runs."""

import numpy as np
import pytest

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
