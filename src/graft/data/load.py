"""Data for a run: rows of starter data or of the user's files, divided into train, validation and test."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from graft import assets
from graft.config import Config
from graft.data.files import read_records
from graft.data.rows import FIELDS, Row, make_rows
from graft.errors import DamagedError, DataError, nearest
from graft.files import sha256_of
from graft.splits import group_near_equal, hash_of, normal_form, split_by_group

__all__ = ["DataConfig", "Row", "Splits", "load_splits", "read_all", "read_rows", "subset"]


class DataConfig(Config):
    """Where the rows come from and how they are divided."""

    aliases: ClassVar[dict[str, str]] = {
        "max_seq_length": "max_length",
        "cutoff_len": "max_length",
        "sequence_len": "max_length",
        "val_set_size": "val_size",
        "val_split": "val_size",
    }

    train: str = Field(min_length=1)
    """Rows to train on: a starter data set or a .jsonl, .json, .csv or .tsv file."""
    validation: str | None = None
    """Rows to choose settings by; without it the starter's own or a share of the training file."""
    test: str | None = None
    """Rows to report the result on; without it the starter's own or a share of the training file."""
    val_size: float = Field(0.05, gt=0, lt=1)
    """Share of the training file that becomes validation rows when `validation` is not given."""
    test_size: float = Field(0.15, gt=0, lt=1)
    """Share of the training file that becomes test rows when `test` is not given."""
    columns: dict[str, str] = Field({})
    """The file's names of text, text_pair, label and id where they differ, as in `text: sentence`."""
    max_train_samples: int | None = Field(None, ge=2)
    """Train on a fixed subset of at most this many rows."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Evaluate on a fixed subset of at most this many rows of validation and of test."""
    max_length: int = Field(128, ge=4, le=1_000_000)
    """Tokens per row; longer rows are cut."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.val_size + self.test_size >= 1:
            raise ValueError(
                f"val_size and test_size are {self.val_size:g} and {self.test_size:g}: "
                "their sum has to be below 1 so that training rows are left"
            )
        for name in self.columns:
            if name not in FIELDS:
                raise ValueError(f"columns: unknown field {name!r}, {nearest(name, FIELDS)}")
        return self


@dataclass(frozen=True)
class Splits:
    """The rows of a run. `labels` are sorted; `sha256` has the hash of every file that was read.

    `notes` has a sentence for everything that is allowed but spoils a comparison.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...]
    sha256: dict[str, str]
    notes: tuple[str, ...] = ()


def read_rows(source: str, columns: Mapping[str, str] | None = None, need_label: bool = False) -> list[Row]:
    """The rows of a starter data set (all that have a label) or of a file.

    A file without a label column gives rows without labels unless `need_label`.
    Raises `DataError` naming the file and line of the first fault.
    """
    if _is_starter(source):
        return [row for row in read_all(source) if row.label is not None]
    records = read_records(Path(source).expanduser())
    return make_rows(records, dict(columns or {}), need_label)


def read_all(name: str) -> list[Row]:
    """Every row of a starter data set in the original order; neutral rows have the label None."""
    if not _is_starter(name):
        raise DataError(f"{name!r} is no starter data set", f"starter data: {', '.join(_starters())}")
    return _starter_rows(name, "all")


def load_splits(config: DataConfig) -> Splits:
    """The rows of a run, checked.

    Raises `DataError` for a row without label, a training set of one label, a label that training
    rows do not have, a split without rows and a file that is given for training and evaluation.
    """
    sha256: dict[str, str] = {}
    whole = _is_starter(config.train)
    train = _part(config.train, "train", config, sha256)
    given = {
        name: _part(source or config.train, name, config, sha256)
        for name, source in (("validation", config.validation), ("test", config.test))
        if source or whole
    }
    _refuse_training_file(config, sha256)
    parts = _split_off(config, train, given)
    labels = _check_labels(parts, config)
    return Splits(
        train=subset(parts["train"], config.max_train_samples),
        validation=subset(parts["validation"], config.max_eval_samples),
        test=subset(parts["test"], config.max_eval_samples),
        labels=labels,
        sha256=sha256,
        notes=_notes(parts),
    )


def _starters() -> list[str]:
    return sorted(name for name, asset in assets.ASSETS.items() if asset.kind == "data")


def _is_starter(source: str) -> bool:
    """Whether `source` names starter data; raises `DataError` for a bare word that is no file either."""
    if source in _starters():
        return True
    path = Path(source)
    if path.name == source and not path.suffix and not path.exists():
        what = "a starter model, not data" if source in assets.ASSETS else "neither starter data nor a file"
        raise DataError(f"{source!r} is {what}", f"{nearest(source, _starters())} Or give a file.")
    return False


def _starter_rows(name: str, split: str) -> list[Row]:
    records = read_records(assets.folder(name) / f"{split}.jsonl")
    rows = []
    for record in records:
        fields = record.fields
        rows.append(Row(fields["text"], None, fields["label"], fields["id"], record.place))
    return rows


def _part(source: str, name: str, config: DataConfig, sha256: dict[str, str]) -> list[Row]:
    """The rows of a file, or a starter's rows of the split called `name`."""
    if not _is_starter(source):
        rows = read_rows(source, config.columns, need_label=True)
        sha256[source] = sha256_of(Path(source).expanduser())
        return rows
    file = f"{name}.jsonl"
    path = assets.folder(source) / file
    sha256[f"{source}/{file}"] = sha256_of(path)
    if sha256[f"{source}/{file}"] != assets.ASSETS[source].files[file]:
        raise DamagedError(f"{path} was altered", f"delete {path.parent} to have it fetched again")
    return _starter_rows(source, name)


def _refuse_training_file(config: DataConfig, sha256: Mapping[str, str]) -> None:
    for name, source in (("validation", config.validation), ("test", config.test)):
        if source is not None and sha256.get(source, "") == sha256.get(config.train):
            raise DataError(
                f"{name} is {source}, which has the same content as train: {config.train}",
                f"leave out `{name}` to have rows split off, or give another file",
            )


def _split_off(config: DataConfig, train: list[Row], given: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The three splits; those not given are taken from the training rows, near-equal rows together."""
    sizes = {"validation": config.val_size, "test": config.test_size}
    lacking = {name: size for name, size in sizes.items() if name not in given}
    if not lacking:
        return {"train": train, **given}
    texts = [row.text if row.text_pair is None else f"{row.text}\n{row.text_pair}" for row in train]
    groups = group_near_equal(texts)
    names = split_by_group(groups, {"train": 1 - sum(lacking.values()), **lacking}, texts)
    parts = {
        part: [row for row, name in zip(train, names, strict=True) if name == part] for part in ("train", *lacking)
    }
    for part, rows in parts.items():
        if not rows:
            raise DataError(
                f"{config.train}: no row is left for {part}: {len(train)} rows in {len(set(groups))} groups "
                f"of near-equal text have to give {', '.join(parts)}",
                "add rows, or give files for " + " and ".join(lacking),
            )
    return {**parts, **given}


def _check_labels(parts: Mapping[str, list[Row]], config: DataConfig) -> tuple[str, ...]:
    labels = {row.label for row in parts["train"] if row.label is not None}
    if len(labels) < 2:
        raise DataError(
            f"{config.train}: all {len(parts['train'])} training rows have the label {min(labels)!r}",
            "at least two labels are needed: check the file or `columns:`",
        )
    for name in ("validation", "test"):
        for row in parts[name]:
            if row.label not in labels:
                raise DataError(
                    f"{row.place}: the label {row.label!r} of {name} is in no training row, "
                    f"which have {', '.join(sorted(labels)[:8])}",
                    "correct it, or add rows with it to the training data",
                )
    kept = subset(parts["train"], config.max_train_samples)
    if len({row.label for row in kept}) < 2:
        raise DataError(f"max_train_samples={config.max_train_samples} leaves rows of one label only", "give more")
    return tuple(sorted(labels))


def subset(rows: list[Row], most: int | None) -> list[Row]:
    """At most `most` rows, in their order: those with the smallest hash, so that subsets are nested."""
    if most is None or most >= len(rows):
        return rows
    order = sorted(range(len(rows)), key=lambda number: (hash_of(rows[number].text), number))
    return [rows[number] for number in sorted(order[:most])]


def _notes(parts: Mapping[str, list[Row]]) -> tuple[str, ...]:
    """Sentences about texts (compared by their letters and digits) that recur in train or contradict it."""
    notes = []
    labels: dict[tuple[str, str], set[str | None]] = {}
    for row in parts["train"]:
        labels.setdefault(_forms(row), set()).add(row.label)
    torn = sum(len(given) > 1 for given in labels.values())
    if torn:
        notes.append(f"{torn} texts of train stand there with more than one label")
    for name in ("validation", "test"):
        known = sum(_forms(row) in labels for row in parts[name])
        if known:
            notes.append(f"{known} of {len(parts[name])} rows of {name} are also in train")
    return tuple(notes)


def _forms(row: Row) -> tuple[str, str]:
    return normal_form(row.text), normal_form(row.text_pair or "")
