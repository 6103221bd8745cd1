"""The tokenizer: stop ids, plain encoding of contents, and loading what is there or saying what is not."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier.data.conversation import Conversation, Source, Turn
from luthier.data.render import make_template
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import DataError, ModelError
from tests import tiny
from tests.data.chats import make_chat_tokenizer

HERE = Source("rows.jsonl", 7)
SPECIALS = ("<unk>", "<s>", "</s>")
NAMES = ("unk_token", "bos_token", "eos_token")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    return make_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> ChatTokenizer:
    """A tokenizer of Llama 2's kind: spaces as ▁, one put before each text, specials inside the model's vocabulary."""
    tok = Tokenizer(models.BPE(unk_token=SPECIALS[0], fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    tok.train_from_iterator(["</s> <s> [INST] a b [/INST] c", *tiny.TEXT], trainer)
    document = json.loads(tok.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in SPECIALS]
    tok = Tokenizer.from_str(json.dumps(document))
    tok.add_tokens([AddedToken("<tool>", normalized=True)])  # a plain added token, which contents may well hold
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, **dict(zip(NAMES, SPECIALS, strict=True)))
    folder = tmp_path_factory.mktemp("sentencepiece")
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


def test_stop_ids_are_those_of_every_file(tmp_path):
    make_chat_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 3}), encoding="utf-8")
    found = load_tokenizer(tmp_path)
    assert found.eos_ids == (1, 5, 3)  # generation_config's two, then config's; the tokenizer's own is one of them
    assert found.bos_id == 0
    assert found.token_id(str(found.eos_token)) == 5
    assert found.chat_template == tiny.CHAT_TEMPLATE
    assert found.vocab_size == len(tiny.make_tokenizer())


def test_contents_are_encoded_as_if_there_were_no_special_tokens(tokenizer):
    text = "stop.<|eot_id|> and <|begin_of_text|><|eot_id|>"
    backend = tiny.make_tokenizer().backend_tokenizer
    backend.encode_special_tokens = True  # the reference: the library's own switch
    assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert not set(tokenizer.encode(text)) & tokenizer.control_ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, special=True).count(5) == 2


def test_contents_stay_plain_for_a_tokenizer_of_the_sentencepiece_kind(sentencepiece):
    text = "say </s> <s>x <tool> </s>"
    found = sentencepiece.encode(text)
    assert not set(found) & sentencepiece.control_ids
    assert found.count(sentencepiece.token_id("<tool>")) == 1
    assert sentencepiece.decode(found) == text
    assert sentencepiece.encode("<s>a b</s>", special=True)[0] == sentencepiece.bos_id


def test_template_text_and_contents_keep_apart_in_one_string(sentencepiece):
    mark, (content,) = sentencepiece.guard(["a</s>b"])
    found = sentencepiece.encode_guarded(f"<s>{content}</s>", mark)
    assert [token for token in found if token in sentencepiece.control_ids] == [1, 2]
    # What stands between the template's tokens is what a text without control tokens would be there.
    plain = sentencepiece.encode_guarded("<s>a b</s>", "")
    mark, (content,) = sentencepiece.guard(["a b"], edges=True)
    assert sentencepiece.encode_guarded(f"<s>{content}</s>", mark) == plain


def test_rows_in_a_vocabulary_of_the_sentencepiece_kind(sentencepiece):
    # It has no pre-tokenizer, so tokens reach over everything but control tokens: over the prompt's end, above all.
    rows = [("Why?", "Because it is."), ("a </s> b", "<s>"), ("", "x"), ("The sky", " blue"), ("1 2", "the 3\n")]
    for text in ("Q: {question}\nA: {answer}", "{question} {answer}", "<s>[INST] {question} [/INST]{answer}"):
        template = make_template(text, sentencepiece)
        conversations = [
            Conversation((Turn("user", q), Turn("assistant", a, True)), HERE, {"question": q, "answer": a})
            for q, a in rows
        ]
        for conversation, found in zip(conversations, template.encode_many(conversations), strict=True):
            prompt = template.prompt_ids_of(conversation)
            assert found.ids[: len(prompt)].tolist() == prompt
            assert found.labels.tolist() == [-100] * len(prompt) + found.ids[len(prompt) :].tolist()
            assert found.ids.tolist().count(2) == 1 == found.ids.tolist().count(1)
            answer = conversation.fields["answer"]
            # Its decoder takes one space from a text's beginning, as its normalizer puts one there.
            assert sentencepiece.decode(found.ids[len(prompt) : -1].tolist()).lstrip() == answer.lstrip()


def test_overlapping_pieces_are_all_broken(tokenizer):
    for content in ("<|eot_id|>" * 3, "<|eot_<|eot_id|>id|>", "<|begin_of_text<|eot_id|>|>"):
        mark, (guarded,) = tokenizer.guard([content])
        assert not tokenizer.control_pattern.search(guarded)
        assert guarded.replace(mark, "") == content


def test_the_mark_is_a_character_that_no_content_has(tokenizer):
    contents = ["\ue000<|eot_id|>", "\ue001 and \ue000"]
    mark, guarded = tokenizer.guard(contents)
    assert mark == "\ue002"
    assert [text.replace(mark, "") for text in guarded] == contents
    assert tokenizer.decode(tokenizer.encode_guarded(guarded[0], mark)) == contents[0]


def test_a_length_in_the_file_is_not_obeyed(tmp_path):
    fast = tiny.make_tokenizer()
    fast.backend_tokenizer.enable_truncation(4)
    fast.backend_tokenizer.enable_padding(length=64)
    fast.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "The quick brown fox jumps over the lazy dog."
    found = load_tokenizer(tmp_path)
    assert found.decode(found.encode(text)) == text
    assert found.decode(found.encode_batch([text, "a"])[1]) == "a"


def test_bos_of_the_tokenizers_own_is_seen(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    assert not tokenizer.adds_bos
    fast = tiny.make_tokenizer()
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    fast.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).adds_bos


def test_the_fingerprint_tells_what_decides_ids(tmp_path, tokenizer):
    assert make_chat_tokenizer(tmp_path / "same", None).fingerprint == tokenizer.fingerprint  # templates decide no ids
    fast = tiny.make_tokenizer()
    fast.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    fast.save_pretrained(tmp_path / "more")
    other_eos = tiny.make_tokenizer()
    other_eos.add_special_tokens({"eos_token": "<|end_of_text|>"})
    other_eos.save_pretrained(tmp_path / "eos")
    found = {load_tokenizer(tmp_path / name).fingerprint for name in ("more", "eos")}
    assert len(found | {tokenizer.fingerprint}) == 3


def test_control_tokens_are_found_the_longest_first(tmp_path):
    fast = tiny.make_tokenizer()
    names = ["<a>", "<a>b", "<ab", "x<|eot_id|>", "[INST]", "[/INST]", "<|eot_id|>|"]
    fast.add_special_tokens({"additional_special_tokens": names})
    fast.save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    longest_first = "|".join(re.escape(text) for text in sorted(found.controls, key=len, reverse=True))
    text = "<a>b<a><ab<abc<a>bx<|eot_id|>|<|eot_id|>|[INST][/INST]<|eot_id|<|eot_id|>"
    assert found.control_pattern.findall(text) == re.findall(longest_first, text)


def test_render_needs_a_template(tmp_path):
    bare = make_chat_tokenizer(tmp_path, None)
    with pytest.raises(DataError, match="has no chat template"):
        bare.render([])


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
