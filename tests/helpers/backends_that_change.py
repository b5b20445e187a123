"""Backends whose code stays the same while what they do does not, as after an upgrade of what they call.

Named to the worker program, which has the environment of whoever starts it, as
'tests.helpers.backends_that_change:Name'.
"""

import os
import signal

from tests.helpers.backends_for_tuning import Right

VARIABLE = "BACKENDS_HAVE_CHANGED"


class Changes(Right):
    """Right and faster than eager until the variable is set; then `change` comes upon each call."""

    def forward(self, logits, labels, temperature, *, entropy):
        log_probs, entropies, residuals = super().forward(logits, labels, temperature, entropy=entropy)
        return self.change(log_probs) if os.environ.get(VARIABLE) else log_probs, entropies, residuals

    def change(self, log_probs):
        return log_probs


class BecomesWrong(Changes):
    def change(self, log_probs):
        return -log_probs


class Crashes(Changes):
    def change(self, log_probs):
        os.kill(os.getpid(), signal.SIGSEGV)
