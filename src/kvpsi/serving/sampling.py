"""How the next token is chosen, with llama.cpp's own samplers."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._internals import LlamaModel, LlamaSampler, LlamaTokenDataArray
from llama_cpp.llama_grammar import LlamaGrammar

from kvpsi.errors import UsageError

FloatArray = npt.NDArray[np.float32]
_MOST_GRAMMAR_CHARACTERS = 64_000
_MOST_GRAMMAR_GROUPS = 4_000
_NEVER = -1e9  # a bias of -100 is to ban a token for good


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """What a request says of it; the defaults are those of llama.cpp's server.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: only the so many likeliest tokens; 0: all.
        top_p: only the likeliest tokens that have this share of the probability together; 1: all.
        min_p: only tokens that have at least this share of the likeliest one's probability; 0: all.
        repeat_penalty: divides the logit of tokens that are among the last `penalty_last_n`; 1: nothing.
        frequency_penalty: taken off a logit for each time that the token is among those.
        presence_penalty: taken off once.
        penalty_last_n: tokens, of prompt and answer, that the penalties look at.
        logit_bias: added to the logits of these tokens; -100 or less bans one.
        seed: of the choice; None: another each time.
        grammar: GBNF that the answer has to follow.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0.0, 100.0),
            "top_k": (0, math.inf),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "repeat_penalty": (0.01, 100.0),
            "frequency_penalty": (-2.0, 2.0),
            "presence_penalty": (-2.0, 2.0),
            "penalty_last_n": (0, math.inf),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                upper = "" if high == math.inf else f" and at most {high:g}"
                raise UsageError(f"{name} is {value}; give at least {low:g}{upper}.")

    @property
    def takes_likeliest(self) -> bool:
        """Whether only the logits count, and of them the largest."""
        return self.temperature <= 0 and not self.logit_bias and not self.penalizes and self.grammar is None

    @property
    def repeatable(self) -> bool:
        """Whether the same request is to get the same answer again."""
        return self.temperature <= 0 or self.seed is not None

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens count."""
        return self.repeat_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        model: whose vocabulary it is.
        settings: how.
        seed: taken where ``settings`` has none.

    Raises:
        UsageError: the grammar is not GBNF.
    """

    def __init__(self, model: LlamaModel, settings: SamplingSettings, seed: int) -> None:
        self.settings = settings
        self._n_vocab = model.n_vocab()
        self._chain = _chain(self._n_vocab, settings, seed if settings.seed is None else settings.seed)
        self._grammar: LlamaSampler | None = None
        if settings.grammar is not None:
            self._grammar = _grammar(model, settings.grammar)
            self._candidates = LlamaTokenDataArray(n_vocab=self._n_vocab)

    def sample(self, ctx: llama_cpp.llama_context_p, index: int) -> int:
        """The next token, after the ``index``-th output of the last decode; it counts as taken."""
        if self.settings.takes_likeliest:  # the chain would copy and sort the whole vocabulary for that
            return int(np.argmax(logits_of(ctx, index, self._n_vocab)))
        if self._grammar is None:
            return int(llama_cpp.llama_sampler_sample(self._chain.sampler, ctx, index))
        logits = logits_of(ctx, index, self._n_vocab)
        token = self._choose(logits, within_grammar=False)
        if not self._allowed(token):  # looking at all tokens takes the grammar long, so only where there is need
            token = self._choose(logits, within_grammar=True)
            if not self._allowed(token):
                raise UsageError("The grammar allows no token of this model to come next; mend it.")
        self._chain.accept(token)
        self._grammar.accept(token)
        return token

    def accept(self, token: int) -> None:
        """Take note of a token of the prompt, for the penalties."""
        self._chain.accept(token)

    def close(self) -> None:
        """Free llama.cpp's side of it."""
        self._chain.close()
        if self._grammar is not None:
            self._grammar.close()

    def _choose(self, logits: FloatArray, *, within_grammar: bool) -> int:
        assert self._grammar is not None
        self._candidates.copy_logits(logits)
        if within_grammar:
            _apply(self._grammar, self._candidates.candidates)
        _apply(self._chain, self._candidates.candidates)
        found = self._candidates.candidates
        return int(found.data[found.selected].id)

    def _allowed(self, token: int) -> bool:
        assert self._grammar is not None
        one = (llama_cpp.llama_token_data * 1)()
        one[0].id, one[0].logit = token, 1.0
        array = llama_cpp.llama_token_data_array(data=one, size=1, selected=-1, sorted=False)
        _apply(self._grammar, array)
        return bool(one[0].logit != -math.inf)


def _apply(sampler: LlamaSampler, candidates: llama_cpp.llama_token_data_array) -> None:
    llama_cpp.llama_sampler_apply(sampler.sampler, ctypes.byref(candidates))


def logits_of(ctx: llama_cpp.llama_context_p, index: int, n_vocab: int) -> FloatArray:
    """The logits of the ``index``-th output of the last decode, where they lie; shape [n_vocab]."""
    found: FloatArray = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, index), (n_vocab,))
    return found


def log_probabilities(logits: FloatArray) -> FloatArray:
    """Natural logarithms of the tokens' probabilities before any sampler; shape [n_vocab]."""
    shifted: FloatArray = logits - logits.max()
    shifted -= np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    return shifted


def _chain(n_vocab: int, s: SamplingSettings, seed: int) -> LlamaSampler:
    chain = LlamaSampler()
    if s.logit_bias:
        bias = {token: _NEVER if value <= -100 else value for token, value in s.logit_bias.items()}
        chain.add_logit_bias(n_vocab, bias)
    if s.penalizes:
        chain.add_penalties(n_vocab, s.penalty_last_n, s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
    if s.temperature <= 0:
        chain.add_greedy()
        return chain
    if s.top_k:
        chain.add_top_k(s.top_k)
    if s.top_p < 1:
        chain.add_top_p(s.top_p)
    if s.min_p > 0:
        chain.add_min_p(s.min_p)
    chain.add_temp(s.temperature)
    chain.add_dist(seed & 0xFFFFFFFF)
    return chain


def _grammar(model: LlamaModel, text: str) -> LlamaSampler:
    if len(text) > _MOST_GRAMMAR_CHARACTERS or text.count("(") > _MOST_GRAMMAR_GROUPS:
        raise UsageError(
            f"A grammar may have {_MOST_GRAMMAR_CHARACTERS} characters and {_MOST_GRAMMAR_GROUPS} groups at most; "
            "make it, or the JSON schema behind it, simpler."
        )
    sampler = LlamaSampler()
    with contextlib.suppress(Exception):
        grammar = LlamaGrammar.from_string(text, verbose=False)
        native = llama_cpp.llama_sampler_init_grammar(model.vocab, text.encode(), grammar._root.encode())
        if native:
            llama_cpp.llama_sampler_chain_add(sampler.sampler, native)
            return sampler
    sampler.close()
    raise UsageError(
        "The grammar, or what the JSON schema was turned into, cannot be followed; a grammar has to be valid GBNF with "
        "a rule called root and without left recursion. The server's log says more."
    )
