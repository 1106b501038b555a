"""Submits a job to a running Ray cluster with this checkout's code, and follows its log.

The recipe is checked and resolved here: a mistake costs nothing, and a local file need not be on the cluster.
Ctrl-C leaves the job running; the same command again goes on where a stopped or failed one ended.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.commands.command_line import job_parser, main, recipe_of

STARTING = "No available agent"
"""In Ray's answer while the head's agent is not up yet (ray 2.60)."""
START_S = 60
REPO = Path(__file__).resolve().parent.parent
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that tell of every package they upload, and of the log's end."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = job_parser(__doc__ or "")
    parser.add_argument(
        "--address", required=True, metavar="URL", help="the dashboard's, such as http://127.0.0.1:8265"
    )
    parser.add_argument("--job", default="pipeline", choices=_jobs(), help="which job (default: all stages)")
    parser.add_argument("--no-wait", action="store_true", help="end once it is submitted")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="further flags of the job")
    return parser


def submit(arguments: argparse.Namespace) -> None:
    """Submits the job and, unless told otherwise, waits for its end.

    Raises:
        RunError: the cluster cannot be reached or refuses, or the job fails.
    """
    recipe = recipe_of(arguments)
    flags = ["--recipe", "recipe.yaml", "--root", arguments.root, *arguments.flags]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(REPO / "jobs", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        settings = recipe.model_dump(mode="json", exclude_unset=True)
        # As it stands: batches are drawn from the sources in their order.
        resolved = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
        (Path(folder) / "recipe.yaml").write_text(resolved, encoding="utf-8")
        try:
            client = JobSubmissionClient(arguments.address)
            for name in CHATTY:
                logging.getLogger(name).setLevel(logging.ERROR)
            job = _submit(
                client,
                entrypoint=shlex.join(["python", f"{arguments.job}.py", *flags]),
                runtime_env={"working_dir": folder, "py_modules": [str(REPO / "f2llm_ray")]},
                metadata={"recipe": recipe.name, "root": arguments.root},
            )
        except (ConnectionError, RuntimeError, AuthenticationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"{arguments.address}: {reason}") from None
    say(f"submitted {job}; stop it with: ray job stop {job} --address {arguments.address}")
    if not arguments.no_wait:
        asyncio.run(_follow(client, job))
        status = client.get_job_status(job)
        if status != JobStatus.SUCCEEDED:
            raise RunError(f"{job}: {status.value.lower()}; its log is above, the same command goes on from there")


def _submit(client: JobSubmissionClient, **job: Any) -> str:
    """Submits a job; a head that has just started takes none for some seconds, and is asked again meanwhile."""
    until = time.monotonic() + START_S
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if STARTING not in str(error) or time.monotonic() > until:
                raise
        say("the cluster is starting")
        time.sleep(3)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stdout.write(lines)
        sys.stdout.flush()


def _jobs() -> list[str]:
    return sorted(path.stem for path in (REPO / "jobs").glob("*.py") if path.stem != "plan")


if __name__ == "__main__":
    sys.exit(main(parser(), submit))
