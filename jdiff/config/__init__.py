"""Configurations: what a run is made of, from a file and the command line to the objects that its names stand for.

`schema` says what a config holds, `build` what its names stand for, `files` how it is kept, and `cli` how it is typed.
"""

from jdiff.config.build import (
    CONDITIONINGS,
    COUPLINGS,
    EMAS,
    GRIDS,
    LEVELS,
    LOSSES,
    SCHEDULES,
    SOLVERS,
    TARGETS,
    WEIGHTS,
    average_names,
    build_averages,
    build_data,
    build_loss,
    build_model,
    build_optimizer,
    build_regression,
    build_sampler,
    build_schedule,
    check,
    devices,
    limit_threads,
)
from jdiff.config.cli import (
    check_writable,
    fail,
    is_argument,
    parse,
    parse_with_config,
    run_script,
    setting,
    split_at_dashes,
)
from jdiff.config.files import change, differences, flat, from_json, load_config, to_dict, to_json
from jdiff.config.schema import Config, ConfigError, Named, Sample, Train, check_seed, first_line
