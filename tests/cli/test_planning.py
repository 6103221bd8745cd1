"""`luthier plan`: what it shows at several widths, its options, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.command import Command

ROWS: list[dict[str, object]] = [
    {"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}, of course."} for i in range(60)
]
LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    path = tmp_path / "recipe.yaml"
    path.write_text("model: sprig\ndata: rows.jsonl\n", encoding="utf-8")
    return path


@pytest.fixture
def huge(recipe: Path) -> Path:
    """A model of 70B, of which only the config is there."""
    folder = recipe.parent / "huge"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
    recipe.write_text("model: huge\ndata: rows.jsonl\n", encoding="utf-8")
    return recipe


@pytest.mark.parametrize("width", [80, 120])
def test_the_plan_is_readable_at_the_width_of_the_terminal(
    luthier: Command, recipe: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.cli import console

    monkeypatch.setattr(console.output, "width", width)
    ended = luthier("plan", recipe, "--hardware", "t4")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("plan    ")
    assert lines[1].startswith("memory  ")
    assert (lines[2][0], lines[2][-1], len(lines[2])) == ("[", "]", width)
    assert any(line.startswith("time    ") for line in lines)
    assert "train.micro_batch" in ended.out
    assert " Not " not in ended.out
    assert "luthier data check" in ended.err.splitlines()[-1]


def test_why_gives_sources_and_what_was_rejected(luthier: Command, recipe: Path) -> None:
    short, full = (luthier("plan", recipe, "--hardware", "a10g", *more) for more in ((), ("--why",)))
    assert "Not nf4: would save" in " ".join(full.out.split())
    assert "[LoRA Without Regret" in " ".join(full.out.split())
    assert len(full.out) > 1.5 * len(short.out)


def test_price_and_margin(luthier: Command, recipe: Path) -> None:
    ended = luthier("plan", recipe, "--hardware", "a10g", "--price", "3600", "--margin", "0.2", "--json")
    document = json.loads(ended.out)
    assert document["time"]["cost"] == pytest.approx(document["time"]["total_seconds"])
    assert document["memory"]["margin"] == 0.2
    assert "at 3600 an hour" in luthier("plan", recipe, "--hardware", "a10g", "--price", "3600").out


@pytest.mark.parametrize("margin", ["1", "-0.1", "8", "nan"])
def test_a_margin_that_is_no_share(luthier: Command, recipe: Path, margin: str) -> None:
    ended = luthier("plan", recipe, "--margin", margin)
    assert ended.code == 2
    assert "is no share of memory" in ended.message


def test_70b_on_a_24_gb_card_is_refused(luthier: Command, huge: Path) -> None:
    for more in ((), ("--json",)):
        ended = luthier("plan", huge, "--hardware", "rtx4090", *more)
        assert ended.code == 4
        if more:
            assert json.loads(ended.out)["error"]["exit_code"] == 4
        else:
            assert ended.out == ""
        assert "NVIDIA GeForce RTX 4090 has 21.7 GiB for it" in ended.message
        assert "one of these, each computed:" in ended.message


def test_70b_in_4_bits_over_four_cards(luthier: Command, huge: Path) -> None:
    ended = luthier("plan", huge, "--hardware", "4xa100-40g", "--set", "quantize=nf4", "--json")
    document = json.loads(ended.out)
    assert document["devices"] == 4
    sharding = next(one for one in document["decisions"] if one["setting"] == "sharding")
    assert sharding["value"] == "fsdp"
