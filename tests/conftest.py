"""Four virtual CPU devices, and run-time checks of every annotated shape and type.

The checks take a tenth of the time: MROS_CHECK_TYPES=0, as in `make test`, leaves them out.
"""

import gc
import os
import pathlib
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()

import functools

import jax
import jaxtyping
import pytest

from tests.recorded import TORCH, look_up

jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

gc.set_threshold(50_000)  # as in commands, see `mros_jax.console`

if os.environ.get("MROS_CHECK_TYPES", "1") == "1":
    # An int is good enough for a float.
    jaxtyping.install_import_hook(
        "mros_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )


# A file is one worker's, see Makefile; with these first, none has a long one left at the end.
LONGEST = (
    *("test_train.py", "test_stages.py", "test_contract.py", "test_recorded.py"),
    *("test_scripts.py", "test_systems.py"),
)


def pytest_report_header():
    return None if TORCH else "without PyTorch: against what it gave before; no tests/parity"


def pytest_collection_modifyitems(items):
    for item in items:
        if {"recorded", "torch"} & set(item.fixturenames):
            item.add_marker("pytorch")
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Decoded images of all workers: the embedded ones are rendered once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "images"


@pytest.fixture
def recorded(request):
    """`recorded(compute)`: the arrays by name that `compute` gets from PyTorch, or once got."""
    return functools.partial(look_up, request.node.nodeid)


@pytest.fixture
def torch():
    """For what cannot be recorded: files that PyTorch alone writes."""
    return pytest.importorskip("torch", reason="PyTorch is not installed; `make test-all` has it")


# Compiled programs keep memory mapped, and a process may map some 65,000 pieces on Linux: beyond
# them it crashes. A slow test of float64 takes a few thousand.
MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def few_programs_of_slow_tests(request):
    yield
    slow = request.node.get_closest_marker("slow") or request.node.get_closest_marker("pytorch")
    if slow and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests of what programs do, not of their numbers: compiled in half the time, unoptimized.

    So are those of processes that are started. Embedded images are rendered as ever: that takes
    four times as long where it is not optimized.
    """
    from mros_jax.data.synthetic import rendering

    render: Any = rendering.render
    render = jax.jit(
        render.__wrapped__,
        static_argnames=("height", "width"),
        compiler_options={
            "xla_backend_optimization_level": 3,
            "xla_llvm_disable_expensive_passes": False,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering, "render", render)
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def unchecked():
    """Without jaxtyping's run-time checks, as users run: our own errors must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
