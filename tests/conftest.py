"""A micro experiment that every room's tests can afford: 60 clips of 8 tokens, a network of 30 thousand parameters."""

import concurrent.futures
import gc
import importlib.metadata
import multiprocessing
import os
import pathlib
import signal
import socket
import tempfile

# Tests compile the same few programs again and again, in many processes; see models/compilation.py on cores.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(
        tempfile.gettempdir(), f"paris_jax-tests-xla-{len(getattr(os, 'sched_getaffinity', lambda _: ())(0))}"
    ),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# They compile more than they compute. Modules that are not split compile with an eighth less work on few cores.
# Later versions than these do not know the last flag.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import filelock
import jax
import pytest

from paris_jax.config.experiment import Experiment, default_config

MANY_MAPPINGS = 15000
# Credentials that a user's environment may hold; no file and no line that is printed may repeat them.
SECRET = "sentinel-of-a-secret"
os.environ |= dict.fromkeys(("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "KAGGLE_KEY", "SKYPILOT_API_TOKEN"), SECRET)

QUICK = os.environ["XLA_FLAGS"]  # for processes that need other flags, too

# Files that take minutes: begun first, they do not keep one process busy when all others are done.
LONG = (
    "test_sharding",
    "test_several_processes",
    "test_train",
    "test_quickstart",
    "test_isolation",
    "test_real_footage",
    "test_device_placement",
    "test_protocol",
    "test_killed",
    "test_conditioning_frames",
    "test_browser",
    "test_prediction_types",
    "test_hunyuan",
    "test_published",
)
# Files whose tests train, sample or start processes: `-m "not slow"` leaves them out.
SLOW = (
    *LONG,
    *("test_sampled", "test_bucket", "test_sweep", "test_failures", "test_networks", "test_sparse_velocity"),
    *("test_factorised", "test_diffusion", "test_estimate", "test_step", "test_sampling", "test_progress"),
    *("test_mixture", "test_bundled", "test_quantized_and_offloaded", "test_distributed", "test_sample", "test_parity"),
    *("test_optimizers", "test_docs", "test_checkpoints_of_several", "test_launcher", "test_build", "test_publish"),
    *("test_i3d", "test_i3d_parity", "test_parts", "test_text_buckets"),
)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the exhaustive variants, too")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def exhaustive(request) -> bool:
    """Whether the exhaustive variants are run."""
    return request.config.getoption("--all")


def free_address() -> str:
    """host:port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def micro_config():
    """A ConfigDict that runs every stage in seconds."""
    config = default_config()
    config.name = "micro"
    config.data.update(num_clips=60, num_frames=4, height=8, width=8, heldout_fraction=0.2, validation_share=0.5)
    # Blocks of one kind compile in half the time; tests/models and the bundled ensemble have both kinds.
    config.network.update(preset="tiny", hidden=64, heads=4, double_blocks=0, single_blocks=2)
    config.diffusion.timestep_shift = 2.0
    config.masks.update(none=0.5, first=0.3, prefix=0.2)
    config.data.cond_images = True
    config.training.update(
        steps=12, global_batch_size=4, warmup_steps=2, log_every_steps=4, checkpoint_every_steps=4, ema_decay=0.9
    )
    config.router_training.update(
        steps=12,
        global_batch_size=8,
        optimizer="muon",
        warmup_steps=2,
        log_every_steps=4,
        checkpoint_every_steps=6,
        ema_decay=0.9,
    )
    config.sampling.update(num_inference_steps=3, guidance_scale=2.0)
    config.evaluation.update(num_clips=4, num_loss_clips=4, loss_timesteps=4, num_shown=2)
    return config


def no_text(text):
    """As many prompts that say nothing, as training drops them: one token of zeros."""
    return type(text)(0 * text.tokens, 0 * text.length + 1, 0 * text.pooled)


def forget_programs() -> None:
    """Frees compiled programs once there are many.

    Each holds hundreds of the 65530 mappings that Linux lets a process have; without any left, XLA dies.
    """
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """Frees compiled programs after a file of tests."""
    yield
    forget_programs()


@pytest.fixture
def usual_interrupt():
    """Python's own SIGINT handler, which a process that was started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def elsewhere():
    """Calls a function in another process that was started afresh, as Grain's workers are."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


@pytest.fixture(scope="session")
def micro() -> Experiment:
    return Experiment.from_config(micro_config())


def made_once(name: str, tmp_path_factory, fill):
    """A folder that `fill` writes once for all processes of a test run; read only."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with filelock.FileLock(base / f"{name}.lock"):
        if not (base / name).exists():
            fill(base / f"{name}-unfinished")
            (base / f"{name}-unfinished").rename(base / name)
    return base / name


@pytest.fixture(scope="session")
def clustered(micro, tmp_path_factory):
    """A run folder of the micro experiment, prepared and clustered; copy it before writing into it."""
    from paris_jax.artifacts.run_folder import RunFolder
    from paris_jax.clustering.build import cluster
    from paris_jax.data.preparation import prepare

    def fill(folder):
        prepare(micro, RunFolder(folder))
        cluster(micro, RunFolder(folder))

    return RunFolder(made_once("clustered", tmp_path_factory, fill))


@pytest.fixture
def run(clustered, tmp_path):
    """A fresh copy of the clustered run folder."""
    import shutil

    from paris_jax.artifacts.run_folder import RunFolder

    shutil.copytree(clustered.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture(scope="session")
def trained(micro, clustered, tmp_path_factory):
    """A run folder with every role trained and assembled; read only."""
    import shutil

    from paris_jax.artifacts.run_folder import RunFolder, roles
    from paris_jax.commands.assemble import assemble
    from paris_jax.commands.train import train

    def fill(folder):
        shutil.copytree(clustered.path, folder)
        for role in roles(micro.clustering.num_clusters):
            train(micro, RunFolder(folder), role)
        assemble(micro, RunFolder(folder))

    return RunFolder(made_once("trained", tmp_path_factory, fill))


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of the trained run folder, without what only training reads."""
    import shutil

    from paris_jax.artifacts.run_folder import RunFolder

    shutil.copytree(trained.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "data"))
    return RunFolder(tmp_path / "run")
