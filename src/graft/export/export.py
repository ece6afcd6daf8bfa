"""A run, an adapter or a base becomes what another program loads, and counts only after it was read again."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from graft import __version__
from graft.errors import DamagedError, NotMergeable, UsageError, nearest
from graft.export.folders import check_peft_type, export_peft
from graft.export.gguffile import QUANTS
from graft.export.llamacpp import Wanted, export_gguf
from graft.export.origin import MANIFEST, Origin, check_room, check_target, origin_of, public_name
from graft.files import folder_bytes, sha256_of, whole_folder, write_json
from graft.gguf import check_package
from graft.merge import Watch, check_method, merge_run
from graft.methods import store
from graft.model import locate

Kind = Literal["hf", "peft", "gguf", "ollama"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""A model folder of transformers, an adapter folder of peft, a file of llama.cpp, that file with a Modelfile."""

_DTYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
"""Number formats of model folders, by GGUF's names for them."""

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "gguf", "peft")


def export_run(
    run: str,
    to: str,
    output: Path | str | None = None,
    *,
    quant: str | None = None,
    rank: int | None = None,
    model: str | None = None,
    original: bool = False,
    force: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Write what `run` names (a finished run, an adapter folder with its base `model`, or for GGUF a base) to the
    folder `output` (by default `exports/NAME-KIND`), whole or not at all, and return its manifest.

    `quant` is the number format of matrices: one of `QUANTS`, for `hf` without the q ones; `rank` is for methods that
    have ranks; `original` merges an adapter that was trained on a quantized base into that base as it was before;
    `force` replaces an earlier export.

    Raises `UsageError` (also `NotMergeable`) for what cannot be exported in that form, before anything is computed,
    `ResourceError` where there is no room, and `DamagedError` when the export, read again, does not compute what it
    should: it is then kept beside as `output`.rejected.
    """
    tell = watch or (lambda phase, share: None)
    if to not in KINDS:
        raise UsageError(f"--to {to!r} is not known", nearest(to, KINDS))
    origin = origin_of(run, model)
    _check_kind(origin, to, quant, rank, original)
    quant = quant or ("f16" if to in ("gguf", "ollama") else None)
    suffix = f"-{quant}" if to in ("gguf", "ollama") else ""
    given = Path(output) if output is not None else Path("exports") / f"{origin.name}-{to}{suffix}"
    folder = given.resolve()
    place = Path(locate(origin.model))
    kept = (origin.holder, place if place.is_dir() else None)
    check_target(folder, given, force, *kept)
    rejected = folder.with_name(f"{folder.name}.rejected")
    before = rejected.stat().st_ino if rejected.exists() else None
    try:
        with whole_folder(folder, rejected) as work:
            if to == "hf":
                found = _hf(origin, run, work, quant, rank, original, tell)
            elif to == "peft":
                found = {"checks": export_peft(origin, work, rank, tell)}
            else:
                assert quant is not None
                found = export_gguf(origin, work, Wanted(quant, rank, original, to == "ollama"), tell)
            manifest = _manifest(origin, to, quant, rank, work) | found
            write_json(work / MANIFEST, manifest)
            check_target(folder, given, force, *kept)  # again: it took a while
    except DamagedError as error:
        kept_now = rejected.exists() and rejected.stat().st_ino != before
        where = f"; it is kept in {given}.rejected" if kept_now else ""
        raise DamagedError(f"{error.message}{where}", error.remedy) from None
    tell("done", 1.0)
    return {"folder": str(given), "bytes": folder_bytes(folder)} | manifest


def _check_kind(origin: Origin, to: str, quant: str | None, rank: int | None, original: bool) -> None:
    """Raise `UsageError` for what cannot be had in a form, from the adapter's folder alone."""
    allowed: Sequence[str] = {"hf": tuple(_DTYPES), "peft": ()}.get(to, QUANTS)
    if quant is not None and quant not in allowed:
        if not allowed:
            raise UsageError("--quant is for models; an adapter folder keeps the numbers it has", "leave --quant out")
        raise UsageError(f"--quant {quant!r} is not known for --to {to}", f"known: {', '.join(allowed)}")
    if to in ("gguf", "ollama"):
        check_package("a GGUF file")
    if origin.adapter is None:
        if to in ("hf", "peft"):
            raise UsageError(f"{origin.given} is a base, without an adapter to export", "give a run, or use --to gguf")
        if rank is not None or original:
            raise UsageError(f"{origin.given} is a base, without an adapter", "leave --rank and --original out")
        return
    method = store.method_class(origin.adapter)
    if to == "peft":
        check_peft_type(origin.adapter, rank)
        return
    try:
        check_method(method, rank)
    except NotMergeable as error:
        more = "" if method.peft_type.startswith("GRAFT_") else "export it with --to peft, or "
        raise NotMergeable(error.message, more + error.remedy) from None
    if original and store.quantized_from(origin.adapter) is None:
        raise UsageError(
            f"{origin.given} was not trained on a quantized base, so there is one base only", "leave --original out"
        )


def _hf(
    origin: Origin, run: str, work: Path, quant: str | None, rank: int | None, original: bool, tell: Watch
) -> dict[str, Any]:
    """A model folder in `work`, by `merge_run`."""
    place = Path(locate(origin.model))
    if place.is_dir():
        check_room(work, 2 * sum(path.stat().st_size for path in place.glob("*.safetensors")))
    dtype = None if quant is None else _DTYPES[quant]
    made = work / "model"
    result = merge_run(
        run, made, rank=rank, dtype=dtype, model=origin.model, original=original, rejected=work / "rejected",
        watch=tell,
    )  # fmt: skip
    for path in made.iterdir():
        path.replace(work / path.name)
    made.rmdir()
    named = ("class", "load_with", "dtype", "pooling", "labels")
    return {
        "rank": result["rank"],
        "model": {key: result[key] for key in named},
        "checks": {
            key: result[key]
            for key in (
                *("largest_difference", "tolerance", "compared", "positions", "same_best", "difference_from_trained"),
                "merged_into",
            )
            if key in result
        },
    }


def _manifest(origin: Origin, to: str, quant: str | None, rank: int | None, work: Path) -> dict[str, Any]:
    """Where an export is from: names without private folders, sums of files, versions."""
    source: dict[str, Any] = {"name": origin.name, "base": public_name(origin.model)}
    if origin.adapter is not None:
        folder = origin.adapter
        told = store.about_of(folder)
        source |= {
            "method": store.method_class(folder).name,
            "adapter_sha256": sha256_of(folder / "adapter_model.safetensors"),
            "base_fingerprint": told.get("base", {}).get("fingerprint"),
            "template_sha256": told.get("template", {}).get("sha256"),
        }
    files = {
        str(path.relative_to(work)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(work.rglob("*"))
        if path.is_file()
    }
    return {
        "kind": to,
        "quant": quant,
        "rank": rank,
        "source": source,
        "files": files,
        "graft_version": __version__,
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def exported_lines(manifest: dict[str, Any]) -> list[str]:
    """What `export_run` gives, in sentences."""
    folder, kind, checks = manifest["folder"], manifest["kind"], manifest["checks"]
    lines = [
        f"{kind}: {folder}, {manifest['bytes'] / 1e6:,.1f} MB, read again and compared ({MANIFEST} has the figures)"
    ]
    if kind == "hf":
        lines.append(
            f"outputs differ from the attached adapter's by {checks['largest_difference']:.2g} "
            f"(allowed: {checks['tolerance']:g}){_agreed(checks.get('same_best'), checks.get('positions', 0))}"
        )
        lines.append(f"load it with {manifest['model']['load_with']}.from_pretrained({folder!r})")
    elif kind == "peft":
        by = "Graft and peft" if "difference_in_peft" in checks else "Graft (peft is not installed)"
        worst = max(checks["difference"], checks.get("difference_in_peft", 0.0))
        lines.append(f"read by {by}, its outputs differ from the run's by {worst:.2g}")
    else:
        far = checks["file_and_model"]
        lines.append(
            f"scores differ from the model's by {far['largest']:.2g} at most (from those of the model with its weights "
            f"rounded as in the file by {checks['file_and_rounded']['largest']:.2g}), their divergence is "
            f"{far['kl']:.2g} nats{_agreed(far['top1'], far['positions'])}"
        )
        file = next(name for name in manifest["files"] if name.endswith(".gguf"))
        run = f"ollama create NAME -f {folder}/Modelfile" if kind == "ollama" else f"llama-cli -m {folder}/{file}"
        lines.append(f"use it with: {run}")
    return lines + [f"note: {note}" for note in manifest.get("notes", ())]


def _agreed(share: float | None, positions: int) -> str:
    return "" if share is None else f", the likeliest token is the same at {share:.1%} of {positions} positions"
