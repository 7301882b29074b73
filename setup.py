"""Builds the native library if it can; all else about the package is declared in pyproject.toml.

GOOGLENET_FUSED_BUILD says what is wanted: ``auto`` (the default) builds it where nvcc and torch are found, ``cuda`` fails where
they are not, ``none`` installs without it.
"""

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit(
        "error: this setuptools is too old: pip install --upgrade setuptools, or leave out --no-build-isolation"
    ) from None

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("googlenet_fused", "backends", "cuda")

spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
native_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native_build)


@cache
def why_without() -> str | None:
    try:
        return native_build.why_without(os.environ.get("GOOGLENET_FUSED_BUILD"))
    except native_build.BuildError as error:
        raise SystemExit(f"error: {error}") from error


class MaybeBinary(Distribution):
    def has_ext_modules(self) -> bool:
        return why_without() is None


class BuildNative(Command):
    description = "build the CUDA library"
    user_options: ClassVar = []

    def initialize_options(self) -> None:
        self.editable_mode = False
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        folder = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / PACKAGE
        try:
            native_build.install_library(folder, why_without(), in_place=self.editable_mode)
        except native_build.BuildError as error:
            raise SystemExit(f"error: {error}") from error


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the library knows nothing of Python


setup(distclass=MaybeBinary, cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel})
