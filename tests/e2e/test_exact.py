"""The exact projector of weights that are large enough not to be decomposed whole at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from safeproj.storage.arrays import Array
from tests.support import CONFIG, FACTORS, MANIFEST, read_json, safeproj

SIZE, RANK = 1100, 24

SPECTRA = {
    "decaying": numpy.arange(1.0, SIZE + 1) ** -1.0,
    "flat": numpy.linspace(1.0, 0.9, SIZE),
    "tied": numpy.where(numpy.arange(SIZE) < 2 * RANK, 1.0, 0.1),
}
"""Singular values of `V` in a layer each: in the last, 48 are as good as equal, and 24 wanted."""


def name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj"


@dataclass(frozen=True)
class Large:
    """A pair and an adapter."""

    folder: Path
    V: tuple[Array, ...]
    B: tuple[Array, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        paths: list[str] = []
        for each in ("base", "aligned", "adapter"):
            paths += f"--{each}", str(self.folder / each)
        return (*paths, "--projector", "exact", "--rank", str(RANK))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    folder, generator = tmp_path_factory.mktemp("large"), numpy.random.default_rng(0)

    def orthonormal() -> Array:
        return numpy.linalg.qr(generator.standard_normal((SIZE, SIZE)))[0]

    # The base is zero, so that the spectrum is not rounded more than float32 rounds it.
    V = tuple((orthonormal() * each @ orthonormal()).astype("float32") for each in SPECTRA.values())
    B = tuple(generator.standard_normal((SIZE, 4), numpy.float32) for _ in V)
    for side, weights in (("base", tuple(map(numpy.zeros_like, V))), ("aligned", V)):
        (folder / side).mkdir()
        (folder / side / "config.json").write_text('{"model_type": "llama"}')
        tensors = {f"{name(layer)}.weight": each for layer, each in enumerate(weights)}
        save_file(tensors, folder / side / "model.safetensors")
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter" / CONFIG).write_text(json.dumps(config))
    factors = {}
    for layer, each in enumerate(B):
        start = f"base_model.model.{name(layer)}"
        factors[f"{start}.lora_A.weight"] = generator.standard_normal((4, SIZE), numpy.float32)
        factors[f"{start}.lora_B.weight"] = each
    save_file(factors, folder / "adapter" / FACTORS)
    return Large(folder, V, B)


def test_neither_workers_nor_threads_show_in_the_result(large: Large, tmp_path: Path) -> None:
    written = set[bytes]()
    for workers, threads in (("1", "1"), ("2", "4"), ("3", "2")):
        out = tmp_path / workers
        options = ("patch", *large.arguments, "--all", "--out", str(out), "--workers", workers)
        env = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        result = safeproj(*options, env=env)
        assert result.returncode == 0, result.stderr
        written.add((out / FACTORS).read_bytes())
    assert len(written) == 1


def test_it_is_the_projector_or_the_report_says_that_none_is_the_one(
    large: Large, tmp_path: Path
) -> None:
    result = safeproj("patch", *large.arguments, "--all", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "out" / FACTORS)
    for layer, spectrum in enumerate(SPECTRA):
        V, B = large.V[layer].astype("float64"), large.B[layer]
        U = numpy.linalg.svd(V)[0]
        CB = found[f"base_model.model.{name(layer)}.lora_B.weight"]
        expected = B.astype("float64")
        if spectrum == "tied":  # it may keep any of those that are tied, and nothing else
            inside = U[:, : 2 * RANK].T @ CB
            assert numpy.linalg.norm(inside) == pytest.approx(numpy.linalg.norm(CB), rel=1e-6)
        else:
            expected = U[:, :RANK] @ (U[:, :RANK].T @ expected)
            error = numpy.linalg.norm(CB - expected) / numpy.linalg.norm(B)
            assert error <= 1e-5, spectrum

    (warning,) = (
        each for each in read_json(tmp_path / "out" / MANIFEST)["warnings"] if "singular" in each
    )
    assert warning.startswith("1 modules have singular values of V that are as good as equal")
    assert f": {name(2)}; choose another --rank" in warning
    assert warning in " ".join(result.stderr.split())
