"""The one error of the evaluation."""

from __future__ import annotations


class EvaluationError(RuntimeError):
    """The evaluation cannot be done as asked; the message is one line that names the file or the argument, and the remedy."""
