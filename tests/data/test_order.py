"""The order of the data is a function of the step."""

import numpy as np
import pytest

from jdiff.data import batch_indices, hold_out
from jdiff.data.order import spread


def test_every_epoch_is_a_permutation_whatever_the_chunks():
    n, batch = 103, 8
    stream = batch_indices(n, batch, 0, 0, 103).ravel()  # 8 epochs exactly
    epochs = stream.reshape(8, n)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    assert not (epochs[0] == epochs[1]).all()
    cut = np.concatenate([batch_indices(n, batch, 0, start, count) for start, count in ((0, 5), (5, 60), (65, 38))])
    np.testing.assert_array_equal(cut.ravel(), stream)
    assert not (batch_indices(n, batch, 1, 0, 5).ravel() == stream[:40]).all()


def test_fewer_rows_than_a_batch():
    with pytest.raises(ValueError, match="a batch of 11 from 10 rows"):
        batch_indices(10, 11, 0, 0, 1)


def test_held_out_rows():
    train, held = hold_out(100, 0.2, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(100))
    assert len(held) == 20 and (np.diff(held) > 0).all() and not np.array_equal(held, hold_out(100, 0.2, 1)[1])
    assert len(hold_out(100, 0.0, 0)[1]) == 0
    with pytest.raises(ValueError, match="held_out is a share"):
        hold_out(10, 1.0, 0)


def test_rows_are_spread_evenly():
    np.testing.assert_array_equal(spread(3, 5), [0, 1, 2])
    rows = spread(1000, 11)
    assert rows[0] == 0 and rows[-1] == 999 and set(np.diff(rows)) <= {99, 100}
