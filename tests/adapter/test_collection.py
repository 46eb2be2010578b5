"""Which adapters the values of `--adapter` name, and what each is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeproj.adapter.collection import Collection, Member, collect
from safeproj.errors import SafeprojError
from tests.support import CONFIG, FACTORS


def adapter(path: Path, *files: str) -> Path:
    """Make a directory of empty files; those of a PEFT adapter unless others are named."""
    path.mkdir(parents=True)
    for name in files or (CONFIG, FACTORS):
        (path / name).touch()
    return path


def sources(*paths: Path) -> list[str]:
    return [str(path) for path in paths]


def names(found: Collection) -> list[str]:
    return [member.name for member in found.members]


def listing(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines), "utf-8")
    return str(path)


# --- one


def test_one_adapter_is_one(tmp_path: Path) -> None:
    source = str(adapter(tmp_path / "alpha"))
    assert collect([source]) == Collection((Member(source, "alpha"),), many=False)


def test_what_is_not_there_is_one_too(tmp_path: Path) -> None:
    source = str(tmp_path / "missing")
    assert collect([source]) == Collection((Member(source, "missing"),), many=False)


def test_a_list_that_is_not_there_is_no_list(tmp_path: Path) -> None:
    source = str(tmp_path / "missing.txt")
    assert collect([source]) == Collection((Member(source, "missing.txt"),), many=False)


def test_a_directory_without_any_adapter_is_one(tmp_path: Path) -> None:
    (tmp_path / "runs" / "logs").mkdir(parents=True)
    (tmp_path / "runs" / "logs" / "train.log").touch()
    source = str(tmp_path / "runs")
    assert collect([source]) == Collection((Member(source, "runs"),), many=False)


@pytest.mark.parametrize("missing", [CONFIG, FACTORS])
def test_a_damaged_adapter_hides_none_inside(tmp_path: Path, missing: str) -> None:
    adapter(tmp_path / "alpha")
    (tmp_path / "alpha" / missing).unlink()
    adapter(tmp_path / "alpha" / "checkpoint-5")
    assert names(collect(sources(tmp_path / "alpha"))) == ["alpha"]


# --- several values


def test_several_values_are_many_in_the_given_order(tmp_path: Path) -> None:
    given = sources(*(adapter(tmp_path / name) for name in ("b", "c", "a")))
    found = collect(given)
    assert found == Collection(tuple(map(Member, given, ("b", "c", "a"))), many=True)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/name", "name"),
        ("org/name@main", "name"),
        ("org/name@refs/pr/1", "name"),
        ("missing/directory/", "directory"),
        ("@", "adapter"),
    ],
)
def test_names_of_what_is_no_local_path(source: str, name: str) -> None:
    found = collect([source, "org/other"])
    assert names(found) == [name, "other"]
    assert found.members[0].source == source


@pytest.mark.parametrize("file", [CONFIG, FACTORS, "adapter_model.bin", "adapters.safetensors"])
def test_a_file_that_stands_for_its_directory_has_its_name(tmp_path: Path, file: str) -> None:
    path = adapter(tmp_path / "alpha", file) / file
    assert names(collect(sources(path, tmp_path / "other"))) == ["alpha", "other"]


def test_a_gguf_file_has_its_own_name(tmp_path: Path) -> None:
    path = adapter(tmp_path / "alpha", "v1.5.gguf", "v2.gguf") / "v1.5.gguf"
    assert names(collect(sources(path, tmp_path / "other"))) == ["v1.5", "other"]


def test_names_of_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter(tmp_path / "alpha") / "sub").mkdir()
    adapter(tmp_path / "beta")
    monkeypatch.chdir(tmp_path / "alpha")
    assert names(collect([".", "../beta/"])) == ["alpha", "beta"]
    monkeypatch.chdir(tmp_path / "alpha" / "sub")
    assert names(collect(["..", "../../beta/."])) == ["alpha", "beta"]


def test_the_home_directory_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    adapter(tmp_path / "runs" / "alpha")
    listing(tmp_path / "list.txt", "~/runs")
    expected = (Member(str(tmp_path / "runs" / "alpha"), "alpha"),)
    assert collect(["~/runs"]).members == expected
    assert collect(["~/list.txt"]).members == expected


# --- directories


def test_a_directory_stands_for_the_adapters_below_it(tmp_path: Path) -> None:
    for name in ("step-10", "step-2", "b/final", "a/deep/er"):
        adapter(tmp_path / "runs" / name)
    found = collect(sources(tmp_path / "runs"))
    assert found.many
    assert names(found) == ["a/deep/er", "b/final", "step-2", "step-10"]
    for member in found.members:
        assert Path(member.source) == tmp_path / "runs" / member.name


def test_a_directory_of_one_is_many(tmp_path: Path) -> None:
    inner = adapter(tmp_path / "runs" / "alpha")
    found = collect(sources(tmp_path / "runs"))
    assert found == Collection((Member(str(inner), "alpha"),), many=True)


def test_checkpoints_inside_an_adapter_belong_to_it(tmp_path: Path) -> None:
    adapter(tmp_path / "runs" / "alpha")
    adapter(tmp_path / "runs" / "alpha" / "checkpoint-5")
    adapter(tmp_path / "runs" / "beta" / "checkpoint-5")
    assert names(collect(sources(tmp_path / "runs"))) == ["alpha", "beta/checkpoint-5"]


@pytest.mark.parametrize("hidden", [".cache", ".ipynb_checkpoints", ".alpha"])
def test_hidden_directories_are_passed_over(tmp_path: Path, hidden: str) -> None:
    adapter(tmp_path / "runs" / hidden / "alpha")
    adapter(tmp_path / "runs" / "deeper" / hidden)
    adapter(tmp_path / "runs" / "beta")
    assert names(collect(sources(tmp_path / "runs"))) == ["beta"]


def test_a_hidden_directory_that_is_named_is_meant(tmp_path: Path) -> None:
    adapter(tmp_path / ".runs" / "alpha")
    assert names(collect(sources(tmp_path / ".runs"))) == ["alpha"]


@pytest.mark.parametrize(
    "files",
    [
        (CONFIG,),
        (FACTORS,),
        ("adapter_model.bin",),
        ("adapters.safetensors",),
        ("adapters.npz",),
        ("0000100_adapters.safetensors",),
        ("lora.gguf",),
        (CONFIG, "one.gguf", "two.gguf"),
    ],
    ids=" ".join,
)
def test_what_makes_a_directory_an_adapter_even_if_damaged(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    adapter(tmp_path / "runs" / "alpha", *files)
    adapter(tmp_path / "runs" / "alpha" / "inside")
    assert names(collect(sources(tmp_path / "runs"))) == ["alpha"]


@pytest.mark.parametrize(
    "files", [("config.json", "model.safetensors"), ("pytorch_model.bin",), ("notes.md",)]
)
def test_other_directories_are_no_adapters(tmp_path: Path, files: tuple[str, ...]) -> None:
    adapter(tmp_path / "runs" / "model", *files)
    adapter(tmp_path / "runs" / "model" / "adapters" / "alpha")
    assert names(collect(sources(tmp_path / "runs"))) == ["model/adapters/alpha"]


def test_gguf_files_side_by_side_are_an_adapter_each(tmp_path: Path) -> None:
    adapter(tmp_path / "runs" / "gguf", "v10.gguf", "v2.gguf", "v1.5.gguf", "README.md")
    found = collect(sources(tmp_path / "runs"))
    assert names(found) == ["gguf/v1.5", "gguf/v2", "gguf/v10"]
    assert Path(found.members[0].source) == tmp_path / "runs" / "gguf" / "v1.5.gguf"
    assert names(collect(sources(tmp_path / "runs" / "gguf"))) == ["v1.5", "v2", "v10"]


def test_a_link_to_a_directory_is_followed_if_it_is_given(tmp_path: Path) -> None:
    adapter(tmp_path / "runs" / "alpha")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    found = collect(sources(tmp_path / "link"))
    assert found.members == (Member(str(tmp_path / "link" / "alpha"), "alpha"),)


def test_a_directory_of_links_to_adapters(tmp_path: Path) -> None:
    adapter(tmp_path / "elsewhere" / "step-100")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "alpha").symlink_to(tmp_path / "elsewhere" / "step-100")
    found = collect(sources(tmp_path / "runs"))
    assert found.members == (Member(str(tmp_path / "runs" / "alpha"), "alpha"),)


def test_a_link_that_is_given_keeps_its_name(tmp_path: Path) -> None:
    for run in ("one", "two"):
        adapter(tmp_path / run / "final")
        (tmp_path / f"adapter-{run}").symlink_to(tmp_path / run / "final")
    found = collect(sources(tmp_path / "adapter-one", tmp_path / "adapter-two"))
    assert names(found) == ["adapter-one", "adapter-two"]


# --- lists


def test_a_list_names_one_source_per_line(tmp_path: Path) -> None:
    alpha, beta = (adapter(tmp_path / name) for name in ("alpha", "beta"))
    path = listing(
        tmp_path / "list.txt", "# ours", "", f"  {beta}  ", "\t# theirs", "org/name@main", "   ",
        str(alpha),
    )  # fmt: skip
    found = collect([path])
    assert found.many
    assert found.members == (
        Member(str(beta), "beta"),
        Member("org/name@main", "name"),
        Member(str(alpha), "alpha"),
    )


def test_a_list_may_have_any_line_ends(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"# ours\r\norg/alpha\r\n\r\norg/beta")
    assert names(collect(sources(tmp_path / "list.txt"))) == ["alpha", "beta"]


def test_a_list_of_one_is_many(tmp_path: Path) -> None:
    found = collect([listing(tmp_path / "list.txt", "org/alpha")])
    assert found == Collection((Member("org/alpha", "alpha"),), many=True)


def test_lists_directories_and_adapters_together(tmp_path: Path) -> None:
    for name in ("runs/b", "runs/a", "alpha"):
        adapter(tmp_path / name)
    path = listing(tmp_path / "list.txt", str(tmp_path / "runs"), "org/name")
    assert names(collect([str(tmp_path / "alpha"), path])) == ["alpha", "a", "b", "name"]


def test_lines_are_relative_to_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path / "runs" / "alpha")
    (tmp_path / "lists").mkdir()
    path = listing(tmp_path / "lists" / "list.txt", "runs")
    monkeypatch.chdir(tmp_path)
    assert collect([path]).members == (Member(str(Path("runs", "alpha")), "alpha"),)


def test_a_directory_with_the_name_of_a_list_is_none(tmp_path: Path) -> None:
    adapter(tmp_path / "runs.txt" / "alpha")
    assert names(collect(sources(tmp_path / "runs.txt"))) == ["alpha"]


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n  \n#"], ids=ascii)
def test_an_empty_list_is_refused(tmp_path: Path, content: str) -> None:
    path = listing(tmp_path / "list.txt", content)
    with pytest.raises(SafeprojError, match="an empty list; expected the SRC") as caught:
        collect([path, str(adapter(tmp_path / "alpha"))])
    assert path in caught.value.message


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"org/name\n\xff\xfe\n")
    with pytest.raises(SafeprojError, match=r"list\.txt: .*expected a list of adapters") as caught:
        collect(sources(tmp_path / "list.txt"))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("line", ["org/na\x1b[31mme", "org/na\x00me", "org/\u202ename"])
def test_lines_that_could_steer_a_terminal_are_refused(tmp_path: Path, line: str) -> None:
    path = listing(tmp_path / "list.txt", "org/fine", line)
    with pytest.raises(SafeprojError, match="not printable") as caught:
        collect([path])
    assert path in caught.value.message
    assert caught.value.message.isprintable()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("org/alpha\n", "utf-8-sig")
    assert names(collect(sources(tmp_path / "list.txt"))) == ["alpha"]


# --- names that clash


def assert_clash(given: list[str], *words: str) -> None:
    with pytest.raises(SafeprojError) as caught:
        collect(given)
    message = caught.value.message
    assert message.startswith("--adapter: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_two_adapters_of_one_name_are_refused(tmp_path: Path) -> None:
    first, second = (str(adapter(tmp_path / run / "final")) for run in ("one", "two"))
    assert_clash([first, second], first, second, "both be written as final")
    path = listing(tmp_path / "list.txt", second, "org/other")
    assert_clash([first, path], first, second, "both be written as final")


def test_the_same_adapter_twice_is_refused(tmp_path: Path) -> None:
    source = str(adapter(tmp_path / "alpha"))
    assert_clash([source, source], source)
    assert_clash([source, str(tmp_path)], source)


def test_names_that_differ_in_case_alone_are_refused() -> None:
    assert_clash(["org/Alpha", "other/alpha"], "org/Alpha", "other/alpha")


def test_a_file_and_a_directory_of_one_name_are_refused(tmp_path: Path) -> None:
    adapter(tmp_path / "runs", "alpha.gguf", "beta.gguf")
    adapter(tmp_path / "runs" / "alpha")
    assert_clash(sources(tmp_path / "runs"), "alpha.gguf", "both be written as alpha")


@pytest.mark.parametrize("name", ["group", "GROUP"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_name_inside_anothers_place_is_refused(tmp_path: Path, name: str, swapped: bool) -> None:
    inner = adapter(tmp_path / "runs" / "group" / "deep" / "alpha")
    outer = str(adapter(tmp_path / "other" / name))
    given = [outer, str(tmp_path / "runs")]
    assert_clash(given[::-1] if swapped else given, str(inner), outer, "inside the place of")


def test_names_that_begin_alike_do_not_clash(tmp_path: Path) -> None:
    for name in ("group-2/alpha", "group/alpha"):
        adapter(tmp_path / "runs" / name)
    other = adapter(tmp_path / "other" / "grou")
    found = names(collect(sources(tmp_path / "runs", other)))
    assert sorted(found) == ["grou", "group-2/alpha", "group/alpha"]


def test_no_value_names_no_adapter() -> None:
    assert collect([]) == Collection((), many=False)


# --- what is read only


def test_one_adapter_named_twice_is_checked_once(tmp_path: Path) -> None:
    place = adapter(tmp_path / "alpha")
    given = sources(place / CONFIG, place / FACTORS, place)
    found = collect(given, written=False)
    assert found.members == (Member(given[0], "alpha"),)


def test_a_hidden_directory_is_looked_into(tmp_path: Path) -> None:
    adapter(tmp_path / ".hidden" / "beta")
    adapter(tmp_path / "alpha")
    assert names(collect([str(tmp_path)])) == ["alpha"]
    assert names(collect([str(tmp_path)], written=False)) == [".hidden/beta", "alpha"]


def test_adapters_of_one_name_are_told_apart_by_their_source(tmp_path: Path) -> None:
    given = sources(*(adapter(tmp_path / name / "final") for name in "ab"))
    other = str(adapter(tmp_path / "other"))
    found = collect([*given, other, "org/final", "org/final"], written=False)
    assert names(found) == [*given, "other", "org/final"]
