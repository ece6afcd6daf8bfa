"""The rules of the field, and from where they hold."""

from dataclasses import dataclass

SMALL, LARGE = 16 << 30, 48 << 30
"""Bytes of memory up to which, and from which, the rules of memory hold."""


MANY, MOST = 100_000, 1_000_000
"""Training rows above which the rules of AdaLoRA and of full fine-tuning hold."""


@dataclass(frozen=True)
class Rule:
    """A rule of the field."""

    when: str
    says: str
    source: str
    """The paper that it rests on; the round numbers in a rule are custom, and no paper's result."""


RULES: dict[str, Rule] = {
    "small": Rule("at most 16 GB on one device, where the base in 16 bits would take more than half of it",
                  "QLoRA: LoRA with r = 8 on a base in nf4", "Dettmers et al. 2023, arXiv 2305.14314"),
    "small-rank": Rule("at most 16 GB", "r = 8", "Hu et al. 2021, arXiv 2106.09685, section 7.2"),
    "middle": Rule("between 16 and 48 GB", "LoRA with r = 16 in bf16, and nf4 where that does not fit",
                   "Biderman et al. 2024, arXiv 2405.09673; Dettmers et al. 2023, arXiv 2305.14314"),
    "large": Rule("48 GB and more", "LoRA with r = 16 to 32 in bf16", "Biderman et al. 2024, arXiv 2405.09673"),
    "many-rows": Rule("more than 100,000 training rows", "AdaLoRA is worth a try",
                      "Zhang et al. 2023, arXiv 2303.10512"),
    "most-rows": Rule("more than 1,000,000 training rows, or continued pretraining on a cluster", "full fine-tuning",
                      "Biderman et al. 2024, arXiv 2405.09673"),
    "simple": Rule("simple tasks, such as classification", "r = 4 to 8",
                   "Hu et al. 2021, arXiv 2106.09685, section 7.2"),
    "complex": Rule("complex tasks: instructions or texts, more than 10,000 rows", "r = 32 to 64",
                    "Biderman et al. 2024, arXiv 2405.09673"),
    "alpha": Rule("always, for LoRA", "lora_alpha = 2 r", "Biderman et al. 2024, arXiv 2405.09673"),
    "targets": Rule("always, for LoRA", "all linear layers", "Dettmers et al. 2023, arXiv 2305.14314"),
    "many-tasks": Rule("many tasks on one base (--goal many-tasks)", "adapters that merge or route",
                       "Hu et al. 2021, arXiv 2106.09685"),
    "latency": Rule("latency counts (--goal latency)", "a method that merges into the base",
                    "Hu et al. 2021, arXiv 2106.09685"),
    "memory": Rule("memory counts (--goal memory)", "QLoRA with recomputed activations, one row to a pass",
                   "Dettmers et al. 2023, arXiv 2305.14314; Chen et al. 2016, arXiv 1604.06174"),
    "rate": Rule("LoRA on a base of 30 billion parameters and more", "learning rate 1e-4",
                 "Dettmers et al. 2023, arXiv 2305.14314"),
}  # fmt: skip
"""Rules by name; docs/recommend.md has the same table."""
