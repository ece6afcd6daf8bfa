"""Which number format `precision: auto` takes on which processor."""

import pytest
import torch

from graft.train import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "units", "expected", "why"),
    [
        ("AMD EPYC 9B45", {"avx512_bf16"}, "bf16", "AVX512-BF16"),
        ("Intel(R) Xeon(R) Processor", {"avx512_bf16"}, "fp32", "no AMX"),
        ("Intel(R) Xeon(R) Processor", {"avx512_bf16", "amx_bf16"}, "bf16", "AMX"),
        ("Intel(R) Xeon(R) Gold 6230", set(), "fp32", "no bf16 units"),
        ("Neoverse-V2", set(), "fp32", "no bf16 units"),
    ],
)
def test_bf16_where_it_is_faster(name, units, expected, why, monkeypatch):
    monkeypatch.setattr(precision, "cpu_name", lambda: name)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
    chosen = precision.choose("auto", CPU)
    assert chosen.name == expected
    assert why in chosen.reason
    assert precision.choose("bf16", CPU).name == "bf16"
    assert precision.choose("fp32", CPU).name == "fp32"
