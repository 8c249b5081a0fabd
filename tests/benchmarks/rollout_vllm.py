"""vLLM's CPU build on the work of rollout.py, in an environment that has it and need not have more.

    PYTHON tests/benchmarks/rollout_vllm.py FOLDER DTYPE PLACES

FOLDER is a Hugging Face folder. Prints {"version"}, and for each line [prompts, lengths] that comes in, prompts one a
group, the seconds of CPU time it took, log-probs among what is computed, as ours does. One thread.
"""

import json
import os
import sys
from pathlib import Path

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, whose CPU time is what is counted
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def cpu_s() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main(folder: Path, dtype: str, places: int) -> None:
    import vllm

    engine = vllm.LLM(
        model=str(folder), dtype=dtype, max_model_len=1024, max_num_seqs=places, skip_tokenizer_init=True,
        enforce_eager=True, enable_prefix_caching=True, seed=0, generation_config="vllm",
    )  # fmt: skip
    print(json.dumps({"version": vllm.__version__}), file=ANSWERS, flush=True)
    for line in sys.stdin:
        prompts, lengths = json.loads(line)
        group = len(lengths) // len(prompts)
        asked = [{"prompt_token_ids": prompts[i // group]} for i in range(len(lengths))]
        forced = [
            vllm.SamplingParams(
                temperature=1.0, max_tokens=n, min_tokens=n, ignore_eos=True, logprobs=0, detokenize=False
            )
            for n in lengths
        ]
        start = cpu_s()
        found = engine.generate(asked, forced, use_tqdm=False)
        print(json.dumps(cpu_s() - start), file=ANSWERS, flush=True)
        assert [len(one.outputs[0].token_ids) for one in found] == lengths


if __name__ == "__main__":
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    os.environ.update(ENVIRONMENT)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
