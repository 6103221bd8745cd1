"""What `luthier serve` writes for many clients at once, beside what it writes for one.

    python benchmarks/serve.py sprig [build/bench/work/135m …] [--clients 64] [--seconds 60] [--slots 64] [--tokens 64]

Each model is served by a process of its own, and asked by this one over HTTP as any client would: conversations,
greedy, streamed, one connection a client, each client asking again as soon as it is answered. First every prompt is
asked alone; then one client asks for a while, then all of them. A status other than 200, an error in a stream or a text
that is not the one that the prompt got alone ends the benchmark with an error: so no stream is mixed with another.

Prints a table and writes results/serve.json: tokens a second of one client and of all, and how many times one's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import orjson


@dataclass
class Heard:
    """What the clients of one phase got."""

    tokens: int = 0
    answers: int = 0
    chunks: int = 0


class Client:
    """One connection, which stays open."""

    def __init__(self, address: str, model: str, tokens: int) -> None:
        self._where = urlsplit(address)
        self._model, self._tokens = model, tokens

    async def connect(self) -> None:
        self._in, self._out = await asyncio.open_connection(self._where.hostname, self._where.port)

    async def ask(self, prompt: str, heard: Heard) -> str:
        """The text that a prompt is continued with."""
        body = orjson.dumps(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": self._tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._where.netloc}\r\nContent-Type: application/json\r\n"
        self._out.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        said = await self._in.readuntil(b"\r\n\r\n")
        if not said.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"{said.decode()}{(await self._in.read(2000)).decode()}")
        found = bytearray()
        while not found.endswith(b"0\r\n\r\n"):
            piece = await self._in.read(65536)
            if not piece:
                raise SystemExit("the server closed a connection")
            found += piece
        lines = [line[6:] for line in bytes(found).split(b"\n") if line.startswith(b"data: ")]
        if lines[-1] != b"[DONE]":
            raise SystemExit(f"a stream ended with {lines[-1].decode()}")
        chunks = [orjson.loads(line) for line in lines[:-1]]
        heard.tokens += chunks[-1]["usage"]["completion_tokens"]
        heard.answers += 1
        heard.chunks += len(chunks)
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])


def prompt(number: int) -> str:
    return f"Tell me a story about {number + 2} foxes."


async def phase(clients: list[Client], wanted: list[str], seconds: float) -> tuple[Heard, float]:
    """All clients ask again and again; what they got, and how long it took."""
    heard, began = Heard(), time.perf_counter()

    async def one(client: Client, number: int) -> None:
        while time.perf_counter() - began < seconds:
            text = await client.ask(prompt(number), heard)
            if text != wanted[number]:
                raise SystemExit(f"prompt {number} was answered {text!r}, alone it is {wanted[number]!r}")
            number = (number + 1) % len(wanted)

    await asyncio.gather(*(one(client, number) for number, client in enumerate(clients)))
    return heard, time.perf_counter() - began


async def measure(address: str, model: str, options: argparse.Namespace) -> dict[str, object]:
    clients = [Client(address, model, options.tokens) for _ in range(options.clients)]
    for client in clients:
        await client.connect()
    wanted = [await clients[0].ask(prompt(number), Heard()) for number in range(options.clients)]
    one, one_took = await phase(clients[:1], wanted, max(3.0, options.seconds / 4))
    many, many_took = await phase(clients, wanted, options.seconds)
    rate_of_one, rate_of_many = one.tokens / one_took, many.tokens / many_took
    return {
        "model": model,
        "one": round(rate_of_one, 1),
        "many": round(rate_of_many, 1),
        "times_one": round(rate_of_many / rate_of_one, 2),
        "answers": many.answers,
        "tokens_an_answer": round(many.tokens / many.answers, 1),
        "tokens_a_chunk": round(many.tokens / many.chunks, 1),
    }


def serve(model: str, options: argparse.Namespace) -> dict[str, object]:
    command = [sys.executable, "-m", "luthier", "serve", model, "--name", "model", "--port", "0"]
    command += ["--slots", str(options.slots), "--queue", str(options.clients)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said, address = "", None
        for line in server.stderr or ():
            said += line
            address = address or re.search(r"serving on (\S+)/v1", said)
            if "-d '" in line:
                break
        if address is None:
            raise SystemExit(f"the server did not start:\n{said}")
        found = asyncio.run(measure(address[1], "model", options))
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=60)
        if server.returncode != 0:
            raise SystemExit(f"the server ended with {server.returncode}: {said}")
        return {**found, "model": Path(model).name}
    finally:
        if server.poll() is None:
            server.kill()


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("models", nargs="+")
    args.add_argument("--clients", type=int, default=64)
    args.add_argument("--seconds", type=float, default=60)
    args.add_argument("--slots", type=int, default=64)
    args.add_argument("--tokens", type=int, default=64)
    args.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve.json")
    options = args.parse_args()
    results = []
    for model in options.models:
        row = serve(model, options)
        print(row, flush=True)
        results.append(row)
    from luthier.hardware.compiled import compiled_kernels
    from luthier.hardware.probe import this_device

    device = this_device()
    settings = {name: getattr(options, name) for name in ("clients", "seconds", "slots", "tokens", "threads")}
    document = {
        "machine": {"cpu": device.name, "cores": device.cores},
        "compiled": compiled_kernels().variant,
        **settings,
        "results": results,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
