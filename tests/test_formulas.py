"""Every method that peft does not have, against its formula written out in plain PyTorch.

The formula runs in a second model with the same weights, of which Graft knows nothing: hooks of this file change the
outputs of its linears, and its attention is a softmax over an explicit mask. Each trainable tensor has a leaf with the
same values there; outputs and all gradients are compared.
"""

import math
import re
import warnings
from dataclasses import dataclass
from typing import ClassVar

import peft
import pytest
import torch
from bases import FACTORIES, WINDOW, batch, settings
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graft.errors import RecipeError, RouteError, UsageError
from graft.methods import store
from graft.methods.base import Method, Progress, read_method
from graft.methods.lora import Lora
from graft.model import Base
from graft.objectives.classify import Classify, LabelledExample
from graft.parts.attach import attach, detach, merge_into
from graft.parts.lowrank import LoraPart
from graft.train.loop import Trainer, make_accelerator
from graft.train.settings import Training

TOLERANCE = 1e-5
HEADS = 4


def one_key_head():
    """Four queries share one key, so the halves of the heads do too."""
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=1,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# Where things are ---------------------------------------------------------------------------------

_LLAMA = {
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    "attn": "self_attn.q_proj self_attn.o_proj", "mlp": "mlp.up_proj mlp.down_proj", "attention": "self_attn",
}  # fmt: skip


def _t5(mlp):
    linears = {f"attn.{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"}
    linears |= {"mlp.gate": f"{mlp}.wi_0", "mlp.up": f"{mlp}.wi_1", "mlp.down": f"{mlp}.wo"}
    blocks = {"attn": "layer.0.SelfAttention.q layer.0.SelfAttention.o", "mlp": f"{mlp}.wi_0 {mlp}.wo"}
    return linears | blocks | {"attention": "layer.0.SelfAttention", "cross": "layer.1.EncDecAttention"}


_BERT = {
    "attn.q": "attention.self.query", "attn.k": "attention.self.key", "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense", "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
    "attn": "attention.self.query attention.output.dense", "mlp": "intermediate.dense output.dense",
    "attention": "attention.self",
}  # fmt: skip
_GPT2 = {
    "attn.qkv": "attn.c_attn", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
    "attn": "attn.c_attn attn.c_proj", "mlp": "mlp.c_fc mlp.c_proj", "attention": "attn",
}  # fmt: skip
STACKS = {
    "bert": {"": ("encoder.layer", _BERT)},
    "gpt2": {"": ("transformer.h", _GPT2)},
    "llama": {"": ("model.layers", _LLAMA)},
    "t5": {
        "enc.": ("encoder.block", _t5("layer.1.DenseReluDense")),
        "dec.": ("decoder.block", _t5("layer.2.DenseReluDense")),
    },
}
"""The lists of layers of a family, and in a layer the module of each role; of a block the linear that reads its input
and the one that gives its output."""
FAMILIES = tuple(STACKS)
STACKS |= dict.fromkeys(("one_key_head", "mistral", "gemma3"), STACKS["llama"])
WINDOWS = {"mistral": (WINDOW, WINDOW), "gemma3": (WINDOW, None)}

FUSED = ("gpt2",)


def sites(kind, *roles, layers=(0, 1)):
    """Names of sites: what an adapter must have, no more and no less."""
    return [f"{stack}layers.{layer}.{role}" for stack in STACKS[kind] for layer in layers for role in roles]


def modules_of(kind, site):
    """The modules where a site's input enters and where its output leaves."""
    stack, layer, role = re.fullmatch(r"(.*?)layers\.(\d)\.(.*)", site).groups()
    path, places = STACKS[kind][stack]
    return [f"{path}.{layer}.{place}" for place in places[role].split()]


def make(kind):
    """A base whose every tensor is away from where it starts."""
    torch.manual_seed(0)
    model = (FACTORIES | {"one_key_head": one_key_head})[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return Base(model, None, kind)


def adapted(kind, method, name="mine", base=None, shake=0.3, **more):
    """An attached adapter on a new base, every tensor away from where it starts."""
    base = base or make(kind)
    torch.manual_seed(1)
    given = method if isinstance(method, Method) else read_method({"name": method} | more)
    adapter = given.build(base, name)
    attach(base, adapter)
    with torch.no_grad():
        for _, tensor in adapter.trainable():
            tensor.add_(torch.randn_like(tensor) * shake)
    return base, adapter.eval()


# Attention written out ----------------------------------------------------------------------------


def visible(real, causal, window=None, group=None):
    """Which position sees which, [B, HEADS, S, S]; real [B, S] marks the tokens that are not padding.

    With groups, the second half of the heads has its boundaries half a group earlier.
    """
    rows = torch.arange(real.shape[1])
    i, j = rows[:, None], rows[None]
    seen = real.bool()[:, None, None, :].expand(-1, HEADS, len(rows), -1).clone()
    if causal:
        seen &= j <= i
    if window:
        seen &= i - j < window
    if group:
        seen[:, : HEADS // 2] &= i // group == j // group
        seen[:, HEADS // 2 :] &= (i + group // 2) // group == (j + group // 2) // group
    return seen


@dataclass
class Core:
    """What an attention module is to do: which positions are seen, and keys and values [n, 2, kv_heads, d] in front."""

    seen: torch.Tensor
    prefix: torch.Tensor | None = None


def written_out(module, query, key, value, mask, scaling=None, position_bias=None, **_):
    """softmax(q k^T · scale + bias) v over what is seen; `mask` is always None."""
    assert mask is None
    core, seen = module.core, module.core.seen
    if core.prefix is not None:
        front = core.prefix.permute(1, 2, 0, 3)[:, None].expand(-1, len(key), -1, -1, -1)
        key, value = torch.cat([front[0], key], dim=2), torch.cat([front[1], value], dim=2)
        n = len(core.prefix)
        seen = torch.cat([torch.ones_like(seen[..., :1]).expand(*seen.shape[:-1], n), seen], dim=-1)
        if position_bias is not None:
            position_bias = torch.cat(
                [torch.zeros_like(position_bias[..., :1]).expand(-1, -1, -1, n), position_bias], -1
            )
    key, value = (states.repeat_interleave(HEADS // states.shape[1], dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    shares = scores.masked_fill(~seen, -1e9).softmax(dim=-1)
    return (shares @ value).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("written_out", written_out)
ALL_MASK_ATTENTION_FUNCTIONS.register("written_out", lambda *_, **__: None)


# A model with a formula in it, and the comparison -------------------------------------------------


class Written:
    """A second model with the base's weights, and leaves [name: tensor] with the values of the adapter's tensors."""

    def __init__(self, kind, adapter=None):
        self.kind, self.model, self.shift = kind, make(kind).model, 0
        trained = adapter.trainable() if adapter else []
        self.leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in trained}

    def of(self, site):
        """The leaves of one site."""
        return {
            name.removeprefix(f"{site}."): leaf for name, leaf in self.leaves.items() if name.startswith(f"{site}.")
        }

    def at(self, names, formula):
        """At each site, let y be formula(its leaves, x, y)."""
        for name in names:
            paths, leaves, got = modules_of(self.kind, name), self.of(name), {}
            enter, leave = self.model.get_submodule(paths[0]), self.model.get_submodule(paths[-1])
            enter.register_forward_pre_hook(lambda _, args, got=got: got.update(x=args[0]))
            leave.register_forward_hook(lambda _, args, y, got=got, leaves=leaves: formula(leaves, got["x"], y))

    def train(self, name, value=None):
        """Let the model's own tensor train, from a value."""
        own = self.model.get_parameter(name).requires_grad_()
        if value is not None:
            own.data.copy_(value)
        return own

    def attention(self, given, group=None, cores=visible):
        """Write attention out in every layer, with the masks of this batch."""
        self.model.set_attn_implementation("written_out")
        real = given["attention_mask"]
        for stack in STACKS[self.kind]:
            causal = self.kind != "bert" and stack != "enc."
            own = torch.ones_like(real) if stack == "dec." else real  # the decoder's own row has no mask
            for layer in (0, 1):
                window = WINDOWS.get(self.kind, (None, None))[layer]
                path = modules_of(self.kind, f"{stack}layers.{layer}.attention")[0]
                self.model.get_submodule(path).core = Core(cores(own, causal, window, group))
                if stack == "dec.":
                    cross = self.model.get_submodule(modules_of(self.kind, f"dec.layers.{layer}.cross")[0])
                    cross.core = Core(visible(real, causal=False))

    def prefix(self, names):
        """Put keys and values in front at these attentions; the row's own positions move."""
        for name in names:
            values = self.of(name)["values"]
            self.model.get_submodule(modules_of(self.kind, name)[0]).core.prefix = values
            self.shift = len(values)


def outputs(model, kind, given, shift=0):
    """States or logits at real positions [N, width], and BERT's pooled states below them."""
    more = {"position_ids": torch.arange(shift, shift + given["input_ids"].shape[1])[None]} if shift else {}
    if kind == "t5":
        ids = given["input_ids"]
        more = {"decoder_input_ids": torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)}
    if kind != "bert":
        more["use_cache"] = False
    result = model(**given, **more)
    real = given["attention_mask"].bool()
    if kind == "bert":
        return torch.cat([result.last_hidden_state[real], result.pooler_output])
    return result.logits[real]


def loss_of(values):
    """A fixed function in which every value counts."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(5))
    return (weights * values).sum() / values.numel() ** 0.5


class Tally:
    """Comparisons so far, and the largest difference, relative to values above 1."""

    def __init__(self):
        self.count, self.largest = 0, 0.0

    def same(self, mine, written, what):
        """Equal within the tolerance, and with something in it."""
        assert mine is not None, f"{what}: nothing from Graft"
        assert written is not None, f"{what}: nothing from the formula"
        assert mine.shape == written.shape, what
        size = float(written.abs().max())
        assert size > 1e-5, f"{what}: the formula gives zeros"
        difference = float((mine - written).abs().max())
        assert difference <= min(TOLERANCE * max(1.0, size), 1e-3 * size), f"{what}: {difference:.2g} of {size:.2g}"
        self.count += 1
        self.largest = max(self.largest, difference / max(1.0, size))


@pytest.fixture
def tally():
    return Tally()


def compare(tally, base, adapter, written, given, entry="mine"):
    """Outputs and every gradient, once; the adapter must matter. Returns the number of trained tensors."""
    kind = written.kind
    with base.route(entry):
        mine = outputs(base.model, kind, given)
    theirs = outputs(written.model, kind, given, written.shift)
    with torch.no_grad(), base.route(None):
        assert float((outputs(base.model, kind, given) - mine).abs().max()) > 1e-2
    tally.same(mine.detach(), theirs.detach(), "outputs")
    loss_of(mine).backward()
    loss_of(theirs).backward()
    trained = adapter.trainable()
    assert {name for name, _ in trained} == written.leaves.keys()
    for name, tensor in trained:
        tally.same(tensor.grad, written.leaves[name].grad, f"gradient of {name}")
        tensor.grad = None
    assert all(p.grad is None for p in base.model.parameters() if not p.requires_grad)
    return len(trained)


def low_rank(scale):
    return lambda leaf, x, y: y + scale * (x @ leaf["lora_A"].T @ leaf["lora_B"].T)


# BitFit, frozen and full --------------------------------------------------------------------------


def with_biases(kind):
    """The second model with a bias of zeros at every linear of its layers that has none."""
    written = Written(kind)
    for path, _ in STACKS[kind].values():
        for module in written.model.get_submodule(path).modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                module.bias = nn.Parameter(torch.zeros(module.out_features))
    return written


def is_key(name):
    return re.search(r"\.(key|k_proj|k)\.bias$", name) is not None


def without_keys(name, tensor):
    """A fused bias without its keys, which have no gradient: Adam makes full steps of its rounding."""
    return torch.cat([tensor[:32], tensor[64:]]) if name.endswith("c_attn.bias") else tensor


@pytest.mark.parametrize(("kind", "count"), [("bert", 16), ("gpt2", 13), ("llama", 14), ("t5", 30)])
def test_bitfit_is_plain_training_of_the_biases(tally, kind, count):
    base, adapter = adapted(kind, "bitfit")
    given, written = batch(), with_biases(kind)
    added = {
        f"{site.path}.bias": (name, b) for (site, _), (name, b) in zip(adapter.placed, adapter.trainable(), strict=True)
    }
    all_biases = {name for name, _ in written.model.named_parameters() if name.endswith(".bias")}
    assert added.keys() == {name for name in all_biases if kind == "llama" or not is_key(name)}
    assert len(added) == count
    start = {path: written.model.get_parameter(path).detach().clone() for path in added}
    for path, (name, b) in added.items():
        written.leaves[name] = written.train(path, start[path] + b.detach())
    compare(tally, base, adapter, written, given)
    mine, theirs = (
        torch.optim.AdamW(values, lr=1e-2, weight_decay=0.0)
        for values in ([b for _, b in added.values()], written.leaves.values())
    )
    for _ in range(3):
        mine.zero_grad()
        theirs.zero_grad()
        with base.route("mine"):
            loss_of(outputs(base.model, kind, given)).backward()
        loss_of(outputs(written.model, kind, given)).backward()
        mine.step()
        theirs.step()
    for path, (name, b) in added.items():
        trained, plain = start[path] + b.detach(), written.leaves[name].detach()
        tally.same(without_keys(path, trained), without_keys(path, plain), f"{path} after three steps")
    assert tally.count == 1 + 2 * count


@pytest.mark.parametrize("kind", FAMILIES)
def test_biases_of_keys_have_a_gradient_only_where_positions_are_rotary(kind):
    given, written = batch(), with_biases(kind)
    written.model.requires_grad_(True)
    loss_of(outputs(written.model, kind, given)).backward()
    biases = {name: p.grad for name, p in written.model.named_parameters() if name.endswith(".bias")}
    keys = [
        grad[32:64] if "c_attn" in name else grad for name, grad in biases.items() if is_key(name) or "c_attn" in name
    ]
    others = [grad[64:] if "c_attn" in name else grad for name, grad in biases.items() if not is_key(name)]
    assert len(keys) == {"t5": 6}.get(kind, 2)
    largest, least = max(float(grad.abs().max()) for grad in keys), min(float(grad.abs().max()) for grad in others)
    if kind == "llama":
        assert largest > 1e-3
    else:
        assert largest < 1e-6 * max(float(grad.abs().max()) for grad in others)
        assert least > 1e-3


PLAIN = [
    ("bert", {"name": "full"}, r""),
    ("gpt2", {"name": "full"}, r""),
    ("llama", {"name": "full"}, r""),
    ("t5", {"name": "full"}, r""),
    ("bert", {"name": "frozen", "last_layers": 1}, r"^encoder\.layer\.1\.|^pooler"),
    ("gpt2", {"name": "frozen", "last_layers": 1}, r"^transformer\.h\.1\."),
    ("llama", {"name": "frozen", "last_layers": 2}, r"^model\.layers\."),
    ("t5", {"name": "frozen", "last_layers": 1}, r"^(en|de)coder\.block\.1\."),
    ("bert", {"name": "frozen", "last_layers": 0, "norms": True, "pooler": False}, r"LayerNorm"),
    ("gpt2", {"name": "frozen", "last_layers": 0, "norms": True}, r"\.ln_"),
    ("llama", {"name": "frozen", "last_layers": 0, "norms": True}, r"norm"),
    ("t5", {"name": "frozen", "last_layers": 0, "norms": True}, r"layer_norm"),
    ("bert", {"name": "frozen", "last_layers": 0, "pooler": False, "pattern": r"query\."}, r"query"),
    ("llama", {"name": "frozen", "last_layers": 0, "pattern": r"[01]\.mlp"}, r"mlp"),
    ("gpt2", {"name": "frozen", "last_layers": 0, "pattern": "lm_head"}, r"wte"),  # one tensor of two names
    ("gpt2", {"name": "frozen", "last_layers": 0, "pattern": "wte"}, r"wte"),
]


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize(("kind", "given", "names"), PLAIN)
def test_frozen_and_full_are_plain_training(tally, kind, given, names, exclusive):
    """Gradients at each of three steps, and the tensors after them; the others stay."""
    base, adapter = adapted(kind, read_method(given | {"exclusive": exclusive}))
    model = make(kind).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name: p.requires_grad_() for name, p in model.named_parameters() if re.search(names, name)}
    every_name = dict(model.named_parameters(remove_duplicate=False))
    pairs = [(name, tensor, every_name[name]) for name, tensor in adapter.trainable()]
    assert {id(plain) for _, _, plain in pairs} == {id(plain) for plain in trained.values()}
    assert len(pairs) == len(trained)
    for _, tensor, plain in pairs:
        plain.data.copy_(tensor.detach())
    mine, theirs = (torch.optim.SGD([pair[which] for pair in pairs], lr=0.02) for which in (1, 2))
    for step in range(3):
        rows = batch(seed=step)
        mine.zero_grad()
        theirs.zero_grad()
        with base.route("mine"):
            loss_of(outputs(base.model, kind, rows)).backward()
        loss_of(outputs(model, kind, rows)).backward()
        for name, tensor, plain in pairs:
            if is_key(name):  # rounding only
                assert max(float(tensor.grad.abs().max()), float(plain.grad.abs().max())) < 1e-6
                tally.count += 1
                continue
            tally.same(tensor.grad, plain.grad, f"gradient of {name}, step {step}")
        mine.step()
        theirs.step()
    for name, tensor, plain in pairs:
        tally.same(tensor.detach(), plain.detach(), name)
    assert tally.count == 4 * len(pairs)
    state = model.state_dict()
    ours = base.state()
    moved = {id(every_name[name]) for name, _, _ in pairs}
    still = [name for name in ours if id(every_name.get(name)) not in moved]
    assert all(torch.equal(ours[name], before[name]) and torch.equal(state[name], before[name]) for name in still)


# DyLoRA -------------------------------------------------------------------------------------------

R = 4
DYLORA = {"r": R, "lora_alpha": 6}


def dylora_targets(kind):
    return ["attn.qkv"] if kind in FUSED else ["attn.q", "attn.v"]


def cut(b, alpha=6.0, root=False, last_only=False):
    """(alpha / b) B[:, :b] A[:b], with a gradient for all of it or only for row and column b."""

    def formula(leaf, x, y):
        a, up = leaf["lora_A"][:b], leaf["lora_B"][:, :b]
        if last_only:
            a = torch.stack([*a[:-1].detach(), a[-1]])
            up = torch.stack([*up.T[:-1].detach(), up.T[-1]], dim=1)
        return y + alpha / (b**0.5 if root else b) * (x @ a.T @ up.T)

    return formula


def draw(adapter, b):
    """Call what the loop calls before a step until it has drawn b."""
    adapter.train()
    for step in range(200):
        adapter.method.before_step(adapter, Progress(step + 1, 200))
        if adapter.shared.now(training=True) == b:
            return
    raise AssertionError(f"{b} was never drawn")


@pytest.mark.parametrize("more", [{}, {"frozen": True}, {"use_rslora": True}])
@pytest.mark.parametrize("kind", FAMILIES)
def test_dylora_at_every_rank(tally, kind, more):
    for b in range(1, R + 1):
        base, adapter = adapted(kind, "dylora", **DYLORA, **more)
        for drawn in (True, False):
            if drawn:
                draw(adapter, b)
            else:
                adapter.eval()
                adapter.method.use_rank(adapter, b)
            written = Written(kind, adapter)
            last_only = bool(more.get("frozen")) and drawn
            written.at(sites(kind, *dylora_targets(kind)), cut(b, root="use_rslora" in more, last_only=last_only))
            compare(tally, base, adapter, written, batch())
    stacks = len(STACKS[kind])
    assert tally.count == R * 2 * (1 + 2 * stacks * 2 * len(dylora_targets(kind)))


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora_draws_one_rank_for_all_sites_and_every_rank_as_often(frozen):
    """Which rank a step uses is seen from its gradients alone."""
    base, adapter = adapted("llama", "dylora", **DYLORA, frozen=frozen)
    adapter.train()
    given = batch(rows=1, length=3, padded=None)
    counts = [0] * (R + 1)
    torch.manual_seed(7)
    for step in range(200):
        adapter.method.before_step(adapter, Progress(step + 1, 200))
        with base.route("mine"):
            base.hidden(given).last.square().sum().backward()
        reached = set()
        for name, tensor in adapter.trainable():
            rows = tensor.grad if name.endswith("lora_A") else tensor.grad.T
            reached.add(tuple(row.any().item() for row in rows))
            tensor.grad = None
        (found,) = reached
        b = max(index + 1 for index in range(R) if found[index])
        assert found == tuple((index == b - 1) if frozen else (index < b) for index in range(R))
        counts[b] += 1
    assert counts[0] == 0
    assert all(30 <= count <= 70 for count in counts[1:]), counts  # 50, give or take three deviations of 6.1


def test_dylora_at_a_site_of_less_rank_uses_all_of_it(tally):
    names = sites("llama", "attn.q"), sites("llama", "attn.v")
    for b in range(1, R + 1):
        base, adapter = adapted("llama", "dylora", **DYLORA, rank_pattern={"attn.v": 2})
        adapter.method.use_rank(adapter, b)
        written = Written("llama", adapter)
        written.at(names[0], cut(b))
        written.at(names[1], cut(min(b, 2)))
        compare(tally, base, adapter, written, batch())
    assert tally.count == R * 9


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_dylora_saved_at_a_rank_is_a_lora_of_peft(tally, kind, rank, tmp_path):
    pattern = {"rank_pattern": {"attn.v": 2}} if kind == "llama" else {}
    base, adapter = adapted(kind, "dylora", **DYLORA, **pattern)
    adapter.method.use_rank(adapter, rank)
    given = batch()
    with torch.no_grad(), base.route("mine"):
        mine = outputs(base.model, kind, given)
    store.save(adapter, base, tmp_path / "cut")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = peft.PeftModel.from_pretrained(make(kind).model, str(tmp_path / "cut")).eval()
        tally.same(mine, outputs(model, kind, given), "peft's outputs")
    assert model.peft_config["default"].r == rank
    assert {len(p) for name, p in model.named_parameters() if "lora_A" in name} == {
        rank,
        min(rank, 2) if pattern else rank,
    }
    fresh = make(kind)
    again = store.load(fresh, tmp_path / "cut", "again")
    assert again.method.name == "lora"
    with torch.no_grad(), fresh.route("again"):
        tally.same(outputs(fresh.model, kind, given), mine, "read again")
    merge_into(base, "mine")
    with torch.no_grad():
        tally.same(outputs(base.model, kind, given), mine, "merged")
    assert tally.count == 3


@pytest.mark.parametrize("rank", [-1, 0, R + 1])
def test_dylora_has_no_rank_outside(rank):
    _, adapter = adapted("llama", "dylora", **DYLORA)
    with pytest.raises(UsageError, match=f"^rank {rank} is none of dylora's; its ranks: 1 to 4$"):
        adapter.method.use_rank(adapter, rank)


def test_dylora_refuses_rows_that_would_never_be_drawn():
    with pytest.raises(UsageError, match=r"rank_pattern: 6 is above r, 4") as caught:
        read_method({"name": "dylora", "rank_pattern": {"attn.v": 6}} | DYLORA).build(make("llama"), "mine")
    assert "\n" not in str(caught.value)


# Adapters and the unified view --------------------------------------------------------------------

ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "none": lambda x: x}


def bypass(act, form="parallel", scale=1.0):
    """h + s·Δh, or (1-λ)h + λs·Δh where there is a gate, with Δh = f(h Wd + bd) Wu + bu."""

    def formula(leaf, x, y):
        seen = x if form == "parallel" else y
        middle = ACTIVATIONS[act](seen @ leaf["down.weight"].T + leaf["down.bias"])
        change = scale * (middle @ leaf["up.weight"].T + leaf["up.bias"])
        if "gate" not in leaf:
            return y + change
        share = torch.tanh(leaf["gate"])
        return (1 - share) * y + share * change

    return formula


@pytest.mark.parametrize(("placement", "roles"), [("houlsby", ("attn", "mlp")), ("pfeiffer", ("mlp",))])
@pytest.mark.parametrize("kind", FAMILIES)
def test_bottleneck(tally, kind, placement, roles):
    places = sites(kind, *roles)
    for act in ("relu", "gelu", "silu", "tanh"):
        base, adapter = adapted(kind, "bottleneck", bottleneck_size=6, placement=placement, activation=act)
        written = Written(kind, adapter)
        written.at(places, bypass(act, "sequential"))
        assert compare(tally, base, adapter, written, batch()) == 4 * len(places)
    assert tally.count == 4 * (1 + 4 * len(places))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", FAMILIES)
def test_parallel(tally, kind, scale):
    places = sites(kind, "mlp")
    for act in ("relu", "gelu", "silu", "tanh"):
        base, adapter = adapted(kind, "parallel", bottleneck_size=6, scale=scale, activation=act)
        written = Written(kind, adapter)
        written.at(places, bypass(act, scale=scale))
        assert compare(tally, base, adapter, written, batch()) == 4 * len(places)
    assert tally.count == 4 * (1 + 4 * len(places))


@pytest.mark.parametrize("composition", ["add", "gated"])
@pytest.mark.parametrize("form", ["parallel", "sequential"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_unified(tally, kind, form, composition):
    places = ["attn", "mlp.up", "mlp"]
    tensors = 5 if composition == "gated" else 4
    for act in ACTIVATIONS:
        more = {"form": form, "composition": composition, "act": act, "place": places, "width": 6, "scale": 1.5}
        base, adapter = adapted(kind, "unified", **more)
        written = Written(kind, adapter)
        written.at(sites(kind, *places), bypass(act, form, 1.5))
        assert compare(tally, base, adapter, written, batch()) == tensors * len(sites(kind, *places))
    assert tally.count == len(ACTIVATIONS) * (1 + tensors * len(sites(kind, *places)))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_unified_view_has_lora_as_a_point(tally, kind):
    """No activation, beside a linear, scale alpha / r, biases zero: outputs and gradients are those of LoRA."""
    targets = dylora_targets(kind)
    base, lora = adapted(kind, "lora", r=R, lora_alpha=6)
    other, point = adapted(kind, "unified", act="none", place=targets, width=R, scale=6 / R)
    assert [site.name for site, _ in lora.placed] == [site.name for site, _ in point.placed]
    with torch.no_grad():
        for left, right in zip(lora.parts, point.parts, strict=True):
            right.down.weight.copy_(left.lora_A)
            right.up.weight.copy_(left.lora_B)
            right.down.bias.zero_()
            right.up.bias.zero_()
    results = []
    for one in (base, other):
        with one.route("mine"):
            results.append(outputs(one.model, kind, batch()))
        loss_of(results[-1]).backward()
    tally.same(results[1].detach(), results[0].detach(), "outputs")
    for left, right in zip(lora.parts, point.parts, strict=True):
        tally.same(right.down.weight.grad, left.lora_A.grad, "A")
        tally.same(right.up.weight.grad, left.lora_B.grad, "B")
    assert tally.count == 1 + 2 * len(sites(kind, *targets))


# Prefixes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FAMILIES, "one_key_head", "mistral"])
def test_mam(tally, kind):
    attentions, blocks = sites(kind, "attention"), sites(kind, "mlp")
    base, adapter = adapted(kind, "mam", num_virtual_tokens=3, bottleneck_size=6, activation="gelu", scale=2.0)
    written = Written(kind, adapter)
    written.attention(batch())
    written.prefix(attentions)
    written.at(blocks, bypass("gelu", scale=2.0))
    assert compare(tally, base, adapter, written, batch()) == len(attentions) + 4 * len(blocks)
    assert tally.count == 1 + len(attentions) + 4 * len(blocks)


@pytest.mark.parametrize("kind", FAMILIES)
def test_mam_is_a_prefix_and_a_parallel_adapter(kind):
    """Exactly: the same tensors in two adapters on the same rows give the same bits."""
    base, adapter = adapted(kind, "mam", num_virtual_tokens=3, bottleneck_size=6, scale=2.0)
    adapted(kind, "prefix", "front", base, num_virtual_tokens=3)
    adapted(kind, "parallel", "beside", base, bottleneck_size=6, scale=2.0)
    halves = dict([*base.adapters["front"].named_tensors(), *base.adapters["beside"].named_tensors()])
    whole = dict(adapter.named_tensors())
    assert halves.keys() == whole.keys()
    results, gradients = [], []
    for entry, tensors in (("mine", whole), (("front", "beside"), halves)):
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(whole[name])
        with base.route(entry):
            results.append(outputs(base.model, kind, batch()))
        loss_of(results[-1]).backward()
        gradients.append({name: tensor.grad for name, tensor in tensors.items()})
    assert torch.equal(*results)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in whole)
    assert all(gradient.any() for gradient in gradients[0].values())


def test_the_parallel_half_of_mam_is_half_as_wide_as_the_base():
    _, adapter = adapted("llama", "mam")
    shapes = {tuple(tensor.shape) for _, tensor in adapter.named_tensors()}
    assert shapes == {(30, 2, 2, 8), (16, 32), (16,), (32, 16), (32,)}


@pytest.mark.parametrize("last_layers", [None, 1, 2])
@pytest.mark.parametrize("kind", [*FAMILIES, "one_key_head", "mistral"])
def test_ptuning_v2(tally, kind, last_layers):
    layers = (1,) if last_layers == 1 else (0, 1)
    attentions = sites(kind, "attention", layers=layers)
    base, adapter = adapted(kind, "ptuning_v2", num_virtual_tokens=3, last_layers=last_layers)
    written = Written(kind, adapter)
    written.attention(batch())
    written.prefix(attentions)
    assert compare(tally, base, adapter, written, batch()) == len(attentions)
    assert tally.count == 1 + len(layers) * len(STACKS[kind])


def test_ptuning_v2_takes_the_last_layers_of_each_stack():
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4)
    base = Base(T5ForConditionalGeneration(config).eval(), None, "uneven")
    adapter = read_method({"name": "ptuning_v2", "last_layers": 2}).build(base, "mine")
    names = [site.name for site, _ in adapter.placed]
    assert names == [f"{where}.attention" for where in ("enc.layers.1", "enc.layers.2", "dec.layers.0", "dec.layers.1")]
    with pytest.raises(UsageError, match=r"last_layers: 3, and .* has 2 layers"):
        read_method({"name": "ptuning_v2", "last_layers": 3}).build(base, "mine")


# LongLoRA -----------------------------------------------------------------------------------------

LONG = {"r": 4, "lora_alpha": 6}
EMBEDDINGS = {
    "bert": "embeddings.word_embeddings", "gpt2": "transformer.wte", "llama": "model.embed_tokens", "t5": "shared",
}  # fmt: skip
LONG_FAMILIES = (*FAMILIES, "one_key_head", "mistral", "gemma3")


def long(kind, **more):
    """LongLoRA, and its formula without groups: LoRA at all weights of attention, own embeddings and norms."""
    base, adapter = adapted(kind, "longlora", shake=0.1, **LONG, **more)
    written = Written(kind, adapter)
    linears = ("attn.qkv", "attn.o") if kind in FUSED else ("attn.q", "attn.k", "attn.v", "attn.o")
    written.at(sites(kind, *linears), low_rank(6 / 4))
    embedding = f"{EMBEDDINGS.get(kind, EMBEDDINGS['llama'])}.weight"
    names = [name for name, _ in written.model.named_parameters()]
    own = [name for name in names if re.search(r"norm|LayerNorm|\.ln_", name) or name == embedding]
    for name in own:
        written.leaves[name] = written.train(name, written.leaves[name].detach())
    assert len(adapter.trainable()) == 2 * len(sites(kind, *linears)) + len(own)
    return base, adapter, written


@pytest.mark.parametrize("kind", LONG_FAMILIES)
def test_longlora_outside_training_has_full_attention(tally, kind):
    base, adapter, written = long(kind)
    written.attention(batch())
    assert 1 + compare(tally, base, adapter, written, batch()) == tally.count > 15


@pytest.mark.parametrize("size", [2, 4, 6, 8, None])
@pytest.mark.parametrize("kind", LONG_FAMILIES)
def test_longlora_in_training_attends_within_shifted_groups(tally, kind, size):
    """Rows of nine, padded on the right: groups of 4 are 4 4 1, shifted 2 4 3; a quarter of nine is 2."""
    base, adapter, written = long(kind, group_size=size)
    given = batch()
    written.attention(given, group=size or 2)
    with torch.no_grad(), base.route("mine"):
        full = outputs(base.model, kind, given)
    adapter.train()
    base.model.train()
    assert 1 + compare(tally, base, adapter, written, given) == tally.count > 15
    with torch.no_grad(), base.route("mine"):
        # A sliding window of four hides what long groups would.
        least = 1e-3 if kind == "mistral" and size == 8 else 1e-2
        assert float((outputs(base.model, kind, given) - full).abs().max()) > least


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "one_key_head", "t5"])
def test_longlora_is_full_attention_where_groups_cover_the_row(kind):
    given = batch(length=8)
    for size, covers in ((12, False), (14, False), (16, True), (64, True)):
        base, adapter, _ = long(kind, group_size=size)
        with torch.no_grad(), base.route("mine"):
            full = outputs(base.model, kind, given)
            adapter.train()
            base.model.train()
            difference = float((outputs(base.model, kind, given) - full).abs().max())
        assert (difference < 1e-6) == covers, (size, difference)


def changed_after(ids):
    """Row t is the first row, with other tokens after position t."""
    other = torch.where(ids == 7, 8, 7)
    later = torch.arange(len(ids))[None] > torch.arange(len(ids))[:, None]
    return torch.where(later, other[None], ids[None])


def leak(model, ids, kind):
    """The largest change of logits at positions up to t when only tokens after t change; row t is for one t."""
    size = len(ids)
    up_to = torch.arange(size)[None] <= torch.arange(size)[:, None]
    results = []
    for rows in (ids.expand(size, -1), changed_after(ids)):
        more = {"input_ids": rows}
        if kind == "t5":  # the encoder's row may not change
            more = {"input_ids": ids.expand(size, -1), "decoder_input_ids": rows}
        with torch.no_grad():
            results.append(model(**more, use_cache=False).logits)
    difference = (results[0] - results[1]).abs().amax(dim=-1)
    assert float(difference[~up_to].max()) > 1e-2  # the other positions see the change
    return float(difference[up_to].max())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "one_key_head", "mistral", "t5"])
def test_longlora_never_lets_a_token_see_a_later_one(kind):
    ids = batch(rows=1, length=8, padded=None)["input_ids"][0]
    base = make(kind)
    for size in range(2, 2 * len(ids) + 1, 2):
        _, adapter = adapted(kind, "longlora", base=base, group_size=size)
        adapter.train()
        base.model.train()
        with base.route("mine"):
            assert leak(base.model, ids, kind) == 0.0, size
        detach(base, "mine")
        base.model.eval()


def rolled(real, causal, window, group):
    """The variant of the paper's code: the second half of the heads sees the row rolled by half a group."""
    seen = visible(real, causal, window, group)
    rows = (torch.arange(real.shape[1]) - group // 2) % real.shape[1]
    i, j = rows[:, None], rows[None]
    seen[:, HEADS // 2 :] = (i // group == j // group) & (j <= i)
    return seen


def test_rolling_the_row_would_leak():
    """The check above finds the fault that it is for."""
    ids = batch(rows=1, length=8, padded=None)["input_ids"][0]
    given = {"attention_mask": torch.ones(8, 8)}
    written = Written("llama")
    for size in (4, 8):
        written.attention(given, group=size)
        assert leak(written.model, ids, "llama") == 0.0
        written.attention(given, group=size, cores=rolled)
        assert leak(written.model, ids, "llama") > 1e-2


@pytest.mark.parametrize("method", ["longlora", "molora", "malora"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_recomputed_activations_give_the_same_gradients(tally, kind, method):
    more = {"group_size": 4} if method == "longlora" else {"num_experts": 3}
    found = []
    for recomputed in (False, True):
        base, adapter = adapted(kind, method, shake=0.15, **more)
        base.model.train()
        adapter.train()
        if recomputed:
            base.checkpoint_activations()
        with base.route("mine"):
            loss_of(outputs(base.model, kind, batch())).backward()
        found.append({name: tensor.grad for name, tensor in adapter.trainable()})
    for name, plain in found[0].items():
        tally.same(found[1][name], plain, name)
    assert tally.count == len(adapter.trainable()) > 5


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "one_key_head"])
def test_longlora_in_training_refuses_padding_on_the_left(kind):
    base, adapter = adapted(kind, "longlora")
    given = batch(padded="left")
    with torch.no_grad(), base.route("mine"):
        base.hidden(given)
        adapter.train()
        with pytest.raises(RouteError, match="pad on the right") as caught:
            base.hidden(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", [("mine", "front"), ("front", "mine")])
@pytest.mark.parametrize("method", ["prefix", "mam"])
@pytest.mark.parametrize("kind", ["bert", "llama", "one_key_head", "t5"])
def test_longlora_in_training_refuses_a_prefix_on_the_same_rows(kind, method, order):
    base, adapter = adapted(kind, "longlora")
    adapted(kind, method, "front", base, **settings(method))
    with torch.no_grad(), base.route(order):
        base.hidden(batch())
        adapter.train()
        with pytest.raises(RouteError, match="cannot be trained on the same rows as a prefix") as caught:
            base.hidden(batch())
    assert "\n" not in str(caught.value)


# Mixtures of experts ------------------------------------------------------------------------------

EXPERTS = 3


def mixture(scale, top):
    """y + s Σ_t G(x)_t B_t A_t x, expert by expert; G is the softmax over the `top` best scores."""

    def formula(leaf, x, y):
        scores = x @ leaf["router.weight"].T
        if top < EXPERTS:
            least = scores.sort(dim=-1, descending=True).values[..., top - 1 : top]
            scores = scores.masked_fill(scores < least, -math.inf)
        shares = scores.softmax(dim=-1)
        result = y
        for t in range(EXPERTS):
            if "experts_A" in leaf:
                low = x @ leaf["experts_A"][t].T
            else:
                low = x @ leaf["shared_A"].T @ leaf["experts_P"][t].T
            result = result + scale * shares[..., t : t + 1] * (low @ leaf["experts_B"][t].T)
        return result

    return formula


@pytest.mark.parametrize("top", [2, EXPERTS])
@pytest.mark.parametrize(("method", "tensors"), [("molora", 3), ("malora", 4)])
@pytest.mark.parametrize("kind", FAMILIES)
def test_mixtures_of_experts(tally, kind, method, tensors, top):
    roles = [*dylora_targets(kind), "mlp.up"]
    more = {"r": 2, "lora_alpha": 2, "num_experts": EXPERTS, "top_k": top, "target_modules": roles}
    base, adapter = adapted(kind, method, shake=0.15, **more)
    written = Written(kind, adapter)
    written.at(sites(kind, *roles), mixture(1.0, top))
    compare(tally, base, adapter, written, batch())
    assert tally.count == 1 + tensors * len(sites(kind, *roles))


@pytest.mark.parametrize("method", ["molora", "malora"])
@pytest.mark.parametrize("top", [2, 3, 5])
def test_router_weights_sum_to_one_over_the_best(method, top):
    _, adapter = adapted("llama", method, r=2, num_experts=5, top_k=top)
    x = torch.randn(4, 7, 32)
    for part in adapter.parts:
        weights = part.router(x)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 7))
        assert ((weights > 0).sum(dim=-1) == top).all()
        scores = x @ part.router.weight.T
        best = scores.argsort(dim=-1, descending=True)
        assert torch.equal(weights.argsort(dim=-1, descending=True)[..., :top], best[..., :top])
        if top == 5:
            torch.testing.assert_close(weights, scores.softmax(dim=-1))


@pytest.mark.parametrize("method", ["molora", "malora"])
def test_top_k_that_cannot_be(method):
    with pytest.raises(RecipeError, match=r"top_k.* 2"):
        read_method({"name": method, "top_k": 1})
    with pytest.raises(UsageError, match=r"^top_k: 4 is more than num_experts, 3"):
        read_method({"name": method, "r": 2, "num_experts": 3, "top_k": 4}).build(make("llama"), "mine")


def test_malora_starts_from_the_best_approximation_of_random_experts(monkeypatch):
    """Eckart and Young: no matrix of rank d is nearer; what is missing are the other singular values."""
    drawn = []
    draw_values = nn.init.kaiming_uniform_

    def recording(tensor, *args, **kwargs):
        drawn.append(draw_values(tensor, *args, **kwargs).detach().clone())
        return tensor

    monkeypatch.setattr(nn.init, "kaiming_uniform_", recording)
    method = read_method({"name": "malora", "r": 4, "num_experts": 5, "target_modules": ["attn.q"]})
    adapter = method.build(make("llama"), "mine")
    drawn = [tensor for tensor in drawn if tensor.shape == (5, 32)]  # r' = 9r / 8, rounded up
    assert len(drawn) == 5 * len(adapter.parts)
    for part, first in zip(adapter.parts, range(0, len(drawn), 5), strict=True):
        stacked = torch.cat(drawn[first : first + 5])
        assert 0.9 / 32**0.5 < float(stacked.abs().max()) <= 1 / 32**0.5  # as LoRA's
        assert part.shared_A.shape == (8, 32)
        near = torch.cat([p @ part.shared_A for p in part.experts_P])
        tail = torch.linalg.svdvals(stacked)[8:]
        assert float(tail.square().sum()) > 0.1
        torch.testing.assert_close((stacked - near).norm().square(), tail.square().sum())
        torch.testing.assert_close(torch.linalg.matrix_norm(stacked - near, 2), tail[0])
        assert torch.linalg.matrix_rank(near) == 8


def test_malora_has_fewer_parameters_than_molora():
    """Eight experts at a matrix 384 wide: 29 % fewer than MoLoRA of the same r, 27 % with the routers of both."""
    config = BertConfig(
        vocab_size=99, hidden_size=384, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    base = Base(BertModel(config), None, "wide")
    built = {name: read_method({"name": name, "target_modules": ["attn.q"]}) for name in ("molora", "malora")}
    counts = {name: method.build(base, "mine").trainable_count() for name, method in built.items()}
    router = 8 * 384
    assert counts["molora"] == 8 * (8 * 384 + 384 * 8) + router
    assert counts["malora"] == 16 * 384 + 8 * (9 * 16 + 384 * 9) + router
    assert 1 - (counts["malora"] - router) / (counts["molora"] - router) == pytest.approx(0.289, abs=5e-4)
    assert 1 - counts["malora"] / counts["molora"] == pytest.approx(0.272, abs=5e-4)


# The training loop --------------------------------------------------------------------------------

ROWS = [
    LabelledExample([5 + i % 2, 11 + i % 7, 20 + i % 5, 30 + i % 3][: 4 - i % 3], None, i % 2, f"row {i}")
    for i in range(24)
]


def trainer(base, adapter, training, rate=1e-2):
    """A trainer of the label, which is a row's first token."""
    objective = Classify(head_dropout=0.0, pooling="mean")
    torch.manual_seed(2)
    objective.prepare(base, adapter, ("even", "odd"))
    attach(base, adapter)
    return Trainer(base, adapter, objective, Training(**training), rate, 3, make_accelerator("fp32"))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_one_training_of_dylora_serves_every_rank(kind, frozen):
    base = make(kind)
    adapter = read_method({"name": "dylora", "frozen": frozen} | DYLORA).build(base, "mine")
    made = trainer(base, adapter, {"max_steps": 30, "num_train_epochs": 99, "per_device_train_batch_size": 8})
    untrained = made.objective.evaluate(base, ROWS, "mine", 8)
    fit = made.fit(ROWS, ROWS)
    assert fit.steps == 30
    default = made.objective.evaluate(base, ROWS, "mine", 8)
    found = {}
    for rank in adapter.method.ranks():
        adapter.method.use_rank(adapter, rank)
        found[rank] = made.objective.evaluate(base, ROWS, "mine", 8)
        assert found[rank].loss < untrained.loss / 2
        # The same as a LoRA of that rank which holds the first rows and columns.
        plain = read_method({"name": "lora", "r": rank, "lora_alpha": 6}).build(base, "plain")
        plain.head = adapter.head
        for (_, small), (_, large) in zip(plain.placed, adapter.placed, strict=True):
            assert isinstance(small, LoraPart)
            small.lora_A.data, small.lora_B.data = large.lora_A.data[:rank], large.lora_B.data[:, :rank]
        attach(base, plain)
        again = made.objective.evaluate(base, ROWS, "plain", 8)
        assert again.correct == found[rank].correct
        assert again.loss == pytest.approx(found[rank].loss, abs=1e-6)
        detach(base, "plain")
    assert list(found) == [1, 2, 3, 4]
    assert len({result.loss for result in found.values()}) == R
    assert found[R] == default
    assert max(result.quality for result in found.values()) == 1.0


class Watched(Lora):
    """LoRA that notes what the loop calls, with a penalty whose gradient is known."""

    name: ClassVar[str] = "watched"
    calls: ClassVar[list] = []
    weight: ClassVar[float] = 0.0

    def before_step(self, adapter, progress):
        assert all(tensor.grad is None for _, tensor in adapter.trainable())
        self.calls.append(("before", progress))

    def penalty(self, adapter):
        self.calls.append("penalty")
        return self.weight * sum(part.lora_B.sum() for part in adapter.parts)

    def after_optimizer(self, adapter, progress):
        assert all(tensor.grad is not None for _, tensor in adapter.trainable())
        self.calls.append(("after", progress))


class Passes(Classify):
    """Notes each forward pass of training."""

    name: ClassVar[str] = "passes"

    def loss(self, base, examples, route):
        Watched.calls.append(len(examples))
        return super().loss(base, examples, route)


def watched(size, passes, weight=0.0):
    """What the loop called in three steps of 12 rows, and the tensors after them."""
    Watched.calls, Watched.weight = [], weight
    base, objective = make("llama"), Passes(head_dropout=0.0, pooling="mean")
    torch.manual_seed(2)
    adapter = Watched(r=2).build(base, "mine")
    made = trainer(
        base, adapter,
        {"max_steps": 3, "num_train_epochs": 9, "per_device_train_batch_size": size,
         "gradient_accumulation_steps": passes, "eval_steps": 99, "max_grad_norm": 1e3, "preflight": False},
    )  # fmt: skip
    made.objective = objective
    made.fit(ROWS, ROWS)
    return Watched.calls, adapter.tensors()


@pytest.mark.parametrize("passes", [1, 3])
def test_the_loop_calls_a_method_once_for_each_step(passes):
    calls, _ = watched(12 // passes, passes)
    expected = []
    for step in (1, 2, 3):
        progress = Progress(step, 3)
        expected += [("before", progress), *[12 // passes] * passes, "penalty", ("after", progress)]
    assert calls == expected


def test_the_penalty_counts_once_however_the_batch_is_cut(tally):
    whole, cut_up, without = watched(12, 1, 0.05)[1], watched(4, 3, 0.05)[1], watched(12, 1)[1]
    for name, tensor in whole.items():
        tally.same(cut_up[name], tensor, name)
    assert tally.count == 2 * 4 + 1  # the head of this family has no bias
    assert max(float((whole[name] - without[name]).abs().max()) for name in whole) > 1e-3
