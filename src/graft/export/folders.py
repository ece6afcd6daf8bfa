"""Adapter folders for peft: the run's own, where peft has the method, read again by Graft and by peft."""

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.errors import DamagedError, UsageError
from graft.export.origin import Origin, public_name
from graft.export.probes import probe_rows
from graft.files import sha256_of, write_json
from graft.merge import NAME, Watch
from graft.methods import store
from graft.methods.base import Method, method_of
from graft.methods.peft import load_peft
from graft.model import Base, load_base, locate
from graft.objectives.classify import LabelledExample, collate
from graft.parts.attach import detach
from graft.parts.head import TaskHead, adapter_head, scores

TOLERANCE = 1e-4
"""Largest difference allowed between outputs of Graft and of peft in fp32, relative to the largest output (at least
1): adapters that compute the same differ by 1e-6."""

_FILES = ("adapter_model.safetensors", "adapter_config.json", "graft.json", "README.md")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", store.TEMPLATE)


def check_peft_type(folder: Path, rank: int | None) -> None:
    """Raise `UsageError` where peft cannot load an adapter folder, or would compute something else with it.

    With a `rank`, DyLoRA becomes LoRA, which it can.
    """
    method, kind = store.method_class(folder), _config(folder).get("peft_type", "")
    if rank is not None and method.ranks is Method.ranks:
        raise UsageError(f"rank {rank}: {method.name} has no ranks to choose from", "leave the rank out")
    if rank is not None or not str(kind).startswith("GRAFT_"):
        return
    remedy = "use --to hf, which writes it into its base" if method.mergeable else "use it with Graft: `graft chat`"
    if method.ranks is not Method.ranks:
        raise UsageError(
            f"peft has no {method.name}", "give --rank, at which it is a LoRA that peft has, or use --to hf"
        )
    if method.peft_type.startswith("GRAFT_"):
        raise UsageError(f"peft has no {method.name}", remedy)
    raise UsageError(
        f"peft has {method.name}, but at these places or with this task head it would compute something else", remedy
    )


def export_peft(origin: Origin, work: Path, rank: int | None, tell: Watch) -> dict[str, Any]:
    """Put an adapter into the folder `work` as peft reads it; returns what was checked.

    Raises `DamagedError` when Graft or peft, reading it, do not compute what the run's own adapter does.
    """
    assert origin.adapter is not None
    tell("loading the base", 0.0)
    base = load_base(origin.model)
    tell("loading the adapter", 0.3)
    adapter = store.load(base, origin.adapter, NAME)
    if rank is not None:
        method_of(adapter).use_rank(adapter, rank)
    rows = _rows(base)
    expected = _outputs(base, rows)
    if rank is None:
        for name in (*_FILES, *_TOKENIZER):
            if (origin.adapter / name).is_file():
                shutil.copyfile(origin.adapter / name, work / name)
    else:
        store.save(adapter, base, work / "adapter", template=store.template_of(origin.adapter))
        for path in (work / "adapter").iterdir():
            path.replace(work / path.name)
        (work / "adapter").rmdir()
    config = _config(work)
    # peft would ask a hub for a name that is the user's folder.
    write_json(work / "adapter_config.json", config | {"base_model_name_or_path": public_name(origin.model)})
    detach(base, NAME)
    tell("reading what was written", 0.5)
    again = store.load(base, work, NAME)
    head = adapter_head(again)
    apart = _apart(expected, _outputs(base, rows))
    _check(apart, "Graft")
    detach(base, NAME)
    checks: dict[str, Any] = {"rows": len(rows), "difference": apart, "sha256": sha256_of(work / _FILES[0])}
    tell("reading it with peft", 0.7)
    theirs = _by_peft(base, work, rows, head, origin.model)
    if theirs is not None:
        checks["difference_in_peft"] = _apart(expected, theirs)
        _check(checks["difference_in_peft"], "peft")
    return checks


def _check(difference: float, reader: str) -> None:
    if not difference <= TOLERANCE:
        raise DamagedError(
            f"read by {reader}, the exported adapter's outputs differ by {difference:.3g} from the run's, "
            f"{TOLERANCE:g} is allowed",
            "please report this",
        )


def _config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; `store.method_class` has told its faults before."""
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def _rows(base: Base) -> list[dict[str, Tensor]]:
    """The probes as batches of one row each."""
    return [collate(base, [LabelledExample(ids, None, 0, "")]) for ids in probe_rows(base, None)]


@torch.no_grad()
def _outputs(base: Base, rows: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Scores of labels [1, labels] or hidden states [S, d] of each row."""
    if adapter_head(base.adapters[NAME]) is not None:  # type: ignore[arg-type]
        return [scores(base, row, NAME).float() for row in rows]
    with base.route(NAME):
        return [base.hidden(row).last[0].float() for row in rows]


@torch.no_grad()
def _by_peft(
    base: Base, folder: Path, rows: Sequence[dict[str, Tensor]], head: TaskHead | None, model: str
) -> list[Tensor] | None:
    """The same from peft; None where it is not installed. `base` is of no use afterwards."""
    try:
        peft = load_peft()
    except UsageError:
        return None
    if head is None:
        host: Any = base.model
    else:
        from transformers import AutoModelForSequenceClassification

        host = AutoModelForSequenceClassification.from_pretrained(
            locate(model), num_labels=len(head.labels), dtype=torch.float32, use_safetensors=True
        )
        host.config.pad_token_id = base.tokenizer.pad_token_id if base.tokenizer is not None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings and of deprecated names inside transformers
        wrapped = peft.PeftModel.from_pretrained(host, str(folder)).eval()
    taken = getattr(wrapped.active_peft_config, "num_virtual_tokens", None) or 0
    if str(wrapped.active_peft_config.peft_type).endswith("PREFIX_TUNING"):
        taken = 0  # a prefix is keys and values, no position of the output
    found = []
    for row in rows:
        more: dict[str, Any] = {} if head is not None else {"output_hidden_states": True}
        if base.family.kind == "encoder-decoder":
            ids = row["input_ids"]
            more["decoder_input_ids"] = torch.cat([base.first_decoder_ids(ids), ids[:, :-1]], dim=1)
        output = wrapped(**row, **more)
        if head is not None:
            found.append(output.logits.float())
        elif base.family.kind == "encoder":
            found.append(output.last_hidden_state[0, taken:].float())
        elif base.family.kind == "encoder-decoder":
            found.append(output.decoder_hidden_states[-1][0].float())
        else:
            found.append(output.hidden_states[-1][0, taken:].float())
    return found


def _apart(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest value (at least 1); infinite where shapes differ."""
    worst = 0.0
    for then, now in zip(expected, found, strict=True):
        if then.shape != now.shape or not bool(torch.isfinite(now).all()):
            return float("inf")
        worst = max(worst, float((then - now).abs().max()) / max(1.0, float(then.abs().max())))
    return worst
