"""Runs: a directory, the recipe of its training, and samples drawn from what was trained in it."""

from jdiff.runs.draw import draw, make_denoiser
from jdiff.runs.recipe import SNR_LIMIT, make_loss, make_take, rehearse, step_flops, terminal_snr
from jdiff.runs.run import (
    Run,
    about_data,
    build,
    check_noted,
    last_checkpoint,
    like,
    main_average,
    new_state,
    open_run,
    param_shapes,
    prepare_directory,
    read_config,
    restore_ema,
)
