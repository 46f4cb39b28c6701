"""``ara chat`` as a script that pipes its lines, and as a person at a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ara.printable import printable
from ara_cli.console import Console
from export import answering
from tests.commands import ara, done, refused

NAME = "energy-0.70"
REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = ("--max-new-tokens", 6, "--device", "cpu")
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A checkpoint folder that may be changed."""
    return Path(shutil.copytree(finished / "truncate" / NAME / "checkpoint", tmp_path / "checkpoint"))


def piped(folder: Path, lines: str, *words: Any) -> Any:
    return ara("chat", "--source", folder, *SHORT, *words, piped=lines.encode())


def test_every_line_is_answered_with_what_was_said_before(finished: Path, folder: Path) -> None:
    found = ara("chat", "-w", finished, *SHORT, "--json", piped=b"hello\n\n  again \n/clear\nhello\n/exit\nnever\n")
    document = json.loads(found.stdout)
    assert document["backend"] == "torch" and document["seed"] is None
    first, second, third = document["turns"]
    assert [turn["prompt"] for turn in document["turns"]] == ["hello", "again", "hello"]
    assert first == third and not any(turn["empty"] for turn in document["turns"])
    assert first["answer"] == json.loads(done("generate", "hello", "-w", finished, *SHORT, "--json").stdout)["answer"]
    alone = json.loads(piped(folder, "again\n", "--json").stdout)["turns"]
    assert second["answer"] != alone[0]["answer"]
    spoken = piped(folder, "hello\nagain\n", "-q")
    assert spoken.stdout == printable(first["answer"] + "\n" + second["answer"] + "\n") and spoken.stderr == ""


def test_a_script_ends_with_the_first_line_that_cannot_be_answered(folder: Path) -> None:
    for lines, code, words in (
        ("/clea\nhi\n", 2, "the chat has no command /clea"),
        ("x" * 300 + "\nhi\n", 2, "are more than the 256 positions of the model"),
        ("a\0b\n", 2, "the prompt holds a NUL character"),
    ):
        refused(piped(folder, lines, "-q"), code, words)
    result = ara("chat", "--source", folder, *SHORT, "-q", piped=b"caf\xe9\n")
    refused(result, 2, "the prompt is not UTF-8: byte 4")
    # A path or a message about a command is a message.
    document = json.loads(piped(folder, "/usr/bin is what?\n /clear\n", "--json").stdout)
    assert [turn["prompt"] for turn in document["turns"]] == ["/usr/bin is what?", "/clear"]


def test_what_a_chat_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "chat_template.jinja").unlink()
    refused(piped(folder, "hi\n", "-q"), 2, "the model has no chat template, which a chat needs", "ara generate")
    monkeypatch.setattr(sys, "stdin", None)
    found = ara("chat", "--source", folder / "none", *SHORT)
    assert found.exit_code == 1 and "does not exist" in found.stderr


def test_nothing_said_is_no_error(folder: Path) -> None:
    assert json.loads(piped(folder, "", "--json").stdout) == {"turns": [], "backend": "torch", "seed": None}


def test_what_is_said_about_an_answer(folder: Path) -> None:
    assert "cut off after 6 tokens: --max-new-tokens" in piped(folder, "hi\n").stderr
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": list(range(260))}))
    silent = piped(folder, "hi\n", "-q")
    assert silent.stdout == "\n" and silent.stderr.startswith("warning: the answer is empty: the model ended its turn")


# -- at a terminal --------------------------------------------------------------------------------------------------


@pytest.fixture
def dialogue(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that lets somebody type: texts, or exceptions as keys of the terminal raise them."""

    def type_in(*typed: str | type[BaseException]) -> None:
        lines = iter(typed)

        def ask(self: Console, prompt: str) -> str:
            line = next(lines, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(Console, "ask", ask)
        monkeypatch.setattr(Console, "is_dialogue", True)

    return type_in


def test_a_dialogue_goes_on_after_an_error(folder: Path, dialogue: Any) -> None:
    expected = piped(folder, "hello\n").stdout.strip("\n")
    dialogue("/nothing", "x" * 300, "/help", KeyboardInterrupt, "hello")
    found = ara("chat", "--source", folder, *SHORT)
    assert found.exit_code == 0, found.output
    assert found.stderr.count("error: ") == 2 and "the chat has no command /nothing" in found.stderr
    assert "positions of the model" in found.stderr and "/clear   forget the conversation" in found.stderr
    assert "Ctrl+D or /exit ends the chat" in found.stderr
    assert found.stdout.strip("\n") == expected != ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_ctrl_c_stops_an_answer_and_not_the_chat(
    folder: Path,
    dialogue: Any,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    error: type[BaseException],
) -> None:
    """Also where C code makes another exception of it. What came of the answer is part of the history."""
    pieces = []
    stream = Console.stream

    def stopping(self: Console, piece: str) -> None:
        stream(self, piece)
        if piece.strip():
            pieces.append(piece)
        if len(pieces) == 2:
            pieces.append("")
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                raise error from None

    shown: list[list[str]] = []
    chat_ids = answering.chat_ids

    def noting(tokenizer: Any, messages: Any) -> Any:
        shown.append([message["content"] for message in messages])
        return chat_ids(tokenizer, messages)

    monkeypatch.setattr(answering, "chat_ids", noting)
    monkeypatch.setattr(Console, "stream", stopping)
    dialogue("hello", "again")
    # In the background, where Ctrl+C is ignored, Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    found = ara("chat", "--source", folder, *SHORT)
    assert found.exit_code == 0, found.output
    assert shown[-1][0] == "hello" and shown[-1][2] == "again"
    assert shown[-1][1].strip() == "".join(pieces[:2]).strip() != ""
    assert "error" not in found.stderr


def _take_the_terminal() -> None:
    """Make Ctrl+C a signal to this process, also if the tests run in the background, where it is ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def terminal(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Return a chat in a terminal of its own, and the descriptor of its keyboard and screen."""
    keyboard, screen = pty.openpty()
    words = ["chat", "--source", str(folder), *map(str, SHORT), "-q"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ara_cli", *words],
        cwd=REPOSITORY,
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
        preexec_fn=_take_the_terminal,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(screen)
    try:
        yield process, keyboard
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def seen(keyboard: int, text: str) -> str:
    """Return the screen up to ``text``, which must appear."""
    found = b""
    while text.encode() not in found:
        assert select.select([keyboard], [], [], 120)[0], found
        found += os.read(keyboard, 1024)
    return found.decode("utf-8", "replace")


def type_in(keyboard: int, keys: bytes) -> None:
    """Press keys as soon as the line editor listens: it takes the terminal over after it has shown its prompt."""
    while termios.tcgetattr(keyboard)[3] & termios.ICANON:
        time.sleep(0.01)
    os.write(keyboard, keys)


@pytest.mark.skipif(sys.platform != "linux", reason="terminals differ")
def test_a_person_at_a_terminal(terminal: tuple[subprocess.Popen[bytes], int]) -> None:
    process, keyboard = terminal
    seen(keyboard, "> ")
    type_in(keyboard, b"hello\n")
    screen = seen(keyboard, "\n> ")
    assert screen.startswith("hello\r\n") and len(screen.splitlines()) > 2
    # Ctrl+C discards a line.
    type_in(keyboard, b"half a li")
    seen(keyboard, "half a li")
    # Python loses a Ctrl+C between the echo and the wait for the next key.
    time.sleep(0.2)
    os.write(keyboard, b"\x03")
    seen(keyboard, "> ")
    # Ctrl+D ends the chat.
    type_in(keyboard, b"\x04")
    assert process.wait(60) == 0
