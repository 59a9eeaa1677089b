"""The sampler against transformers' generate: useful tokens a second on the same requests and checkpoint.

    python -m bench.bench_sampler [--model FOLDER] [--dtype bfloat16] [--device cuda] [--peer none]

4 prompts of 64 random tokens, 8 samples of each, with output lengths of min(512, max(16, Exp(128))): the mix
of an RL step, in which one long sample keeps a whole batch waiting. A sample ends at its length, nothing
else ends it. transformers gets all 32 as one batch and stops when the longest ends; tokens after a row's own
length do not count. Without --model a random checkpoint (hidden 512, 8 layers, 8/2 heads, vocabulary
32,768). Both run alternately in this process; the figures are medians. The peer comes with
requirements-dev.txt.
"""

import argparse
import json
import random
import statistics
import tempfile
import time

import torch

import model as qwen
import run
from bench import hardware
from sampler import Request, Sampler

SHAPE = qwen.ModelConfig(32768, 512, 1408, 8, 8, 2)


def workload(vocabulary: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocabulary) for _ in range(64)] for _ in range(4)]
    lengths = [min(512, max(16, round(rng.expovariate(1 / 128)))) for _ in range(32)]
    return [Request(prompts[i // 8], max_new_tokens=n, seed=i) for i, n in enumerate(lengths)]


def ours(model, requests: list[Request], device: str) -> dict:
    sampler = Sampler(model)
    start = time.perf_counter()
    done = 0
    for completion in sampler.generate(requests):
        done += len(completion.token_ids)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert done == sum(r.max_new_tokens for r in requests)
    return {"seconds": seconds, "tokens_per_second": done / seconds,
            "decode_steps": sampler.stats.decode_steps}


def theirs(model, requests: list[Request], device: str) -> dict:
    from transformers import StoppingCriteria, StoppingCriteriaList

    ids = torch.tensor([r.prompt_ids for r in requests], device=device)
    ends = torch.tensor([ids.shape[1] + r.max_new_tokens for r in requests], device=device)

    class OwnLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return input_ids.shape[1] >= ends

    start = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                         max_new_tokens=max(r.max_new_tokens for r in requests), pad_token_id=0,
                         eos_token_id=None, stopping_criteria=StoppingCriteriaList([OwnLength()]))
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert out.shape[1] == ends.max()
    return {"seconds": seconds, "tokens_per_second": sum(r.max_new_tokens for r in requests) / seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint folder; empty: random weights")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", default="transformers", choices=("transformers", "none"))
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            qwen.save(qwen.Qwen2(SHAPE).init_weights_(0), folder)
        path = args.model or folder
        model = qwen.load(path, dtype, args.device)
        runners = {"ours": lambda requests: ours(model, requests, args.device)}
        if args.peer == "transformers":
            import transformers

            transformers.logging.set_verbosity_error()
            peer = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device).eval()
            runners["transformers"] = lambda requests: theirs(peer, requests, args.device)
        requests = workload(model.config.vocab_size)
        lengths = [r.max_new_tokens for r in requests]
        machine = hardware()
        print(f"{model.config.num_parameters:,} parameters, {args.dtype}; 32 requests of 64 tokens, "
              f"{sum(lengths)} tokens to write, longest {max(lengths)}", flush=True)
        figures = {name: [] for name in runners}
        for runner in runners.values():  # warm up, with many rows and with few
            runner([Request(r.prompt_ids, max_new_tokens=8 + 8 * (i % 2), seed=r.seed)
                    for i, r in enumerate(requests)])
        for _ in range(args.repeats):
            for name, runner in runners.items():
                figures[name].append(runner(requests))
                print(f"{name:13}{figures[name][-1]['tokens_per_second']:9,.1f} tok/s "
                      f"{figures[name][-1]['seconds']:7.1f} s", flush=True)
    result = {"bench": "sampler", **machine, "dtype": args.dtype, "tokens": sum(lengths),
              "parameters": model.config.num_parameters,
              "decode_steps": figures["ours"][0]["decode_steps"],
              "peak_gb": round(run.peak_memory_gb(torch.device(args.device)), 2)}
    rates = {name: [row["tokens_per_second"] for row in rows] for name, rows in figures.items()}
    for name, values in rates.items():
        result[f"{name}_tokens_per_second"] = round(statistics.median(values), 1)
    if "transformers" in rates:
        result["ratio"] = round(statistics.median(a / b for a, b in zip(*rates.values())), 2)
        print(f"ours / transformers: {result['ratio']:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
