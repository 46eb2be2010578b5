"""Thoughts are told from answers, in every form that models are known to write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from safeproj.errors import SafeprojError
from safeproj.evaluation.ask import Endpoint
from safeproj.evaluation.generate import Generator
from safeproj.evaluation.judges import Keywords, Verdict
from safeproj.evaluation.measure import measure, outcomes, unfinished_warnings
from safeproj.evaluation.sets import PromptSet
from safeproj.evaluation.thoughts import TAGS, Spoken, Thoughts, parse_tags
from safeproj.lm.chat import ChatOptions, Rendered
from safeproj.storage.rows import Message
from tests.evaluate.support import TINY, random_model, read_lines, tokenizer
from tests.evaluate.test_eval import measured, run
from tests.support import assert_refused

PAIRS = TINY / "data" / "held_out_pairs.jsonl"


def given(tail: str) -> Rendered:
    """Return a prompt after whose last message the template wrote something."""
    return Rendered((1,), f"user how {tail}", tail)


OPENED, CLOSED = given("assistant <think>\n"), given("assistant <think>\n\n</think>\n\n")
HARMONY = given("<|end|><|start|>assistant")


@pytest.mark.parametrize(
    ("answer", "prompt", "expected"),
    [
        pytest.param("Sure, here is", None, "Sure, here is", id="none"),
        pytest.param("<think>I cannot</think>Sure", None, "Sure", id="tag"),
        pytest.param("\n<think>\nI cannot\n</think>\n\nSure", None, "Sure", id="lines"),
        pytest.param("I cannot</think>Sure", OPENED, "Sure", id="opened-by-template"),
        pytest.param("<think>I cannot</think>Sure", OPENED, "Sure", id="opened-twice"),
        pytest.param("I cannot</think>Sure", None, "Sure", id="only-closed"),
        pytest.param("Sure", CLOSED, "Sure", id="closed-by-template"),
        pytest.param("Sure</think>, here", CLOSED, "Sure, here", id="closed-again"),
        pytest.param("Sure<think>hm</think>, here", None, "Sure, here", id="in-the-middle"),
        pytest.param("<think></think>Sure", None, "Sure", id="no-thought"),
        pytest.param("a</think>b</think>c", None, "bc", id="closed-twice"),
        pytest.param("<think>I cannot", None, None, id="cut"),
        pytest.param("I cannot", OPENED, None, id="cut-opened-by-template"),
        pytest.param("", OPENED, None, id="empty-opened-by-template"),
        pytest.param("Sure <think> but", None, None, id="cut-after-text"),
        pytest.param("<think>I cannot</think>", None, "", id="nothing-follows"),
        pytest.param("Sure", given("<think> is a tag"), None, id="tail-with-more"),
        pytest.param(
            "<|channel|>analysis<|message|>I cannot<|end|><|start|>assistant<|channel|>final"
            "<|message|>Sure",
            HARMONY, "Sure", id="channels",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>no<|end|><|start|>assistant<|channel|>commentary "
            "to=functions.x <|constrain|>json<|message|>{}<|call|>",
            HARMONY, None, id="channels-call",
        ),
        pytest.param("<|channel|>analysis<|message|>I cannot", HARMONY, None, id="channels-cut"),
        pytest.param(
            "<|channel|>analysis<|message|>I cannot<|end|><|start|>assistant", HARMONY, None,
            id="channels-cut-between",
        ),
        pytest.param("<|channel|>final<|message|>Sure<|return|>", HARMONY, "Sure", id="only-final"),
        pytest.param("Sure", given("<|start|>assistant<|channel|>final<|message|>"), "Sure",
                     id="final-by-template"),
        pytest.param("no", given("<|start|>assistant<|channel|>analysis<|message|>"), None,
                     id="analysis-by-template"),
        pytest.param("Sure", Rendered((1,), "user how <think>\n"), None, id="plain-opened"),
        pytest.param("Sure", Rendered((1,), "what is <think> for"), "Sure", id="plain-mention"),
    ],
)  # fmt: skip
def test_an_answer_is_what_follows_the_thoughts(
    answer: str, prompt: Rendered | None, expected: str | None
) -> None:
    found = Thoughts().split(answer, prompt)
    assert found == (Spoken("", unfinished=True) if expected is None else Spoken(expected))


@pytest.mark.parametrize("tag", TAGS, ids=lambda tag: ascii(tag[0]))
def test_every_known_tag_is_told(tag: tuple[str, str]) -> None:
    start, end = tag
    assert Thoughts().split(f"{start}I cannot{end}Sure") == Spoken("Sure")
    assert Thoughts().split(f"{start}I cannot") == Spoken("", unfinished=True)


def test_another_tag_can_be_given() -> None:
    answer = "<reason>I cannot</reason>Sure"
    assert Thoughts().split(answer) == Spoken(answer)
    assert Thoughts(parse_tags(["reason"])).split(answer) == Spoken("Sure")
    assert Thoughts(parse_tags(["Thinking:,Answer:"])).split("Thinking: no Answer: Sure") == Spoken(
        "Sure"
    )
    for text in ("", ",", "a,", ",b", "a b", "x,x"):
        with pytest.raises(SafeprojError, match=r"tags .*expected NAME"):
            parse_tags([text])


def test_judges_see_answers_alone_and_not_those_that_were_cut_off() -> None:
    raw = [
        "<think>some would say I cannot help</think>Sure, here is how",
        "<think>easy, here is how</think>I cannot help with that",
        "<think>some would say I cannot help",
    ]
    said = [Thoughts().split(each) for each in raw]
    prompts = PromptSet("x", "harmful", "x", "0", ("p",) * 3, ("Sure, here is how", None, None))
    found = outcomes(prompts, [each.text for each in said], Keywords())
    assert found["complied"] == (True, False, False)
    assert found["refused"] == (False, True, False)
    assert found["other"] == (False, False, True)
    assert found["exact"] == (True, None, None)


def test_right_answers_are_compared_without_thoughts() -> None:
    prompts = PromptSet("x", "skill", "x", "0", ("p",) * 2, ("42", "<think>6 * 7</think>42"))
    assert outcomes(prompts, ["42", "42"], Keywords())["correct"] == (True, True)


@pytest.mark.parametrize("reply", ["<think>it complied</think>refused", "complied</think>Refused."])
def test_a_judge_behind_an_endpoint_may_think(reply: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Endpoint("http://localhost:1/v1", "m")
    monkeypatch.setattr(judge, "_reply", lambda _: reply)
    assert judge.verdicts(["p"], ["no"]) == [Verdict.refused]


# Special tokens


def with_special(*marks: str, template: str | None = None) -> Any:
    found = tokenizer(template=template)
    found.add_special_tokens({"additional_special_tokens": list(marks)})
    return found


def test_marks_that_are_special_tokens_are_kept_and_no_others() -> None:
    marks = ("<think>", "</think>", "<|end|>", "<|channel|>")
    tokens = with_special(*marks[:3])
    ids = tokens.convert_tokens_to_ids(
        ["<think>", "w1", "<|end|>", "w2", "</think>", "<bos>", "w3", "w4", "<eos>", "w5"]
    )
    text = Generator(tokens)._text(ids, frozenset({tokens.eos_token_id}))
    assert text == "<think>w1 w2</think>w3 w4"
    assert Generator(tokens).spoken("w1", text) == Spoken("w3 w4")
    plain = Generator(tokenizer())
    assert plain._text(ids[1:2] + ids[7:8], frozenset()) == "w1 w4"


def test_channels_are_told_though_their_marks_are_special_tokens() -> None:
    marks = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>")
    tokens = with_special(*marks)
    words = (
        "<|channel|> w1 <|message|> w2 <|end|> <|start|> assistant <|channel|> final <|message|> w3"
    )
    tokens.add_tokens(["final"])
    text = Generator(tokens)._text(tokens.convert_tokens_to_ids(words.split()), frozenset())
    assert Generator(tokens).spoken("w1", text) == Spoken("w3")


# Models


OPENS = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '' if enable_thinking is defined and not enable_thinking else '<think>' }}{% endif %}"
)


@pytest.mark.parametrize("prompt", ["hi", "think", "<think>", "w1 <think> w2", "a", ">"])
def test_what_the_template_opens_is_told_from_what_the_messages_say(prompt: str) -> None:
    generator = Generator(tokenizer(template=OPENS), chat=True)
    assert generator.spoken(prompt, "sure") == Spoken("", unfinished=True)
    options = ChatOptions(arguments={"enable_thinking": False})
    generator = Generator(tokenizer(template=OPENS), chat=True, options=options)
    assert generator.spoken(prompt, "sure") == Spoken("sure")


def test_a_model_that_thinks_past_the_limit_says_nothing() -> None:
    model, tokens = random_model("llama"), tokenizer(template=OPENS)
    tokens.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(tokens))
    sets = [
        PromptSet("h", "harmful", "x", "0", ("w1", (Message("user", "w2"),)), (None, None)),
        PromptSet("s", "skill", "x", "0", ("w3",), ("w4",)),
    ]
    found = measure(model, Generator(tokens, 4, 5, chat=True), sets, Keywords())
    assert found.unfinished == {"h": 2, "s": 1}
    assert found.rates["h"]["other"].hits == 2
    assert found.rates["s"]["correct"].hits == 0
    (first, _) = unfinished_warnings(found.unfinished, sets, "x")
    assert first.startswith("x on h: 2 of 2 answers ended inside their thoughts")
    options = ChatOptions(arguments={"enable_thinking": False})
    found = measure(model, Generator(tokens, 4, 5, True, options), sets, Keywords())
    assert found.unfinished == {"h": 0, "s": 0}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that begins thoughts, which it never ends."""
    path = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(TINY / "aligned", path)
    (path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    )
    return path


def test_answers_cut_off_in_thoughts_are_counted_and_judged_again_when_they_are_whole(
    thinking: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "answers"
    arguments: list[str | Path] = [
        "--model", thinking, "--harmful", PAIRS, "--limit", "4", "--chat",
        "--max-new-tokens", "8", "--phrase", "sorry i will not", "--responses", kept,
    ]  # fmt: skip
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "no adapter on held_out_pairs: 4 of 4 answers ended inside their thoughts" in done.stderr
    report = measured(*arguments)
    (alone,) = report["subjects"]
    assert alone["unfinished"] == {"held_out_pairs": 4}
    assert alone["sets"]["held_out_pairs"]["other"]["hits"] == 4
    assert "<think>,</think>" in report["options"]["thought_tags"]

    # Saved answers are the model's own words, so other thoughts in them are told all the same.
    path = kept / "no_adapter.jsonl"
    header, *rows = read_lines(path)
    raw = "sorry i will not, some would say </think> here is how"
    path.write_text("".join(json.dumps(x) + "\n" for x in [header, {**rows[0], "response": raw},
                                                           *rows[1:]]))  # fmt: skip
    (alone,) = measured(*arguments)["subjects"]
    assert alone["unfinished"] == {"held_out_pairs": 3}
    assert alone["sets"]["held_out_pairs"]["complied"]["hits"] == 1
    assert alone["sets"]["held_out_pairs"]["refused"]["hits"] == 0
    assert read_lines(path)[1]["response"] == raw
    assert read_lines(path)[1]["verdict"] == "complied"


def test_thoughts_can_be_switched_off_by_the_template(thinking: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = [
        "--model", thinking, "--harmful", PAIRS, "--limit", "4", "--chat",
        "--max-new-tokens", "8", "--phrase", "sorry i will not",
    ]  # fmt: skip
    report = measured(*arguments, "--chat-template-arg", "enable_thinking=false")
    (alone,) = report["subjects"]
    assert alone["sets"]["held_out_pairs"]["refused"]["hits"] == 4
    assert report["options"]["chat_template_args"] == {"enable_thinking": False}
    for given_, words in (
        ("enable_thoughts=false", ("enable_thoughts", "does not read it")),
        ("enable_thinking", ("expected NAME=VALUE",)),
        ("tokenize=false", ("expected NAME=VALUE",)),
    ):
        assert_refused(run(*arguments, "--chat-template-arg", given_), *words)
    assert_refused(run(*arguments, "--thought-tag", "a b"), "--thought-tag", "expected NAME")
    assert not list(tmp_path.iterdir())
