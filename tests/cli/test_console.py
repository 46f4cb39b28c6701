"""What the console prints where; streams are in memory, so nothing here needs a terminal."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ara.errors import AraError, ProblemsError
from ara.progress import Reporter
from ara_cli.console import Column, Console

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
COLUMNS = [Column("model", "left"), Column("perplexity"), Column("size (MiB)")]
ROWS = [["dense", "17.05", "256.6"], ["energy, keep 0.80", "24.9", None]]


class Stream(io.TextIOWrapper):
    """A text stream in memory with an encoding, that may claim to be a terminal."""

    def __init__(self, encoding="utf-8", terminal=False):
        super().__init__(io.BytesIO(), encoding=encoding, newline="\n")
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def read_all(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Heard:
    """A console with its two streams."""

    def __init__(self, encoding="utf-8", terminal=False, environ=None, **options):
        self.stdout, self.stderr = (Stream(encoding, terminal) for _ in range(2))
        self.clock = Clock()
        self.console = Console(
            stdout=self.stdout, stderr=self.stderr, environ=environ or {}, clock=self.clock, **options
        )

    @property
    def out(self):
        return self.stdout.read_all()

    @property
    def err(self):
        return self.stderr.read_all()


def say_everything(console):
    console.step("Decomposing 210 linear layers")
    console.fact("bf16 on the CPU: 2.5× fp32")
    console.warn("few tokens")
    with console.bar("layers", 2) as bar:
        bar.advance()
        bar.advance()
    console.table("Quality", COLUMNS, ROWS)
    console.text("a generated sentence")
    console.result({"keep": 0.8})
    console.saved(Path("ara-workspace/decompose"))
    console.next_command("ara allocate --keep 0.8")


def test_console_is_a_reporter():
    reporter: Reporter = Console()
    assert callable(reporter.bar)


def test_work_goes_to_stderr_and_results_to_stdout():
    heard = Heard()
    say_everything(heard.console)
    assert heard.err == (
        "Decomposing 210 linear layers\n"
        "  bf16 on the CPU: 2.5× fp32\n"
        "warning: few tokens\n"
        "Saved in ara-workspace/decompose\n"
        "Next: ara allocate --keep 0.8\n"
    )
    assert "Quality" in heard.out
    assert heard.out.endswith("a generated sentence\n")
    assert "{" not in heard.out


def test_table_is_aligned_and_complete():
    heard = Heard()
    heard.console.table("Quality", COLUMNS, ROWS)
    lines = heard.out.strip().splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [
        "Quality",
        "model",
        lines[2],
        "dense",
        "energy, keep 0.80",
    ]
    assert set(lines[2].strip()) <= {"─", " "}
    assert lines[3].index("17.05") + 5 == lines[4].index("24.9") + 4  # right-justified
    assert lines[4].endswith("-")  # None


def test_table_in_a_pipe_is_never_cut():
    heard = Heard()
    heard.console.table("", [Column("name", "left")], [["x" * 300]])
    assert "x" * 300 in heard.out


def test_table_on_a_narrow_terminal_folds(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    heard = Heard(terminal=True, environ={"TERM": "xterm"})
    heard.console.table("", [Column("name", "left")], [["x" * 100]])
    assert heard.out.count("x") == 100
    assert max(map(len, heard.out.splitlines())) <= 40


def test_square_brackets_are_text():
    for terminal in (False, True):
        heard = Heard(terminal=terminal)
        heard.console.step("[bold]model[/bold] :smile:")
        heard.console.table("[red]", [Column("[red]")], [["[/red]"]])
        assert "[bold]model[/bold] :smile:" in heard.err
        assert "[/red]" in heard.out


def test_quiet_keeps_warnings_errors_and_results():
    heard = Heard(quiet=True)
    say_everything(heard.console)
    heard.console.error(AraError("no such file"))
    assert heard.err == "warning: few tokens\nerror: no such file\n"
    assert "dense" in heard.out


def test_json_puts_exactly_one_document_on_stdout():
    heard = Heard(as_json=True)
    say_everything(heard.console)
    assert json.loads(heard.out) == {"keep": 0.8}
    assert "dense" in heard.err


def test_json_and_quiet_say_nothing_but_warnings():
    heard = Heard(as_json=True, quiet=True)
    say_everything(heard.console)
    assert json.loads(heard.out) == {"keep": 0.8}
    assert heard.err == "warning: few tokens\n"


def test_second_document_is_our_bug():
    heard = Heard(as_json=True)
    heard.console.result({})
    with pytest.raises(AssertionError):
        heard.console.result({})


def test_json_refuses_what_is_not_json_and_writes_nothing():
    heard = Heard(as_json=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        heard.console.result({"perplexity": float("nan")})
    with pytest.raises(TypeError, match="set has no JSON form"):
        heard.console.result({"names": {1}})
    assert heard.out == ""
    heard.console.result({"path": Path("a/b"), "text": "é\x1b"})
    assert json.loads(heard.out) == {"path": str(Path("a/b")), "text": "é\x1b"}
    assert heard.out.isascii()


@pytest.mark.parametrize("as_json", [False, True])
def test_error_is_a_line_with_a_hint(as_json):
    heard = Heard(as_json=as_json)
    heard.console.error(AraError("the file x.txt is empty", "give another one"))
    assert heard.err == "error: the file x.txt is empty\nhint: give another one\n"
    if as_json:
        assert json.loads(heard.out) == {"error": "the file x.txt is empty", "hint": "give another one"}
    else:
        assert heard.out == ""


def test_several_problems_are_shown_together():
    heard = Heard()
    heard.console.error(ProblemsError("two problems", ["keep is 2", "seed is -1"]))
    assert heard.err == "error: two problems:\n  - keep is 2\n  - seed is -1\n"


def test_error_after_the_document_stays_on_stderr():
    heard = Heard(as_json=True)
    heard.console.result({"ok": True})
    heard.console.error(AraError("late"))
    assert json.loads(heard.out) == {"ok": True}
    assert heard.err == "error: late\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_every_encoding_is_written_without_control_characters(encoding):
    heard = Heard(encoding)
    heard.console.step("a → b · 2.5× … 日本 \udcff \x1b[31mred\x07\x9b")
    heard.console.table("é", [Column("Δ (≤)")], [["\x1b]0;title\x07"], ["\u202egnp.exe\u2066\u200f\u061c"]])
    heard.console.stream("\u202eanswer")
    assert not CONTROL.search(heard.out + heard.err)
    if encoding == "ascii":
        assert heard.err.startswith("a -> b - 2.5x ... \\u65e5")


def test_terminal_has_colours_unless_no_color():
    coloured = Heard(terminal=True, environ={"TERM": "xterm-256color"})
    coloured.console.warn("few tokens")
    assert "\x1b[" in coloured.err
    for environ in ({"TERM": "xterm-256color", "NO_COLOR": "1"}, {"TERM": "dumb"}):
        plain = Heard(terminal=True, environ=environ)
        plain.console.warn("few tokens")
        plain.console.step("Working")
        assert plain.err == "warning: few tokens\nWorking\n"


def test_terminal_does_not_break_long_lines():
    heard = Heard(terminal=True, environ={"NO_COLOR": "1", "TERM": "xterm"})
    heard.console.fact("word " * 100)
    assert heard.err.count("\n") == 1


def test_bar_moves_on_a_terminal_and_keeps_the_lines_said_meanwhile():
    heard = Heard(terminal=True, environ={"TERM": "xterm-256color"})
    with heard.console.bar("layers [1]", 2) as outer, heard.console.bar("tokens", 3) as inner:
        inner.advance(3)
        heard.console.fact("said meanwhile")
        outer.advance()
    assert "layers [1]" in heard.err
    assert "said meanwhile" in heard.err
    before = heard.err
    heard.console.fact("afterwards")
    assert heard.err == before + "  afterwards\n"


def test_bar_ends_when_the_work_fails():
    heard = Heard(terminal=True, environ={"TERM": "xterm-256color"})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"), heard.console.bar("layers", 2):
            raise RuntimeError("boom")


def test_log_is_silent_about_short_work_and_reports_long_work():
    heard = Heard()
    with heard.console.bar("layers", 10) as bar:
        heard.clock.now += 1.5
        bar.advance(10)
    assert heard.err == ""
    with heard.console.bar("layers", 10) as bar:
        heard.clock.now += 29
        bar.advance(1)
        heard.clock.now += 11
        bar.advance(3)
        heard.clock.now += 60
        bar.advance(6)
    assert heard.err == "  layers: 40% after 40 s, about 1 min left\n  layers: done in 1 min 40 s\n"


def test_log_does_not_claim_that_failed_work_is_done():
    heard = Heard()
    with pytest.raises(RuntimeError), heard.console.bar("layers", 0) as bar:
        heard.clock.now += 40
        bar.advance()
        raise RuntimeError
    assert heard.err == ""


def test_what_libraries_print_leaves_stdout_alone():
    heard = Heard(as_json=True)
    with heard.console.only_results_on_stdout():
        print("noise")
        heard.console.result({"ok": True})
    assert json.loads(heard.out) == {"ok": True}
    assert heard.err == "noise\n"


def test_saved_shows_a_path_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heard = Heard()
    heard.console.saved(tmp_path / "work" / "truncate")
    heard.console.saved(tmp_path.parent)
    assert heard.err == f"Saved in {Path('work/truncate')}\nSaved in {tmp_path.parent}\n"


def test_neither_import_nor_plain_lines_load_rich():
    code = (
        "import sys; from ara.errors import AraError; from ara_cli.console import Console\n"
        "console = Console(); console.step('x'); console.error(AraError('y'))\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'rich', 'torch', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
