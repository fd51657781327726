"""Sets that are decoded as they are read."""

import numpy as np
import pytest
from data_sources import BATCH, PIXELS, N, read, records

from jdiff.data import DataError, Records


def test_visits_may_jump():
    x = read(records(), [(0, 9)])[0]
    np.testing.assert_array_equal(read(records(), [(6, 2), (1, 3)])[0], x[[6, 7, 1, 2, 3]])


def test_records_do_not_decode_rows_of_other_processes():
    lengths = []

    def take(rows):
        lengths.append(len(rows))
        return PIXELS[rows], None

    data = Records("records", N, (4, 5, 3), take, lambda: (PIXELS[:0], None), threads=1)
    chunk = next(data.read(0, BATCH, [(0, 3)], slice(2, 4)))
    assert chunk.x.shape == (3, 2, 4, 5, 3) and chunk.labels is None and set(lengths) == {2}
    with pytest.raises(DataError, match="more than its cache"):
        _ = data.x
