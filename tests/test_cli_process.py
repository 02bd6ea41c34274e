"""`pyinfer-generate` as a process of its own: pipes, signals, terminals, and what it imports."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATIENCE_SECONDS = 60  # only reached when something is wrong

TOY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from toy_engine import scripted, toy_llama
from pyinfer.cli import main
main(sys.argv[2:], obj=lambda options: toy_llama(scripted("hello " * 2000), n_ctx=20000,
step_seconds=float(sys.argv[1])))
"""


def toy_process(arguments, seconds=0.0, **options):
    command = [sys.executable, "-c", TOY, str(HERE), str(seconds), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run_python(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)


def test_help_of_the_module():
    result = run_python("-m", "pyinfer", "--help")
    assert result.returncode == 0
    assert "pyinfer-generate [OPTIONS] [PROMPT]" in result.stdout
    for option in (
        "--model",
        "--prompt",
        "--max-tokens",
        "--temp",
        "--top-k",
        "--top-p",
        "--min-p",
        "--seed",
    ):
        assert option in result.stdout
    for option in (
        "--threads",
        "--ctx",
        "--chat / --no-chat",
        "--json",
        "--verbose",
        "--offline",
        "--stop",
        "--system",
    ):
        assert option in result.stdout


def test_wrong_usage_of_the_module():
    result = run_python("-m", "pyinfer", "--nothing")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--nothing" in result.stderr


def test_a_missing_file_of_the_module():
    result = run_python("-m", "pyinfer", "-m", "no such file.gguf", "Hi", "--offline")
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "no such file.gguf" in result.stderr


@pytest.mark.parametrize("code", ["import pyinfer; pyinfer.FormatError", "import pyinfer.cli"])
def test_heavy_parts_are_imported_when_they_are_needed(code):
    heavy = ("numpy", "numba", "tokenizers", "jinja2", "pyinfer.llama")
    result = run_python("-c", f"import sys; {code}; print([name for name in {heavy} if name in sys.modules])")
    assert result.stdout == "[]\n", result.stderr


def test_a_reader_that_goes_away_ends_it_quietly():
    process = toy_process(["x\n", "--no-chat", "-n", "-1"], 0.001)
    assert process.stdout.read(5) == b"hello"
    process.stdout.close()
    assert process.wait(PATIENCE_SECONDS) == 0
    with process.stderr:
        assert process.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a file that is always full")
def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", TOY, str(HERE), "0", "x\n", "--no-chat"]
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE_SECONDS, check=False
        )
    assert result.returncode == 1
    assert result.stderr.decode().splitlines()[-1].startswith("error: ")
    assert b"Traceback" not in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to a whole console, the test run included")
def test_ctrl_c_from_outside():
    process = toy_process(["x\n", "--no-chat", "-n", "-1"], 0.001)
    assert process.stdout.read(5) == b"hello"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert stdout.endswith(b"\n")
    assert b"Traceback" not in stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals in the standard library")
class TestTerminal:
    """A person at a terminal:

    standard input is a pseudo-terminal, output is piped so that the streams stay apart.
    """

    @staticmethod
    def talk(typed, arguments=(), seconds=0.0):
        import pty

        person, terminal = pty.openpty()
        try:
            with toy_process([*arguments], seconds, stdin=terminal) as process:
                os.write(person, typed)
                stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
            return process.returncode, stdout.decode(), stderr.decode()
        finally:
            os.close(person)
            os.close(terminal)

    def test_conversation(self):
        code, stdout, stderr = self.talk(b"Hi\nMore\n/exit\n", ["-n", "5"])
        assert code == 0
        assert stdout == "hello\nhello\n"
        assert stderr.count("> ") == 3
        assert "/reset" in stderr

    def test_ctrl_d_leaves(self):
        assert self.talk(b"Hi\n\x04", ["-n", "5"])[:2] == (0, "hello\n")

    @pytest.mark.parametrize("option", ["--json", "--no-chat"])
    def test_options_that_need_a_prompt(self, option):
        code, stdout, stderr = self.talk(b"", [option])
        assert (code, stdout) == (2, "")
        assert "need a prompt" in stderr
