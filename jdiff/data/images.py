"""One image of any mode, orientation and size, as uint8 of one shape."""

import io

import numpy as np

from jdiff.core.extras import needs

PIXELS = 178_956_970  # of the largest image that is decoded; Pillow's own limit, unless a program has changed that


def to_array(image, size: int | None = None, channels: int = 3, crop: int | None = None) -> np.ndarray:
    """A Pillow image as uint8 (H, W, channels): upright, in colour (3) or grey (1), square of `size` unless None.

    The central square (of side `crop`, else the largest) is resized with Pillow's bicubic filter, which is
    antialiased, see Parmar et al. 2022 (2104.11222). Transparency is laid over white; 16-bit grey is scaled to 8.
    """
    with needs("jdiff.data needs"):
        from PIL import Image, ImageOps

    image = _eight_bit(ImageOps.exif_transpose(image))
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        width, height = image.size
        side = min(width, height) if crop is None else min(crop, width, height)
        left, top = (width - side) / 2, (height - side) / 2
        if (width, height, side) != (size, size, size):
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def _eight_bit(image):
    """The image without transparency, and with 8 bits a channel."""
    with needs("jdiff.data needs"):
        from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it
        return Image.fromarray(np.rint(np.asarray(image, np.float64).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def from_bytes(content: bytes, size: int | None = None, channels: int = 3, crop: int | None = None) -> np.ndarray:
    """The image in the bytes of a file, see `to_array`.

    Raises ValueError if they are damaged, no image, or one of more than `PIXELS`, which need not have many bytes.
    """
    with needs("jdiff.data needs"):
        from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            if (pixels := image.width * image.height) <= PIXELS:
                return to_array(image, size, channels, crop)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for damage
        kind = "no PNG, JPEG or WebP image" if isinstance(error, Image.UnidentifiedImageError) else f"damaged: {error}"
        kind = f"too large: {error}" if isinstance(error, Image.DecompressionBombError) else kind
        raise ValueError(kind) from error
    raise ValueError(f"too large: it has {pixels:,} pixels, expected at most {PIXELS:,}")
