"""What is done to the adapters that `evidence.py` compares: each way with its controls, by name.

Ways that change a trained adapter give the tensors that `safeproj patch` would write; ways that
train give the directory of an adapter that serves on the unmodified aligned model.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import safeproj
from lab import real_pair
from lab.pairs import BAD, CACHE, MODULES, SAFE, VERSIONS, Pair, Recipe, digest, make_adapter
from lab.real_pair import RealPair
from lab.tiny_language import Row, write_jsonl
from lab.tiny_lm import LORA_TARGETS, load_model, train_model
from safeproj import Covariance, Merge, Options, SafeDelta, SafeLora, Salora, salora
from safeproj.adapter import AdaptedModule, Adapter
from safeproj.lm.data import BATCH_SIZE, Data, random_data, read_data
from safeproj.lm.models import recorded_inputs
from safeproj.methods.covariance.file import MOMENT
from safeproj.methods.covariance.formulas import Correction, Moment, Reconstruction
from safeproj.methods.covariance.make import make_statistics
from safeproj.methods.interface import Method
from safeproj.methods.recorded import METADATA
from safeproj.plan.select import DEFAULT_THRESHOLD, Selection
from safeproj.records.scores import Report
from safeproj.run.job import Job
from safeproj.storage.arrays import Array, double, single
from safeproj.storage.source import open_folder
from safeproj.sweeping import controls
from safeproj.sweeping.candidates import Projections, candidates
from safeproj.sweeping.controls import Sizes, scaled
from safeproj.sweeping.rotation import Rotation

Replaced = Mapping[str, Array]
"""The tensors that take the place of the adapter's, by key."""

Made = Callable[[], Replaced]
"""Makes them."""

QUARTERS = 5
"""Interventions from no module to all: at 0, 25, 50, 75 and 100 % of the modules."""

SHARES = {1: "25 % of the modules", 2: "50 % of the modules", 4: "all modules"}
"""Which of them are reported."""

ENERGY = 0.9
"""Of the exact projector."""

FACTORS = (0.75, 0.5, 0.25)
"""Uniform shrinks that nothing was fitted to."""

MU = Correction().mu
"""The default of `safeproj patch --method covariance`, at which its controls are."""

MUS = tuple(sorted({0.03, 0.1, 0.3, 1.0, 3.0, 10.0, MU}))

FEWER_PAIRS = (5, 20)
"""Safety pairs in the place of 200."""

SAFETY_RANK = TASK_RANK = 32
"""r_s and d_s, the SaLoRA authors' own."""

FEW = 4
"""Directions removed afterwards, beside 32: where 32 of 128 are too many."""

TASK_ROWS = 200
"""Training rows for SaLoRA's initialisation, as many as there are safety pairs."""

RANDOM_SEED = 1000
"""Added to a pair's seed for what is random in controls, so that nothing is drawn twice."""

BASE, NONE, LORA = "the base model", "no adapter", "LoRA"
SAFE_LORA = f"Safe LoRA, {SHARES[4]}"
EXACT = f"exact projector (energy {ENERGY})"
SHRUNK = {
    controls.SHRINK: "each module shrunk as much",
    controls.UNIFORM: "uniform shrink to the same norm",
    controls.RANDOM: "random projector of the same spectrum",
    controls.COMPLEMENT: "complement, what it removes",
}
REMOVED = f"safety module removed afterwards (rank {SAFETY_RANK})"
REMOVED_FEW = f"safety module removed afterwards (rank {FEW})"
REMOVED_RANDOM = f"random directions removed afterwards (rank {SAFETY_RANK})"
EACH_AS_MUCH = "each module shrunk as much on benign data"
ALL_AS_MUCH = "uniform shrink by as much on benign data"
RECONSTRUCTED = f"covariance, layer by layer, mu {Reconstruction().mu:g}"
SAFE_WEIGHTS = (Merge(safe_adapter="safe").formula.weight, 0.5, 0.8)
"""Of the safe adapter, the default first; 1 is that adapter alone."""

STRENGTHS = (SafeDelta("aligned", "data").s, 0.01, 1.0)
"""Of Safe Delta, the default first; from about 1 on all is kept that ever is."""

SAFE_ALONE = "the safe adapter alone"

TAU = f"Safe LoRA, tau {DEFAULT_THRESHOLD:g}"


def covariance(mu: float = MU, control: str = "") -> str:
    """Return the name of a covariance-weighted correction.

    >>> covariance(1.0, "random H")
    'covariance, mu 1, random H'
    """
    return f"covariance, mu {mu:g}" + (f", {control}" if control else "")


def merged(weight: float, how: str = "all modules") -> str:
    """Return the name of a merge with the safe adapter.

    >>> merged(0.5)
    'SafeMERGE, all modules, λ 0.5'
    """
    return f"SafeMERGE, {how}, λ {weight:g}"


def safe_delta(strength: float) -> str:
    """Return the name of Safe Delta at one strength.

    >>> safe_delta(0.1)
    'Safe Delta, s 0.1'
    """
    return f"Safe Delta, s {strength:g}"


def control_of(way: str, kind: str) -> str:
    """Return the name of a control of a projection."""
    return f"{way}: {SHRUNK[kind]}"


@dataclass(frozen=True)
class Training:
    """A way to train with SaLoRA.

    Attributes:
        directions: what updates are kept out of: those of the safety data, or as many random ones.
        initialised: whether it begins from the task-specific initialisation.
    """

    directions: str
    initialised: bool = False


TRAININGS = {
    "SaLoRA, constrained": Training("safety"),
    "SaLoRA, initialised + module": Training("safety", initialised=True),
    "SaLoRA, initialised + random module": Training("random", initialised=True),
}


@dataclass(frozen=True)
class Case:
    """One adapter, and where to put what is made for it.

    Attributes:
        pair: the models and data.
        modules: a key of `MODULES`.
        data: what it is trained on.
        path: the plain adapter.
        scratch: a directory of its own.
        shared: one that all adapters of a run share.
    """

    pair: Pair | RealPair
    modules: str
    data: str
    path: Path
    scratch: Path
    shared: Path

    @property
    def safe_lora(self) -> SafeLora:
        """Safe LoRA with both models."""
        return SafeLora(base=str(self.pair.base), aligned=str(self.pair.aligned))

    @cached_property
    def projections(self) -> Projections:
        """The adapter scored with Safe LoRA's projector, and with a random one of each weight."""
        return self._projections(self.safe_lora)

    @cached_property
    def exact(self) -> Projections:
        """The same with the exact projector."""
        return self._projections(replace(self.safe_lora, projector="exact", energy=ENERGY))

    @property
    def adapter(self) -> Adapter:
        """The plain adapter, read."""
        return self.projections.adapter

    @cached_property
    def safety_module(self) -> salora.SafetyModule:
        """The safety module of the aligned model."""
        return safety_module(self.pair, self.modules)

    def file(self, name: str, rows: Sequence[Row]) -> Path:
        """Write rows to a data file and return its place."""
        path = self.scratch / f"{name}.jsonl"
        write_jsonl(path, rows)
        return path

    def ran(self, method: Method, selection: Selection) -> Replaced:
        """Return the tensors that a run of safeproj replaces."""
        options = Options(selection, device="cpu", workers=1)
        with method.prepared([str(self.path)], options) as ready:
            return Job(ready, options).one(str(self.path)).decision.replaced

    def _projections(self, method: Method) -> Projections:
        options = Options(device="cpu", workers=1)
        seed = RANDOM_SEED + self.pair.seed
        return candidates(method, str(self.path), options, seed=seed)


def post_hoc(case: Case) -> Iterator[tuple[str, Made]]:
    """Yield every way to change the trained adapter, LoRA as it is first."""
    yield LORA, dict
    yield from _safe_lora(case)
    yield from _exact(case)
    for factor in FACTORS:
        made = partial(scaled, case.adapter, case.projections.modules, factor)
        yield f"uniform shrink by {factor:g}", made
    yield from _removed(case)
    yield from _covariance(case)
    yield from _merged(case)
    yield from _safe_delta(case)


def reports(case: Case, exact: bool) -> dict[str, Report]:
    """Return what safeproj says of the adapter, with the exact projector too where it was made."""
    found = {"approx": case.projections.report}
    return {**found, "exact": case.exact.report} if exact else found


def _safe_lora(case: Case) -> Iterator[tuple[str, Made]]:
    places = case.projections.places(QUARTERS)
    for number, share in SHARES.items():
        yield f"Safe LoRA, {share}", places[number].method
    yield TAU, partial(case.ran, case.safe_lora, Selection(threshold=DEFAULT_THRESHOLD))
    every = places[-1]
    made = {
        **every.controls,
        controls.UNIFORM: lambda: _uniformly_shrunk(case, every.method()),
    }
    for kind in SHRUNK:
        yield control_of(SAFE_LORA, kind), made[kind]


def _uniformly_shrunk(case: Case, replaced: Replaced) -> Replaced:
    """Return the adapter times one factor, with the norm that it has with these tensors."""
    modules = case.projections.modules
    sizes = Sizes(case.adapter, modules)
    return scaled(case.adapter, modules, sizes.norm_of(replaced) / sizes.norm)


def _exact(case: Case) -> Iterator[tuple[str, Made]]:
    every = case.exact.places(QUARTERS)[-1]
    yield EXACT, every.method
    for kind in (controls.RANDOM, controls.COMPLEMENT):
        yield control_of(EXACT, kind), every.controls[kind]


def _removed(case: Case) -> Iterator[tuple[str, Made]]:
    """Yield SaLoRA's module, and random directions, removed from the trained adapter."""

    def without(module: salora.SafetyModule, name: str, rank: int) -> Replaced:
        path = case.scratch / f"{name}.safetensors"
        module.save(path, overwrite=True)
        return case.ran(Salora(str(path), rank), Selection(all=True))

    own = case.safety_module
    yield REMOVED, lambda: without(own, "safety", SAFETY_RANK)
    yield REMOVED_FEW, lambda: without(own, "safety", FEW)
    random = random_directions(own, case.pair.seed)
    yield REMOVED_RANDOM, lambda: without(random, "random", SAFETY_RANK)


def _covariance(case: Case) -> Iterator[tuple[str, Made]]:
    pair = case.pair
    safety, task = pair.data / "safety.jsonl", pair.data / "task.jsonl"

    def read(path: Path) -> Data:
        return read_data(path, pair.tokenizer)

    H = _statistics(case, "safety", read(safety))
    S = _statistics(case, "task", read(task))

    def corrected(H: Path, S: Path, mu: float = MU) -> Replaced:
        method = Covariance(safety_data=str(H), task_data=str(S), mu=mu)
        return case.ran(method, Selection(all=True))

    def fewer(count: int) -> Replaced:
        few = case.file(f"safety-{count}", pair.rows("safety")[:count])
        return corrected(_statistics(case, few.stem, read(few)), S)

    for mu in MUS:
        yield covariance(mu), partial(corrected, H, S, mu)
    yield RECONSTRUCTED, lambda: _reconstructed(case, safety, task)
    yield covariance(control=EACH_AS_MUCH), lambda: _each_weakened(case, corrected(H, S), S)
    yield covariance(control=ALL_AS_MUCH), lambda: _uniformly_weakened(case, corrected(H, S), S)
    for count in FEWER_PAIRS:
        yield covariance(control=f"{count} pairs"), partial(fewer, count)
    yield (
        covariance(control="random tokens as benign text"),
        lambda: corrected(H, _statistics(case, "tokens", random_data(pair.tokenizer))),
    )
    yield (
        covariance(control="random H of the same spectrum"),
        lambda: corrected(_turned(H, case.scratch, RANDOM_SEED + pair.seed), S),
    )
    yield covariance(control="H and S swapped"), partial(corrected, S, H)


def _merged(case: Case) -> Iterator[tuple[str, Made]]:
    """Yield merges with a safe adapter, each written in the ranks that the adapter has."""
    pair = case.pair

    def with_safe(
        weight: float, selection: Selection, base: str | None = None, aligned: str | None = None
    ) -> Replaced:
        safe = str(safe_adapter(case))
        method = Merge(base, aligned, safe_adapter=safe, weight=weight, merge_form="low-rank")
        return case.ran(method, selection)

    every, some = Selection(all=True), Selection(threshold=DEFAULT_THRESHOLD)
    models = str(pair.base), str(pair.aligned)
    for weight in SAFE_WEIGHTS:
        yield merged(weight), partial(with_safe, weight, every)
    weight = SAFE_WEIGHTS[0]
    chosen = f"tau {DEFAULT_THRESHOLD:g}"
    yield merged(weight, chosen), partial(with_safe, weight, some, *models)
    yield SAFE_ALONE, partial(with_safe, 1.0, every)


def safe_adapter(case: Case) -> Path:
    """Make the safe adapter of a pair, or find it: LoRA on refusals, as `bad` is on answers."""
    pair = case.pair
    if isinstance(pair, RealPair):
        return real_pair.make_adapter(pair, case.modules, SAFE)
    folder = None
    if not (pair.data / "train_bad.jsonl").exists():  # the shipped example, which is no cache
        folder = CACHE / f"example-{digest(pair.rows('safety'), VERSIONS)}"
    return make_adapter(pair, case.modules, SAFE, folder=folder)


def _safe_delta(case: Case) -> Iterator[tuple[str, Made]]:
    """Yield Safe Delta, as the best adapter of the ranks that the adapter has."""
    aligned, data = str(case.pair.aligned), str(case.pair.data / "safety.jsonl")
    for strength in STRENGTHS:
        method = SafeDelta(aligned, data, strength)
        yield safe_delta(strength), partial(case.ran, method, Selection(all=True))


def _reconstructed(case: Case, safety: Path, task: Path) -> Replaced:
    """Return the tensors that `safeproj patch --reconstruct` replaces."""
    out = case.scratch / "reconstructed"
    method = Covariance(str(case.pair.aligned), str(safety), str(task), reconstruct=True)
    options = Options(Selection(all=True), device="cpu", workers=1)
    safeproj.patch(method, str(case.path), out, options, overwrite=True)
    found: dict[str, Array] = load_file(out / "adapter_model.safetensors")
    return {name: each for name, each in found.items() if ".lora_A." in name}


def _each_weakened(case: Case, replaced: Replaced, S: Path) -> Replaced:
    """Return the adapter with each module shrunk to what it does on benign data with these."""
    found: dict[str, Array] = {}
    for module, before, after in _effects(case, replaced, S):
        found |= scaled(case.adapter, [module], math.sqrt(after / before))
    return found


def _uniformly_weakened(case: Case, replaced: Replaced, S: Path) -> Replaced:
    """Return the adapter shrunk by one factor to what it does on benign data with these."""
    _, before, after = zip(*_effects(case, replaced, S), strict=True)
    factor = math.sqrt(math.fsum(after) / math.fsum(before))
    return scaled(case.adapter, case.projections.modules, factor)


def _effects(
    case: Case, replaced: Replaced, S: Path
) -> Iterator[tuple[AdaptedModule, float, float]]:
    """Yield the modules with `E_benign ‖ΔW x‖²` as they are, and with these tensors.

    The factor s is left out: it is the same for all modules of these adapters.
    """
    own = case.adapter.tensors
    with safe_open(S, "np") as file:
        weights = json.loads(file.metadata()[METADATA])["weights"]
        for module in case.projections.modules:
            name = weights[f"{module.name}.weight"]["tensor"]
            moment = Moment(double(file.get_tensor(name)), name.endswith(f".{MOMENT}"))
            before, after = (
                _effect(module.output.view(own), module.input.view(tensors), moment)
                for tensors in (own, {**own, **replaced})
            )
            yield module, before, after


def _effect(B: Array, A: Array, moment: Moment) -> float:
    B, A = double(B), double(A)
    return float(((B.T @ B) * (A @ moment.apply(A).T)).sum())


def _statistics(case: Case, name: str, data: Data) -> Path:
    """Write the statistics of some data as `safeproj stats` does, with the model in float32.

    They are of all layers of the aligned model, so that all adapters of a pair share them.
    """
    out = case.shared / f"{case.pair.root.name}-{name}.stats.safetensors"
    if not out.exists():
        make_statistics(
            case.pair.model(),
            data.batches(BATCH_SIZE),
            out,
            LORA_TARGETS,
            recorded_inputs(open_folder(str(case.pair.aligned)), data),
            overwrite=True,
        )
    return out


def _turned(source: Path, scratch: Path, seed: int) -> Path:
    """Write statistics with `Q H Qᵀ` in the place of each moment `H`, `Q` random, orthogonal."""
    out = scratch / f"turned.{source.name}"
    tensors: dict[str, Array] = {}
    with safe_open(source, "np") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118
            H = file.get_tensor(name)
            Q = Rotation(H.shape[1], seed, name)
            H = Q.turn(H.T).T  # H Qᵀ, or X Qᵀ where the moment is XᵀX
            H = Q.turn(H) if name.endswith(f".{MOMENT}") else H
            tensors[name] = numpy.ascontiguousarray(single(H))
    save_file(tensors, out, metadata)
    return out


def safety_module(pair: Pair | RealPair, modules: str) -> salora.SafetyModule:
    """Return the safety module of a pair's aligned model."""
    batches = read_data(pair.data / "safety.jsonl", pair.tokenizer).batches()
    return salora.safety_module(pair.model(), batches, MODULES[modules], SAFETY_RANK)


def random_directions(module: salora.SafetyModule, seed: int) -> salora.SafetyModule:
    """Return a module of as many random directions."""
    generator = torch.Generator().manual_seed(RANDOM_SEED + seed)
    found = {}
    for name, each in module.directions.items():
        U = torch.linalg.qr(torch.randn(each.U.shape, generator=generator))[0]
        found[name] = replace(each, U=U)
    return replace(module, directions=found)


def train(case: Case, way: str) -> Path:
    """Train an adapter with SaLoRA, or find it beside the pair's own, and return its directory.

    It is trained as the plain one is, and written as it serves on the unmodified aligned model.

    Args:
        case: the plain adapter's.
        way: a key of `TRAININGS`.
    """
    pair, training = case.pair, TRAININGS[way]
    assert isinstance(pair, Pair)
    recipe = BAD if case.data == "bad" else pair.family.task[case.modules]
    settings = [way, case.modules, case.data, asdict(recipe), SAFETY_RANK, TASK_RANK, TASK_ROWS]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    out = pair.root / "salora" / key
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        _train(case, training, recipe, out)
    return out


def _train(case: Case, training: Training, recipe: Recipe, out: Path) -> None:
    pair = case.pair
    assert isinstance(pair, Pair)
    torch.manual_seed(pair.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.rank,
        target_modules=MODULES[case.modules],
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(pair.model(), config)
    module = {
        "safety": lambda: case.safety_module,
        "random": lambda: random_directions(case.safety_module, pair.seed),
    }[training.directions]()
    rows = pair.rows(f"train_{case.data}")
    initial = None
    if training.initialised:
        sample = case.file("initialisation", rows[:TASK_ROWS])
        batches = read_data(sample, pair.tokenizer).batches()
        initial = salora.initialise(model, module, batches, task_rank=TASK_RANK)
    salora.constrain(model, module)
    train_model(
        model,
        pair.tokenizer,
        [rows],
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        seed=pair.seed,
    )
    salora.fold(model, module, out, initial=initial)


def alignment_spectrum(pair: Pair | RealPair, modules: str) -> dict[str, float]:
    """Return medians over the adapted weights of what tells how strong Safe LoRA's `C` is.

    Returns:
        `norm`: `‖V‖_F`; `strength`: `‖C‖₂ = σ₁² / ‖V‖_F`; `directions`: the share of the output
        directions that the exact projector keeps.
    """
    base, aligned = (load_model(path).state_dict() for path in (pair.base, pair.aligned))
    found: dict[str, list[float]] = {"norm": [], "strength": [], "directions": []}
    for name, weight in aligned.items():
        if name.split(".")[-2] in MODULES[modules]:
            V = (weight - base[name]).double()
            V = V if V.shape[0] <= V.shape[1] else V.T
            energies = torch.linalg.eigvalsh(V @ V.T).flip(0).clamp(min=0)
            norm = float(energies.sum().sqrt())
            kept = int((energies.cumsum(0) < ENERGY * energies.sum()).sum()) + 1
            found["norm"].append(norm)
            found["strength"].append(float(energies[0]) / norm)
            found["directions"].append(kept / weight.shape[0])
    return {name: statistics.median(values) for name, values in found.items()}
