"""An adapter's folder as input, read into a model that has none yet."""

from __future__ import annotations

import json
import random
import struct
import tempfile
from pathlib import Path

from tests.fuzz.changes import Json, bent, bent_sometimes, changed


class Adapter:
    """adapter_config.json or the header of its weights changed."""

    FILES = ("adapter_config.json", "adapter_model.safetensors")
    OWN: tuple[Json, ...] = (
        *("rslora", "LORA", "all-linear", "attention", ["q_proj"], ["q_proj", "v_proj"], "F16", "U8", 10**9, 1, 2, 3),
        *([2, 48], [96, 2], [10**9, 48], "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    )

    def __init__(self) -> None:
        import torch

        from luthier.model.adapter import save_adapter
        from luthier.model.load import load_decoder
        from luthier.model.lora import LoRASpec, add_lora
        from tests import tiny

        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            self.decoder = load_decoder(tiny.make_model(home / "model"), dtype=torch.float32)
            add_lora(self.decoder, LoRASpec(2, 4.0, targets=("q_proj", "down_proj")), seed=1)
            save_adapter(self.decoder, home / "adapter", base="b")
            self._take_out()
            self.files = {name: (home / "adapter" / name).read_bytes() for name in self.FILES}

    def _take_out(self) -> None:
        from luthier.model.lora import projections

        for _, projection in projections(self.decoder):
            projection.adapter = None

    def make(self, chance: random.Random) -> bytes:
        name = chance.choice(self.FILES)
        content = self.files[name]
        if name.endswith(".json"):
            content = bent_sometimes(json.dumps(changed(json.loads(content), chance, self.OWN)).encode(), chance, 0.2)
        else:
            size = struct.unpack("<Q", content[:8])[0]
            header, body = content[8 : 8 + size], content[8 + size :]
            if chance.random() < 0.8:
                header = json.dumps(changed(json.loads(header), chance, self.OWN)).encode()
            if chance.random() < 0.3:
                body = bent(body, chance)
            content = struct.pack("<Q", len(header)) + header + body
        return bytes([self.FILES.index(name)]) + content

    def read(self, text: bytes, folder: Path) -> None:
        from luthier.errors import LuthierError
        from luthier.model.adapter import load_adapter
        from luthier.model.lora import lora_parameters

        for name in self.FILES:
            (folder / name).write_bytes(self.files[name])
        (folder / self.FILES[text[0]]).write_bytes(text[1:])
        try:
            load_adapter(self.decoder, folder)
            assert lora_parameters(self.decoder)
        except LuthierError:
            assert not lora_parameters(self.decoder), "a refused adapter left something behind"
            raise
        finally:
            self._take_out()
