"""A schedule on another clock."""

from jdiff.core.arrays import Number, as_time
from jdiff.core.checks import check_positive
from jdiff.core.pytrees import noun
from jdiff.process.clock import Schedule, check_schedule


@noun
class Shifted(Schedule):
    """The same path on another clock: its log-SNR at t is the schedule's own minus 2 log(shift).

    For `Flow`, t becomes shift t / (1 + (shift - 1) t).

    Args:
        schedule: a schedule that is not bounded, as VP, SubVP, Cosine or Flow.
        shift: how much noisier every time is, positive; 1 changes nothing.

    Raises:
        ValueError: for a shift that is not positive, and for bounded schedules (VE, EDM, Discrete), where the shifted
            log-SNR would leave the range.

    Reference:
        Hoogeboom et al. 2023, arXiv:2301.11093, eq. 6; Esser et al. 2024, arXiv:2403.03206, eq. 23.
    """

    schedule: Schedule
    shift: Number = 3.0

    def check(self):
        check_schedule(self.schedule)
        if self.schedule.bounded:
            name = type(self.schedule).__name__
            raise ValueError(f"Shifted: {name} is bounded in log-SNR; shift VP, SubVP, Cosine or Flow")
        check_positive(self, shift=self.shift)

    @property
    def t_min(self):
        return self.schedule.t_min

    @property
    def t_max(self):
        return self.schedule.t_max

    @property
    def has_kinks(self):
        return self.schedule.has_kinks

    def _clock(self, t):
        t = as_time(t)
        return self.schedule.time_at(self.schedule.alpha(t), self.shift * self.schedule.sigma(t))

    def alpha(self, t):
        return self.schedule.alpha(self._clock(t))

    def sigma(self, t):
        return self.schedule.sigma(self._clock(t))

    def time_at(self, alpha, sigma):
        return self.schedule.time_at(alpha, sigma / self.shift)
