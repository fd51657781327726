"""Sets of TensorFlow Datasets written without TensorFlow (what is read back: test_from_tfds.py)."""

import pytest
from data_sources import smooth

from jdiff import data


def test_images_that_cannot_be_written(tmp_path):
    with pytest.raises(Exception, match=r"expected uint8 \(8, 8, 3\)"):
        data.write_tfds("bad", tmp_path, (8, 8, 3), 0, train=smooth(2, 7))
    with pytest.raises(Exception, match="label 3 is none of the classes 0 to 2"):
        data.write_tfds("bad", tmp_path, (8, 8, 3), 3, train=[(smooth(1)[0], 3)])
