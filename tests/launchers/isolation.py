"""Experts as strangers: each process has a user of its own, no right to read the others' folders, and no network.

    python -m tests.launchers.isolation      prints the log of one run; needs root on Linux

Every expert is killed while it trains and started again. The last one never comes back.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.training import metrics

ROOT = Path(__file__).parents[2]
FIRST_USER = 61000
PROBE = """
import os, socket, sys
from pathlib import Path
for folder in sys.argv[1:]:
    try:
        print(folder, "can be read:", os.listdir(folder))
    except PermissionError:
        pass
for address in ("1.1.1.1", "127.0.0.1"):
    try:
        socket.create_connection((address, 80), 2)
        print(address, "can be reached")
    except OSError as error:
        if error.errno != 101:
            print(address, "is refused by its host, so there is a route")
"""


def is_possible() -> bool:
    """Whether this machine lets us take another user's rights and a network namespace."""
    if sys.platform != "linux" or os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")):
        return False
    return subprocess.run([*as_user(FIRST_USER), sys.executable, "-c", ""], check=False).returncode == 0


def as_user(number: int) -> list[str]:
    """The prefix of a command that runs as a user without groups, in a network namespace without a route."""
    user = [f"--reuid={number}", f"--regid={number}", "--clear-groups", "--no-new-privs"]
    return ["unshare", "--net", "setpriv", *user]


class Teams:
    """A clustered run folder whose roles belong to different users."""

    def __init__(self, clustered: RunFolder, folder: Path, roles: list[Role], say: Callable[[str], None] = print):
        self.run, self._say = RunFolder(folder / "run"), say
        self.users = {role: FIRST_USER + k for k, role in enumerate(roles)}
        self._homes, self._began = folder / "homes", time.monotonic()
        shutil.copytree(clustered.path, self.run.path)
        folder.chmod(0o755)
        Path(self.run.data).chmod(0o700)
        Path(self.run.path, "experts").mkdir()
        for role, user in self.users.items():
            own = [self._homes / str(user), Path(self.run.role(role))]
            for each in own:
                each.mkdir(parents=True)
            own += [Path(self.run.cluster(role.cluster))] if role.kind == "expert" else []
            for each in own:
                for path in (each, *each.rglob("*")):
                    os.chown(path, user, user)
                each.chmod(0o700)

    def note(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._began:5.1f} s  {text}")

    def probe(self, role: Role) -> str:
        """What a role's user can read of the others, and reach by network: nothing."""
        folders = [str(self.run.data)]
        folders += [str(self.run.role(other)) for other in self.users if other != role]
        folders += [str(self.run.cluster(o.cluster)) for o in self.users if o != role and o.kind == "expert"]
        command = [*as_user(self.users[role]), sys.executable, "-c", PROBE, *folders]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def start(self, role: Role) -> "subprocess.Popen[str]":
        user = self.users[role]
        home = self._homes / str(user)
        command = [sys.executable, "-m", "paris_jax", "train", f"--workdir={self.run}", *role.arguments.split()]
        environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(ROOT)}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(home / "xla"), "JAX_PLATFORMS": "cpu"}
        self.note(f"{role.name} starts as user {user}")
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*as_user(user), *command, "--preflight=cpu"], env=environment, cwd=home, **pipes)

    def kill_in_training(self, role: Role, process: "subprocess.Popen[str]") -> None:
        """Kills a role (-9) once it has a checkpoint."""
        checkpoints = Path(self.run.checkpoints(role))
        while not any(path.name.isdigit() for path in checkpoints.glob("*")):
            if process.poll() is not None:
                raise RuntimeError(f"{role.name} ended early: {process.stderr and process.stderr.read()}")
            time.sleep(0.005)
        process.kill()
        process.communicate()
        newest = metrics.newest(self.run.metrics(role))
        self.note(f"{role.name} is killed; its last line of metrics is of step {newest['step'] if newest else 0}")

    def finish(self, role: Role, process: "subprocess.Popen[str]") -> str:
        """Waits for the end of a role and returns what it said."""
        _, said = process.communicate(timeout=300)
        resumed = [line for line in said.splitlines() if "resumes from step" in line]
        self.note(f"{role.name} ends with {process.returncode}{f' ({resumed[0][9:]})' if resumed else ''}")
        return said


def main() -> None:
    from paris_jax.clustering.build import cluster
    from paris_jax.commands.assemble import assemble
    from paris_jax.data.preparation import prepare
    from paris_jax.errors import UserError
    from tests.launchers.test_isolation import ROLES, experiment

    with tempfile.TemporaryDirectory() as folder:
        clustered, made = RunFolder(Path(folder) / "clustered"), experiment()
        prepare(made, clustered)
        cluster(made, clustered)
        Path(folder).chmod(0o755)
        teams = Teams(clustered, Path(folder) / "teams", ROLES)
        for role in ROLES:
            teams.note(f"{role.name} reaches of the others: {teams.probe(role) or 'nothing'}")
        started = {role: teams.start(role) for role in ROLES}
        for role, process in started.items():
            teams.kill_in_training(role, process)
        again = {role: teams.start(role) for role in ROLES[:-1]}
        for role, process in again.items():
            teams.finish(role, process)
        router = subprocess.run(
            [sys.executable, "-m", "paris_jax", "train", f"--workdir={teams.run}", "--role=router"],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        teams.note(f"router, trained by the owner, ends with {router.returncode}")
        try:
            assemble(made, teams.run, wait=3)
        except UserError as error:
            teams.note(f"assemble, after 3 s: {str(error).replace(folder, '')}")
        assemble(made, teams.run, allow_missing=True, wait=3)
        teams.note("assemble --allow_missing has made the ensemble of those that are there")


if __name__ == "__main__":
    main()
