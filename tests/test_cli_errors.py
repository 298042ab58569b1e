"""What a user, a disk or a key press does to the program ends in one line and the right exit code; nothing is left."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import ONE_THREAD, PROGRAM, process, run, steering_for

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, whole and broken, and steerings."""
    folder = tmp_path_factory.mktemp("place")
    whole = tiny.build("llama", folder).gguf_path.read_bytes()
    tiny.build("gemma3", folder)
    (folder / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "head.gguf").write_bytes(whole[:300])
    (folder / "renamed.gguf").write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight"))
    (folder / "template.gguf").write_bytes(whole.replace(b"{% endfor %}", b"{% endxxx %}"))
    (folder / "empty.gguf").write_bytes(b"")
    (folder / "folder").mkdir()
    for name in ("one", "two"):
        steering_for(folder / "llama.gguf", name=name).save(folder / f"{name}.gguf")
    (folder / "p.txt").write_text("yes\n")
    (folder / "bad.txt").write_bytes(b"yes\n\xff\n")
    return folder


GENERATE = "generate -p Hi --threads 1 -m "
CALIBRATE = "calibrate --preset sentiment --threads 1 -m llama.gguf -o "


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (GENERATE + "none.gguf", 1, "no such file"),
        (GENERATE + "folder", 1, "folder"),
        (GENERATE + "smollm2-136m", 1, "did you mean smollm2-135m"),
        (GENERATE + "cut.gguf", 1, "cut short"),
        (GENERATE + "head.gguf", 1, "head.gguf"),
        (GENERATE + "empty.gguf", 1, "empty.gguf"),
        (GENERATE + "p.txt", 1, "GGUF"),
        (GENERATE + "renamed.gguf", 1, "expected a model that llama.cpp loads"),
        (GENERATE + "template.gguf", 1, "endxxx"),
        (GENERATE + "one.gguf", 1, "got a steering file"),
        (GENERATE + "llama.gguf --ctx 9999", 1, "at most 512"),
        (GENERATE + "llama.gguf -s none.gguf:3", 1, "No such file"),
        (GENERATE + "llama.gguf -s llama.gguf:3", 1, "holds no steering"),
        (GENERATE + "llama.gguf -s one.gguf", 1, "no default angle"),
        (GENERATE + "llama.gguf -s one.gguf --strength 0.5", 1, "sweep --write"),
        (GENERATE + "llama.gguf -s one.gguf --strength nan", 2, "finite"),
        (GENERATE + "llama.gguf --temperature nan", 2, "finite"),
        (GENERATE + "llama.gguf --temperature inf", 2, "finite"),
        (GENERATE + "llama.gguf --top-p nan", 2, "finite"),
        (GENERATE + "llama.gguf --min-p nan", 2, "finite"),
        (GENERATE + "llama.gguf --repeat-penalty nan", 2, "finite"),
        (GENERATE + "llama.gguf --repeat-penalty 0", 2, "x>0"),
        (GENERATE + "llama.gguf --threads 513", 2, "<=512"),
        (GENERATE + "llama.gguf --seed 99999999999999", 2, "<=4294967294"),
        (GENERATE + "llama.gguf --top-k 99999999999999", 2, "<=2147483647"),
        (GENERATE + "llama.gguf --gpu-layers 99999999999999", 2, "<=2147483647"),
        (GENERATE + "llama.gguf -s one.gguf --strength 2", 2, "-1<=x<=1"),
        (GENERATE + "llama.gguf -s one.gguf --angle nan", 1, "finite"),
        (GENERATE + "llama.gguf -s one.gguf --angle x", 2, "float"),
        (GENERATE + "llama.gguf -s one.gguf --angle 3 --strength 1", 2, "got both"),
        ("chat --threads 1 -m llama.gguf --system=", 1, "got a blank"),
        ("chat --threads 1 -m llama.gguf --system=\udcff", 1, "surrogate"),
        (GENERATE + "llama.gguf -s one.gguf:1 -s two.gguf:2 --angle 3", 1, "for one steering"),
        (GENERATE + "llama.gguf -s one.gguf:1 -s one.gguf:2", 1, "two steerings"),
        (GENERATE + "llama.gguf --angle 3", 2, "-s FILE"),
        (GENERATE + "llama.gguf --scope some", 2, "response"),
        (GENERATE + "gemma3.gguf -s one.gguf:3", 1, "is llama, the model's is gemma3"),
        (CALIBRATE + "folder", 1, "folder"),
        (CALIBRATE + "one.gguf", 1, "--force"),
        (CALIBRATE + "/dev/null --force", 1, "device"),
        (CALIBRATE + "none/x.gguf", 1, "missing or not writable"),
        (CALIBRATE + "x.gguf --preset none", 1, "expected a preset among"),
        (CALIBRATE + "x.gguf --sites none", 1, "attn_norm"),
        (CALIBRATE + "x.gguf --positive p.txt", 2, "--preset"),
        ("calibrate -m llama.gguf -o x.gguf", 2, "--preset"),
        ("calibrate -m llama.gguf -o x.gguf --positive p.txt", 2, "--negative"),
        ("calibrate -m llama.gguf -o x.gguf --positive p.txt --negative bad.txt", 1, "bad.txt:2"),
        ("calibrate -m llama.gguf -o x.gguf --positive p.txt --negative p.txt", 1, "the same"),
        ("inspect none.gguf", 1, "No such file"),
        ("inspect folder", 1, "folder"),
        ("inspect head.gguf", 1, "head.gguf"),
        ("inspect one.gguf --plot none/x.png", 1, "missing or not writable"),
        ("doctor -m cut.gguf", 1, "cut short"),
        ("presets none", 1, "expected a preset among"),
        ("models fetch none", 1, "known models"),
        ("bogus", 2, "bogus"),
    ],
)
def test_a_mistake_ends_in_one_line(
    place: Path,
    arguments: str,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    found = run(*arguments.split())
    assert found.exit_code == code
    assert not found.stdout
    *usage, line = found.stderr.splitlines()
    assert line.startswith("Error: ")
    assert says in line
    assert all(each.startswith(("Usage:", "Try")) or not each for each in usage) if code == 2 else not usage
    assert "".join(capfd.readouterr()) == ""  # llama.cpp's own lines do not come through
    assert sorted(place.rglob("*")) == before


def test_a_prompt_that_is_no_text_is_refused(place: Path) -> None:
    for given in (b"", b" \n", b"\xff"):
        found = process("generate", "-m", place / "llama.gguf", "-p", "-", input=given)
        assert (found.returncode, found.stdout) == (1, b"")
        assert found.stderr.startswith(b"Error: expected ")
        assert found.stderr.count(b"\n") == 1
    assert (
        process("generate", "-m", place / "llama.gguf", "-p", b"\xff".decode(errors="surrogateescape")).returncode == 1
    )


def test_a_model_that_fails_an_assertion_of_llama_cpp_is_one_line(place: Path, tmp_path: Path) -> None:
    twice = (place / "llama.gguf").read_bytes().replace(b"<|unused1|>", b"<|unused0|>")
    (tmp_path / "twice.gguf").write_bytes(twice)
    found = process("generate", "-m", tmp_path / "twice.gguf", "-p", "Hi", *ONE_THREAD)
    assert (found.returncode, found.stdout) == (1, b"")
    assert found.stderr.startswith(b"Error: llama.cpp stopped: ")
    assert found.stderr.count(b"\n") == 1


def test_pipes_hold_utf_8_whatever_the_locale_is(place: Path, tmp_path: Path) -> None:
    """Windows reads and writes pipes in a code page of its own; here PYTHONIOENCODING stands for it."""
    said = "\u4f60\u597d, \u00e9\u00e9n \U0001f600"
    lines = f"{said}\n/save {tmp_path / 'chat.json'}\n".encode()
    answers = {}
    for encoding in ("cp1252", "utf-8"):
        (tmp_path / "chat.json").unlink(missing_ok=True)
        answers[encoding] = subprocess.run(
            [*PROGRAM, "chat", "-m", place / "llama.gguf", "--max-tokens", "20", *ONE_THREAD],
            input=lines, stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONIOENCODING": encoding},
        ).stdout  # fmt: skip
        assert json.loads((tmp_path / "chat.json").read_text("utf-8"))["messages"][0]["content"] == said
    assert answers["cp1252"] == answers["utf-8"] != b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", ["--help", "inspect one.gguf", "inspect one.gguf --json", "presets", "models",
                                       "generate -p Hi -m llama.gguf --threads 1 --max-tokens 4"])  # fmt: skip
def test_a_full_disk_behind_stdout_is_one_line(place: Path, arguments: str) -> None:
    with open("/dev/full", "wb") as full:
        found = process(*arguments.split(), stdout=full, cwd=place)
    assert found.returncode == 1
    assert found.stderr == b"Error: No space left on device\n"


def test_a_reader_that_leaves_is_no_error_to_read_about(place: Path) -> None:
    shell = f"'{PROGRAM[0]}' -m edge_steer presets refusal --json | true; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", shell], stderr=subprocess.PIPE, check=False)
    assert found.returncode in (0, 1)
    assert not found.stderr


def test_no_standard_output_is_no_traceback(place: Path) -> None:
    shell = f"'{PROGRAM[0]}' -m edge_steer inspect '{place / 'one.gguf'}' >&-"
    found = subprocess.run(["bash", "-c", shell], stderr=subprocess.PIPE, check=False)
    assert (found.returncode, found.stderr) == (0, b"")


# --- keys -----------------------------------------------------------------------------------------------------------


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process, self.master, self.seen = process, master, b""

    def until(self, text: bytes, seconds: float = 240) -> bytes:
        """What is shown up to and with `text`, from where the last call ended."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            if not select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"waited for {text!r}, saw {self.seen!r}")
            try:
                self.seen += os.read(self.master, 4096)
            except OSError:
                raise AssertionError(f"the program ended before {text!r}, after {self.seen!r}") from None
        head, _, self.seen = self.seen.partition(text)
        return head + text

    def type(self, text: bytes) -> None:
        os.write(self.master, text)


@contextmanager
def terminal(*arguments: object) -> Iterator[Terminal]:
    """`edge-steer ARGUMENTS` at a terminal."""
    master, slave = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*PROGRAM, *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_ctrl_c_stops_an_answer_and_not_the_chat(smollm2: Path) -> None:
    with terminal("chat", "-m", smollm2, "--max-tokens", 400, "--ctx", 512, *ONE_THREAD) as screen:
        screen.until(b"> ")
        screen.type(b"Tell me a long story about a whale.\n")
        screen.until(b"whale.\r\n")
        screen.until(b" ")  # a first word is there
        screen.type(b"\x03")
        screen.until(b"stopped\r\n")
        screen.until(b"> ")
        time.sleep(1)  # Python notices a signal once it waits for a key, not while it draws the prompt
        screen.type(b"\x03")
        screen.until(b"/quit leaves")
        screen.until(b"> ")
        screen.type(b"Hello\n")
        screen.until(b"Hello\r\n")
        screen.until(b"> ")
        screen.type(b"\x04")
        assert screen.process.wait(60) == 0


def test_ctrl_c_during_a_calibration_leaves_nothing_behind(place: Path, tmp_path: Path) -> None:
    for side in ("love", "hate"):
        prompts = [f"I {side} number {number}, {'as I said, ' * 15}" for number in range(3000)]
        (tmp_path / f"{side}.txt").write_text("\n".join(prompts))
    with terminal("calibrate", "-m", place / "llama.gguf", "--positive", tmp_path / "love.txt", "--negative",
                  tmp_path / "hate.txt", "-o", tmp_path / "x.gguf", "--ctx", 512, *ONE_THREAD) as screen:  # fmt: skip
        screen.until(b"/5984")
        screen.process.send_signal(signal.SIGINT)
        assert b"Traceback" not in screen.until(b"Error: interrupted")
        assert screen.process.wait(60) == 130
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hate.txt", "love.txt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_program_ended_from_outside_takes_its_half_written_files_along(tmp_path: Path, number: int) -> None:
    shell = (
        "import click, time; from pathlib import Path\n"
        "from edge_steer.cli import main; from edge_steer.whole_file import whole_file\n"
        "@click.command()\n"
        "def wait():\n"
        "    with whole_file(Path('out')) as part:\n"
        "        part.write_text('half'); print('begun', flush=True); time.sleep(60)\n"
        "main.Verbs.get_command = lambda *_: wait\n"
        "main.main(['presets'])"
    )
    process = subprocess.Popen([PROGRAM[0], "-c", shell], cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    assert list(tmp_path.iterdir())
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert not list(tmp_path.iterdir())


def test_the_dial_stands_in_the_prompt_of_a_terminal(place: Path) -> None:
    with terminal("chat", "-m", place / "llama.gguf", "-s", f"{place / 'one.gguf'}:8", *ONE_THREAD) as screen:
        screen.until(b"one +8> ")
        screen.type(b"/angle -3\n")
        screen.until(b"one -3> ")
        screen.type(b"/quit\n")
        assert screen.process.wait(60) == 0
