"""Data for a run: rows of starter data, starter tasks or the user's files, divided into train, validation and test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from graft import assets
from graft.config import Config
from graft.data.dialogue import Dialogue, Graded, Preference
from graft.data.formats import FORMATS, AnyRow, Recognized, read_rows_of
from graft.data.pairs import OFTEN, RATED, continued, rated_pairs, task_pairs, text_of_pair
from graft.data.rows import FIELDS, Row, make_rows
from graft.data.tasks import is_task, task_dialogues
from graft.errors import DamagedError, DataError, nearest
from graft.files import sha256_of
from graft.reading.faults import Fault, Faults
from graft.reading.files import Record, iterate_records, read_records
from graft.splits import group_near_equal, hash_of, normal_form, split_by_group

__all__ = ["DataConfig", "Row", "Splits", "Unit", "load_splits", "read_all", "read_rows", "rows_of", "subset"]

Unit = Literal["labelled", "text", "dialogue", "preference"]
"""What an objective learns from: texts with a label, plain texts, dialogues, answers of which one is the better."""


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
    """Rows to train on: a starter data set, a starter task (`task:NAME`), rated texts (`rated:movie-reviews`), or a
    file: .jsonl, .json, .csv, .tsv, .parquet or .txt, also with .gz.
    """
    validation: str | None = None
    """Rows to choose settings by; without it the starter's own or a share of the training file."""
    test: str | None = None
    """Rows to report the result on; without it the starter's own or a share of the training file."""
    val_size: float = Field(0.05, gt=0, lt=1)
    """Share of the training file that becomes validation rows when `validation` is not given."""
    test_size: float = Field(0.15, gt=0, lt=1)
    """Share of the training file that becomes test rows when `test` is not given."""
    format: str | None = None
    """The format of the files (alpaca, sharegpt, messages, …); recognized by their keys when left out."""
    columns: dict[str, str] = Field({})
    """The file's names of our fields where they differ, as in `text: sentence` or `instruction: question`."""
    skip_bad_rows: float = Field(0.0, ge=0, lt=1)
    """Go on without rows that cannot be read, up to this share of them; they are listed in the run folder. 0: the first
    one stops the run."""
    max_train_samples: int | None = Field(None, ge=2)
    """Train on a fixed subset of at most this many rows."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Evaluate on a fixed subset of at most this many rows of validation and of test."""
    max_length: int | None = Field(None, ge=4, le=1_000_000)
    """Tokens per row. When left out, 128 for classification (longer texts are cut) and 1,024 otherwise. Of a dialogue
    that is too long the oldest turns go first; its answer is never cut."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.val_size + self.test_size >= 1:
            raise ValueError(
                f"val_size and test_size are {self.val_size:g} and {self.test_size:g}: "
                "their sum has to be below 1 so that training rows are left"
            )
        known = {*FIELDS, *(key for known in FORMATS.values() for key in known.keys)}
        for name in self.columns:
            if name not in known:
                raise ValueError(f"columns: unknown field {name!r}, {nearest(name, known)}")
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"format: no format {self.format!r}, {nearest(self.format, FORMATS)}")
        return self


@dataclass(frozen=True)
class Splits:
    """The rows of a run. `labels` are sorted; `sha256` has the hash of every file that was read.

    `notes` has a sentence for everything that is allowed but spoils a comparison, or that was decided by looking at
    the file; `skipped` the rows that could not be read.
    """

    train: list[Any]
    validation: list[Any]
    test: list[Any]
    labels: tuple[str, ...]
    sha256: dict[str, str]
    notes: tuple[str, ...] = ()
    skipped: list[Fault] = field(default_factory=list)


def read_rows(source: str, columns: Mapping[str, str] | None = None, need_label: bool = False) -> list[Row]:
    """The texts of a starter data set (all that have a label) or of a file, with their labels.

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


def load_splits(config: DataConfig, unit: Unit = "labelled") -> Splits:
    """The rows of a run, checked.

    Raises `DataError` for a row that is not of this unit, a training set of one label, a label that training
    rows do not have, a split without rows and a file that is given for training and evaluation.
    """
    reader = _Reader(config, unit)
    whole = is_task(config.train) or config.train.startswith(RATED) or _is_starter(config.train)
    train = reader.part(config.train, "train")
    given = {
        name: reader.part(source or config.train, name)
        for name, source in (("validation", config.validation), ("test", config.test))
        if source or whole
    }
    _refuse_training_file(config, reader.sha256)
    parts = _split_off(config, train, given)
    labels = _check_labels(parts, config) if unit == "labelled" else ()
    return Splits(
        train=subset(parts["train"], config.max_train_samples),
        validation=subset(parts["validation"], config.max_eval_samples),
        test=subset(parts["test"], config.max_eval_samples),
        labels=labels,
        sha256=reader.sha256,
        notes=(*reader.notes, *_notes(parts, unit)),
        skipped=reader.skipped,
    )


def rows_of(source: str, config: DataConfig, unit: Unit) -> list[Any]:
    """The rows of another source, read as those of a run are; of starter data and tasks the test rows."""
    return _Reader(config, unit).part(source, "test")


@dataclass
class _Reader:
    """Reads the sources of one run and keeps what is to be told about them."""

    config: DataConfig
    unit: Unit
    sha256: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: list[Fault] = field(default_factory=list)

    def part(self, source: str, name: str) -> list[Any]:
        """The rows of a file, or a starter's rows of the split called `name`."""
        if is_task(source):
            if self.unit == "labelled":
                raise DataError(f"{source} has questions and answers, not labels", "give `objective: instruct`")
            dialogues = list(task_dialogues(source, name))  # type: ignore[arg-type]
            return task_pairs(dialogues) if self.unit == "preference" else dialogues
        if source.startswith(RATED):
            return self._rated(source, name)
        if _is_starter(source):
            return self._starter(source, name)
        path = Path(source).expanduser()
        rows = self._labelled(path) if self.unit == "labelled" else self._file(path)
        self.sha256[source] = sha256_of(path)
        return rows

    def _rated(self, source: str, name: str) -> list[Any]:
        """Rated texts as dialogues, or as pairs."""
        if self.unit not in ("dialogue", "preference"):
            raise DataError(f"{source} has texts to continue", "give the name without `rated:`, or another objective")
        starter = source.removeprefix(RATED)
        if starter not in _starters() or "rating" not in (rows := self._records(starter, name))[0].fields:
            raise DataError(f"{source}: no rated texts of this name", "known: rated:movie-reviews")
        dialogues = [row for row in map(continued, rows) if row is not None]
        return dialogues if self.unit == "dialogue" else rated_pairs(dialogues, OFTEN if name == "train" else 1)

    def _starter(self, source: str, name: str) -> list[Any]:
        if self.unit in ("dialogue", "preference"):
            what = "dialogues" if self.unit == "dialogue" else "answers of which one is the better"
            raise DataError(
                f"{source} has labelled texts, not {what}",
                "use it with `objective: classify` or `objective: pretrain`",
            )
        self._records(source, name)
        return _starter_rows(source, name)

    def _records(self, source: str, name: str) -> list[Record]:
        """The records of a starter's split, unaltered."""
        file = f"{name}.jsonl"
        path = assets.folder(source) / file
        self.sha256[f"{source}/{file}"] = sha256_of(path)
        if self.sha256[f"{source}/{file}"] != assets.ASSETS[source].files[file]:
            raise DamagedError(f"{path} was altered", f"delete {path.parent} to have it fetched again")
        return list(read_records(path))

    def _labelled(self, path: Path) -> list[Any]:
        if self.config.format not in (None, "classification"):
            raise DataError(f"format is {self.config.format}, texts with labels are needed", "give classification")
        faults = self._faults()
        records = list(iterate_records(path, faults))
        rows = make_rows(records, self.config.columns, True, faults) if records else []
        return self._settled(path, rows, faults)

    def _file(self, path: Path) -> list[Any]:
        faults = self._faults()
        recognized, rows = read_rows_of(path, self.config.columns, faults, self.config.format)
        kept = self._settled(path, list(rows), faults)
        self._check_unit(path, recognized)
        self.notes.append(f"{path.name}: {recognized.why}")
        return kept if self.unit in ("dialogue", "preference") else [_as_text(row) for row in kept]

    def _faults(self) -> Faults | None:
        return Faults(self.config.skip_bad_rows) if self.config.skip_bad_rows else None

    def _settled(self, path: Path, rows: list[Any], faults: Faults | None) -> list[Any]:
        """The rows, when there are any and the bad ones among them are few enough."""
        total = len(rows) + (faults.count if faults else 0)
        if faults and faults.count:
            faults.check(path, total)
            self.skipped += faults.rows
            self.notes.append(f"{faults.count:,} of {total:,} rows of {path.name} cannot be read and are left out")
        if not rows:
            raise DataError(f"{path} has no rows", "give a file with at least one row")
        return rows

    def _check_unit(self, path: Path, recognized: Recognized) -> None:
        allowed = {
            "dialogue": ("dialogue",),
            "text": ("text", "labelled", "dialogue"),
            "preference": ("preference", "graded"),
        }[self.unit]
        if recognized.unit in allowed:
            return
        if self.unit == "preference":
            raise DataError(
                f"{path}: {recognized.why}; answers of which one is the better are needed",
                "give rows with prompt, chosen and rejected, or with prompt, completion and label",
            )
        remedy = {
            "text": "plain text is for `objective: pretrain`",
            "labelled": "labelled texts are for `objective: classify`",
        }.get(recognized.unit, f"`graft data convert {path} -o OUT.jsonl --to messages` keeps the better answer")
        raise DataError(f"{path}: {recognized.why}; dialogues are needed", remedy)


def _as_text(row: AnyRow) -> Row:
    """A row of plain text; a dialogue's turns are joined, without any template."""
    if isinstance(row, Row):
        return row
    assert isinstance(row, Dialogue)  # `_check_unit` lets nothing else pass
    return Row("\n\n".join(message.content for message in row.messages), None, None, row.id, row.place)


def _starters() -> list[str]:
    return sorted(name for name, asset in assets.ASSETS.items() if asset.kind == "data")


def _is_starter(source: str) -> bool:
    """Whether `source` names starter data; raises `DataError` for a bare word that is no file either."""
    if source in _starters():
        return True
    path = Path(source)
    if path.name == source and not path.suffix and not path.exists() and not is_task(source):
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


def _refuse_training_file(config: DataConfig, sha256: Mapping[str, str]) -> None:
    for name, source in (("validation", config.validation), ("test", config.test)):
        if source is not None and source in sha256 and sha256[source] == sha256.get(config.train):
            raise DataError(
                f"{name} is {source}, which has the same content as train: {config.train}",
                f"leave out `{name}` to have rows split off, or give another file",
            )


def text_of(row: Row | Dialogue | Preference | Graded) -> str:
    """All that a row says, as one text: near-equal rows are found by it."""
    if isinstance(row, Preference | Graded):
        return text_of_pair(row)
    if isinstance(row, Dialogue):
        return "\n".join(message.content for message in row.messages)
    return row.text if row.text_pair is None else f"{row.text}\n{row.text_pair}"


def _split_off(config: DataConfig, train: list[Any], given: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The three splits; those not given are taken from the training rows, near-equal rows together."""
    sizes = {"validation": config.val_size, "test": config.test_size}
    lacking = {name: size for name, size in sizes.items() if name not in given}
    if not lacking:
        return {"train": train, **given}
    texts = [text_of(row) for row in train]
    asked = ["" if isinstance(row, Row) else _asked(row)[0] for row in train]  # one prompt, one part
    groups = group_near_equal(texts, keys=asked)
    names = split_by_group(groups, {"train": 1 - sum(lacking.values()), **lacking}, texts)
    parts = {
        part: [row for row, name in zip(train, names, strict=True) if name == part] for part in ("train", *lacking)
    }
    for part, rows in parts.items():
        if not rows:
            raise DataError(
                f"{config.train}: no row is left for {part}: {len(train)} rows in {len(set(groups))} groups "
                f"of near-equal text or the same prompt have to give {', '.join(parts)}",
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


def subset(rows: Sequence[Any], most: int | None) -> list[Any]:
    """At most `most` rows, in their order: those with the smallest hash, so that subsets are nested."""
    if most is None or most >= len(rows):
        return list(rows)
    keys = [row.text if isinstance(row, Row) else text_of(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: (hash_of(keys[number]), number))
    return [rows[number] for number in sorted(order[:most])]


def _notes(parts: Mapping[str, list[Any]], unit: Unit) -> tuple[str, ...]:
    """Sentences about texts (compared by their letters and digits) that recur in train or contradict it."""
    notes = []
    answers: dict[tuple[str, str], set[str | None]] = {}
    for row in parts["train"]:
        answers.setdefault(_asked(row), set()).add(_wanted(row))
    torn = sum(len(given) > 1 for given in answers.values())
    if torn and unit in ("dialogue", "labelled"):
        what = "more than one answer" if unit == "dialogue" else "more than one label"
        notes.append(f"{torn} {'prompts' if unit == 'dialogue' else 'texts'} of train stand there with {what}")
    for name in ("validation", "test"):
        known = sum(_asked(row) in answers for row in parts[name])
        if known:
            what = "have a prompt that is" if unit in ("dialogue", "preference") else "are"
            notes.append(f"{known} of {len(parts[name])} rows of {name} {what} also in train")
    return tuple(notes)


def _wanted(row: Row | Dialogue | Preference | Graded) -> str | None:
    if isinstance(row, Preference | Graded):
        return None
    return row.answer if isinstance(row, Dialogue) else row.label


def _asked(row: Row | Dialogue | Preference | Graded) -> tuple[str, str]:
    if not isinstance(row, Row):
        return normal_form("\n".join(message.content for message in row.prompt)), ""
    return normal_form(row.text), normal_form(row.text_pair or "")
