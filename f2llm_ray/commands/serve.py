"""Serves a model over HTTP until Ctrl-C: OpenAI's embeddings API, and a search page at /.

For several models, replicas or a cluster use a Serve config (docs/serving.md).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import threading
from pathlib import Path

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.commands.command_line import engine_option

APPLICATION = "embeddings"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Runs on the Ray cluster that RAY_ADDRESS names (auto: this machine's), or starts its own.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="FOLDER", help="a model folder")
    what.add_argument(
        "--root", metavar="URI", help="a finished run, whose recipe says which of its models is served"
    )
    parser.add_argument("--name", help="what clients put in `model` (default: the name in the model folder)")
    engine_option(parser, "serving.engine of the run, or auto")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="default: 127.0.0.1, this machine only; anyone may send where it is not",
    )
    parser.add_argument(
        "--keys", metavar="FILE", help="hashed API keys that requests must have (python -m f2llm_ray.serve.keys)"
    )
    parser.add_argument(
        "--corpus", metavar="FOLDER", help="output of `f2llm embed` with the texts kept, for the search page"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Starts the server, says where it is, and waits for Ctrl-C or the signal to end.

    Raises:
        RunError: no such model or run, the port is taken, or the model fails its self-check.
    """
    import ray
    from ray import serve

    from f2llm_ray.base.session import connect
    from f2llm_ray.run.folder import Folder
    from f2llm_ray.run.root import REPORT
    from f2llm_ray.serve.app import application
    from f2llm_ray.serve.served_model import Arguments, checked, find_model

    given = {name: getattr(arguments, name) for name in ("model", "root", "name", "engine", "corpus")}
    keys = arguments.keys and str(Path(arguments.keys).absolute())
    given = {name: value for name, value in {**given, "keys": keys}.items() if value is not None}
    try:
        served = checked(lambda: find_model(Arguments.model_validate(given)))
    except RunError as error:
        if arguments.model is None or not Folder.at(arguments.model).exists(REPORT):
            raise
        raise RunError(f"{error}; --root {arguments.model} serves the one that its recipe says") from None
    name = served.card.id
    if not os.environ.get("RAY_ADDRESS"):
        _check_free(arguments.host, arguments.port)
    connect()
    quiet = {"enable_access_log": False}  # Serve's own log would name every path
    http = {"host": arguments.host, "port": arguments.port}
    ended = threading.Event()
    try:
        serve.start(http_options=http, logging_config=quiet)
        try:
            serve.run(application(served), name=APPLICATION, route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            raise RunError(f"{name} cannot be served: {_reason() or error}") from None
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        say(_told(arguments, name))
        ended.wait()
    except KeyboardInterrupt:
        pass
    finally:
        serve.delete(APPLICATION)
        ray.shutdown()
    say("stopped")


def _reason() -> str:
    """What Serve says of a deployment that did not start: the last error in it; "" where it says none."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    said = [] if application is None else [found.message for found in application.deployments.values()]
    errors = re.findall(r"^(?:[\w.]*\.)?\w*Error: (.+)$", "\n".join(said), re.MULTILINE)
    return str(errors[-1]) if errors else ""


def _told(arguments: argparse.Namespace, name: str) -> str:
    """Where the server is, and how to ask it."""
    url = f"http://{arguments.host}:{arguments.port}"
    key = ["-H", "Authorization: Bearer YOUR_KEY"] if arguments.keys else []
    body = json.dumps({"model": name, "input": "hello"})
    curl = ["curl", f"{url}/v1/embeddings", "-H", "Content-Type: application/json", *key, "-d", body]
    return f"serving at {url} (search page: /, API: /docs); Ctrl-C ends it. Try:\n{shlex.join(curl)}"


def _check_free(host: str, port: int) -> None:
    """Refuses a port that something listens on: Serve would share it, and requests would go to either."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except (OSError, OverflowError) as error:
            raise RunError(f"--port {port}: cannot listen on {host}: {error}; give another one") from None
