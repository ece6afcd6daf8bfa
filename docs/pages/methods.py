"""docs/methods.md: the methods in the unified view, and what they are tested on."""

from graft.families import FAMILIES
from graft.methods.base import methods
from graft.methods.table import served_by


def methods_page() -> str:
    """docs/methods.md."""
    lines = ["| method | function | sees | changes | composition | merges | served by | source |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, method in methods().items():
        view = method.unified
        lines.append(
            f"| `{name}` | {view.function} | {view.sees} | {view.changes} | {view.composition} "
            f"| {'yes' if method.mergeable else 'no'} | {served_by(method)} "
            f"| {method.source} |"
        )
    parts = [
        "# Methods",
        "The methods in the unified view of He et al. (2022, arXiv 2110.04366): h is the output of the place that is changed, Δh what"
        " the method adds, s a scale, λ a softmax weight. `graft methods --model NAME` adds the number of parameters on a base;"
        " [recipes.md](recipes.md) has the settings.",
        "This page is written by `make docs`.",
        "\n".join(lines),
        "*served by*: what serves an adapter attached to its base (PEFT only where its classifier pools as the adapter does, vLLM only"
        " LoRA on decoders without a task head; the card in an adapter folder says it of that folder). A method that merges can be made part of the base (`graft merge`),"
        " and the result runs wherever the base does.",
        "## The matrix",
        matrix(),
        "## References",
        "Methods that `peft` has (LoRA with rsLoRA, ranks by site and embeddings, DoRA, AdaLoRA with its penalty and every step of its"
        " schedule, VeRA, (IA)³, prefix, prompt and P-tuning) equal it to 1e-5 in outputs, loss and gradients on tiny Llama (grouped"
        " queries), GPT-2 and BERT models, and each reads the other's folders with equal logits (`tests/test_peft.py`,"
        " `tests/test_peft_more.py`, `tests/test_adalora.py`, `tests/test_bridge.py`). The others are compared with formulas written out in"
        " `tests/test_formulas.py`.",
        "Where Graft differs from `peft` on purpose: AdaLoRA's default scale is LoRA's, and triplets of equal importance are pruned one by"
        " one, never below the budget; DoRA's dropout leaves the input of the frozen weight alone; (IA)³ sits at keys and values on"
        " every architecture (on GPT-2 at the fused projection, as in peft); a pooler reads the row's first token, not the first virtual one, unless `pool: virtual`.",
        "What cannot work is refused: rows of one T5 batch cannot have relative-position tables of their own (full fine-tuning"
        " that is not exclusive, mixed by row), and T5 takes rows padded on the right only.",
    ]
    return "\n\n".join(parts) + "\n"


def matrix() -> str:
    """How many pairs of a method and an architecture are tested, and which are refused."""
    reasons = [
        (name, kind, reason)
        for name, method in methods().items()
        for kind, family in FAMILIES.items()
        if (reason := method.refuses(family)) is not None
    ]
    pairs = len(methods()) * len(FAMILIES) - len(reasons)
    text = (
        f"{len(methods())} methods on {len(FAMILIES)} architectures: {pairs} pairs, on tiny random models of each. Tested on every"
        " pair: the shapes and the start; that what trains moves and nothing else does; equal gradients with recomputed activations;"
        " rows alone and in one batch with all other methods (but for the exception below), padded on either side; stacking; detaching"
        " bit for bit; saving; merging (BitFit only where linears have biases); and, but for encoders, generating with and without a"
        " cache (`tests/test_methods.py`). Mistral and Gemma 3 are there with"
        " sliding windows shorter than the rows, Gemma 3 is its text model (`gemma3_text`)."
    )
    if not reasons:
        return f"{text} No pair is refused."
    lines = ["| refused method | architecture | reason |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {reason} |" for name, kind, reason in reasons]
    return f"{text} Refused before a model is loaded:\n\n" + "\n".join(lines)
