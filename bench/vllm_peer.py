"""vLLM's side of bench.bench_sampler, which runs this file with a Python that has vLLM.

    PYTHON bench/vllm_peer.py

The first line of standard input is {"temperature": ..., "engine": arguments of vllm.LLM}. Each further
one is a list of [prompt ids, tokens to write], all served at once and answered with {"seconds": ...}.
What vLLM prints goes to standard error. Imports nothing of this repository.
"""

import json
import os
import sys
import time


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    from vllm import LLM, SamplingParams

    settings = json.loads(sys.stdin.readline())
    llm = LLM(skip_tokenizer_init=True, **settings["engine"])
    for line in sys.stdin:
        requests = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [SamplingParams(temperature=settings["temperature"], max_tokens=n, ignore_eos=True,
                                 logprobs=0, detokenize=False) for _, n in requests]
        llm.reset_prefix_cache()  # else a repeat would find the prompts of the one before
        start = time.perf_counter()
        outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
        seconds = time.perf_counter() - start
        assert all(len(o.token_ids) == len(o.logprobs) == n for o, (_, n) in zip(outputs, requests))
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":  # vLLM's own processes import this file again
    main()
