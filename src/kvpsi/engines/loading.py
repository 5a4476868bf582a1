"""Opens a llama.cpp model with settings that suit governing, in a size that this machine can stand at start."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from llama_cpp._internals import LlamaModel

from kvpsi.errors import EnvironmentProblem, ModelFileError, PromptTooLongError, UsageError
from kvpsi.governor import LawSettings
from kvpsi.models import check_gguf
from kvpsi.pressure import Headroom
from kvpsi.pressure.cpu import allowed_cpus, cpu_quota
from kvpsi.units import format_bytes

KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
_BYTES_PER_VALUE = {"f16": 2.0, "q8_0": 34 / 32}
_CONTEXT_STEP = 256
_LARGEST_CONTEXT = 1 << 22


_GGML_LOG_ERROR = 4
_OF_INTERRUPTED_DECODES = (  # which go on once there is room
    b"compute_async failed with error 1\n",
    b"compute status: 1\n",
    b"failed to decode, ret = 2\n",
)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _errors_only(level: int, text: bytes, _: object) -> None:
    if level == _GGML_LOG_ERROR and not any(each in text for each in _OF_INTERRUPTED_DECODES):
        sys.stderr.write(text.decode("utf-8", "replace"))


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until llama.cpp has come back: raised in the log callback, they would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(n))]
    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


def show_errors_only() -> None:
    """Let llama.cpp print errors, for the whole process: its warnings tell of things that kvpsi does on purpose."""
    llama_cpp.llama_log_set(_errors_only, None)


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How to open a model.

    Attributes:
        n_ctx: context in tokens; 0: as large as the job needs.
        n_threads: threads; 0: as many as the affinity mask and the CPU quota allow.
        kv_type: type of the cache's values, one of `KV_TYPES`.
        lock_weights: keep the weights in memory, as far as RLIMIT_MEMLOCK allows; else the kernel may drop them, as
            they can be read from their file again.
    """

    n_ctx: int = 0
    n_threads: int = 0
    kv_type: str = "f16"
    lock_weights: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.n_ctx <= _LARGEST_CONTEXT:
            raise UsageError(
                f"A context of {self.n_ctx} tokens makes no sense; give 0 (as needed) to {_LARGEST_CONTEXT} with -c."
            )
        if not 0 <= self.n_threads <= 1024:
            raise UsageError(f"{self.n_threads} threads make no sense; give 0 (as many as fit) to 1024 with -t.")
        if self.kv_type not in KV_TYPES:
            raise UsageError(f"The cache type {self.kv_type!r} is not known; use one of {', '.join(KV_TYPES)}.")


def usable_threads() -> int:
    """Threads that can really run: the affinity mask, cut by a CPU quota. More would spin and wait for each other."""
    allowed, quota = len(allowed_cpus()), cpu_quota()
    return max(1, min(allowed, int(quota)) if quota else allowed)


def _number(metadata: Mapping[str, str], key: str) -> int | None:
    text = metadata.get(f"{metadata.get('general.architecture', '')}.{key}", "")
    return int(text) if text.isdigit() else None


def cache_bytes_per_token(metadata: Mapping[str, str], kv_type: str) -> int:
    """An upper estimate of what one token of context costs: K and V of all layers, sliding windows not deducted.

    Where the file gives heads for each layer apart, all heads are counted for every layer.
    """
    n_layer = _number(metadata, "block_count") or 0
    n_embd = _number(metadata, "embedding_length") or 0
    n_head = _number(metadata, "attention.head_count") or 1
    n_head_kv = _number(metadata, "attention.head_count_kv") or n_head
    head = n_embd // n_head
    keys = _number(metadata, "attention.key_length") or head
    values = _number(metadata, "attention.value_length") or head
    return int(n_layer * n_head_kv * (keys + values) * _BYTES_PER_VALUE[kv_type])


@dataclass(frozen=True, slots=True)
class Preview:
    """What is known of a model before its weights are loaded."""

    metadata: Mapping[str, str]
    n_ctx_train: int
    prompt_tokens: int


def preview(path: Path, text: str) -> Preview:
    """Read a model's vocabulary only, and count the tokens of ``text``.

    Raises:
        ModelFileError: the file is missing, damaged, or of a kind that llama.cpp does not load.
    """
    check_gguf(path)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    try:
        with _interrupted_afterwards():
            model = LlamaModel(path_model=str(path), params=params, verbose=False)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelFileError(f"llama.cpp cannot read {path} ({error}); fetch the file again or use another.") from error
    with closing(model):
        n_tokens = len(model.tokenize(text.encode("utf-8", "replace"), True, False))
        metadata = model.metadata()  # all else that llama.cpp says of a model without its weights is 0
        return Preview(metadata, _number(metadata, "context_length") or 0, n_tokens)


def fitting_context(
    known: Preview, n_predict: int, load: LoadSettings, room: Headroom, law: LawSettings
) -> tuple[int, str | None]:
    """The context to open in tokens, and a sentence if it is smaller than asked for.

    llama.cpp writes over the whole cache when a context is made, so the cache must fit into the headroom once, even
    though most of it goes back right after.

    Raises:
        PromptTooLongError: prompt and answer do not fit into the context asked for, or the model's.
        EnvironmentProblem: not even prompt and answer fit into the headroom.
    """
    template_tokens = 64
    needed = known.prompt_tokens + n_predict + template_tokens
    longest = known.n_ctx_train or needed
    if needed > (load.n_ctx or longest):
        limit = f"-c {load.n_ctx}" if load.n_ctx else f"the {longest} tokens that the model was trained for"
        raise PromptTooLongError(
            f"The prompt has {known.prompt_tokens} tokens and with {n_predict} to generate and {template_tokens} for "
            f"the chat format needs {needed}, more than {limit}; "
            f"shorten it, or raise -c{'' if load.n_ctx else ' beyond that at the cost of quality'}."
        )
    wanted = min(load.n_ctx, max(longest, needed)) if load.n_ctx else min(longest, max(needed, 4096))
    per_token = max(1, cache_bytes_per_token(known.metadata, load.kv_type))
    spare = room.available_bytes - law.low_for(room.limit_bytes)
    fits = max(0, spare) // per_token // _CONTEXT_STEP * _CONTEXT_STEP
    if fits >= wanted:
        beyond = f"the context has {wanted} tokens, all that the model was trained for" if wanted < load.n_ctx else None
        return wanted, beyond
    if fits >= needed:
        return fits, (
            f"the context has {fits} instead of {wanted} tokens, as only {format_bytes(max(0, spare))} of memory "
            "can be spared at start"
        )
    raise EnvironmentProblem(
        f"The cache for {needed} tokens takes {format_bytes(needed * per_token)} at start, but only "
        f"{format_bytes(max(0, spare))} can be spared beside the reserve of "
        f"{format_bytes(law.low_for(room.limit_bytes))}; free memory, lower --reserve, shorten the prompt, or "
        "use --kv-type q8_0."
    )


def load_model(path: Path, load: LoadSettings, is_wanted: Callable[[], bool] = lambda: True) -> LlamaModel:
    """Load the weights alone; given up as soon as they are not wanted any more.

    Raises:
        ModelFileError: llama.cpp would not load them, or they were not wanted.
    """
    check_gguf(path)
    params = llama_cpp.llama_model_default_params()
    params.use_mlock = load.lock_weights
    params.progress_callback = go_on = llama_cpp.llama_progress_callback(lambda _, __: is_wanted())
    try:
        with _interrupted_afterwards():
            model = LlamaModel(path_model=str(path), params=params, verbose=False)
        del go_on  # it had to live until here
        return model
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelFileError(f"llama.cpp cannot load {path} ({error}); fetch the file again or use another.") from error


def open_llama(path: Path, n_ctx: int, load: LoadSettings) -> llama_cpp.Llama:
    """Load a model with flash attention, so that whole rows of K and V lie together and can be given back.

    Raises:
        ModelFileError: llama.cpp would not load it.
    """
    threads = load.n_threads or usable_threads()
    kv_type = KV_TYPES[load.kv_type]
    try:
        with _interrupted_afterwards():
            return llama_cpp.Llama(
                str(path),
                n_ctx=n_ctx,
                n_threads=threads,
                n_threads_batch=threads,
                flash_attn=True,
                type_k=kv_type,
                type_v=kv_type,
                use_mlock=load.lock_weights,
                verbose=False,
            )
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelFileError(
            f"llama.cpp could not open {path} with a context of {n_ctx} tokens ({error}); fetch the file again, or use "
            "a smaller -c."
        ) from error
