"""A server in a thread of this process, on a free port, with a tiny model; and clients of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import torch

from luthier.data.render import make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.kernels.choose import kernels_for
from luthier.model.adapter import save_adapter
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from luthier.serve.limits import Limits
from luthier.serve.models import Served
from luthier.serve.server import Access, Server, listen


def load(folder: Path, quantize: str = "none") -> Decoder:
    """The decoder in `folder` with the kernels that `luthier serve` takes."""
    decoder = load_decoder(folder, dtype=torch.float32, quantize="nf4" if quantize == "nf4" else "none")
    decoder.use(kernels_for(decoder.device, decoder.dtype).kernels)
    return decoder


def served(folder: Path, name: str = "tiny", decoder: Decoder | None = None, parent: str | None = None) -> Served:
    return Served(name, decoder or load(folder), make_template("model", load_tokenizer(folder)), parent)


def write_adapter(base: Path, folder: Path, seed: int, rank: int = 4) -> Path:
    """An adapter that changes what the model says."""
    decoder = load_decoder(base, dtype=torch.float32)
    add_lora(decoder, LoRASpec(rank, 3.0 * rank), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(decoder).values():
            parameter.normal_(std=0.1, generator=generator)
    save_adapter(decoder, folder, base=str(base))
    return folder


@dataclass
class Running:
    """A server that answers at `url`. `said` is what it has told its log."""

    server: Server
    url: str
    said: list[str] = field(default_factory=list)

    def client(self, key: str = "none", **options: object) -> openai.OpenAI:
        """The official client; it tries nothing twice."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)  # type: ignore[arg-type]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def until(self, name: str, value: float, seconds: float = 20.0) -> None:
        """Wait until a metric has this value."""
        end = time.monotonic() + seconds
        while (now := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {now}, not {value}"
            time.sleep(0.02)


@contextmanager
def serving(
    models: Sequence[Served], limits: Limits | None = None, access: Access | None = None, requests: bool = False
) -> Iterator[Running]:
    said: list[str] = []
    server = Server(
        {model.name: model for model in models},
        limits or Limits(),
        access or Access(),
        said.append,
        said.append if requests else None,
    )
    with listen("127.0.0.1", 0) as listening:
        running = Running(server, f"http://127.0.0.1:{listening.getsockname()[1]}", said)
        up = threading.Event()
        thread = threading.Thread(target=server.run, args=(listening, up.set))
        thread.start()
        try:
            assert up.wait(60)
            yield running
        finally:
            server.stop_now()
            thread.join(30)
        assert not thread.is_alive(), "the server did not end"
