"""Serving many adapters on one base, and latency at batch 1.

    python -m benchmarks.serving [--rounds N] [--out FILE]

Eight requests of 32 tokens in and 64 out, greedy, each through an adapter of its own. Graft serves them as its server
does (`graft.serve.batch`): they join together, and the time is that from the first prompt to the last token. peft
answers them one after another, and LoRA also in one batch with `adapter_names`. One peft model holds adapters of one
method, among which `set_adapter` switches; for several methods each has a model with a base of its own, so that going
from one to the other costs nothing. The adapters are random rather than trained, saved and loaded as real ones are.
Cases alternate within a round, ratios are those of one round, and figures are medians over the rounds. A round takes
two minutes on one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
ROWS, READ, WRITTEN = 8, 32, 64
LORA = ["lora"] * ROWS
MIXES = {
    "four methods": ["lora", "lora", "bottleneck", "bottleneck", "ia3", "ia3", "prefix", "prefix"],
    "four methods of peft": ["lora", "lora", "ia3", "ia3", "prompt", "prompt", "prefix", "prefix"],
    "with VeRA": ["lora", "lora", "ia3", "ia3", "vera", "vera", "prefix", "prefix"],
    "five methods": ["lora", "lora", "dora", "dora", "bottleneck", "bottleneck", "ia3", "prompt"],
}
LENGTHS = (16, 64, 256)
STEPS = 12
"""Tokens decoded, and half as many forward passes of each length, per variant and round in the part on latency."""
SHAKE = 0.02
SWITCHED, BATCHED = "peft, eight LoRA, one by one", "peft, eight LoRA, one batch with adapter_names"
PEERS = ("four methods of peft", "with VeRA")
"""Mixes that peft can answer too."""
Case = Callable[[], Any]


def loaded(dtype: Any) -> Any:
    """The base."""
    from graft.model import load_base

    return load_base(MODEL, dtype=dtype)


def put(base: Any, method: str, name: str, folder: Path) -> None:
    """Attach an adapter with random values, as it is read from disk."""
    import torch

    from graft.methods import store
    from graft.methods.base import read_method
    from graft.parts.attach import attach, detach

    adapter = read_method({"name": method}).build(base, name)
    attach(base, adapter)
    with torch.no_grad():
        for _, tensor in adapter.trainable():
            tensor.add_(torch.randn_like(tensor) * SHAKE)
    store.save(adapter, base, folder / name)
    detach(base, name)
    store.load(base, folder / name, name).eval()


def prompts(vocabulary: int) -> list[list[int]]:
    """Token ids, a different row for each request."""
    import torch

    drawn = torch.randint(100, vocabulary, (ROWS, READ), generator=torch.Generator().manual_seed(1))
    return [[int(token) for token in row] for row in drawn]


def names_of(mix: list[str]) -> list[str]:
    """An adapter for each request: the first of its method, the second, and so on."""
    return [f"{method}-{mix[:place].count(method)}" for place, method in enumerate(mix)]


def serve(base: Any, given: list[list[int]], entries: list[str | None]) -> None:
    """Answers to requests that come together, as the server writes them."""
    from graft.parts.attach import adapter_of
    from graft.serve.batch import Batch, Row

    batch = Batch(base, 100_000)
    for prompt, entry in zip(given, entries, strict=True):
        virtual = sum(part.positions for part in adapter_of(base, entry).virtual_parts()) if entry else 0
        batch.add(Row(prompt, WRITTEN, entry=entry, virtual=virtual))
    rows = list(batch.waiting)
    while batch.busy:
        batch.step()
    assert all(len(row.ids) == WRITTEN for row in rows)


def graft_cases(base: Any, mixes: dict[str, list[str]], given: list[list[int]]) -> dict[str, Case]:
    """Batches: plain, all on one adapter, and mixed."""
    entries: dict[str, list[str | None]] = {"graft, no adapter": [None] * ROWS, "graft, one LoRA": ["lora-0"] * ROWS}
    entries |= {f"graft, {name}": list(names_of(mix)) for name, mix in mixes.items()}
    return {name: lambda taken=taken: serve(base, given, taken) for name, taken in entries.items()}


def peft_cases(dtype: Any, folder: Path, mix: list[str], given: list[list[int]]) -> tuple[Case, Case]:
    """The same folders in peft: one request after another, and its own mixed batch, which is for LoRA alone."""
    import torch
    from peft import PeftModel

    models: dict[str, Any] = {}
    names = names_of(mix)
    for method, name in zip(mix, names, strict=True):
        if method in models:
            models[method].load_adapter(folder / name, adapter_name=name)
        else:
            models[method] = PeftModel.from_pretrained(loaded(dtype).model, folder / name, adapter_name=name)
            models[method].eval()
    ids = torch.tensor(given)
    options = {
        "max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False, "use_cache": True, "pad_token_id": 0
    }  # fmt: skip

    @torch.no_grad()
    def generate(model: Any, rows: Any, **more: Any) -> None:
        found = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options, **more)
        assert found.shape[1] == READ + WRITTEN

    def switching() -> None:
        for number, (method, name) in enumerate(zip(mix, names, strict=True)):
            models[method].set_adapter(name)
            generate(models[method], ids[number : number + 1])

    return switching, lambda: generate(models["lora"], ids, adapter_names=names)


def throughput(rounds: int, dtype: Any, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds, and seconds of processor time, of every case in every round."""
    found: dict[str, dict[str, list[float]]] = {}
    base = loaded(dtype)
    given = prompts(int(base.config.vocab_size))
    for number in range(ROWS):
        put(base, "lora", f"lora-{number}", folder)
    cases = graft_cases(base, {"eight LoRA": LORA}, given)
    cases[SWITCHED], cases[BATCHED] = peft_cases(dtype, folder, LORA, given)
    mixed = loaded(dtype)
    for method in {method for mix in MIXES.values() for method in mix}:
        for number in range(max(mix.count(method) for mix in MIXES.values())):
            put(mixed, method, f"{method}-{number}", folder / "mixed")
    with_methods = graft_cases(mixed, MIXES, given)
    cases |= {
        f"{name}, four methods attached" if "LoRA" in name else name: case
        for name, case in with_methods.items()
        if name != "graft, no adapter"
    }
    for name in PEERS:
        cases[f"peft, {name}, one by one"] = peft_cases(dtype, folder / "mixed", MIXES[name], given)[0]
    for turn in range(rounds + 1):
        for name, case in cases.items():
            wall, processor = time.perf_counter(), time.process_time()
            case()
            if turn:  # the first round warms up
                times = found.setdefault(name, {"seconds": [], "processor": []})
                times["seconds"].append(time.perf_counter() - wall)
                times["processor"].append(time.process_time() - processor)
    return found


def latency(rounds: int, dtype: Any, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Processor time in seconds at batch 1: the median of each round, by figure and variant. Each has its own base."""
    import torch

    from graft.decoding import Decoder
    from graft.parts.attach import merge_into
    from graft.routing import Route

    bases, routes = {}, {}
    for name, method in {
        "base": None,
        "merged LoRA": "lora",
        "attached LoRA": "lora",
        "bottleneck": "bottleneck",
    }.items():
        bases[name] = loaded(dtype)
        if method is not None:
            put(bases[name], method, "only", folder / name)
        if name == "merged LoRA":
            merge_into(bases[name], "only")
        routes[name] = Route.all("only" if bases[name].adapters else None)
    given = prompts(int(bases["base"].config.vocab_size))[:1]
    going = torch.ones(1, dtype=torch.long)
    found: dict[str, dict[str, list[float]]] = {}

    def timed(figure: str, count: int, calls: dict[str, Case]) -> None:
        """Alternate the variants `count` times after two that do not count; keep the median of each."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(count + 2):
            for name, call in calls.items():
                with torch.no_grad(), bases[name].route(routes[name]):
                    started = time.process_time()
                    call()
                    times[name] += [time.process_time() - started] if turn > 1 else []
        for name, each in times.items():
            found.setdefault(figure, {}).setdefault(name, []).append(statistics.median(each))

    for _ in range(rounds):
        decoders = {}
        for name, base in bases.items():
            with torch.no_grad(), base.route(routes[name]):
                decoders[name] = Decoder(base, given, routes[name], True)
        timed(
            "per token",
            STEPS,
            {name: lambda d=decoder: d.add(d.scores().argmax(-1), going) for name, decoder in decoders.items()},
        )
        for length in LENGTHS:
            ids = torch.arange(100, 100 + length)[None]
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            calls = {name: lambda b=base, batch=batch: b.hidden(batch, True).last for name, base in bases.items()}
            timed(f"forward, {length} tokens", STEPS // 2, calls)
    return found


def ratios(found: dict[str, dict[str, list[float]]], clock: str) -> dict[str, float]:
    """How many times as fast a case is as another of the same round, by a clock: the medians over the rounds."""

    def times_as_fast(name: str, than: str) -> float:
        pairs = zip(found[name][clock], found[than][clock], strict=True)
        return statistics.median(theirs / own for own, theirs in pairs)

    one, beside = "graft, one LoRA", "graft, one LoRA, four methods attached"
    return {
        "eight LoRA / peft one by one": times_as_fast("graft, eight LoRA", SWITCHED),
        **{f"{mix} / peft one by one": times_as_fast(f"graft, {mix}", f"peft, {mix}, one by one") for mix in PEERS},
        "eight LoRA / peft adapter_names": times_as_fast("graft, eight LoRA", BATCHED),
        "eight LoRA / one LoRA": times_as_fast("graft, eight LoRA", one),
        **{f"{mix} / one LoRA": times_as_fast(f"graft, {mix}", beside) for mix in MIXES},
    }


def table(found: dict[str, dict[str, list[float]]]) -> None:
    """Print what batches take."""
    print("| batch of 8 | tokens/s | processor, s |\n| --- | ---: | ---: |")
    for name, times in found.items():
        pace = ROWS * WRITTEN / statistics.median(times["seconds"])
        print(f"| {name} | {pace:,.0f} | {statistics.median(times['processor']):.2f} |", flush=True)


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from graft.engine import runtime

    runtime.prepare_environment()
    from importlib.metadata import version

    import torch

    from graft.measure import environment
    from graft.train.precision import choose

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    chosen = choose("auto", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        found = throughput(given.rounds, chosen.dtype, Path(folder))
        table(found)
        late = latency(given.rounds, chosen.dtype, Path(folder) / "late")
    faster = {clock: ratios(found, clock) for clock in ("seconds", "processor")}
    print("| times as fast | by seconds | by processor time |\n| --- | ---: | ---: |")
    for name, ratio in faster["seconds"].items():
        print(f"| {name} | {ratio:.2f} | {faster['processor'][name]:.2f} |")
    print("| batch 1, ms | " + " | ".join(next(iter(late.values()))) + " |")
    for figure, each in late.items():
        print(f"| {figure} | " + " | ".join(f"{1000 * statistics.median(times):.1f}" for times in each.values()) + " |")
    if given.out:
        about = {
            "command": f"python -m benchmarks.serving --rounds {given.rounds} --threads {given.threads}",
            "created": time.strftime("%Y-%m-%d"), "model": MODEL,
            "through": "as the server writes them, from the first prompt to the last token",
            "rows": ROWS, "read": READ, "written": WRITTEN, "mixes": MIXES, "rounds": given.rounds,
            "dtype": chosen.name, "environment": environment() | {"peft": version("peft")},
        }  # fmt: skip
        result = about | {"throughput": found, "ratios": faster, "latency": late}
        given.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
