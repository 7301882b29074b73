"""The one error of training."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run cannot begin, go on or be resumed; the message is one line that says what to do."""
