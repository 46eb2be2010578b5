"""What a model's chat template makes of messages: checked, and the same on every day."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.text import first_line, printable

DATE = datetime.date(2024, 7, 26)
"""What day it is for templates that print the date, unless another is given: any day would do, as
long as it stays the same. It is the one that Llama 3's own templates fall back to."""

Chat = Sequence[Mapping[str, str]]
"""Messages, each with `role` and `content`."""

_MARK = "e7b1c94f"
"""What tells where a message ends in what a template writes; its own words may be there too."""

_SWITCHES = re.compile(r"/(?:no_)?think\b")
"""Words in a message that switch thoughts on or off, which some templates take out."""


@dataclass(frozen=True)
class ChatOptions:
    """How chats are put to a model.

    Attributes:
        date: what day it is for templates that print it, `DATE` if None.
        arguments: further variables of the template, such as `enable_thinking`.
    """

    date: datetime.date | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def day(self) -> datetime.date:
        """What day it is."""
        return DATE if self.date is None else self.date

    def require_read(self, tokenizer: Any) -> None:
        """Refuse arguments that the template does not read, which would change nothing.

        Raises:
            SafeprojError: there is one, or no template.
        """
        text = template_of(tokenizer)
        for name in self.arguments:
            if re.search(rf"\b{re.escape(name)}\b", text) is None:
                problem = "does not read it" if text else "is missing"
                raise SafeprojError(
                    f"--chat-template-arg {name}: the model's chat template {problem}; expected a "
                    "variable of it, such as enable_thinking or reasoning_effort"
                )

    def words(self) -> Iterator[str]:
        """Yield the options of a command that say so; of `chat_options` the inverse."""
        if self.date is not None:
            yield from ("--date", self.date.isoformat())
        for name, value in self.arguments.items():
            is_text = isinstance(value, str) and _value(value) == value
            yield from ("--chat-template-arg", f"{name}={value if is_text else json.dumps(value)}")

    def to_dict(self) -> dict[str, Any]:
        """Return what a record says."""
        return {"date": self.day.isoformat(), "chat_template_args": dict(self.arguments)}


@dataclass(frozen=True)
class Rendered:
    """What a model gets.

    Attributes:
        tokens: of the whole text.
        text: the whole text.
        tail: what the template writes between the last message and the answer, None if unknown.
    """

    tokens: tuple[int, ...]
    text: str
    tail: str | None = None

    @property
    def sha256(self) -> str:
        """The digest of the tokens."""
        return hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()


def template_of(tokenizer: Any) -> str:
    """Return a tokenizer's chat template, empty if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return str(tokenizer.get_chat_template())
    except (AttributeError, ValueError):  # several by name, of which none is the default
        return str(tokenizer.chat_template)


def prints_date(tokenizer: Any) -> bool:
    """Tell whether a chat template asks what day it is."""
    return "strftime_now" in template_of(tokenizer)


def render(
    tokenizer: Any,
    chat: Chat,
    options: ChatOptions,
    *,
    where: str,
    answer: bool,
    needed: Chat | None = None,
) -> Rendered:
    """Return a chat as the template writes it, with all that the messages say.

    Templates of vision-language models read a message as a list of parts, and some write nothing
    where it is text; so that form is tried where text is lost.

    Args:
        tokenizer: the model's, with a chat template.
        chat: the messages.
        options: how they are put.
        where: what messages begin with.
        answer: whether an answer is to follow.
        needed: those messages whose text must be there, all if None.

    Raises:
        SafeprojError: the template does not take the messages, or leaves one of them out.
    """
    options.require_read(tokenizer)
    problem = ""
    for form in (_as_text, _in_parts):
        text, failed = _written(tokenizer, form(chat), options, answer)
        lost = None if text is None else _lost(text, chat if needed is None else needed)
        if text is not None and lost is None and not (form is _in_parts and _quotes(text, chat)):
            tokens = _apply(tokenizer, form(chat), options, answer, tokenize=True)["input_ids"]
            marked, _ = _written(tokenizer, form(_marked(chat)), options, answer)
            _, found, tail = (marked or "").rpartition(_MARK)
            return Rendered(single_start(tokens, tokenizer), text, tail if found else None)
        problem = problem or (
            f"leaves out the message {_shown(lost)}" if lost else f"does not take it ({failed})"
        )
    raise SafeprojError(
        f"{where}: the model's chat template {problem}; change the messages, or give 'prompt' with "
        "text as the model expects it"
    )


def single_start(tokens: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """Return tokens with one beginning-of-sequence token at most in front.

    A text that begins with it gets another one from the tokenizer.
    """
    start, first = tokenizer.bos_token_id, 0
    while start is not None and list(tokens[first : first + 2]) == [start, start]:
        first += 1
    return tuple(tokens[first:])


def without_end(tokens: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """Return tokens without end-of-sequence tokens behind: of the text, or of the tokenizer."""
    last = len(tokens)
    while last and tokens[last - 1] == tokenizer.eos_token_id:
        last -= 1
    return tuple(tokens[:last])


def _as_text(chat: Chat) -> list[dict[str, Any]]:
    return [dict(each) for each in chat]


def _in_parts(chat: Chat) -> list[dict[str, Any]]:
    return [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in chat]


def _written(
    tokenizer: Any, messages: Sequence[Any], options: ChatOptions, answer: bool
) -> tuple[str | None, str]:
    """Return the text of a chat, or what the template says against it."""
    try:
        return str(_apply(tokenizer, messages, options, answer, tokenize=False)), ""
    except SafeprojError:
        raise
    except Exception as error:  # a template may raise whatever it likes
        return None, printable(first_line(error))[:200]


def _apply(
    tokenizer: Any, messages: Sequence[Any], options: ChatOptions, answer: bool, *, tokenize: bool
) -> Any:
    with _on(options.day if prints_date(tokenizer) else None, tokenizer):
        return tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=answer,
            tokenize=tokenize,
            return_dict=tokenize,
            **options.arguments,
        )


@contextmanager
def _on(day: datetime.date | None, tokenizer: Any) -> Iterator[None]:
    """Let templates print a day in place of today.

    `strftime_now` is a function that transformers gives to templates; no argument replaces it. So
    the clock that it reads is replaced, and then asked whether it was.
    """
    if day is None:
        yield
        return
    from transformers.utils import chat_template_utils

    moment = datetime.datetime.combine(day, datetime.time(12))

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:  # noqa: ARG003 - as `datetime` has it
            return moment

    clock: Any = chat_template_utils
    before = clock.datetime
    clock.datetime = Fixed
    try:
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}],
            chat_template="{{ strftime_now('%Y-%m-%d') }}",
            tokenize=False,
        )
        if said != day.isoformat():
            raise SafeprojError(
                "the model's chat template prints today's date, and this version of transformers "
                "does not let it be fixed; give 'prompt' in place of 'messages'"
            )
        yield
    finally:
        clock.datetime = before


def _lost(text: str, chat: Chat) -> str | None:
    """Return the text of a message that is not in what a template wrote, None if all are.

    White space does not count, nor what templates take out on purpose: earlier thoughts, and words
    that switch them. What was found is taken away, the longest first, so that a message is not
    found inside another one.
    """
    rest = _bare(text)
    for message in sorted(chat, key=lambda each: len(each["content"]), reverse=True):
        content = message["content"]
        forms = [content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1]]
        if message["role"] == "assistant":
            forms.append(content.rpartition("</think>")[2])
        found = next((form for form in map(_bare, forms) if form in rest), None)
        if found is None:
            return content
        rest = rest.replace(found, "\n", 1) if found else rest
    return None


def _bare(text: str) -> str:
    return "".join(_SWITCHES.sub("", text).split())


def _quotes(text: str, chat: Chat) -> bool:
    """Tell whether a template that expects text wrote a list of parts as Python or JSON has it."""
    return any(
        quoted in text
        for each in chat
        for part in [{"type": "text", "text": each["content"]}]
        for quoted in (str(part), json.dumps(part), json.dumps(part, ensure_ascii=False))
    )


def _marked(chat: Chat) -> list[Mapping[str, str]]:
    """Return a chat whose last message ends in a word that is nowhere else."""
    *rest, last = chat
    return [*rest, {**last, "content": f"{last['content']} {_MARK}"}]


def _shown(text: str) -> str:
    found = printable(" ".join(text.split()))
    return repr(found if len(found) <= 40 else f"{found[:40]}…")


def parse_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Return `NAME=VALUE` as variables of a template; a value is JSON, else text.

    Raises:
        SafeprojError: one is of another form, or names what messages are given as.

    >>> parse_arguments(["enable_thinking=False", "reasoning_effort=low", "budget=3"])
    {'enable_thinking': False, 'reasoning_effort': 'low', 'budget': 3}
    """
    found: dict[str, Any] = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or not name.isidentifier() or name in _RESERVED or name in found:
            raise SafeprojError(
                f"--chat-template-arg {each!a}: expected NAME=VALUE with a variable of the chat "
                "template, each once, such as enable_thinking=false"
            )
        found[name] = _value(value)
    return found


_RESERVED = frozenset(
    {
        "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation",
        "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs", "strftime_now",
    }
)  # fmt: skip
"""Parameters of `apply_chat_template`, and what it gives to templates itself."""


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):  # Python's `False` would be text, which counts as true
        return text.lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse_date(text: str) -> datetime.date:
    """Return `YYYY-MM-DD`.

    Raises:
        SafeprojError: it is none.
    """
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
            return datetime.date.fromisoformat(text)
    except ValueError:
        pass
    raise SafeprojError(f"--date {text!a}: expected a day as YYYY-MM-DD, such as {DATE}")


def chat_options(day: str | None, arguments: Sequence[str] | None) -> ChatOptions:
    """Return how chats are put, as options of the command say it.

    Raises:
        SafeprojError: one is malformed.
    """
    return ChatOptions(None if day is None else parse_date(day), parse_arguments(arguments or ()))
