"""Runs: a directory, the network that was trained in it, and samples drawn from it."""

from jdiff.runs.run import (
    SNR_LIMIT,
    Run,
    _check_finite,
    build,
    check_noted,
    draw,
    like,
    new_state,
    open_run,
    param_shapes,
    rehearse,
    restore_ema,
    step_flops,
    terminal_snr,
)
