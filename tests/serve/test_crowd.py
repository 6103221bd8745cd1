"""Many clients at once: every stream is what the model says alone, none is mixed with another, none fails."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from luthier.generate.generate import answer_all
from luthier.generate.request import Request
from luthier.serve.models import Served
from tests import tiny
from tests.serve.world import serving

ROOT = Path(__file__).resolve().parents[2]
CLIENTS, SECONDS = 40, 3.0


def prompt(number: int) -> str:
    return f"{number} foxes and {number * 7 % 100} kings went over hill number {number * 13 % 101}"


def alone(model: Served, count: int, tokens: int) -> list[str]:
    template = model.template
    ids = (template.tokenizer.encode(prompt(number)) for number in range(count))
    requests = [Request(tuple(one), frozenset(template.stop_ids), (), tokens) for one in ids]
    return [answer.text for answer in answer_all(model.decoder, template.tokenizer, requests, slots=1)]


async def one_client(client: openai.AsyncOpenAI, number: int, wanted: list[str], until: float) -> int:
    """Asks again and again, streamed and not; how many answers it got."""
    answers = 0
    while answers < 2 or time.monotonic() < until:
        which = (number + answers) % len(wanted)
        if answers % 3 == 2:
            whole = await client.completions.create(
                model="tiny", prompt=prompt(which), max_tokens=16 + which % 5, temperature=0
            )
            text = whole.choices[0].text
        else:
            stream = await client.completions.create(
                model="tiny", prompt=prompt(which), max_tokens=16 + which % 5, temperature=0, stream=True
            )
            text = "".join([chunk.choices[0].text async for chunk in stream])
        assert text == wanted[which]
        answers += 1
    return answers


def test_forty_clients_at_once_are_each_answered_as_if_alone(tiny_served: Served) -> None:
    by_length = {tokens: alone(tiny_served, CLIENTS, tokens) for tokens in range(16, 21)}
    wanted = [by_length[16 + which % 5][which] for which in range(CLIENTS)]
    assert len(set(wanted)) > CLIENTS // 2  # a mixed stream would show

    async def crowd(url: str) -> list[int]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            until = time.monotonic() + SECONDS
            return await asyncio.gather(*(one_client(client, number, wanted, until) for number in range(CLIENTS)))

    with serving([tiny_served]) as running:
        answers = asyncio.run(crowd(f"{running.url}/v1"))
        assert min(answers) >= 2
        assert running.metric("luthier_running") == running.metric("luthier_cancelled_total") == 0


@pytest.mark.slow
def test_sixty_four_clients_for_a_minute_write_four_times_what_one_does(tmp_path: Path) -> None:
    """benchmarks/serve.py on a model whose weights do not fit a cache, in 135m's shape; it fails on any error, and on a
    text that is not the one that the prompt got alone."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    folder = tiny.make_model(tmp_path / "large", initializer_range=0.02, **shape, **heads)
    out = tmp_path / "serve.json"
    command = [sys.executable, ROOT / "benchmarks" / "serve.py", folder, "--tokens", "48", "--out", out]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = json.loads(out.read_text())["results"]
    assert result["times_one"] >= 4
