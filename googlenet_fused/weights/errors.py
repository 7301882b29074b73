"""The one error of this package's weight handling."""


class WeightsError(RuntimeError):
    """Weights cannot be downloaded, read or loaded; the message is one line that names the file, the reason and the remedy."""
