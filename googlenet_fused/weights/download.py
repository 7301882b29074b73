"""Fetching published weights into torch.hub's cache, and checking what lies there."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError

import torch

from googlenet_fused.weights.errors import WeightsError
from googlenet_fused.weights.published import PUBLISHED, PublishedWeights, Weights

TIMEOUT_SECONDS = 10.0
"""How long one address may stay silent, on connecting and between two blocks of data."""


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises ``OSError`` if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def published_as(path: str | os.PathLike[str]) -> PublishedWeights | None:
    """The published weights that this very file is, told by its SHA-256, or ``None``."""
    return published_with(sha256_of(path))


def published_with(digest: str) -> PublishedWeights | None:
    """The published weights whose file has this SHA-256, in hexadecimal, or ``None``."""
    published = (weights for members in PUBLISHED.values() for weights in members)
    return next((weights for weights in published if digest.startswith(weights.sha256)), None)


def fetch(
    weights: PublishedWeights | Weights,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    *,
    timeout: float = TIMEOUT_SECONDS,
) -> Path:
    """The local file of published weights, downloaded on first use.

    The file appears in the cache only whole and with the right digest, so processes may fetch at the same time. A file that is
    already there is checked too: torch.hub does not do that.

    Args:
        weights: a member of ``GoogLeNet_Weights`` or ``BVLC_GoogLeNet_Weights``, or a ``Weights`` of your own.
        cache_dir: the folder of the file; torch.hub's (``$TORCH_HOME/hub/checkpoints``) unless given.
        progress: show a progress bar on stderr while downloading.
        timeout: seconds that one address of the server may stay silent.

    Raises:
        WeightsError: there is no network, the server refuses, the download or the cached file has the wrong size or SHA-256,
            or the cache cannot be written.
    """
    folder = Path(torch.hub.get_dir(), "checkpoints") if cache_dir is None else Path(cache_dir)
    path = folder.expanduser() / weights.filename
    if not path.exists():
        _download(weights, path, progress, timeout)
    try:
        size = path.stat().st_size
        if weights.size not in (None, size):
            raise WeightsError(
                f"the cached file {path} is not {weights.filename}: it has {size} bytes, expected {weights.size}; "
                "delete it to download it again"
            )
        digest = sha256_of(path)
    except OSError as error:
        raise WeightsError(f"cannot read the cached weights {path}: {error.strerror or error}") from error
    if not digest.startswith(weights.sha256):
        raise WeightsError(
            f"the cached file {path} is not {weights.filename}: its SHA-256 is {digest}, expected {weights.sha256}...; "
            "delete it to download it again"
        )
    return path


def _download(weights: PublishedWeights | Weights, path: Path, progress: bool, timeout: float) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if progress:
            print(f"Downloading {weights.url} to {path}", file=sys.stderr)
        with _socket_timeout(timeout):
            torch.hub.download_url_to_file(weights.url, str(path), hash_prefix=weights.sha256, progress=progress)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        reason = error.reason if type(error) is URLError else error
        raise WeightsError(
            f"cannot download {weights.url} to {path.parent}: {reason}. "
            'Get the file on a machine with a network and give it: in Python googlenet(weights="FILE") or '
            'googlenet_fused.weights.load_weights(model, "FILE"), on the command line --weights FILE'
        ) from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Lends urllib a timeout: torch.hub gives it none, and with Python's default a silent network means waiting for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
