"""A labelled set for a network that knows no classes: the same samples, no labels."""

import chex
import pytest
from data_sources import OF_PIXELS, PIXELS, SOURCES, read, stream

from jdiff.data import without_labels


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_samples_stay_and_the_labels_go(source):
    labelled = source()
    plain = without_labels(labelled)
    assert (labelled.classes, plain.classes, plain.held_labels) == (3, 0, None)
    chunk = next(plain.read(0, 8, [(0, 3)]))
    assert chunk.labels is None
    chex.assert_trees_all_equal(chunk.x, read(labelled, [(0, 3)])[0], strict=True)
    chex.assert_trees_all_equal(plain.held_x, labelled.held_x, strict=True)


def test_a_stream_that_decodes():
    plain = without_labels(stream(lambda i: (PIXELS[i], OF_PIXELS[i])))
    chunk = next(plain.read(0, 8, [(0, 3)]))
    assert chunk.labels is None
    chex.assert_trees_all_equal(chunk.x, read(stream(), [(0, 3)])[0], strict=True)
