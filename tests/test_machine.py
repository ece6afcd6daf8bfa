"""Rates of machines: this one's, measured and kept; cards by name; amounts of memory; the command that shows them."""

import json
import math
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from commands import called
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.errors import ResourceError, UsageError
from graft.planning import machine as module
from graft.planning.machine import (
    BANDWIDTH_SHARE,
    CARD_OVERHEAD,
    PRODUCT_SHARE,
    Machine,
    cards,
    free_memory,
    known,
    measured,
    parse_memory,
    total_memory,
)
from graft.train.precision import Precision

CPU = torch.device("cpu")
FORMATS = (torch.float32, torch.bfloat16)
NAMED = [
    "t4", "v100-16gb", "v100-32gb", "p100-16gb", "rtx-3060-12gb", "rtx-3090", "rtx-4060-ti-16gb", "rtx-4070",
    "rtx-4080", "rtx-4090", "rtx-5090", "a10", "a10g", "l4", "l40s", "a40", "rtx-a6000", "rtx-6000-ada",
    "a100-40gb", "a100-80gb", "h100-80gb", "h100-80gb-pcie", "h200", "b200", "mi250", "mi300x",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Few and small sizes: what is measured here are not the rates."""
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "_PRODUCTS", ((16, 16), (64, 64), (64, 128)))
    patch.setattr(module, "_MOVED", (1 << 12, 1 << 16))
    patch.setattr(module, "_ROUNDS", 2)
    patch.setattr(module, "keep_freed_memory", lambda: True)  # of the whole process, and for good
    time_once = module._time
    patch.setattr(module, "_time", lambda calls, device: time_once(calls, device, least=0.0005))
    yield
    patch.undo()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "machine.json"


@pytest.fixture
def counted(monkeypatch):
    """How often was measured, in a list."""
    calls = []
    measure = module._measure

    def counting(*given):
        calls.append(given)
        return measure(*given)

    monkeypatch.setattr(module, "_measure", counting)
    return calls


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """This machine."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield measured()
    patch.undo()


CURVED = Machine(
    name="made up",
    kind="cpu",
    memory=2**34,
    products={"fp32": ((1e6, 1e-4), (1e8, 1e-3), (1e10, 0.1)), "bf16": ((1e6, 1e-4), (1e10, 1e-2))},
    moves={"fp32": ((1e4, 1e-6), (1e8, 1e-2)), "bf16": ((1e4, 2e-6), (1e8, 2e-2))},
    overhead=1e-6,
    source="a test",
    precision=Precision(torch.float32, "a test"),
)


# Time of an operation ---------------------------------------------------------------------------------


def test_the_time_of_an_operation():
    """By hand: at a measured size its time, between two the power law, beyond the ends in proportion; the longer of
    arithmetic and bytes."""
    seconds = CURVED.seconds
    assert seconds(1e8, 0, torch.float32) == pytest.approx(1e-6 + 1e-3)
    assert seconds(1e7, 0, torch.float32) == pytest.approx(1e-6 + math.sqrt(1e-4 * 1e-3))
    assert seconds(1e11, 0, torch.float32) == pytest.approx(1e-6 + 1.0)
    assert seconds(1e5, 0, torch.float32) == pytest.approx(1e-6 + 1e-5)
    assert seconds(0, 1e8, torch.float32) == pytest.approx(1e-6 + 1e-2)
    assert seconds(1e8, 1e8, torch.float32) == pytest.approx(1e-6 + 1e-2)
    assert seconds(1e10, 1e8, torch.float32) == pytest.approx(1e-6 + 0.1)
    assert seconds(0, 0, torch.float32) == pytest.approx(1e-6)
    assert seconds(1e10, 0, torch.bfloat16) == pytest.approx(1e-6 + 1e-2)
    assert seconds(1e10, 0, torch.float16) == seconds(1e10, 0, torch.bfloat16)
    assert seconds(0, 1e8, torch.int64) == seconds(0, 1e8, torch.float32)
    assert CURVED.rate(torch.float32) == pytest.approx(1e11)
    assert CURVED.bandwidth == pytest.approx(1e10)


SIZES = st.floats(0, 1e15)


@settings(max_examples=300, deadline=None)
@given(SIZES, SIZES, SIZES, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64]))
def test_more_never_takes_less(here, one, other, third, dtype):
    low, high = sorted((one, other))
    for machine in (CURVED, here, known("a100-80gb"), known("t4")):
        within = 1 + 1e-9
        assert machine.seconds(low, third, dtype) <= machine.seconds(high, third, dtype) * within
        assert machine.seconds(third, low, dtype) <= machine.seconds(third, high, dtype) * within
        assert machine.overhead <= machine.seconds(low, high, dtype) < math.inf


def test_a_slow_moment_does_not_make_a_larger_size_quicker():
    assert module._rising({1.0: 5.0, 10.0: 3.0, 100.0: 7.0}) == ((1.0, 5.0), (10.0, 5.0), (100.0, 7.0))


# This machine -----------------------------------------------------------------------------------------


def test_the_rates_of_this_machine(here):
    assert here.name
    assert here.kind == "cpu"
    assert here.threads == torch.get_num_threads()
    assert here.cores >= 1
    assert here.memory == total_memory(CPU)
    assert here.source.startswith("measured on 20")
    assert here.precision.name in ("bf16", "fp32")
    for curves, count in ((here.products, 3), (here.moves, 2)):
        assert set(curves) == {"fp32", "bf16"}
        for curve in curves.values():
            assert len(curve) == count
            assert all(size > 0 and seconds > 0 for size, seconds in curve)
            assert all(a < b and fast <= slow for (a, fast), (b, slow) in pairwise(curve))
    assert 1e-7 < here.overhead < 1e-2
    for dtype in FORMATS:
        assert 1e6 < here.rate(dtype) < 1e15
    assert 1e6 < here.bandwidth < 1e14


def test_measured_once_and_kept(cache, counted):
    seen = []
    first = measured(watch=lambda phase, fraction: seen.append((phase, fraction)))
    assert cache.is_file()
    assert measured() == first
    assert len(counted) == 1
    assert len(seen) == 2 * 2 * (3 + 2)
    assert {phase for phase, _ in seen} == {
        f"measuring {p} in {f}" for p in ("products", "moves") for f in ("fp32", "bf16")
    }
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] < 1
    measured(again=True)
    assert len(counted) == 2


@pytest.mark.parametrize(
    "changed", [{"threads": 64}, {"cpu": "Another CPU"}, {"cores": 99}, {"torch": "9.9"}, {"device": "X"}]
)
def test_another_machine_is_measured_and_the_first_one_kept(changed, cache, counted, monkeypatch):
    first = measured()
    real = module.environment()
    monkeypatch.setattr(module, "environment", lambda: real | changed)
    measured()
    assert len(counted) == 2
    assert len(json.loads(cache.read_text())["machines"]) == 2
    monkeypatch.setattr(module, "environment", lambda: real)
    assert measured() == first
    assert len(counted) == 2


def _damage(text: str, kind: str) -> bytes:
    kept = json.loads(text)
    rates = next(iter(kept["machines"].values()))
    if kind == "cut":
        return text[: len(text) // 2].encode()
    if kind == "bytes":
        return b"\xff\xfe\x00"
    if kind == "list":
        return b"[]"
    if kind == "empty":
        return b""
    if kind == "number":
        kept["machines"] = 3
    if kind == "zero":
        rates["products"]["fp32"][0][1] = 0
    if kind == "infinite":
        rates["overhead"] = math.inf
    if kind == "text":
        rates["moves"]["bf16"][0][0] = "fast"
    if kind == "falling":
        rates["products"]["bf16"].reverse()
    if kind == "missing":
        del rates["moves"]["bf16"]
    if kind == "no points":
        rates["moves"]["bf16"] = []
    if kind == "triples":
        rates["moves"]["bf16"][0].append(1)
    return json.dumps(kept).encode()


KINDS = (
    "cut", "bytes", "list", "empty", "number", "zero", "infinite", "text", "falling", "missing", "no points", "triples",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_cache_is_measured_again_with_a_word(kind, cache, counted, capsys):
    measured()
    cache.write_bytes(_damage(cache.read_text(), kind))
    said = []
    second = measured(say=said.append)
    assert said == [f"{cache} is damaged: this machine is measured again"]
    assert len(counted) == 2
    assert measured(say=said.append) == second
    assert (len(counted), len(said)) == (2, 1)
    cache.write_text("{")
    measured()
    assert capsys.readouterr().err == f"{said[0]}\n"


def test_another_layout_is_no_damage(cache, counted):
    measured()
    cache.write_text(json.dumps({"layout": 0, "rates": []}))
    measured(say=pytest.fail)
    assert len(counted) == 2


def test_a_cache_that_cannot_be_written(cache, monkeypatch):
    def full(path, value):
        raise ResourceError(f"{path} cannot be written (No space left on device)", "free space")

    monkeypatch.setattr(module, "write_json", full)
    said = []
    assert measured(say=said.append).overhead > 0
    assert len(said) == 1
    assert said[0].startswith("the rates of this machine are not kept: ")


def test_what_would_take_long_is_left_out(monkeypatch):
    asked = []

    def slow(calls, device):
        asked.append(len(calls))
        return 1.0 if len(asked) % 2 else 2.0

    monkeypatch.setattr(module, "_LONGEST", 1.5)
    monkeypatch.setattr(module, "_time", slow)
    rates = module._measure(CPU, lambda phase, fraction: None)
    assert {len(curve) for curve in rates.products.values()} == {1}
    assert {len(curve) for curve in rates.moves.values()} == {1}


# Cards ------------------------------------------------------------------------------------------------


def test_every_card_is_complete():
    assert sorted(cards()) == sorted(NAMED)
    for name, card in cards().items():
        assert set(card) == {
            "title", "memory_gb", "fp32_tflops", "tf32_tflops", "bf16_tflops", "fp16_tflops", "bandwidth_gbs", "source",
        }  # fmt: skip
        assert len(card["source"]) > 20
        assert 12 <= card["memory_gb"] <= 192
        assert 8 <= card["fp32_tflops"] <= card["fp16_tflops"] <= 2300
        assert card["bf16_tflops"] in (None, card["fp16_tflops"])
        assert card["tf32_tflops"] is None or card["fp32_tflops"] <= card["tf32_tflops"] <= card["fp16_tflops"] * 0.51
        assert 280 <= card["bandwidth_gbs"] <= 8000
        machine = known(name)
        assert (machine.name, machine.kind, machine.cores) == (card["title"], "cuda", None)
        assert machine.memory == card["memory_gb"] * 2**30
        assert machine.rate(torch.float32) == pytest.approx(card["fp32_tflops"] * 1e12 * PRODUCT_SHARE)
        assert machine.bandwidth == pytest.approx(card["bandwidth_gbs"] * 1e9 * BANDWIDTH_SHARE)
        assert machine.overhead == CARD_OVERHEAD
        assert machine.source.startswith("estimate: ")
        assert card["source"] in machine.source
        assert machine.precision.name == ("fp32" if card["bf16_tflops"] is None else "bf16")
        assert card["title"] in machine.precision.reason
    assert {name for name in cards() if known(name).precision.name == "fp32"} == {
        "t4", "v100-16gb", "v100-32gb", "p100-16gb",
    }  # fmt: skip


def test_the_time_on_a_card():
    machine = known("a100-80gb")
    flops = 312e12 * PRODUCT_SHARE
    assert machine.seconds(flops, 0, torch.bfloat16) == pytest.approx(1 + CARD_OVERHEAD)
    assert machine.seconds(flops / 1000, 0, torch.bfloat16) == pytest.approx(1e-3 + CARD_OVERHEAD)
    assert machine.seconds(0, 2039e9 * BANDWIDTH_SHARE, torch.bfloat16) == pytest.approx(1 + CARD_OVERHEAD)
    assert machine.seconds(flops, 0, torch.float32) == pytest.approx(16, rel=1e-3)
    old = known("t4")
    assert old.seconds(1e12, 0, torch.bfloat16) == old.seconds(1e12, 0, torch.float32)


@pytest.mark.parametrize("name", ["A100-80GB", " a100 80gb ", "NVIDIA A100_80GB", "nvidia-a100-80gb"])
def test_a_card_however_it_is_written(name):
    assert known(name) == known("a100-80gb")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a100", "did you mean 'a100-40gb' or 'a100-80gb'?"),
        ("4090", "did you mean 'rtx-4090'?"),
        ("rtx4090", "did you mean 'rtx-4090'?"),
        ("h20", "did you mean 'h200'?"),
        ("zzz", "known: a10, a100-40gb, "),
        ("", "known: a10, a100-40gb, "),
    ],
)
def test_an_unknown_card(name, said):
    with pytest.raises(UsageError) as caught:
        known(name)
    assert said in caught.value.remedy
    assert "\n" not in str(caught.value)


# Memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16GB", 16 * 2**30),
        ("16gb", 16 * 2**30),
        (" 16 GiB ", 16 * 2**30),
        ("1.5GB", 3 * 2**29),
        (".5TB", 2**39),
        ("900MB", 900 * 2**20),
        ("900 MiB", 900 * 2**20),
        ("2TiB", 2**41),
        ("0.001GB", 1073742),
    ],
)
def test_an_amount_of_memory(text, expected):
    assert parse_memory(text) == expected


@settings(deadline=None)
@given(st.integers(1, 2**17), st.sampled_from(["MB", "GB", "mib", "GiB"]), st.sampled_from(["", " "]))
def test_every_amount_is_read(number, unit, between):
    factor = 2**20 if unit[0] in "mM" else 2**30
    assert parse_memory(f"{number}{between}{unit}") == number * factor


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("16", "'16' has no unit; write 16GB or 16MB"),
        ("0.5", "'0.5' has no unit; write 0.5GB or 0.5MB"),
        ("16 XB", "'XB' is no unit of memory"),
        ("16G", "'G' is no unit of memory"),
        ("-4GB", "no amount of memory; write a number and a unit, as in 16GB"),
        ("", "no amount"),
        ("GB", "no amount"),
        ("nanGB", "no amount"),
        ("1e3GB", "no amount"),
        ("1,5GB", "no amount"),
        ("16GB 4GB", "no amount"),
        ("٣GB", "no amount"),
        ("0GB", "no memory that a machine has"),
        ("0.0000000001MB", "no memory that a machine has"),
        ("9" * 400 + "GB", "no memory that a machine has"),
        ("99999999TB", "no memory that a machine has"),
        ("x\ny" * 50, "no amount"),
    ],
)
def test_no_amount_of_memory(text, said):
    with pytest.raises(UsageError) as caught:
        parse_memory(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_an_amount_or_refused(text):
    with suppress(UsageError):
        assert 1 <= parse_memory(text) < 2**60


def _tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n"}
V2 = "sys/fs/cgroup/box"
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 5000 * 1024),
        ({"proc/self/cgroup": "0::/box\n"}, 5000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/box\n",
                f"{V2}/memory.max": "3000000\n",
                f"{V2}/memory.current": "2500000\n",
                f"{V2}/memory.stat": "anon 5\ninactive_file 500000\n",
            },
            1000000,
        ),
        (
            {
                "proc/self/cgroup": "0::/box/inner\n",
                f"{V2}/inner/memory.max": "max\n",
                f"{V2}/inner/memory.current": "1\n",
                f"{V2}/memory.max": "3000000\n",
                f"{V2}/memory.current": "3500000\n",
                f"{V2}/memory.stat": "anon 5\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "0::/box\n",
                f"{V2}/memory.max": "99000000000\n",
                f"{V2}/memory.current": "1\n",
                f"{V2}/memory.stat": "\n",
            },
            5000 * 1024,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/x\n7:memory,other:/docker/abc\n1:name=systemd:/\n",
                f"{V1}/memory.limit_in_bytes": "4000000\n",
                f"{V1}/memory.usage_in_bytes": "3000000\n",
                f"{V1}/memory.stat": "inactive_file 1\ntotal_inactive_file 200000\n",
            },
            1200000,
        ),
        (
            {
                "proc/self/cgroup": "7:memory:/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "3000000\n",
                f"{V1}/memory.stat": "",
            },
            5000 * 1024,
        ),
    ],
)
def test_free_memory(files, expected, tmp_path):
    _tree(tmp_path, MEMINFO | files)
    assert free_memory(root=tmp_path) == expected


def test_free_memory_without_a_kernel_that_tells(tmp_path):
    assert free_memory(root=tmp_path) > 2**20


def test_the_memory_of_this_machine():
    assert 2**20 < free_memory() <= total_memory(CPU)
    assert free_memory(CPU) > 2**20


# The command ------------------------------------------------------------------------------------------


@pytest.fixture
def graft(monkeypatch, capsys):
    """Runs `graft hardware` in this process, 80 columns wide; its exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "80")

    return lambda *args: called(monkeypatch, capsys, "hardware", *args)


def test_the_table_of_this_machine(graft, cache, counted):
    code, out, err = graft()
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    for part in ("machine", "GiB free", "number format", "matrix products", "element-wise, MiB", "µs an operation"):
        assert part in out
    assert out.count("Gflop/s") + out.count("Tflop/s") >= 2 * 3
    assert "measured on 20" in out
    graft()
    assert len(counted) == 1
    graft("--again")
    assert len(counted) == 2


def test_the_figures_of_this_machine(graft, cache):
    code, out, err = graft("--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    machine = measured()
    assert figures["memory_bytes"] == machine.memory
    assert 0 < figures["free_memory_bytes"] <= machine.memory
    assert figures["flops_per_second"] == {"fp32": machine.rate(torch.float32), "bf16": machine.rate(torch.bfloat16)}
    assert len(figures["products"]) == 3
    size, seconds = machine.products["fp32"][0]
    assert figures["products"][0]["flops"] == size
    assert figures["products"][0]["fp32"] == pytest.approx(size / seconds)
    assert len(figures["moves"]) == 2
    assert figures["precision"] == machine.precision.name


def test_the_table_bears_a_size_that_was_left_out(monkeypatch):
    from graft.cli import hardware

    rows = hardware._rows(CURVED.products)
    assert [set(rates) for _, rates in rows] == [{"fp32", "bf16"}, {"fp32"}, {"fp32", "bf16"}]
    table = hardware._curves(
        "product", [{"flops": size} | rates for size, rates in rows], "flops", 1e9, hardware._flops
    )
    assert list(table.columns[2].cells) == ["10.0 Gflop/s", "–", "1.0 Tflop/s"]


@pytest.mark.parametrize("name", NAMED)
def test_the_table_of_a_card(name, graft, counted):
    code, out, err = graft("--device", name)
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert cards()[name]["title"] in out
    assert "estimate: 45% of the product rates" in out
    assert not counted


def test_the_figures_of_a_card(graft, counted):
    code, out, err = graft("--device", "H100-80GB", "--json")
    figures = json.loads(out)
    assert (code, err, figures["kind"], figures["precision"]) == (0, "", "cuda", "bf16")
    assert figures["flops_per_second"]["bf16"] == pytest.approx(989.5e12 * PRODUCT_SHARE)
    assert figures["products"] == []
    assert not counted


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--device", "a100"), "did you mean 'a100-40gb' or 'a100-80gb'?"),
        (("--device", ""), "'' is no known device; known: "),
        (("--device", "t4", "--again"), "--again has no use beside --device"),
    ],
)
def test_a_device_that_is_not_known(args, said, graft, counted):
    code, out, err = graft(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("graft: ")
    assert said in err
    assert not counted


def test_the_machine_can_be_changed_by_a_caller():
    assert replace(CURVED, memory=2**30).memory == 2**30
