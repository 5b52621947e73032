"""Builds the native CPU kernels: csrc/ as one plain shared object for each instruction set.

They are C libraries that `xopd_kernels.native` loads, not Python modules, and know nothing of
Python or torch: no headers of either are needed, and one build serves every version of both.
Without a C++ compiler the package installs without them and says so.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

SOURCES = [
    "csrc/divergence/cpu.cpp",
    "csrc/matmul/cpu.cpp",
    "csrc/matmul/rounding.cpp",
    "csrc/matmul/scores.cpp",
    "csrc/softmax/cpu.cpp",
    "csrc/sparse/draw.cpp",
    "csrc/sparse/entries.cpp",
    "csrc/sparse/shortlist.cpp",
]
HEADERS = sorted(path.as_posix() for path in Path("csrc").rglob("*.h"))
# No -ffast-math: sums keep their order, and NaN and infinities their meaning.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra"]
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


def instruction_sets() -> dict[str, list[str]]:
    """Compiler flags of each shared object; "portable" is the baseline of the machine."""
    sets: dict[str, list[str]] = {"portable": []}
    if platform.machine() in ("x86_64", "AMD64"):
        sets |= {"avx2": _AVX2, "avx512": [*_AVX2, *_AVX512]}
    return sets


class BuildNative(build_ext):
    """Compiles and links without Python's headers, under a name without Python's version."""

    is_for_checkout = False

    def run(self) -> None:
        # Noted now: while it builds, setuptools says that nothing is in place.
        self.is_for_checkout = bool(self.inplace) or self.editable_mode
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = self.get_ext_fullpath(ext.name)
        inputs = [Path(name) for name in (*ext.sources, *ext.depends)]
        built = Path(target)
        if built.exists() and all(p.stat().st_mtime < built.stat().st_mtime for p in inputs):
            return
        # Not the old one under new sources, should they not compile; in the checkout only where
        # that is what is installed.
        built.unlink(missing_ok=True)
        if self.is_for_checkout:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        # The same sources once more: their objects go to a folder of their own.
        folder = Path(self.build_temp, ext.name)
        try:
            objects = self.compiler.compile(
                ext.sources,
                output_dir=str(folder),
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args,
            )
            self.compiler.link_shared_object(objects, target, target_lang="c++")
        except (CompileError, LinkError, PlatformError) as error:
            self.warn(
                f"{ext.name} was not built ({error}); the package works without it, and slower on "
                "a CPU. Install a C++17 compiler (g++, or another one in CXX) and the package again"
            )


class Wheel(bdist_wheel):
    """Tagged for the platform alone: any Python 3 loads what is in it."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


def extensions() -> list[Extension]:
    """One shared object for each instruction set: xopd_kernels/_native_<name>.so."""
    return [
        Extension(
            f"xopd_kernels._native_{name}",
            SOURCES,
            include_dirs=["csrc"],
            depends=[*HEADERS, "setup.py"],
            extra_compile_args=[*FLAGS, *WARNINGS, *flags],
            language="c++",
            optional=True,
        )
        for name, flags in instruction_sets().items()
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
