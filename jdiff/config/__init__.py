"""Configurations: what a run is made of, from a file and the command line to the objects that its names stand for.

`schema` says what a config holds, `tables` what its names stand for, `build` makes the objects, `files` says how it is
kept, and `cli` how it is typed.
"""

from jdiff.config.build import (
    average_names,
    build_averages,
    build_data,
    build_guidance,
    build_loss,
    build_model,
    build_optimizer,
    build_regression,
    build_sampler,
    build_schedule,
    check,
    check_guide,
    devices,
    limit_threads,
)
from jdiff.config.cli import (
    check_writable,
    fail,
    is_argument,
    parse,
    parse_with_config,
    parse_with_settings,
    run_script,
    split_at_dashes,
)
from jdiff.config.files import change, config_files, differences, flat, from_json, load_config, to_dict, to_json
from jdiff.config.schema import Config, ConfigError, Named, Sample, Train, check_seed, first_line
from jdiff.config.tables import (
    CHOICES,
    CONDITIONINGS,
    COUPLINGS,
    EMAS,
    GRIDS,
    GUIDES,
    LEVELS,
    LOSSES,
    SCHEDULES,
    SOLVERS,
    TARGETS,
    WEIGHTS,
    Choice,
    arguments,
    written,
)
