"""Visits: how the steps of a run are divided, and what the host makes of what it sees."""

import chex
import numpy as np
import pytest

from jdiff.config import ConfigError, Train
from jdiff.runs.visits import EDGES, by_level, check_finite, means, padded, visits


@pytest.mark.parametrize("step,last", [(0, 100), (7, 100), (99, 100), (100, 100), (0, 1)])
@pytest.mark.parametrize("posthoc", [(), (0.05,)])
def test_visits_are_all_steps_once_and_end_at_what_is_due(step, last, posthoc):
    settings = Train(visit=9, save_every=20, sample_every=15, posthoc=posthoc, snapshot_every=7)
    found = list(visits(step, last, settings))
    assert [s for start, count in found for s in range(start, start + count)] == list(range(step, last))
    assert all(1 <= count <= 9 for _, count in found)
    due = {n for every in (20, 15, *([7] if posthoc else [])) for n in range(every, last + 1, every) if n > step}
    assert due <= {start + count for start, count in found}


def test_visits_without_pictures():
    assert list(visits(0, 10, Train(visit=100, save_every=4, sample_every=0))) == [(0, 4), (4, 4), (8, 2)]


def test_padding_keeps_the_rows_and_the_dtype():
    rows = np.arange(6, dtype=np.uint8).reshape(3, 2)
    assert padded(rows, 3) is rows
    longer = padded(rows, 5)
    chex.assert_shape(longer, (5, 2))
    assert longer.dtype == np.uint8 and not longer[3:].any()
    np.testing.assert_array_equal(longer[:3], rows)


def test_the_loss_by_level():
    """The mean in each interval; what lies beyond the ends counts at the ends; nan where there is none."""
    level = np.array([[-100.0, -13.5], [0.5, 100.0]])
    found = by_level(level, np.array([[1.0, 2.0], [4.0, 8.0]]))
    chex.assert_shape(found, (len(EDGES) - 1,))
    want = np.full(len(EDGES) - 1, np.nan)
    want[0], want[14], want[-1] = 1.5, 4.0, 8.0
    np.testing.assert_array_equal(found, want)


def test_means_leave_out_what_is_not_finite():
    found = means({"loss": np.array([1.0, np.nan, 3.0]), "none": np.array([np.inf]), "each": np.ones((3, 2))})
    assert found["loss"] == 2.0 and np.isnan(found["none"]) and set(found) == {"loss", "none"}


def metrics(*losses, grad_norm=None):
    return dict(loss=np.array(losses), grad_norm=np.ones(len(losses)) if grad_norm is None else np.array(grad_norm))


def test_steps_in_a_row_that_are_not_finite():
    """They are counted over the ends of visits; a good step in between begins anew."""
    nan, last = np.nan, lambda: "the last checkpoint is 6"
    assert check_finite(metrics(1.0, nan), 0, 0, 2, last) == 1
    assert check_finite(metrics(nan, 1.0, nan), 2, 1, 2, last) == 1
    assert check_finite(metrics(1.0, 1.0, grad_norm=[1.0, np.inf]), 0, 0, 1, last) == 1
    with pytest.raises(ConfigError, match="loss became nan, .* at step 1,002, 2 steps before it left out; the last"):
        check_finite(metrics(1.0, nan, nan), 1000, 2, 2, last) and check_finite(metrics(nan), 1002, 2, 2, last)
    with pytest.raises(ConfigError, match="its gradient's norm inf, at step 3; the last checkpoint is 6; try a lower"):
        check_finite(metrics(1.0, grad_norm=[np.inf]), 3, 0, 0, last)
