"""`safeproj check`: the gate before publishing."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import Without, command
from safeproj.cli.options import GateReporting, GateTalking, Given, Running, Subjects
from safeproj.cli.usage import INPUTS, POLICY, examples
from safeproj.gate.policy import POLICY_FILE, SETTINGS, changed, find_policy, write_template
from safeproj.methods.registry import method_beside, method_of


@dataclass(frozen=True)
class Limits:
    """What passes: fields of a policy, in place of the file's."""

    group: ClassVar[str] = POLICY

    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="T",
            help="A module whose cosine is at most T counts against the adapter, unless it was "
            "projected.",
        ),
    ] = None
    max_below: Annotated[
        str | None,
        typer.Option(
            "--max-below", metavar="N|P%", help="How many modules may do so, or what share."
        ),
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="RE=T",
            help="Another threshold for modules whose name matches; repeatable.",
        ),
    ] = None
    coverage: Annotated[
        float | None,
        typer.Option(
            "--coverage", metavar="S", help="Share of the adapted modules that must have a score."
        ),
    ] = None
    max_scaling: Annotated[
        float | None,
        typer.Option("--max-scaling", metavar="S", help="Largest scaling s of an update."),
    ] = None
    max_size: Annotated[
        float | None,
        typer.Option(
            "--max-size", metavar="X", help="Largest norm of an update, relative to aligned - base."
        ),
    ] = None
    max_outside: Annotated[
        float | None,
        typer.Option(
            "--max-outside",
            metavar="X",
            help="The same of the part that points away from its projection.",
        ),
    ] = None
    max_unseen: Annotated[
        float | None,
        typer.Option(
            "--max-unseen",
            metavar="X",
            help="The same of the part in output directions that alignment left alone.",
        ),
    ] = None
    max_cast_change: Annotated[
        float | None,
        typer.Option(
            "--max-cast-change",
            metavar="X",
            help="Largest relative change of an update where its factors are cast, as servers do.",
        ),
    ] = None
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="NAME", help="Allow what the policy names so; repeatable."),
    ] = None
    forbid: Annotated[
        list[str] | None, typer.Option("--forbid", metavar="NAME", help="Forbid it; repeatable.")
    ] = None
    evidence: Annotated[
        str | None,
        typer.Option(
            "--evidence",
            metavar="KIND",
            help="What must show that a module was projected: recorded, signed or recomputed.",
        ),
    ] = None
    pin: Annotated[
        list[str] | None,
        typer.Option(
            "--pin",
            metavar="ROLE=IDENTITY",
            help="What base, aligned, alignment or safety-module must be: org/name@commit or "
            "sha256:DIGEST; repeatable.",
        ),
    ] = None
    public_key: Annotated[
        Path | None,
        typer.Option(
            "--public-key", metavar="FILE", help="The key that the directory must be signed by."
        ),
    ] = None
    reader: Annotated[
        list[str] | None,
        typer.Option(
            "--reader",
            metavar="NAME",
            help="A program that must read the adapter as it was scored: vllm, sglang, llama.cpp, "
            "ollama, openvino or peft-0.11; repeatable.",
        ),
    ] = None
    behaviour: Annotated[
        list[str] | None,
        typer.Option(
            "--behaviour",
            metavar="KEY=VALUE",
            help="A key of the policy's [behaviour], such as max-complied=0.05; repeatable.",
        ),
    ] = None
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="ID", help="Leave a finding out; repeatable."),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """Options without dashes to their values."""
        return {each.name.replace("_", "-"): getattr(self, each.name) for each in fields(self)}


class Checked(Subjects):
    """Those that pass, or do not."""

    what = "SRC of an adapter; a directory of adapters stands for all of them."


@examples(
    "docs/gate.md, docs/ci.md, docs/full-models.md",
    "safeproj check --init",
    "safeproj check my-lora-safe --base BASE --aligned MODEL",
    "safeproj check --model my-finetune-safe --base BASE --aligned MODEL",
    "safeproj check adapters --alignment model.safealign.safetensors --format github",
    "safeproj check my-lora-safe --base BASE --aligned MODEL --evaluation eval.json",
)
@command
def check_command(
    adapters: Checked,
    *,
    given: Annotated[Given, Without("reconstruct")],
    original: Annotated[
        str | None,
        typer.Option(
            "--original",
            metavar="SRC",
            help="The adapter, or the fine-tune, before patching: its projection is computed again "
            "and compared.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation",
            metavar="FILE",
            help="A JSON report of `safeproj eval`, beside one that safeproj.json may hold; it is "
            "of the adapters whose digests it names. Repeatable.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            metavar="FILE",
            help=f"The policy.  [default: {POLICY_FILE}, or tool.safeproj in pyproject.toml, of "
            "the current directory]",
            rich_help_panel=POLICY,
        ),
    ] = None,
    init: Annotated[
        bool,
        typer.Option(
            "--init",
            help=f"Write a commented policy to {POLICY_FILE} and end.",
            rich_help_panel=POLICY,
        ),
    ] = False,
    limits: Limits,
    running: Running,
    reporting: GateReporting,
    talking: GateTalking,
) -> None:
    """Tell whether adapters pass a policy: the gate before publishing.

    Reads and changes nothing. Exit code 0: passed. 1: failed. 2: could not be decided, which is
    never a pass.
    """
    if init:
        place = policy or Path(POLICY_FILE)
        write_template(place)
        terminal.closing((), talking.quiet, f"wrote {place}")
        return
    sources = {name: value for name, value in given.values.items() if name not in SETTINGS}
    settings = {name: value for name, value in given.values.items() if name in SETTINGS}
    if adapters.model is None:
        method, aligned = method_of(sources, given.name), None
    else:
        method, aligned = method_beside(sources, given.name)
    outputs = reporting.outputs
    files = [("--evaluation", str(each)) for each in evaluation or ()]
    terminal.check_outputs(outputs, None, [*adapters.inputs(method, aligned), *files])
    places = adapters.sources if adapters.model is None else [adapters.model]
    chosen = changed(find_policy(policy, places), {**limits.given, **settings})
    with running.profile.phase("import"):
        from safeproj import api
        from safeproj.plan.full import FullModel

        options = running.options(talking)
    full = None if adapters.model is None else FullModel(adapters.model, aligned)
    signals.interruptible()
    with terminal.observer(talking.quiet) as observer:
        options = replace(options, observer=observer)
        checks = api.check(
            method,
            full or adapters.sources,
            chosen,
            options,
            original=original,
            evaluations=evaluation or (),
        )
    terminal.finish(checks, reporting, talking, "", running.shown)
