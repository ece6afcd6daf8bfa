"""The numbers that people repeat, beside what Graft counts, plans and measured, for docs/claims.md."""

from pages.kept import kept, signed
from pages.serving import slowdown


def numbers_table() -> str:
    """The numbers that people repeat, beside what docs/claims.py and the kept comparisons give."""
    lines = ["| claim | Graft | verdict |", "|---|---|---|"]
    lines += [f"| {claim} | {found} | {verdict} |" for claim, found, verdict in [*counted(), *planned(), *compared()]]
    return "\n".join(lines)


def holds(good: bool, otherwise: str = "wrong") -> str:
    """A verdict in a word."""
    return "holds" if good else otherwise


def counted() -> list[tuple[str, str, str]]:
    """Claims on parameters, what is counted, and verdicts."""
    run = kept("claims")
    count, whole = run["counts"], run["parameters"]

    def share(name: str, model: str) -> float:
        return float(100 * count[name] / whole[model])

    saved = 100 * (1 - count["one_matrix"] / 1024**2)
    ways = {"bottleneck": 3.0, "lora": 0.5, "prefix": 0.1, "ptuning_v2": 0.2}
    shares = {way: share(f"bert_base_{way}", "bert-base") for way in ways}
    near = [way for way, said in ways.items() if said / 1.5 <= shares[way] <= said * 1.5]
    gpt, bert, code = count["gpt3_lora"], share("bert_base_lora", "bert-base"), count["codellama_lora"]
    return [
        (
            "a 1024×1024 weight at r = 8: 16,384 parameters, 98.4 % fewer",
            f"count: {count['one_matrix']:,}, {saved:.1f} % fewer",
            holds(count["one_matrix"] == 16_384 and f"{saved:.1f}" == "98.4"),
        ),
        ("BERT-base, r = 8 on q and v: 0.02 % trainable", f"count: {bert:.2f} %", holds(abs(bert - 0.02) < 0.005)),
        (
            "CodeLlama-13B, r = 8 on q and v: 13 M",
            f"count: {code / 1e6:.2f} M",
            holds(abs(code / 13e6 - 1) < 0.05, "wrong: half of it"),
        ),
        (
            "GPT-3 175B, LoRA: 4.7 M, 0.0027 %",
            f"count, r = 1 on q and v: {gpt / 1e6:.2f} M, {share('gpt3_lora', 'gpt3-175b'):.4f} %",
            holds(f"{gpt / 1e6:.1f}" == "4.7" and f"{share('gpt3_lora', 'gpt3-175b'):.4f}" == "0.0027"),
        ),
        (
            "RoBERTa-base, LoRA: 0.3 M of 125 M",
            f"count, r = 8 on q and v: {count['roberta_lora'] / 1e6:.2f} M of {whole['roberta-base'] / 1e6:.1f} M",
            holds(f"{count['roberta_lora'] / 1e6:.1f}" == "0.3"),
        ),
        (
            "adapters train about 3 %, LoRA 0.5 %, prefix 0.1 %, P-tuning v2 0.2 %",
            "count on BERT-base, Graft's defaults: " + ", ".join(f"{way} {part:.2f} %" for way, part in shares.items()),
            f"depends on the settings; here within half again: {', '.join(near) or 'none'}",
        ),
    ]


def planned() -> list[tuple[str, str, str]]:
    """Claims on memory, what is planned, and verdicts; a GB is 10**9 bytes, but 2**30 on a card."""
    run = kept("claims")
    whole, plan, bits = run["parameters"], run["plans"], run["bits"]
    kinds, full = plan["full_13b"]["kinds"], plan["full_13b"]["peak"]
    fp32, fp16 = 4 * whole["llama-2-13b"], 2 * whole["llama-2-7b"]
    held = kinds["weights"] + kinds["adapter"] + kinds["gradients"] + kinds["optimizer"]
    nf4 = plan["qlora_7b"]["kinds"]["weights"]
    saved, constants = 100 * (1 - nf4 / fp16), bits["constants_of_a_block"]
    rows = [
        ("13B in fp32 is 52 GB", f"count: {fp32 / 1e9:.1f} GB", holds(f"{fp32 / 1e9:.0f}" == "52")),
        (
            "full fine-tuning of 13B: 416 GB by the 1:1:6 rule",
            f"plan, fp32, one row of 512 tokens: {held / 1e9:.0f} GB of weights, gradients and optimizer, peak {full / 1e9:.0f} GB",
            holds(abs(full / 416e9 - 1) < 0.1, "wrong: AdamW keeps two numbers for a weight, not six"),
        ),
        (
            "full fine-tuning takes 3 to 4 times the model's size",
            f"plan: {held / fp32:.1f} times at rest, {full / fp32:.1f} at the peak",
            holds(
                full / fp32 <= 4.05,
                f"{'holds' if held / fp32 <= 4.05 else 'wrong'} at rest; the peak has activations too",
            ),
        ),
        ("7B in fp16: 14 GB", f"count: {fp16 / 1e9:.1f} GB", holds(13 <= fp16 / 1e9 <= 14.5)),
        ("7B, QLoRA weights: 3 to 4 GB", f"plan: {nf4 / 1e9:.2f} GB", holds(3e9 <= nf4 <= 4e9)),
    ]
    for name, title, limit in (("qlora_codellama", "CodeLlama-13B", 15), ("qlora_65b", "LLaMA-65B", 48)):
        peak = plan[name]["peak"] / 2**30
        words = f"plan, one row of 512 tokens, activations recomputed: {peak:.1f} GB"
        rows.append((f"{title}, QLoRA in {limit} GB", words, holds(peak <= limit)))
    rows += [
        (
            "4-bit saves 80 % of memory",
            f"plan: the weights of 7B shrink by {saved:.0f} % from 16 bits (embeddings and head stay)",
            holds(saved >= 79, "too high"),
        ),
        (
            "double quantization cuts the constants from 32 to about 8 bits",
            f"count: {constants:.3f} bits for a block of {bits['block']} weights",
            holds(8 <= constants < 8.5),
        ),
    ]
    return rows


def compared() -> list[tuple[str, str, str]]:
    """Claims that the kept comparison of all methods answers, and those that nothing here measured."""
    run = kept("all-methods")
    rows = {row["label"]: row for row in run["rows"]}
    gap = next(v for v in run["verdicts"] if {v["first"], v["second"]} == {"full", "lora"})
    sign = 1 if gap["first"] == "full" else -1
    low, high = sorted((100 * sign * gap["low"], 100 * sign * gap["high"]))
    points = 100 * sign * gap["difference"]
    full, lora, adalora = rows["full"], rows["lora"], rows["adalora"]
    memory = lora["peak_memory_bytes"] / full["peak_memory_bytes"]
    time, longer = lora["train_seconds"] / full["train_seconds"], adalora["train_seconds"] / lora["train_seconds"]
    gain = 100 * (adalora["quality"] - lora["quality"])
    served = kept("serving")
    slower = {
        name: {figure: 100 * (slowdown(each, name) - 1) for figure, each in served["latency"].items()}
        for name in ("merged LoRA", "attached LoRA", "bottleneck")
    }
    forgot = [max(row["forgetting"].values()) for row in (full, lora)]
    told = f"{run['model']['name']}, {len(run['seeds'])} seeds"

    return [
        (
            "LoRA within 1 to 2 points of full fine-tuning",
            f"measured ({told}): full minus LoRA {signed(points)} points ({signed(low)} to {signed(high)})",
            holds(low >= -2 and high <= 2, "not seen" if low > 2 or high < -2 else "open: the interval reaches beyond"),
        ),
        (
            "LoRA needs 2/3 of the memory and half of the time",
            f"measured ({told}): {memory:.2f} of the memory, {time:.2f} of the time",
            holds(memory <= 0.7 and time <= 0.55, "not seen here: a small model; the claim is of BERT-base"),
        ),
        (
            "AdaLoRA takes nearly twice as long for under 1 %",
            f"measured ({told}): {longer:.2f} times as long, {signed(gain)} points",
            holds(1.6 <= longer <= 2.2 and gain < 1, "not seen here"),
        ),
        (
            "merged LoRA has the latency of the base; adapters +15 to +30 %",
            f"measured ({served['model']}, batch 1, {served['dtype']}, [serving-speed.md](serving-speed.md)): "
            + "; ".join(f"{name} {spread(found)} %" for name, found in slower.items()),
            latency_verdict(slower),
        ),
        ("full fine-tuning's learning rate (2e-5) does not work for LoRA", "not measured here yet", "open"),
        (
            "full fine-tuning forgets more than LoRA",
            f"measured ({told}): worst probe {signed(forgot[0])} against {signed(forgot[1])} points",
            holds(forgot[0] > forgot[1], "not seen here") + "; without an interval",
        ),
    ]


def spread(found: dict[str, float]) -> str:
    """The least and the largest of some percentages."""
    low, high = (f"{value:+.0f}".replace("-", "−") for value in (min(found.values()), max(found.values())))
    return f"{low} to {high}"


def latency_verdict(slower: dict[str, dict[str, float]]) -> str:
    """What was measured of merged LoRA, and of adapters: where the intervals of percentages overlap the claim's."""
    merged, bottleneck = slower["merged LoRA"].values(), slower["bottleneck"].values()
    first = "merged LoRA holds" if max(map(abs, merged)) < 10 else "merged LoRA: not seen in every figure"
    inside = [15 <= value <= 30 for value in bottleneck]
    if all(inside):
        return f"{first}; adapters hold"
    less = all(value < 15 for value in bottleneck)
    return f"{first}; adapters: {'in some figures' if any(inside) else 'less here' if less else 'not seen here'}"
