"""The recipe of a run: its loss with all that training does to data and labels, written once."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import losses
from jdiff.config import ConfigError, first_line
from jdiff.core.keys import joint, split
from jdiff.data import augment, flip
from jdiff.denoisers.conditioning import drop_labels
from jdiff.losses.levels import LossAware
from jdiff.models.summary import summary
from jdiff.process.clock import log_snr
from jdiff.runs.draw import make_sampler, worse_model
from jdiff.runs.run import UNFIT, Run, check_memory, param_shapes, state_of

SNR_LIMIT = 1e-3  # alpha^2 / sigma^2 above which N(0, sigma^2) is visibly not where the process ends


def make_loss(run: Run) -> Callable:
    """The loss that a run trains on.

    It hides a share of the labels, mirrors or augments the images, calls the network with its dropout, asks it for its
    uncertainty where the loss needs that, and draws the noise levels by the law of the config.

    Args:
        run: the run.

    Returns:
        `loss(params, key, x0, labels) -> (scalar, aux)`, as `make_train_step` calls it, with x0 (B, ...) in the model's
        numbers and labels (B,) or None; aux has `t` and `each`, both (B,). Where the config's levels are loss-aware it
        also takes the collections of the training state, `extra=`, and returns the new ones in aux.
    """
    settings = run.config.train

    def loss(params, key, x0, labels, levels=run.regression.levels):
        loss_key, label_key, network_key, flip_key, augment_key = split(key, 5)
        options = dict(train=True, rngs={"dropout": joint(network_key)})
        if labels is not None:
            labels = drop_labels(label_key, labels, settings.label_dropout, run.facts.classes)
        if settings.augment:
            x0, options["augment"] = augment(augment_key, x0, settings.augment)
        elif settings.flip:  # the augmentation mirrors half of the images itself
            x0 = flip(flip_key, x0)
        if run.config.loss.name == "uncertain":
            options["return_logvar"] = True

        def apply(params, x, label, cond):
            return run.model.apply(params, x, label, cond, **options)

        return run.loss(apply, params, loss_key, x0, labels, **vars(run.regression) | dict(levels=levels))

    law = run.regression.levels
    return losses.loss_aware(loss, law, run.schedule) if isinstance(law, LossAware) else loss


def make_take(run: Run) -> Callable:
    """What makes a batch on the device, for `make_train_loop`.

    Args:
        run: the run, whose data are stored as they are read: images as uint8.

    Returns:
        `take((x, labels), index) -> (x0 in the model's numbers, labels)`: those of a row, or of an array of rows.
    """

    def take(arrays, index):
        x, labels = arrays
        return run.facts.to_model(x[index]), None if labels is None else labels[index]

    return take


def rehearse(run: Run) -> None:
    """Trace the loss and the sampling of a run, so that what does not fit together shows before any work.

    Raises:
        ConfigError: the parts do not fit, or the training state does not fit into the memory. The message has what the
            network or the solver said.
    """
    key, labels = jax.random.key(0), jnp.zeros(2, jnp.int32) if run.facts.classes else None
    x0 = jax.ShapeDtypeStruct((2, *run.facts.shape), jnp.float32)
    try:
        params = param_shapes(run)
        state = jax.eval_shape(functools.partial(state_of, run), params)
        check_memory(run, state, "its training state")
        collections = {} if state.extra is None else {"extra": state.extra}
        jax.eval_shape(make_loss(run), params, key, x0, labels, **collections)
        sampling = dataclasses.replace(run.config.sample, match_prior=False)  # its moments would read the data
        worse = worse_model(run, sampling)
        one_batch = make_sampler(run, sampling, 2, None if worse is None else worse.run)
        one_batch = functools.partial(one_batch, path=False, worse_params=None if worse is None else worse.params)
        jax.eval_shape(one_batch, params, key, np.arange(2), labels)
    except ConfigError:
        raise
    except UNFIT as error:
        raise ConfigError(f"the parts of this config do not fit: {first_line(error)}") from error


def step_flops(run: Run) -> int:
    """FLOPs of one training step: three times those of the network's call, for the two products of each gradient."""
    batch = run.config.train.batch
    cond = jax.ShapeDtypeStruct((batch,), jnp.int32) if run.facts.classes else None
    return 3 * summary(run.model, (batch, *run.input_shape), cond=cond).flops


def terminal_snr(run: Run) -> float:
    """alpha^2 / sigma^2 where sampling starts."""
    return float(jnp.exp(log_snr(run.schedule, run.schedule.t_max)))
