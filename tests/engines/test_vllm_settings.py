"""What users ask for with variables, and which vLLM is refused."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpsi.engines.vllm import supported
from kvpsi.engines.vllm.plugin import platform
from kvpsi.engines.vllm.settings import is_asked_for, refuse_taken_ports, refuse_vllms_port, settings_from
from kvpsi.engines.vllm.supported import refuse_cache, refuse_unsupported, refuse_version
from kvpsi.errors import UsageError
from kvpsi.governor import AdaptSettings
from kvpsi.governor.shares import ShareSettings

MIB = 1 << 20


def test_nothing_asked_for_is_the_default() -> None:
    settings = settings_from({})
    assert settings.law.low_bytes is None and settings.adapt is None and settings.cache_limit == 1.0
    assert settings.log is None and settings.status_port == 0


def test_variables_have_the_names_of_the_options_of_the_server() -> None:
    asked = {
        "KVPSI_RESERVE": "64M",
        "KVPSI_REGROW_ABOVE": "128M",
        "KVPSI_CACHE_LIMIT": "70%",
        "KVPSI_LOG": "/tmp/decisions.jsonl",
        "KVPSI_STATUS_PORT": "9100",
        "KVPSI_LAW": "calm_hold_s=1",
        "KVPSI_ADAPT": "1",
        "KVPSI_SHARE_WEIGHT": "2",
        "KVPSI_SHARE_PRIORITY": "-1",
        "KVPSI_SHARE_DIR": "none",
    }
    settings = settings_from(asked)
    assert (settings.law.low_bytes, settings.law.high_bytes) == (64 * MIB, 128 * MIB)
    assert settings.law.calm_hold_s == 1 and settings.adapt == AdaptSettings(fixed=("calm_hold_s",))
    assert settings.cache_limit == 0.7
    assert settings.share == ShareSettings(2.0, -1, folder="none")
    assert settings.log == Path("/tmp/decisions.jsonl") and settings.status_port == 9100


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("KVPSI_RESERVE", "much"),
        ("KVPSI_REGROW_ABOVE", "-1"),
        ("KVPSI_CACHE_LIMIT", "170%"),
        ("KVPSI_LAW", "speed=3"),
        ("KVPSI_LAW", "grow_share=5"),
        ("KVPSI_STATUS_PORT", "70000"),
        ("KVPSI_STATUS_PORT", "http"),
        ("KVPSI_SHARE_WEIGHT", "double"),
        ("KVPSI_SHARE_WEIGHT", "-1"),
        ("KVPSI_ADAPT", "maybe"),
        ("KVPSI_SHARE_PRIORITY", "0.5"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=name):
        settings_from({name: text})


def test_growing_below_the_reserve_is_refused() -> None:
    with pytest.raises(UsageError, match="KVPSI_REGROW_ABOVE"):
        settings_from({"KVPSI_RESERVE": "64M", "KVPSI_REGROW_ABOVE": "32M"})


def test_the_plugin_is_asleep_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVPSI_VLLM", raising=False)
    assert platform() is None
    for yes in ("1", "true", "Yes"):
        monkeypatch.setenv("KVPSI_VLLM", yes)
        assert platform() == "kvpsi.engines.vllm.platform.ElasticCpuPlatform"
    monkeypatch.setenv("KVPSI_VLLM", "0")
    assert platform() is None
    monkeypatch.setenv("KVPSI_VLLM", "perhaps")
    assert platform() is not None, "vLLM hides what a plugin raises"
    with pytest.raises(UsageError, match="KVPSI_VLLM is perhaps"):
        is_asked_for()


def test_empty_variables_are_not_set() -> None:
    names = (
        "KVPSI_RESERVE",
        "KVPSI_CACHE_LIMIT",
        "KVPSI_STATUS_PORT",
        "KVPSI_SHARE_WEIGHT",
        "KVPSI_LOG",
        "KVPSI_ADAPT",
    )
    assert settings_from(dict.fromkeys(names, "")) == settings_from({})


def test_sentences_name_variables_and_no_options(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^KVPSI_RESERVE: ") as refused:
        settings_from({"KVPSI_RESERVE": "lots"})
    assert "--" not in str(refused.value)
    for log in (tmp_path, tmp_path / "nowhere" / "log"):
        with pytest.raises(UsageError, match="KVPSI_LOG"):
            settings_from({"KVPSI_LOG": str(log)})


def test_vllms_own_port_is_refused() -> None:
    for arguments in ([], ["serve", "--port", "8000"], ["--port=9000", "--port=8000"]):
        with pytest.raises(UsageError, match="KVPSI_STATUS_PORT: it is 8000"):
            refuse_vllms_port(range(8000, 8001), arguments)
    refuse_vllms_port(range(0), [])
    refuse_vllms_port(range(8000, 8001), ["--port", "8001"])
    with pytest.raises(UsageError, match="engines take 8000 to 8001"):
        refuse_vllms_port(range(8000, 8002), ["--port", "8001"])


def test_ports_that_are_taken_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"KVPSI_STATUS_PORT: port {taken} is taken"):
            refuse_taken_ports(range(taken, taken + 1))
    refuse_taken_ports(range(taken, taken + 1))
    refuse_taken_ports(range(0))


def test_variables_that_mean_nothing_here_are_told() -> None:
    asked = {
        "KVPSI_RESERVES": "64M",
        "KVPSI_MEMORY": "4G",
        "KVPSI_LOG": "/tmp/log",
        "KVPSI_CACHE_DIR": "/tmp",
        "HOME": "/",
    }
    assert settings_from(asked).unknown == ("KVPSI_MEMORY", "KVPSI_RESERVES")


@pytest.mark.parametrize("version", ["", "0.31.2", "0.33.0", "1.0", "0.3.2"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(UsageError, match="or start vLLM without"):
        refuse_version(version)


def test_one_for_gpus_is_refused() -> None:
    with pytest.raises(UsageError, match="built for something else"):
        refuse_version("0.32.0+cu129")
    with pytest.raises(UsageError, match="built for something else"):
        refuse_version("0.32.0")


@pytest.mark.parametrize("version", ["0.32.0+cpu", "0.32.1+cpu"])
def test_tested_versions_are_not(version: str) -> None:
    refuse_version(version)


def config(**changes: Any) -> Any:
    values = {"kv_transfer_config": None, "speculative_config": None, "pipeline_parallel_size": 1, "async": False}
    values["watermark"] = 0.0
    values.update(changes)
    return SimpleNamespace(
        kv_transfer_config=values["kv_transfer_config"],
        speculative_config=values["speculative_config"],
        parallel_config=SimpleNamespace(pipeline_parallel_size=values["pipeline_parallel_size"]),
        scheduler_config=SimpleNamespace(async_scheduling=values["async"], watermark=values["watermark"]),
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_transfer_config": object()}, "KV transfer"),
        ({"speculative_config": object()}, "speculative"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"async": True}, "--async-scheduling"),
        ({"watermark": 0.1}, "--watermark"),
    ],
)
def test_ways_to_use_blocks_that_are_not_known_are_refused(
    changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supported, "installed_version", lambda: "0.32.0+cpu")
    refuse_unsupported(config())
    with pytest.raises(UsageError, match=named):
        refuse_unsupported(config(**changes))


def test_blocks_of_several_kinds_are_refused() -> None:
    refuse_cache(SimpleNamespace(kv_cache_groups=[object()]))
    with pytest.raises(UsageError, match="2 kinds"):
        refuse_cache(SimpleNamespace(kv_cache_groups=[object(), object()]))
