"""Chat templates: nothing that messages say is lost, no token is doubled, and no day differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from safeproj.errors import SafeprojError
from safeproj.evaluation.generate import Generator
from safeproj.evaluation.judges import Keywords
from safeproj.evaluation.run import Settings, evaluate
from safeproj.evaluation.sets import read_prompts
from safeproj.lm.chat import DATE, ChatOptions, chat_options, parse_arguments, render
from safeproj.lm.data import read_data
from safeproj.lm.models import recorded_inputs
from safeproj.storage.rows import Message
from safeproj.storage.source import open_folder
from tests.evaluate.support import TINY, tokenizer, write_lines
from tests.report.test_schemas import validator
from tests.support import FACTORS, MANIFEST, assert_refused, dated_model, read_json, safeproj

BODY = "{{ m['role'] }} {{ m['content'] }} "
TEXT = "{% for m in messages %}" + BODY + "{% endfor %}"
PARTS = (
    "{% for m in messages %}{{ m['role'] }} "
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }} "
    "{% endfor %}{% endfor %}"
)
NO_TEXT = (
    "{% for m in messages %}{{ m.role }} {% if m.content is not string %}"
    "{% for p in m.content %}{{ p.text }} {% endfor %}{% endif %}{% endfor %}"
)
RAISES_FOR_TEXT = (
    "{% for m in messages if m.content is string %}{{ raise_exception('no text') }}"
    + ("{% endfor %}" + NO_TEXT)
)
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}" + BODY + "{% endfor %}"
ONLY_LAST = "{% for m in messages[-1:] %}" + BODY + "{% endfor %}"

USER = {"role": "user", "content": "w1 w2"}
SYSTEM = {"role": "system", "content": "w2"}
"""Its text is in the user's message too."""


def text_of(template: str, *chat: dict[str, str], **arguments: Any) -> str:
    """Return the words that a model gets."""
    tokens = tokenizer((*(f"w{i}" for i in range(9)), "system"), template=template)
    found = render(
        tokens, chat, ChatOptions(None, arguments), where="here", answer=True
    )  # fmt: skip
    return str(tokens.decode(found.tokens))


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(TEXT, id="text"),
        pytest.param(PARTS, id="parts"),
        pytest.param(NO_TEXT, id="no-text"),
        pytest.param(RAISES_FOR_TEXT, id="raises-for-text"),
    ],
)
def test_every_form_of_template_writes_all_messages(template: str) -> None:
    assert text_of(template, USER) == "user w1 w2"
    assert text_of(template, SYSTEM, USER) == "system w2 user w1 w2"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        pytest.param(NO_SYSTEM, "leaves out the message 'w2'", id="system"),
        pytest.param(ONLY_LAST, "leaves out the message 'w2'", id="earlier"),
        pytest.param("user w1", "leaves out the message 'w1 w2'", id="all"),
        pytest.param(
            "{% for m in messages %}{{ m.content[:1] }}{% endfor %}", "leaves out", id="cut"
        ),
        pytest.param(
            "{{ raise_exception('no system') }}", r"does not take it \(no system\)", id="raises"
        ),
        pytest.param(
            "{% if messages[0].role == 'system' %}{{ messages[1:] }}{% endif %}", "leaves out",
            id="quoted",
        ),
    ],
)  # fmt: skip
def test_a_template_that_leaves_something_out_is_refused(template: str, words: str) -> None:
    with pytest.raises(SafeprojError, match=rf"here: the model's chat template {words}"):
        text_of(template, SYSTEM, USER)


def test_a_template_may_change_white_space_and_quote_and_leave_out_thoughts() -> None:
    trims = "{% for m in messages %}{{ m['content'] | trim | replace('\\n', '  ') }} {% endfor %}"
    assert text_of(trims, {"role": "user", "content": "  w1\n\nw2 "}) == "w1 w2"
    quotes = "{{ messages | tojson }}"
    chat = [{"role": "user", "content": 'say "ü"\n'}]
    render(tokenizer(template=quotes), chat, ChatOptions(), where="here", answer=True)
    drops = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }} {% endfor %}"
    answer = {"role": "assistant", "content": "<think>w3</think> w4"}
    assert text_of(drops, USER, answer, USER) == "w1 w2 w4 w1 w2"
    with pytest.raises(SafeprojError, match="leaves out"):
        text_of(drops, {"role": "user", "content": "w1 </think>"})
    switches = "{% for m in messages %}{{ m['content'].replace('/no_think', '') }} {% endfor %}"
    assert text_of(switches, {"role": "user", "content": "w1 /no_think"}) == "w1"


@pytest.mark.parametrize("template", [PARTS, NO_TEXT, RAISES_FOR_TEXT])
def test_prompts_and_data_go_through_the_same_templates(tmp_path: Path, template: str) -> None:
    tokens = tokenizer(template=template)
    generator = Generator(tokens, chat=True)
    assert tokens.decode(generator.tokens("w1 w2")) == "user w1 w2"
    assert generator.tokens("w1") != generator.tokens("w2")
    rows = [{"messages": [USER, {"role": "assistant", "content": "w5 w6"}]}]
    (sample,) = read_data(write_lines(tmp_path / "x.jsonl", rows), tokens).samples
    assert tokens.decode(sample.tokens) == "user w1 w2 assistant w5 w6"
    assert tokens.decode(sample.tokens[: sample.start]) == "user w1 w2"


def test_a_prompt_that_the_template_loses_is_named_before_the_model_is_loaded() -> None:
    chat = (Message("system", "w9"), Message("user", "w1"))
    with pytest.raises(SafeprojError, match=r"prompt 'w1': .*leaves out the message 'w9'"):
        Generator(tokenizer(template=NO_SYSTEM)).tokens(chat)


# Doubled tokens


def adding(tokens: Any, template: str = "<bos> $A") -> Any:
    """Let a tokenizer put special tokens around every text."""
    from tokenizers.processors import TemplateProcessing

    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return tokens


def words(tokens: Any, ids: Sequence[int]) -> list[str]:
    return list(tokens.convert_ids_to_tokens(list(ids)))


@pytest.mark.parametrize("processor", ["<bos> $A", "<bos> $A <eos>"])
def test_a_text_that_begins_or_ends_with_special_tokens_gets_no_second_one(
    tmp_path: Path, processor: str
) -> None:
    tokens = adding(tokenizer(), processor)
    for text in ("w1 w2", "<bos> w1 w2", "<bos> <bos> w1 w2 <eos>"):
        assert words(tokens, Generator(tokens).tokens(text)) == ["<bos>", "w1", "w2"]
    rows = [
        {"prompt": "w1", "response": "w2"},
        {"prompt": "<bos> w1", "response": "w2 <eos>"},
        {"prompt": "<bos> w1 <eos>", "response": "w2 <eos> <eos>"},
    ]
    for sample in read_data(write_lines(tmp_path / "x.jsonl", rows), tokens).samples:
        assert words(tokens, sample.tokens) == ["<bos>", "w1", "w2", "<eos>"]
        assert sample.start == 2


def test_a_chat_gets_no_second_special_token(tmp_path: Path) -> None:
    template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}" + (
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    tokens = adding(tokenizer(template=template))
    chat = (Message("user", "<bos> w1"),)
    assert words(tokens, Generator(tokens).tokens(chat)) == ["<bos>", "w1"]
    messages = [
        {"role": "user", "content": "<bos> w1"}, {"role": "assistant", "content": "w2 <eos>"}
    ]  # fmt: skip
    data = read_data(write_lines(tmp_path / "x.jsonl", [{"messages": messages}]), tokens)
    assert words(tokens, data.samples[0].tokens) == ["<bos>", "w1", "w2", "<eos>"]
    assert data.samples[0].start == 2


# Arguments


def test_arguments_of_the_template_are_read_as_json_or_text() -> None:
    given = ["a=true", "b=False", "c=low", "d=3", 'e=["x"]', "f=", "g=a=b"]
    assert parse_arguments(given) == {
        "a": True, "b": False, "c": "low", "d": 3, "e": ["x"], "f": "", "g": "a=b",
    }  # fmt: skip
    for wrong in ("a", "=1", "a b=1", "messages=1", "strftime_now=1", "a=1"):
        with pytest.raises(SafeprojError, match="arguments"):
            parse_arguments(["a=1", wrong])


def test_arguments_reach_the_template_or_are_refused(tmp_path: Path) -> None:
    template = TEXT + "{{ 'w3' if effort == 'low' else 'w4' }}"
    assert text_of(template, USER, effort="low").endswith("w3")
    assert text_of(template, USER, effort="high").endswith("w4")
    options = chat_options(None, ["effect=low"])
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "w1", "response": "w2"}])
    for tokens, told in ((tokenizer(template=template), "does not read it"),
                         (tokenizer(), "is missing")):  # fmt: skip
        with pytest.raises(SafeprojError, match=f"effect: .*{told}"):
            Generator(tokens, options=options)
        with pytest.raises(SafeprojError, match=f"effect: .*{told}"):
            read_data(path, tokens, chat=options)


# Dates

DATED = TEXT + "{{ strftime_now('%d %b %Y') }}"


@contextmanager
def today(day: date) -> Iterator[None]:
    """Let the clock of chat templates be another."""
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:  # noqa: ARG003
            return cls(day.year, day.month, day.day)

    clock: Any = chat_template_utils
    before = clock.datetime
    clock.datetime = Clock
    try:
        yield
        assert clock.datetime is Clock
    finally:
        clock.datetime = before


def rendered(tokens: Any, options: ChatOptions) -> str:
    return render(tokens, [USER], options, where="here", answer=True).text


def test_a_template_that_prints_the_date_prints_the_same_every_day() -> None:
    tokens = tokenizer(template=DATED)
    for day in (date(2026, 3, 1), date(2026, 3, 5)):
        with today(day):
            assert rendered(tokens, ChatOptions()).endswith("26 Jul 2024")
            assert rendered(tokens, ChatOptions(date(2025, 1, 2))).endswith("02 Jan 2025")
            with pytest.raises(SafeprojError, match="leaves out"):
                text_of("{{ strftime_now('%Y') }}", USER)
    assert ChatOptions().to_dict()["date"] == DATE.isoformat() == "2024-07-26"


@pytest.mark.parametrize(
    "text", ["today", "2025-1-2", "2025-02-30", "20250102", "", "２０２５-01-02"]
)
def test_what_is_no_date_is_refused(text: str) -> None:
    with pytest.raises(SafeprojError, match=r"date .*YYYY-MM-DD"):
        chat_options(text, None)


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that says what day it is in a word of its own."""
    return dated_model(tmp_path_factory.mktemp("dated") / "model", TINY / "aligned")


def test_answers_do_not_depend_on_the_day_and_those_of_two_days_are_not_mixed(
    dated: Path, tmp_path: Path
) -> None:
    prompts = read_prompts(str(TINY / "data" / "held_out_pairs.jsonl"), "harmful")
    kept = tmp_path / "answers"
    kept.mkdir()

    def run(day: int, count: int, options: ChatOptions) -> dict[str, Any]:
        settings = Settings(max_new_tokens=6, chat=True, device="cpu", responses=kept,
                            options=options)  # fmt: skip
        with today(date(2026, 3, day)):
            judge = Keywords(["sorry i will not"], [])
            return evaluate(str(dated), [], [prompts.first(count)], judge, settings).to_dict()

    first = run(1, 4, ChatOptions())
    validator("eval").validate(first)
    assert first["options"]["date"] == "2024-07-26"
    assert any("prints the date" in each and "--date" in each for each in first["warnings"])
    run(5, 8, ChatOptions())  # goes on
    before = (kept / "no_adapter.jsonl").read_bytes()
    with pytest.raises(SafeprojError, match=r"in another form.*date.*overwrite"):
        run(5, 8, ChatOptions(date(2024, 7, 27)))
    assert (kept / "no_adapter.jsonl").read_bytes() == before
    given = run(5, 8, ChatOptions(DATE))
    assert not given["warnings"]


def test_statistics_say_what_day_it_was_and_so_does_what_is_made_with_them(
    dated: Path, tmp_path: Path
) -> None:
    data = write_lines(
        tmp_path / "chats.jsonl",
        [
            {"messages": [{"role": "user", "content": "how do i"},
                          {"role": "assistant", "content": "sorry i will not"}]},
            {"prompt": "how", "response": "sorry"},
        ],
    )  # fmt: skip
    stats = tmp_path / "x.stats.safetensors"
    done = safeproj("stats", "--aligned", dated, "--data", data, "--out", stats)
    assert done.returncode == 0, done.stderr
    assert "taken to be 2024-07-26" in done.stderr
    with safe_open(stats, framework="pt") as file:
        default = json.loads(file.metadata()["safeproj"])["inputs"]["data"]
    assert default["date"] == "2024-07-26"
    done = safeproj("stats", "--aligned", dated, "--data", data, "--out", stats, "--overwrite",
                  "--date", "2025-01-02")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "prints the date" not in done.stderr
    out = tmp_path / "out"
    done = safeproj(
        "patch", "--safety-data", stats, "--task-data", stats, "--adapter",
        TINY / "adapters" / "bad", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = read_json(out / MANIFEST)
    validator("manifest").validate(manifest)
    assert manifest["inputs"]["safety_data"]["date"] == "2025-01-02"
    assert_refused(
        safeproj("stats", "--aligned", dated, "--data", data, "--out", stats, "--date", "now"),
        "--date 'now'", "YYYY-MM-DD",
    )  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--reconstruct",)])
def test_a_correction_is_of_the_day_that_is_given(
    dated: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    chat = [USER, {"role": "assistant", "content": "sorry i will not"}]
    data = write_lines(tmp_path / "safety.jsonl", [{"messages": chat}])
    given: tuple[str | Path, ...] = (
        "--aligned", dated, "--safety-data", data, "--task-data", data,
        "--adapter", TINY / "adapters" / "bad", "--include", "layers.1", *more,
    )  # fmt: skip
    written = {}
    days: dict[str, tuple[str, ...]] = {
        "default": (), "same": ("--date", "2024-07-26"), "other": ("--date", "2024-07-27"),
    }  # fmt: skip
    for name, options in days.items():
        done = safeproj("patch", *given, *options, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        written[name] = (tmp_path / name / FACTORS).read_bytes()
    assert written["default"] == written["same"] != written["other"]
    found = read_json(tmp_path / "other" / MANIFEST)["inputs"]["safety_data"]
    assert found["date"] == "2024-07-27"


def test_a_day_is_refused_where_no_model_is_run() -> None:
    given = ("--aligned", TINY / "aligned", "--base", TINY / "base")
    for options in (("--date", "2024-07-26"), ("--chat-template-arg", "a=1")):
        done = safeproj("inspect", *given, "--adapter", TINY / "adapters" / "bad", *options)
        assert_refused(done, options[0], "Safe LoRA runs none here; leave it out")


def test_options_that_say_how_chats_are_put_are_read_as_they_were_written() -> None:
    arguments = {"a": True, "b": "true", "c": "low", "d": 3, "e": "3", "f": [1, "x"], "g": None}
    options = ChatOptions(date(2025, 1, 2), arguments)
    words = list(options.words())
    assert words[:2] == ["--date", "2025-01-02"]
    assert chat_options(words[1], words[3::2]) == options
    assert list(ChatOptions().words()) == []


def test_nothing_is_recorded_of_a_day_that_no_template_prints(tmp_path: Path) -> None:
    messages = [USER, {"role": "assistant", "content": "w5"}]
    path = write_lines(tmp_path / "x.jsonl", [{"messages": messages}])
    folder = open_folder(str(TINY / "aligned"))
    for template, keys in ((TEXT, set()), (DATED, {"date", "chat_template_args"})):
        # The response is last, so what follows it is no part of the prompt.
        data = read_data(path, tokenizer(template=template.replace("{{ strf", "{{ '' and strf")))
        found = recorded_inputs(folder, data)["data"].keys()
        assert found - {"source", "sha256", "rows", "positions"} == keys
