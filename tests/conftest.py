"""Settings of every test: a hermetic environment and Hypothesis profiles."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
TRACES = "DROVER_TRACES"

# Each setting of `drover serve` has a DROVER_ variable: those of the user's shell are not ours.
for name in [name for name in os.environ if name.startswith("DROVER_") and name != TRACES]:
    del os.environ[name]
os.environ.setdefault(TRACES, str(ROOT.parent / "shared" / "traces"))

# Read by libraries when they are imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
# With a token of our own, Ray neither reads nor writes one in the user's home.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)
# Kernels for a GPU run on the CPU where there is none; Triton reads this when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# A slow machine is no failure, and the same examples run every time; for a search of new ones:
# pytest --hypothesis-profile=explore
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("ci")
