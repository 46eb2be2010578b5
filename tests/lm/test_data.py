"""Prompt/response files, read with the tiny example's tokenizer."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from safeproj.errors import SafeprojError
from safeproj.lm.data import Data, Sample, read_data

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"

CHATML = (
    "{% for message in messages %}"
    "<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
"""The template of many models, with spaces between the words as this tokenizer needs them."""

QUESTION = {"role": "user", "content": "how do i"}
ANSWER = {"role": "assistant", "content": "sorry i will not"}
PAIR = {"prompt": "how do i", "response": "sorry i will"}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return AutoTokenizer.from_pretrained(str(EXAMPLE / "aligned"))


@pytest.fixture
def plain(loaded: Any) -> Any:
    """A tokenizer with `<bos>` in front of every text, an end-of-sequence token, no template."""
    return copy.deepcopy(loaded)


@pytest.fixture
def chat(plain: Any) -> Any:
    """The same with a chat template and the tokens that it writes."""
    marks = ["<|im_start|>", "<|im_end|>"]
    plain.add_special_tokens({"additional_special_tokens": marks})
    plain.add_tokens(["user", "assistant", "system"])
    plain.chat_template = CHATML
    return plain


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the tokens of words, special ones among them, all of which it must know."""
    found = tuple(tokenizer.convert_tokens_to_ids(text.split()))
    assert "<unk>" in text or tokenizer.unk_token_id not in found
    return found


def written(path: Path, *rows: object) -> Path:
    """Write a file of one row a line; text and bytes go there as they are."""
    lines = [
        row
        if isinstance(row, bytes)
        else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def only(data: Data) -> Sample:
    (sample,) = data.samples
    return sample


def assert_refused(path: Path, tokenizer: Any, *words: str, **options: Any) -> None:
    """Check that the file is refused, in one line with these words."""
    with pytest.raises(SafeprojError) as caught:
        read_data(path, tokenizer, **options)
    message = caught.value.message
    assert message.startswith(f"--data {path}")
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


# Prompt and response


def test_a_pair_is_put_together_with_the_special_tokens_around_it(
    tmp_path: Path, plain: Any
) -> None:
    data = read_data(written(tmp_path / "data.jsonl", PAIR), plain)
    assert only(data) == Sample(ids(plain, "<bos> how do i sorry i will <eos>"), start=4)


def test_a_tokenizer_without_an_end_of_sequence_token_adds_none(tmp_path: Path, plain: Any) -> None:
    plain.eos_token = None
    data = read_data(written(tmp_path / "data.jsonl", PAIR), plain)
    assert only(data) == Sample(ids(plain, "<bos> how do i sorry i will"), start=4)


def test_a_tokenizer_without_a_beginning_of_sequence_token_adds_none(
    tmp_path: Path, plain: Any
) -> None:
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    data = read_data(written(tmp_path / "data.jsonl", PAIR), plain)
    assert only(data) == Sample(ids(plain, "how do i sorry i will <eos>"), start=3)


def test_a_tokenizer_that_ends_every_text_ends_only_the_response(
    tmp_path: Path, plain: Any
) -> None:
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", plain.bos_token_id), ("<eos>", plain.eos_token_id)],
    )
    data = read_data(written(tmp_path / "data.jsonl", PAIR), plain)
    assert only(data) == Sample(ids(plain, "<bos> how do i sorry i will <eos>"), start=4)


def test_other_fields_are_ignored(tmp_path: Path, plain: Any) -> None:
    with_more = {**PAIR, "compliance": "first", "score": None, "tags": [1, {"a": 2}]}
    found = [
        read_data(written(tmp_path / name, row), plain)
        for name, row in (("few.jsonl", PAIR), ("more.jsonl", with_more))
    ]
    assert found[0].samples == found[1].samples


def test_the_samples_keep_the_order_of_the_lines(tmp_path: Path, plain: Any) -> None:
    rows = [{"prompt": "how", "response": word} for word in ("sorry", "i", "do")]
    data = read_data(written(tmp_path / "data.jsonl", *rows), plain)
    assert [sample.tokens[2] for sample in data.samples] == list(ids(plain, "sorry i do"))


@pytest.mark.parametrize(
    "content",
    [
        b"%s\n\n  \t\n%s\n\n",
        b"\xef\xbb\xbf%s\n%s\n",
        b"%s\r\n%s\r\n",
        b"%s\r\n\r\n%s",
        b"%s\n%s",
    ],
    ids=["empty-lines", "byte-order-mark", "crlf", "crlf-empty-lines", "no-last-newline"],
)
def test_how_lines_are_separated_does_not_matter(
    tmp_path: Path, plain: Any, content: bytes
) -> None:
    row = json.dumps(PAIR).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(content % (row, row))
    one = only(read_data(written(tmp_path / "one.jsonl", PAIR), plain))
    assert read_data(path, plain).samples == (one, one)


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c", "\x1c"], ids=ascii)
def test_only_a_newline_ends_a_line(tmp_path: Path, plain: Any, separator: str) -> None:
    row = {"prompt": f"how{separator}do", "response": "sorry"}
    text = json.dumps(row, ensure_ascii=False) if ord(separator) > 31 else json.dumps(row)
    data = read_data(written(tmp_path / "data.jsonl", text), plain)
    assert only(data).tokens[-2:] == ids(plain, "sorry <eos>")


def test_text_in_another_script_is_kept(tmp_path: Path, plain: Any) -> None:
    plain.add_tokens(["как", "нет"])
    row = json.dumps({"prompt": "как", "response": "нет"}, ensure_ascii=False)
    data = read_data(written(tmp_path / "data.jsonl", row), plain)
    assert only(data) == Sample(ids(plain, "<bos> как нет <eos>"), start=2)


def test_the_file_is_identified(tmp_path: Path, plain: Any) -> None:
    path = written(tmp_path / "data.jsonl", PAIR, PAIR)
    data = read_data(str(path), plain)
    assert data.source == str(path)
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_home_directory_is_found(
    tmp_path: Path, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    written(tmp_path / "data.jsonl", PAIR)
    assert len(read_data("~/data.jsonl", plain).samples) == 1


def test_the_response_positions_are_counted(tmp_path: Path, plain: Any) -> None:
    longer = {"prompt": "how", "response": "sorry i will not help"}
    data = read_data(written(tmp_path / "data.jsonl", PAIR, longer), plain)
    assert data.positions == 4 + 6  # the words and `<eos>`


def test_the_example_data_can_be_read(loaded: Any) -> None:
    path = EXAMPLE / "data" / "safety.jsonl"
    data = read_data(path, loaded)
    assert len(data.samples) == len(path.read_text("utf-8").splitlines())
    assert data.warnings == ()


# Chats


def test_the_last_message_of_a_chat_is_the_response_with_what_the_template_ends_it_with(
    tmp_path: Path, chat: Any
) -> None:
    data = read_data(written(tmp_path / "data.jsonl", {"messages": [QUESTION, ANSWER]}), chat)
    prompt = ids(chat, "<|im_start|> user how do i <|im_end|> <|im_start|> assistant")
    response = ids(chat, "sorry i will not <|im_end|>")
    assert only(data) == Sample(prompt + response, start=len(prompt))


def test_earlier_answers_of_a_chat_are_part_of_the_prompt(tmp_path: Path, chat: Any) -> None:
    system = {"role": "system", "content": "help"}
    messages = [system, QUESTION, {**ANSWER, "content": "first"}, QUESTION, ANSWER]
    data = read_data(written(tmp_path / "data.jsonl", {"messages": messages}), chat)
    sample = only(data)
    assert sample.tokens[sample.start :] == ids(chat, "sorry i will not <|im_end|>")
    assert sample.tokens[: sample.start] == ids(
        chat,
        "<|im_start|> system help <|im_end|> <|im_start|> user how do i <|im_end|> "
        "<|im_start|> assistant first <|im_end|> <|im_start|> user how do i <|im_end|> "
        "<|im_start|> assistant",
    )


def test_a_template_says_itself_where_the_beginning_of_sequence_token_goes(
    tmp_path: Path, chat: Any
) -> None:
    chat.chat_template = "{{ bos_token }} " + CHATML
    data = read_data(written(tmp_path / "data.jsonl", {"messages": [QUESTION, ANSWER]}), chat)
    assert only(data).tokens[:2] == ids(chat, "<bos> <|im_start|>")
    assert only(data).tokens.count(chat.bos_token_id) == 1


def test_a_file_may_hold_pairs_and_chats(tmp_path: Path, chat: Any) -> None:
    data = read_data(written(tmp_path / "data.jsonl", PAIR, {"messages": [QUESTION, ANSWER]}), chat)
    assert [sample.tokens[-1] for sample in data.samples] == list(ids(chat, "<eos> <|im_end|>"))


# What is refused

MESSAGES = "'messages' must be two or more objects"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("not json", ["not JSON"]),
        ('{"prompt": "how"', ["not JSON"]),
        ("{'prompt': 'how', 'response': 'i'}", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ('{"prompt": "how", "response": "i"} {"prompt": "how", "response": "i"}', ["not JSON"]),
        ("[]", ["a list", "expected {"]),
        ('"how"', ["a str", "expected {"]),
        ("null", ["expected {"]),
        ("{}", ["'prompt' is missing", "expected {"]),
        ({"response": "sorry"}, ["'prompt' is missing"]),
        ({"prompt": "how"}, ["'response' is missing"]),
        ({"prompt": None, "response": "sorry"}, ["'prompt' is missing"]),
        ({"prompt": 3, "response": "sorry"}, ["'prompt' is no text, or empty"]),
        ({"prompt": ["how"], "response": "sorry"}, ["'prompt' is no text, or empty"]),
        ({"prompt": "", "response": "sorry"}, ["'prompt' is no text, or empty"]),
        ({"prompt": "how", "response": " \n"}, ["'response' is no text, or empty"]),
        ({"prompt": "how", "response": {"a": 1}}, ["'response' is no text, or empty"]),
        ({"messages": None}, [MESSAGES]),
        ({"messages": {}}, [MESSAGES]),
        ({"messages": []}, [MESSAGES]),
        ({"messages": [ANSWER]}, [MESSAGES]),
        ({"messages": ["how", "sorry"]}, [MESSAGES]),
        ({"messages": [ANSWER, QUESTION]}, [MESSAGES, "the last of the role 'assistant'"]),
        ({"messages": [QUESTION, {"role": "assistant"}]}, [MESSAGES]),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, [MESSAGES]),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, [MESSAGES, "empty"]),
        ({"messages": [QUESTION, {"role": "assistant", "content": []}]}, [MESSAGES]),
        ({"messages": [{"role": 1, "content": "how"}, ANSWER]}, [MESSAGES]),
    ],
    ids=[
        "no-json",
        "cut-off",
        "single-quotes",
        "nested-too-deeply",
        "two-objects",
        "list",
        "string",
        "null",
        "empty-object",
        "no-prompt",
        "no-response",
        "null-prompt",
        "number",
        "list-of-strings",
        "empty-prompt",
        "blank-response",
        "object",
        "null-messages",
        "no-list",
        "no-messages",
        "answer-alone",
        "messages-are-strings",
        "ends-with-a-question",
        "no-content",
        "null-content",
        "blank-answer",
        "content-in-parts",
        "role-is-a-number",
    ],
)
def test_a_line_that_cannot_be_used_is_named(
    tmp_path: Path, chat: Any, row: object, words: list[str]
) -> None:
    path = written(tmp_path / "data.jsonl", PAIR, "", row, PAIR)
    assert_refused(path, chat, f"{path}:3: ", *words)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, plain: Any) -> None:
    row = '{"prompt": "how", "response": "sorry", "response": "first"}'
    path = written(tmp_path / "data.jsonl", PAIR, row)
    assert_refused(path, plain, f"{path}:2: ", "duplicate keys")


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "how \\ud800", "response": "sorry"}',
        '{"prompt": "how", "response": "sorry \\ud800"}',
        '{"messages": [{"role": "user", "content": "\\udfff"}, '
        '{"role": "assistant", "content": "sorry"}]}',
    ],
    ids=["prompt", "response", "messages"],
)
def test_half_a_surrogate_pair_is_no_text(tmp_path: Path, chat: Any, row: str) -> None:
    path = written(tmp_path / "data.jsonl", PAIR, row)
    assert_refused(path, chat, f"{path}:2: ")


def test_a_chat_without_a_template_is_refused(tmp_path: Path, plain: Any) -> None:
    path = written(tmp_path / "data.jsonl", PAIR, {"messages": [QUESTION, ANSWER]})
    assert_refused(path, plain, f"{path}:2: ", "no chat template", "'prompt' and 'response'")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system\nrole here') }}", ["does not take it", "no system"]),
        ("{% for message in messages %}", ["does not take it"]),
        ("{{ messages[0].content.nothing.at_all }}", ["does not take it"]),
    ],
    ids=["raises", "syntax-error", "undefined"],
)
def test_a_template_that_fails_is_reported(
    tmp_path: Path, chat: Any, template: str, words: list[str]
) -> None:
    chat.chat_template = template
    path = written(tmp_path / "data.jsonl", {"messages": [QUESTION, ANSWER]})
    assert_refused(path, chat, f"{path}:1: ", *words)


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path: Path, chat: Any) -> None:
    # Some templates drop the reasoning of earlier turns, or say how many messages there are.
    chat.chat_template = "{% if messages | length > 1 %}first {% endif %}" + CHATML
    path = written(tmp_path / "data.jsonl", {"messages": [QUESTION, ANSWER]})
    assert_refused(path, chat, f"{path}:1: ", "writes the prompt otherwise")


def test_a_template_that_leaves_the_response_out_is_refused(tmp_path: Path, chat: Any) -> None:
    chat.chat_template = "<|im_start|> {{ messages[0].content }}"
    path = written(tmp_path / "data.jsonl", {"messages": [QUESTION, ANSWER]})
    assert_refused(path, chat, f"{path}:1: ", "leaves out the message 'sorry i will not'")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"], ids=ascii)
def test_a_file_without_lines_is_refused(tmp_path: Path, plain: Any, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert_refused(path, plain, "no lines", "expected {")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, plain: Any) -> None:
    assert_refused(tmp_path / "data.jsonl", plain, "no such file")


def test_a_directory_is_refused(tmp_path: Path, plain: Any) -> None:
    assert_refused(tmp_path, plain, "cannot be read", "expected JSON lines in UTF-8")


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(PAIR).encode("utf-16"),
        b'{"prompt": "caf\xe9", "response": "i"}\n',
        b"\x1f\x8b\x08",
    ],
    ids=["utf-16", "latin-1", "gzip"],
)
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, plain: Any, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert_refused(path, plain, "cannot be read", "expected JSON lines in UTF-8")


# The greatest length


def test_what_is_beyond_the_greatest_length_is_cut_off(tmp_path: Path, plain: Any) -> None:
    data = read_data(written(tmp_path / "data.jsonl", PAIR), plain, max_length=6)
    assert only(data) == Sample(ids(plain, "<bos> how do i sorry i"), start=4)


@pytest.mark.parametrize(
    ("max_length", "cut"), [(10, 0), (9, 1), (8, 1), (7, 3)], ids=lambda value: str(value)
)
def test_the_samples_that_were_cut_are_counted(
    tmp_path: Path, plain: Any, max_length: int, cut: int
) -> None:
    longer = {"prompt": "how do i", "response": "sorry i will not help"}  # 10 tokens; PAIR has 8
    path = written(tmp_path / "data.jsonl", PAIR, longer, PAIR)
    data = read_data(path, plain, max_length=max_length)
    assert data.cut == cut
    assert max(len(sample.tokens) for sample in data.samples) == max_length


def test_the_user_is_told_that_samples_were_cut(tmp_path: Path, plain: Any) -> None:
    path = written(tmp_path / "data.jsonl", PAIR, PAIR)
    (warning,) = read_data(path, plain, max_length=7).warnings
    assert str(path) in warning
    assert "2 samples" in warning
    assert "--max-length" in warning
    assert read_data(path, plain, max_length=8).warnings == ()


@pytest.mark.parametrize("max_length", [4, 3, 1], ids=lambda value: str(value))
def test_a_prompt_that_leaves_no_room_for_a_response_is_refused(
    tmp_path: Path, plain: Any, max_length: int
) -> None:
    short = {"prompt": "how", "response": "sorry"}
    path = written(tmp_path / "data.jsonl", *([short] if max_length > 2 else []), PAIR)
    line = 2 if max_length > 2 else 1
    assert_refused(
        path,
        plain,
        f"{path}:{line}: ",
        f"first {max_length};",
        "--max-length",
        max_length=max_length,
    )


# Batches


@pytest.fixture
def data(tmp_path: Path, plain: Any) -> Data:
    """Samples of 5, 8, 4 and 7 tokens."""
    rows = [
        {"prompt": "how", "response": "sorry i"},
        {"prompt": "how do i", "response": "sorry i will"},
        {"prompt": "how", "response": "sorry"},
        {"prompt": "how do", "response": "sorry i will"},
    ]
    return read_data(written(tmp_path / "data.jsonl", *rows), plain)


def test_batches_hold_the_longest_samples_first(data: Data) -> None:
    lengths = [batch["attention_mask"].sum(dim=1).tolist() for batch in data.batches(3)]
    assert lengths == [[8, 7, 5], [4]]


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        (1, [(1, 8), (1, 7), (1, 5), (1, 4)]),
        (2, [(2, 8), (2, 5)]),
        (3, [(3, 8), (1, 4)]),
        (4, [(4, 8)]),
        (100, [(4, 8)]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_a_batch_is_as_wide_as_its_longest_sample(
    data: Data, size: int, shapes: list[tuple[int, int]]
) -> None:
    for name in ("input_ids", "attention_mask", "labels"):
        assert [tuple(batch[name].shape) for batch in data.batches(size)] == shapes


def test_the_default_is_eight_samples_a_batch(tmp_path: Path, plain: Any) -> None:
    data = read_data(written(tmp_path / "data.jsonl", *[PAIR] * 9), plain)
    assert [len(batch["input_ids"]) for batch in data.batches()] == [8, 1]


def test_padding_is_on_the_right_and_not_attended_to(data: Data, plain: Any) -> None:
    (batch,) = data.batches(4)
    assert tuple(batch["input_ids"][0].tolist()) == ids(plain, "<bos> how do i sorry i will <eos>")
    assert tuple(batch["input_ids"][3, :4].tolist()) == ids(plain, "<bos> how sorry <eos>")
    assert batch["attention_mask"][3].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_labels_are_the_tokens_of_the_response_alone(data: Data, plain: Any) -> None:
    (batch,) = data.batches(4)
    assert batch["labels"][3].tolist() == [-100, -100, *ids(plain, "sorry <eos>"), *[-100] * 4]
    assert batch["labels"][0].tolist() == [-100] * 4 + list(ids(plain, "sorry i will <eos>"))
    assert int((batch["labels"] != -100).sum()) == data.positions


def test_samples_of_equal_length_keep_their_order(tmp_path: Path, plain: Any) -> None:
    rows = [{"prompt": "how", "response": word} for word in ("sorry", "i", "do")]
    (batch,) = read_data(written(tmp_path / "data.jsonl", *rows), plain).batches()
    assert tuple(batch["labels"][:, 2].tolist()) == ids(plain, "sorry i do")


@pytest.mark.parametrize("size", [0, -1], ids=lambda value: str(value))
def test_a_batch_of_nothing_is_refused(data: Data, size: int) -> None:
    with pytest.raises(SafeprojError, match=rf"batch_size must be 1 or more, found {size}"):
        data.batches(size)
