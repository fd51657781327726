"""Exports: the same bits as the code that they were made of, for any batch; damage is one line each."""

import json
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, Diagonal
from networks import random_variables

import jdiff
from jdiff.core import files
from jdiff.core.trees import named_leaves
from jdiff.export import ExportError, schedules
from jdiff.models import DiT, EDM2UNet

pytest.importorskip("flatbuffers")
pytest.importorskip("safetensors")

VP = jdiff.VP()
SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(1,), num_classes=3)
IMAGE = (8, 8, 1)
NETWORKS = {  # (network, shape of a sample, whether it has classes, whether it has a learned variance)
    "mlp": (jdiff.create_model("mlp", features=16, layers=1), (2,), False, False),
    "unet": (jdiff.create_model("unet", heads=2, **SMALL), IMAGE, True, False),
    "dit": (DiT(width=16, depth=1, heads=2, num_classes=3, out_multiplier=2), IMAGE, True, True),
    "edm2": (EDM2UNet(head_channels=8, **SMALL), IMAGE, True, False),
}
predict = jax.jit(lambda denoise, x, t: denoise.predict(x, t))


def made(name, cond=None, schedule=VP, target=None):
    """(denoiser, the shape of a sample) of a small network with random parameters."""
    network, shape, classes, variance = NETWORKS[name]
    cond = jnp.zeros(2, jnp.int32) if cond is None and classes else cond
    params = random_variables(network, jnp.zeros((2, *shape)), jnp.zeros(2), cond)
    target = target or jdiff.targets.V()
    return jdiff.denoiser(network.apply, params, schedule, target, cond, learned_variance=variance), shape


def noise(n, shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, *shape)), jnp.float32)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """(folder, denoiser): an MLP, exported with its gradient for the CPU."""
    denoise, shape = made("mlp")
    folder = tmp_path_factory.mktemp("exports") / "mlp"
    jdiff.export.save(folder, denoise, shape, platforms=["cpu"], vjp_order=1, about="Trained on *nothing*.")
    return folder, denoise


SLOW = [pytest.param(name, marks=pytest.mark.slow) if name in ("unet", "edm2") else name for name in NETWORKS]


@pytest.mark.parametrize("name", SLOW)
def test_a_denoiser_has_the_same_bits_for_any_batch(name, tmp_path):
    """One folder for cpu, cuda and tpu serves batches of 1, 7 and 64; a learned variance comes with it."""
    denoise, shape = made(name)
    jdiff.export.save(tmp_path / "it", denoise, shape)
    loaded = jdiff.export.load(tmp_path / "it")
    assert {p for part in loaded.program.parts for p in part.platforms} == {"cpu", "cuda", "tpu"}
    for n in (1, 7, 64):
        x, t, cond = noise(n, shape), jnp.linspace(0.1, 0.9, n), jnp.arange(n, dtype=jnp.int32) % 4
        cond = None if denoise.cond is None else cond
        given = loaded if cond is None else loaded.given(cond=cond)
        expected = predict(denoise.replace(cond=cond), x, t)
        chex.assert_trees_all_equal(predict(given, x, t), expected, strict=True)
    assert (expected.extra is not None) == denoise.learned_variance


def test_all_of_sampling_works_with_a_loaded_denoiser(mlp):
    """A scalar time, a solver under jit, steps of each sample's own (a vmap), and gradients to x and the parameters."""
    folder, denoise = mlp
    loaded, x = jdiff.export.load(folder), noise(3, (2,))
    assert loaded.schedule == VP
    times = jdiff.grid.log_snr(VP, 4)

    @jax.jit
    def run(denoise, x):
        heun = jdiff.sample(jdiff.solvers.Heun(), denoise, VP, x, times)
        return denoise(x, 0.4), heun, jax.vmap(lambda a: denoise(a[None], 0.4)[0])(x)

    chex.assert_trees_all_close(run(loaded, x), run(denoise, x), rtol=1e-5, atol=1e-5)
    adaptive = [jdiff.sample_adaptive(d, VP, x, rtol=1e-5, atol=1e-5)[0] for d in (loaded, denoise)]
    np.testing.assert_allclose(*adaptive, rtol=1e-3, atol=1e-3)

    @jax.jit
    def gradients(denoise, x):
        return jax.grad(lambda d, x: jnp.sum(d(x, jnp.full(3, 0.4)) ** 2), argnums=(0, 1), allow_int=True)(denoise, x)

    (of_loaded, of_x), (of_denoise, expected) = gradients(loaded, x), gradients(denoise, x)
    np.testing.assert_array_equal(of_x, expected)
    names = [name for name in of_loaded.numbers if name.startswith("params")]
    got = [of_loaded.numbers[name] for name in names]
    wanted = named_leaves(of_denoise)
    chex.assert_trees_all_close(got, [wanted[name] for name in names], rtol=1e-5, atol=1e-6)
    per_sample = jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(loaded(x[None], jnp.full(1, 0.4)) ** 2))))(x)
    np.testing.assert_allclose(per_sample, expected, rtol=1e-5, atol=1e-6)


def test_guidance_is_exported_whole(tmp_path):
    """Both branches' classes are arguments by their path; the weight is a number that can be changed."""
    denoise, shape = made("dit")
    guided = jdiff.guidance.cfg(denoise, denoise.replace(cond=jnp.full(2, 3)), 2.0)
    jdiff.export.save(tmp_path / "it", guided, shape, platforms=["cpu"])
    loaded, x, t = jdiff.export.load(tmp_path / "it"), noise(3, shape), jnp.array([0.1, 0.5, 0.9])
    cond, null = jnp.array([0, 1, 2]), jnp.full(3, 3)
    assert not any(name.startswith("branches/unconditional/params") for name in loaded.numbers)
    rows = {"branches/conditional/cond": cond, "branches/unconditional/cond": null}
    again = jdiff.guidance.cfg(denoise.replace(cond=cond), denoise.replace(cond=null), 3.5)
    changed = loaded.replace(numbers=loaded.numbers | {"branches/w": jnp.float32(3.5)}).given(rows)
    chex.assert_trees_all_equal(predict(changed, x, t), predict(again, x, t), strict=True)
    with pytest.raises(ValueError, match="branches/conditional/cond, branches/unconditional/cond, which it needs"):
        loaded(x, t)
    with pytest.raises(ValueError, match=r"argument 'branches/conditional/cnd' was not exported \(did you mean"):
        loaded.given({"branches/conditional/cnd": cond})


def draw(params, keys, cond, settings):
    """A guided, stochastic sampler with a traced number of steps."""
    network = NETWORKS["dit"][0]

    def given(cond):
        return jdiff.denoiser(network.apply, params, VP, jdiff.targets.V(), cond, learned_variance=True)

    denoise = jdiff.guidance.cfg(given(cond), given(jnp.full_like(cond, 3)), settings["w"])
    times = jdiff.grid.log_snr(VP, settings["n"], size=6)
    x = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 7), IMAGE))(keys)
    return jdiff.sample(jdiff.solvers.DDIM(settings["eta"]), denoise, VP, x, times, keys, n=settings["n"])


@pytest.mark.slow
def test_a_sampler_has_the_same_bits_as_under_jit(tmp_path):
    params, settings = made("dit")[0].params, dict(w=2.0, eta=0.5, n=4)
    keys, cond = jax.random.split(jax.random.key(0), 64), jnp.arange(64, dtype=jnp.int32) % 3
    jdiff.export.save_sampler(tmp_path / "it", draw, params, keys[:2], cond[:2], settings)
    loaded, jitted = jdiff.export.load(tmp_path / "it"), jax.jit(draw)
    for n in (1, 7, 64):
        expected = jitted(params, keys[:n], cond[:n], settings)
        np.testing.assert_array_equal(loaded(keys[:n], cond[:n]), expected)
    others = dict(w=1.0, eta=0.0, n=6)
    np.testing.assert_array_equal(loaded(keys[:7], cond[:7], others), jitted(params, keys[:7], cond[:7], others))
    traced = jax.jit(chex.assert_max_traces(lambda *arguments: loaded(*arguments), n=1))
    results = [traced(keys[:7], cond[:7], dict(w=w, n=n)) for w, n in ((1.0, 2), (3.0, 5))]
    assert np.abs(results[0] - results[1]).max() > 1e-2
    for wrong, message in (
        (dict(v=1.0), r"setting 'v' was not exported; there is w, eta, n"),
        (dict(n=2.5), "setting n is float32; it was exported as int32"),
        (dict(w=[1.0, 2.0]), r"setting w has shape \(2,\); it was exported with \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(keys[:7], cond[:7], wrong)
    with pytest.raises(ValueError, match="all arguments must have one batch; got cond of 6, start of 7"):
        loaded(keys[:7], cond[:6])


def test_schedules_are_read_as_they_were():
    for schedule in MORE_SCHEDULES.values():
        again = schedules.read(json.loads(json.dumps(schedules.written(schedule))))
        chex.assert_trees_all_equal(again, schedule)
        assert again == schedule


def test_a_schedule_of_ones_own_is_one_line(tmp_path):
    @jdiff.noun
    class Own(jdiff.Schedule):
        def alpha(self, t):
            return 1 - t

        def sigma(self, t):
            return t

    with pytest.raises(ValueError, match="^Own is a schedule of your own, which a folder cannot name"):
        jdiff.export.save(tmp_path / "it", Diagonal(Own()), (2,))
    for record in ({"noun": "VPP"}, {"noun": "VP"}, {"noun": "VP", "beta_min": 3.0, "beta_max": 1.0}, None, {}):
        with pytest.raises(ValueError):
            schedules.read(record)


def test_wrong_calls_are_one_line(mlp, tmp_path):
    folder, denoise = mlp
    loaded = jdiff.export.load(folder)
    for x, message in (
        (noise(2, (3,)), r"x has shape \(2, 3\); it was exported as float32 \(b, 2\)"),
        (noise(2, (2,)).astype(jnp.bfloat16), "x is bfloat16; it was exported as float32"),
        (noise(0, (2,)), "the batch is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(x, 0.5)
    jdiff.export.save(tmp_path / "plain", Diagonal(VP), (2,), platforms=["cpu"])
    plain = jdiff.export.load(tmp_path / "plain")
    np.testing.assert_array_equal(plain(noise(2, (2,)), 0.5), jax.jit(Diagonal(VP))(noise(2, (2,)), 0.5))
    with pytest.raises(ValueError, match="exported without its gradient; export it again with vjp_order=1"):
        jax.grad(lambda x: plain(x, 0.5).sum())(noise(2, (2,)))
    with pytest.raises(OSError, match="plain exists already; remove it, or name another folder"):
        jdiff.export.save(tmp_path / "plain", denoise, (2,))
    asks = jdiff.denoiser(lambda params, x, label, cond: x * len(x), {}, VP, jdiff.targets.V())
    for wrong, message in (
        (dict(denoise=asks), r"cannot be exported for cpu: it needs the size of the batch.*write x.shape\[0\]"),
        (dict(denoise=denoise, platforms="cpu"), "platforms must be a list of some of cpu, cuda, rocm, tpu"),
        (dict(denoise=denoise, platforms=["gpu"]), "platforms must be a list of some of"),
        (dict(denoise=denoise, vjp_order=2), r"vjp_order must be 0 \(no gradient\) or 1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            jdiff.export.save(tmp_path / "wrong", shape=(2,), **wrong)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_a_damaged_folder_is_one_line(mlp, tmp_path):
    """Each file missing, cut short or with one bit changed; a record of other versions; what is no export."""
    folder, _ = mlp
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def loading(**changed):
        at = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        at.mkdir()
        for name, content in (whole | changed).items():
            if content is not None:
                (at / name).write_bytes(content)
        with pytest.raises(ExportError) as error:
            jdiff.export.load(at)
        assert str(at) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    for name in whole.keys() - {"README.md"}:
        content = bytearray(whole[name])
        content[len(content) // 2] ^= 1
        for damage, word in ((None, "missing|has no"), (content[:-40], "bytes|damaged"), (content, "damaged|checksum")):
            assert re.search(word, loading(**{name: damage}))
    record = json.loads(whole["export.json"])

    def recorded(**changed):
        return loading(**{"export.json": json.dumps(record | changed).encode()})

    def program(**changed):
        return recorded(programs=[record["programs"][0] | changed])

    assert "has format 2 (" in recorded(format=2) and "update jdiff" in recorded(format=2)
    assert "calling convention 99" in program(calling_convention=99)
    assert "was exported for tpu, and this is cpu" in program(platforms=["tpu"])
    assert "is for cpu, which export.json does not say" in program(platforms=["cpu", "tpu"])
    assert "is no name of a file in the folder" in program(file="../program_cpu.bin")
    assert "holds other numbers" in recorded(numbers={})
    assert "is an export of a flow_map" in recorded(kind="flow_map")
    assert "unknown schedule 'VPP' (did you mean 'VP'?)" in recorded(schedule={"noun": "VPP"})
    for field in record.keys() - {"rows", "numbers", "schedule"}:
        recorded(**{field: None})
    assert "is no export: it has no export.json" in loading(**{"export.json": None})


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_folder(tmp_path / "it", fail)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file exists already"):
        files.write_folder(tmp_path / "file", lambda folder: None)
    assert (tmp_path / "file").read_text() == "kept"


def test_the_card_says_how_to_load(mlp):
    card = (mlp[0] / "README.md").read_text()
    assert "Trained on *nothing*." in card and "jdiff.export.load('mlp')" in card and "| x | (b, 2) | float32 |" in card
    count = (
        sum(leaf.size for leaf in jax.tree.leaves(mlp[1].params))
        + len(jax.tree.leaves(mlp[1]))
        - len(jax.tree.leaves(mlp[1].params))
    )
    assert f"{count:,} numbers" in card


@pytest.mark.slow
def test_another_process_reads_it_without_the_network(mlp):
    """A fresh process, in which making any network fails, gets the bits of this one."""
    folder, denoise = mlp
    code = (
        "import sys, jax, jax.numpy as jnp, numpy as np, flax.linen as nn, jdiff\n"
        "nn.Module.apply = nn.Module.init = None\n"
        "x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)\n"
        "predict = jax.jit(lambda denoise, x, t: denoise.predict(x, t))\n"
        "out = predict(jdiff.export.load(sys.argv[1]), x, jnp.linspace(0.1, 0.9, 5)).x0\n"
        "print(np.asarray(out).tobytes().hex())"
    )
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    expected = predict(denoise, noise(5, (2,)), jnp.linspace(0.1, 0.9, 5)).x0
    assert run.stdout.strip() == np.asarray(expected).tobytes().hex()
