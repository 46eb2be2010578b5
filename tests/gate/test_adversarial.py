"""Adversarial adapters: each fails or is undecidable, none passes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

import tests.gate.attacks  # noqa: F401 - each file there adds to the table
from safeproj.cli.app import app
from safeproj.storage import patterns
from tests.conftest import Trio
from tests.gate.adversarial import (
    ATTACKS,
    BIASED,
    EMBEDDED,
    EMBEDDING,
    EXPERTS,
    LENIENT,
    PATCHED,
    PLAIN,
    PREFIX,
    Attack,
    Ground,
    Q,
    Start,
    add,
    configure,
    harmful,
    key,
    make_up,
    put_tensors,
    save_whole,
    scale,
    strictly,
    tensors_of,
)
from tests.support import COMMAND, moved, safeproj, save_adapter, snapshot

SECONDS = 20
"""How long the installed command may take; a check takes two."""


@dataclass(frozen=True)
class Outcome:
    """How the command ended, and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def findings(self) -> list[dict[str, Any]]:
        """The findings of the one adapter, none where the options were refused."""
        if not self.stdout:
            return []
        (check,) = json.loads(self.stdout)["checks"]
        return [*check["findings"]]


def in_process(*arguments: str | Path) -> Outcome:
    """Run the command without starting Python again; its signal handlers do not stay."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return Outcome(found.exit_code, found.stdout, found.stderr)


def apart(*arguments: str | Path) -> Outcome:
    """Run the command in a process of its own."""
    found = safeproj(*arguments)
    return Outcome(found.returncode, found.stdout, found.stderr)


def as_installed(*arguments: str | Path) -> Outcome:
    """Run the installed command, with a limit to its time."""
    found = subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )
    return Outcome(found.returncode, found.stdout, found.stderr)


def checking(adapter: Path, start: Start, further: Sequence[str | Path] = ()) -> list[str | Path]:
    models: list[str | Path] = ["--base", start.base, "--aligned", start.aligned]
    return ["check", adapter, *models, *start.options, *further, "--format", "json"]


# --- where the attacks start


def patch(adapter: Path, base: Path, aligned: Path, out: Path) -> Path:
    models: list[str | Path] = ["--base", base, "--aligned", aligned]
    done = in_process("patch", *models, "--adapter", adapter, "--out", out, "--all")
    assert done.code == 0, done.stderr
    return out


def experts(root: Path) -> Start:
    """A model with stacks of experts, and an adapter of their parameters, patched."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=41,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    model: Any = MixtralForCausalLM(config).float()
    aligned = moved(model)
    model.save_pretrained(root / "base")
    aligned.save_pretrained(root / "aligned")
    plain = save_adapter(
        aligned,
        root / "adapter",
        r=2,
        lora_alpha=4,
        target_modules=[],
        target_parameters=["experts.down_proj"],
    )
    patched = patch(plain, root / "base", root / "aligned", root / "patched")
    return Start(patched, root / "base", root / "aligned", strictly(), plain)


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    found = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(
        found.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return found


@pytest.fixture(scope="session")
def ground(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    root = tmp_path_factory.mktemp("adversarial")
    base, aligned = trio.base, trio.aligned
    patched = patch(trio.adapter, base, aligned, root / "patched")
    other = patch(
        save_adapter(trio.aligned_model, root / "second", seed=5), base, aligned, root / "o"
    )
    embedded = save_adapter(
        trio.aligned_model, root / "embedded", target_modules=["q_proj", "embed_tokens"]
    )
    scale(embedded, 0.01, f"{PREFIX}{EMBEDDING}.lora_embedding_B")
    biased = save_adapter(trio.aligned_model, root / "biased", lora_bias=True)
    biases = {n: torch.zeros_like(t) for n, t in tensors_of(biased).items() if n.endswith("bias")}
    put_tensors(biased, {**tensors_of(biased), **biases})
    weights = {name: tensor.detach() for name, tensor in trio.aligned_model.state_dict().items()}
    base_weights = {name: tensor.detach() for name, tensor in trio.base_model.state_dict().items()}
    bad = Path(shutil.copytree(trio.adapter, root / "bad"))
    tensors = tensors_of(bad)
    name = f"{Q}.weight"
    tensors[key(Q, "B")] = harmful(weights[name], base_weights[name], tensors[key(Q, "B")])
    put_tensors(bad, tensors)
    public = private_key(root / "key.pem").public_key()
    private_key(root / "other.pem")
    (root / "key.pub.pem").write_bytes(
        public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    starts = {
        PLAIN: Start(trio.adapter, base, aligned),
        PATCHED: Start(patched, base, aligned, strictly(), trio.adapter),
        EMBEDDED: Start(embedded, base, aligned),
        BIASED: Start(biased, base, aligned),
        EXPERTS: experts(tmp_path_factory.mktemp("experts")),
    }
    return Ground(
        starts,
        bad,
        other,
        weights,
        base_weights,
        root / "key.pub.pem",
        root / "key.pem",
        root / "other.pem",
    )


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Patterns out of files get less time than they would, so that the tests end sooner."""
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    yield


@pytest.mark.parametrize("name", [PLAIN, PATCHED, EMBEDDED, BIASED, EXPERTS])
def test_what_is_attacked_passes(ground: Ground, name: str) -> None:
    start = ground.starts[name]
    found = in_process(*checking(start.adapter, start))
    assert found.code == 0, found.stdout


@pytest.mark.parametrize("name", [PATCHED, EXPERTS])
def test_the_patched_pass_by_their_evidence_alone(ground: Ground, name: str) -> None:
    start = ground.starts[name]
    found = in_process(*checking(ground.original(name), start))
    assert found.code == 1
    assert {"SP001"} <= {each["id"] for each in found.findings}
    again = in_process(*checking(start.adapter, start, ["--evidence", "recomputed"]))
    assert again.code == 1
    assert {each["id"] for each in again.findings} == {"SP023", "SP045"}
    original: list[str | Path] = ["--original", ground.original(name)]
    assert in_process(*checking(start.adapter, start, original)).code == 0


# --- what looks like an attack and is none


def test_an_exact_copy_of_a_base_layer_passes(ground: Ground, tmp_path: Path) -> None:
    start = ground.starts[PLAIN]
    adapter = Path(shutil.copytree(start.adapter, tmp_path / "adapter"))
    add(adapter, f"{PREFIX}{Q}.base_layer.weight", ground.weights[f"{Q}.weight"])
    found = in_process(*checking(adapter, start))
    assert found.code == 0, found.stdout + found.stderr


def test_an_exact_copy_of_a_head_passes(ground: Ground, tmp_path: Path) -> None:
    start = ground.starts[PLAIN]
    adapter = Path(shutil.copytree(start.adapter, tmp_path / "adapter"))
    save_whole(adapter, "lm_head.weight", ground.weights["lm_head.weight"])
    found = in_process(*checking(adapter, start))
    assert found.code == 0, found.stdout + found.stderr


def test_settings_of_honest_adapters_pass(ground: Ground, tmp_path: Path) -> None:
    start = ground.starts[PLAIN]
    adapter = Path(shutil.copytree(start.adapter, tmp_path / "adapter"))
    (adapter / "training_args.bin").write_bytes(b"")
    configure(
        adapter,
        target_modules=r".*\.self_attn\.(q|v)_proj",
        alpha_pattern={r"layers\.0\..*": 16},
        init_lora_weights="gaussian",
        use_rslora=True,
    )
    # The settings scale updates by more, and training ends at smaller factors: those of the start
    # are random, and would be larger than any that is trained.
    for name in ("q_proj", "v_proj"):
        scale(adapter, 0.25, key(f"model.layers.0.self_attn.{name}", "B"))
        scale(adapter, 0.5, key(f"model.layers.1.self_attn.{name}", "B"))
    found = in_process(*checking(adapter, start))
    assert found.code == 0, found.stdout + found.stderr


# --- the table


def test_the_table_is_large_enough() -> None:
    assert len(ATTACKS) >= 40


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_no_attack_passes_alone_or_beside_the_original(
    attack: Attack, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    start = ground.starts[attack.start]
    adapter = Path(shutil.copytree(start.adapter, tmp_path / "adapter"))
    further = attack.edit(adapter, ground) or ()
    if attack.inside:
        monkeypatch.chdir(adapter)
    before = snapshot(tmp_path)
    arguments = checking(adapter, start, further)
    piped = any(path.is_fifo() for path in adapter.iterdir())
    assert_caught(attack, (as_installed if piped else in_process)(*arguments))
    if attack.apart:  # of which one is enough to see that the installed command does the same
        run = as_installed if attack.name == "harmful_update" else apart
        assert_caught(attack, run(*arguments))
    assert snapshot(tmp_path) == before
    if "--original" in further or piped:
        return  # the attack is on the original, or the command may not come back
    original: list[str | Path] = ["--original", start.original or start.adapter]
    found = in_process(*checking(adapter, start, [*further, *original]))
    assert found.code in (1, 2), f"{attack.name} passes: {attack.hope}\n{found.stdout}"
    assert "Traceback" not in found.stdout + found.stderr


@pytest.mark.parametrize(
    "attack", [each for each in ATTACKS if each.group == "original"], ids=lambda each: each.name
)
def test_verify_finds_what_differs_from_the_original(
    attack: Attack, ground: Ground, tmp_path: Path
) -> None:
    start = ground.starts[attack.start]
    adapter = Path(shutil.copytree(start.adapter, tmp_path / "adapter"))
    original = attack.edit(adapter, ground) or ()
    models: list[str | Path] = ["--base", start.base, "--aligned", start.aligned]
    found = in_process("verify", adapter, *original, *models, "--format", "json")
    assert found.code == 1, found.stdout + found.stderr
    ids = {each["id"] for each in found.findings}
    # Whatever its cosine, what was kept is as patching may leave it; but a record is wanted.
    assert ids & {"SP020", "SP021", "SP022", "SP024", "SP025"}
    assert attack.finds == ("SP001",) or set(attack.finds) <= ids


@pytest.fixture
def many(ground: Ground, tmp_path: Path) -> Path:
    """A directory of two adapters, of which one is harmful."""
    shutil.copytree(ground.starts[PLAIN].adapter, tmp_path / "many" / "good")
    shutil.copytree(ground.bad, tmp_path / "many" / "harmful")
    return tmp_path / "many"


def test_a_harmful_adapter_does_not_pass_among_others(ground: Ground, many: Path) -> None:
    found = in_process(*checking(many, ground.starts[PLAIN]))
    outcomes = {each["name"]: each["outcome"] for each in json.loads(found.stdout)["checks"]}
    assert found.code == 1
    assert outcomes == {"good": "passed", "harmful": "failed"}


def test_an_adapter_does_not_bring_the_policy_for_many(
    ground: Ground, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (many / "harmful" / "safeproj.toml").write_text(LENIENT, "utf-8")
    monkeypatch.chdir(many / "harmful")
    for source in (many, Path("..")):
        found = in_process(*checking(source, ground.starts[PLAIN]))
        assert found.code == 2, found.stdout
        assert "lies in the adapter" in found.stderr


def test_a_hidden_adapter_among_many_does_not_pass(ground: Ground, many: Path) -> None:
    (many / "harmful").rename(many / ".harmful")
    found = in_process(*checking(many, ground.starts[PLAIN]))
    assert found.code in (1, 2), found.stdout


def test_a_made_up_record_is_taken_at_its_word_where_no_more_is_wanted(
    ground: Ground, tmp_path: Path
) -> None:
    start = ground.starts[PATCHED]
    adapter = Path(shutil.copytree(start.adapter, tmp_path / "adapter"))
    make_up(adapter, ground)
    found = in_process(*checking(adapter, start))
    assert found.code == 0, found.stdout + found.stderr


def assert_caught(attack: Attack, found: Outcome) -> None:
    """Check exit code, findings and the one line on stderr of what is undecided."""
    assert found.code in (1, 2), f"{attack.name} passes: {attack.hope}\n{found.stdout}"
    assert "Traceback" not in found.stdout + found.stderr
    assert "unexpected" not in found.stderr
    assert found.code == attack.code, found.stdout + found.stderr
    ids = {each["id"] for each in found.findings if each["level"] != "note"}
    assert set(attack.finds) <= ids, found.stdout
    said = [each["message"] for each in found.findings if each["id"] in attack.finds]
    said = said if attack.finds else [found.stderr]
    assert any(attack.says in each for each in said), said
    if attack.code == 2 and (not attack.finds or "SP090" in attack.finds):
        errors = [line for line in found.stderr.splitlines() if "error:" in line]
        assert len(errors) == 1, found.stderr
