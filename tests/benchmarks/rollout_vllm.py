"""vLLM's CPU build on the work of rollout.py, in an environment that has it and need not have more.

    PYTHON tests/benchmarks/rollout_vllm.py FOLDER DTYPE PLACES

FOLDER has the Hugging Face folder `model` and `work.json`: rounds of [prompts, lengths], prompts one a group. One
thread, as it is started with. Prints {"version", "rates"}: tokens a second of CPU time, of each round, log-probs among
what is computed, as ours does.
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
        model=str(folder / "model"), dtype=dtype, max_model_len=1024, max_num_seqs=places, skip_tokenizer_init=True,
        enforce_eager=True, enable_prefix_caching=True, seed=0, generation_config="vllm",
    )  # fmt: skip
    *rounds, first = json.loads((folder / "work.json").read_text())
    rates = []
    for prompts, lengths in (first, *rounds):  # the first: what is compiled at first use
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
        rates.append(sum(lengths) / (cpu_s() - start))
        assert [len(one.outputs[0].token_ids) for one in found] == lengths
    print(json.dumps({"version": vllm.__version__, "rates": rates[1:]}))


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
