"""Compiling GPU kernels ahead: needs the compiler, no GPU."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

HEAD_DIM = 16


@pytest.fixture
def cache(mate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of compiled kernels, which is not there yet."""
    monkeypatch.setenv("MATE_CACHE_DIR", str(tmp_path / "probe"))
    try:
        mate._library.compile_kernel("probe", 'extern "C" __global__ void probe() {}')
    except RuntimeError as reason:
        if "pip install" not in str(reason):
            raise
        pytest.skip(str(reason))
    monkeypatch.setenv("MATE_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def three_tiny_kernels(mate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the library's kernels, which take longer to compile."""

    def kernel_sources(
        head_dim: int,
        head_dim_v: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        out_dtype: torch.dtype,
        softcap: bool,
        qv: bool,
    ) -> list[tuple[str, str]]:
        types = "_".join(str(x).removeprefix("torch.") for x in (dtype, kv_dtype, out_dtype))
        kind = f"{head_dim}_{head_dim_v}_{types}_{softcap}_{qv}"
        names = [f"tiny_{kind}_{i}" for i in range(3)]
        return [(name, f'extern "C" __global__ void {name}() {{}}') for name in names]

    monkeypatch.setattr(mate._library, "kernel_sources", kernel_sources)


@pytest.mark.usefixtures("three_tiny_kernels")
def test_kernels_are_compiled_once(mate: ModuleType, cache: Path) -> None:
    assert mate.warmup(HEAD_DIM) == 3
    assert len(list(cache.iterdir())) == 3
    assert mate.warmup(HEAD_DIM) == 0


@pytest.mark.usefixtures("three_tiny_kernels")
def test_kernels_follow_from_the_arguments(mate: ModuleType, cache: Path) -> None:
    assert mate.warmup(HEAD_DIM) == 3
    assert mate.warmup(HEAD_DIM, HEAD_DIM) == 0
    assert mate.warmup(HEAD_DIM, 2 * HEAD_DIM) == 3
    assert mate.warmup(HEAD_DIM, dtypes=(torch.bfloat16, torch.float16)) == 3
    assert mate.warmup(HEAD_DIM, kv_dtype=torch.float8_e4m3fn) == 3
    assert mate.warmup(HEAD_DIM, dtypes=(torch.float8_e4m3fn,)) == 3
    assert mate.warmup(HEAD_DIM, dtypes=(torch.float8_e4m3fn,), out_dtype=torch.bfloat16) == 0
    assert mate.warmup(HEAD_DIM, dtypes=(torch.float8_e4m3fn,), out_dtype=torch.float16) == 3
    assert mate.warmup(HEAD_DIM, softcap=True) == 3
    assert mate.warmup(HEAD_DIM, qv=True) == 3


@pytest.mark.usefixtures("three_tiny_kernels")
def test_progress_is_shown_on_stderr(mate: ModuleType, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mate.warmup(HEAD_DIM, jobs=1)
    shown = capfd.readouterr()
    assert "1/3" in shown.err
    assert shown.err.endswith("3/3\n")
    assert shown.out == ""
    mate.warmup(HEAD_DIM, progress=False)
    assert capfd.readouterr().err == ""


def test_warmup_on_the_command_line(mate: ModuleType, cache: Path) -> None:
    head_dim = 512  # for which there are the fewest kernels
    kernels = len(mate._library.kernel_sources(head_dim, head_dim, *[torch.bfloat16] * 3, False, False))
    command = [sys.executable, "-m", "mate", "warmup", "--head-dim", str(head_dim), "--dtype", "bfloat16"]
    for compiled in (kernels, 0):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout == f"{compiled} kernels compiled\n"
    assert len(list(cache.iterdir())) == kernels


def test_wrong_arguments_are_refused(mate: ModuleType, cache: Path) -> None:
    with pytest.raises(TypeError, match="dtype must be bfloat16 or float16 or float8_e4m3fn, got float32"):
        mate.warmup(HEAD_DIM, dtypes=(torch.float32,))
    for head_dim in (0, 513):
        with pytest.raises(ValueError, match=f"head_dim must be from 1 to 512, got {head_dim}"):
            mate.warmup(head_dim)
        with pytest.raises(ValueError, match=f"head_dim_v must be from 1 to 512, got {head_dim}"):
            mate.warmup(HEAD_DIM, head_dim)
    with pytest.raises(TypeError, match="head_dim must be an integer"):
        mate.warmup("64")
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        mate.warmup(HEAD_DIM, jobs=0)
    command = [sys.executable, "-m", "mate", "warmup", "--head-dim", "0"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "python -m mate: head_dim must be from 1 to 512, got 0\n"
    assert not cache.exists()


@pytest.mark.usefixtures("three_tiny_kernels")
def test_a_folder_that_others_may_write_to_is_refused(mate: ModuleType, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(ValueError, match="MATE_CACHE_DIR"):
        mate.warmup(HEAD_DIM)
    assert not list(cache.iterdir())


def test_a_source_that_does_not_compile_is_a_runtime_error(mate: ModuleType, cache: Path) -> None:
    with pytest.raises(RuntimeError, match="no_such_type"):
        mate._library.compile_kernel("wrong", "no_such_type x;")
