"""Sets that can only be read forwards."""

import json
import time

import numpy as np
import pytest
from data_sources import BATCH, OF_PIXELS, PIXELS, read, stream

from jdiff.data import DataError, prefetch


def test_a_state_is_that_of_the_last_consumed_batch_however_far_reading_ran():
    """JSON in between, as in a checkpoint; with a prefetch three chunks ahead."""
    data, visits = stream(), [(k, 2) for k in range(0, 20, 2)]
    whole = read(data, visits)[0]
    with prefetch(data.read(0, BATCH, visits), ahead=3) as chunks:
        for _ in range(4):
            state = next(chunks).state
        time.sleep(0.1)
    state = json.loads(json.dumps(state))
    assert state["batch"] == 8
    np.testing.assert_array_equal(read(data, [(8, 12)], state=state)[0], whole[8:])


def test_decoding_is_for_kept_rows_only():
    decoded = []

    def decode(i):
        decoded.append(i)
        return PIXELS[i], OF_PIXELS[i]

    whole, _, _ = read(stream(), [(0, 3)])
    np.testing.assert_array_equal(read(stream(decode), [(0, 3)], slice(2, 4))[0], whole[:, 2:4])
    assert len(decoded) == 6


def test_streams_that_cannot_go_on():
    with pytest.raises(DataError, match="the stream ended; make it endless"):
        read(stream(repeat=False), [(0, 5)])
    _, _, state = read(stream(), [(0, 5)])
    with pytest.raises(DataError, match="batch 3 was asked for, but its stream is at batch 5"):
        read(stream(), [(3, 1)], state=state)
    with pytest.raises(DataError, match=r"a sample is float64 \(4, 5, 3\); expected uint8"):
        read(stream(lambda i: (PIXELS[i] / 255, 0)), [(0, 1)])
    with pytest.raises(DataError, match="label None of a set of 3 classes"):
        read(stream(lambda i: (PIXELS[i], None)), [(0, 1)])
