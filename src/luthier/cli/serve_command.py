"""`luthier serve`: its options and help. What it does stands in `serving`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["serve"]


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, an adapter, or a whole model's folder.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=PATH", help="One more adapter on the same base. Repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call RUN; its folder's name if left out.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port to listen on; 0: any free one.")
    ] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that clients must send; else LUTHIER_API_KEY has it.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let other machines in without a key.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A host name by which clients call it. Repeatable.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers that are written at once.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Answers that may wait for a slot; more are told 429.")] = 256,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The longest answer, in tokens.")] = 4096,
    timeout: Annotated[float, typer.Option(help="Seconds for a request, waiting included.")] = 600.0,
    body_limit: Annotated[int, typer.Option(metavar="BYTES", help="The longest body of a request.")] = 4 * 2**20,
    grace: Annotated[float, typer.Option(help="Seconds for answers under way when it is told to stop.")] = 30.0,
    log: Annotated[bool, typer.Option("--log", help="Say a line for each request.")] = False,
) -> None:
    """Answer over HTTP as OpenAI's interface does, for any client of it."""
    from luthier.cli import serving

    serving.check_installed()
    from luthier.serve.limits import Limits

    limits = Limits(slots, queue, max_tokens, timeout, body_limit, grace=grace)
    door = serving.Door(host, port, api_key_file, insecure, tuple(allow_host or ()))
    serving.run(run, serving.named_adapters(adapter or ()), name, door, limits, log=log)
