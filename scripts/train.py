"""Train a diffusion model: `python scripts/train.py CONFIG [--run-dir DIR] [--resume] [--train.steps N ...]`.

One linear script, made to be read and forked. The same run directory again goes on where it stopped, also on another
number of devices or processes. Several processes find each other under Slurm, Open MPI, Kubernetes and on TPU pods;
elsewhere start each with --coordinator HOST:PORT --processes N --process-id I.
"""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # the imports take seconds; until `Signals` takes over, one ends the script with a line

    def leave_at_once(number, frame):
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if any(word.startswith("--requeue-on") for word in sys.argv):
        numbers += [signal.SIGUSR1, signal.SIGUSR2]
    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # which nohup ignores
            signal.signal(number, leave_at_once)

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import config as configs
from jdiff import parallel, runs
from jdiff.core import files
from jdiff.core.keys import joint, split
from jdiff.data import DataError, augment, flip, prefetch
from jdiff.denoisers.conditioning import drop_labels
from jdiff.losses.levels import LossAware
from jdiff.runs import lock, peers, plot, watch
from jdiff.runs.signals import Signals
from jdiff.train import checkpoint, make_train_loop, make_train_step, posthoc

USAGE = "usage: python scripts/train.py CONFIG [--run-dir DIR] [--resume] [--SETTING VALUE ...]; --help after CONFIG"
EDGES = np.linspace(-14.0, 14.0, 29)  # log-SNR, for the histogram of the loss


def main(argv: list[str]) -> int:
    with contextlib.ExitStack() as held:  # signals, the watch over other processes, the directory's lock
        return train(argv, held)


def train(argv: list[str], held: contextlib.ExitStack) -> int:
    # ---------------------------------------------------------------- the command line, the processes, the devices
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n{USAGE}: every setting with its default and meaning", file=None if argv else sys.stderr)
        return 0 if argv else 2
    path, argv = argv[0], argv[1:]
    options = {}
    for name in ("--run-dir", "--until", "--requeue-on", "--coordinator", "--processes", "--process-id", "--wait"):
        options[name], argv = take_option(argv, name)
    flags = {name: name in argv for name in ("--resume", "--profile")}
    argv = [word for word in argv if word not in flags]
    about = (
        "Also: --run-dir DIR (default runs/NAME), --resume (fail unless there is a run to go on with), --until STEP "
        "(stop there for now), --profile (a trace of the second visit, for TensorBoard or Perfetto), --requeue-on "
        "USR1 (or USR2: save and leave on this signal too), --coordinator HOST:PORT --processes N --process-id I, "
        "--wait SECONDS (for the other processes; default 300)."
    )
    config = configs.parse(configs.Config, argv, configs.load_config(path), f"scripts/train.py {path}", about)
    configs.limit_threads(config)
    last = min(whole_number(options, "--until", config.train.steps), config.train.steps)
    directory, settings = Path(options["--run-dir"] or f"runs/{config.name}"), config.train
    stop = held.enter_context(Signals(requeue_signals(options)))
    join_processes(options, directory, settings)
    first, count = jax.process_index() == 0, jax.process_count()
    say = watch.say if first else lambda *words, **keywords: None
    warn = functools.partial(say, "warning:", file=sys.stderr)
    stop.speaks = first
    if count > 1:
        host = (options["--coordinator"] or "").rpartition(":")[0]
        others = held.enter_context(peers.Watch(settings.peer_timeout, lambda: last_checkpoint(directory), host))
        stop.before_end.append(others.leave)
    devices = configs.devices(config)
    run = runs.build(directory, config)
    if flags["--resume"] and not checkpoint.steps(run.checkpoints):
        raise configs.ConfigError(f"nothing to resume in {directory}: no checkpoints; leave --resume out to start")
    held.enter_context(lock.held(directory, warn, stop.before_end))
    prepare_directory(run, first)

    # ---------------------------------------------------------------- the step
    data = run.dataset
    tx, decay = configs.build_optimizer(config)
    objective = run.objective

    def loss(params, key, x0, labels, levels=objective["levels"]):
        k_loss, k_drop, k_net, k_flip, k_augment = split(key, 5)
        options = dict(train=True, rngs={"dropout": joint(k_net)})
        if labels is not None:
            labels = drop_labels(k_drop, labels, settings.label_dropout, data.classes)
        if settings.flip and not settings.augment:  # which mirrors half of the images itself
            x0 = flip(k_flip, x0)
        if settings.augment:
            x0, options["augment"] = augment(k_augment, x0, settings.augment)
        if config.loss.name == "uncertain":
            options["return_logvar"] = True

        def apply(params, x, label, cond):
            return run.model.apply(params, x, label, cond, **options)

        return run.loss(apply, params, k_loss, x0, labels, **objective | dict(levels=levels))

    law = objective["levels"]
    if isinstance(law, LossAware):
        runs.rehearse(run, functools.partial(loss, levels=law.at(law.init())))
        loss = jdiff.losses.loss_aware(loss, law, run.schedule)
    else:
        runs.rehearse(run, loss)

    def take(arrays, j):
        x, labels = arrays
        return data.to_model(x[j]), None if labels is None else labels[j]

    def record(aux):
        numbers = {name: a for name, a in aux.items() if name != "extra" and a.ndim == 0}
        return dict(numbers, each=aux["each"], level=jdiff.log_snr(run.schedule, aux["t"]))

    step_function = make_train_step(
        loss, tx, decay, accumulate=settings.accumulate, project=getattr(run.model, "project_weights", None),
        skip_nonfinite=settings.skip_nonfinite > 0,
    )  # fmt: skip
    loop = make_train_loop(step_function, take, record)

    # ---------------------------------------------------------------- the state, new or restored
    state = runs.new_state(run)
    if len(devices) == 1:
        place = jax.device_put
        loop = jax.jit(loop, donate_argnums=0)
    else:
        mesh = parallel.mesh(devices, fsdp=settings.fsdp)
        shardings = parallel.fsdp(mesh, state) if settings.fsdp > 1 else parallel.replicated(mesh)
        state = parallel.place(state, shardings)
        loop = jax.jit(loop, donate_argnums=0, out_shardings=(shardings, parallel.replicated(mesh)))

        def place(batches):
            return parallel.shard_batch(mesh, batches, axis=1)

    position = None
    if checkpoint.steps(run.checkpoints):
        with checkpoint.told():
            state = checkpoint.restore(run.checkpoints, state)
        parallel.anywhere(False)  # all have read what one puts aside
        if first:
            checkpoint.set_aside(run.checkpoints, after=int(state.step))
        position = checkpoint.read_note(run.checkpoints, int(state.step)).get("data")
        say(f"resuming {directory} at step {int(state.step):,}")
    step = int(state.step)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(f"{config.name}: {size:,} parameters, {data.size:,} samples, steps {step:,} to {settings.steps:,}", end="")
    say(f", {len(devices)} devices" if len(devices) > 1 else "", f", {count} processes" if count > 1 else "", sep="")
    snr = runs.terminal_snr(run)
    if snr > runs.SNR_LIMIT:
        prior = "the data's moments (sample.match_prior)" if config.sample.match_prior else "N(0, sigma^2): wrong here"
        warn(
            f"terminal SNR {snr:.3g} is not small (above {runs.SNR_LIMIT:g}): x_1 still holds the data; "
            f"sampling starts from {prior}"
        )

    # ---------------------------------------------------------------- the loop
    key, part = jax.random.key(config.seed + 1), settings.batch // count
    rows = slice(jax.process_index() * part, (jax.process_index() + 1) * part)
    chunks = data.read(config.seed, settings.batch, visits(step, last, settings), rows, position)
    peak = watch.peak_flops(devices) / runs.step_flops(run) if watch.peak_flops(devices) else None
    log = watch.Log(directory, step, settings.steps, settings.batch if data.is_image else 0, peak, first)
    writer = checkpoint.Writer(run.checkpoints, settings.keep, settings.keep_every)
    skipped = leave = 0
    about = dict(config=configs.to_dict(config), samples=dict(size=data.size, shape=list(data.shape)))

    def on_device(chunk):
        return place(jax.tree.map(lambda a: padded(a, settings.visit), (chunk.x, chunk.labels))), chunk.state

    with contextlib.closing(log), writer, prefetch(chunks, on_device) as ready:
        for start_of_visit, visit in visits(step, last, settings):
            with profiled(directory / "profile", flags["--profile"] and log.visits == 1):
                waited = ready.waited
                arrays, position = next(ready)
                state, metrics = loop(state, key, arrays, np.arange(settings.visit), visit)
                metrics = {name: np.asarray(values)[:visit] for name, values in metrics.items()}
            stop.patient, stop.when = True, "before this was saved; earlier checkpoints are whole"
            step = start_of_visit + visit
            skipped = check_finite(metrics, start_of_visit, skipped, settings.skip_nonfinite, run, writer)
            means = {name: finite_mean(values) for name, values in metrics.items() if values.ndim == 1}
            log.visit(step, means, ready.waited - waited)
            log.histogram(step, "loss by log-SNR", EDGES, by_level(metrics["level"], metrics["each"]))
            leave = parallel.highest(stop.number)
            if leave or step % settings.save_every == 0 or step == last:
                writer.save(state, dict(about, data=position))
            if settings.posthoc and (step % settings.snapshot_every == 0 or step == settings.steps):
                averages = parallel.host({name: tree for name, tree in state.ema.items() if name != "main"})
                if first:
                    posthoc.store(directory / "snapshots", step, averages)
            if leave:
                break
            if settings.sample_every and step % settings.sample_every == 0 and step < settings.steps:
                log.picture(show(run, main_average(state), step, first), step)
    stop.patient, stop.when = False, f"after step {step:,}, which is saved; the last picture is missing"
    if leave := parallel.highest(stop.number):
        say(f"stopped by {signal.Signals(leave).name}: saved at step {step:,}; the same command goes on from there")
        return 128 + leave
    if step < settings.steps:
        say(f"stopped as asked: saved at step {step:,}")
        return 0

    # ---------------------------------------------------------------- the end
    picture = show(run, main_average(state), step, first, final=True)
    say(f"trained to step {step:,}; samples in {picture}")
    parallel.anywhere(False)  # the others wait for the picture, under the watch
    return 0


# -------------------------------------------------------------------- the command line and the directory


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """(value of `name VALUE` or `name=VALUE`, the other words)."""
    for i, word in enumerate(argv):
        if word.startswith(name + "="):
            return word[len(name) + 1 :], argv[:i] + argv[i + 1 :]
        if word == name:
            if i + 1 == len(argv):
                raise configs.ConfigError(f"{name} needs a value")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return None, argv


def whole_number(options: dict, name: str, default: int | None = None) -> int | None:
    text = options[name]
    if text is not None and not text.isdigit():
        raise configs.ConfigError(f"{name} is a whole number, got {text!r}")
    return default if text is None else int(text)


def requeue_signals(options: dict) -> list[str]:
    """The names of the signals, beside those that always do, that save and end the run."""
    name = options["--requeue-on"]
    if name is None:
        return []
    if name.removeprefix("SIG") not in ("USR1", "USR2"):
        raise configs.ConfigError(f"--requeue-on is USR1 or USR2, got {name!r}")
    return ["SIG" + name.removeprefix("SIG")]


def join_processes(options: dict, directory: Path, settings: configs.Train) -> None:
    """Come together with the other processes of the run, if there are any."""
    numbers = [whole_number(options, name) for name in ("--processes", "--process-id")]
    wait, place = whole_number(options, "--wait", 300), parallel.launched() if None in numbers else numbers[::-1]
    late = contextlib.nullcontext()
    if options["--coordinator"] or parallel.in_cluster():
        late = peers.awaited(directory, place, options["--coordinator"] or "the other processes", wait, watch.say)
    try:
        with late:  # JAX's own limits are longer: it aborts where we leave with a line
            parallel.initialize(options["--coordinator"], *numbers, wait + 60, settings.peer_timeout + 60)
    except (ValueError, RuntimeError) as error:
        raise configs.ConfigError(f"the processes did not come together: {error}") from error


def last_checkpoint(directory: Path) -> str:
    """Which it is, in words."""
    steps = checkpoint.steps(directory / "checkpoints")
    return f"the last checkpoint is {steps[-1]:,}" if steps else "there is no checkpoint yet"


def prepare_directory(run: runs.Run, first: bool) -> None:
    """Check that an old run directory is of the same run; write the config, and remove what a killed run has left."""
    path = run.directory / "config.json"
    free = ["train.save_every", "train.keep", "train.keep_every", "train.sample_every", "train.threads",
            "train.devices", "train.fsdp", "train.peer_timeout", "train.steps", "sample", "data.args.data_dir",
            "data.args.cache", "data.args.threads"]  # fmt: skip
    if run.config.train.lr_schedule.name in ("cosine", "linear"):
        free.remove("train.steps")  # where the rate is 0: another number is another run; see --until
    if path.is_file() and (change := configs.change(configs.from_json(path), run.config, ignore=free)):
        raise configs.ConfigError(f"{run.directory} holds another run: {change}; choose another --run-dir")
    with checkpoint.told():  # config.json can be lost or edited
        runs.check_noted(run, ignore=free)
    notes = (checkpoint.read_note(run.checkpoints, step) for step in reversed(checkpoint.steps(run.checkpoints)))
    check_same_data(run, next(filter(None, notes), {}))
    parallel.anywhere(False)  # all have read them
    if first:
        lock.sweep(run.directory)
        files.write(path, lambda file: file.write(configs.to_json(run.config).encode()))


def check_same_data(run: runs.Run, note: dict) -> None:
    """ConfigError where a checkpoint was trained on another number or shape of samples: its batches were others."""
    old, new = note.get("samples"), dict(size=run.dataset.size, shape=list(run.dataset.shape))
    if old is not None and old != new:  # those of earlier versions do not say
        raise configs.ConfigError(
            f"{run.directory} was trained on other data: its samples had {old}, and these have {new}; bring the data "
            "back, or choose another --run-dir"
        )


# -------------------------------------------------------------------- the loop's small parts


def visits(step: int, last: int, settings: configs.Train) -> Iterator[tuple[int, int]]:
    """(first step, number of steps) of each visit from `step` to `last`: none runs past something that is due."""
    events = [every for every in (settings.save_every, settings.sample_every) if every]
    events += [settings.snapshot_every] if settings.posthoc else []
    while step < last:
        count = min(settings.visit, last - step, *((step // every + 1) * every - step for every in events))
        yield step, count
        step += count


def padded(a, length: int):
    """`a` with rows of zeros up to `length`: whole visits and remainders are one program."""
    return a if len(a) == length else np.concatenate([a, np.zeros((length - len(a), *a.shape[1:]), a.dtype)])


def finite_mean(values) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def check_finite(metrics, start: int, skipped: int, limit: int, run: runs.Run, writer) -> int:
    """How many steps up to now were left out in one go; ConfigError where that is more than the limit."""
    bad = ~np.isfinite(metrics["loss"]) | ~np.isfinite(metrics["grad_norm"])
    for i, is_bad in enumerate(bad):
        skipped = skipped + 1 if is_bad else 0
        if skipped > limit:
            writer.wait()
            kept = checkpoint.steps(run.checkpoints)
            where = f"the last good checkpoint is {kept[-1]:,}" if kept else "there is no checkpoint yet"
            times = f", {limit} steps before it left out" if limit else ""
            raise configs.ConfigError(
                f"the loss became {metrics['loss'][i]}, its gradient's norm {metrics['grad_norm'][i]}, at step "
                f"{start + i:,}{times}; {where}; try a lower train.lr"
            )
    return skipped


def by_level(level, each) -> np.ndarray:
    """The mean loss of the visit's samples in each interval of log-SNR, nan where there is none."""
    level = np.clip(level.ravel(), EDGES[0], EDGES[-1])
    total, number = (np.histogram(level, EDGES, weights=weights)[0] for weights in (each.ravel(), None))
    return np.where(number, total / np.maximum(number, 1), np.nan)


@contextlib.contextmanager
def profiled(directory: Path, wanted: bool):
    with jax.profiler.trace(str(directory)) if wanted else contextlib.nullcontext():
        yield


def main_average(state) -> dict:
    """The averaged parameters that are sampled, whole and on the host: all processes call this together."""
    return parallel.host(state.ema["main"] if "main" in state.ema else state.ema)


# -------------------------------------------------------------------- pictures


def show(run: runs.Run, params, step: int, first: bool, final: bool = False) -> Path:
    """Draw samples with fixed noise and write samples/STEP.png: a row per class, or the figure of a plane."""
    path = run.directory / "samples" / ("final.png" if final else f"{step:07d}.png")
    if not first:
        return path
    how, data = run.config.sample, run.dataset
    key = jax.random.key(run.config.seed + 2)
    if data.is_image:
        columns = max(1, how.num // max(data.classes, 1)) if data.classes else 10
        labels = np.repeat(np.arange(data.classes), columns) if data.classes else None
        num = len(labels) if data.classes else how.num
        x, _ = runs.draw(run, params, key, num, how, labels)
        plot.image_grid(path, data.to_data(x), columns, range(data.classes) if data.classes else None)
        return path
    x, _, states = runs.draw(run, params, key, how.num, how, batch=how.num, path=True)
    _, times = configs.build_sampler(how, run.schedule)
    picks = np.unique(np.linspace(0, len(times) - 1, 6).round().astype(int))
    x0 = data.to_model(data.held_x if len(data.held_x) else data.x)
    eps = jax.random.normal(key, x0.shape)
    marks = [float(times[i]) for i in reversed(picks[:-1])]
    forward = [(0.0, x0)] + [(t, jdiff.q_sample(run.schedule, x0, jnp.asarray(t), eps)) for t in marks]
    first = jdiff.prior(run.schedule, key, x.shape, times[0], **moments(run))
    backward = [(float(times[i]), first if i == 0 else states[i - 1]) for i in picks[:-1]] + [(0.0, x)]
    entries = watch.read_metrics(run.directory / "metrics.jsonl")
    entries = [e for e in entries if isinstance(e.get("loss"), float)]  # None where it was not finite
    plot.plane_figure(path, forward, backward, ([e["step"] for e in entries], [e["loss"] for e in entries]))
    return path


def moments(run: runs.Run) -> dict:
    mean, std = run.dataset.moments() if run.config.sample.match_prior else (0.0, 0.0)
    return dict(mean=mean, std=std)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (configs.ConfigError, checkpoint.CheckpointError, DataError, OSError, MemoryError) as error:
        configs.fail(error)
