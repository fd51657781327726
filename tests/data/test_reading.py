"""Reading: batch k is a function of k alone, whatever the source, the chunks, the shards and the restarts."""

import chex
import numpy as np
import pytest
from data_sources import BATCH, OF_PIXELS, PIXELS, SOURCES, N, memory, read, records, stream

from jdiff.data import batch_indices


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_any_chunks_shards_and_restarts_give_the_same_batches(source):
    data = source()
    x, labels, state = read(data, [(0, 12)])
    chex.assert_shape(x, (12, BATCH, 4, 5, 3))
    assert x.dtype == np.uint8 and labels.dtype == np.int32
    for visits in ([(0, 1), (1, 4), (5, 7)], [(k, 1) for k in range(12)]):
        chex.assert_trees_all_equal(read(data, visits)[:2], (x, labels), strict=True)
    halves = [read(data, [(0, 5), (5, 7)], rows) for rows in (slice(0, 4), slice(4, 8))]
    joined = [np.concatenate([half[i] for half in halves], 1) for i in (0, 1)]
    chex.assert_trees_all_equal(joined, [x, labels], strict=True)
    assert halves[0][2] == halves[1][2] == state
    _, _, middle = read(data, [(0, 3), (3, 2)])
    for position in {None, "state"} if source is stream else {None}:
        later = read(data, [(5, 7)], state=middle if position else None)
        chex.assert_trees_all_equal(later[:2], (x[5:], labels[5:]), strict=True)
    assert not (read(data, [(0, 1)], seed=1)[0] == x[:1]).all()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_epoch_shows_every_sample_with_its_label(source):
    x, labels, _ = read(source(), [(0, N)])  # 8 epochs
    row = {image.tobytes(): i for i, image in enumerate(PIXELS)}
    order = np.array([row[image.tobytes()] for image in x.reshape(-1, 4, 5, 3)])
    np.testing.assert_array_equal(np.sort(order.reshape(8, N), 1), np.tile(np.arange(N), (8, 1)))
    np.testing.assert_array_equal(labels.ravel(), OF_PIXELS[order])


def test_cached_and_decoded_sets_have_one_order():
    index = batch_indices(N, BATCH, 4, 7, 6)
    for source in (memory, records, lambda: records(True)):
        x, labels, _ = read(source(), [(7, 6)], seed=4)
        chex.assert_trees_all_equal((x, labels), (PIXELS[index], OF_PIXELS[index]), strict=True)


@pytest.mark.parametrize("source", [memory, records], ids=["memory", "records"])
def test_fewer_samples_than_a_batch(source):
    with pytest.raises(ValueError, match="a batch of 38 from 37 rows"):
        next(source().read(0, 38, [(0, 1)]))


def test_rows_are_of_the_batch():
    with pytest.raises(ValueError, match="rows is the slice"):
        next(memory().read(0, BATCH, [(0, 1)], slice(8, 16)))
