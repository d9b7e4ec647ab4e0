"""Which tokens a row has and which are learned: expected values are written out, token by token."""

from pathlib import Path

import pytest

from splitllm.data.formats import FIELDS, FORMATS, to_examples
from splitllm.data.rows import Row
from splitllm.errors import DataError
from splitllm.recipe import DataRecipe


def recipe(**keys: object) -> DataRecipe:
    return DataRecipe(source="x.jsonl", **keys)


def one(row: dict, tokenizer, **keys: object) -> tuple[list[int], list[int]]:
    """The row's ids, and of them those that are learned."""
    (example,), _ = to_examples([Row(row, "x.jsonl", 1)], recipe(**keys), tokenizer)
    return example.ids.tolist(), example.ids[example.targets].tolist()


def refused(row: dict, tokenizer, **keys: object) -> str:
    with pytest.raises(DataError) as caught:
        to_examples([Row({"a": 1}, "f.csv", 1) if row is None else Row(row, "x.jsonl", 7)], recipe(**keys), tokenizer)
    return str(caught.value)


def test_every_format_names_its_fields():
    assert set(FORMATS) == set(FIELDS) == {"prompt_completion", "chat", "text"}


# --- prompt_completion: a b c d e are tokens 3..7, <s> is 1, </s> is 2


def test_prompt_is_masked_completion_and_end_are_learned(words):
    assert one({"prompt": "a b", "completion": "c d"}, words) == ([3, 4, 5, 6, 2], [5, 6, 2])


def test_begin_of_sequence_stands_before_the_prompt_once(words_bos):
    assert one({"prompt": "a b", "completion": "c d"}, words_bos) == ([1, 3, 4, 5, 6, 2], [5, 6, 2])


def test_fields_can_be_renamed(words):
    row = {"question": "a", "answer": "b"}
    assert one(row, words, fields={"prompt": "question", "completion": "answer"}) == ([3, 4, 2], [4, 2])


def test_without_any_context_the_first_token_is_not_learned(words, words_bos):
    assert one({"prompt": "", "completion": "c d"}, words) == ([5, 6, 2], [6, 2])
    assert one({"prompt": "", "completion": "c d"}, words_bos) == ([1, 5, 6, 2], [5, 6, 2])


@pytest.mark.parametrize(
    ("length", "ids", "learned"),
    [
        (7, [1, 3, 4, 5, 6, 7, 2], [6, 7, 2]),
        (6, [1, 4, 5, 6, 7, 2], [6, 7, 2]),  # the prompt loses its first word, <s> stays
        (5, [1, 5, 6, 7, 2], [6, 7, 2]),
        (4, [1, 6, 7, 2], [6, 7, 2]),
        (3, [1, 6, 7], [6, 7]),  # one token of context stays; then the completion is cut at the right
    ],
)
def test_a_long_prompt_is_cut_from_the_left(words_bos, length, ids, learned):
    assert one({"prompt": "a b c", "completion": "d e"}, words_bos, max_length=length) == (ids, learned)


def test_a_long_prompt_without_begin_of_sequence(words):
    assert one({"prompt": "a b c", "completion": "d e"}, words, max_length=4) == ([5, 6, 7, 2], [6, 7, 2])
    assert one({"prompt": "a b c", "completion": "d e"}, words, max_length=2) == ([5, 6], [6])
    assert one({"prompt": "", "completion": "d e"}, words, max_length=2) == ([6, 7], [7])


def test_tokenizer_without_end_is_refused(make_tokenizer):
    assert "eos_token" in refused({"prompt": "a", "completion": "b"}, make_tokenizer(eos=False))


def test_missing_field_names_line_field_and_remedy(words):
    message = refused({"prompt": "a", "answer": "b"}, words)
    assert message.startswith("x.jsonl:7: no field 'completion'")
    assert "data.fields.completion" in message
    assert "prompt, answer" in message


def test_field_of_another_type_is_refused_without_showing_it(words):
    message = refused({"prompt": "a", "completion": 31337}, words)
    assert "x.jsonl:7: field 'completion' is a int" in message
    assert "31337" not in message


def test_many_bad_rows_are_summed_up(words):
    rows = [Row({"prompt": "a"}, "x.jsonl", line) for line in range(1, 41)]
    with pytest.raises(DataError) as caught:
        to_examples(rows, recipe(), words)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("x.jsonl:1:")
    assert lines[-1] == "... and 35 more like these"


def test_unknown_renamed_field_is_refused(words):
    assert "data.fields.input" in refused({"prompt": "a"}, words, fields={"input": "prompt"})


# --- text


def test_text_learns_all_but_the_first(words, words_bos):
    assert one({"text": "a b c"}, words, format="text") == ([3, 4, 5], [4, 5])
    assert one({"text": "a b c"}, words_bos, format="text") == ([1, 3, 4, 5], [3, 4, 5])


def test_long_text_is_cut_at_the_right_and_counted(words):
    rows = [Row({"text": text}, "t.txt", 1) for text in ("a b c d", "a b")]
    (first, second), cut = to_examples(rows, recipe(format="text", max_length=3), words)
    assert (first.ids.tolist(), second.ids.tolist(), cut) == ([3, 4, 5], [3, 4], 1)


def test_rows_without_a_target_give_none(words):
    rows = [Row({"text": text}, "t.txt", 1) for text in ("", "a", "a b")]
    found, _ = to_examples(rows, recipe(format="text"), words)
    assert [example is None for example in found] == [True, True, False]


def test_packing_is_for_text_only(words):
    assert "data.pack" in refused({"prompt": "a", "completion": "b"}, words, pack=True)


# --- chat: [user] is 8, [assistant] 9, [end] 10, [system] 11


def say(*turns: str) -> dict:
    return {"messages": [dict(zip(("role", "content"), turn.split(":"), strict=True)) for turn in turns]}


def test_only_the_assistants_two_turns_are_learned(words_chat):
    ids, learned = one(say("user:a", "assistant:b c", "user:d", "assistant:e"), words_chat, format="chat")
    assert ids == [1, 8, 3, 10, 9, 4, 5, 10, 8, 6, 10, 9, 7, 10]
    assert learned == [4, 5, 10, 7, 10]


def test_a_system_turn_is_context(words_chat):
    ids, learned = one(say("system:e", "user:a", "assistant:b"), words_chat, format="chat")
    assert (ids, learned) == ([1, 11, 7, 10, 8, 3, 10, 9, 4, 10], [4, 10])


def test_chat_equals_the_tokenizers_own_rendering(words_chat):
    row = say("user:a", "assistant:b c", "user:d", "assistant:e")
    own = words_chat.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
    assert one(row, words_chat, format="chat")[0] == own


GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + ('assistant' if m.role == 'assistant' else m.role) + ']\n' + m.content | trim + ' [end]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


def test_a_template_of_gemmas_shape(make_tokenizer):
    tokenizer = make_tokenizer(bos=True, chat_template=GEMMA.replace("bos_token }}", "bos_token + ' ' }}"))
    row = say("user: a ", "assistant: b ", "user:c", "assistant:d e")
    assert one(row, tokenizer, format="chat") == ([1, 8, 3, 10, 9, 4, 10, 8, 5, 10, 9, 6, 7, 10], [4, 10, 6, 7, 10])
    assert "x.jsonl:7: the tokenizer's chat template refuses it" in refused(
        say("user:a", "user:b", "assistant:c"), tokenizer, format="chat"
    )


def test_chat_without_an_answer_gives_none(words_chat):
    found, _ = to_examples([Row(say("user:a"), "x.jsonl", 1)], recipe(format="chat"), words_chat)
    assert found == [None]


def test_keys_filled_with_none_are_left_out(words_chat):
    row = {"messages": [{**message, "tool_calls": None} for message in say("user:a", "assistant:b")["messages"]]}
    assert one(row, words_chat, format="chat") == ([1, 8, 3, 10, 9, 4, 10], [4, 10])


def test_tokenizer_without_template_is_refused(words):
    assert "chat template" in refused(say("user:a", "assistant:b"), words, format="chat")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": "hello"}, "x.jsonl:7: field 'messages' is not a list"),
        ({"text": "hello"}, "x.jsonl:7: field 'messages' is not a list of messages (the row has: text)"),
        ({"messages": []}, "x.jsonl:7: field 'messages' is not a list"),
        ({"messages": [{"role": "user"}]}, "x.jsonl:7: message 1 is not"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "x.jsonl:7: message 1 is not"),
        (say("user:a", "robot:b"), "x.jsonl:7: message 2 has the unknown role 'robot'"),
    ],
)
def test_malformed_chats_are_refused(words_chat, row, expected):
    assert refused(row, words_chat, format="chat").startswith(expected)


def test_a_template_that_refuses_a_role_is_quoted(make_tokenizer):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    tokenizer = make_tokenizer(chat_template=template + "{% endfor %}")
    message = refused(say("system:a", "user:b", "assistant:c"), tokenizer, format="chat")
    assert message.startswith("x.jsonl:7: the tokenizer's chat template refuses it (no system role)")


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    end = "(' [end]' if loop.last and m.role == 'assistant' else '')"
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ ' ' + m.content + " + end + " }}{% endfor %}")
    assert one(say("user:a", "assistant:b"), tokenizer, format="chat") == ([3, 4, 10], [4, 10])
    message = refused(say("user:a", "assistant:b", "user:c", "assistant:d"), tokenizer, format="chat")
    assert message.startswith("x.jsonl:7: the tokenizer's chat template changes earlier text")


@pytest.mark.parametrize("template", ["{{ messages + 1 }}", "{{ 1/0 }}"])
def test_a_template_that_breaks_is_one_line(make_tokenizer, template):
    message = refused(say("user:a", "assistant:b"), make_tokenizer(chat_template=template), format="chat")
    assert message.startswith("x.jsonl:7: the tokenizer's chat template refuses it") and "\n" not in message


def test_a_lone_surrogate_is_refused_with_its_place(words, words_chat):
    assert "x.jsonl:7: field 'prompt' is not valid Unicode" in refused({"prompt": "\ud800", "completion": "a"}, words)
    message = refused(say("user:\ud800", "assistant:b"), words_chat, format="chat")
    assert message.startswith("x.jsonl:7: message 1 is not valid Unicode")


# --- real tokenizers


def test_gpt2_tokens(shared: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "gpt2-tokenizer")
    row = {"prompt": "name : The Vaults | Type : pub", "completion": " The Vaults pub ."}
    ids, learned = one(row, tokenizer)
    assert ids == [3672, 1058, 383, 21314, 930, 5994, 1058, 2240, 383, 21314, 2240, 764, 50256]
    assert learned == [383, 21314, 2240, 764, 50256]


def test_llama_tokens(shared: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "stories260K")
    ids, learned = one({"prompt": "a", "completion": "a b"}, tokenizer)
    assert (ids, learned) == ([1, 261, 261, 268, 2], [261, 268, 2])
