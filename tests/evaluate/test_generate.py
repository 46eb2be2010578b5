"""Greedy answers against a loop that runs one prompt at a time and keeps nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safeproj.errors import SafeprojError
from safeproj.evaluation.generate import Generator
from safeproj.storage.rows import Message
from tests.evaluate.support import TEMPLATE, random_model, tokenizer
from tests.support import save_adapter

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13", "w4", "w20 w21 w22 w23 w24"]


@torch.no_grad()
def one_by_one(model: Any, tokens: Any, prompt: str, new: int) -> str:
    """Return the most likely token after the prompt, and after that, until the end."""
    ids = list(tokens(prompt)["input_ids"])
    answer: list[int] = []
    while len(answer) < new:
        following = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if following == tokens.eos_token_id:
            break
        answer.append(following)
    return str(tokens.decode(answer, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("pad", [True, False], ids=["pad-token", "no-pad-token"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2"])
def test_answers_are_greedy_whatever_the_batch_size(kind: str, pad: bool) -> None:
    model, tokens = random_model(kind), tokenizer(pad=pad)
    expected = [one_by_one(model, tokens, prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) > 3
    for size in (1, 2, 3, 16):
        assert Generator(tokens, size, 6).answers(model, PROMPTS) == expected


@pytest.mark.parametrize(
    ("kind", "shares"), [("llama", True), ("gpt2", True), ("qwen2", True), ("gemma2", False)]
)
def test_what_prompts_begin_with_is_run_once_and_changes_no_answer(kind: str, shares: bool) -> None:
    model, tokens = random_model(kind), tokenizer()
    system = " ".join(f"w{i}" for i in range(20))
    prompts = [f"{system} {each}" for each in PROMPTS]
    expected = [one_by_one(model, tokens, prompt, 6) for prompt in prompts]
    assert len(set(expected)) > 3
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    for size in (1, 2, 16):
        seen.clear()
        assert Generator(tokens, size, 6).answers(model, prompts) == expected
        # The prompts' own 18 tokens and 20 together, padding, and at most 5 more of each answer.
        assert (sum(seen) < 20 + 3 * 18 + 6 * 5) is shares
    assert Generator(tokens, 16, 6).answers(model, prompts[:1]) == expected[:1]


def test_an_answer_ends_where_the_model_says_so() -> None:
    model, tokens = random_model("llama"), tokenizer()
    ids = [
        int(model(torch.tensor([tokens(p)["input_ids"]])).logits[0, -1].argmax()) for p in PROMPTS
    ]
    whole = Generator(tokens, 2, 6).answers(model, PROMPTS)
    assert any(whole)
    model.generation_config.eos_token_id = [2, *ids]
    assert Generator(tokens, 2, 6).answers(model, PROMPTS) == [""] * len(PROMPTS)


def test_what_the_model_asks_for_beside_greedy_decoding_is_left_out_and_kept() -> None:
    model, tokens = random_model("qwen2"), tokenizer()
    expected = Generator(tokens, 4, 6).answers(model, PROMPTS)
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k = True, 5.0, 50
    config.repetition_penalty, config.min_new_tokens, config.suppress_tokens = 9.0, 6, [7, 8, 9]
    model.train()
    assert Generator(tokens, 4, 6).answers(model, PROMPTS) == expected
    assert model.generation_config is config
    assert model.training


def test_an_adapted_model_answers_with_its_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    model, tokens = random_model("llama"), tokenizer()
    before = Generator(tokens, 4, 6).answers(model, PROMPTS)
    path = save_adapter(model, tmp_path / "adapter", lora_alpha=64)
    adapted: Any = PeftModel.from_pretrained(model, str(path))
    adapted.get_base_model().generation_config.repetition_penalty = 9.0
    found = Generator(tokens, 4, 6).answers(adapted, PROMPTS)
    assert found == [one_by_one(adapted, tokens, prompt, 6) for prompt in PROMPTS]
    assert found != before


def test_answers_end_at_the_last_position_whatever_is_in_the_batch() -> None:
    model, tokens = random_model("gpt2", n_positions=9), tokenizer()
    model.generation_config.eos_token_id = None
    tokens.eos_token = None
    prompts = ["w1", "w1 w2 w3 w4 w5 w6 w7 w8", "w2 w3 w4 w5"]
    for size in (1, 8):
        found = Generator(tokens, size, 6).answers(model, prompts)
        assert [len(each.split()) for each in found] == [6, 1, 5]
    with pytest.raises(SafeprojError, match="9 positions"):
        Generator(tokens, 8, 6).answers(model, ["w1 " * 9])


def test_progress_is_told_per_batch() -> None:
    told: list[tuple[int, int]] = []
    model, tokens = random_model("llama"), tokenizer()
    Generator(tokens, 4, 2).answers(model, PROMPTS, lambda *each: told.append(each))
    assert told == [(4, 6), (6, 6)]
    assert Generator(tokens, 4, 2).answers(model, []) == []


def test_chats_go_through_the_template() -> None:
    tokens = tokenizer(words=("verdict", "w1", "w2"), template=TEMPLATE)
    chat = (Message("user", "w1"), Message("assistant", "w2"), Message("user", "w2"))
    found = Generator(tokens).tokens(chat)
    assert tokens.decode(found) == "user w1 assistant w2 user w2 verdict"
    assert tokens.decode(Generator(tokens, chat=True).tokens("w1")) == "user w1 verdict"
    assert tokens.decode(Generator(tokens).tokens("w1")) == "w1"


def test_what_cannot_be_generated_is_named() -> None:
    tokens, chat = tokenizer(), (Message("user", "w1"),)
    with pytest.raises(SafeprojError, match=r"chat.*no chat template"):
        Generator(tokens, chat=True)
    with pytest.raises(SafeprojError, match=r"'w1'.*no chat template"):
        Generator(tokens).tokens(chat)
    strict = tokenizer(template="{{ raise_exception('only users') }}")
    with pytest.raises(SafeprojError, match="only users"):
        Generator(strict).tokens(chat)
    with pytest.raises(SafeprojError, match="no token"):
        Generator(tokens).tokens("   ")
    for batch_size, new in ((0, 1), (1, 0)):
        with pytest.raises(SafeprojError, match="must be 1 or more"):
            Generator(tokens, batch_size, new)


def test_tokens_that_the_model_has_no_row_for_are_refused() -> None:
    tokens = tokenizer([f"w{i}" for i in range(60)])
    model = random_model("llama")
    with pytest.raises(SafeprojError, match=r"token 65, and the model's vocabulary has 50"):
        Generator(tokens, 2, 2).answers(model, ["w1", "w59"])
    tokens.pad_token = "w59"  # what is masked may be any token
    answers = Generator(tokens, 2, 2).answers(model, ["w1 w2", "w3"])
    assert answers == Generator(tokenizer(), 2, 2).answers(model, ["w1 w2", "w3"])
