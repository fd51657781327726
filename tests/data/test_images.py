"""One image of any mode, orientation and size."""

import numpy as np
from data_sources import save, smooth
from PIL import Image

from jdiff.data.images import from_bytes, to_array


def test_modes():
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    colour, alpha = smooth(1)[0], np.tile(np.array([0, 255], np.uint8), (8, 4))
    of_grey, whitened = np.repeat(grey[..., None], 3, -1), np.where(alpha[..., None] > 0, colour, 255)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    palette = Image.fromarray(colour).quantize(256)
    images = {
        "L": (Image.fromarray(grey), of_grey),
        "1": (Image.fromarray(grey > 99), np.repeat((grey > 99)[..., None] * np.uint8(255), 3, -1)),
        "RGB": (Image.fromarray(colour), colour),
        "P": (palette, np.asarray(palette.convert("RGB"))),
        "RGBA": (Image.fromarray(np.dstack([colour, alpha])), whitened),
        "LA": (Image.fromarray(np.dstack([grey, alpha])), np.where(alpha > 0, grey, 255)[..., None].repeat(3, -1)),
        "I;16": (deep, of_grey),
    }
    for mode, (image, expected) in images.items():
        assert image.mode == mode
        np.testing.assert_array_equal(to_array(image), expected, err_msg=mode)
    np.testing.assert_array_equal(to_array(deep, channels=1), grey[..., None])


def test_pictures_are_set_upright(tmp_path):
    image = smooth(1, 8, 6)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    path = save(tmp_path / "turned.png", image, exif=exif)
    np.testing.assert_array_equal(from_bytes(path.read_bytes()), np.rot90(image, -1))


def test_the_central_square_is_resized_without_aliasing():
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, ::2] = 200  # finer than what is left can show: an even grey
    out = to_array(Image.fromarray(stripes), 16)
    assert out.shape == (16, 16, 3) and np.abs(out[:, 1:-1].astype(int) - 100).max() <= 2
    image = smooth(1, 10, 16)[0]
    np.testing.assert_array_equal(to_array(Image.fromarray(image), 10), image[:, 3:13])
    np.testing.assert_array_equal(to_array(Image.fromarray(image), 4, crop=4), image[3:7, 6:10])
