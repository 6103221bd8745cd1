"""What a user gives as inputs: recipes, rows, chat templates."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.fuzz.changes import Json, bent_sometimes, changed


class Recipe:
    """A recipe: YAML from settings that are right but for a few."""

    PARTS = (
        *("model: sprig", "data: pirate", "data: rows.jsonl", "template: model", 'template: "Q: {q}\\nA: {a}"'),
        *("adapter: {kind: lora, rank: 8, alpha: 16, dropout: 0.1, targets: all-linear, scale: rslora}", "seed: 3"),
        *("quantize: nf4", "hardware: this", "export: [hf, gguf]", "split: {train: 0.9, eval: 0.1}", "evaluate: {}"),
        *("train:\n  steps: 60\n  batch_size: 8\n  learning_rate: 1e-4\n  precision: fp32", "train: {epochs: 2}"),
        *("data:\n  - {path: a.jsonl, split: train, weight: 2}\n  - path: b.jsonl", "train: {max_time: 2h30m}"),
    )
    ODD = (
        *(
            "a: &a [x, x]\nb: *a",
            "<<: *b",
            "!!python/object/apply:os.system [ls]",
            "? [1]\n: 2",
            "---",
            "...",
            "%YAML 1.1",
        ),
        *("x: " + "[" * 40, "y: " + "{a: " * 30, "seed: 99999999999999999999999", "seed: 1e400", "seed: .nan", "\t- a"),
        *(
            "train: {steps: -1}",
            "train: 3",
            "data: []",
            "data: {path: }",
            "model: ''",
            "model: ../../x",
            "data: https://u:p@h/x",
        ),
        *("template: '{a'", "template: '{a.__class__}{b}'", "template: '{0}{1:>99999999999}'", "split: {train: .inf}"),
        *(
            "train: {max_time: 99999999999999999h}",
            "train: {max_time: .5}",
            "seed: 0x1F",
            "seed: 1_000",
            "seed: 2024-01-01",
        ),
    )

    def make(self, chance: random.Random) -> bytes:
        parts = ["model: sprig", "data: pirate", *chance.sample(self.PARTS, chance.randint(1, 5))]
        parts += chance.sample(self.ODD, chance.choice([0, 0, 1, 1, 2]))
        if chance.random() < 0.7:
            parts = list({part.split(":")[0]: part for part in parts}.values())  # else some stand twice
        chance.shuffle(parts)
        return bent_sometimes("\n".join(parts).encode(), chance, 0.5)

    def read(self, text: bytes, folder: Path) -> None:
        from luthier.recipe.load import dump_recipe, load_recipe

        path = folder / "recipe.yaml"
        path.write_bytes(text)
        recipe = load_recipe(path)
        (folder / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(folder / "again.yaml") == recipe


class Rows:
    """A JSONL file: rows of every known format, some with a fault, one of them huge now and then."""

    ROWS: tuple[Json, ...] = (
        {"question": "q", "answer": "a"},
        {"instruction": "i", "input": "", "output": "o"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"text": "some text <|eot_id|>"},
        {"prompt": "p", "completion": "c", "weight": 2},
    )

    def make(self, chance: random.Random) -> bytes:
        usual, lines = chance.choice(self.ROWS), []
        for _ in range(chance.randint(1, 8)):
            row = usual if chance.random() < 0.9 else chance.choice(self.ROWS)
            row = changed(row, chance, ("user", "system", "tool", "<|eot_id|>")) if chance.random() < 0.4 else row
            lines.append(
                bent_sometimes(
                    json.dumps(row, ensure_ascii=chance.random() < 0.5).encode(errors="surrogatepass"), chance, 0.2
                )
            )
        return chance.choice([b"\n", b"\n", b"\r\n", b"\n\n", b"\r"]).join(lines)

    def read(self, text: bytes, folder: Path) -> None:
        from luthier.data.conversation import Conversation
        from luthier.data.problems import BadRow
        from luthier.data.sources import open_sources, read_sources
        from luthier.recipe.schema import DataSource

        path = folder / "rows.jsonl"
        path.write_bytes(text)
        named = [DataSource(path=str(path))]
        for source in open_sources(named):
            for row in source.rows():
                if isinstance(row, BadRow):
                    assert row.problem.reason
                else:
                    assert isinstance(row, Conversation)
        read_sources(named)  # which refuses the file where one row of it is bad


class Template:
    """A chat template, and what it makes of a conversation."""

    START = (
        "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>' }}"
        "{% if message.content is string %}{{ message['content'] | trim }}"
        "{% else %}{{ message.content | tojson }}{% endif %}"
        "<|eot|>{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    )
    PIECES = (
        *(
            "{{ messages.__class__.__mro__[1].__subclasses__() }}",
            "{{ ''|attr('__class__') }}",
            "{{ bos_token * 10**9 }}",
        ),
        *("{% for i in range(10**9) %}x{% endfor %}", "{% for a in range(99999) %}x{% endfor %}"),
        *("{% set ns = namespace(x='a') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",),
        *(
            "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
            "{% include 'x' %}",
            "{% extends '/etc/passwd' %}",
            "{% import 'os' as o %}",
        ),
        *(
            "{{ raise_exception('no') }}",
            "{{ strftime_now('%' * 99) }}",
            "{{ strftime_now('%999999999d') }}",
            "{{ strftime_now('%9999999d' * 99999) }}",
            "{{ raise_exception('no' * 999999) }}",
            "{{ 2 ** 99999 }}",
            "{{ 'x'.format(a) }}",
            "{{ '{0.__class__}'.format(1) }}",
        ),
        *(
            "{{ messages[0] | tojson(indent=99999999) }}",
            "{{ [1, 2] | batch(10**9, 0) | list }}",
            "{{ 1 / 0 }}",
            "{{ messages[99].x.y }}",
        ),
        *(
            "{{ messages.append(1) }}",
            "{{ self.x }}",
            "{{ cycler(1, 2).next() }}",
            "{% raw %}{{{% endraw %}",
            "{# ",
            "{{ '%s' % 'x' }}",
        ),
        *(
            "{{ lipsum(n=99999) }}",
            "{{ dict(a=1).update }}",
            "{% generation %}a{% endgeneration %}",
            "{% break %}",
            "{{ x|map('upper')|list }}",
        ),
        *(
            "{{ 'a'.encode().decode('rot13') }}",
            "{{ 'ab'|center(2**40) }}",
            "{{ '%9999999999s' % 1 }}",
            "{{ (1, 2) | sum(start=[]) }}",
        ),
        *(
            "{{ messages|map(attribute='content')|join('a' * 9999) }}",
            "{{ messages|groupby('role') }}",
            "{{ " + "(" * 150 + ")" * 150 + " }}",
        ),
    )

    def make(self, chance: random.Random) -> bytes:
        text = self.START
        for _ in range(chance.choice([0, 1, 1, 2])):
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chance.choice(self.PIECES) + text[at:]
        if chance.random() < 0.3:
            text = chance.choice(self.PIECES)
        if chance.random() < 0.002:  # each takes the whole second that a template may take
            text += "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        return bent_sometimes(text.encode(), chance, 0.4)

    def read(self, text: bytes, folder: Path) -> None:  # noqa: ARG002  (as the others)
        from luthier.data.conversation import Turn
        from luthier.data.jinja_chat import render_chat
        from luthier.errors import DataError

        turns = (Turn("system", "be kind"), Turn("user", "hi {{ 7 * 7 }}"), Turn("assistant", "yes"))
        source = text.decode(errors="replace")
        special: dict[str, str | list[str]] = {"bos_token": "<s>", "eos_token": "</s>"}
        try:
            assert isinstance(render_chat(source, turns, generation_prompt=False, special=special), str)
        except DataError as error:
            if len(error.message) > 1000:
                raise AssertionError("what is told of every row is short") from error
            raise
