"""Tiny tokenizers of every kind that chat models have, trained in memory on a few sentences."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Hello there, how are you today? I am fine, thank you!",
    "What is the capital of France? The capital of France is Paris.",
    "user system assistant model USER: ASSISTANT: ### Instruction:\n### Response:\n\n",
    "Write a short poem about the sea.\n\nThe sea is wide,\n  the sea is deep,\n\n\nand so is sleep.",
    "def add(a, b):\n    return a + b\n",
    '{"name": "weather", "arguments": {"city": "Oslo"}}',
    "<<SYS>> <</SYS>>",
]

MARKERS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "smollm": ["<|im_start|>", "<|im_end|>"],
    "qwen": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "llama2": [],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "zephyr": [],
    "deepseek": ["<｜User｜>", "<｜Assistant｜>"],
    "command-r": [f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT")],
    "vicuna": [],
    "alpaca": [],
}
"""The special tokens that each template writes, beside BOS and EOS."""

ENDS = {
    "chatml": "<|im_end|>",
    "smollm": "<|im_end|>",
    "qwen": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "command-r": "<|END_OF_TURN_TOKEN|>",
}
"""The token that ends a turn, where it is not EOS."""


def wrap(backend: Tokenizer, markers: Sequence[str], **names: Any) -> PreTrainedTokenizerFast:
    """As transformers has it, with `markers` as special tokens and `<think>` as an added token that is not special."""
    backend.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    # transformers would else warn that text cannot be restored exactly.
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen cut text: a run of line ends stays whole, whatever follows it."""


def byte_level(
    markers: Sequence[str] = (), *, gpt2: bool = False, add_prefix_space: bool = False, **names: Any
) -> PreTrainedTokenizerFast:
    """Llama 3 and Qwen, or with `gpt2` GPT-2 and SmolLM: bytes; pad is eos unless `names` say otherwise."""
    backend = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(WORDS), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=gpt2)
    backend.pre_tokenizer = whole if gpt2 else pre_tokenizers.Sequence([cut, whole])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    names = {"bos_token": "<|bos|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"} | names
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(dict.fromkeys(name for name in names.values() if name))
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    backend.train_from_iterator(TEXTS, trainer)
    return wrap(backend, markers, **names)


def sentence_piece(
    markers: Sequence[str] = (), *, kind: str = "first", lower: bool = False, **names: Any
) -> PreTrainedTokenizerFast:
    """Llama 2, Mistral, Gemma: "▁" for spaces and bytes for what is unknown.

    `kind`: "prepend" is the normalizer of Llama 2's older files, "first" and "always" are schemes of Metaspace, "none"
    is Gemma's, which puts no space before a text. BOS before plain texts. `lower` adds NFKC and lower case.
    """
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.NFKC(), normalizers.Lowercase()] if lower else []
    if kind == "prepend":
        steps += [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    elif kind == "none":
        steps += [normalizers.Replace(" ", "▁")]
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=kind, split=False)
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(pieces + ([] if kind == "none" else [decoders.Strip(" ", 1, 0)]))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Words alone, or "▁" would join them into one.
    words = [word for text in TEXTS for word in text.replace(" ", " ▁").split()]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special[:3], show_progress=False, min_frequency=1)
    backend.train_from_iterator(words + list(special[3:]), trainer)
    known = backend.get_vocab()
    backend = _with_pieces(backend, [piece for piece in special if piece not in known])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"} | names
    return wrap(backend, markers, **names)


def _with_pieces(backend: Tokenizer, pieces: Sequence[str]) -> Tokenizer:
    """The same tokenizer with further pieces in its model's vocabulary."""
    state = json.loads(backend.to_str())
    for piece in pieces:
        state["model"]["vocab"][piece] = len(state["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(state))


def word_piece(markers: Sequence[str] = (), **names: Any) -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, no spaces kept."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False, min_frequency=1)
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A $B", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"} | names
    return wrap(backend, markers, **names)


MAKERS: dict[str, Callable[[Sequence[str]], PreTrainedTokenizerFast]] = {
    "bytes": byte_level,
    "bytes gpt2": lambda markers: byte_level(markers, gpt2=True),
    "pieces first": lambda markers: sentence_piece(markers, kind="first"),
    "pieces prepend": lambda markers: sentence_piece(markers, kind="prepend"),
    "pieces none": lambda markers: sentence_piece(markers, kind="none", pad_token="<unk>"),
}
"""The kinds that keep every character, so that decoding gives the text back."""


@cache
def chat_tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of `MAKERS` with the special tokens of a template."""
    return MAKERS[kind](MARKERS[template])
