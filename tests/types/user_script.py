"""A user's program: a schedule, solver, target, guidance and training loop of its own, all of it with types."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import jdiff


@jdiff.schedule
class Power(jdiff.Schedule):
    power: float = 1.5
    t_min = 0.01

    def alpha(self, t: jax.Array) -> jax.Array:
        return 1 - t**self.power

    def sigma(self, t: jax.Array) -> jax.Array:
        return t**self.power


@jdiff.noun
class Bridge(jdiff.Noun):
    """DDIM with a share of the predicted noise left out."""

    left_out: float = 0.0
    order = 1
    stochastic = False

    def plan(self, schedule: jdiff.Schedule, times: jax.Array, n: Any, breaks: jax.Array | None = None) -> Any:
        return schedule.alpha(times[1:]), (1 - self.left_out) * schedule.sigma(times[1:])

    def init(self, x: jax.Array) -> tuple[()]:
        return ()

    def step(
        self,
        denoise: jdiff.Denoise,
        schedule: jdiff.Schedule,
        x: jax.Array,
        now: jdiff.solvers.Now,
        state: Any,
        key: Any,
    ) -> tuple[jax.Array, Any, jdiff.Prediction]:
        alpha, sigma = now.plan
        said = denoise.predict(x, now.t)
        return alpha * said.x0 + sigma * said.eps, state, said


@jdiff.noun
class Difference(jdiff.Noun):
    """F = scale (eps - x_0), which no schedule makes singular."""

    scale: float = 1.0

    def row(self, schedule: jdiff.Schedule, t: jax.Array) -> jdiff.targets.Row:
        return jdiff.targets.Row(-self.scale * jnp.ones_like(t), self.scale * jnp.ones_like(t))


@jdiff.noun
class Shrunk(jdiff.Denoise):
    base: jdiff.Denoise
    w: float = 1.0

    @property
    def schedule(self) -> jdiff.Schedule:
        return self.base.schedule

    def predict(self, x: jax.Array, t: Any) -> jdiff.Prediction:
        x0 = self.w * self.base.predict(x, t).x0
        return jdiff.Prediction(x0, jdiff.eps_from(self.schedule, x0, x, t))


def network(params: dict[str, jax.Array], x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.concatenate([x, t[:, None]], -1) @ params["in"]) @ params["out"]


def train(schedule: jdiff.Schedule, target: jdiff.targets.Target, steps: int) -> tuple[jdiff.Denoise, list[float]]:
    data = jnp.array([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 0)
    keys = jax.random.split(jax.random.key(0), steps)
    weights = {"in": 0.3 * jax.random.normal(keys[0], (3, 32)), "out": jnp.zeros((32, 2))}
    apply, params = jdiff.adapt.function(network, weights)
    tx = optax.adam(1e-2)
    opt_state = tx.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return jdiff.losses.denoising(apply, params, key, data, schedule=schedule, target=target)[0]

        value, slope = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(slope, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    values = []
    for key in keys:
        params, opt_state, value = step(params, opt_state, key)
        values.append(float(value))
    return jdiff.denoiser(apply, params, schedule, target), values


def main(steps: int = 200) -> dict[Literal["losses", "samples", "path", "slope"], Any]:
    schedule, target, solver = Power().replace(power=2.0), Difference(scale=0.5), Bridge()
    trained, losses = train(schedule, target, steps)
    denoise = Shrunk(trained).replace(w=0.9)
    noise, times = jdiff.prior(schedule, jax.random.key(1), (8, 2)), jdiff.grid.log_snr(schedule, 5)
    samples = jdiff.sample(solver, denoise, schedule, noise, times)
    last, path = jdiff.sample(
        jdiff.solvers.DDIM(eta=0.5), denoise, schedule, noise, times, jax.random.key(2), path=True
    )
    guided = jdiff.guidance.cfg(denoise, lambda x, t: 0 * x, 2.0)
    far = jdiff.sample(jdiff.solvers.DPMpp2M(), guided, schedule, noise, times)

    def spread(solver: Bridge) -> jax.Array:
        return jdiff.sample(solver, denoise, schedule, noise, times).std()

    slope = jax.grad(spread)(solver).left_out
    return {"losses": losses, "samples": [samples, last, far], "path": path, "slope": slope}


if __name__ == "__main__":
    print(main())
