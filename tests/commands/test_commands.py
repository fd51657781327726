"""The scripts as a person runs them: what they leave, how they resume, and what they say to bad input."""

import contextlib
import fcntl
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from fakes import fake_wandb

from jdiff import runs
from jdiff.runs import lock
from jdiff.runs.run import check_same_data
from jdiff.train import checkpoint

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
CONFIG = """
from jdiff.config import Config, Named, Sample, Train
config = Config(
    name="tiny", data=Named("digits", {"held_out": 0.2}),
    model=Named("vit_small", {"width": 16, "depth": 1, "heads": 2}),
    schedule=Named("discrete", {"table": "linear", "T": 100}),
    train=Train(steps=12, batch=8, visit=4, save_every=6, devices=1, warmup_steps=2),
    sample=Sample(steps=3, num=10, guidance=2.0),
)
"""


PLANE = """
from jdiff.config import Config, Named, Sample, Train
config = Config(
    name="plane", data=Named("scurve", {"n": 500}), model=Named("mlp_step", {"features": 16, "steps": 20}),
    schedule=Named("discrete", {"table": "linear", "T": 20}), conditioning=Named("index", {"T": 20}),
    train=Train(steps=12, batch=8, visit=4, save_every=6, devices=1), sample=Sample(steps=3, num=10),
)
"""


def script(name, *words):
    """Run scripts/NAME.py, or benchmarks/NAME.py, in this process as `python` would: compiled programs are shared."""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    found = [ROOT / folder / f"{name}.py" for folder in ("scripts", "benchmarks")]
    path = str(next(path for path in found if path.is_file()))
    sys.argv, before = [path, *map(str, words)], list(sys.path)
    sys.path.insert(0, str(Path(path).parent))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.path[:] = argv, before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def ok(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def bad(result, *texts):
    """Exit status 2 and one line that says all of `texts`."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for text in texts:
        assert text in lines[0], lines[0]


WANDB: list = []  # what the run of `place` has told a module in place of wandb


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A config file and a run of 12 steps made from it."""
    where = tmp_path_factory.mktemp("scripts")
    (where / "tiny.py").write_text(CONFIG)
    (where / "plane.py").write_text(PLANE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", fake_wandb(WANDB))
        ok(script("train", where / "tiny.py", "--run-dir", where / "run", "--wandb", "project"))
    return where


def final_state(directory):
    run = runs.open_run(directory)
    return checkpoint.restore(run.checkpoints, runs.new_state(run))


def same_bits(a, b):
    import jax

    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_a_run_leaves(place):
    from PIL import Image

    run = place / "run"
    assert checkpoint.steps(run / "checkpoints") == [6, 12]
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == [4, 6, 10, 12] and all(np.isfinite(e["loss"]) for e in entries)
    (events,) = (run / "tensorboard").glob("events*")
    assert b"samples" in events.read_bytes()  # the last picture, of which there is no other
    (_, begun), *logs, finish = WANDB
    assert (begun["project"], begun["name"], begun["config"]["name"]) == ("project", "run", "tiny")
    assert [step for _, step, values in logs if "loss" in values] == [4, 6, 10, 12]
    assert [step for _, step, values in logs if "samples" in values] == [12] and finish == ("finish",)
    with Image.open(run / "samples" / "final.png") as image:
        assert image.height > image.width / 2  # ten rows, one per class
    assert runs.open_run(run).config.train.steps == 12


def test_a_finished_run_is_left_as_it_is(place):
    """At once, without a picture, a program or an entry of the log."""
    run = place / "run"

    def state():  # of all but what is written again as it was: config.json, data.json, the lock
        parts = [run / "metrics.jsonl"]
        for folder in ("checkpoints", "samples", "tensorboard"):
            parts += (run / folder).rglob("*")
        return {path: path.stat().st_mtime_ns for path in parts}

    before = state()
    result = script("train", place / "tiny.py", "--run-dir", run)
    assert ok(result) == f"trained to step 12 already; samples in {run / 'samples' / 'final.png'}\n"
    assert result.stderr == ""
    assert state() == before


@pytest.mark.slow
def test_a_finished_run_draws_again_where_it_is_asked_for_another_picture(place):
    words = ["--run-dir", place / "again"]
    ok(script("train", place / "plane.py", *words))
    out = ok(script("train", place / "plane.py", *words, "--sample.num", 11))
    assert "trained to step 12; samples in" in out
    (place / "again" / "samples" / "final.png").unlink()
    assert "trained to step 12; samples in" in ok(script("train", place / "plane.py", *words, "--sample.num", 11))
    assert "already" in ok(script("train", place / "plane.py", *words, "--sample.num", 11))


def test_the_first_visit_compiles_the_step_once(place):
    """What is compiled before the first visit is what runs in it, and in all others."""
    import jax.monitoring

    compiled = []

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        result = script("train", place / "plane.py", "--run-dir", place / "once", "--until", 8)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert "stopped as asked" in ok(result) and "compiling the training step (2 of 3) ..." in result.stderr
    assert compiled.count("jit(loop)") + compiled.count("loop") == 1, compiled


@pytest.mark.slow
def test_resume_is_exact(place):
    """6 steps, then the rest, in the same directory: the bits of the undisturbed run. Metrics join up.

    What does not change the numbers may change between: here, how many checkpoints are kept.
    """
    run = place / "halves"
    ok(script("train", place / "plane.py", "--run-dir", place / "whole"))
    assert "stopped as asked: saved at step 6" in ok(
        script("train", place / "plane.py", "--run-dir", run, "--until", 6)
    )
    out = ok(script("train", place / "plane.py", "--run-dir", run, "--resume", "--train.keep", 5))
    assert "resuming" in out and "at step 6" in out
    same_bits(final_state(run), final_state(place / "whole"))
    assert [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()] == [4, 6, 10, 12]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_and_resumed(place, number):
    """SIGTERM and Ctrl-C save before leaving; after SIGKILL the last checkpoint serves. The end is bitwise the same."""
    run = place / f"killed_{number.name}"
    words = [sys.executable, str(ROOT / "scripts/train.py"), str(place / "plane.py"), "--run-dir", str(run),
             "--train.steps", "3000", "--train.save-every", "20"]  # fmt: skip
    process = subprocess.Popen(words, env=ENV, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 200
    while time.time() < end and process.poll() is None and not checkpoint.steps(run / "checkpoints"):
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=200)
    kept = checkpoint.steps(run / "checkpoints")
    assert kept, (stdout, stderr)
    if number != signal.SIGKILL and kept[-1] < 3000:
        assert process.returncode == 128 + number, stderr
        assert f"stopped by {number.name}: saved at step {kept[-1]}" in stdout
    ok(script("train", place / "plane.py", "--run-dir", run, "--train.steps", 3000, "--train.save-every", 20))
    reference = place / "undisturbed"
    if not reference.exists():
        ok(script("train", place / "plane.py", "--run-dir", reference, "--train.steps", 3000, "--train.save-every", 20))
    same_bits(final_state(run), final_state(reference))


@pytest.mark.slow
def test_survive(place):
    """Four kills, two of them while a checkpoint is being written: the bits of the undisturbed run."""
    words = ["--train.steps", 12_000, "--train.save-every", 100, "--train.visit", 50, "--train.devices", 1]
    out = ok(script("survive", place / "plane.py", "--kills", 4, "--within", 0.5, "--", *words))
    assert "4 kills" in out and "step 12,000: bitwise equal" in out
    assert out.count("while saving, at most") >= 1
    bad(script("survive", place / "plane.py", "--kills", 0), "must be positive")
    words = ["--train.steps", 12_000, "--train.save-every", 100, "--train.visit", 50, "--train.devices", 1]
    out = ok(script("survive", place / "plane.py", "--signals", "--kills", 3, "--within", 0.5, "--", *words))
    assert "0 without a line or their status; step 12,000: bitwise equal; left over: nothing" in out
    words[1] = 6000
    assert "1 pairs, 1 as they must be" in ok(
        script("survive", place / "plane.py", "--double", "--kills", 1, "--", *words)
    )


@pytest.mark.slow
def test_samples(place):
    """npz: uint8 images and the labels asked for, which cycle; sample i does not depend on how many are drawn."""
    out = place / "out" / "s.npz"
    words = ["--num", 7, "--labels", 3, 1, "--solver", "ddim", "--eta", 0.5, "--out", out]
    with lock.held(place / "run", print):  # sampling only reads: it may, while the run trains
        ok(script("sample", place / "run", *words))
    with np.load(out) as file:
        samples, labels = file["samples"], file["labels"]
    assert samples.shape == (7, 8, 8, 1) and samples.dtype == np.uint8
    np.testing.assert_array_equal(labels, [3, 1, 3, 1, 3, 1, 3])
    ok(script("sample", place / "run", "--num", 2, "--labels", 3, 1, "--solver", "ddim", "--eta", 0.5, "--out", out))
    with np.load(out) as file:
        assert np.abs(file["samples"].astype(int) - samples[:2]).max() <= 1
    words = ["--grid", "karras", "--solver", "unipc", "--solver-args", "order=3", "variant=bh1"]
    ok(script("sample", place / "run", "--num", 3, *words, "--out", place / "grid.png"))
    assert (place / "grid.png").stat().st_size > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", "evaluate"])
@pytest.mark.parametrize("seconds", [0.5, 6.0])
def test_ctrl_c_is_one_line(place, name, seconds):
    """While it imports, and while it works: a line and the status of the signal."""
    words = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), str(place / "run"), "--num", "100000"]
    words += ["--steps", "1000", "--out", str(place / "never.png")] if name == "sample" else []
    process = subprocess.Popen(words, env=ENV, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "stopped by SIGINT" and "Traceback" not in stderr
    assert not list(place.glob("*never*")) and not list(place.glob("tmp*"))


def test_bad_training_input(place):
    """One process each is slow, so the messages that come before any work share this test."""
    tiny = place / "tiny.py"
    (place / "empty.py").write_text("x = 1\n")
    bad(script("train", place / "tinny.py"), "no config file", "'tiny'")
    bad(script("train", place / "empty.py"), "exports no config")
    bad(script("train", tiny, "--train.stepz", 3), "--train.stepz", "--train.steps")
    bad(script("train", tiny, "--train.steps", "many"), "--train.steps", "invalid literal")
    bad(script("train", tiny, "--train.steps", 0), "train.steps must be positive")
    bad(script("train", tiny, "--train.batch", -4), "train.batch must be positive")
    bad(script("train", tiny, "--train.batch", 5000), "has 1,437 samples")
    bad(script("train", tiny, "--model.name", "unett", "--run-dir", place / "no"), "unknown model", "'unet'", "mlp")
    bad(script("train", tiny, "--sample.solver.name", "hune", "--run-dir", place / "no"), "unknown solver", "heun")
    bad(script("train", tiny, "--target.name", "noise", "--run-dir", place / "no"), "unknown target", "eps, score")
    bad(script("train", tiny, "--schedule.name", "vpp", "--run-dir", place / "no"), "unknown schedule", "'vp'")
    bad(script("train", tiny, "--requeue-on", "KILL", "--run-dir", place / "no"), "KILL", "--requeue-on", "USR1")
    bad(script("train", tiny, "--train.peer-timeout", 1, "--run-dir", place / "no"), "train.peer_timeout", "at least 5")
    assert not (place / "no").exists()
    bad(script("train", tiny, "--run-dir", "/proc/nowhere"), "cannot write")
    bad(script("train", tiny, "--run-dir", place / "new", "--resume"), "nothing to resume")
    bad(script("train", tiny, "--run-dir", place / "run", "--train.lr", 0.5), "another run", "train.lr was 0.001")
    assert checkpoint.steps(place / "run" / "checkpoints") == [6, 12]


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_directory_in_use_is_left_alone(place):
    """One line that names the other process, and not a byte is touched."""
    run = place / "run"
    with (run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        record = dict(pid=os.getpid(), host="here", started="2000-01-01", token="x", heartbeat=time.time())
        (run / "lock.json").write_text(json.dumps(record))
        before = contents(run)
        bad(script("train", place / "tiny.py", "--run-dir", run), f"{run} is in use: process {os.getpid()} on here")
        assert contents(run) == before
    (run / "lock.json").unlink()


@pytest.mark.slow
def test_what_a_killed_run_or_a_stranger_left(place, tmp_path):
    """The same command goes on over a damaged log, sweeps what is ours, and follows no link that was laid out."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(place / "run", run)
    victim.write_text("as it was")
    (run / "samples" / "final.png").unlink()  # without it, the run is not at its end
    (run / "config.tmp").symlink_to(victim)
    log = bytearray((run / "metrics.jsonl").read_bytes())
    log[5] ^= 0x80
    (run / "metrics.jsonl").write_bytes(log + b'{"step": "a"}\n')
    (run / "samples" / "tmpabcdefgh.png").write_text("half")
    (run / "checkpoints" / "18.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    result = script("train", place / "tiny.py", "--run-dir", run)
    ok(result)
    assert f"warning: {run / 'metrics.jsonl'}: 2 of 5 lines are damaged and left out" in result.stderr
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [6, 10, 12]
    assert victim.read_text() == "as it was" and not (run / "config.json").is_symlink()
    assert not (run / "samples" / "tmpabcdefgh.png").exists() and checkpoint.steps(run / "checkpoints") == [6, 12]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["12", "6"]


@pytest.mark.slow
def test_other_data_is_another_run(place, tmp_path):
    """The settings are the same, and the samples are fewer: the batches would be others. Old checkpoints do not say."""
    config, points, run = tmp_path / "points.py", tmp_path / "points.npz", tmp_path / "run"
    config.write_text(PLANE.replace('"scurve", {"n": 500}', f'"arrays", {{"path": {str(points)!r}}}'))
    data = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    np.savez(points, x=data)
    ok(script("train", config, "--run-dir", run, "--until", 6))
    np.savez(points, x=data[:61])
    bad(script("train", config, "--run-dir", run), "trained on other data", "'size': 64", "'size': 61", "--run-dir")
    np.savez(points, x=data)
    (run / "config.json").unlink()  # the checkpoint knows the settings too
    bad(script("train", config, "--run-dir", run, "--train.lr", 0.5), "another run", "train.lr was 0.001")
    ok(script("train", config, "--run-dir", run))
    check_same_data(runs.open_run(run), {})


def test_a_loss_that_is_not_finite(place):
    run = place / "explodes"
    words = ["--run-dir", run, "--train.lr", 1e30, "--train.clip", "None", "--train.save-every", 1]
    words += ["--train.warmup-steps", 0]
    bad(script("train", place / "plane.py", *words), "the loss became", "the last checkpoint is")
    assert checkpoint.steps(run / "checkpoints")


def test_steps_that_are_not_finite_can_be_left_out_up_to_a_limit(place):
    words = ["--train.lr", 1e30, "--train.clip", "None", "--train.skip-nonfinite", 3, "--run-dir", place / "limited"]
    words += ["--train.warmup-steps", 0]
    bad(script("train", place / "plane.py", *words), "the loss became", "3 steps before it left out")


def test_what_does_not_divide(place):
    words = ["--run-dir", place / "no", "--train.devices"]
    bad(script("train", place / "plane.py", *words, 3), "train.batch 8 does not divide over 3 devices")
    bad(script("train", place / "plane.py", *words, 9), "train.devices is 9, but there are 8")
    bad(script("train", place / "plane.py", *words, 8, "--train.fsdp", 3), "train.fsdp 3 does not divide the 8")
    bad(script("train", place / "plane.py", *words, 4, "--train.accumulate", 4), "over 4 devices in 4 slices")
    bad(script("train", place / "plane.py", *words, 1, "--train.accumulate", 3), "into train.accumulate 3 slices")
    bad(script("train", place / "plane.py", "--coordinator", "here:1"), "the processes did not come together", "three")
    bad(script("train", place / "plane.py", "--processes", "two"), "--processes", "'two'")
    assert not (place / "no").exists()


def test_another_number_of_steps_is_another_run_where_the_rate_falls(place):
    (place / "falls.py").write_text(PLANE.replace("save_every=6", 'save_every=6, lr_schedule=Named("linear")'))
    ok(script("train", place / "falls.py", "--run-dir", place / "falls", "--until", 2))
    words = ["--run-dir", place / "falls", "--train.steps", 24]
    bad(script("train", place / "falls.py", *words), "another run", "train.steps was 12 and is now 24")


@pytest.mark.slow
def test_evaluate(place):
    out = ok(script("evaluate", place / "run", "--num", 30, "--guidance", 1))
    assert re.search(r"classifier on real held-out images: 9\d\.\d%", out)
    asked, frechet, ratio, near = map(float, re.search(
        r"guidance 1: as asked ([\d.]+)%, Frechet distance ([\d.e+]+), ratio ([\d.]+), nearest-neighbour ratio "
        r"([\d.]+)",
        out,
    ).groups())  # fmt: skip
    for name in ("as asked", "Frechet distance", "ratio", "nearest-neighbour ratio"):  # each figure is explained
        assert f"\n{name}: how " in out or f"\n{name}: that " in out
    assert 0 <= asked <= 100 and frechet > 0 and ratio > 5 and near > 1  # after 12 steps: noise


@pytest.mark.slow
def test_averages_and_snapshots(place):
    """A run with two more averages leaves snapshots; one reconstructed from them samples."""
    run = place / "posthoc"
    words = ["--train.posthoc", 0.05, 0.1, "--train.snapshot-every", 5, "--train.keep", 1, "--train.keep-every", 6]
    ok(script("train", place / "plane.py", "--run-dir", run, *words, "--train.steps", 14))
    assert checkpoint.steps(run / "checkpoints") == [6, 12, 14]
    listed = ok(script("posthoc_ema", run, "--list"))
    assert all(f"{step}  {width}" in listed for step in (5, 10, 14) for width in ("0.05", "0.1"))
    ok(script("posthoc_ema", run, "--sigma-rel", 0.1))
    one, other = place / "one.npz", place / "other.npz"
    average = run / "posthoc" / "0.1-14.npz"
    ok(script("sample", run, "--num", 5, "--out", one))
    assert str(average) in ok(script("sample", run, "--num", 5, "--params", average, "--out", other))
    with np.load(one) as a, np.load(other) as b:
        assert a["samples"].shape == b["samples"].shape and not np.array_equal(a["samples"], b["samples"])
    # the snapshot of that width and step is the reconstruction itself
    from jdiff.train import params_file

    stored = final_state(run).ema["0.1"]
    same_bits(params_file.load_params(average, runs.like(runs.open_run(run))), stored)
    bad(script("sample", run, "--params", place / "no.npz"), "no.npz")


CHOICES = {
    "hybrid": """loss=Named("hybrid", {"vlb": 0.01}), levels=Named("knots", {"T": 100}), self_conditioning=0.5,
        sample=Sample(solver=Named("ddpm", {"variance": "learned"}), grid=Named("discrete"), steps=3, clip=1.0)""",
    "aware": """levels=Named("loss_aware", {"T": 100, "bins": 10, "history": 1}), weight=Named("min_snr"),
        coupling=Named("nearest"), sample=Sample(steps=3, num=10)""",
    "augmented": """coupling=Named("assignment"), sample=Sample(steps=3, num=10)""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_choices_of_the_loss_train_resume_and_sample(place, name):
    """Each runs through the script, resumes in the bits of the undisturbed run, and samples."""
    model = '"vit_small", {"width": 16, "depth": 1, "heads": 2}'
    if name == "augmented":  # only convolutional networks are told of augmentations
        model = '"unet_digits", {"channels": 8, "heads": 2, "augment_dim": 9}'
    train = "augment=0.3, accumulate=2, optimizer=Named('lion')" if name == "augmented" else "flip=True"
    (place / f"{name}.py").write_text(f"""
from jdiff.config import Config, Named, Sample, Train
config = Config(
    name="{name}", data=Named("digits"), model=Named({model}),
    schedule=Named("discrete", {{"table": "cosine", "T": 100}}), {CHOICES[name]},
    train=Train(steps=8, batch=16, visit=4, save_every=4, devices=1, {train}),
)
""")
    ok(script("train", place / f"{name}.py", "--run-dir", place / f"{name}_whole"))
    ok(script("train", place / f"{name}.py", "--run-dir", place / f"{name}_halves", "--train.steps", 4))
    ok(script("train", place / f"{name}.py", "--run-dir", place / f"{name}_halves"))
    same_bits(final_state(place / f"{name}_halves"), final_state(place / f"{name}_whole"))
    if name == "aware":
        assert float(final_state(place / "aware_whole").extra["levels"]["count"].sum()) > 0
    ok(script("sample", place / f"{name}_whole", "--num", 4, "--out", place / f"{name}.npz"))
    with np.load(place / f"{name}.npz") as file:
        assert file["samples"].shape == (4, 8, 8, 1)


def test_bad_sampling_input(place):
    run = place / "run"
    bad(script("sample", place / "nothing"), "is no run directory")
    bad(script("sample", run, "--labels", 3, 12), "label 12", "0 to 9")
    bad(script("sample", run, "--solver", "hune"), "unknown solver 'hune'", "'heun'")
    bad(script("sample", run, "--solver", "euler", "--solver-args", "churn=40"), "'euler' has no argument 'churn'")
    bad(script("sample", run, "--out", "/proc/x/y.png"), "cannot write")
    bad(script("sample", run, "--out", "samples.gif"), ".png or .npz")
    bad(script("sample", run, "--num", 0), "positive")
    bad(script("sample", run, "--clip", 0), "sample.clip", "positive")
    bad(script("sample", run, "--stepz", 3), "--stepz")


@pytest.mark.slow
def test_damaged_and_foreign_checkpoints(place):
    run = place / "copy"
    shutil.copytree(place / "run", run)
    for path in (run / "checkpoints" / "12").rglob("*"):
        if path.is_file() and path.parent.name != "12":
            os.truncate(path, path.stat().st_size // 2)
    bad(script("sample", run, "--out", place / "d.png"), "checkpoint 12", "damaged", "--step 6")
    ok(script("sample", run, "--out", place / "d.png", "--num", 2, "--step", 6))
    result = script("train", place / "tiny.py", "--run-dir", run)
    assert result.returncode == 0 and "checkpoint 12" in result.stderr and "going on from 6" in result.stderr
    same_bits(final_state(run), final_state(place / "run"))
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"width": 16', '"width": 24'))
    bad(script("sample", run, "--out", place / "d.png"), "another model", "expected")
    (run / "config.json").write_text(config[:40])
    bad(script("sample", run), "not a config of this version")
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").write_text(config)
    bad(script("sample", run), "no checkpoints in")


def test_help_lists_settings(place):
    out = ok(script("train", place / "tiny.py", "--help"))
    for text in ("--train.steps", "default: 12", "Optimiser steps of the whole run", "--model.args.width"):
        assert text in out
    assert "--guidance" in ok(script("sample", "--help"))


@pytest.mark.slow
def test_accuracy_of_our_own(tmp_path):
    out = tmp_path / "accuracy.md"
    ok(script("accuracy", "--no-peers", "--only", "DPMpp2M(low", "--points", 4, "--budgets", 4, "--out", out))
    assert "| `DPMpp2M(low_order)` |" in out.read_text() and "| 4 |" in out.read_text()
    bad(script("accuracy", "--no-peers", "--only", "no such"), "no such solver", "Heun()")
    bad(script("accuracy", "--azula", tmp_path), "no azula/sample.py")
