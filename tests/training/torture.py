"""Kills a training job again and again at random moments, and looks whether it ends where one left alone ends.

    python -m tests.training.torture [--kills=50] [--seed=0]

Every kill is `kill -9`: most while it trains and saves (every ten steps, so that many fall into a save), some while it
starts. A kill is survived if the next start finds a checkpoint at least as new as the newest finished one and every
line of metrics is, to the last bit, that of the job left alone. In the end parameters, average, moments, data position
and export must be the same bytes.
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.commands import train as stage
from paris_jax.config.experiment import Experiment
from paris_jax.training import metrics

EXPERT = Role("expert", 0)
CHECKPOINT_EVERY, STEPS_A_KILL, STARTS = 10, 60, 0.2  # the share of kills that hit a start


class Torture:
    """One job on a clustered run folder, beside the lines and files of the same job left alone."""

    def __init__(self, command: list[str], run: RunFolder, alone: RunFolder, seed: int):
        self._command, self._run, self._random = command, run, random.Random(seed)
        self._expected = {line["step"]: learned(line) for line in metrics.read(alone.metrics(EXPERT))}
        self.in_a_save = self.at_a_start = 0

    def kill_at(self, step: int) -> str:
        """Starts the job, kills it about `step` or while it starts; returns what went wrong before, or ""."""
        saved = self._finished()
        log = Path(self._run.path) / "log"
        with open(log, "w") as said:
            process = subprocess.Popen(self._command, stdout=said, stderr=subprocess.STDOUT)
        started = self._random.random() < STARTS
        if started:
            time.sleep(self._random.uniform(0.0, 6.0))
        else:
            while process.poll() is None and self._reached() < step:
                time.sleep(0.002)
            time.sleep(self._random.uniform(0.0, 0.1))
        if process.poll() is not None:
            return f"it ended by itself with {process.returncode}: {log.read_text()[-500:]}"
        process.kill()
        process.wait()
        self.at_a_start += started
        self.in_a_save += any("tmp" in path.name for path in self._run.checkpoints(EXPERT).glob("*"))
        return self._judge(saved, " ".join(log.read_text().split()), started)

    def finish(self) -> str:
        """Lets the job come to its end; returns what went wrong, or ""."""
        done = subprocess.run(self._command, capture_output=True, text=True)
        return f"exit code {done.returncode}: {done.stderr[-500:]}" if done.returncode else self.lines()

    def _judge(self, saved: int, said: str, started: bool) -> str:
        resumed = re.search(r"resumes from step (\d+)", said)
        if saved and not resumed and not started:
            return f"it started over although step {saved} was saved"
        if resumed and int(resumed[1]) < saved:
            return f"it went on from step {resumed[1]} although step {saved} was saved"
        return self.lines()

    def lines(self) -> str:
        """The first line that is not that of the job left alone, or ""."""
        lines = metrics.read(self._run.metrics(EXPERT))
        wrong = [line["step"] for line in lines if learned(line) != self._expected[line["step"]]]
        return f"its metrics differ from step {wrong[0]} on" if wrong else ""

    def _reached(self) -> int:
        line = metrics.newest(self._run.metrics(EXPERT))
        return int(line["step"]) if line else 0

    def _finished(self) -> int:
        """The newest checkpoint that was saved whole; 0 without one."""
        return max(
            (int(path.name) for path in self._run.checkpoints(EXPERT).glob("*") if path.name.isdigit()), default=0
        )


def learned(line: dict[str, float]) -> dict[str, float]:
    """What of a line depends on the training alone, not on the clock or the memory."""
    names = ("loss", "grad_norm", "update_norm", "param_norm", "learning_rate")
    return {name: value for name, value in line.items() if name.startswith(names)}


def torture(experiment: Experiment, run: RunFolder, kills: int, seed: int, say=print) -> int:
    """Returns how many of `kills` kills were survived; raises where the end is not that of the job left alone."""
    from tests.training.test_train import assert_same_training, command, reclaimed, with_training

    experiment = with_training(
        experiment, steps=(kills + 1) * STEPS_A_KILL, checkpoint_every_steps=CHECKPOINT_EVERY, log_every_steps=1
    )
    reclaimed(run, experiment)
    alone = RunFolder(Path(run.path).parent / "alone")
    shutil.copytree(run.path, alone.path)
    stage.train(experiment, alone, EXPERT)
    job = Torture(command(run, experiment, "--role=expert", "--cluster=0"), run, alone, seed)
    survived = 0
    for kill in range(1, kills + 1):
        wrong = job.kill_at(kill * STEPS_A_KILL)
        survived += not wrong
        say(f"kill {kill} of {kills}: {wrong or 'survived'}")
    if wrong := job.finish():
        say(f"the end: {wrong}")
        return 0
    assert_same_training(run, alone, experiment)
    say(f"{job.in_a_save} kills fell into a save, {job.at_a_start} into a start; the end is the same, bit for bit")
    return survived


def main() -> None:
    from paris_jax.clustering.build import cluster
    from paris_jax.data.preparation import prepare
    from tests.conftest import micro_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        experiment = Experiment.from_config(micro_config())
        prepare(experiment, run)
        cluster(experiment, run)
        survived = torture(experiment, run, given.kills, given.seed)
    print(f"{survived} of {given.kills}")
    sys.exit(survived != given.kills)


if __name__ == "__main__":
    main()
