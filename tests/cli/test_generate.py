"""``kvpsi generate`` as a user runs it: a process of its own, with a real model."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpsi.errors import CacheRefusedError
from support.gguf_files import write_gguf
from support.interrupts import popen_heeding_ctrl_c

pytestmark = pytest.mark.engine

KVPSI = [sys.executable, "-m", "kvpsi"]
SHORT = ["-n", "6", "-c", "512", "-t", "1"]


def generate(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*KVPSI, "generate", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, **options)  # type: ignore[call-overload, no-any-return]


def run_here(capsys: pytest.CaptureFixture[str], *args: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, for what is refused before a model is loaded or is replaced in the test."""
    from kvpsi.cli.main import main

    status = main(["generate", *args])
    captured = capsys.readouterr()
    return subprocess.CompletedProcess(args, status, captured.out, captured.err)


def assert_refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One sentence on standard error that says what is wrong, nothing on standard output."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("kvpsi: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr and "Internal error" not in done.stderr
    assert done.stderr.rstrip().endswith((".", "?", "'")), done.stderr
    for word in words:
        assert word in done.stderr


# -- a good run ------------------------------------------------------------------------------------------------------


def test_json_is_one_document_and_the_text_is_that_of_a_plain_run(default_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    prompt = "What is the capital of France?"
    done = generate(prompt, "-m", str(default_model), *SHORT, "--json", "--log", str(log))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {
        "text",
        "prompt_tokens",
        "generated_tokens",
        "prompt_seconds",
        "generate_seconds",
        "forgotten_tokens",
        "cache",
        "line",
    }
    assert document["text"].strip()
    assert 10 < document["prompt_tokens"] < 80
    assert 1 <= document["generated_tokens"] <= 6
    assert document["prompt_seconds"] > 0 and document["generate_seconds"] > 0
    cache = document["cache"]
    assert cache["trusted"] and cache["mode"] == "pages" and cache["capacity_bytes"] == 512 * 30 * 2 * 384
    assert 0 < cache["resident_bytes"] <= cache["peak_resident_bytes"] < cache["capacity_bytes"]
    assert cache["returned_bytes"] > 0 and cache["releases"] >= 1 and cache["trims"] == 0
    assert "KV resident" in document["line"] and done.stderr.count("KV resident") == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"decision"} <= {e["event"] for e in events} <= {"decision", "reading", "release", "trim", "interrupt"}
    assert all({"at_s", "event"} <= set(e) for e in events)

    plain = generate(prompt, "-m", str(default_model), *SHORT)
    assert plain.returncode == 0
    assert plain.stdout.strip() == document["text"].strip()
    assert plain.stdout.endswith("\n")
    last = plain.stderr.rstrip().splitlines()[-1]
    assert last.startswith("kvpsi: ") and "tok/s" in last and "KV resident" in last and "trims" in last

    stock = generate(prompt, "-m", str(default_model), *SHORT, "--no-govern")
    assert stock.returncode == 0
    assert stock.stdout == plain.stdout, "governing changes no word"
    assert stock.stderr.rstrip().endswith("not governed")


def test_a_prompt_from_standard_input_below_a_file(default_model: Path, tmp_path: Path) -> None:
    document = tmp_path / "text.txt"
    document.write_text("Der Himmel über Köln ist grün.\n", encoding="utf-8")
    done = generate(
        "-", "-f", str(document), "-m", str(default_model), *SHORT, "--json", "--cache-limit", "70%", input="Why?"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] > 15


def test_several_files_are_read_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kvpsi.cli.prompt import whole_prompt

    paths = [tmp_path / name for name in ("b.txt", "a.txt")]
    for path in paths:
        path.write_text(f"This is {path.name}.\n")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    threading.Thread(target=fifo.write_text, args=("From a pipe.",)).start()
    monkeypatch.setattr("sys.stdin", io.StringIO("From standard input."))
    whole = whole_prompt("Why?", [*paths, fifo, Path("-")])
    assert whole == "This is b.txt.\n\nThis is a.txt.\n\nFrom a pipe.\n\nFrom standard input.\n\nWhy?"


def test_a_closed_standard_input_is_refused() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{shlex.join(KVPSI)} generate - <&-"], capture_output=True, text=True, timeout=60
    )
    assert_refused(done, 2, "no standard input")


def test_standard_input_is_not_read_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(run_here(capsys, "-", "-f", "-", "-m", "/nowhere/model.gguf"), 2, "only once")


def test_remarks_do_not_get_into_the_document_where_standard_error_is_closed(default_model: Path) -> None:
    command = [
        *KVPSI,
        "generate",
        "Hello",
        "-m",
        str(default_model),
        *SHORT,
        "--keep",
        "400",
        "--tail",
        "400",
        "--json",
    ]
    done = subprocess.run(["sh", "-c", f"{shlex.join(command)} 2>&-"], capture_output=True, text=True, timeout=90)
    assert json.loads(done.stdout)["generated_tokens"] == 6


def test_what_was_forgotten_is_said_and_counted(default_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    small = ["-c", "512", "-n", "40", "-t", "1", "--cache-limit", "45%", "--keep", "4", "--tail", "32"]
    prompt = "The wind was strong and the sea was high. " * 30
    done = generate(prompt, "-m", str(default_model), *small, "--min-prune", "16", "--log", str(log), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    trims = [each for each in map(json.loads, log.read_text().splitlines()) if each["event"] == "trim"]
    assert document["cache"]["trims"] == len(trims) > 0
    assert document["forgotten_tokens"] == sum(trim["freed_cells"] for trim in trims) > 0
    assert f"{document['forgotten_tokens']} tokens forgotten" in document["line"]


def test_counting_what_is_forgotten_hides_it_from_nobody() -> None:
    from kvpsi.generation import ForgottenTokens
    from kvpsi.kv import Forgotten

    seen: list[Forgotten] = []
    cache = types.SimpleNamespace(on_forgotten=seen.append)
    first, second = Forgotten(0, 16, 80, 64), Forgotten(0, 100, 101, 1)
    with ForgottenTokens(cache) as forgotten:  # type: ignore[arg-type]
        cache.on_forgotten(first)
        cache.on_forgotten(second)
    cache.on_forgotten(first)
    assert forgotten.n_tokens == 65
    assert seen == [first, second, first]


@pytest.mark.parametrize(("keep", "warned"), [("300", True), ("16", False)])
def test_settings_under_which_nothing_can_be_forgotten_are_remarked(
    default_model: Path, keep: str, warned: bool
) -> None:
    done = generate("Hello", "-m", str(default_model), *SHORT, "--keep", keep, "--tail", "300")
    assert done.returncode == 0, done.stderr
    assert ("nothing can be forgotten: --keep 300 and --tail 300" in done.stderr) is warned


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_disk_behind_the_log_ends_the_log_and_not_the_answer(default_model: Path, form: list[str]) -> None:
    command = [*KVPSI, "generate", "Hello", "-m", str(default_model), *SHORT, "--log", "/dev/full", *form]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90)
    assert done.returncode == 1
    *answer, last = done.stdout.splitlines()
    assert last == "kvpsi: The log /dev/full is incomplete (No space left on device); free space, or name another file."
    assert "kvpsi: " not in "\n".join(answer[:-1]) and "instrument" not in done.stdout
    assert answer[-1] == "}" if form else answer[-1].startswith("kvpsi: ") and "tok/s" in answer[-1]


# -- what a user gets wrong ------------------------------------------------------------------------------------------


def test_a_truncated_model_is_refused(default_model: Path, tmp_path: Path) -> None:
    with default_model.open("rb") as whole:
        start = whole.read(8 << 20)
    for name, data in (("half.gguf", start), ("header.gguf", start[:1000]), ("four.gguf", start[:4])):
        (tmp_path / name).write_bytes(data)
        assert_refused(generate("Hello", "-m", str(tmp_path / name), *SHORT), 2, name)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model at all, but long enough to look at" * 10)
    assert_refused(generate("Hello", "-m", str(tmp_path / "text.gguf"), *SHORT), 2, "text.gguf")
    assert_refused(generate("Hello", "-m", str(tmp_path / "missing.gguf"), *SHORT), 2, "missing.gguf")
    assert_refused(generate("Hello", "-m", str(tmp_path), *SHORT), 2)
    (tmp_path / "empty.gguf").touch()
    assert_refused(generate("Hello", "-m", str(tmp_path / "empty.gguf"), *SHORT), 2, "empty.gguf")


def test_a_gguf_file_without_weights_is_refused(tmp_path: Path) -> None:
    assert_refused(generate("Hello", "-m", str(write_gguf(tmp_path / "hollow.gguf")), *SHORT), 2, "hollow.gguf")


def test_a_prompt_longer_than_the_context_is_refused(default_model: Path) -> None:
    done = generate("word " * 300, "-m", str(default_model), "-c", "256", "-n", "8", "-t", "1")
    assert_refused(done, 2, "-c 256", "8 to generate")


def test_a_prompt_longer_than_the_model_was_trained_for_is_refused(default_model: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("word " * 9000)
    assert_refused(generate("Sum up", "-f", str(long), "-m", str(default_model), "-t", "1", "-n", "1"), 2, "8192")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["-c", "-1"], "-1"),
        (["-c", "99999999999"], "99999999999"),
        (["-c", "many"], "--ctx"),
        (["-n", "0"], "0 tokens"),
        (["-n", "-5"], "-5"),
        (["-n", "99999999"], "99999999"),
        (["-t", "-1"], "-1"),
        (["-t", "100000"], "100000"),
        (["--temp", "-1"], "-1"),
        (["--temp", "nan"], "nan"),
        (["--kv-type", "f64"], "f64"),
        (["--keep", "-1"], "--keep"),
        (["--tail", "-1"], "--tail"),
        (["--min-prune", "0"], "--min-prune"),
        (["--no-govern", "--log", "log.jsonl"], "--log"),
        (["--cache-limit", "0"], "'0'"),
        (["--cache-limit", "150%"], "150%"),
        (["--cache-limit", "lots"], "lots"),
        (["--reserve", "-5M"], "-5M"),
        (["--reserve", "much"], "much"),
        (["--reserve", "2G", "--regrow-above", "1G"], "--regrow-above 1G"),
        (["--regrow-above", "9999999T"], "9999999T"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str], args: list[str], word: str) -> None:
    from kvpsi.cli.main import main

    assert main(["generate", "Hello", "-m", "/nowhere/model.gguf", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvpsi: ") and captured.err.count("\n") == 1
    assert word in captured.err and "/nowhere" not in captured.err
    assert "_bytes" not in captured.err and "min_prune" not in captured.err


def test_files_that_cannot_be_used_are_refused(default_model: Path, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Köln".encode("latin-1"))
    assert_refused(generate("Hello", "-f", str(latin), "-m", str(default_model), *SHORT), 2, "UTF-8", "latin.txt")
    assert_refused(generate("Hello", "-f", str(tmp_path / "none.txt"), "-m", str(default_model)), 1, "none.txt")
    assert_refused(generate("Hello", "-f", str(tmp_path), "-m", str(default_model)), 1)
    huge = tmp_path / "huge.txt"
    with huge.open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert_refused(generate("Hello", "-f", str(huge), "-m", str(default_model)), 2, "larger than")
    log = tmp_path / "no such folder" / "log.jsonl"
    assert_refused(generate("Hello", "-m", str(default_model), *SHORT, "--log", str(log)), 2, "log.jsonl")


@pytest.mark.parametrize(("content", "word"), [(b"", "is empty"), (b" \n", "is empty"), (b"a\0b", "NUL")])
def test_a_file_without_a_text_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, word: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    assert_refused(run_here(capsys, "Hello", "-f", str(text), "-m", "/nowhere/model.gguf"), 2, word, "text.txt")


def test_nul_bytes_on_standard_input_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\0b"))
    assert_refused(run_here(capsys, "-", "-m", "/nowhere/model.gguf"), 2, "NUL")


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_nothing_to_answer_is_refused(default_model: Path, prompt: str) -> None:
    assert_refused(generate(prompt, "-m", str(default_model)), 2, "nothing to answer")


def test_standard_input_that_is_no_text_is_refused(default_model: Path) -> None:
    command = [*KVPSI, "generate", "-", "-m", str(default_model), *SHORT]
    environment = os.environ | {"PYTHONUTF8": "1"}
    done = subprocess.run(command, input=b"K\xf6ln \xff\xfe", capture_output=True, timeout=90, env=environment)
    assert done.returncode in (1, 2), done.stderr
    assert b"Traceback" not in done.stderr and b"Internal error" not in done.stderr
    assert done.stderr.startswith(b"kvpsi: ") and done.stderr.count(b"\n") == 1


def test_a_context_that_no_memory_is_left_for_is_refused(default_model: Path) -> None:
    done = generate("Hello", "-m", str(default_model), "-n", "8", "-t", "1", "--reserve", "1000T")
    assert_refused(done, 1, "can be spared")


@pytest.mark.parametrize("error", [ValueError("Failed to create llama_context"), MemoryError()])
def test_a_context_that_cannot_be_made_is_no_fault_of_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, default_model: Path, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("llama_cpp.Llama", fail)
    done = run_here(capsys, "Hello", "-m", str(default_model), *SHORT)
    assert_refused(done, 1, "A context of 512 tokens does not fit", "lower -c")


def test_a_model_that_cannot_be_loaded_is_still_a_fault_of_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, default_model: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("Failed to load model from file")

    monkeypatch.setattr("llama_cpp.Llama", fail)
    assert_refused(run_here(capsys, "Hello", "-m", str(default_model), *SHORT), 2, "fetch the file again")


def test_a_refusal_in_the_middle_begins_on_a_new_line_and_names_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, default_model: Path
) -> None:
    def pieces(*_: object) -> Iterator[str]:
        yield "Once upon"
        raise CacheRefusedError("lower keep and tail.")

    monkeypatch.setattr("kvpsi.generation.Answer._pieces", pieces)
    done = run_here(capsys, "Hello", "-m", str(default_model), *SHORT)
    assert (done.returncode, done.stdout) == (1, "Once upon\n")
    assert "--keep and --tail" in done.stderr and "--cache-limit" in done.stderr


# -- being stopped ---------------------------------------------------------------------------------------------------


def test_ctrl_c_while_generating_is_quiet_and_130(default_model: Path) -> None:
    prompt = "Tell me a very long story about a lighthouse and the sea."
    command = [*KVPSI, "generate", prompt, "-m", str(default_model), "-n", "2000", "-c", "4096", "-t", "1"]
    process = popen_heeding_ctrl_c(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.read(1), process.communicate()[1]
        os.kill(process.pid, signal.SIGINT)
        started = time.monotonic()
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert time.monotonic() - started < 10
    assert stderr == b"", "nothing has gone wrong"


def test_ctrl_c_while_the_model_is_loaded_is_not_lost(default_model: Path) -> None:
    """llama.cpp logs all the time meanwhile, through a Python function that must not swallow it."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from kvpsi.engines import loading\n"
        "loading.show_errors_only()\n"
        "def log(level, text, _):\n"
        "    if not sent: sent.append(os.kill(os.getpid(), signal.SIGINT))\n"
        "sent = []\n"
        "callback = loading.llama_cpp.llama_log_callback(log)\n"
        "loading.llama_cpp.llama_log_set(callback, None)\n"
        "loading.open_llama(Path(sys.argv[1]), 512, loading.LoadSettings(n_threads=1))\n"
        "print('went on')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(default_model)], capture_output=True, text=True, timeout=90, check=False
    )
    assert "went on" not in done.stdout and "Exception ignored" not in done.stderr
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


def test_ctrl_c_while_the_prompt_is_read_is_quiet_and_130(default_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("The keeper wrote in his book what he had seen. " * 300)
    log = tmp_path / "log.jsonl"
    command = [*KVPSI, "generate", "Go on", "-f", str(text), "-m", str(default_model), "-t", "1", "--log", str(log)]
    process = popen_heeding_ctrl_c(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stdout == stderr == b""


def test_a_reader_that_leaves_early_sees_no_traceback(default_model: Path) -> None:
    words = [*KVPSI, "generate", "Count to one hundred.", "-m", str(default_model), "-n", "40", "-c", "512", "-t", "1"]
    command = f"{shlex.join(words)} | head -c 5; status=${{PIPESTATUS[0]}}; echo; echo $status"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=90)
    head, status = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert len(head) <= 5 and status in ("1", "141")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr and "Error" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line(default_model: Path) -> None:
    command = [*KVPSI, "generate", "Hello", "-m", str(default_model), *SHORT]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=90)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "kvpsi: Could not read or write its output: No space left on device."
    )
    assert "Traceback" not in done.stderr


def test_the_log_may_not_overwrite_the_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The wind was strong on Monday.")
    done = generate("Hello", "-f", str(text), "--log", str(text))
    assert_refused(done, 2, "would overwrite")
    assert text.read_text() == "The wind was strong on Monday."


def test_a_file_without_an_end_is_refused() -> None:
    assert_refused(generate("Hello", "-f", "/dev/zero"), 1, "not a regular file")
