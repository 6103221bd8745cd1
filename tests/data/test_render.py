"""Templates: alpaca and texts with {fields}, their jinja sources, what is refused, and real rows under Llama 3's."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from luthier.data.conversation import IGNORED, Conversation, Source, Turn
from luthier.data.formats import FORMATS, Record
from luthier.data.render import Template, make_template
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import DataError, RecipeError
from tests import tiny
from tests.data.chats import CHATML, FORGETFUL, GENERATION, INSTRUCT, make_chat_tokenizer

HERE = Source("rows.jsonl", 7)
EOT = "<|eot_id|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    return make_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def row(name: str, **fields: object) -> Conversation:
    return FORMATS[name](Record(HERE, fields))


def parts(template: Template, conversation: Conversation) -> tuple[str, str]:
    """The text that is not trained, and the text that is."""
    found = template.encode(conversation)
    cut = [int(token) for token, label in zip(found.ids, found.labels, strict=True) if label == IGNORED]
    return template.tokenizer.decode(cut), template.tokenizer.decode([t for t in found.labels if t != IGNORED])


def chat(*contents: str) -> Conversation:
    return Conversation(
        tuple(Turn("assistant" if i % 2 else "user", content, bool(i % 2)) for i, content in enumerate(contents)), HERE
    )


ALPACA = (
    "<|begin_of_text|>Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
)
ALPACA_INPUT = (
    "<|begin_of_text|>Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2"
    "\n\n### Response:\n"
)


def test_alpaca_writes_its_standard_prompts(tokenizer):
    template = make_template("alpaca", tokenizer)
    assert parts(template, row("alpaca", instruction="Add.", output="3")) == (ALPACA, f"3{EOT}")
    assert parts(template, row("alpaca", instruction="Add.", input="1, 2", output="3")) == (ALPACA_INPUT, f"3{EOT}")
    with_system = row("alpaca", instruction="Add.", system="You add.", output="3")
    assert parts(template, with_system)[0] == "<|begin_of_text|>You add.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    assert parts(template, row("question-answer", question="Add.", answer="3")) == (ALPACA, f"3{EOT}")
    assert template.stop_strings == (EOT, "<|end_of_text|>")


@pytest.mark.parametrize(
    ("text", "fields", "prompt", "answer"),
    [
        ("{title}\n\n{content}", {"title": "T", "content": "Once."}, "T\n\n", "Once."),
        ("Q: {question}\nA: {answer}\n", {"question": "1?", "answer": "2"}, "Q: 1?\nA: ", "2"),
        ("{{{question}}} [{hint}] ->{answer}", {"question": "q", "hint": "h", "answer": " a"}, "{q} [h] ->", " a"),
        ("Tale: {text}", {"text": "Once."}, "Tale: ", "Once."),
        ("<|begin_of_text|>\"{a}\" 'é'\\{b}", {"a": "x", "b": "y"}, "\"x\" 'é'\\", "y"),
    ],
)
def test_text_templates(tokenizer, text, fields, prompt, answer):
    template = make_template(text, tokenizer)
    conversation = Conversation((Turn("user", "u"), Turn("assistant", "a", True)), HERE, fields)
    assert parts(template, conversation) == (f"<|begin_of_text|>{prompt}", f"{answer}{EOT}")
    assert make_template(template.name, tokenizer).chat_template_source == template.chat_template_source


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("alpaca", ("alpaca", {"instruction": "Add it's 12345.", "input": "1, 2", "output": "3"})),
        ("alpaca", ("alpaca", {"instruction": "Add.", "output": "3", "system": "You add."})),
        ("{title}\n\n{content}", ("title-content", {"title": "The Golden Bird", "content": "A certain king"})),
        ("Q: {question}\nNB {hint}\nA:{answer}", ("question-answer", {"question": "1?", "hint": "", "answer": " 2"})),
    ],
)
def test_the_exported_chat_template_gives_the_training_tokens(tokenizer, text, record):
    # What transformers makes of the exported template, from plain chat messages, is what was trained, token by token.
    template = make_template(text, tokenizer)
    conversation = row(record[0], **record[1])
    messages = [{"role": turn.role, "content": turn.content} for turn in template.turns(conversation)]
    reference = AutoTokenizer.from_pretrained(tokenizer.folder, local_files_only=True)
    reference.chat_template = template.chat_template_source
    found = template.encode(conversation)
    assert not found.parted
    assert found.ids.tolist() == reference.apply_chat_template(messages, return_dict=False)
    prompt = reference.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt == found.ids[: len(prompt)].tolist() == template.prompt_ids_of(conversation)


def test_a_token_over_the_prompts_end_is_parted_as_in_a_chat(tokenizer):
    template = make_template("Q: {question}\nA: {answer}", tokenizer)
    conversation = row("question-answer", question="1?", answer="the sky")
    found = template.encode(conversation)
    assert found.parted  # " the" would be one token
    prompt = template.prompt_ids_of(conversation)
    assert found.ids[: len(prompt)].tolist() == prompt
    assert found.ids[len(prompt) :].tolist() == [*tokenizer.encode("the sky"), template.end_of_turn]


def test_plain_text_is_trained_whole(tokenizer):
    for name in ("text", "model", "alpaca"):
        template = make_template(name, tokenizer)
        story = row("text", text="Once <|eot_id|> upon.")
        assert parts(template, story) == ("<|begin_of_text|>", f"Once <|eot_id|> upon.{EOT}")
        assert template.prompt_ids_of(story) == [tokenizer.bos_id]


@pytest.mark.parametrize(
    ("text", "question", "answer"),
    [
        ("<{question}|> {answer}", "|eot_id", "a"),
        ("<{question}{answer}", "|eot_", "id|>"),
        ("{question}{answer}", "<|eot", "_id|>"),
        ("{question}_{answer}", "<|eot", "id|>"),
        ("{question}|> {answer}", "<|eot_id", "a"),
    ],
)
def test_contents_cannot_complete_a_control_token(tokenizer, text, question, answer):
    template = make_template(text, tokenizer)
    conversation = row("question-answer", question=question, answer=answer)
    written = text.format(question=question, answer="")
    assert parts(template, conversation) == (f"<|begin_of_text|>{written}", f"{answer}{EOT}")
    assert template.encode(conversation).ids.tolist().count(template.end_of_turn) == 1
    assert template.prompt_ids_of(conversation).count(template.end_of_turn) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("alpacca", "did you mean alpaca"),
        ("no fields", "there is no template"),
        ("Q: {question\nA: {answer}", "cannot be read"),
        ("Q: {question}\nA: {answer} and more", "goes on after its last field {answer}: 'and more'"),
        ("{question} {question}", "names {question} twice"),
        ("{} {answer}", "{} in the text template is not a field's name"),
        ("{question:>9}{answer}", "{question:>9} in the text template"),
        ("{a}<|eot_id|>{b}{c}", "special token between its fields"),
    ],
)
def test_bad_text_templates(tokenizer, text, reason):
    with pytest.raises(RecipeError) as caught:
        make_template(text, tokenizer)
    assert reason in str(caught.value)


def test_a_row_without_a_field_the_template_names(tokenizer):
    template = make_template("{prompt}\n{answer}", tokenizer)
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the template names \{prompt\}, which the row lacks; it has"):
        template.encode(row("question-answer", question="q", answer="a"))


def test_a_model_without_a_chat_template(tmp_path):
    with pytest.raises(DataError, match="has no chat template") as caught:
        make_template("model", make_chat_tokenizer(tmp_path, None))
    assert "alpaca" in str(caught.value.remedy)


def test_a_template_that_rewrites_history_is_refused_by_turn(tmp_path):
    template = make_template("model", make_chat_tokenizer(tmp_path, FORGETFUL))
    assert parts(template, chat("q", "a"))[1] == f"<think>\n\n</think>\n\na{EOT}"
    with pytest.raises(DataError, match=r"rows\.jsonl:7: turn 2 has no honest mask: .* rewrites it once later turns"):
        template.encode(chat("q", "a", "q2", "a2"))
    only_last = chat("q", "a", "q2", "a2")
    turns = (*only_last.turns[:1], Turn("assistant", "a"), *only_last.turns[2:])
    assert parts(template, Conversation(turns, HERE))[1] == f"<think>\n\n</think>\n\na2{EOT}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "no special token"),
        ("{% for m in messages %}", "not valid jinja"),
        ("{{ messages[0]['content'] + 3 }}", "fails on the conversation"),
        ("{{ ''.__class__.__mro__ }}", "reaches for what no template may"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_chat_templates_that_cannot_train(tmp_path, source, reason):
    with pytest.raises(DataError) as caught:
        make_template("model", make_chat_tokenizer(tmp_path, source))
    assert reason in caught.value.message


def test_the_date_a_template_writes_is_the_same_on_any_day(tmp_path):
    source = CHATML.replace("{% for", "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}{% for", 1)
    template = make_template("model", make_chat_tokenizer(tmp_path, source))
    assert parts(template, chat("q", "a"))[0].startswith("Today: 26 Jul 2024\n")


def test_the_row_is_named_when_the_template_refuses_it(tmp_path):
    template = make_template("model", make_chat_tokenizer(tmp_path, INSTRUCT))
    turns = (Turn("user", "u"), Turn("tool", "t"), Turn("assistant", "a", True))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*Only user and assistant roles are supported"):
        template.encode(Conversation(turns, HERE))


def test_an_answer_begun_otherwise_than_prompted_is_refused(tmp_path):
    source = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    template = make_template("model", make_chat_tokenizer(tmp_path, source))
    with pytest.raises(DataError, match="turn 2 has no honest mask: the chat template does not begin the answer as it"):
        template.encode(chat("q", "a"))


def faults(template: Template, *conversations: Conversation) -> dict[int, str]:
    found = template.encode_chunk(conversations)
    assert all(fault.remedy for fault in found.faults.values())
    assert (found.lengths > 0).tolist() == [i not in found.faults for i in range(len(conversations))]
    assert len(found.ids) == len(found.labels) == found.lengths.sum()
    return {i: fault.reason for i, fault in found.faults.items()}


def test_a_faulty_row_harms_no_other(tmp_path):
    template = make_template("model", make_chat_tokenizer(tmp_path, INSTRUCT))
    refused = Conversation((Turn("tool", "t"), Turn("assistant", "a", True)), HERE)
    halved = chat("q", "half of a pair: \ud83e")
    found = faults(template, chat("q", "a"), refused, chat("q", "a <|eot_id|>"), halved, chat("q", "b"))
    assert list(found) == [1, 3]
    assert "Only user and assistant roles are supported" in found[1]
    assert "half of a UTF-16 pair (U+D83E)" in found[3]
    assert not faults(template)
    every = make_template("{question}\n{answer}", template.tokenizer)
    rows = [row("question-answer", question="q", answer=answer) for answer in ("a", "b")]
    lacking = Conversation(rows[0].turns, HERE, {"question": "q"})
    assert faults(every, rows[0], lacking, rows[1]) == {
        1: "the template names {answer}, which the row lacks; it has question"
    }
    halved = Conversation(chat("half \udc00").turns, HERE, plain=True)
    assert "half of a UTF-16 pair" in faults(template, halved)[0]


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("{{ raise_exception('not this one') }}", "not this one"),
        ("{{ messages.x.y }}", "has no attribute 'x'"),
        ("{{ ''.__class__ }}", "reaches for what no template may"),
        ("{{ 'a' * 10**10 }}", "grows without bound"),
        ("{{ bos_token }}", "the beginning-of-text token 2 times"),
    ],
)
def test_what_goes_wrong_with_one_row_only(tmp_path, does, reason):
    source = "{% if messages[0].content == 'bad' %}" + does + "{% endif %}" + tiny.CHAT_TEMPLATE
    template = make_template("model", make_chat_tokenizer(tmp_path, source))
    found = faults(template, chat("q", "a"), chat("bad", "a"), chat("q", "b"))
    assert list(found) == [1]
    assert reason in found[1]


def test_an_answer_whose_end_the_tokenizer_swallows_is_refused(tmp_path):
    # A tokenizer that makes a control token out of plain text, so that nothing can be promised about its masks.
    from tokenizers import Regex, normalizers

    fast = tiny.make_tokenizer()
    fast.backend_tokenizer.normalizer = normalizers.Replace(Regex("WIPE"), "")
    fast.backend_tokenizer.add_tokens([AddedToken("stop", special=True, normalized=True)])
    fast.save_pretrained(tmp_path)
    template = make_template("model", load_tokenizer(tmp_path))
    assert list(faults(template, chat("q", "a"), chat("q", "stWIPEop"))) == [1]


def test_train_on(tmp_path):
    tokenizer = make_chat_tokenizer(tmp_path)
    conversation = chat("q", "a", "r", "b")
    trained = {}
    for train_on in ("completions", "last", "all"):
        template = make_template("model", tokenizer, train_on)
        trained[train_on] = parts(template, conversation)[1]
        text = "tell me <|eot_id|>"
        assert parts(template, row("text", text=text))[1].endswith(f"{text}{EOT}")
    assert trained["completions"] == f"a{EOT}b{EOT}"
    assert trained["last"] == f"b{EOT}"
    assert trained["all"] == make_template("model", tokenizer).render(conversation.turns)


def test_train_on_last_needs_no_honest_mask_for_the_others(tmp_path):
    tokenizer = make_chat_tokenizer(tmp_path, FORGETFUL)
    conversation = chat("q", "a", "q2", "a2")
    assert parts(make_template("model", tokenizer, "last"), conversation)[1] == f"<think>\n\n</think>\n\na2{EOT}"
    whole = make_template("model", tokenizer, "all")
    assert parts(whole, conversation)[0] == ""


def test_the_end_of_turn_is_trained_also_where_it_pads(tmp_path):
    fast = tiny.make_tokenizer()
    fast.pad_token = fast.eos_token
    fast.save_pretrained(tmp_path)
    template = make_template("model", load_tokenizer(tmp_path))
    found = template.encode(chat("q", "a", "r", "b"))
    assert found.labels.tolist().count(template.end_of_turn) == 2


def test_fingerprints_tell_what_decides_the_labels(tmp_path):
    tokenizer = make_chat_tokenizer(tmp_path / "one")
    first = make_template("model", tokenizer)
    assert first.fingerprint == make_template("model", make_chat_tokenizer(tmp_path / "two")).fingerprint
    others = [
        make_template("alpaca", tokenizer),
        make_template("model", tokenizer, "last"),
        make_template("model", tokenizer, "all"),
        make_template("{a} {b}", tokenizer),
        make_template("model", make_chat_tokenizer(tmp_path / "three", CHATML)),
    ]
    assert len({first.fingerprint, *(template.fingerprint for template in others)}) == 6


def test_bos_stands_once(tmp_path):
    from tokenizers.processors import TemplateProcessing

    fast = tiny.make_tokenizer()
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    for name, source in (("with", tiny.CHAT_TEMPLATE), ("without", CHATML), ("double", "{{ bos_token }}" + GENERATION)):
        fast.chat_template = source
        fast.save_pretrained(tmp_path / name)
    once = [make_template("model", load_tokenizer(tmp_path / name)) for name in ("with", "without")]
    for template in once:  # the one that writes none relies on the tokenizer, whose text it becomes
        ids = template.encode(chat("q", "a", "q2", "a2")).ids.tolist()
        assert (ids[0], ids.count(0)) == (0, 1)
    assert once[1].chat_template_source == "{{ bos_token }}" + CHATML
    doubled = make_template("model", load_tokenizer(tmp_path / "double"))
    with pytest.raises(DataError, match="writes the beginning-of-text token 2 times"):
        doubled.encode(chat("q", "a"))


@pytest.mark.shared
@pytest.mark.parametrize("source", [None, GENERATION], ids=["its own", "with generation marks"])
def test_real_rows_are_what_transformers_makes_of_them(shared, tmp_path, source):
    folder = shared / "tokenizers" / "llama-3"
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if source is not None:
        reference.chat_template = source
        reference.save_pretrained(tmp_path)
        folder = tmp_path
    template = make_template("model", load_tokenizer(folder))
    with (shared / "data" / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        rows = random.Random(0).sample([json.loads(line) for line in file], 400)
    conversations = [row("question-answer", **fields) for fields in rows]
    # Longer chats too: three rows one after another.
    for i in range(50):
        conversations.append(chat(*(text for r in rows[i : i + 3] for text in (r["question"], r["answer"]))))
    messages = [[{"role": t.role, "content": t.content} for t in c.turns] for c in conversations]
    marks = source is not None  # transformers masks, and so TRL's, need them; ours do not
    expected = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=marks)
    for number, found in enumerate(template.encode_many(conversations)):
        assert found.ids.tolist() == expected["input_ids"][number]
        if marks:
            trained = [int(label != IGNORED) for label in found.labels]
            assert trained == expected["assistant_masks"][number]


def test_a_beginning_of_text_token_that_opens_every_turn_is_not_counted(tmp_path):
    """SmolLM2's: its BOS is the token before each role, and its tokenizer does not add it."""
    make_chat_tokenizer(tmp_path / "t", CHATML)
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text(encoding="utf-8"))
    changed = json.dumps({**config, "bos_token": "<|start_header_id|>"})
    (tmp_path / "t" / "tokenizer_config.json").write_text(changed, encoding="utf-8")
    template = make_template("model", load_tokenizer(tmp_path / "t"))
    assert template.tokenizer.bos_id is not None
    assert not template.tokenizer.adds_bos
    found = template.encode(Conversation((Turn("user", "Hi"), Turn("assistant", "Hello", True)), Source("f", 1)))
    assert found.ids.tolist().count(template.tokenizer.bos_id) == 2
