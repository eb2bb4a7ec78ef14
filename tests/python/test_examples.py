"""examples/generate.py: that it runs, and that its check can fail."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("gguf")

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PROMPTS = ["Why is the sky blue?", "What is the capital of France?"]

# Runs the example as it is and then with each fault, on one copy of the model, and prints what became of
# each. Ends as the example itself with one of the faults.
WITH_FAULTS = textwrap.dedent("""
    import functools, json, runpy, sys
    import generate, mate, smollm2, torch
    from mate.integrations import transformers as mate_transformers

    smollm2.load = functools.cache(smollm2.load)

    def with_other(**arguments):
        "flash_attn_with_kvcache with other arguments; a function makes the new value from the old one."
        def faulty(*args, original=mate.flash_attn_with_kvcache, **kwargs):
            for name, value in arguments.items():
                kwargs[name] = value(kwargs[name]) if callable(value) else value
            return original(*args, **kwargs)
        return faulty

    def shuffled(page_table):
        return page_table[:, torch.randperm(page_table.shape[1])].contiguous()

    def by_pytorch(q, *_, **__):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    torch.manual_seed(0)
    faults = {
        "none": (mate, mate.flash_attn_with_kvcache),
        "page table": (mate, with_other(page_table=shuffled)),
        "rotary pairing": (mate, with_other(rotary_interleaved=True)),
        "scale": (mate, with_other(softmax_scale=0.12)),
        "padding": (mate_transformers, with_other(cache_leftpad=None)),
        "PyTorch": (mate, by_pytorch),
        "window": (mate, with_other(window_size=(8, 0))),
    }
    results = {}
    for fault, (where, faulty) in faults.items():
        original, where.flash_attn_with_kvcache = where.flash_attn_with_kvcache, faulty
        try:
            results[fault] = generate.main(sys.argv[1:])
        except RuntimeError as error:
            results[fault] = str(error)
        if fault != "window":
            where.flash_attn_with_kvcache = original
    print(json.dumps(results))
    runpy.run_path(generate.__file__, run_name="__main__")
""")


def run(*command):
    """A Python that finds the examples and the same packages as this one."""
    path = os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_generate(device):
    done = run(str(EXAMPLES / "generate.py"), "--device", device, "--tokens", "8", "--prompts", *PROMPTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert done.stdout.count("tokens per second") == 2
    assert ("16 of 16 greedy tokens are the same" in done.stdout) or device != "cpu"
    assert ("replays of" in done.stdout) == (device != "cpu")
    assert "MATE and PyTorch agree." in done.stdout


def test_generate_notices_faults():
    done = run("-c", WITH_FAULTS, "--tokens", "3", "--prompts", *PROMPTS)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    results = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert results.pop("none") == 0
    assert "scaled_dot_product_attention was called" in results.pop("PyTorch")
    assert set(results.values()) == {1}, results
    assert done.stdout.rstrip().endswith("MATE and PyTorch DO NOT agree.")
