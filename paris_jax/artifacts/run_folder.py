"""The run folder: all its paths, and the check that it belongs to a config.

RUN/config.json                    the resolved config and its hash
RUN/data/                          all clips as latents; or data.json, which names those of another run folder
RUN/partition/                     centroids, clip id -> cluster, report; clusters/K/, validation/, test/
RUN/experts/K/ monolith/ router/   checkpoints/, metrics.jsonl, train.log, lock, export/
RUN/ensemble/ samples/ evaluation/
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from etils import epath

from paris_jax.artifacts import locks, manifest, safe_files
from paris_jax.artifacts.schemas import SharedData, StoredConfig
from paris_jax.errors import UserError

ROLES = ("expert", "monolith", "router")  # of roles


@dataclasses.dataclass(frozen=True)
class Role:
    """One network to train: an expert of one cluster, the monolith, or the router."""

    kind: str
    cluster: int | None = None

    @property
    def name(self) -> str:
        return f"expert {self.cluster}" if self.kind == "expert" else self.kind

    @property
    def arguments(self) -> str:
        """The flags of `paris-jax train` that name this role."""
        return f"--role={self.kind}" + (f" --cluster={self.cluster}" if self.kind == "expert" else "")


def roles(num_clusters: int) -> list[Role]:
    """Every network of a run, in the order a single machine trains them."""
    return [*(Role("expert", k) for k in range(num_clusters)), Role("router"), Role("monolith")]


class RunFolder:
    """Everything one experiment writes, on a local path or gs:// (through etils.epath)."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self.config = self.path / "config.json"
        self.shared_data = self.path / "data.json"  # says where the data lie, if another run folder has them
        self.partition = self.path / "partition"
        self.validation = self.partition / "validation"  # held-out clips that settings are tuned on
        self.test = self.partition / "test"  # held-out clips that results are reported on
        self.ensemble = self.path / "ensemble"
        self.samples = self.path / "samples"
        self.evaluation = self.path / "evaluation"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def data(self) -> epath.Path:
        """The prepared clips: this run folder's own, or those of another one."""
        if self.shared_data.exists():
            return epath.Path(self._read_shared().path)
        return self.path / "data"

    def _read_shared(self) -> SharedData:
        return manifest.read_json(self.shared_data, SharedData)

    def check_shared_data(self) -> None:
        """Raises UserError if the data of another run folder are not those that this one shared."""
        if not self.shared_data.exists():
            return
        shared = self._read_shared()
        path = epath.Path(shared.path) / manifest.FILE_NAME
        if not path.exists():
            raise UserError(
                f"{self.shared_data} names the data {shared.path}, which are not there; bring them back, or use a new "
                "--workdir"
            )
        if manifest.hash_file(path) != shared.manifest_sha256:
            raise UserError(
                f"{shared.path} holds other data than when {self.path} shared them; use a new --workdir for the new "
                "ones"
            )

    def share_data(self, folder: epath.PathLike) -> None:
        """Takes the prepared clips of another run folder for this one."""
        folder = epath.Path(folder)
        path = folder if not safe_files.is_local(folder) else folder.resolve()
        digest = manifest.hash_file(path / manifest.FILE_NAME)
        manifest.write_json(self.shared_data, {"path": str(path), "manifest_sha256": digest})

    def cluster(self, k: int) -> epath.Path:
        return self.partition / "clusters" / str(k)

    def role(self, role: Role) -> epath.Path:
        return self.path / "experts" / str(role.cluster) if role.kind == "expert" else self.path / role.kind

    def checkpoints(self, role: Role) -> epath.Path:
        return self.role(role) / "checkpoints"

    def metrics(self, role: Role) -> epath.Path:
        return self.role(role) / "metrics.jsonl"

    def log(self, role: Role) -> epath.Path:
        """The log of a role's process, if a launcher started it."""
        return self.role(role) / "train.log"

    def sweep(self, role: Role) -> epath.Path:
        """The sweeps of a role."""
        return self.path / "sweeps" / role.name.replace(" ", "-")

    def export(self, role: Role) -> epath.Path:
        return self.role(role) / "export"

    @contextlib.contextmanager
    def only_writer(self, role: Role) -> Iterator[None]:
        """Keeps other processes of this machine from training `role` here; see `locks.only_writer`."""
        with locks.only_writer(self.role(role), self.role(role) / "lock"):
            yield

    def claim(self, config: dict[str, Any], config_hash: str) -> None:
        """Writes config.json at the first stage; afterwards refuses a config whose hash is another one.

        A config without any files beside it, as after a refused first command, is replaced.
        """
        with locks.only_writer(self.config, wait=True):
            self._claim(config, config_hash)

    def _claim(self, config: dict[str, Any], config_hash: str) -> None:
        if not self.config.exists() or (self.stored_config().hash != config_hash and self._holds_only_a_config()):
            value = {"schema": manifest.SCHEMA, "hash": config_hash, "config": config}
            manifest.write_json(self.config, value)
            return
        found = self.stored_config()
        if found.hash != config_hash:
            changed = sorted(_differences(found.config, config))
            raise UserError(
                f"{self.path} was made with another config (different: {', '.join(changed)}); "
                "use a new --workdir, or give the config that this one was made with"
            )

    def _holds_only_a_config(self) -> bool:
        return not any(
            _holds_files(path)
            for path in self.path.iterdir()
            if path.name != self.config.name and path.suffix != locks.SUFFIX
        )

    def stored_config(self) -> StoredConfig:
        """The contents of config.json.

        Raises:
          UserError: no file, or one that is not a config.
        """
        if not self.config.exists():
            raise UserError(
                f"{self.config} does not exist; start with 'paris-jax prepare --config=... --workdir={self.path}'"
            )
        return manifest.read_json(self.config, StoredConfig, "restore it from a copy, or use a new --workdir")


def find_run_folder(path: epath.PathLike) -> RunFolder | None:
    """The run folder that an ensemble or the export of a role lies in."""
    for folder in list(epath.Path(path).parents)[:3]:
        if str(folder) in ("/", "gs://"):
            break
        with contextlib.suppress(UserError):  # other people's config.json
            run = RunFolder(folder)
            run.stored_config()
            return run
    return None


def _holds_files(path: epath.Path) -> bool:
    return any(map(_holds_files, path.iterdir())) if path.is_dir() else True


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Dotted names of the fields in which two nested dictionaries differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        fields = old.keys() | new.keys()
        return [d for f in fields for d in _differences(old.get(f), new.get(f), f"{name}.{f}" if name else f)]
    pair = [list(value) if isinstance(value, tuple) else value for value in (old, new)]  # JSON has lists
    return [] if pair[0] == pair[1] else [name]
