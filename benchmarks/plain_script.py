"""What a script with peft and transformers alone reaches on a starter task: the control of Graft's own figures.

    python benchmarks/plain_script.py calendar_arithmetic --batch 8 --alpha 16

1,200 questions of reasoning_gym, one epoch, LoRA r=16 on all linears at 5e-4, exact match on 300 questions that are not
among them. Graft gives the folder of the model and the interval, nothing else.
"""

import argparse
import random
import time

import reasoning_gym
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from graft.model import locate
from graft.stats import interval

FAR = 5_000_000
"""Seeds s and s + 1 share all but one question, so test questions come from far away."""


def rendered(tokenizer, question, answer):
    """Ids of a dialogue, and labels that are -100 up to the answer."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{asked}{answer}<|im_end|>\n", add_special_tokens=False)["input_ids"]
    return whole, [-100] * len(before) + whole[len(before) :]


def train(model, rows, size, filler, rate=5e-4):
    """One epoch with AdamW and a rate that falls to 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(rows) // size)
    model.train()
    for start in range(0, len(rows) // size * size, size):
        batch = rows[start : start + size]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [filler] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def exact_matches(model, tokenizer, items, size=30):
    """How many greedy answers are the reference, after stripping."""
    model.eval()
    right = 0
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        asked = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": item["question"]}], tokenize=False, add_generation_prompt=True
            )
            for item in batch
        ]
        given = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.generate(**given, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for item, ids in zip(batch, output, strict=True):
            answer = tokenizer.decode(ids[given["input_ids"].shape[1] :], skip_special_tokens=True)
            right += answer.strip() == item["answer"].strip()
    return right


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    given = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    folder = locate("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=given.alpha, target_modules="all-linear"))
    asked = list(reasoning_gym.create_dataset(given.task, seed=1, size=1200))
    known = {item["question"] for item in asked}
    others = reasoning_gym.create_dataset(given.task, seed=FAR, size=600)
    test = [item for item in others if item["question"] not in known][:300]
    rows = [rendered(tokenizer, item["question"], item["answer"]) for item in asked]
    random.shuffle(rows)
    started = time.perf_counter()
    train(model, rows, given.batch, tokenizer.pad_token_id)
    seconds = time.perf_counter() - started
    right = exact_matches(model, tokenizer, test)
    bounds = interval([[1.0] * right + [0.0] * (len(test) - right)])
    print(
        f"{given.task}, batch {given.batch}, alpha {given.alpha}: {right} of {len(test)} right, {bounds.mean:.1%} "
        f"({bounds.low:.1%} to {bounds.high:.1%}), {seconds:.0f} s of training"
    )


if __name__ == "__main__":
    main()
