"""Reading: batch k is a function of k alone, whatever the source, the chunks, the shards and the restarts."""

import threading
import time

import numpy as np
import pytest

from jdiff.data import Batches, DataError, Dataset, Records, Stream, batch_indices, hold_out, prefetch

N, BATCH = 37, 8
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 4, 5, 3), np.uint8)
OF_PIXELS = np.arange(N, dtype=np.int32) % 3


def memory():
    return Dataset("memory", PIXELS, OF_PIXELS, PIXELS[:0], OF_PIXELS[:0], 3)


def records(in_memory=False, threads=2):
    def take(rows):
        return PIXELS[rows], OF_PIXELS[rows]

    return Records("records", N, (4, 5, 3), take, lambda: take(np.arange(3)), 3, in_memory, threads)


def stream(decode=None, repeat=True):
    import grain

    def make(seed):
        data = grain.MapDataset.source(range(N)).shuffle(seed=seed)
        data = (data.repeat() if repeat else data).to_iter_dataset()
        return data.map(lambda i: int(i)) if decode else data.map(lambda i: (PIXELS[i], OF_PIXELS[i]))

    return Stream("stream", make, (4, 5, 3), N, 3, decode)


def read(data, visits, rows=slice(None), state=None, seed=0):
    chunks = list(data.read(seed, BATCH, visits, rows, state))
    return np.concatenate([c.x for c in chunks]), np.concatenate([c.labels for c in chunks]), chunks[-1].state


SOURCES = {"memory": memory, "records": records, "cached records": lambda: records(True), "stream": stream}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_any_chunks_shards_and_restarts_give_the_same_batches(source):
    data = source()
    x, labels, state = read(data, [(0, 12)])
    assert x.shape == (12, BATCH, 4, 5, 3) and x.dtype == np.uint8 and labels.dtype == np.int32
    for visits in ([(0, 1), (1, 4), (5, 7)], [(k, 1) for k in range(12)]):
        for other, whole in zip(read(data, visits)[:2], (x, labels), strict=True):
            np.testing.assert_array_equal(other, whole)
    halves = [read(data, [(0, 5), (5, 7)], rows) for rows in (slice(0, 4), slice(4, 8))]
    np.testing.assert_array_equal(np.concatenate([half[0] for half in halves], 1), x)
    np.testing.assert_array_equal(np.concatenate([half[1] for half in halves], 1), labels)
    assert halves[0][2] == halves[1][2] == state
    _, _, middle = read(data, [(0, 3), (3, 2)])
    for position in {None, "state"} if source is stream else {None}:
        later = read(data, [(5, 7)], state=middle if position else None)
        np.testing.assert_array_equal(later[0], x[5:])
        np.testing.assert_array_equal(later[1], labels[5:])
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
        np.testing.assert_array_equal(x, PIXELS[index])
        np.testing.assert_array_equal(labels, OF_PIXELS[index])


def test_visits_may_jump():
    x = read(records(), [(0, 9)])[0]
    np.testing.assert_array_equal(read(records(), [(6, 2), (1, 3)])[0], x[[6, 7, 1, 2, 3]])


def test_records_do_not_decode_rows_of_other_processes():
    seen = []

    def take(rows):
        seen.append(len(rows))
        return PIXELS[rows], None

    data = Records("records", N, (4, 5, 3), take, lambda: (PIXELS[:0], None), threads=1)
    chunk = next(data.read(0, BATCH, [(0, 3)], slice(2, 4)))
    assert chunk.x.shape == (3, 2, 4, 5, 3) and chunk.labels is None and set(seen) == {2}
    with pytest.raises(DataError, match="more than its cache"):
        _ = data.x


def test_moments():
    numbers = PIXELS.astype(np.float64) / 127.5 - 1
    for data in (memory(), records(), records(True)):
        mean, std = data.moments()
        np.testing.assert_allclose(mean, numbers.mean(0), atol=1e-6)
        np.testing.assert_allclose(std, numbers.std(0), atol=1e-6)
    many = np.random.default_rng(1).integers(0, 256, (1000, 2, 2, 1), np.uint8)
    mean, std = Dataset("many", many, None, many[:0], None).moments()
    np.testing.assert_allclose(mean, (many / 127.5 - 1).mean(0), atol=1e-6)
    np.testing.assert_allclose(std, (many / 127.5 - 1).std(0), atol=1e-6)
    mean, _ = stream().moments()
    assert mean.shape == (4, 5, 3) and np.abs(mean - numbers.mean(0)).max() < 0.1  # 4,096 draws of the 37, almost even


def test_held_out_rows():
    train, held = hold_out(100, 0.2, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(100))
    assert len(held) == 20 and (np.diff(held) > 0).all() and not np.array_equal(held, hold_out(100, 0.2, 1)[1])
    assert len(hold_out(100, 0.0, 0)[1]) == 0
    with pytest.raises(ValueError, match="held_out is a share"):
        hold_out(10, 1.0, 0)


@pytest.mark.parametrize("source", [memory, records], ids=["memory", "records"])
def test_fewer_samples_than_a_batch(source):
    with pytest.raises(ValueError, match="a batch of 38 from 37 rows"):
        next(source().read(0, 38, [(0, 1)]))


def test_rows_are_of_the_batch():
    with pytest.raises(ValueError, match="rows is the slice"):
        next(memory().read(0, BATCH, [(0, 1)], slice(8, 16)))


# ---------------------------------------------------------------- streams


def test_a_state_is_that_of_the_last_consumed_batch_however_far_reading_ran():
    """JSON in between, as in a checkpoint; with a prefetch three chunks ahead."""
    import json

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
    seen = []

    def decode(i):
        seen.append(i)
        return PIXELS[i], OF_PIXELS[i]

    whole, _, _ = read(stream(), [(0, 3)])
    np.testing.assert_array_equal(read(stream(decode), [(0, 3)], slice(2, 4))[0], whole[:, 2:4])
    assert len(seen) == 6


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


# ---------------------------------------------------------------- prefetch


def test_prefetch_hands_on_everything_in_order():
    with prefetch(iter(range(20)), place=lambda i: i * i, ahead=3) as squares:
        assert list(squares) == [i * i for i in range(20)]
        assert list(squares) == []


def test_prefetch_works_while_its_consumer_does():
    """The next chunk is made during the consumer's work; no more than `ahead` are made before they are wanted."""
    made, event = [], threading.Event()

    def source():
        for i in range(10):
            made.append(i)
            if i == 2:
                event.set()
            yield i

    with prefetch(source(), ahead=2) as chunks:
        assert next(chunks) == 0
        assert event.wait(5)
        time.sleep(0.05)
        assert made == [0, 1, 2] and 0 <= chunks.waited < 5


def test_waiting_is_counted():
    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield i

    with prefetch(slow()) as chunks:
        list(chunks)
        assert chunks.waited > 0.1


@pytest.mark.parametrize("where", ["source", "place"])
def test_errors_reach_the_consumer_in_their_turn(where):
    def source():
        yield 1
        yield 2
        raise DataError("broken")

    def place(i):
        if where == "place" and i == 2:
            raise DataError("broken")
        return i

    with prefetch(source(), place) as chunks:
        good = [next(chunks)] + ([next(chunks)] if where == "source" else [])
        assert good == [1, 2][: len(good)]
        with pytest.raises(DataError, match="broken"):
            next(chunks)
        with pytest.raises(StopIteration):
            next(chunks)


def test_closing_early_closes_the_source_and_ends_the_thread():
    closed, before = [], threading.active_count()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    for leave in ("close", "forget"):
        chunks = prefetch(source(), ahead=2)
        next(chunks)
        if leave == "close":
            chunks.close()
        del chunks
        for _ in range(100):
            if threading.active_count() == before:
                break
            time.sleep(0.02)
        assert threading.active_count() == before and closed.pop()
    with pytest.raises(ValueError, match="at least 1"):
        prefetch([], ahead=0)


def test_batches_are_a_pytree():
    import jax

    chunk = jax.device_put(Batches(PIXELS[None], None))
    assert isinstance(chunk.x, jax.Array) and chunk.labels is None and chunk.state is None
