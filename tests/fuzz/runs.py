"""A run's own files as inputs: a checkpoint whose hashes are right, and the log of events."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from tests.fuzz.changes import Json, bent, bent_sometimes, changed

if TYPE_CHECKING:
    from luthier.model.decoder import Decoder

OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


class Checkpoint:
    """One file of a checkpoint changed, and the manifest made anew, as somebody would who wants it to be loaded."""

    FILES = (
        *("state.json", "optimizer.safetensors", "rng.safetensors"),
        *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    )
    OWN: tuple[Json, ...] = ("rslora", "q_proj", "LORA", "F16", "U8", [8, 3], [5056], 3, 7)

    def __init__(self) -> None:
        import torch

        from luthier.model.adapter import lora_spec
        from luthier.model.load import load_decoder
        from luthier.train.checkpoint import (
            Follows,
            MadeWith,
            Progress,
            Snapshot,
            State,
            generator_states,
            write_checkpoint,
        )
        from luthier.train.identity import Identity
        from luthier.train.making import make_trainee
        from luthier.train.manifest import SCHEMA
        from luthier.train.optimizer import state_tensors
        from tests import tiny
        from tests.train.world import make_settings

        self._home = tempfile.TemporaryDirectory()
        home = Path(self._home.name)
        torch.manual_seed(1)
        decoder: Decoder = load_decoder(tiny.make_model(home / "model"), dtype=torch.float32)
        self.trainee = make_trainee(decoder, make_settings(targets=("q_proj",), rank=2))
        for leaf in self.trainee.parameters.values():
            leaf.grad = torch.ones_like(leaf)
        self.trainee.optimizer.step()
        self.trainee.optimizer.zero_grad(set_to_none=True)
        state = State(
            schema=SCHEMA,
            progress=Progress(step=3, tokens=99, history=((0, 2.5), (3, 1.5)), best_step=3, best_eval=1.5),
            follows=Follows(0, 3, 9, 1e-3),
            identity=Identity("sprig", "d", {"rank": 2, "steps": 9}),
            recipe_sha256=None,
            plan_sha256="0" * 64,
            made_with=MadeWith("2", 1, "x"),
            loss_scale=None,
        )
        masters = {name: leaf.detach().clone() for name, leaf in self.trainee.parameters.items()}
        moments = state_tensors(self.trainee.optimizer, self.trainee.parameters)
        made = Snapshot(state, lora_spec(decoder), masters, moments, generator_states(decoder.device))
        self.whole = home / "step-000003"
        self.whole.mkdir()
        write_checkpoint(self.whole, made)
        self.files = {name: (self.whole / name).read_bytes() for name in self.FILES}
        self.manifest = orjson.loads((self.whole / "manifest.json").read_bytes())

    def make(self, chance: random.Random) -> bytes:
        name = chance.choice(self.FILES)
        content = self.files[name]
        if name.endswith(".json"):
            text = json.dumps(changed(json.loads(content), chance, self.OWN)).encode()
            content = bent_sometimes(text, chance, 0.2)
        else:
            size = struct.unpack("<Q", content[:8])[0]
            header, body = content[8 : 8 + size], content[8 + size :]
            if chance.random() < 0.7:
                header = json.dumps(changed(json.loads(header), chance, self.OWN)).encode()
            if chance.random() < 0.3:
                body = bent(body, chance)
            content = struct.pack("<Q", len(header)) + header + body
        return bytes([self.FILES.index(name), chance.random() < 0.9]) + content

    def read(self, text: bytes, folder: Path) -> None:
        from luthier.train.checkpoint import load_checkpoint, read_state
        from luthier.train.checkpoints import Checkpoints

        name, sealed, content = self.FILES[text[0]], bool(text[1]), text[2:]
        place = folder / "step-000003"
        if not place.is_dir():
            shutil.copytree(self.whole, place)
        before = {one: tuple(leaf.shape) for one, leaf in self.trainee.parameters.items()}
        try:
            (place / name).write_bytes(content)
            if sealed:
                self._seal(place, name, content)
            found = Checkpoints(folder).newest_whole()
            assert found.step == 3, "a changed file was not seen, or a sealed one was"
            assert sealed or content == self.files[name]
            assert read_state(place).progress.step == 3
            load_checkpoint(place, self.trainee)
            assert {one: tuple(leaf.shape) for one, leaf in self.trainee.parameters.items()} == before
        finally:
            (place / name).write_bytes(self.files[name])
            shutil.copyfile(self.whole / "manifest.json", place / "manifest.json")

    def _seal(self, place: Path, name: str, content: bytes) -> None:
        """As `seal` does it, but without waiting for the disk."""
        record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        body = {key: value for key, value in self.manifest.items() if key != "sha256"}
        body["files"] = {**body["files"], name: record}
        own = hashlib.sha256(orjson.dumps(body, option=OPTIONS)).hexdigest()
        (place / "manifest.json").write_bytes(orjson.dumps({**body, "sha256": own}, option=OPTIONS))


class EventLines:
    """events.jsonl of a run that is gone on with, and all that reads it."""

    LINES: tuple[Json, ...] = (
        {"event": "start", "step": 0, "time": 1.5, "steps": 9, "train_rows": 9, "eval_rows": 1},
        {"event": "proof", "step": 0, "tokens": 9, "longest": 9, "documents": 1, "micro_batch": 1, "checkpointing": 0,
         "measured_gib": 0.5, "reserved_gib": 0.5, "predicted_gib": None, "measured_seconds": 0.1,
         "predicted_seconds": 0.2},
        {"event": "step", "step": 1, "loss": 2.5, "learning_rate": 0.1, "grad_norm": 1.5, "tokens": 9, "seconds": 0.5},
        {"event": "step", "step": 2, "loss": 2.25, "learning_rate": 0.1, "grad_norm": 1.5, "tokens": 9, "seconds": 0.5},
        {"event": "eval", "step": 2, "loss": 2.5, "perplexity": 12.0, "tokens": 9, "seconds": 0.5, "best": True},
        {"event": "warning", "step": 2, "message": "x", "kind": "", "rows": [1]},
        {"event": "end", "step": 3},
    )  # fmt: skip

    def make(self, chance: random.Random) -> bytes:
        lines = []
        for line in chance.choices(self.LINES, k=chance.randint(1, 30)):
            made = changed(line, chance, ("step", "proof", None)) if chance.random() < 0.1 else line
            lines.append(json.dumps(made, separators=(",", ":")).encode())
        return bent_sometimes(b"\n".join(lines) + chance.choice([b"\n", b"\n", b"", b"\n{"]), chance, 0.2)

    def read(self, text: bytes, folder: Path) -> None:
        from luthier.runs import RunDirectory
        from luthier.train.events import forget_after
        from luthier.train.measured import last_step_seconds, measured
        from luthier.train.spikes import Spikes
        from luthier.train.verify import check_files, choose_start, logged_steps

        run = RunDirectory(folder)
        run.events.write_bytes(text)
        check_files(run)
        choose_start(run, logged_steps(run), 2)
        forget_after(run.events, 2, 2)
        Spikes.read(run.events).add(2.5)
        last_step_seconds(run.events)
        measured(run.events, {})
