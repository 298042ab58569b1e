"""Packs of steerings: written, read from a zip, hostile ones refused, fetched from a hub; and the set that ships."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command import PROGRAM, ran, run, steering_for
from planted import random_steering
from tiny import build

from edge_steer import FormatError, SteeredLlama, SteerError, Steering, find_steerings
from edge_steer.preset import preset_names
from edge_steer.provenance import BaseModel
from edge_steer.registry import models_folder
from edge_steer.runtime.dials import named_steerings
from edge_steer.sharing import shipped
from edge_steer.sharing.card import MOST_CARD, MOST_STEERING
from edge_steer.sharing.pack import read_pack, write_pack
from edge_steer.sites import Site

BASE = BaseModel("llama", "Tiny", 4, 32, "ab" * 32)
SITES = tuple(Site(layer, "attn_norm") for layer in range(4))


def steering(name: str, base: BaseModel = BASE) -> Steering:
    return random_steering(base, SITES, seed=len(name), name=name).with_(angle=8, angle_min=-8, angle_max=9)


HAPPY, FORMAL = steering("happy"), steering("formal")


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    path = tmp_path / "tones.zip"
    write_pack([HAPPY, FORMAL], path, licence="MIT", results={"happy": {"effect": 1.5}})
    return path


# --- a pack and its card ----------------------------------------------------------------------------------------------


def test_a_pack_gives_back_the_steerings_that_went_in(pack: Path) -> None:
    for each in (HAPPY, FORMAL):
        (found,) = find_steerings(f"{pack}/{each.name}")
        assert found.fingerprint == each.fingerprint
        assert (found.name, found.angle, found.angle_max) == (each.name, each.angle, each.angle_max)


def test_a_pack_of_one_needs_no_name_and_of_several_does(pack: Path, tmp_path: Path) -> None:
    write_pack([HAPPY], tmp_path / "one.zip")
    assert find_steerings(tmp_path / "one.zip")[0].name == "happy"
    with pytest.raises(SteerError, match=r"tones.zip/NAME, got none; it holds happy, formal"):
        find_steerings(pack)
    with pytest.raises(SteerError, match=r"among happy, formal in .*, got 'sad'"):
        find_steerings(f"{pack}/sad")


def test_the_same_steerings_make_the_same_archive(pack: Path, tmp_path: Path) -> None:
    write_pack([HAPPY, FORMAL], tmp_path / "again.zip", licence="MIT", results={"happy": {"effect": 1.5}})
    one, other = (zipfile.ZipFile(each) for each in (pack, tmp_path / "again.zip"))
    with one, other:
        assert [(each.filename, each.CRC) for each in one.infolist() if each.filename != "README.md"] == [
            (each.filename, each.CRC) for each in other.infolist() if each.filename != "README.md"
        ]


def test_the_card_and_the_readme_tell_model_range_licence_and_results(pack: Path) -> None:
    with zipfile.ZipFile(pack) as archive:
        card, text = json.loads(archive.read("card.json")), archive.read("README.md").decode()
        data = archive.read("happy.gguf")
    assert card["model"] == {
        "architecture": "llama", "name": "Tiny", "block_count": 4, "embedding_length": 32,
        "tokenizer_sha256": "ab" * 32,
    }  # fmt: skip
    first = card["steerings"][0]
    assert (first["name"], first["size"], first["sha256"]) == ("happy", len(data), hashlib.sha256(data).hexdigest())
    assert (first["angle_min"], first["angle_max"], first["results"]) == (-8, 9, {"effect": 1.5})
    assert card["licence"] == "MIT"
    for wanted in ("Tiny", "-8 … 9", "Licence: MIT", "effect", "hub:USER/REPO/happy"):
        assert wanted in text


def test_a_folder_pack_holds_plain_steering_files(tmp_path: Path) -> None:
    write_pack([HAPPY, FORMAL], tmp_path / "tones")
    assert sorted(each.name for each in (tmp_path / "tones").iterdir()) == [
        "README.md", "card.json", "formal.gguf", "happy.gguf",
    ]  # fmt: skip
    assert Steering.load(tmp_path / "tones" / "happy.gguf").fingerprint == HAPPY.fingerprint


@pytest.mark.parametrize(
    ("steerings", "results", "says"),
    [
        ([], {}, "at least one"),
        ([HAPPY, HAPPY], {}, "different names"),
        ([HAPPY, steering("HAPPY")], {}, "different names"),
        ([steering("../x")], {}, "letters, digits"),
        ([steering("a b")], {}, "letters, digits"),
        ([HAPPY, steering("sad", BaseModel("llama", "Other", 4, 32))], {}, "for one model"),
        ([HAPPY], {"sad": 1}, "results for happy"),
    ],
)
def test_what_makes_no_pack_is_refused(
    tmp_path: Path, steerings: list[Steering], results: dict[str, Any], says: str
) -> None:
    with pytest.raises(SteerError, match=says):
        write_pack(steerings, tmp_path / "p.zip", results=results)
    assert list(tmp_path.iterdir()) == []


# --- hostile packs ----------------------------------------------------------------------------------------------------


def members(pack: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(pack) as archive:
        return {each.filename: archive.read(each) for each in archive.infolist()}


def rewritten(pack: Path, **changes: Any) -> Path:
    """The pack with its card changed: keys of the card, or of its first entry."""
    found = members(pack)
    card = json.loads(found["card.json"])
    for key, value in changes.items():
        (card if key in card else card["model"] if key in card["model"] else card["steerings"][0])[key] = value
    return archived(pack, {**found, "card.json": json.dumps(card).encode()})


def archived(pack: Path, contents: dict[str, bytes]) -> Path:
    path = pack.with_name("hostile.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format 1, got 2; update"),
        ({"model": None}, "a model and"),
        ({"steerings": []}, "1 to 256 steerings"),
        ({"steerings": "all"}, "1 to 256 steerings"),
        ({"steerings": [None]}, "a name of letters"),
        ({"name": 3}, "the model's name"),
        ({"name": "a\nb"}, "the model's name"),
        ({"block_count": True}, "block_count"),
        ({"tokenizer_sha256": []}, "tokenizer_sha256"),
        ({"size": -1}, "a size of at most"),
        ({"size": MOST_STEERING + 1}, "a size of at most"),
        ({"size": 10}, "at most 10 bytes"),
        ({"size": 100_000}, "as its card says, got"),
        ({"sha256": "0" * 64}, "as its card says, got sha256"),
        ({"sha256": "x"}, "expected a sha256"),
        ({"architecture": "qwen2"}, "as the card says"),
    ],
)
def test_a_card_that_is_none_or_lies_is_refused(pack: Path, changes: dict[str, Any], says: str) -> None:
    refused(rewritten(pack, **changes), says)


def refused(path: Path, says: str) -> None:
    with pytest.raises(FormatError) as caught:
        find_steerings(f"{path}/happy")
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name", ["../happy", "/etc/passwd", "a/b", "..", "", "C:x", "happy.gguf", "x" * 65, "a\u0000b"]
)
def test_a_name_that_leads_out_of_the_pack_is_refused(pack: Path, tmp_path: Path, name: str) -> None:
    found = members(pack)
    card = json.loads(found["card.json"])
    card["steerings"][0]["name"] = name
    path = archived(
        pack, {"card.json": json.dumps(card).encode(), f"{name}.gguf".replace("\0", ""): found["happy.gguf"]}
    )
    before = sorted(tmp_path.rglob("*"))
    refused(path, "a name of letters")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_that_is_no_steering_is_refused_by_its_place_in_the_pack(pack: Path) -> None:
    data = b"GGUF" + bytes(60)
    hashed = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path = rewritten(pack, **hashed)
    path = archived(pack, {**members(path), "happy.gguf": data})
    refused(path, "hostile.zip/happy.gguf")


def test_another_steering_under_the_name_is_refused(pack: Path) -> None:
    data = members(pack)["formal.gguf"]
    path = rewritten(pack, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    refused(archived(pack, {**members(path), "happy.gguf": data}), "got 'formal'")


def test_a_bomb_is_not_unpacked(pack: Path) -> None:
    """A card that says that it is too large, and one that is and does not say so."""
    big = archived(pack, {**members(pack), "card.json": b" " * (MOST_CARD + 1)})
    refused(big, "card.json of at most")
    lying = archived(pack, {**members(pack), "card.json": b" " * (8 * MOST_CARD)})
    data = bytearray(lying.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature)
        while data[at:].find(b"card.json") > 100:
            at = data.index(signature, at + 1)
        data[at + offset : at + offset + 4] = struct.pack("<I", 100)
    lying.write_bytes(data)
    refused(lying, "expected")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: b"", "a pack made by"),
        (lambda data: b"PK" + bytes(100), "a pack made by"),
        (lambda data: data[:-30], "a pack made by"),
        (lambda data: data[: len(data) // 2] + data[len(data) // 2 + 1 :], "expected"),
        (lambda data: data[:-22] + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 4, 4, 1 << 19, 0, 0), "too long"),
        (lambda data: data[:-22] + b"PK\6\7" + bytes(16) + data[-22:], "too long"),
        (lambda data: data.replace(b"card.json", b"cart.json"), "card.json in the pack, got none"),
    ],
)
def test_an_archive_that_is_broken_is_refused(pack: Path, spoil: Callable[[bytes], bytes], says: str) -> None:
    path = pack.with_name("broken.zip")
    path.write_bytes(spoil(pack.read_bytes()))
    refused(path, says)


def test_every_flipped_byte_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "one.zip"
    write_pack([HAPPY], path)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :])
        with suppress(SteerError):
            assert read_pack(path, "happy")[0].fingerprint == HAPPY.fingerprint


def test_a_card_twice_is_refused(pack: Path) -> None:
    path = pack.with_name("twice.zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("card.json", b"{}")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("card.json", b"{}")
    refused(path, "got 2")


# --- the hub ----------------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """A hub of this machine: files by `repo@revision/name`. asked: what was asked for, in order."""

    files: dict[str, bytes] = field(default_factory=dict)
    claimed: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def put(self, folder: Path, repo: str, revision: str = "main") -> None:
        self.files |= {f"{repo}@{revision}/{each.name}": each.read_bytes() for each in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            repo, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            made.asked.append(f"{self.command} {name}")
            data = made.files.get(f"{repo}@{revision}/{name}")
            if data is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if repo == "user/tones" else "RepoNotFound")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(made.claimed.get(name, len(data))))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", hashlib.sha1(revision.encode()).hexdigest())
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        made.address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    write_pack([HAPPY, FORMAL], tmp_path / "tones")
    made.put(tmp_path / "tones", "user/tones")
    yield made
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("address", ["hub:user/tones/happy", "hub:user/tones@main/happy"])
def test_a_steering_of_the_hub_is_fetched_and_checked(hub: Hub, address: str) -> None:
    (found,) = find_steerings(address)
    assert found.fingerprint == HAPPY.fingerprint
    assert not any("formal" in each for each in hub.asked)


def test_a_revision_is_that_revision(hub: Hub, tmp_path: Path) -> None:
    write_pack([steering("other")], tmp_path / "old")
    hub.put(tmp_path / "old", "user/tones", "v1")
    assert find_steerings("hub:user/tones@v1")[0].name == "other"
    with pytest.raises(SteerError, match="hub:user/tones/NAME, got none; it holds happy, formal"):
        find_steerings("hub:user/tones")


def test_what_was_fetched_once_serves_without_a_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    find_steerings("hub:user/tones/happy")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    asked = len(hub.asked)
    assert find_steerings("hub:user/tones/happy")[0].fingerprint == HAPPY.fingerprint
    assert len(hub.asked) == asked
    with pytest.raises(SteerError, match="got no connection"):
        find_steerings("hub:user/tones/formal")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("hub:user/none/happy", "got not found"),
        ("hub:user/tones@v9/happy", "got not found"),
        ("hub:user/tones/sad", "among happy, formal"),
        ("hub:user", "hub:USER/REPO/NAME"),
        ("hub:user/tones/happy/more", "hub:USER/REPO/NAME"),
        ("hub:user/tones/../../etc", "hub:USER/REPO/NAME"),
        ("hub:../tones/happy", "hub:USER/REPO/NAME"),
        ("hub:http://x/y/z", "hub:USER/REPO/NAME"),
    ],
)
def test_what_is_not_on_the_hub_is_one_line(hub: Hub, address: str, says: str) -> None:
    with pytest.raises(SteerError, match=says) as caught:
        find_steerings(address)
    assert "\n" not in str(caught.value)


def test_a_file_larger_than_its_card_says_is_not_fetched(hub: Hub) -> None:
    hub.files["user/tones@main/happy.gguf"] += bytes(100_000)
    with pytest.raises(FormatError, match="expected at most"):
        find_steerings("hub:user/tones/happy")
    assert "GET happy.gguf" not in hub.asked
    hub.claimed["card.json"] = MOST_CARD + 1
    with pytest.raises(FormatError, match="expected at most"):
        find_steerings("hub:user/tones/formal")
    assert hub.asked.count("GET card.json") == 1


def test_a_file_other_than_its_card_says_is_refused(hub: Hub) -> None:
    file = "user/tones@main/happy.gguf"
    hub.files[file] = hub.files[file][:-1] + b"x"
    with pytest.raises(FormatError, match="as its card says, got sha256"):
        find_steerings("hub:user/tones/happy")


def test_the_program_takes_its_hub_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    found = subprocess.run(
        [*PROGRAM, "combine", "0.5*x", "-s", "x=hub:user/tones/happy", "-o", tmp_path / "h.gguf"],
        env={**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert Steering.load(tmp_path / "h.gguf").angle == pytest.approx(4)


# --- the set that ships -----------------------------------------------------------------------------------------------


MODELS = ("gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "smollm2-135m")


def test_a_set_ships_for_four_models_and_every_file_is_what_its_card_says() -> None:
    assert tuple(shipped.shipped_packs()) == MODELS
    total = 0
    for model, card in shipped.shipped_packs().items():
        folder = models_folder() / "steerings" / model
        assert {each.name for each in folder.iterdir()} == {"README.md", "card.json", *(e.file for e in card.entries)}
        assert set(shipped.shipped_names(model)) <= set(preset_names())
        for entry in card.entries:
            data = (folder / entry.file).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256)
            found = Steering.load(folder / entry.file)
            assert (found.name, found.base) == (entry.name, card.base)
            assert found.angle_min < 0 < found.angle_max
            total += len(data)
    assert total < 6e6


@pytest.mark.parametrize("model", MODELS)
def test_a_name_alone_is_the_measured_steering_of_the_model(model: str) -> None:
    (found,), dials = named_steerings(["sentiment"], model=model)
    assert found.base == shipped.shipped_packs()[model].base
    assert dials == {"sentiment": found.angle_max}
    assert named_steerings(["sentiment:-1"], model=model)[1] == {"sentiment": -1}


def test_the_models_file_by_any_name_is_the_model(smollm2: Path, tmp_path: Path) -> None:
    link = tmp_path / "renamed.gguf"
    link.symlink_to(smollm2)
    assert (
        find_steerings("sentiment", link)[0].fingerprint == find_steerings("sentiment", "smollm2-135m")[0].fingerprint
    )


def test_a_file_of_the_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    HAPPY.save("sentiment.gguf")
    assert find_steerings("sentiment", "smollm2-135m")[0].name == "happy"
    FORMAL.save("sentiment")
    assert find_steerings("sentiment", "smollm2-135m")[0].name == "formal"


def test_a_model_without_a_set_is_told_which_have_one(tmp_path: Path) -> None:
    tiny = build("llama", tmp_path / "tiny").gguf_path
    for model, says in (
        (tiny, "they are for gemma3-270m"), ("llama3.2-1b", "they are for gemma3-270m"), ("smollm2-135m", "there are"),
    ):  # fmt: skip
        with pytest.raises(SteerError, match=says):
            find_steerings("nosuch", model)
    with pytest.raises(SteerError, match="no such file"):
        find_steerings("sentiment")


def test_what_ships_is_listed_by_model_and_by_preset() -> None:
    listed = {each["name"]: each["steerings"] for each in json.loads(ran("models", "--json").stdout)}
    assert "sentiment" in listed["smollm2-135m"]
    assert listed["llama3.2-1b"] == []
    rows = {row["name"]: row for row in json.loads(ran("presets", "--json").stdout)}
    assert rows["sentiment"]["measured"] == list(MODELS)
    assert "measured for gemma3-270m" in ran("presets", "sentiment").stdout


def test_the_shipped_steering_moves_the_model_as_its_ends_say(smollm2: Path) -> None:
    happy = find_steerings("sentiment", smollm2)
    llm = SteeredLlama(smollm2, steering=happy, n_ctx=256, n_threads=1, n_threads_batch=1)
    tokens = llm.chat_tokens([{"role": "user", "content": "How do you feel?"}])
    answers = [llm.text_tokens(text) for text in ("I feel happy", "I feel sad")]

    def gap(dial: float | None) -> float:
        llm.angle = dial
        happy, sad = (llm.logits([*tokens, *each], len(tokens)) for each in answers)
        return float(happy[-1][answers[0][-1]] - sad[-1][answers[1][-1]])

    assert gap(happy[0].angle_min) < gap(None) < gap(happy[0].angle_max)
    llm.close()


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_packs_files_and_folders_and_the_pack_steers(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "tiny").gguf_path
    (tmp_path / "set").mkdir()
    for name in ("one", "two"):
        steering_for(model, name=name, seed=len(name)).with_(angle=20).save(tmp_path / "set" / f"{name}.gguf")
    (tmp_path / "results.json").write_text('{"one": {"effect": 2}}')
    out = tmp_path / "p.zip"
    made = ran("pack", tmp_path / "set", "--licence", "MIT", "--results", tmp_path / "results.json", "-o", out)
    assert made.stdout.strip() == str(out)
    answers = [
        ran("generate", "-m", model, *given, "-n", 4, "--json", "Hi").stdout
        for given in ((), ("-s", f"{out}/one"), ("-s", tmp_path / "set" / "one.gguf"), ("-s", f"{out}/one:40"))
    ]
    angles = [json.loads(each)["angle"] for each in answers]
    assert angles == [None, 20, 20, 40]
    assert json.loads(answers[1])["text"] == json.loads(answers[2])["text"]
    assert "one" in ran("inspect", f"{out}/one").stdout
    ran("pack", tmp_path / "set" / "one.gguf", "-o", tmp_path / "folder")
    assert (tmp_path / "folder" / "card.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("happy.gguf -o tones.zip", "exists"),
        ("happy.gguf -o set", "exists"),
        ("set/formal.gguf -o set --force", "holds what is read"),
        ("gone.gguf -o new.zip", "gone.gguf"),
        ("empty -o new.zip", "got no .gguf"),
        ("happy.gguf --results happy.gguf -o new.zip", "expected JSON"),
        ("happy.gguf happy.gguf -o new.zip", "different names"),
    ],
)
def test_a_mistake_in_the_verb_is_one_line(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    HAPPY.save("happy.gguf")
    write_pack([FORMAL], Path("set"))
    Path("empty").mkdir()
    found = run("pack", *arguments.split())
    assert found.exit_code == 1
    assert says in found.stderr
    assert found.stderr.count("\n") == 1
    assert not Path("new.zip").exists()
    assert Path("set/formal.gguf").is_file()
