"""Writes videos in the layout that VBench reads: PROMPT-0.mp4 to PROMPT-4.mp4 in one folder (arXiv 2311.17982)."""

import dataclasses
import json
import logging
from collections.abc import Sequence

from etils import epath

from paris_jax.artifacts import locks, manifest
from paris_jax.data import video as video_io
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)
PER_PROMPT = 5  # videos per prompt that VBench's protocol asks for; 25 for its temporal flickering
LONGEST = 240  # bytes of a file name, without number and ending


def file_name(prompt: str, index: int) -> str:
    """The name of a prompt's video; raises UserError for a prompt that no file can be named after."""
    if "/" in prompt or "\0" in prompt or not prompt.strip() or len(prompt.encode()) > LONGEST:
        raise UserError(
            f"The prompt {prompt[:60]!r} cannot be a file name, as VBench needs; it must be 1 to {LONGEST} bytes "
            "without a slash"
        )
    return f"{prompt}-{index}.mp4"


def write(
    ensemble: Ensemble,
    prompts: Sequence[str],
    out: epath.PathLike,
    seed: int = 0,
    per_prompt: int = PER_PROMPT,
    batch_size: int = 16,
) -> int:
    """Samples `per_prompt` videos of each prompt, with seeds seed, seed + 1, ..., and writes each as a file.

    Files that are there already are kept, so an interrupted call resumes. The protocol goes beside the folder, into
    OUT.protocol.json, because VBench takes every file in it for a video.

    Returns:
      The number of videos that were sampled.

    Raises:
      UserError: no prompt, one that is there twice, or one that cannot be a file name.
    """
    out = epath.Path(out)
    if not prompts:
        raise UserError("There is no prompt for VBench; give --prompts_file=FILE with one on each line")
    twice = next((prompt for i, prompt in enumerate(prompts) if prompt in prompts[:i]), None)
    if twice is not None:
        raise UserError(f"The prompt {twice[:60]!r} is there twice; its videos would have the same names")
    jobs = [(prompt, i, file_name(prompt, i)) for prompt in prompts for i in range(per_prompt)]
    with locks.only_writer(out):
        missing = [job for job in jobs if not (out / job[2]).exists()]
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            samples = ensemble.sample([prompt for prompt, _, _ in part], seed=[seed + i for _, i, _ in part])
            for (_, _, name), video in zip(part, samples.pixels(), strict=True):
                video_io.write_video(out / name, video, samples.fps, scale=1)
        protocol = {
            "prompts": len(prompts),
            "videos per prompt": per_prompt,
            "seeds": [seed + i for i in range(per_prompt)],
            "sampling": {k: v for k, v in dataclasses.asdict(ensemble.params).items() if v is not None},
            "fps": ensemble.fps,
            "versions": manifest.versions(),
        }
        text = json.dumps(protocol, indent=2, default=list)
        manifest.write_atomically(out.parent / f"{out.name}.protocol.json", text + "\n")
    logger.info("%d videos are in %s", len(jobs), out)
    return len(missing)
