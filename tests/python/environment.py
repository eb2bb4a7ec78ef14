"""What the environment says of a run of the tests."""

import os
import random

# Every test that draws numbers starts from it. MATE_SEED=N repeats a run.
RUN_SEED = int(os.environ.get("MATE_SEED") or random.SystemRandom().randrange(2**31))

# Where the tensors of the tests live: "cpu", or "cuda" for the tests on an NVIDIA GPU.
DEVICE = os.environ.get("MATE_TEST_DEVICE", "cpu")
