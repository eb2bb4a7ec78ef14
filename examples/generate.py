"""A language model answers several prompts at once, with all of its attention done by MATE.

    python examples/generate.py
    python examples/generate.py --tokens 128 --prompts "Why is the sky blue?" "What is gravity?"
    python examples/generate.py --device cuda

Requests arrive while others are being answered. Every step runs the model once, on a ragged batch: one token
of each answer, and a piece of each prompt that is still being read. All keys and values live in one paged
cache; a request owns some of its pages while it runs and gives them back when it is done. In each layer a
single call of `flash_attn_with_kvcache` rotates the new queries and keys, writes the new keys and values into
their pages, and attends to everything that each request has seen so far. On a GPU the steps in which nothing
but answers grows are replays of a CUDA graph, captured the first time that so many requests are answered.

Then the same model answers through Transformers' own `generate`, with attn_implementation="mate".

Both are compared with the same model under PyTorch's attention; the exit status says whether they agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence

import smollm2
import torch

import mate
from mate.integrations import transformers as mate_transformers

PROMPTS = (
    "Why is the sky blue?",
    "What is the capital of France?",
    "Write a short story about a robot who learns to paint.",
    "List three tips for better sleep.",
    "What is gravity?",
    "Explain how a rainbow forms.",
)
STEPS_BETWEEN_ARRIVALS = 5
TOKENS_PER_STEP = 32  # prompts are read in pieces, so that a long one does not hold up the others
PAGE_SIZE = 16
REQUESTS_IN_CACHE = 4  # further ones wait for pages


@dataclasses.dataclass
class Request:
    """A prompt and its answer."""

    prompt: str
    arrival: int  # the step at which it becomes known
    tokens: list[int]  # the prompt, and the answer as it grows
    prompt_length: int
    length_limit: int
    cached: int = 0  # how many of the tokens have their keys and values in the cache
    pages: list[int] = dataclasses.field(default_factory=list)
    logits: list[torch.Tensor] = dataclasses.field(default_factory=list)  # of each token of the answer


class PagedCache:
    """The keys and values of every layer, in pages that requests own for as long as they run.

    All layers share the table of pages: token t of a request is row t % page_size of its page t // page_size.
    """

    def __init__(self, config, longest: int, like: torch.Tensor):
        self.most_pages = -(-longest // PAGE_SIZE)  # of a request
        num_pages = REQUESTS_IN_CACHE * self.most_pages
        shape = (num_pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        # NaN, so that reading a place before it was written could not go unnoticed.
        self.layers = [
            (like.new_full(shape, torch.nan), like.new_full(shape, torch.nan)) for _ in range(config.num_hidden_layers)
        ]
        self.num_pages = num_pages
        self.free_pages = list(range(num_pages))

    def admit(self, request: Request) -> bool:
        """Give the request pages for as long as it may become, if there are enough."""
        needed = -(-request.length_limit // PAGE_SIZE)
        if needed > len(self.free_pages):
            return False
        request.pages = [self.free_pages.pop() for _ in range(needed)]
        return True

    def release(self, request: Request) -> None:
        self.free_pages += request.pages
        request.pages = []

    def page_table(self, requests: Sequence[Request]) -> list[list[int]]:
        """As wide as the longest request needs, so that captured graphs serve them all."""
        return [request.pages + [0] * (self.most_pages - len(request.pages)) for request in requests]


@dataclasses.dataclass
class Step:
    """What the model reads in one step, as tensors on its device."""

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor  # where each request's tokens begin and end
    cache_seqlens: torch.Tensor  # how many tokens each has in the cache already
    page_table: torch.Tensor
    most_tokens: int  # of one request

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.cu_seqlens, self.cache_seqlens, self.page_table


class PagedLlama:
    """A Llama whose attention runs over a paged cache, with the weights of a model of Transformers."""

    def __init__(self, model, cache: PagedCache):
        self.model, self.config, self.cache = model, model.config, cache
        positions = torch.arange(cache.num_pages * PAGE_SIZE, device=model.device)[None]
        cos, sin = model.model.rotary_emb(model.lm_head.weight, positions)
        half = self.config.head_dim // 2  # Transformers has each angle twice, for both dimensions of a pair
        self.rotary_cos, self.rotary_sin = cos[0, :, :half], sin[0, :, :half]
        # By the number of requests: a captured step in which each gets one token, and where its logits appear.
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Step, torch.Tensor]] = {}
        self.replays = 0

    @torch.inference_mode()
    def __call__(self, requests: Sequence[Request], counts: Sequence[int]) -> torch.Tensor:
        """Read the next counts[i] tokens of requests[i]; the logits of the token that follows, for each i."""
        tokens = [
            token
            for request, count in zip(requests, counts)
            for token in request.tokens[request.cached : request.cached + count]
        ]
        step = Step(
            tokens=self._int32(tokens),
            cu_seqlens=self._int32([0, *itertools.accumulate(counts)]),
            cache_seqlens=self._int32([request.cached for request in requests]),
            page_table=self._int32(self.cache.page_table(requests)),
            most_tokens=max(counts),
        )
        only_answers = step.most_tokens == 1 and step.tokens.is_cuda
        logits = self._replay(step) if only_answers else self._forward(step)
        for request, count in zip(requests, counts):
            request.cached += count
        return logits

    def _forward(self, step: Step) -> torch.Tensor:
        hidden = self.model.model.embed_tokens(step.tokens)
        for layer, (k_pages, v_pages) in zip(self.model.model.layers, self.cache.layers):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self._attend(layer.self_attn, normed, k_pages, v_pages, step)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        last_tokens = hidden[step.cu_seqlens[1:] - 1]
        return self.model.lm_head(self.model.model.norm(last_tokens))

    def _replay(self, step: Step) -> torch.Tensor:
        size = len(step.tokens)
        if size not in self.graphs:
            # Whatever runs for the first time is compiled, which has no place in a graph. The step may run twice: it
            # writes the same rows of the cache.
            self._forward(step)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward(step)
            self.graphs[size] = graph, step, logits
        graph, captured, logits = self.graphs[size]
        for target, source in zip(captured.tensors(), step.tensors()):
            target.copy_(source)
        graph.replay()
        self.replays += 1
        return logits.clone()  # the next replay overwrites them

    def _attend(self, attention, hidden, k_pages, v_pages, step: Step) -> torch.Tensor:
        heads = (hidden.shape[0], -1, self.config.head_dim)
        out = mate.flash_attn_with_kvcache(
            attention.q_proj(hidden).view(heads),
            k_pages,
            v_pages,
            k=attention.k_proj(hidden).view(heads),
            v=attention.v_proj(hidden).view(heads),
            rotary_cos=self.rotary_cos,
            rotary_sin=self.rotary_sin,
            rotary_interleaved=False,  # in Transformers' weights dimension i is paired with i + half
            softmax_scale=attention.scaling,
            causal=True,
            cu_seqlens_q=step.cu_seqlens,
            max_seqlen_q=step.most_tokens,
            cu_seqlens_k_new=step.cu_seqlens,
            cache_seqlens=step.cache_seqlens,
            page_table=step.page_table,
        )
        return attention.o_proj(out.flatten(1))

    def _int32(self, values) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.model.device)


def generate(model: PagedLlama, waiting: list[Request], end_token: int) -> None:
    """Answer all requests greedily, several at a time: continuous batching."""
    waiting, running, step = list(waiting), [], 0
    while waiting or running:
        while waiting and waiting[0].arrival <= step and model.cache.admit(waiting[0]):
            running.append(waiting.pop(0))
        batch = schedule(running)
        if batch:
            requests, counts = zip(*batch)
            logits = model(requests, counts)
            for request, row, token in zip(requests, logits, logits.argmax(-1).tolist()):
                if request.cached < len(request.tokens):
                    continue  # there is more of its prompt to read
                request.logits.append(row)
                request.tokens.append(token)
                if token == end_token or len(request.tokens) == request.length_limit:
                    model.cache.release(request)
                    running.remove(request)
        step += 1
        show_progress(step, waiting, running, model.cache)
    print()


def schedule(running: list[Request]) -> list[tuple[Request, int]]:
    """What to read in this step: a token for each answer, then pieces of prompts while the step has room."""
    batch, room = [], TOKENS_PER_STEP
    for request in sorted(running, key=lambda request: len(request.tokens) - request.cached):
        count = min(len(request.tokens) - request.cached, room)
        if count > 0:
            batch.append((request, count))
            room -= count
    return batch


def show_progress(step: int, waiting: list[Request], running: list[Request], cache: PagedCache) -> None:
    if sys.stdout.isatty() or step % 16 == 0:
        reading = sum(request.cached < request.prompt_length for request in running)
        pages = cache.num_pages - len(cache.free_pages)
        line = f"step {step:3}: {len(waiting)} waiting, {reading} being read, {len(running) - reading} being "
        line += f"answered, {pages:2} of {cache.num_pages} pages in use"
        print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)


def run_paged(model, tokenizer, prompts: Sequence[str], max_new_tokens: int) -> bool:
    """The loop above. Whether it agrees with PyTorch."""
    requests = [
        Request(prompt, STEPS_BETWEEN_ARRIVALS * i, tokens, len(tokens), len(tokens) + max_new_tokens)
        for i, (prompt, tokens) in enumerate(zip(prompts, smollm2.chat(tokenizer, prompts)))
    ]
    longest = max(request.length_limit for request in requests)
    cache = PagedCache(model.config, longest, like=model.lm_head.weight)

    llama = PagedLlama(model, cache)
    started = time.perf_counter()
    with smollm2.without_pytorch_attention():
        generate(llama, requests, tokenizer.eos_token_id)
    seconds = time.perf_counter() - started

    for request in requests:
        answer = tokenizer.decode(request.tokens[request.prompt_length :], skip_special_tokens=True)
        print(f"\n> {request.prompt}\n{answer}")
    print()
    answers = [(request.tokens, request.logits) for request in requests]
    if llama.replays:
        print(f"{llama.replays} steps were replays of {len(llama.graphs)} CUDA graphs.")
    smollm2.print_speed(answers, seconds)
    return smollm2.agrees_with_pytorch(model, answers)


def run_transformers(model, tokenizer, prompts: Sequence[str], max_new_tokens: int) -> bool:
    """The same prompts as one padded batch of Transformers. Whether it agrees with PyTorch."""
    questions = smollm2.chat(tokenizer, prompts)
    batch = tokenizer.pad({"input_ids": questions}, padding_side="left", return_tensors="pt").to(model.device)

    mate_transformers.register()
    model.set_attn_implementation("mate")
    started = time.perf_counter()
    with smollm2.without_pytorch_attention():
        out = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    seconds = time.perf_counter() - started

    answers = []  # without the padding before the prompts and behind the answers
    for i, question in enumerate(questions):
        answer = out.sequences[i, batch["input_ids"].shape[1] :].tolist()
        if tokenizer.eos_token_id in answer:
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
        answers.append((question + answer, [step[i] for step in out.logits[: len(answer)]]))
    smollm2.print_speed(answers, seconds)
    return smollm2.agrees_with_pytorch(model, answers)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A language model answers prompts with MATE's attention.")
    parser.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32, on a GPU float16)")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="PROMPT", help="what to ask")
    options = parser.parse_args(arguments)
    dtype = options.dtype or ("float32" if options.device == "cpu" else "float16")

    print(f"Loading SmolLM2-135M-Instruct in {dtype} on {options.device} ...", flush=True)
    model, tokenizer = smollm2.load(options.device, getattr(torch, dtype))

    print("\n== Continuous batching over a paged cache ==\n")
    agrees = run_paged(model, tokenizer, options.prompts, options.tokens)
    print('\n== Transformers\' generate with attn_implementation="mate" ==\n')
    agrees &= run_transformers(model, tokenizer, options.prompts, options.tokens)
    print("\nMATE and PyTorch agree." if agrees else "\nMATE and PyTorch DO NOT agree.")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
