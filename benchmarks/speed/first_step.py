"""The least script that trains with peft and Trainer; it prints a line after the first optimizer step and ends.

python benchmarks/speed/first_step.py MODEL ROWS.jsonl chat|labels
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Tell(TrainerCallback):
    def on_step_end(self, *given: Any, **rest: Any) -> None:
        print("first step", flush=True)
        os._exit(0)


def main() -> None:
    model_path, file, kind = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rows = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
    data: list[dict[str, Any]] = []
    if kind == "chat":
        for row in rows:
            ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
            asked = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
            masked = [-100] * len(asked) + ids[len(asked) :]
            data.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": masked})
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
        config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        collate: Any = DataCollatorForSeq2Seq(tokenizer)
    else:
        names = sorted({row["label"] for row in rows})
        for row in rows:
            data.append({**tokenizer(row["text"], truncation=True), "labels": names.index(row["label"])})
        model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=len(names))
        config = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
        collate = DataCollatorWithPadding(tokenizer)
    arguments = TrainingArguments(
        output_dir=str(Path(file).parent / "out"), max_steps=1, per_device_train_batch_size=8, bf16=True,
        use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(
        model=get_peft_model(model, config), args=arguments, train_dataset=data, data_collator=collate,
        processing_class=tokenizer, callbacks=[Tell()],
    ).train()  # fmt: skip


if __name__ == "__main__":
    main()
