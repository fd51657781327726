"""Images of any mode, orientation and size as uint8 arrays of one shape."""

import io

import numpy as np

from jdiff.core.extras import needs

FORMATS = ("PNG", "JPEG", "WEBP")
PIXELS = 178_956_970  # the largest image that is decoded; Pillow has the same limit, which any program may change


def to_array(image, size: int | None = None, channels: int = 3, crop: int | None = None) -> np.ndarray:
    """A Pillow image as an upright uint8 array (H, W, channels).

    Transparent images are laid over white, and 16-bit grey is scaled to 8 bits. The resizing filter is Pillow's bicubic
    one, which is antialiased.

    Args:
        image: the Pillow image.
        size: resize the central square to this side; None keeps the image as it is.
        channels: 3 for colour, 1 for grey.
        crop: the side of that square; None for the largest.

    Reference:
        On filters: Parmar et al. 2022, arXiv:2104.11222.
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


def check_whole(path) -> tuple[int, int]:
    """(height, width) of an image file; that it is whole is found out without decoding, if it can be.

    The checksums of a PNG are compared, a WebP must have the length that it says, and a JPEG its last mark. An image
    that is suspect after that is decoded.

    Raises:
        ValueError: it is damaged, no such image, or too large: see `from_bytes`.
        OSError: it cannot be opened.
    """
    with needs("jdiff.data needs"):
        from PIL import Image

    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                kind, (width, height) = image.format, image.size
                if kind == "PNG":
                    image.verify()
            whole = width * height <= PIXELS and (kind == "PNG" or _ends_well(file, kind))
        except MemoryError:
            raise
        except Exception:  # decoding says what is wrong
            whole = False
        if not whole:
            file.seek(0)
            from_bytes(file.read(), 1, 1)
    return height, width


def _ends_well(file, kind: str | None) -> bool:
    """Whether an open WebP has the length that it says, or a JPEG the mark of its end among its last bytes."""
    length = file.seek(0, io.SEEK_END)
    if kind == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= length
    file.seek(max(0, length - 1024))
    return b"\xff\xd9" in file.read()


def from_bytes(content: bytes, size: int | None = None, channels: int = 3, crop: int | None = None) -> np.ndarray:
    """The image in the bytes of a PNG, JPEG or WebP file; for the arguments see `to_array`.

    Raises:
        ValueError: the bytes are damaged, no such image, or an image of more than `PIXELS` pixels, which may have few
            bytes.
    """
    with needs("jdiff.data needs"):
        from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if (pixels := image.width * image.height) <= PIXELS:
                return to_array(image, size, channels, crop)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for damage
        kind = "no PNG, JPEG or WebP image" if isinstance(error, Image.UnidentifiedImageError) else f"damaged: {error}"
        kind = f"too large: {error}" if isinstance(error, Image.DecompressionBombError) else kind
        raise ValueError(kind) from error
    raise ValueError(f"too large: it has {pixels:,} pixels, expected at most {PIXELS:,}")
