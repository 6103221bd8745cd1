"""Tokenizers for the data tests: the small Llama-3-like one, with one of several chat templates, loaded from a folder.

The templates are written here from the published layouts of their families, with the special tokens that the small
tokenizer has. All of them leave contents as they are, so a content's spaces and line breaks meet the template's text.
"""

from __future__ import annotations

import json
from pathlib import Path

from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from tests import tiny

CHATML = (  # one line break after the role, one after the end of turn; no BOS
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '\n' + message['content'] + '<|eot_id|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)
INSTRUCT = (  # Mistral's: the user's turn in brackets, a space before the answer, the system turn in the first user's
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
GENERATION = (  # with the marks from which transformers makes its assistant mask
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
FORGETFUL = (  # Qwen 3's habit: the last answer has a block that earlier ones lose
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|eot_id|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)


def make_chat_tokenizer(folder: Path, template: str | None = tiny.CHAT_TEMPLATE) -> ChatTokenizer:
    """The small tokenizer with `template`, saved by transformers into `folder` and loaded by us."""
    fast = tiny.make_tokenizer()
    fast.chat_template = template
    fast.save_pretrained(folder)
    ends = [fast.convert_tokens_to_ids("<|end_of_text|>"), fast.convert_tokens_to_ids("<|eot_id|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    return load_tokenizer(folder)
