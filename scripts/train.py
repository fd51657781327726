"""Train a diffusion model: `python scripts/train.py CONFIG [--run-dir DIR] [--resume] [--train.steps N ...]`.

One linear script, made to be read and forked. The same run directory again goes on where it stopped.
"""

import json
import signal
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jdiff
from jdiff import checkpoint, plot, runs
from jdiff import config as configs
from jdiff.arrays import split
from jdiff.conditioning import drop_labels
from jdiff.data import batch_indices
from jdiff.train import init_state, make_train_loop, make_train_step

USAGE = "usage: python scripts/train.py CONFIG [--run-dir DIR] [--resume] [--SETTING VALUE ...]; --help after CONFIG"


def main(argv: list[str]) -> int:
    # ---------------------------------------------------------------- the command line
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n{USAGE}: every setting with its default and meaning")
        return 0 if argv else 2
    path, argv = argv[0], argv[1:]
    directory, argv = take_option(argv, "--run-dir")
    resume = "--resume" in argv
    argv = [word for word in argv if word != "--resume"]
    about = "Also: --run-dir DIR (default runs/NAME), --resume (fail unless there is a run to go on with)."
    config = configs.parse(configs.Config, argv, configs.load_config(path), f"scripts/train.py {path}", about)
    configs.limit_threads(config)
    directory = Path(directory or f"runs/{config.name}")
    run = runs.build(directory, config)
    prepare_directory(run, resume)

    # ---------------------------------------------------------------- the step
    data, settings = run.dataset, config.train
    tx, decay = configs.build_optimizer(config)

    def loss(params, key, x0, labels):
        k_loss, k_drop, k_net = split(key, 3)
        if labels is not None:
            labels = drop_labels(k_drop, labels, settings.label_dropout, data.classes)

        def apply(params, x, label, cond):
            return run.model.apply(params, x, label, cond, train=True, rngs={"dropout": k_net})

        return jdiff.losses.denoising(apply, params, k_loss, x0, labels, **run.objective)

    def take(arrays, rows):
        x, labels = arrays
        return data.to_model(x[rows]), None if labels is None else labels[rows]

    loop = jax.jit(make_train_loop(make_train_step(loss, tx, decay), take), donate_argnums=0)
    key = jax.random.key(config.seed + 1)
    arrays = jax.device_put((data.x, data.labels))

    # ---------------------------------------------------------------- the state, new or restored
    state = init_state(run.init_params(), tx)
    if checkpoint.steps(run.checkpoints):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = checkpoint.restore(run.checkpoints, state)
        for warning in caught:
            if "damaged" in str(warning.message):
                print(f"warning: {warning.message}", file=sys.stderr)
        checkpoint.set_aside(run.checkpoints, after=int(state.step))
        print(f"resuming {directory} at step {int(state.step):,}")
    start = step = int(state.step)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{config.name}: {size:,} parameters, {len(data.x):,} samples, steps {step:,} to {settings.steps:,}")
    snr = runs.terminal_snr(run)
    if snr > runs.SNR_LIMIT:
        prior = "the data's moments (sample.match_prior)" if config.sample.match_prior else "N(0, sigma^2): wrong here"
        print(
            f"warning: terminal SNR {snr:.3g} is not small (above {runs.SNR_LIMIT:g}): x_1 still holds the data; "
            f"sampling starts from {prior}",
            file=sys.stderr,
        )

    # ---------------------------------------------------------------- the loop
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    log = Log(directory, step, settings.steps, settings.batch if data.is_image else 1)
    while step < settings.steps and not stop:
        events = [every for every in (settings.save_every, settings.sample_every) if every]
        count = min(settings.visit, settings.steps - step, *(next_multiple(step, every) - step for every in events))
        index = np.zeros((settings.visit, settings.batch), np.int32)
        index[:count] = batch_indices(len(data.x), settings.batch, config.seed, step, count)
        state, metrics = loop(state, key, arrays, index, count)
        losses = np.asarray(metrics["loss"])[:count]
        if not np.isfinite(losses).all():
            bad = step + int(np.argmin(np.isfinite(losses)))
            kept = checkpoint.steps(run.checkpoints)
            where = f"the last good checkpoint is {kept[-1]:,}" if kept else "there is no checkpoint yet"
            log.close()
            raise configs.ConfigError(
                f"the loss became {losses[bad - step]} at step {bad:,}; {where}; try a lower train.lr"
            )
        step += count
        log.visit(step, losses.mean(), float(np.mean(np.asarray(metrics["grad_norm"])[:count])))
        if step % settings.save_every == 0 and step < settings.steps:
            checkpoint.save(run.checkpoints, state, settings.keep)
        if settings.sample_every and step % settings.sample_every == 0 and step < settings.steps:
            log.picture(show(run, state.ema, step), step)
    if step > start:
        checkpoint.save(run.checkpoints, state, settings.keep)
    log.close()
    if stop:
        print(f"stopped by {signal.Signals(stop[0]).name}: saved at step {step:,}; the same command goes on from there")
        return 128 + stop[0]

    # ---------------------------------------------------------------- the end
    picture = show(run, state.ema, step, final=True)
    print(f"trained to step {step:,}; samples in {picture}")
    return 0


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


def next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every


def prepare_directory(run: runs.Run, resume: bool) -> None:
    """Write the config into a new run directory, or check that an old one is of the same run."""
    path = run.directory / "config.json"
    if path.is_file():
        old = configs.from_json(path.read_text())
        free = ("train.steps", "train.save_every", "train.keep", "train.sample_every", "train.threads", "sample")
        changed = configs.differences(old, run.config, ignore=free)
        if changed:
            a, b = configs.flat(old), configs.flat(run.config)
            first = f"{changed[0]} was {a.get(changed[0])!r} and is now {b.get(changed[0])!r}"
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise configs.ConfigError(f"{run.directory} holds another run: {first}{more}; choose another --run-dir")
    if resume and not checkpoint.steps(run.checkpoints):
        raise configs.ConfigError(f"nothing to resume in {run.directory}: no checkpoints; leave --resume out to start")
    try:
        (run.directory / "samples").mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(configs.to_json(run.config))
        temporary.replace(path)
    except OSError as error:
        raise configs.ConfigError(f"cannot write the run directory {run.directory}: {error.strerror}") from error


class Log:
    """Progress on the terminal, metrics.jsonl and TensorBoard, one entry a visit."""

    def __init__(self, directory: Path, start: int, total: int, images: int):
        from tensorboardX import SummaryWriter

        self.path, self.total, self.images = directory / "metrics.jsonl", total, images
        if self.path.exists():  # entries of steps that were lost are made again
            lines = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= start]
            self.path.write_text("".join(line + "\n" for line in lines))
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.step, self.time, self.first, self.spoke = start, time.perf_counter(), None, 0.0

    def visit(self, step: int, loss: float, grad_norm: float) -> None:
        now = time.perf_counter()
        rate = (step - self.step) / (now - self.time)
        entry = dict(
            step=step, loss=float(loss), grad_norm=grad_norm, steps_per_s=rate, images_per_s=rate * self.images
        )
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for name in ("loss", "grad_norm", "steps_per_s"):
            self.board.add_scalar(name, entry[name], step)
        speed = f"{rate * self.images:,.0f} images/s" if self.images > 1 else f"{rate:,.0f} steps/s"
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed}")
        self.bar.update(step - self.step)
        if self.first is None:
            self.first = (step, now)  # the first visit compiles: it tells nothing of the rate
        if self.bar.disable and (now - self.spoke > 10 or step == self.total):
            done, elapsed = step - self.first[0], now - self.first[1]
            left = f"{(self.total - step) * elapsed / done:,.0f} s left" if done else "compiled"
            print(f"step {step:,}/{self.total:,}  loss {loss:.4f}  {speed}  {left}", flush=True)
            self.spoke = now
        self.step, self.time = step, now

    def picture(self, path: Path, step: int) -> None:
        from PIL import Image

        self.board.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.time = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        self.board.close()


def show(run: runs.Run, params, step: int, final: bool = False) -> Path:
    """Draw samples with fixed noise and write samples/STEP.png: a row per class, or the figure of a plane."""
    how, data = run.config.sample, run.dataset
    key = jax.random.key(run.config.seed + 2)
    path = run.directory / "samples" / ("final.png" if final else f"{step:07d}.png")
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
    x0 = data.to_model(data.held_x)
    eps = jax.random.normal(key, x0.shape)
    marks = [float(times[i]) for i in reversed(picks[:-1])]
    forward = [(0.0, x0)] + [(t, jdiff.q_sample(run.schedule, x0, jnp.asarray(t), eps)) for t in marks]
    first = jdiff.prior(run.schedule, key, x.shape, times[0], **moments(run))
    backward = [(float(times[i]), first if i == 0 else states[i - 1]) for i in picks[:-1]] + [(0.0, x)]
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    plot.plane_figure(path, forward, backward, ([e["step"] for e in lines], [e["loss"] for e in lines]))
    return path


def moments(run: runs.Run) -> dict:
    mean, std = run.dataset.moments() if run.config.sample.match_prior else (0.0, 0.0)
    return dict(mean=mean, std=std)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (configs.ConfigError, checkpoint.CheckpointError, OSError) as error:
        configs.fail(error)
