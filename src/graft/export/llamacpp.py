"""Models for llama.cpp and Ollama: merged in memory, written as GGUF, read again, and compared tensor by tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from graft.data.dialogue import Message
from graft.errors import DamagedError, DataError, GraftError, NotMergeable, UsageError
from graft.export.gguffile import QUANTS, Speech, Written, file_bytes, write_gguf, write_vocabulary
from graft.export.layouts import Layout, context_length, layout_of
from graft.export.modelfile import begins_with_bos, modelfile
from graft.export.origin import Origin, check_room
from graft.export.probes import LONGEST, TEXTS, Agreement, compare, probe_rows, scores_of
from graft.export.vocabulary import Vocabulary, vocabulary_of
from graft.families import FAMILIES
from graft.files import write_text
from graft.gguf import convert, read_tokenizer
from graft.merge import NAME, Source, Watch, attached
from graft.methods import store
from graft.model import Base, config_of, load_base, load_tokenizer, locate
from graft.parts.attach import merge_into
from graft.parts.head import adapter_head
from graft.rendering.render import Renderer
from graft.train.guards import digest

MERGED_TOP1 = 0.999
"""Least share of positions where merged and attached adapter agree on the next token, in fp32."""

LARGEST = {"f32": 1e-4, "f16": 1e-2}
"""Largest difference of any score between the file, read back, and the model, relative to the largest score (at least
1)."""

DIVERGENCE = {"bf16": 0.01, "q8_0": 0.01, "q5_1": 0.2, "q5_0": 0.2, "q4_1": 0.3, "q4_0": 0.3}
"""Largest mean divergence, in nats, of the file's distributions of the next token from the model's."""

assert {*LARGEST, *DIVERGENCE} == {*QUANTS}


@dataclass(frozen=True)
class Wanted:
    """What a file is to be."""

    quant: str
    """One of `QUANTS`."""
    rank: int | None
    """At which an adapter with ranks is merged; the highest by default."""
    original: bool
    """Whether to merge into the base as it was before it was quantized."""
    ollama: bool
    """Whether a Modelfile goes beside."""


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer with its template, and how a file has them."""

    tokenizer: Any
    renderer: Renderer
    vocabulary: Vocabulary
    speech: Speech
    stop_ids: tuple[int, ...]


def export_gguf(origin: Origin, work: Path, wanted: Wanted, tell: Watch) -> dict[str, Any]:
    """Write a GGUF file, and a Modelfile if wanted, into the folder `work`; returns what was checked and noted.

    Raises `UsageError` before weights are read where the architecture or tokenizer has no form in GGUF, and
    `DamagedError` when the file, read again, is not the model.
    """
    if origin.adapter is not None and store.about_of(origin.adapter).get("head") is not None:
        raise _classifier(origin)
    tokenizer = load_tokenizer(origin.model)
    config = config_of(origin.model)
    layout = layout_of(config)
    tokens = _tokens(tokenizer, origin, config)
    tell("checking the tokenizer", 0.0)
    _check_tokenizer(tokens, config, layout, work)
    base, rows, expected, checks = _model(origin, wanted, tokens, tell)
    check_room(work, file_bytes(base, layout, wanted.quant))
    path = work / f"{origin.name}-{wanted.quant}.gguf"
    fingerprint = base.fingerprint
    written = write_gguf(
        base, path, _title(origin.name), wanted.quant, layout, tokens.vocabulary, tokens.speech,
        lambda phase, share: tell(phase, 0.4 + 0.3 * share),
    )  # fmt: skip
    rounded = scores_of(base, None, rows)
    del base  # reading takes as much memory again
    tell("reading what was written", 0.7)
    checks |= _read_again(path, work, rows, (expected, rounded), written, wanted.quant, tokens)
    longest, note = context_length(config)
    notes = [*tokens.vocabulary.notes, *([note] if note else []), *_told(written, tokens)]
    if wanted.ollama:
        text, more, odd = modelfile(path.name, tokens.tokenizer, tokens.renderer, tokens.stop_ids, longest)
        write_text(work / "Modelfile", text)
        checks, notes = checks | more, notes + odd
    return {
        "model_fingerprint": fingerprint,
        "template_sha256": tokens.renderer.sha256 if tokens.renderer.template else None,
        "tensors": written.kinds,
        "checks": checks,
        "notes": notes,
    }


def _title(name: str) -> str:
    """`general.name`; transformers takes a file with the very name "mistral" for another architecture."""
    return "Mistral" if name == "mistral" else name


def _classifier(origin: Origin) -> UsageError:
    return UsageError(f"{origin.given} is a classifier, whose head has no place in GGUF", "export it with --to hf")


def _told(written: Written, tokens: _Tokens) -> list[str]:
    """What of the file is not as asked."""
    found = []
    if written.coarse:
        found.append(f"{written.coarse} matrices stay in f16: their rows are no multiple of 32")
    if len(tokens.speech.more_ends) > 2:
        found.append(f"{len(tokens.speech.more_ends) + 1} tokens end an answer, a file has room for 3")
    return found


def _tokens(tokenizer: Any, origin: Origin, config: Any) -> _Tokens:
    """What a file says of the tokenizer and the template, the adapter's where it has one."""
    template = None if origin.adapter is None else store.template_of(origin.adapter)
    if template is not None:
        tokenizer.chat_template = template
    renderer = Renderer(tokenizer)
    eos = tokenizer.eos_token_id
    stop_ids = tuple(sorted(renderer.stop_ids | _stated_ends(origin.model)))
    speech = Speech(
        bos=tokenizer.bos_token_id,
        eos=eos,
        unknown=tokenizer.unk_token_id,
        pad=tokenizer.pad_token_id,
        more_ends=tuple(number for number in stop_ids if number != eos),
        add_bos=begins_with_bos(tokenizer, renderer),
        template=renderer.template,
    )
    return _Tokens(tokenizer, renderer, vocabulary_of(tokenizer, config.vocab_size), speech, stop_ids)


def _stated_ends(model: str) -> frozenset[int]:
    """The ids at which the base's own generation configuration ends an answer."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(locate(model)).eos_token_id
    except (OSError, ValueError, TypeError):  # there is none
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def _check_tokenizer(tokens: _Tokens, config: Any, layout: Layout, work: Path) -> None:
    """Write a file of the tokenizer alone and read it. Raises `UsageError` where texts become other tokens."""
    with TemporaryDirectory(dir=work, prefix=".tokens-") as alone:
        path = Path(alone) / "vocabulary.gguf"
        write_vocabulary(path, config, layout, tokens.vocabulary, tokens.speech)
        try:
            read = read_tokenizer(path)
        except GraftError as error:
            raise UsageError(
                f"the tokenizer cannot be read from a GGUF file: {error.message.replace(f'{path}: ', '')}",
                "export it with --to hf",
            ) from None
    other = _other_text(tokens, read)
    if other is not None:
        raise UsageError(
            f"the tokenizer cuts {other[:30]!r} into other tokens when it is read from a GGUF file",
            "export it with --to hf",
        )


def _other_text(tokens: _Tokens, read: Any) -> str | None:
    """A text that a tokenizer read from a file cuts in another way; None when there is none."""
    for text in TEXTS:
        ids = tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
        if read(text, add_special_tokens=False)["input_ids"] != ids:
            return text
    begins = read("Hello")["input_ids"][:1] == [tokens.speech.bos]
    return "the begin of a text" if begins != tokens.speech.add_bos else None


def _model(
    origin: Origin, wanted: Wanted, tokens: _Tokens, tell: Watch
) -> tuple[Base, list[list[int]], list[Tensor], dict[str, Any]]:
    """The model to write in fp32, probe rows, what it computes on them, and how far that is from the adapter."""
    if origin.adapter is None:
        tell("loading the base", 0.1)
        base = load_base(origin.model)
        longest = min(LONGEST, context_length(base.config)[0])
        rows = probe_rows(base, tokens.renderer, longest)
        return base, rows, scores_of(base, None, rows), {}
    source = Source(origin.adapter, origin.model, origin.holder or origin.adapter)
    quantized = store.quantized_from(origin.adapter)
    before = None if wanted.original else quantized
    base, adapter, rank = attached(source, wanted.rank, before, lambda phase, share: tell(phase, 0.1 + 0.6 * share))
    if adapter_head(adapter) is not None:
        raise _classifier(origin)
    longest = min(LONGEST, context_length(base.config)[0])
    rows = probe_rows(base, tokens.renderer, longest)
    tell("computing with the adapter attached", 0.3)
    then = scores_of(base, NAME, rows)
    tell("merging", 0.35)
    del adapter
    try:
        merge_into(base, NAME)
    except NotMergeable as error:
        raise NotMergeable(error.message, error.remedy or "use the adapter attached: `graft chat`") from None
    now = scores_of(base, None, rows)
    agreed = compare(then, now)
    if agreed.top1 < MERGED_TOP1 or not agreed.largest <= LARGEST["f32"] * max(1.0, agreed.scale):
        raise DamagedError(
            f"the merged model's scores differ by {agreed.largest:.3g} from the attached adapter's, with the same "
            f"likeliest token at {agreed.top1:.2%} of {agreed.positions} positions",
            "please report this",
        )
    how = {} if quantized is None else {"merged_into": "original" if wanted.original else "dequantized"}
    return base, rows, now, how | {"merged_rank": rank, "merged_and_attached": agreed.as_dict()}


def _read_again(
    path: Path, work: Path, rows: Sequence[Sequence[int]], expected: tuple[list[Tensor], list[Tensor]],
    written: Written, quant: str, tokens: _Tokens,
) -> dict[str, Any]:  # fmt: skip
    """Read a file as `load_base` does and compare it with the `expected` scores of the model and of the model with its
    weights rounded as in the file; raises `DamagedError` where it is not the model."""
    with TemporaryDirectory(dir=work, prefix=".read-") as folder:
        try:
            convert(path, Path(folder), lambda phase, share: None, FAMILIES)
            base = load_base(folder)
        except (UsageError, DamagedError) as error:
            raise DamagedError(f"the file cannot be read: {error.message}", "please report this") from None
        state = base.state()
        changed = [name for name, bits in written.bits.items() if name not in state or digest(state[name]) != bits]
        if changed:
            raise DamagedError(
                f"{len(changed)} of {len(written.bits)} tensors are not what was to be written, first {changed[0]}",
                "check the disk",
            )
        found = scores_of(base, None, rows)
        agreed, same = compare(expected[0], found), compare(expected[1], found)
        if not same.largest <= LARGEST["f32"] * max(1.0, same.scale):
            raise DamagedError(
                f"the file holds the right numbers, but its scores differ by {same.largest:.3g} from those of the "
                "model with these numbers: its settings are others",
                "please report this",
            )
        _check_close(agreed, quant)
        prompts = _check_prompts(tokens, base.tokenizer)
        del state, base
    bound = {"largest": LARGEST[quant] * max(1.0, agreed.scale)} if quant in LARGEST else {"kl": DIVERGENCE[quant]}
    return {
        "tensors": len(written.bits), "prompts": prompts, "file_and_model": agreed.as_dict(), "bound": bound,
        "file_and_rounded": same.as_dict(),
    }  # fmt: skip


def _check_close(agreed: Agreement, quant: str) -> None:
    if quant in LARGEST:
        value, bound, what = agreed.largest, LARGEST[quant] * max(1.0, agreed.scale), "largest difference of a score"
    else:
        value, bound, what = agreed.kl, DIVERGENCE[quant], "mean divergence, in nats,"
    if not value <= bound:
        finer = QUANTS[max(0, QUANTS.index(quant) - 1)]
        raise DamagedError(
            f"in {quant} the {what} from the model is {value:.3g}, {bound:.3g} is allowed, and the likeliest token is "
            f"the same at {agreed.top1:.1%} of {agreed.positions} positions",
            f"use a finer format, such as --quant {'f16' if quant.startswith('q') else finer}",
        )


def _check_prompts(tokens: _Tokens, read: Any) -> int:
    """Compare the ids of texts and prompts by the file's tokenizer and template; returns how many."""
    other = _other_text(tokens, read)
    if other is None and tokens.renderer.template:
        again = Renderer(read)
        for text in TEXTS:
            try:
                ids = tokens.renderer.prompt([Message("user", text)])
            except DataError:
                continue
            if again.prompt([Message("user", text)]) != ids:
                other = text
    if other is not None:
        raise DamagedError(f"the file's tokenizer cuts {other[:30]!r} into other tokens", "please report this")
    return len(TEXTS)
