"""The user's own files: where they are kept, and how they are read and written so that nobody else can put words into them."""

from __future__ import annotations

import json
import os
import shlex
import stat
import tempfile
from pathlib import Path
from typing import Any

LIMIT = 4 * 2**20
"""Bytes that a file may have."""


class UnsafeFile(OSError):
    """A file or folder that others may have had a hand in, or that is none of ours; the message says why, and the remedy."""


def cache_folder() -> Path:
    """``$GOOGLENET_FUSED_CACHE``, else ``$XDG_CACHE_HOME/googlenet_fused``, else ``~/.cache/googlenet_fused``; not made here.

    Raises:
        OSError: it is in the user's home folder, and nobody knows that.
    """
    own, xdg = os.environ.get("GOOGLENET_FUSED_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(own or os.path.join(xdg if os.path.isabs(xdg) else "~/.cache", "googlenet_fused"))
    try:
        found = folder.expanduser()
        if folder.parts[:1] == ("~",) and (os.environ.get("HOME") == "" or not found.is_absolute()):
            raise RuntimeError(f"HOME is {os.environ.get('HOME')!r}, no absolute path.")
    except RuntimeError as error:
        raise OSError(f"there is no folder for the cache: {error} Set GOOGLENET_FUSED_CACHE to one") from error
    return found


def read_json(path: Path) -> Any:
    """What the file holds, or None if there is no such file. A symlink is judged by what it leads to.

    Raises:
        UnsafeFile: the file or its folder belongs to another user than this one or root, or group or others may write to it;
            or it is no regular file, or larger than ``LIMIT``. Owners and modes are not asked for where there are no user ids.
        ValueError: it is not JSON.
        OSError: it cannot be read.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise UnsafeFile(f"{path} is not a regular file: remove it")
    _refuse_unless_own(target.parent, path)
    _refuse_unless_own(target, path)
    with open(target, "rb") as file:
        content = file.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise UnsafeFile(f"{path} is larger than the {LIMIT} bytes that such a file may have: remove it")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a file (mode 0600) whole or not at all; its folder is made (0700) if there is none. A symlink stays one.

    Raises:
        UnsafeFile: the folder belongs to another user than this one or root, or group or others may write to it.
        OSError: the file cannot be written.
        TypeError: ``value`` cannot be said in JSON.
    """
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    target = Path(os.path.realpath(path))
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_unless_own(target.parent, path)
    handle, beside = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".new", dir=target.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        os.unlink(beside)
        raise


def _refuse_unless_own(part: Path, path: Path) -> None:
    """Raise UnsafeFile if others may have changed ``part``, which is ``path`` or its folder with all symlinks resolved."""
    if not hasattr(os, "getuid"):
        return
    found, quoted = part.stat(), shlex.quote(str(part))
    if found.st_uid not in (os.getuid(), 0):
        raise UnsafeFile(f"{path} is not safe: {part} belongs to user {found.st_uid}; chown {os.getuid()} {quoted}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeFile(f"{path} is not safe: its group or others may write to {part}; chmod go-w {quoted}")
