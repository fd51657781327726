"""The process x_t = alpha_t x_0 + sigma_t eps: schedules, the SDE, grids of times, and data whose denoiser is known."""

__all__ = ["betas", "forward", "grid", "oracle", "schedules", "sde"]  # the modules that `jdiff` hands on
