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

ELSEWHERE = "name a folder of your own with GOOGLENET_FUSED_CACHE"
ANOTHER = "name another file"
"""The remedies that touch nothing: of what is kept in the cache, and of a file that the user named."""


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


def read_json(path: Path, *, remedy: str = "remove it", named: bool = False) -> Any:
    """What the file holds, or None if there is no such file. A symlink is judged by what it leads to.

    Args:
        remedy: what the message is to say if the content of the file is at fault.
        named: the user named this very file and does not ask for it to be trusted, as a file in the cache is: it is nobody's
            business who may write to it, and the remedy is always to name another.

    Raises:
        UnsafeFile: the file or its folder belongs to another user than this one or root, or group or others may write to it;
            or it is no regular file, or larger than ``LIMIT``. Owners and modes are not asked for where there are no user ids.
        ValueError: it is not JSON.
        OSError: it cannot be read.
    """
    target, elsewhere = Path(os.path.realpath(path)), ELSEWHERE
    if named:
        remedy = elsewhere = ANOTHER
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UnsafeFile(f"{path} is not in a folder: {elsewhere}") from error
    if not stat.S_ISREG(mode):
        raise UnsafeFile(f"{path} is not a regular file: {elsewhere}")
    if not named:
        _refuse_unless_own(target.parent, path)
        _refuse_unless_own(target, path)
    with open(target, "rb") as file:
        content = file.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise UnsafeFile(f"{path} is larger than the {LIMIT} bytes that such a file may have: {remedy}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): {remedy}") from error


def write_json(path: Path, value: Any, *, named: bool = False) -> None:
    """Writes a file (mode 0600) whole or not at all; its folder is made (0700) if there is none. A symlink stays one.

    Args:
        named: as for ``read_json``.

    Raises:
        UnsafeFile: the folder belongs to another user than this one or root, or group or others may write to it.
        OSError: the file cannot be written; names it and not the one that is written beside it at first.
        TypeError: ``value`` cannot be said in JSON.
    """
    _write(path, json.dumps(value, indent=1, sort_keys=True) + "\n", named)


def check_writable(path: Path, *, named: bool = False) -> None:
    """Raises what ``write_json`` would raise of the path; makes the folder as it does, and leaves no file."""
    _write(path, None, named)


def _write(path: Path, text: str | None, named: bool) -> None:
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not named:
            _refuse_unless_own(target.parent, path)
        handle, beside = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".new", dir=target.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text or "")
                file.flush()
                os.fsync(file.fileno())
            if text is None:
                os.unlink(beside)
            else:
                os.replace(beside, target)
        except BaseException:
            os.unlink(beside)
            raise
    except UnsafeFile:
        raise
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; {ANOTHER if named else ELSEWHERE}") from error


def _refuse_unless_own(part: Path, path: Path) -> None:
    """Raise UnsafeFile if others may have changed ``part``, which is ``path`` or its folder with all symlinks resolved.

    A folder of somebody else's, or one that is meant for everybody, is to be left as it is, above all by root.
    """
    if not hasattr(os, "getuid"):
        return
    found = part.stat()
    folder, own = stat.S_ISDIR(found.st_mode), found.st_uid == os.getuid()
    remedy = ELSEWHERE if folder else "remove it"
    if not own and found.st_uid != 0:
        raise UnsafeFile(f"{path} is not safe: {part} belongs to user {found.st_uid}; {remedy}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        if own and not found.st_mode & stat.S_ISVTX:
            remedy = f"chmod go-w {shlex.quote(str(part))}"
        raise UnsafeFile(f"{path} is not safe: its group or others may write to {part}; {remedy}")
