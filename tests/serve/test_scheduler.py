"""Faults in the engines' thread: who is told, what goes on, and when the server says that it is not well."""

from __future__ import annotations

import json

import pytest

from luthier.generate.engine import Engine
from luthier.generate.steps import Steps
from luthier.serve.models import Served
from luthier.serve.scheduler import FAULTS, Scheduler
from tests.serve.test_bad_input import told
from tests.serve.world import Running, served, serving

TEXT = {"model": "tiny", "prompt": "The quick", "max_tokens": 8, "temperature": 0}


class Breaks:
    """A step of decoding that fails as often as it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left = 0
        whole = Steps.step

        def step(steps: Steps, *words: object) -> object:
            if self.left:
                self.left -= 1
                raise RuntimeError("out of memory at /a/secret/path")
            return whole(steps, *words)  # type: ignore[arg-type]

        patch.setattr(Steps, "step", step)


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Breaks:
    return Breaks(monkeypatch)


def test_a_step_that_fails_is_500_for_those_under_way_and_the_next_is_answered(
    tiny_served: Served, breaks: Breaks
) -> None:
    with serving([tiny_served]) as running:
        wanted = running.post("/v1/completions", TEXT).json()["choices"]
        breaks.left = 1
        error = told(running.post("/v1/completions", TEXT), 500)
        assert "RuntimeError" in error["message"]
        assert "secret" not in error["message"]
        assert any("/a/secret/path" in line for line in running.said)
        breaks.left = 1
        lines = running.post("/v1/completions", {**TEXT, "stream": True, "n": 2}).text.strip().split("\n\n")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine"
        assert running.post("/v1/completions", TEXT).json()["choices"] == wanted
        assert running.get("/health").status_code == 200
        assert running.metric("luthier_running") == 0
        assert 'luthier_engine_faults_total{model="tiny"} 2.0' in running.get("/metrics").text.splitlines()


def test_one_models_fault_leaves_the_others(tiny_served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    other = served(tiny_served.template.tokenizer.folder, "other")
    whole = Engine.step

    def step(engine: Engine) -> object:
        if engine.decoder is other.decoder:
            raise RuntimeError("broken")
        return whole(engine)

    monkeypatch.setattr(Engine, "step", step)
    with serving([tiny_served, other]) as running:
        for _ in range(FAULTS):
            assert running.get("/health").status_code == 200
            told(running.post("/v1/completions", {**TEXT, "model": "other"}), 500)
            assert running.post("/v1/completions", TEXT).status_code == 200
        assert running.get("/health").json() == {"status": "failing", "why": "the last 3 steps of other failed"}
        assert running.get("/health").status_code == running.get("/ready").status_code == 503
        monkeypatch.undo()
        assert running.post("/v1/completions", {**TEXT, "model": "other"}).status_code == 200  # it may come back
        assert running.get("/health").status_code == 200


def test_a_thread_that_has_ended_fails_all_and_says_so(tiny_served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Scheduler, name: str, engine: Engine) -> None:
        raise LookupError("a defect")

    monkeypatch.setattr(Scheduler, "_step", broken)
    with serving([tiny_served]) as running:
        told(running.post("/v1/completions", TEXT), 500)
        assert "the engines' thread has ended: LookupError" in running.get("/health").json()["why"]
        assert running.get("/health").status_code == 503
        told(running.post("/v1/completions", TEXT), 503)
        assert any("a defect" in line for line in running.said)


def test_slots_are_counted_over_all_models(running: Running) -> None:
    """More than there are slots: they are answered in turns."""
    found = running.post("/v1/completions", {**TEXT, "prompt": ["The quick"] * 32, "n": 2})
    assert len({choice["text"] for choice in found.json()["choices"]}) == 1
    assert found.json()["usage"]["completion_tokens"] == 64 * 8
