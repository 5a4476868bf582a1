"""What fits on a machine: the arithmetic, and the command that explains it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import simpy

from kvpsi.cli.main import main
from kvpsi.errors import UsageError
from kvpsi.sim.boards import GIB, MIB, Board
from kvpsi.sim.cache import Conversation, SimCache
from kvpsi.sim.fleet.engines import Engines
from kvpsi.sim.floor import Floor
from kvpsi.sim.llms import LLMS, Llm, Speed, llm_named, with_kv_type
from kvpsi.sim.memory import Memory
from kvpsi.sim.planning import Fit, Machine, fits, rate_exceeded_with, reserve_for, room_beside

LLM = Llm("toy", 2 * GIB, 128 * 1024, runtime_bytes=256 * MIB, n_ctx_train=32768)


def by_kind(found: list[Fit]) -> dict[str, Fit]:
    return {fit.kind: fit for fit in found}


def test_static_fits_beside_the_most_and_elastic_beside_the_least() -> None:
    machine = Machine(8 * GIB, 512 * MIB, 2 * GIB, 0, n_cpus=4)
    found = by_kind(fits(LLM, "f16", machine, 1e-6, 4096))
    reserve = reserve_for(machine, 1e-6)
    assert found["static"].cache_bytes == 8 * GIB - 512 * MIB - 2 * GIB - 256 * MIB - reserve - 2 * GIB
    assert found["elastic"].cache_bytes == found["static"].cache_bytes + 2 * GIB
    assert found["static"].context == found["static"].cache_bytes // LLM.bytes_per_token
    assert found["elastic"].context == 32768, "no longer than it was trained for"
    assert found["elastic"].beside_tokens == found["static"].context
    assert found["elastic"].sessions == found["elastic"].cache_bytes // LLM.bytes_per_token // 4096


def test_less_risk_takes_more_reserve_up_to_what_processors_can_touch() -> None:
    machine = Machine(2 * GIB, n_cpus=4)
    reserves = [reserve_for(machine, p) for p in (0.5, 1e-2, 1e-4, 1e-6, 1e-12)]
    assert reserves == sorted(reserves) and reserves[-1] == reserves[-2] == 0.05 * 4e9
    assert rate_exceeded_with(0.5, 4) == pytest.approx(100 * MIB)
    assert reserves[0] == 2 * GIB // 20, "the governor keeps more anyway"


def test_what_cannot_shrink_below_its_floor_does_not_fit() -> None:
    machine = Machine(3 * GIB, 0, 1 * GIB)
    found = by_kind(fits(LLM, "f16", machine, 1e-3, 4096))
    assert found["static"].context == found["elastic"].context == 0


def test_the_floor_is_that_of_the_simulated_caches() -> None:
    memory = Memory(simpy.Environment(), Board("8G", 8 * GIB))
    cache = SimCache(memory, memory.group("model"), LLM, 32768, elastic=True)
    cache.conversations["one"] = Conversation("one", 5000, 5000)
    engines = Engines(1, 2, 32768, LLM, Speed.on(memory.board, LLM))
    engines.held[0, 0] = 5000
    floor = cache.floor_tokens
    assert floor == engines.floor_tokens()[0] == Floor.of(LLM, cache.settings).of_a_long_one
    left = GIB // 2
    beside = room_beside(LLM, Machine(8 * GIB), 1e-3, floor)
    for neighbours, does_fit in ((beside, True), (beside + 1, False)):
        elastic = by_kind(fits(LLM, "f16", Machine(8 * GIB, 0, neighbours, neighbours - left), 1e-3, 4096))["elastic"]
        assert (elastic.context == floor + left // LLM.bytes_per_token) == does_fit == (elastic.context > 0)


@pytest.mark.parametrize("wrong", [0.0, 1.0, -1.0, float("nan")])
def test_a_risk_is_a_probability(wrong: float) -> None:
    with pytest.raises(UsageError, match="no probability"):
        reserve_for(Machine(GIB), wrong)


def test_presets_have_the_caches_that_their_makers_say() -> None:
    assert {name: llm.bytes_per_token // 1024 for name, llm in LLMS.items()} == {
        "1b": 32,
        "3b": 112,
        "7b": 512,
        "8b": 128,
        "13b": 800,
    }
    assert with_kv_type(LLMS["8b"], "q8_0").bytes_per_token == 128 * 1024 * 17 // 32
    assert {name for name, llm in LLMS.items() if llm.n_ctx_train == 4096} == {"7b", "13b"}, "Llama 2"
    with pytest.raises(UsageError, match="f16, q8_0"):
        with_kv_type(LLMS["8b"], "q3")


def test_a_file_says_what_its_cache_takes(default_model: Path) -> None:
    llm = llm_named(str(default_model))
    assert llm.bytes_per_token == 23040, "30 layers, 3 KV heads of 64, K and V, two bytes each"
    assert llm.weights_bytes == default_model.stat().st_size and llm.n_ctx_train == 8192


def test_the_command_explains_its_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "8b", "--memory", "8G", "--neighbours", "1G"]) == 0
    shown = capsys.readouterr().out
    assert "131072 B a token (f16)" in shown and "kept free" in shown and "elastic" in shown
    assert main(["plan", "8b", "--memory", "8G", "--neighbours", "1G", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(fit["kind"], fit["kv_type"]) for fit in document["fits"]] == [
        ("static", "f16"),
        ("elastic", "f16"),
        ("static", "q8_0"),
        ("elastic", "q8_0"),
    ]
    static, elastic, static_q8, _ = document["fits"]
    assert elastic["context"] > static["context"] and static_q8["context"] > static["context"]


def test_a_table_of_boards_and_models_says_for_which_neighbours_what_is_wanted_comes_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", "all", "--board", "pi5-8gb,vps-4gb", "--neighbours", "25%", "--quiet", "5%", "--want", "2048:8192"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "4096*" in shown and "pi5-8gb" in shown and "what others may have at most" in shown
    assert main([*words, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [(each["board"], each["model"]["name"]) for each in plans] == [
        (board, name) for board in ("pi5-8gb", "vps-4gb") for name in LLMS
    ]
    [pi_8b] = [each for each in plans if each["board"] == "pi5-8gb" and each["model"]["name"] == "8b"]
    most, least = pi_8b["neighbours_for"]["f16"]
    assert most - least == 6144 * 128 * 1024
    exact = Machine(pi_8b["machine"]["memory_bytes"], pi_8b["machine"]["system_bytes"], most, least, n_cpus=4)
    assert [fit.context for fit in fits(LLMS["8b"], "f16", exact, 1e-6, 4096)] == [2048, 8192]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["plan", "8b", "--memory", "lots"], "not a size"),
        (["plan", "9b"], "no model '9b'"),
        (["plan", "8b", "--p-kill", "2"], "no probability"),
        (["plan", "8b", "--quiet", "2G", "--neighbours", "1G"], "lower --quiet"),
        (["plan", "8b", "--session-tokens", "0"], "1 or more"),
        (["plan", "8b", "--board", "moon"], "presets are orin-nano-8gb"),
        (["plan", "8b", "--board", "all", "--memory", "4G"], "leave out --memory"),
        (["plan", "8b", "--want", "8192"], "2048:8192"),
        (["plan", "8b", "--want", "8192:2048"], "the smaller one first"),
        (["simulate", "--board", "moon"], "presets are orin-nano-8gb"),
        (["simulate", "--neighbours", "camera"], "camera:400M"),
        (["simulate", "--controllers", "best"], "Controllers are safe"),
        (["simulate", "--seeds", "0"], "--seeds 0"),
        (["simulate", "--controllers", "safe", "--neighbours", "camera:4G"], "Nothing is safe"),
        (["simulate", "--swap", "much"], "not a size"),
    ],
)
def test_wrong_words_are_one_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out_dir = ["--out-dir", str(tmp_path)] if arguments[0] == "simulate" else []
    assert main([*arguments, *out_dir]) == 2
    told = capsys.readouterr().err.strip()
    assert complaint in told and told.count("\n") == 0


def test_simulate_prints_a_table_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], default_model: Path
) -> None:
    words = ["simulate", "--memory", "600M", "--swap", "none", "-m", str(default_model), "--neighbours", "camera:150M"]
    words += ["--seeds", "2", "--seconds", "20", "--controllers", "static,kvpsi", "-j", "1", "--out-dir", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [line["controller"] for line in document["table"]] == ["static", "kvpsi"]
    assert {"kvpsi.runs_with_a_kill", "static.peak_mib"} <= {figure["name"] for figure in document["figures"]}
    assert document["safe_ctx"] > 0 and all(Path(path).exists() for path in document["raw"])
