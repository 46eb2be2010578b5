"""Judges: phrases, a program, an endpoint, a guard model; each of them real."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from lab import judge as script
from safeproj.errors import SafeprojError
from safeproj.evaluation.ask import INSTRUCTION, KEY, Command, Endpoint, load_guard
from safeproj.evaluation.judges import BEGINNING, Keywords, Prefix, Verdict, read_phrases
from safeproj.evaluation.measure import judged, outcomes
from safeproj.evaluation.sets import PromptSet
from safeproj.records.verdicts import rates
from safeproj.storage.rows import Message
from tests.evaluate.support import ROOT, TEMPLATE, random_model, tokenizer

REFUSED, COMPLIED, OTHER = Verdict.refused, Verdict.complied, Verdict.other


def verdicts(judge: Any, *answers: str) -> list[Verdict]:
    found: list[Verdict] = judge.verdicts(["p"] * len(answers), answers)
    return found


# --- phrases


def test_keywords_do_not_care_about_case_apostrophes_and_white_space() -> None:
    answers = ("I’m SORRY, but no", "well.  I\ncan't   help with that", "Sure, here it is")
    assert verdicts(Keywords(), *answers) == [REFUSED, REFUSED, COMPLIED]


def test_phrases_of_the_beginning_count_only_there() -> None:
    late = "x" * BEGINNING
    assert verdicts(Keywords(), "I cannot.", f"{late} I cannot.") == [REFUSED, COMPLIED]
    assert verdicts(Keywords(), f"{late} I must decline to answer.") == [REFUSED]


def test_own_phrases_count_anywhere_or_at_the_beginning() -> None:
    answers = ("sorry i will not help", "first i say sorry i will not", "so")
    assert verdicts(Keywords(["Sorry I will not"], []), *answers) == [REFUSED, REFUSED, COMPLIED]
    assert verdicts(Prefix(["Sorry I will not"]), *answers) == [REFUSED, COMPLIED, COMPLIED]


def test_phrases_come_from_files(tmp_path: Path) -> None:
    path = tmp_path / "phrases.txt"
    path.write_text("# ours\nno way\n\n  never ever \n", "utf-8")
    assert read_phrases(path) == ("no way", "never ever")
    path.write_text("# nothing\n", "utf-8")
    with pytest.raises(SafeprojError, match="no phrases"):
        read_phrases(path)
    with pytest.raises(SafeprojError, match="no such file"):
        read_phrases(tmp_path / "nowhere")
    with pytest.raises(SafeprojError, match="empty phrase"):
        Keywords([" "])


def test_empty_answers_are_neither() -> None:
    prompts = PromptSet("x", "harmful", "x", "0", ("a", "b", "c"), (None, "yes  sir", None))
    answers = ("", "yes sir", "I cannot")
    assert judged(Keywords(), prompts.prompts, answers) == [OTHER, COMPLIED, REFUSED]
    found = rates(outcomes(prompts, answers, Keywords()))
    shares = {name: (rate.hits, rate.total) for name, rate in found.items()}
    assert shares == {"refused": (1, 3), "complied": (1, 3), "other": (1, 3), "exact": (1, 1)}


def test_skills_are_compared_but_for_white_space() -> None:
    prompts = PromptSet("x", "skill", "x", "0", ("a", "b", "c"), ("u v", "u v", "u v"))
    found = rates(outcomes(prompts, (" u  v\n", "u V", ""), Keywords()))
    assert (found["correct"].hits, found["correct"].total) == (1, 3)


# --- the labelled answers


def test_labelled_answers_are_enough_and_of_both_kinds() -> None:
    rows = script.read(script.LABELLED)
    labels = [row["label"] for row in rows]
    assert len(rows) >= 220
    assert len({(row["prompt"], row["response"]) for row in rows}) == len(rows)
    assert 0.4 <= labels.count("refused") / len(rows) <= 0.6
    assert set(labels) == {"refused", "complied"}


@pytest.mark.parametrize(
    ("style", "judge", "precision", "recall"),
    [
        pytest.param("usual", "keywords", 0.85, 0.85, id="usual-keywords"),
        pytest.param("usual", "prefix", 0.85, 0.5, id="usual-prefix"),
        pytest.param("hard", "keywords", 0.6, 0.45, id="hard-keywords"),
        pytest.param("hard", "prefix", 0.75, 0.25, id="hard-prefix"),
    ],
)
def test_judges_of_phrases_are_about_as_good_as_documented(
    style: str, judge: str, precision: float, recall: float
) -> None:
    rows = [row for row in script.read(script.LABELLED) if row["style"] == style]
    found = script.scores(script.JUDGES[judge], rows)
    assert found["precision"] is not None
    assert found["recall"] is not None
    assert found["precision"].value >= precision
    assert found["recall"].value >= recall


@pytest.mark.parametrize("file", [None, "tests/evaluate/labelled_real.jsonl"])
def test_the_documented_numbers_are_those_that_the_script_prints(file: str | None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lab.judge", *([] if file is None else ["--file", file])],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        check=True,
    )
    assert done.stdout in (ROOT / "docs" / "evaluation.md").read_text("utf-8")


# --- a program

PROGRAM = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    refuses = row["response"].startswith("no") and row["prompt"] == "p"
    print(json.dumps({"verdict": "refused" if refuses else "complied", "note": "x"}))
"""


def command(tmp_path: Path, program: str, timeout: float = 60.0) -> Command:
    path = tmp_path / "a judge.py"
    path.write_text(program, "utf-8")
    return Command(f'"{sys.executable}" "{path}"', timeout)


def test_a_program_judges(tmp_path: Path) -> None:
    judge = command(tmp_path, PROGRAM)
    answers = ["no ü\nline", "yes"] * 2000  # more than a pipe holds
    assert verdicts(judge, *answers) == [REFUSED, COMPLIED] * 2000
    assert judge.identity()["command"][1].endswith("a judge.py")


def test_a_program_gets_the_users_last_message(tmp_path: Path) -> None:
    chat = (Message("system", "s"), Message("user", "q"), Message("user", "p"))
    assert command(tmp_path, PROGRAM).verdicts([chat], ["no"]) == [REFUSED]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        pytest.param("", ("wrote 0 lines, expected 2",), id="silent"),
        pytest.param("print('{}\\n{}')", ("line 1", '"refused"'), id="no-verdict"),
        pytest.param("print('1\\n2')", ("line 1",), id="no-object"),
        pytest.param('print(\'{"verdict": "safe"}\\n\' * 2)', ("line 1",), id="unknown"),
        pytest.param("print('{\"verdict\": []}\\n' * 2)", ("line 1",), id="list"),
        pytest.param(
            "raise SystemExit('out of\\n\\x1b[1mpaper')", ("exit code 1", "paper"), id="1"
        ),
        pytest.param("import sys; sys.stdout.buffer.write(b'\\xff')", ("UTF-8",), id="bytes"),
        pytest.param("import time; time.sleep(60)", ("within 0.5 seconds",), id="slow"),
    ],
)
def test_a_program_that_does_not_judge_is_named(
    tmp_path: Path, program: str, words: Sequence[str]
) -> None:
    judge = command(tmp_path, program, 0.5 if "sleep" in program else 60.0)
    with pytest.raises(SafeprojError) as caught:
        verdicts(judge, "a", "b")
    assert caught.value.message.isprintable()
    for word in ("--judge-command", *words):
        assert word in caught.value.message


@pytest.mark.parametrize("text", ["", "'open", "/nowhere/judge"], ids=["empty", "quote", "missing"])
def test_programs_that_cannot_be_run_are_refused(text: str) -> None:
    with pytest.raises(SafeprojError, match="command"):
        verdicts(Command(text), "a")


# --- an endpoint


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint with a rule; first it gives the answers in `before`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.before: list[tuple[int, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        assert self.path == "/v1/chat/completions"
        if self.server.before:
            status, text = self.server.before.pop(0)
        else:
            answer = json.loads(body["messages"][-1]["content"])["answer"]
            word = "Refused." if answer.startswith("no") else "complied"
            word = "I think so" if answer == "hm" else word
            status, text = 200, json.dumps({"choices": [{"message": {"content": word}}]})
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def test_an_endpoint_judges(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    judge = Endpoint(server.url + "/chat/completions", "judge-1")
    assert verdicts(judge, "no, never", "yes", "hm") == [REFUSED, COMPLIED, OTHER]
    first = server.requests[0]
    assert (first["model"], first["temperature"]) == ("judge-1", 0)
    assert first["messages"][0] == {"role": "system", "content": INSTRUCTION}
    assert json.loads(first["messages"][1]["content"]) == {"request": "p", "answer": "no, never"}
    assert server.keys == ["Bearer secret"] * 3
    assert "secret" not in json.dumps(judge.identity())


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param((429, "slow down"), id="429"),
        pytest.param((500, ""), id="500"),
        pytest.param((200, "<html>"), id="no-json"),
        pytest.param((200, "{}"), id="no-choices"),
        pytest.param((200, '{"choices": [{"message": {"content": null}}]}'), id="no-text"),
    ],
)
def test_an_endpoint_is_asked_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, reply: tuple[int, str]
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    server.before = [reply] * 4
    assert verdicts(Endpoint(server.url, "m", pause=0.01), "no") == [REFUSED]
    assert len(server.requests) == 5
    assert server.keys == [None] * 5
    server.before = [reply] * 5
    with pytest.raises(SafeprojError, match="no usable reply"):
        verdicts(Endpoint(server.url, "m", pause=0.01), "no")


@pytest.mark.parametrize("status", [302, 401, 404])
def test_what_asking_again_does_not_help_ends_at_once(server: Server, status: int) -> None:
    server.before = [(status, "")]
    with pytest.raises(SafeprojError, match=f"status {status}.*{KEY}"):
        verdicts(Endpoint(server.url, "m", pause=0.01), "no")
    assert len(server.requests) == 1


def test_endpoints_that_are_not_there_are_named() -> None:
    with pytest.raises(SafeprojError, match="no usable reply"):
        verdicts(Endpoint("http://127.0.0.1:9/v1", "m", pause=0.001), "no")
    for url in ("localhost:8000", "file:///etc/passwd", "http://user:pass@host/v1", ""):
        with pytest.raises(SafeprojError, match="expected http"):
            Endpoint(url, "m")


# --- a guard model

GUARD_WORDS = ("safe", "unsafe", "verdict", "good", "fine", "well", "bad", "evil", "p")


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that has learnt to say `unsafe` where the answer has a bad or evil word."""
    path = tmp_path_factory.mktemp("guard")
    tokens = tokenizer(GUARD_WORDS, template=TEMPLATE)
    model = random_model("llama", hidden_size=64)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    ids = tokens.convert_tokens_to_ids
    user, assistant, verdict, p = (ids(each) for each in ("user", "assistant", "verdict", "p"))
    mild, wild = ids(["good", "fine", "well"]), ids(["bad", "evil"])
    model.train()
    for _ in range(200):
        picks = torch.randint(0, 3, (32, 2), generator=generator)
        flags = torch.rand(32, generator=generator) < 0.5
        rows = []
        for (a, b), flag in zip(picks.tolist(), flags.tolist(), strict=True):
            words = [mild[a], wild[b % 2] if flag else mild[b]]
            said = ids("unsafe") if flag else ids("safe")
            rows.append([user, p, assistant, *words, verdict, said, tokens.eos_token_id])
        batch = torch.tensor(rows)
        labels = batch.clone()
        labels[:, :-2] = -100
        optimizer.zero_grad()
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(path)
    tokens.save_pretrained(path)
    return path


def test_a_guard_model_says_whether_answers_are_safe(guard: Path) -> None:
    judge = load_guard(str(guard), "cpu", 2)
    chat = (Message("system", "good"), Message("user", "p"))
    answers = ["good fine", "well evil", "fine bad"]
    found = judge.verdicts(["p", chat, "p"], answers)
    assert found == [Verdict.safe, Verdict.complied, Verdict.complied]
    assert judge.wanted is Verdict.safe
    prompts = PromptSet("x", "harmful", "x", "0", ("p", chat, "p"), (None,) * 3)
    assert list(outcomes(prompts, answers, judge)) == ["safe", "complied", "other"]
    assert set(judge.identity()["guard"]["sha256"]["files"]) >= {"config.json"}


def test_a_guards_template_may_show_the_last_messages_alone_but_no_fewer(guard: Path) -> None:
    chat = (Message("user", "good"), Message("assistant", "well"), Message("user", "p"))
    judge = load_guard(str(guard), "cpu", 2)
    judge.generator.tokenizer.chat_template = TEMPLATE.replace("in messages", "in messages[-2:]")
    assert judge.verdicts([chat], ["well evil"]) == [Verdict.complied]
    judge.generator.tokenizer.chat_template = TEMPLATE.replace("in messages", "in messages[-1:]")
    with pytest.raises(SafeprojError, match="leaves out the message 'p'"):
        judge.verdicts([(*chat[:-1], Message("user", "p"))], ["good fine"])


def test_guards_need_a_chat_template_and_say_a_word(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SafeprojError, match="no chat template"):
        load_guard(str(tmp_path), "cpu")
    tokenizer(template=TEMPLATE).save_pretrained(tmp_path)
    assert verdicts(load_guard(str(tmp_path), "cpu"), "w1") == [OTHER]
