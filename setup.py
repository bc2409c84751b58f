"""Builds leank._C, and leank._cuda where a CUDA Toolkit is found; metadata is in pyproject.toml.

leank._C needs NumPy headers and a C11 compiler.

Environment: LEANK_WERROR=1 makes warnings errors, LEANK_DEBUG=1 builds without optimisation and
with assertions, LEANK_SANITIZE=address,undefined builds and links with sanitizers and assertions.
LEANK_CUDA=0 leaves leank._cuda out, =1 makes it fatal when it cannot be built; with auto (the
default) a failure is a warning. nvcc is looked for in CUDA_HOME, then in PATH.
LEANK_CUDA_ARCHS="80,89,90+PTX" lists compute capabilities; +PTX is for GPUs that come later.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WARNINGS = ["-Wall", "-Wextra"]
# C alone: what nvcc makes of kernels is not written for these.
C_WARNINGS = [*WARNINGS, "-Wconversion", "-Wsign-conversion", "-Wshadow"]
LANGUAGE = ["-std=c11", "-fvisibility=hidden"]
X86_V4 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]

# Variant of csrc/decode_<name>.c and learn_<name>.c: its flags, and a file that compiles where it
# can be built, so that an old compiler loses a variant and not the build. Only those files get the
# flags. They and dispatch.c get the macro LK_BUILD_<NAME>; without it they compile to nothing.
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

CUDA_ARCHS = "80,89,90+PTX"
# The C files that leank._cuda shares with leank._C.
CUDA_SHARED = ["csrc/alloc.c", "csrc/mask.c", "csrc/status.c"]

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
    operation, _, name = stem.partition("_")
    if operation in ("decode", "learn") and name in isas:
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


def find_nvcc():
    """Return the path of nvcc, or None: LEANK_CUDA=0 or no toolkit. Fatal with LEANK_CUDA=1."""
    wanted = os.environ.get("LEANK_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"LEANK_CUDA: expected 'auto', '0' or '1', got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        sys.exit("LEANK_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor in PATH")
    return nvcc


def cuda_archs():
    """Return (nvcc's flags, the names for leank.capabilities) of LEANK_CUDA_ARCHS."""
    flags, names = [], []
    for arch in os.environ.get("LEANK_CUDA_ARCHS", CUDA_ARCHS).replace(";", ",").split(","):
        number, plus, ptx = arch.strip().partition("+")
        if not number.rstrip("a").isdigit() or (plus and ptx != "PTX"):
            sys.exit(f"LEANK_CUDA_ARCHS: expected a list as '{CUDA_ARCHS}', got {arch!r}")
        codes = [f"sm_{number}", *([f"compute_{number}"] if plus else [])]
        flags += ["-gencode", f"arch=compute_{number},code=[{','.join(codes)}]"]
        names += codes
    return flags, ",".join(names)


class BuildWithIsaFlags(build_ext):
    """Compile each C file with its own flags."""

    def finalize_options(self):
        super().finalize_options()
        # setuptools compares file times only; a build with other flags must not keep the old file.
        self.force = True

    def run(self):
        # Kernels of an earlier build would go with this one if it does not build them.
        folders = [Path(self.build_lib, "leank"), *([Path("leank")] if self.inplace else [])]
        for stale in (path for folder in folders for path in folder.glob("_cuda.*.so")):
            stale.unlink()
        super().run()

    def build_extension(self, ext):
        if ext.name == "leank._cuda":
            self.build_cuda(ext)
        else:
            self.build_core(ext)

    def build_core(self, ext):
        command = self.compiler.compiler_so
        compiling, linking = mode_flags()
        if compiles(command, OPENMP_PROBE, ["-fopenmp"], link=True):
            compiling, linking = [*compiling, "-fopenmp"], [*linking, "-fopenmp"]
        else:
            self.warn("the C compiler has no OpenMP: leank will use one thread")
        isas = built_isas(command)
        print(f"leank: variants beside scalar: {', '.join(isas) or 'none'}", file=sys.stderr)

        def compile_one(source):
            return self.compile_c(ext, source, [*compiling, *source_flags(source, isas)])

        objects = compile_all(compile_one, ext.sources)
        sources, ext.sources, ext.extra_objects = ext.sources, [], objects
        ext.extra_link_args = linking
        try:
            super().build_extension(ext)
        finally:
            ext.sources = sources

    def build_cuda(self, ext):
        nvcc = find_nvcc()
        compiling, linking = mode_flags()
        flags, names = cuda_archs()
        host = ["-fPIC", "-fvisibility=hidden", *WARNINGS]
        common = ["-std=c++17", "-O3", "-Icsrc", "-Ikernels", f'-DLK_CUDA_BUILT="{names}"', *flags]
        common += ["-Xcompiler", ",".join(host)]
        if os.environ.get("LEANK_WERROR") == "1":
            common += ["-Werror", "all-warnings"]

        def compile_one(source):
            if not source.endswith(".cu"):
                return self.compile_c(ext, source, [*compiling, "-Icsrc", "-Ikernels"])
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([nvcc, *common, "-c", source, "-o", str(target)], check=True)
            return [str(target)]

        print(f"leank: CUDA kernels for {names}", file=sys.stderr)
        try:
            objects = compile_all(compile_one, ext.sources)
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # nvcc knows where its static runtime is.
            linking = ["-Xcompiler", ",".join(linking)] if linking else []
            subprocess.run(
                [nvcc, "-shared", "-cudart", "static", *linking, *objects, "-o", str(target)],
                check=True,
            )
        except (OSError, subprocess.CalledProcessError, CompileError) as error:
            if os.environ.get("LEANK_CUDA") == "1":
                raise
            self.warn(f"leank._cuda was not built, there will be no CUDA: {error}")

    def compile_c(self, ext, source, flags):
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            include_dirs=[*ext.include_dirs, numpy_include()],
            extra_postargs=[*LANGUAGE, *C_WARNINGS, *flags],
        )


def compile_all(compile_one, sources):
    """Return the objects of the sources, compiled on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [name for names in pool.map(compile_one, sources) for name in names]


def numpy_include():
    """Folder of the NumPy headers; imported late, so that `sdist` needs no NumPy."""
    import numpy

    return numpy.get_include()


def extensions():
    """Return the extensions that this machine can build."""

    def files(*patterns):
        return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))

    yield Extension("leank._C", sources=files("csrc/*.c"), depends=files("csrc/*.h"))
    if find_nvcc():
        yield Extension(
            "leank._cuda",
            sources=files("kernels/*.c", "kernels/*.cu", "kernels/inst/*.cu") + CUDA_SHARED,
            depends=files("kernels/*.h", "kernels/*.cuh", "csrc/leank.h", "csrc/lk_internal.h"),
            optional=os.environ.get("LEANK_CUDA") != "1",
        )


if __name__ == "__main__":
    setup(ext_modules=list(extensions()), cmdclass={"build_ext": BuildWithIsaFlags})
