"""Builds leank._C; metadata is in pyproject.toml. It needs NumPy headers and a C11 compiler.

Environment: LEANK_WERROR=1 makes warnings errors, LEANK_DEBUG=1 builds without optimisation and
with assertions, LEANK_SANITIZE=address,undefined builds and links with sanitizers and assertions.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wextra"]
LANGUAGE = ["-std=c11", "-fvisibility=hidden"]
X86_V4 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]

# Variant of csrc/decode_<name>.c: its flags, and a file that compiles where it can be built, so
# that an old compiler loses a variant and not the build. Only that file gets the flags. It and
# dispatch.c get the macro LK_BUILD_<NAME>; without the macro the file compiles to nothing.
ISAS = {
    "avx2": (
        ["-mavx2", "-mfma", "-mf16c"],
        "#include <immintrin.h>\n"
        "__m256 f(__m256 a, __m128i h) { return _mm256_fmadd_ps(a, a, _mm256_cvtph_ps(h)); }\n"
        "__m256i g(__m256i a) { return _mm256_slli_epi32(a, 16); }\n",
    ),
    "avx512": (
        X86_V4,
        "#include <immintrin.h>\n"
        "__m512 f(__m512 a, __m256i h) { return _mm512_fmadd_ps(a, a, _mm512_cvtph_ps(h)); }\n"
        "__m512i g(__mmask32 m, const void *p) { return _mm512_maskz_loadu_epi16(m, p); }\n",
    ),
    "avx512bf16": (
        [*X86_V4, "-mavx512bf16"],
        "#include <immintrin.h>\n"
        "__m512 f(__m512 a, __m512bh b) { return _mm512_dpbf16_ps(a, b, b); }\n",
    ),
    "neon": (
        [],
        "#ifndef __aarch64__\n#error AArch64 only\n#endif\n"
        "#include <arm_neon.h>\n"
        "float32x4_t f(float32x4_t a) { return vfmaq_f32(a, a, a); }\n",
    ),
}

OPENMP_PROBE = "#include <omp.h>\nint f(void) { return omp_get_max_threads(); }\n"


def compiles(command, text, flags, link=False):
    """Whether the compiler command accepts a file of this text; `link` tries a shared library."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(text)
        action = ["-shared", "-fPIC"] if link else ["-c"]
        done = subprocess.run(
            [*command, *flags, *action, str(source), "-o", str(Path(folder, "probe.out"))],
            capture_output=True,
            check=False,
        )
    return done.returncode == 0


def built_isas(command):
    """Names of the variants that this compiler can build."""
    return [name for name, (flags, probe) in ISAS.items() if compiles(command, probe, flags)]


def source_flags(source, isas):
    """Return macros and flags that one C file gets beside the common ones."""
    stem = Path(source).stem
    if stem == "dispatch":
        return [f"-DLK_BUILD_{name.upper()}=1" for name in isas]
    name = stem.removeprefix("decode_")
    if name != stem and name in isas:
        return [f"-DLK_BUILD_{name.upper()}=1", *ISAS[name][0]]
    return []


def mode_flags():
    """Return flags for compiling and for linking that the environment asks for."""
    # Python's own flags ask for debug information, which doubles the time for the unrolled bodies.
    compiling, linking = ["-O3", "-g0"], []
    if os.environ.get("LEANK_DEBUG") == "1":
        compiling = ["-O0", "-g", "-UNDEBUG", "-DLK_DEBUG=1"]
    if sanitizers := os.environ.get("LEANK_SANITIZE"):
        linking = [f"-fsanitize={sanitizers}"]
        compiling = ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer"]
        compiling += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    if os.environ.get("LEANK_WERROR") == "1":
        compiling.append("-Werror")
    return compiling, linking


class BuildWithIsaFlags(build_ext):
    """Compile each C file with its own flags."""

    def finalize_options(self):
        super().finalize_options()
        # setuptools compares file times only; a build with other flags must not keep the old file.
        self.force = True

    def build_extension(self, ext):
        command = self.compiler.compiler_so
        compiling, linking = mode_flags()
        if compiles(command, OPENMP_PROBE, ["-fopenmp"], link=True):
            compiling, linking = [*compiling, "-fopenmp"], [*linking, "-fopenmp"]
        else:
            self.warn("the C compiler has no OpenMP: leank will use one thread")
        isas = built_isas(command)
        print(f"leank: variants beside scalar: {', '.join(isas) or 'none'}", file=sys.stderr)
        include_dirs = [*ext.include_dirs, numpy_include()]

        def compile_one(source):
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=include_dirs,
                extra_postargs=[*LANGUAGE, *WARNINGS, *compiling, *source_flags(source, isas)],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        sources, ext.sources, ext.extra_objects = ext.sources, [], objects
        ext.extra_link_args = linking
        try:
            super().build_extension(ext)
        finally:
            ext.sources = sources


def numpy_include():
    """Folder of the NumPy headers; imported late, so that `sdist` needs no NumPy."""
    import numpy

    return numpy.get_include()


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "leank._C",
                sources=sorted(str(path) for path in Path("csrc").glob("*.c")),
                depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            )
        ],
        cmdclass={"build_ext": BuildWithIsaFlags},
    )
