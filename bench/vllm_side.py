"""vLLM as a side of ``bench.engine_throughput``; run by the interpreter of its environment.

    DROVER_VLLM_PYTHON bench/vllm_side.py WORKLOADS.json RESULTS.json

See ``bench.engine_sides`` for what it reads and writes. It imports nothing of this project,
which that environment does not have.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> int:
    """Run every workload once, after a warm-up of each."""
    with open(sys.argv[1]) as file:
        task = json.load(file)
    threads = task["threads"]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, range(threads)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Else found out from the package's name, which differs between its builds.
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    import vllm

    llm = vllm.LLM(
        model=task["folder"],
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def run(workload: dict, limit: int | None) -> float:
        counts = [min(limit or count, count) for count in workload["outputs"]]
        prompts = [{"prompt_token_ids": prompt} for prompt in workload["prompts"]]
        params = [
            vllm.SamplingParams(
                temperature=workload["temperature"],
                top_p=workload["top_p"],
                max_tokens=count,
                ignore_eos=True,
                detokenize=False,
            )
            for count in counts
        ]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        if made != sum(counts):
            raise RuntimeError(f"{made} tokens instead of {sum(counts)}")
        return seconds

    results = []
    for workload in task["workloads"]:
        run(workload, 4)
        results.append({"workload": workload["name"], "seconds": run(workload, None)})
    with open(sys.argv[2], "w") as file:
        json.dump({"version": vllm.__version__, "results": results}, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
