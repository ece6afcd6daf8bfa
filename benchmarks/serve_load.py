"""Load on a real server: clients that ask adapters of several methods at once, for a while.

    python -m benchmarks.serve_load --minutes 30 --clients 64

Starts `graft serve` with random adapters of eight settings, streams answers to every client, and prints what clients
saw (time to the first token, time between tokens, whole answers, as percentiles and a histogram), what was refused,
and how the server's memory went. It ends with exit code 1 where an answer failed otherwise than by a stated 429, or
anything was still held at the end.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path

import torch

from graft.methods import store
from graft.methods.base import read_method
from graft.model import load_base
from graft.parts.attach import attach, detach
from graft.rendering.render import Renderer
from graft.train.precision import choose

ADAPTERS = {
    "lora-8": {"name": "lora", "r": 8}, "lora-16": {"name": "lora", "r": 16, "target_modules": "all-linear"},
    "bottleneck": {"name": "bottleneck"}, "bottleneck-2": {"name": "bottleneck"}, "ia3": {"name": "ia3"},
    "dora": {"name": "dora", "r": 8}, "prefix": {"name": "prefix", "num_virtual_tokens": 10},
    "prompt": {"name": "prompt", "num_virtual_tokens": 10},
}  # fmt: skip
WORDS = (
    "tell",
    "me",
    "about",
    "the",
    "sea",
    "why",
    "rivers",
    "end",
    "or",
    "name",
    "three",
    "towns",
    "beside",
    "a",
    "lake",
)


def make_adapters(model: str, folder: Path) -> list[str]:
    """Random adapters on disk, as `--adapter` takes them."""
    base = load_base(model, dtype=choose("auto", torch.device("cpu")).dtype)
    words = []
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        adapter = read_method(settings).build(base, name)
        attach(base, adapter)
        with torch.no_grad():
            for _, tensor in adapter.trainable():
                tensor.add_(torch.randn_like(tensor) * 0.01)
        adapter.eval()
        store.save(adapter, base, folder / name, template=Renderer(base.tokenizer).template)
        detach(base, name)
        words += ["--adapter", f"{name}={folder / name}"]
    return words


class Clients:
    """What the clients saw, together."""

    def __init__(self, port: int, models: list[str], tokens: int) -> None:
        self.port, self.models, self.tokens = port, models, tokens
        self.lock = threading.Lock()
        self.first: list[float] = []
        self.between: list[float] = []
        self.whole: list[float] = []
        self.counts: Counter[str] = Counter()
        self.written = 0

    def run(self, number: int, until: float) -> None:
        """One client: it asks, reads, and asks again; one time in twenty it goes away early."""
        chance = random.Random(number)
        while time.monotonic() < until:
            try:
                self._ask(chance)
            except Exception as error:
                with self.lock:
                    self.counts[f"failed: {type(error).__name__}: {error}"[:120]] += 1

    def _ask(self, chance: random.Random) -> None:
        asked = " ".join(chance.choices(WORDS, k=chance.randint(3, 60)))
        body = {
            "model": chance.choice(self.models), "messages": [{"role": "user", "content": asked}], "stream": True,
            "max_tokens": chance.randint(4, self.tokens), "temperature": chance.choice([0, 0.8]),
        }  # fmt: skip
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        started = last = time.monotonic()
        leaves = chance.random() < 0.05
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                answer.read()
                with self.lock:
                    self.counts[f"status {answer.status}"] += 1
                time.sleep(0.5)
                return
            pieces = 0
            for line in answer:
                now = time.monotonic()
                if line.startswith(b"data: [DONE]"):
                    self._done(now - started)
                    return
                if line.startswith(b'data: {"error"'):
                    raise RuntimeError(line.decode()[:80])
                if b'"content"' in line and b'"role"' not in line:
                    self._piece(now - (started if pieces == 0 else last), pieces == 0)
                    pieces += 1
                    last = now
                    if leaves and pieces > 3:
                        with self.lock:
                            self.counts["left"] += 1
                        return
            raise RuntimeError("the stream was cut")
        finally:
            connection.close()

    def _piece(self, seconds: float, first: bool) -> None:
        with self.lock:
            (self.first if first else self.between).append(seconds)
            self.written += 1

    def _done(self, seconds: float) -> None:
        with self.lock:
            self.counts["answered"] += 1
            self.whole.append(seconds)


def histogram(name: str, values: list[float]) -> None:
    """Percentiles, and a bar for each bucket."""
    if not values:
        return
    values = sorted(values)
    marks = ", ".join(f"p{p} {values[min(len(values) - 1, len(values) * p // 100)]:.3f} s" for p in (50, 90, 99))
    print(f"\n{name}: {marks}, most {values[-1]:.3f} s")
    edges = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 1e9]
    low = 0.0
    for edge in edges:
        count = sum(low <= value < edge for value in values)
        if count:
            shown = f"< {edge:g} s" if edge < 1e9 else "more"
            print(f"  {shown:>9} {count:7,} {'#' * max(1, 50 * count // len(values))}")
        low = edge


def resident(process: int) -> int:
    """MiB that a process holds."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024


def figure(port: int, name: str) -> float:
    """One of the server's own figures."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--options", default="", help="more words for graft serve")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = make_adapters(given.base, Path(folder))
        command = [sys.executable, "-m", "graft", "serve", given.base, "--port", "0", *words, *given.options.split()]
        log = Path(folder) / "log.txt"
        with log.open("w") as errors:
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert server.stdout is not None
        try:
            line = next((line for line in server.stdout if "listening" in line), None)
            if line is None:
                print(log.read_text())
                return 1
            return watch(server.pid, int(line.rsplit(":", 1)[1]), given)
        finally:
            server.terminate()
            server.wait(60)
            server.stdout.close()


def watch(process: int, port: int, given: argparse.Namespace) -> int:
    clients = Clients(port, [*ADAPTERS, Path(given.base).name], given.tokens)
    until = time.monotonic() + 60 * given.minutes
    started = time.monotonic()
    threads = [threading.Thread(target=clients.run, args=(number, until)) for number in range(given.clients)]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < until:
        time.sleep(min(30.0, 60 * given.minutes / 10))
        memory.append(resident(process))
        print(f"{time.monotonic() - started:6.0f} s: {memory[-1]:,} MiB, {clients.written:,} tokens", flush=True)
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - started
    time.sleep(1)
    held = {name: figure(port, name) for name in ("graft_queue_rows", "graft_running_rows", "graft_kv_columns")}
    for name, values in (("first token", clients.first), ("between", clients.between), ("answers", clients.whole)):
        histogram(name, values)
    rows = figure(port, "graft_batch_rows_sum") / max(1, figure(port, "graft_batch_rows_count"))
    print(
        f"\n{given.clients} clients, {seconds:.0f} s: {clients.written / seconds:.0f} tokens/s, {rows:.1f} rows a step"
    )
    print(dict(clients.counts), held, f"memory {memory[0]:,} to {memory[-1]:,} MiB, most {max(memory):,}")
    allowed = {"answered", "left", "status 429"}
    return int(any(held.values()) or bool(set(clients.counts) - allowed))


if __name__ == "__main__":
    sys.exit(main())
