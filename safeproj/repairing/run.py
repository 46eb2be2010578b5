"""A repair: what the adapter does, what each way to correct it does, and the best one written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safeproj import __version__
from safeproj.adapter import Adapter, open_adapter
from safeproj.adapter.interface import CONFIG
from safeproj.checkpoint.hashes import NEW
from safeproj.engine import one_thread
from safeproj.errors import SafeprojError
from safeproj.evaluation.generate import Generation, Generator, has_template
from safeproj.evaluation.judges import Judge
from safeproj.evaluation.measure import measure, prompt_warnings
from safeproj.evaluation.refusals import refusals
from safeproj.evaluation.run import Opened, Settings, evaluate
from safeproj.evaluation.sets import PromptSet, read_prompts
from safeproj.lm.adapters import Host, require_peft
from safeproj.lm.models import load_tokenizer
from safeproj.methods.covariance.method import Covariance
from safeproj.methods.interface import Method
from safeproj.methods.registry import words_of
from safeproj.methods.safe_lora.method import SafeLora
from safeproj.records.evaluations import Evaluation, embedded
from safeproj.records.rates import Rate
from safeproj.records.repairs import AFTER, BEFORE, Attempt, Goal, Repair, best_control
from safeproj.records.scores import Report
from safeproj.repairing.split import FIT, SAFETY, TASK, TEST, VALIDATION, lines_of, split
from safeproj.repairing.ways import FACTORS, MUS, POINTS, Way, rebuilt, shrinks, ways
from safeproj.run.options import Options
from safeproj.storage.rows import Row
from safeproj.storage.source import LocalFolder, identity, open_folder
from safeproj.sweeping.axes import interventions
from safeproj.sweeping.candidates import Candidates, Replaced
from safeproj.sweeping.controls import Sizes
from safeproj.sweeping.subject import Subject

FEW = 20
"""Prompts of a part below which its intervals say little."""

MEASURABLE = 0.1
"""Share of right answers of the adapter below which no loss of skill can be seen."""

OnStep = Callable[[int, int], None]
"""Told how many adapters are measured, and how many there are at most."""


@dataclass(frozen=True)
class Given:
    """What a repair is given.

    Attributes:
        aligned: SRC of the aligned model, which is run.
        base: SRC of the unaligned model, without which Safe LoRA is not tried.
        adapter: SRC of the adapter.
        harmful: harmful prompts.
        task: prompts of the adapter's skill with right answers, None if there are none.
    """

    aligned: str
    base: str | None
    adapter: str
    harmful: PromptSet
    task: PromptSet | None


@dataclass
class Bench:
    """What everything is measured on, and by.

    Attributes:
        host: the aligned model.
        generator: lets it answer.
        judge: of the answers to harmful prompts.
        goal: what is to be reached.
        harmful: the validation split.
        task: that of the skill, None if there is none.
        on_step: told about the progress.
        steps: how many adapters are measured at most.
    """

    host: Host
    generator: Generator
    judge: Judge
    goal: Goal
    harmful: PromptSet
    task: PromptSet | None
    on_step: OnStep | None = None
    steps: int = 0
    done: int = field(default=0, init=False)

    def attempt(
        self,
        model: Any,
        title: str,
        change: float | None,
        options: tuple[str, ...] = (),
        *,
        always: bool = False,
    ) -> Attempt:
        """Measure a model; its skill only where it refuses as much as is wanted, or always."""
        refused = self._rate(model, self.harmful, self.judge.wanted.value)
        skill = None
        if self.task is not None and (always or self.goal.is_refusing(refused)):
            skill = self._rate(model, self.task, "correct")
        self.done += 1
        if self.on_step is not None:
            self.on_step(self.done, max(self.done, self.steps))
        return Attempt(title, options, change, refused, skill)

    def _rate(self, model: Any, prompts: PromptSet, outcome: str) -> Rate:
        return measure(model, self.generator, [prompts], self.judge).rates[prompts.name][outcome]


def _refused(
    prompts: PromptSet, host: Host, generator: Generator, judge: Judge
) -> tuple[bytes, int]:
    """Return prompts with the aligned model's own refusals, as lines, and how many have none.

    Raises:
        SafeprojError: it refuses none of them.
    """
    rows = [Row(f"--harmful {prompts.source}", prompt) for prompt in prompts.prompts]
    found = refusals(host.model, generator, judge, rows)
    if not found.rows:
        raise SafeprojError(
            f"--harmful {prompts.source}: the aligned model refuses none of {found.asked} prompts "
            f"({found.describe()}); expected a model that refuses, or a judge that knows how: see "
            "--phrase"
        )
    lines = (row.line() for row in found.rows)
    return b"".join(lines), found.asked - len(found.rows)


def repair(
    given: Given,
    out: Path,
    data: Path,
    goal: Goal,
    judge: Judge,
    generation: Generation,
    options: Options,
    section: Callable[[Report], str],
    *,
    plain: bool = False,
    seed: int = 0,
    best_effort: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> Repair:
    """Correct an adapter in every way that the inputs allow, and write the best.

    Args:
        given: what is read.
        out: the directory to create.
        data: the directory that gets the parts of the prompts, which is empty.
        goal: what is to be reached.
        judge: of the answers to harmful prompts.
        generation: how answers are generated.
        options: how the correction is done.
        section: makes what the model card says.
        plain: continue plain prompts as they are, though the model has a chat template.
        seed: of the parts, and of random controls.
        best_effort: write the best there is even where the goal is not reached.
        overwrite: replace an adapter that is at `out`.
        on_step: told about the progress.

    Raises:
        SafeprojError: an input cannot be used; nothing is written.
    """
    profile = options.profile
    parts = {"harmful": split(given.harmful, "--harmful", seed)}
    if given.task is not None:
        parts["task"] = split(given.task, "--task", seed)
    folder = open_folder(given.aligned)
    tokenizer = load_tokenizer(folder)
    goal = replace(goal, label=judge.wanted.value)
    generator = replace(generation, chat=not plain and has_template(tokenizer)).generator(tokenizer)
    generation = replace(generation, chat=False)  # chats are in the files
    require_peft(open_adapter(given.adapter))
    host = Host(folder, options.device, generation.dtype)
    sets = {
        (kind, part): _written(prompts, data / f"{kind}.{part}.jsonl", generator.chat)
        for kind, found in parts.items()
        for part, prompts in found.items()
        if part != FIT
    }
    bench = Bench(
        host,
        generation.generator(tokenizer),
        judge,
        goal,
        sets["harmful", VALIDATION],
        sets.get(("task", VALIDATION)),
        on_step,
        2 + len(FACTORS) + 2 * POINTS + len(MUS),
    )
    with profile.phase("load model"):
        _ = host.model
    with profile.phase("measure"):
        alone = bench.attempt(host.model, "no adapter", None, always=True)
        kept, dropped = _refused(parts["harmful"][FIT], host, generator, judge)
    (data / SAFETY).write_bytes(kept)
    if "task" in parts:
        (data / TASK).write_bytes(lines_of(parts["task"][FIT], chat=generator.chat))
    with ExitStack() as stack:
        methods = list(_methods(given, data, options, stack, host))
        search = _Search(given, bench, methods, options, seed)
        with profile.phase("measure"):
            search.run()
        best = search.best
        way = search.ways[best]
        controls = search.controls()
        control = best_control(goal, (each for each, _ in controls), 1 + best)
        with one_thread():
            job, run = way.run()
        place = ("--adapter", given.adapter, "--out", str(out))
        record = Repair(
            version=__version__,
            inputs={
                **({} if given.base is None else {"base": {"source": given.base}}),
                **{role: dict(found) for role, found in run.report.inputs.items()},
                "model": identity(host.folder),
            },
            goal=goal,
            methods=tuple(search.names),
            splits={kind: {p: len(s.prompts) for p, s in f.items()} for kind, f in parts.items()},
            validation=(alone, *search.attempts),
            controls=tuple(each for each, _ in controls),
            chosen=1 + best,
            test=None,
            out=None,
            command=("safeproj", "patch", *way.options, *place),
            warnings=(
                *run.report.warnings,
                *search.warnings,
                *prompt_warnings(bench.generator, list(sets.values())),
                *_data_warnings(parts, dropped, alone, search, goal),
            ),
        )
        test = _Test(
            [each for (_, part), each in sets.items() if part == TEST],
            bench,
            Settings(**vars(generation), device=options.device, seed=seed),
            search.adapter,
            next(((each.title, made) for each, made in controls if each is control), None),
        )

        def complete(directory: Path) -> Mapping[str, Any]:
            nonlocal record
            with profile.phase("test"):
                record = replace(record, test=test.of(LocalFolder(directory, str(out))))
            if not (record.is_reached or best_effort):
                raise _NotReachedError
            assert record.test is not None
            return {"behaviour": embedded(record.test, AFTER, BEFORE)}

        try:
            job.write(run, out, section, overwrite=overwrite, complete=complete)
        except _NotReachedError:
            return record
        return replace(record, out=str(out))


@dataclass(frozen=True)
class _Test:
    """The test split, and what is measured on it.

    Attributes:
        sets: the prompts.
        bench: the model and the judge.
        settings: how answers are generated.
        adapter: as it is.
        control: title and tensors of the best control, None if there is none.
    """

    sets: Sequence[PromptSet]
    bench: Bench
    settings: Settings
    adapter: Adapter
    control: tuple[str, Replaced] | None

    def of(self, written: LocalFolder) -> Evaluation:
        """Measure the model alone, the adapter before, the one that is written, and the control."""
        with ExitStack() as places:

            def saved(title: str, replaced: Replaced) -> Opened:
                place = places.enter_context(TemporaryDirectory(prefix="safeproj-"))
                return _saved(self.adapter, title, replaced, Path(place))

            folder = self.adapter.folder
            before = saved(BEFORE, {}) if self.adapter.documents else Opened(BEFORE, folder)
            measured = [before, Opened(AFTER, written)]
            if self.control is not None:
                measured.append(saved(*self.control))
            host, judge = self.bench.host, self.bench.judge
            source = host.folder.source
            return evaluate(source, measured, self.sets, judge, self.settings, host=host)


class _NotReachedError(Exception):
    """The goal is not reached, so that nothing is to be written."""


def _written(prompts: PromptSet, place: Path, chat: bool) -> PromptSet:
    """Write a part of a set, and return it as it is read again."""
    place.write_bytes(lines_of(prompts, chat=chat))
    option = "--harmful" if prompts.kind == "harmful" else "--task"
    return read_prompts(f"{place.name.partition('.')[0]}={place}", prompts.kind, option)


def _methods(
    given: Given, data: Path, options: Options, stack: ExitStack, host: Host
) -> Iterator[Method]:
    """Yield what can be done with what is given, prepared."""
    if given.base is not None:
        yield SafeLora(given.base, given.aligned)
    task = None if given.task is None else str(data / TASK)
    method = Covariance(given.aligned, str(data / SAFETY), task, host=host)
    with options.profile.phase("statistics"):
        yield stack.enter_context(method.prepared([given.adapter], options))


class _Search:
    """The ways to repair one adapter, and what each of them does on the validation split."""

    def __init__(
        self, given: Given, bench: Bench, methods: Sequence[Method], options: Options, seed: int
    ) -> None:
        self._given, self._bench = given, bench
        self._options = options
        self.names: list[str] = []
        self.warnings: list[str] = []
        self._tried: list[tuple[Method, Candidates]] = []
        errors = []
        for method in methods:
            name = words_of(method.name).name
            try:
                with one_thread():
                    tried = interventions(method, given.adapter, options, seed=seed, hashes=(NEW,))
            except SafeprojError as error:
                errors.append(error)
                self.warnings.append(f"{name} was not tried: {error.message}")
                continue
            self._tried.append((method, tried))
            self.names.append(name)
        if not self._tried:
            raise errors[0]
        self.adapter, self._modules = self._tried[0][1].adapter, self._tried[0][1].modules
        self._sizes = Sizes(self.adapter, self._modules)
        self.ways: list[Way] = []
        self.attempts: list[Attempt] = []

    def run(self) -> None:
        """Measure one way after the other, until none can be better."""
        source, options = self._given.adapter, self._options
        (nothing, *first), *others = (list(ways(*each, options)) for each in self._tried)
        known = [*first, *(way for _, *more in others for way in more)]
        made = [(way, way.replaced()) for way in known]
        made.sort(key=lambda each: self._sizes.change(each[1]))
        with self._worn() as subject:
            for way, replaced in [(nothing, nothing.replaced()), *made]:
                if self._measured(subject, way, replaced):
                    return
        for method, _ in self._tried:
            if not isinstance(method, Covariance) or method.task_data is None:
                continue
            name = f"{words_of(method.name).name} layer by layer"
            for mu in MUS:
                try:
                    way = rebuilt(method, mu, source, options)
                except SafeprojError as error:
                    self.warnings.append(f"{name} was not tried: {error.message}")
                    return
                if name not in self.names:
                    self.names.append(name)
                with self._worn() as subject:
                    if self._measured(subject, way, way.replaced()):
                        return

    def _measured(self, subject: Subject, way: Way, replaced: Replaced) -> bool:
        """Measure one way, and tell whether nothing can be better."""
        subject.put(replaced)
        change = self._sizes.change(replaced)
        is_first = not self.attempts
        found = self._bench.attempt(subject.model, way.title, change, way.options, always=is_first)
        self.ways.append(way)
        self.attempts.append(found)
        if not self._bench.goal.is_refusing(found.refused):
            return False
        before = self.attempts[0].skill
        return found.skill is None or before is None or found.skill.value >= before.value

    @property
    def best(self) -> int:
        """The way that refuses as much as is wanted with the most skill, the first of equals.

        Where none does, the one that refuses most.
        """
        goal = self._bench.goal

        def order(number: int) -> tuple[bool, float, float]:
            each = self.attempts[number]
            skill = 0.0 if each.skill is None else each.skill.value
            return goal.is_refusing(each.refused), skill, each.refused.value

        return max(range(len(self.attempts)), key=order)

    @property
    def reaching(self) -> list[int]:
        """The ways that reach the goal; where none does, the best of them."""
        goal, before = self._bench.goal, self.attempts[0].skill
        found = [
            number
            for number, each in enumerate(self.attempts)
            if goal.is_refusing(each.refused) and goal.is_kept(each.skill, before)
        ]
        return found or [self.best]

    def controls(self) -> list[tuple[Attempt, Replaced]]:
        """Measure what ways that reach the goal are compared with, and the adapter turned down.

        One that misses the goal is not chosen, whatever its controls do. Nothing is compared with
        an adapter that is left as it is.
        """
        if not self.ways[self.best].controls:
            return []
        made = [
            (1 + number, title, make())
            for number in self.reaching
            for title, make in self.ways[number].controls.items()
        ]
        with self._options.profile.phase("measure"), self._worn() as subject:
            found = [(self._control(subject, *each), each[-1]) for each in made]
            for title, replaced in shrinks(self.adapter, self._modules):
                attempt = self._control(subject, None, title, replaced)
                if self._bench.goal.is_refusing(attempt.refused):
                    found.append((attempt, replaced))
                    break
        return found

    def _control(self, subject: Subject, of: int | None, title: str, replaced: Replaced) -> Attempt:
        subject.put(replaced)
        found = self._bench.attempt(subject.model, title, self._sizes.change(replaced))
        return replace(found, of=of)

    @contextmanager
    def _worn(self) -> Iterator[Subject]:
        """Give the model with the adapter on it."""
        found: list[Subject] = []

        def put(model: Any) -> Any:
            found.append(Subject(model, self.adapter))
            return found[0].model

        with self._bench.host.lazily(self.adapter.folder, put) as load:
            load()
            yield found[0]
            found[0].put({})


def _saved(adapter: Adapter, title: str, replaced: Replaced, place: Path) -> Opened:
    """Write a variant of an adapter where it can be measured, and return it."""
    documents = {CONFIG: adapter.folder.path(CONFIG).read_bytes(), **adapter.documents}
    for name, content in documents.items():
        (place / name).write_bytes(content)
    adapter.format.write(place / adapter.format.output_file, {**adapter.tensors, **replaced})
    return Opened(title, LocalFolder(place, title))


def _data_warnings(
    parts: Mapping[str, Mapping[str, PromptSet]],
    dropped: int,
    alone: Attempt,
    search: _Search,
    goal: Goal,
) -> Iterator[str]:
    """Yield what the user should know of the data."""
    if dropped:
        yield (
            f"the aligned model does not refuse {dropped} of "
            f"{len(parts['harmful'][FIT].prompts)} harmful prompts: they were not corrected with"
        )
    if not goal.is_refusing(alone.refused):
        yield (
            f"the aligned model alone refuses {100 * alone.refused.value:.0f} % of the "
            f"validation split, less than the {100 * goal.refusals:g} % wanted"
        )
    for kind, found in parts.items():
        count = len(found[TEST].prompts)
        if count < FEW:
            yield (
                f"--{kind}: {count} prompts to report on, of which the intervals are wide; give "
                "about 100 prompts in all"
            )
    skill = search.attempts[0].skill
    if skill is not None and skill.value < MEASURABLE:
        yield (
            f"the adapter gets {100 * skill.value:.0f} % of the task right, so that a loss of skill"
            " can hardly be seen; give prompts with short answers of which one is right"
        )
