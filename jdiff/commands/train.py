"""Train a diffusion model: `jdiff train CONFIG [--run-dir DIR] [--resume] [--train.steps N ...]`.

One linear script, made to be read and forked. The same run directory again goes on where it stopped, also on another
number of devices or processes. Several processes find each other under Slurm, Open MPI, Kubernetes and on TPU pods;
elsewhere start each with --coordinator HOST:PORT --processes N --process-id I.
"""

import contextlib
import dataclasses
import functools
import signal
import sys
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jdiff import config as configs
from jdiff import runs
from jdiff.data import prefetch
from jdiff.runs import boards, lock, peers, watch
from jdiff.runs.pictures import Painter
from jdiff.runs.progress import Progress
from jdiff.runs.signals import Signals
from jdiff.runs.visits import EDGES, by_level, check_finite, make_record, means, padded, profiled, visits
from jdiff.train import checkpoint, make_train_loop, make_train_step, parallel, posthoc

FINAL = Path("samples/final.png")  # in the run directory, the picture of the last step


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The options beside the settings of the config."""

    config: str
    """A config file, as configs/digits.py. --help after it lists every setting with its default and meaning."""
    run_dir: str | None = None
    """Where the run is kept; runs/NAME when left out. A run that is there goes on where it stopped."""
    resume: bool = False
    """Fail unless there is a run to go on with."""
    until: int | None = None
    """Stop at this step for now."""
    profile: bool = False
    """Write a trace of the second visit, for TensorBoard or Perfetto."""
    wandb: str | None = None
    """Show the run in this project of Weights & Biases too; needs the extra wandb."""
    requeue_on: Literal["USR1", "USR2", "SIGUSR1", "SIGUSR2"] | None = None
    """Save and leave on this signal too."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes do not find each other by themselves."""
    processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0."""
    wait: int = 300
    """Seconds to wait for the other processes."""


def main(argv: list[str]) -> int:
    """Train a run, or go on with one; return the exit status."""
    about = "Train a diffusion model. The options of the script come first, then every setting of the config."
    a, config = configs.parse_with_config(Arguments, argv, prog="jdiff train", description=about)
    check_numbers(a)
    if a.wandb is not None:
        boards.check_wandb()
    configs.limit_threads(config)
    settings, directory = config.train, Path(a.run_dir or f"runs/{config.name}")
    last = settings.steps if a.until is None else min(a.until, settings.steps)
    with contextlib.ExitStack() as held:
        # ------------------------------------------------------------ signals, processes, devices, the directory
        stop = held.enter_context(Signals(["SIG" + a.requeue_on.removeprefix("SIG")] if a.requeue_on else []))
        held.enter_context(joined(a, directory, settings, stop))
        first, count = jax.process_index() == 0, jax.process_count()
        say = watch.say if first else lambda *words, **keywords: None
        warn = functools.partial(say, "warning:", file=sys.stderr)
        progress = Progress(first)
        devices = configs.devices(config)
        run = runs.build(directory, config)
        if a.resume and not checkpoint.steps(run.checkpoints):
            raise configs.ConfigError(f"nothing to resume in {directory}: no checkpoints; leave --resume out to start")
        held.enter_context(lock.held(directory, warn, stop.before_end))
        done = finished(run)
        runs.prepare_directory(run)
        if done:
            say(f"trained to step {settings.steps:,} already; samples in {directory / FINAL}")
            return 0

        # ------------------------------------------------------------ the step, and many of them in one program
        with progress.stage("checking that data, network, loss and sampler fit"):
            runs.rehearse(run)
        step_function = make_train_step(
            runs.make_loss(run),
            configs.build_optimizer(config),
            configs.build_averages(config),
            accumulate=settings.accumulate,
            project=getattr(run.model, "project_weights", None),
            skip_nonfinite=settings.skip_nonfinite > 0,
        )
        loop = make_train_loop(step_function, runs.make_take(run), make_record(run.schedule))

        # ------------------------------------------------------------ the state, new or restored
        with progress.stage("compiling the initial parameters (1 of 3)"):
            state = jax.block_until_ready(runs.new_state(run))
        state, loop, place = placed(state, loop, devices, settings.fsdp)
        position = None  # of the data, where they can only be read forwards
        if checkpoint.steps(run.checkpoints):
            state, position = restored(run, state)
            say(f"resuming {directory} at step {int(state.step):,}")
        step = int(state.step)
        introduce(run, state, last, devices, say, warn)

        # ------------------------------------------------------------ the loop
        key, share = jax.random.key(config.seed + 1), settings.batch // count
        rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        chunks = run.dataset.read(config.seed, settings.batch, visits(step, last, settings), rows, position)
        flops = watch.peak_flops(devices)
        peak = flops / runs.step_flops(run) if flops else None
        images = settings.batch if run.facts.is_image else 0
        log = watch.Log(directory, step, last, images, peak, first, shown_on(a, run, step) if first else [])
        painter = Painter(run, progress, "compiling the sampler (3 of 3)")
        writer = checkpoint.Writer(run.checkpoints, settings.keep, settings.keep_every)
        note = dict(config=configs.to_dict(config), samples=runs.about_data(run))
        skipped = leave = 0

        def on_device(chunk):
            return place(jax.tree.map(lambda a: padded(a, settings.visit), (chunk.x, chunk.labels))), chunk.state

        def last_checkpoint():
            writer.wait()
            return runs.last_checkpoint(directory)

        with contextlib.closing(log):
            with writer, prefetch(chunks, on_device) as ready:
                for start, steps in visits(step, last, settings):
                    with profiled(directory / "profile", a.profile and log.visits == 1):
                        waited = ready.waited
                        arrays, position = next(ready)
                        if not log.visits:
                            with progress.stage("compiling the training step (2 of 3)"):
                                loop.lower(state, key, arrays, np.arange(settings.visit), steps).compile()
                            log.start()
                        state, metrics = loop(state, key, arrays, np.arange(settings.visit), steps)
                        metrics = {name: np.asarray(values)[:steps] for name, values in metrics.items()}
                    stop.patient, stop.when = True, "before this was saved; earlier checkpoints are whole"
                    step = start + steps
                    skipped = check_finite(metrics, start, skipped, settings.skip_nonfinite, last_checkpoint)
                    log.visit(step, means(metrics), ready.waited - waited)
                    log.histogram(step, "loss by log-SNR", EDGES, by_level(metrics["level"], metrics["each"]))
                    leave = parallel.highest(stop.number)
                    if leave or step % settings.save_every == 0 or step == last:
                        writer.save(state, dict(note, data=position))
                    if settings.posthoc and (step % settings.snapshot_every == 0 or step == settings.steps):
                        averages = parallel.host({name: tree for name, tree in state.ema.items() if name != "main"})
                        if first:
                            posthoc.store(directory / "snapshots", step, averages)
                    if leave:
                        break
                    if settings.sample_every and step % settings.sample_every == 0 and step < settings.steps:
                        average = runs.main_average(state)
                        log.picture(painter.picture(average, f"{step:07d}") if first else None, step)

            # ------------------------------------------------------------ the end
            log.rest()
            stop.patient, stop.when = False, f"after step {step:,}, which is saved; the last picture is missing"
            if leave := parallel.highest(stop.number):
                name = signal.Signals(leave).name
                say(f"stopped by {name}: saved at step {step:,}; the same command goes on from there")
                return 128 + leave
            if step < settings.steps:
                say(f"stopped as asked: saved at step {step:,}; jdiff sample {directory} draws samples of it")
                return 0
            average = runs.main_average(state)
            if first:
                final = painter.picture(average, FINAL.stem)
                log.picture(final, step)
                say(f"trained to step {step:,}; samples in {final}")
        parallel.anywhere(False)  # the others wait for the picture, under the watch
        return 0


def check_numbers(a: Arguments) -> None:
    """Raise ConfigError for a number below 0."""
    for name in ("until", "processes", "process_id", "wait"):
        number = getattr(a, name)
        if number is not None and number < 0:
            raise configs.ConfigError(f"--{name.replace('_', '-')} must be 0 or more, got {number}")


@contextlib.contextmanager
def joined(a: Arguments, directory: Path, settings: configs.Train, stop: Signals):
    """Come together with the other processes of the run, if there are any, and watch them in the block."""
    place = parallel.launched()
    if a.process_id is not None and a.processes is not None:
        place = a.process_id, a.processes
    late: contextlib.AbstractContextManager = contextlib.nullcontext()
    if a.coordinator or parallel.in_cluster():
        late = peers.awaited(directory, place, a.coordinator or "the other processes", a.wait, watch.say)
    try:
        with late:  # JAX's own limits are longer: it aborts where we leave with a line
            limits = a.wait + 60, settings.peer_timeout + 60
            parallel.initialize(a.coordinator, a.processes, a.process_id, *limits)
    except (ValueError, RuntimeError) as error:
        raise configs.ConfigError(f"the processes did not come together: {error}") from error
    stop.speaks = jax.process_index() == 0
    if jax.process_count() == 1:
        yield
        return
    host = (a.coordinator or "").rpartition(":")[0]
    with peers.Watch(settings.peer_timeout, lambda: runs.last_checkpoint(directory), host) as others:
        stop.before_end.append(others.leave)
        yield


def shown_on(a: Arguments, run: runs.Run, step: int) -> list[boards.Board]:
    """The boards that show the run, which goes on at a step."""
    shown: list[boards.Board] = [boards.TensorBoard(run.directory, step)]
    if a.wandb is not None:
        shown.append(boards.Wandb(run.directory, a.wandb, run.directory.name, configs.to_dict(run.config)))
    return shown


def finished(run: runs.Run) -> bool:
    """Whether a run of this very config has its last checkpoint, whole, and its last picture; all processes agree."""
    path, last = run.directory / "config.json", run.config.train.steps
    try:  # the last picture may be asked for in another way
        there = path.is_file() and (run.directory / FINAL).is_file() and configs.from_json(path) == run.config
    except configs.ConfigError:
        there = False
    if parallel.anywhere(not there or checkpoint.steps(run.checkpoints)[-1:] != [last]):
        return False
    shapes = jax.eval_shape(lambda: runs.new_state(run))
    try:
        checkpoint.restore(run.checkpoints, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), last)
    except checkpoint.CheckpointError:  # what is wrong shows when the run goes on
        there = False
    return not parallel.anywhere(not there)


def placed(state, loop, devices: list, fsdp: int):
    """(the state on the devices, the loop compiled for them, what places a stack of batches on them)."""
    if len(devices) == 1:
        return state, jax.jit(loop, donate_argnums=0), jax.device_put
    mesh = parallel.mesh(devices, fsdp=fsdp)
    shardings = parallel.fsdp(mesh, state) if fsdp > 1 else parallel.replicated(mesh)
    loop = jax.jit(loop, donate_argnums=0, out_shardings=(shardings, parallel.replicated(mesh)))
    return parallel.place(state, shardings), loop, functools.partial(parallel.shard_batch, mesh, axis=1)


def restored(run: runs.Run, state):
    """(the state of the newest good checkpoint, the position of its data). Newer, damaged ones are moved aside."""
    state = checkpoint.restore(run.checkpoints, state)
    parallel.anywhere(False)  # all have read what one puts aside
    if jax.process_index() == 0:
        checkpoint.set_aside(run.checkpoints, after=int(state.step))
    return state, checkpoint.read_note(run.checkpoints, int(state.step)).get("data")


def introduce(run: runs.Run, state, last: int, devices: list, say, warn) -> None:
    """Say what is trained, and warn where the process does not end in noise."""
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    steps = f"steps {int(state.step):,} to {last:,}"
    line = f"{run.config.name}: {size:,} parameters, {run.facts.size:,} samples, {steps}"
    line += f", {len(devices)} devices" if len(devices) > 1 else ""
    say(line + (f", {jax.process_count()} processes" if jax.process_count() > 1 else ""))
    snr, matched = runs.terminal_snr(run), run.config.sample.match_prior
    if snr > runs.SNR_LIMIT:
        prior = "the data's moments (sample.match_prior)" if matched else "N(0, sigma^2): wrong here"
        warn(
            f"terminal SNR {snr:.3g} is not small (above {runs.SNR_LIMIT:g}): x_1 still holds the data; "
            f"sampling starts from {prior}"
        )


if __name__ == "__main__":
    configs.run_script(main)
