"""What the examples share: a tiny Llama built in code and two tasks it can learn in seconds.

The tasks: given a few numbers, continue with each of them plus one ("up"), or in reverse order
("back"). Nothing is downloaded.
"""

from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

TASKS = ("up", "back")
VOCAB, LENGTH = 24, 4
_START = {"up": 1, "back": 2}


def base_model() -> LlamaForCausalLM:
    """Return the base model, the same every time: it knows how to copy, and nothing else."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(150):
        ids, labels = batch("copy", 32, seed=step)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def batch(task: str, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (n, 9) and labels, in which only the answer counts."""
    draw = torch.Generator().manual_seed(seed)
    given = torch.randint(4, VOCAB - 1, (n, LENGTH), generator=draw)
    answer = {"copy": given, "up": given + 1, "back": given.flip(1)}[task]
    start = torch.full((n, 1), _START.get(task, 3))
    ids = torch.cat([start, given, answer], 1)
    labels = ids.clone()
    labels[:, : LENGTH + 1] = -100
    return ids, labels


class Rows(Dataset):
    """Examples of one task, as `Trainer` wants them."""

    def __init__(self, task: str, n: int = 512, seed: int = 1) -> None:
        self.ids, self.labels = batch(task, n, seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def lora() -> LoraConfig:
    """Return the adapters' config."""
    return LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "down_proj", "up_proj"]
    )


def train_adapter(model: torch.nn.Module, task: str, steps: int = 200) -> PeftModel:
    """Add an adapter for `task` to the model and train it; about five seconds."""
    torch.manual_seed(1)
    if isinstance(model, PeftModel):
        model.add_adapter(task, lora())
    else:
        model = get_peft_model(model, lora(), adapter_name=task)
    model.set_adapter(task)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        ids, labels = batch(task, 32, seed=1000 + step)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def score_of(task: str, n: int = 64) -> Callable[[torch.nn.Module], torch.Tensor]:
    """Return an eval function: mean log-likelihood of the answer, one value per example."""
    ids, _ = batch(task, n, seed=9)
    answers = ids[:, LENGTH + 1 :].unsqueeze(-1)

    def score(model: torch.nn.Module) -> torch.Tensor:
        logits = model(input_ids=ids).logits[:, LENGTH:-1].log_softmax(-1)
        return logits.gather(-1, answers).squeeze(-1).mean(1)

    return score


@torch.no_grad()
def accuracy(model: torch.nn.Module, task: str, n: int = 200) -> float:
    """Return the share of answer tokens that are right, on examples no one has seen."""
    ids, _ = batch(task, n, seed=10)
    found = model(input_ids=ids).logits[:, LENGTH:-1].argmax(-1)
    return (found == ids[:, LENGTH + 1 :]).float().mean().item()
