"""Adapters that come, go and change under load; steps that fail; memory that is bounded."""

import gc
import json
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import bases
import pytest
import served
import tiny
import torch
from safetensors.torch import load_file, save_file
from served import METHODS, alone

from graft.errors import DamagedError, ResourceError, UsageError
from graft.generate import generate
from graft.merge import merge_run
from graft.methods import store
from graft.model import load_base
from graft.objectives.classify import collate
from graft.parts.head import scores
from graft.quantize import quantize
from graft.serve.adapters import Adapters, Loading, UnknownModel
from graft.serve.batch import Batch, Row, Unsound
from graft.serve.engine import Ended, Engine, Failed, Full, Job, Piece, Stopping
from graft.serve.metrics import Meter
from graft.serve.start import Settings, load_service
from graft.serve.texts import Texts, read_texts

QUESTIONS = ["abc the sea?", "q", "the capital of everything?", "fine?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.write_all(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def expected(folder):
    """What each adapter answers to each question alone."""
    found = {}
    for adapter in (None, *METHODS, "other"):
        for question in QUESTIONS:
            found[adapter, question] = alone(folder, adapter, question, tokens=10)[0]
    assert len(set(found.values())) > len(QUESTIONS) * 4
    return found


class Client:
    """An engine in this process, asked by threads."""

    def __init__(self, folder, names=(*METHODS, "mood", "topic", "spam"), limit=16, queue=256, capacity=20_000, **more):
        self.folder = folder
        self.base = load_base(str(folder / "model"))
        self.adapters = Adapters(self.base, "model", limit)
        for name in names:
            self.adapters.install(self.adapters.prepare(name, folder / "adapters" / name))
        self.meter = Meter()
        self.engine = Engine(self.adapters, Batch(self.base, capacity, **more), self.meter, queue)
        self.engine.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self.engine.stop()
        assert not self.engine.alive

    def job(self, name: str | None, question: str, tokens=10):
        version = self.adapters.find(name or "model")
        prompt = version.renderer.prompt([served.tiny_message(question)])
        events: list = []
        row = Row(prompt, tokens, version.renderer.stop_ids)
        done = threading.Event()

        def tell(event):
            events.append(event)
            if isinstance(event, Ended | Failed):
                done.set()

        decode = lambda ids: self.base.tokenizer.decode(list(ids), skip_special_tokens=True)  # noqa: E731
        job = Job(version, [row], tell, decode)
        job.events, job.done = events, done
        self.engine.submit(job)
        return job

    def ask(self, name: str | None, question: str, tokens=10) -> str:
        job = self.job(name, question, tokens)
        assert job.done.wait(60)
        if isinstance(job.events[-1], Failed):
            raise job.events[-1].error
        return "".join(event.text for event in job.events if isinstance(event, Piece))

    def load(self, name: str, source: str):
        with self.adapters.loading(name):
            version = self.adapters.prepare(name, self.folder / "adapters" / source, replace=True)
            self.engine.install(version).result(60)
        return version

    def unload(self, name: str):
        self.engine.call(lambda: self.adapters.remove(name)).result(60)


@pytest.mark.parametrize("limit", [16, 3])
def test_32_mixed_requests_equal_alone_while_adapters_change(folder, expected, limit):
    with Client(folder, limit=limit, max_rows=12, chunk=48) as client:
        stop = threading.Event()
        changes = []

        def change():
            chance = random.Random(0)
            while not stop.is_set():
                source = chance.choice(METHODS)
                client.load("changing", source)
                changes.append(source)
                if chance.random() < 0.4:
                    client.unload("changing")
                time.sleep(0.02)

        def one(number):
            chance = random.Random(number)
            right = 0
            for _ in range(4):
                question = chance.choice(QUESTIONS)
                name = chance.choice([None, *METHODS, "changing"])
                try:
                    said = client.ask(name, question)
                except UnknownModel:
                    assert name == "changing"
                    continue
                except Loading:
                    continue
                if name == "changing":
                    assert said in {expected[method, question] for method in METHODS}
                else:
                    assert said == expected[name, question], name
                    right += 1
            return right

        changer = threading.Thread(target=change)
        changer.start()
        with ThreadPoolExecutor(32) as pool:
            right = sum(pool.map(one, range(32)))
        stop.set()
        changer.join(60)
        assert right > 60
        assert len(changes) > 2
        if "changing" in client.adapters.names():
            client.unload("changing")
        assert client.engine.open == 0
        assert len(client.base.adapters) == client.adapters.attached <= limit


def test_a_replaced_adapter_finishes_its_rows(folder, expected):
    with Client(folder, ("lora",)) as client:
        old = client.job("lora", QUESTIONS[0], 100)
        client.load("lora", "other")
        assert client.ask("lora", QUESTIONS[0]) == expected["other", QUESTIONS[0]]
        assert old.done.wait(30)
        said = "".join(event.text for event in old.events if isinstance(event, Piece))
        assert said.startswith(expected["lora", QUESTIONS[0]])
        deadline = time.monotonic() + 5
        while len(client.base.adapters) > 1 and time.monotonic() < deadline:
            client.ask(None, "q", 1)
        assert len(client.base.adapters) == 1


def test_a_new_adapter_gets_a_place_under_load(folder, expected):
    """Rows run through the only place all the time; they make room."""
    with Client(folder, ("lora",), limit=1, max_rows=4) as client:
        jobs = [client.job("lora", QUESTIONS[n % 4], 60) for n in range(12)]
        client.load("late", "other")
        assert client.ask("late", QUESTIONS[0]) == expected["other", QUESTIONS[0]]
        for number, job in enumerate(jobs):
            assert job.done.wait(30)
            said = "".join(event.text for event in job.events if isinstance(event, Piece))
            assert said.startswith(expected["lora", QUESTIONS[number % 4]])


def test_a_changed_folder_is_not_read_in_place_of_what_was_loaded(folder, tmp_path):
    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    shutil.copytree(folder / "model", tmp_path / "model")
    with Client(tmp_path, ("lora", "ia3"), limit=1) as client:
        client.ask("ia3", "q")
        shutil.rmtree(tmp_path / "adapters/lora")
        shutil.copytree(tmp_path / "adapters/other", tmp_path / "adapters/lora")
        with pytest.raises(ResourceError, match="has changed"):
            client.ask("lora", "q")
        assert client.ask("ia3", "q")


def test_bad_adapters_leave_what_is_served_as_it_is(folder, tmp_path, expected):
    other = served.write_all(tmp_path / "elsewhere")
    torch.manual_seed(3)
    foreign = load_base(str(other / "model"))
    with torch.no_grad():
        for parameter in foreign.model.parameters():
            parameter.add_(0.05)
    foreign = type(foreign)(foreign.model, foreign.tokenizer, "foreign")
    served.write_adapter(foreign, folder / "adapters/foreign", "lora")
    damaged = folder / "adapters/damaged"
    shutil.copytree(folder / "adapters/lora", damaged, dirs_exist_ok=True)
    (damaged / "adapter_model.safetensors").write_bytes(b"\x08")
    served.write_adapter(load_base(str(folder / "model")), folder / "adapters/full", "full", exclusive=True, shake=0.01)
    with Client(folder, ("lora",)) as client:
        for source, error in (("foreign", DamagedError), ("damaged", DamagedError), ("full", UsageError)):
            with pytest.raises(error):
                client.load("lora", source)
            with pytest.raises(error):
                client.load("new", source)
        assert client.adapters.names() == ["model", "lora"]
        assert client.ask("lora", QUESTIONS[0]) == expected["lora", QUESTIONS[0]]
        assert client.ask(None, QUESTIONS[0]) == expected[None, QUESTIONS[0]]
    with Client(folder, ("full",)) as client:
        assert client.ask("full", "q")
        with pytest.raises(UsageError, match="changed by the adapter"):
            client.ask(None, "q")
        with pytest.raises(UsageError, match="served alone"):
            client.load("lora", "lora")


def test_the_adapters_own_template_is_used_and_told(folder):
    base = load_base(str(folder / "model"))
    template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    served.write_adapter(base, folder / "adapters/spoken", "lora", template=template)
    with Client(folder, ("spoken", "lora")) as client:
        version = client.adapters.find("spoken")
        assert "template" in version.note
        assert client.adapters.find("lora").note == ""
        assert version.renderer.prompt([served.tiny_message("abc")]) == base.tokenizer("abc|")["input_ids"]


def test_texts_of_several_classifiers_share_passes(folder):
    base = load_base(str(folder / "model"))
    with Client(folder) as client:
        asked = {}
        for name in ("mood", "topic", "spam", "mood"):
            version = client.adapters.find(name)
            texts = Texts(version, read_texts(client.base, version, ["abc", "the sea is wide", name], None))
            client.engine.classify(texts)
            asked[name] = texts
        for name, texts in asked.items():
            store.load(base, folder / "adapters" / name, name)
            with torch.no_grad():
                right = scores(base, collate(base, texts.rows), name).softmax(-1)
            torch.testing.assert_close(torch.tensor(texts.future.result(30)), right, atol=1e-5, rtol=1e-4)
            assert right.shape == (3, len(served.LABELS[name]))
        assert client.engine.open == 0


def test_an_encoder_serves_classifiers(tmp_path):
    tiny.write_model(tmp_path / "model")
    base = load_base(str(tmp_path / "model"))
    for number, method in enumerate(("lora", "prefix")):
        served.write_adapter(base, tmp_path / "adapters" / method, method, number, ("a", "b"))
    served.write_adapter(base, tmp_path / "adapters/headless", "lora")
    adapters = Adapters(base, "model", 4, writes=False)
    for name in ("lora", "prefix"):
        adapters.install(adapters.prepare(name, tmp_path / "adapters" / name))
    with pytest.raises(UsageError, match="no task head"):
        adapters.install(adapters.prepare("headless", tmp_path / "adapters/headless"))
    assert len(base.adapters) == 2
    engine = Engine(adapters, Batch(base, 1), Meter())
    engine.start()
    found = []
    for name in ("lora", "prefix"):
        version = adapters.find(name)
        texts = Texts(version, read_texts(base, version, ["a fine film", "dull"], None))
        engine.classify(texts)
        found.append(texts.future.result(30))
    assert found[0] != found[1]
    with pytest.raises(UsageError, match="tokens"):
        read_texts(base, adapters.find("prefix"), ["film " * 500], None)
    assert engine.stop()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("shapes differ")])
def test_failed_steps_free_their_rows(folder, expected, monkeypatch, error):
    with Client(folder, ("lora", "ia3"), max_rows=8) as client:
        original = client.base.model.forward
        limit = [3]

        def forward(**given):
            if len(given["input_ids"]) > limit[0]:
                raise error
            return original(**given)

        monkeypatch.setattr(client.base.model, "forward", forward)
        jobs = [client.job(("lora", "ia3", None)[n % 3], QUESTIONS[n % 4]) for n in range(8)]
        for number, job in enumerate(jobs):
            assert job.done.wait(30)
            if isinstance(error, torch.OutOfMemoryError):
                said = "".join(event.text for event in job.events if isinstance(event, Piece))
                assert said == expected[("lora", "ia3", None)[number % 3], QUESTIONS[number % 4]]
        if not isinstance(error, torch.OutOfMemoryError):
            assert any(isinstance(job.events[-1], Failed) for job in jobs)
        limit[0] = 0
        with pytest.raises((ResourceError, RuntimeError), match=r"memory ran out|shapes"):
            client.ask("lora", "q")
        limit[0] = 100
        assert client.ask("lora", QUESTIONS[0]) == expected["lora", QUESTIONS[0]]
        assert client.engine.open == 0
        assert client.engine.batch.used == 0


def test_a_full_queue_and_a_stop_are_told(folder):
    client = Client(folder, ("lora",), queue=2, max_rows=2)
    jobs = [client.job("lora", "q", 60) for _ in range(4)]
    with pytest.raises(Full):
        client.job("lora", "q")
    jobs[0].cancel()
    assert jobs[1].done.wait(30)
    limit = time.monotonic() + 10
    while client.engine.open > 2 and time.monotonic() < limit:
        time.sleep(0.001)
    waiting = [client.job("lora", "q", 200) for _ in range(2)]
    assert not client.engine.stop(0.0)
    assert all(isinstance(job.events[-1], Failed | Ended) for job in (*jobs[1:], *waiting))
    assert isinstance(waiting[-1].events[-1].error, Stopping)
    with pytest.raises(Stopping):
        client.job("lora", "q")
    assert not client.engine.alive


def test_64_clients_for_a_while(folder, expected):
    """No error but a stated one, and nothing is held at the end."""
    with Client(folder, limit=3, queue=16, max_rows=24, chunk=64, capacity=24 * 160) as client:
        until = time.monotonic() + 6
        counts = {"right": 0, "full": 0, "cancelled": 0}
        lock = threading.Lock()

        def one(number):
            chance = random.Random(number)
            while time.monotonic() < until:
                name, question = chance.choice([None, *METHODS]), chance.choice(QUESTIONS)
                try:
                    job = client.job(name, question)
                except Full:
                    time.sleep(0.05)
                    with lock:
                        counts["full"] += 1
                    continue
                if chance.random() < 0.1:
                    job.cancel()
                    with lock:
                        counts["cancelled"] += 1
                    continue
                assert job.done.wait(60)
                said = "".join(event.text for event in job.events if isinstance(event, Piece))
                assert said == expected[name, question]
                with lock:
                    counts["right"] += 1

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(one, range(64)))
        assert counts["right"] > 60
        assert counts["full"] > 0
        assert counts["cancelled"] > 0
        client.ask(None, "q", 1)
        limit = time.monotonic() + 5
        while client.engine.open and time.monotonic() < limit:
            time.sleep(0.01)
        assert client.engine.open == 0
        assert not client.engine.batch.held
        assert client.adapters.attached <= 3
        gc.collect()
        text = client.meter.text().decode()
        assert "graft_batch_rows_bucket" in text
        assert 'graft_tokens_total{model="prefix"}' in text


def test_names_are_checked(folder):
    adapters = Adapters(load_base(str(folder / "model")), "model", 2)
    for name in ("a/b", "..", ".a", "a\nb", "a\0", "x" * 65, "", "model", "-a"):
        with pytest.raises(UsageError):
            adapters.prepare(name, folder / "adapters/lora")
    assert adapters.prepare("a.b-c_1", folder / "adapters/lora").name == "a.b-c_1"
    assert json.loads((folder / "adapters/lora/graft.json").read_text())["method"]["name"] == "lora"
    assert bases.METHODS


def spoil(client, name: str) -> None:
    """Make an adapter in memory compute what is no number."""
    with torch.no_grad():
        for _, tensor in client.base.adapters[client.adapters.find(name).key].named_tensors():
            tensor.fill_(float("nan"))


def test_an_adapter_that_computes_no_numbers_fails_its_own_requests(folder, expected):
    with Client(folder, ("lora", "ia3", "mood")) as client:
        spoil(client, "lora")
        jobs = [client.job(("lora", "ia3", None)[n % 3], QUESTIONS[n % 4]) for n in range(9)]
        for number, job in enumerate(jobs):
            assert job.done.wait(30)
            name = ("lora", "ia3", None)[number % 3]
            if name == "lora":
                assert isinstance(job.events[-1].error, Unsound)
                continue
            said = "".join(event.text for event in job.events if isinstance(event, Piece))
            assert said == expected[name, QUESTIONS[number % 4]]
        spoil(client, "mood")
        version = client.adapters.find("mood")
        texts = Texts(version, read_texts(client.base, version, ["abc"], None))
        client.engine.classify(texts)
        with pytest.raises(Unsound, match="no numbers"):
            texts.future.result(30)
        assert client.ask(None, QUESTIONS[0]) == expected[None, QUESTIONS[0]]
        text = client.meter.text().decode()
        assert 'graft_unsound_total{model="lora"} 3.0' in text
        assert 'graft_requests_total{ending="failed",model="lora"} 3.0' in text
        assert client.engine.open == 0
        assert client.engine.batch.used == 0


def test_weights_that_are_no_numbers_are_refused(folder, tmp_path):
    """By everything that reads an adapter, whoever wrote it."""
    for source, where in (("lora", "of-graft"), ("ia3", "of-peft")):
        damaged = shutil.copytree(folder / "adapters" / source, tmp_path / where)
        path = damaged / "adapter_model.safetensors"
        tensors = load_file(path)
        name = sorted(tensors)[0]
        tensors[name][0] = float("inf" if source == "lora" else "nan")
        save_file(tensors, path)
        if where == "of-peft":
            (damaged / "graft.json").unlink()
        calls = (
            lambda: store.load(load_base(str(folder / "model")), damaged, "x"),  # noqa: B023
            lambda: merge_run(damaged, tmp_path / "merged", model=str(folder / "model")),  # noqa: B023
            lambda: load_service(str(folder / "model"), {"x": damaged}, Settings()),  # noqa: B023
        )
        for call in calls:
            with pytest.raises(DamagedError, match=f"1 of {len(tensors)} tensors hold values that are no numbers"):
                call()


def test_more_adapters_in_use_than_places_take_turns(folder, expected):
    """One place for five adapters and a classifier, asked all the time: each gets its turn, in the order of coming."""
    names = [*METHODS, "mood"]
    with Client(folder, names, limit=1, max_rows=4) as client:
        stop = threading.Event()

        def stream(number):
            count = 0
            while not stop.is_set():
                assert client.ask("lora", QUESTIONS[number % 4]) == expected["lora", QUESTIONS[number % 4]]
                count += 1
            return count

        with ThreadPoolExecutor(8) as pool:
            busy = [pool.submit(stream, number) for number in range(3)]
            others = [pool.submit(client.ask, name, QUESTIONS[0]) for name in METHODS[1:]]
            version = client.adapters.find("mood")
            for _ in range(3):
                texts = Texts(version, read_texts(client.base, version, ["abc"], None))
                client.engine.classify(texts)
                assert len(texts.future.result(20)[0]) == 3
            said = [one.result(20) for one in others]
            stop.set()
            assert sum(one.result(20) for one in busy) >= 3
        assert said == [expected[name, QUESTIONS[0]] for name in METHODS[1:]]
        assert client.adapters.attached <= 1


def test_a_base_in_4_bits_is_served(folder):
    pytest.importorskip("bitsandbytes")
    base = load_base(str(folder / "model"))
    quantize(base, torch.float32)
    for number, name in enumerate(("four", "bits")):
        served.write_adapter(base, folder / "adapters" / name, ("lora", "ia3")[number], 7 + number)
    places = {name: folder / "adapters" / name for name in ("four", "bits")}
    service = load_service(str(folder / "model"), places, Settings("fp32"))
    assert service.adapters.base.quantization == "nf4"
    service.engine.start()
    client = Client.__new__(Client)
    client.base, client.adapters, client.engine = service.adapters.base, service.adapters, service.engine
    jobs = {name: client.job(name, QUESTIONS[0]) for name in (None, "four", "bits")}
    for name, job in jobs.items():
        assert job.done.wait(30)
        entry = store.load(base, places[name], name).name if name else None
        row = job.rows[0]
        right = generate(base, [row.prompt], entry, max_new_tokens=row.max_tokens, stop_ids=row.stop_ids)[0]
        assert row.ids == right
    assert len({tuple(job.rows[0].ids) for job in jobs.values()}) == 3
    assert service.engine.stop()
