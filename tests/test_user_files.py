"""Files in the user's cache: where they are, who may have written them, and writing them whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import message_of

from googlenet_fused import user_files
from googlenet_fused.user_files import UnsafeFile, cache_folder, check_writable, read_json, write_json

posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs user ids")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that is safe to read, in a folder that is."""
    path = tmp_path / "cache/facts.json"
    write_json(path, {"a": 1})
    return path


# The folder.


def set_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("GOOGLENET_FUSED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **values}.items():
        monkeypatch.setenv(name, value)


@posix
@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, "/home/someone/.cache/googlenet_fused"),
        ({"XDG_CACHE_HOME": "/var/xdg"}, "/var/xdg/googlenet_fused"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/someone/.cache/googlenet_fused"),
        ({"XDG_CACHE_HOME": ""}, "/home/someone/.cache/googlenet_fused"),
        ({"GOOGLENET_FUSED_CACHE": "/own", "XDG_CACHE_HOME": "/var/xdg"}, "/own"),
        ({"GOOGLENET_FUSED_CACHE": "~/own"}, "/home/someone/own"),
        ({"GOOGLENET_FUSED_CACHE": "", "XDG_CACHE_HOME": "/var/xdg"}, "/var/xdg/googlenet_fused"),
    ],
)
def test_the_folder(environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, **environment)
    assert cache_folder() == Path(folder)


def test_asking_for_the_folder_does_not_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, GOOGLENET_FUSED_CACHE=str(tmp_path / "own"))
    assert not cache_folder().exists()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    set_environment(monkeypatch)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(OSError, match=r"no folder for the cache: Could .* Set GOOGLENET_FUSED_CACHE to one"):
        cache_folder()


@posix
@pytest.mark.parametrize("home", ["", "relative"])
def test_a_home_that_is_no_absolute_path(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache would lie in the root, or in whatever folder the process is in."""
    for environment in ({}, {"XDG_CACHE_HOME": "relative"}, {"GOOGLENET_FUSED_CACHE": "~/own"}, {"GOOGLENET_FUSED_CACHE": "~"}):
        set_environment(monkeypatch, HOME=home, **environment)
        with pytest.raises(OSError, match=f"no folder for the cache: HOME is '{home}', no absolute path"):
            cache_folder()
    set_environment(monkeypatch, HOME=home, XDG_CACHE_HOME="/var/xdg")
    assert cache_folder() == Path("/var/xdg/googlenet_fused")
    set_environment(monkeypatch, HOME=home, GOOGLENET_FUSED_CACHE="/own")
    assert cache_folder() == Path("/own")


# Reading.


@pytest.mark.parametrize("value", [{"b": [1, 2.5, None], "a": "ü"}, [], None, "text"])
def test_what_is_written_is_read(value: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "cache/file.json", value)
    assert read_json(tmp_path / "cache/file.json") == value


def test_there_is_no_such_file(tmp_path: Path) -> None:
    assert read_json(tmp_path / "file.json") is None
    assert read_json(tmp_path / "no/such/file.json") is None
    (tmp_path / "dangling.json").symlink_to(tmp_path / "file.json")
    assert read_json(tmp_path / "dangling.json") is None
    assert list(tmp_path.iterdir()) == [tmp_path / "dangling.json"], "nothing is made by looking"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 200_000])
def test_no_json(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not JSON") as error:
        read_json(file)
    assert message_of(error).startswith(f"{file} ")
    assert "remove it" in str(error.value)


def belong_to_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives ``path`` to somebody else, or makes everything somebody else's where that is not allowed."""
    if os.getuid() == 0:
        os.chown(path, 4321, -1)
    else:
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)


@posix
@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_what_others_may_write_is_not_read(where: str, bits: int, file: Path) -> None:
    part = file if where == "file" else file.parent
    part.chmod(mode_of(part) | bits)
    with pytest.raises(UnsafeFile) as error:
        read_json(file)
    message = message_of(error)
    assert message.startswith(f"{file} is not safe")
    command = message.partition("; ")[2]
    assert command == f"chmod go-w {part}"
    assert os.system(command) == 0
    assert read_json(file) == {"a": 1}, "the remedy is one"


@posix
@pytest.mark.parametrize("where", ["file", "folder"])
def test_what_belongs_to_another_is_not_read(where: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = file if where == "file" else file.parent
    belong_to_another(part, monkeypatch)
    with pytest.raises(UnsafeFile, match=r"belongs to user [0-9]+; ") as error:
        read_json(file)
    assert message_of(error).startswith(f"{file} is not safe")
    assert message_of(error).endswith("; remove it" if where == "file" else f"; {user_files.ELSEWHERE}")


@posix
def test_of_a_folder_for_everybody_it_is_not_said_that_it_be_changed(file: Path) -> None:
    file.parent.chmod(0o1777)
    for use in (read_json, lambda path: write_json(path, 1)):
        with pytest.raises(UnsafeFile, match=f"others may write to {file.parent}; {user_files.ELSEWHERE}$"):
            use(file)


@posix
def test_what_root_lets_a_group_write_is_not_for_others_to_change(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give files to root")
    file.parent.chmod(0o775)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    with pytest.raises(UnsafeFile, match=f"{user_files.ELSEWHERE}$"):
        read_json(file)


def test_a_file_that_the_user_named_is_theirs_to_look_after(file: Path) -> None:
    file.parent.chmod(0o1777)
    file.chmod(0o666)
    assert read_json(file, named=True) == {"a": 1}
    write_json(file, 2, named=True)
    check_writable(file, named=True)
    assert read_json(file, named=True) == 2
    file.write_text("{")
    with pytest.raises(ValueError, match=r"is not JSON \(.*\): name another file$"):
        read_json(file, named=True)
    file.write_bytes(b" " * (user_files.LIMIT + 1))
    with pytest.raises(UnsafeFile, match=r"may have: name another file$"):
        read_json(file, named=True)
    with pytest.raises(UnsafeFile, match=r"is not a regular file: name another file$"):
        read_json(file.parent, named=True)
    with pytest.raises(OSError, match=f"cannot write {file}/x.json: .*; name another file$"):
        write_json(file / "x.json", 1, named=True)


@posix
def test_what_root_owns_is_safe(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give files to root")
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    assert read_json(file) == {"a": 1}


@posix
def test_the_remedy_is_quoted(tmp_path: Path) -> None:
    file = tmp_path / "two words; true/facts.json"
    write_json(file, 1)
    file.chmod(0o666)
    with pytest.raises(UnsafeFile, match=r"chmod go-w '.*/two words; true/facts\.json'"):
        read_json(file)


@posix
def test_others_may_read(file: Path) -> None:
    file.chmod(0o644)
    file.parent.chmod(0o755)
    assert read_json(file) == {"a": 1}


def test_a_link_is_judged_by_what_it_leads_to(tmp_path: Path, file: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(file)
    assert read_json(link) == {"a": 1}
    if hasattr(os, "getuid"):
        file.parent.chmod(0o777)
        with pytest.raises(UnsafeFile, match=f"chmod go-w {file.parent}") as error:
            read_json(link)
        assert message_of(error).startswith(f"{link} ")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@posix
@pytest.mark.parametrize("make", [make_folder, make_pipe])
def test_only_regular_files_are_read(make: Callable[[Path], None], file: Path) -> None:
    file.unlink()
    make(file)
    with pytest.raises(UnsafeFile, match=f"is not a regular file: {user_files.ELSEWHERE}$") as error:
        read_json(file)
    assert message_of(error).startswith(f"{file} ")


def test_a_file_too_large(file: Path) -> None:
    content = b'"' + b"x" * (user_files.LIMIT - 2) + b'"'
    file.write_bytes(content)
    assert len(read_json(file)) == user_files.LIMIT - 2
    file.write_bytes(content + b" ")
    with pytest.raises(UnsafeFile, match=f"is larger than the {user_files.LIMIT} bytes") as error:
        read_json(file)
    assert message_of(error).startswith(f"{file} ")


def test_without_user_ids_owners_and_modes_are_not_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where every file that can be written has mode 666."""
    file.chmod(0o666)
    monkeypatch.delattr(os, "getuid", raising=False)
    assert read_json(file) == {"a": 1}
    write_json(file, 2)
    assert read_json(file) == 2


# Writing.


@posix
def test_modes(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_json(tmp_path / "deep/cache/file.json", 1)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "deep/cache") == 0o700
    assert mode_of(tmp_path / "deep/cache/file.json") == 0o600


def test_it_can_be_read_by_people(file: Path) -> None:
    write_json(file, {"b": 1, "a": [2]})
    text = file.read_text(encoding="utf-8")
    assert text.splitlines() == ["{", ' "a": [', "  2", " ],", ' "b": 1', "}"]
    assert text.endswith("\n")


def test_another_file_takes_the_old_ones_place(file: Path) -> None:
    with open(file, encoding="utf-8") as old:
        write_json(file, {"a": 2})
        assert json.load(old) == {"a": 1}, "who reads meanwhile reads the old one whole"
    assert read_json(file) == {"a": 2}
    assert list(file.parent.iterdir()) == [file]


@posix
def test_a_file_that_is_not_safe_is_replaced_by_one_that_is(file: Path) -> None:
    file.chmod(0o666)
    write_json(file, {"a": 2})
    assert mode_of(file) == 0o600
    assert read_json(file) == {"a": 2}


def test_a_link_stays_one(tmp_path: Path, file: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(file)
    write_json(link, {"a": 2})
    assert link.is_symlink()
    assert json.loads(file.read_text()) == {"a": 2}


@posix
@pytest.mark.parametrize("spoil", ["mode", "owner"])
def test_nothing_is_written_to_a_folder_that_is_not_safe(spoil: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if spoil == "mode":
        file.parent.chmod(0o770)
    else:
        belong_to_another(file.parent, monkeypatch)
    with pytest.raises(UnsafeFile, match=f"{file} is not safe: .*; (chmod go-w {file.parent}|{user_files.ELSEWHERE})$"):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(file.parent.iterdir()) == [file]


def refuse(*_: object) -> None:
    raise OSError("the disk is full")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(step: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OSError, match="the disk is full"):
        write_json(file, {"a": 2})
    assert read_json(file) == {"a": 1}
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_to_is_named_with_the_remedy(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**options: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", f"{options['dir']}/random")

    monkeypatch.setattr(user_files.tempfile, "mkstemp", read_only)
    for write in (lambda: write_json(file, 1), lambda: check_writable(file)):
        with pytest.raises(OSError, match="cannot write") as error:
            write()
        assert message_of(error) == f"cannot write {file}: Read-only file system; {user_files.ELSEWHERE}"


def test_a_cache_that_is_a_file(file: Path) -> None:
    with pytest.raises(OSError, match=f"^{file}/x.json is not in a folder: {user_files.ELSEWHERE}$"):
        read_json(file / "x.json")
    with pytest.raises(OSError, match=f"^cannot write {file}/x.json: .*; {user_files.ELSEWHERE}$"):
        write_json(file / "x.json", 1)


def test_to_see_whether_it_can_be_written_leaves_no_file(tmp_path: Path) -> None:
    check_writable(tmp_path / "cache/file.json")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"a": 2})
    assert list(file.parent.iterdir()) == [file]


def test_what_json_cannot_say_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "cache/file.json", {1, 2})
    assert list(tmp_path.iterdir()) == []


def test_it_is_on_the_disk_before_it_takes_its_place(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, object]] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append(("fsync", os.fstat(handle).st_size)) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *paths: order.append(("replace", Path(paths[0]).parent)) or replace(*paths))
    write_json(file, 12345)
    assert order == [("fsync", 6), ("replace", file.parent)], "beside it: only within a file system is that one step"
