"""The sampler against transformers' generate and vLLM: useful tokens a second on the same requests.

    python -m bench.bench_sampler [--shape 0.5b | --model FOLDER] [--dtype bfloat16] [--device cuda]
                                  [--vllm PYTHON] [--peers transformers vllm]

4 prompts of 64 random tokens, 8 samples of each at temperature 0.8, with output lengths of min(512,
max(16, Exp(128))): the mix of an RL step, in which one long sample keeps a whole batch waiting. A sample
ends at its length, nothing else ends it.

    ours          32 requests, with the logprobs of the sampled tokens
    transformers  all 32 as one batch, until the longest ends; tokens after a row's own length do not
                  count. Without logprobs: `generate` would keep the logits of every step for them
    vllm          32 requests, with the logprobs of the sampled tokens. PYTHON is the interpreter of
                  an environment that has vLLM; without one it is left out

All read one checkpoint, whose weights are random without --model. They take turns, repeat by repeat, and
idle while another runs; the figures are medians. transformers comes with requirements-dev.txt.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import model as qwen
import run
from bench import hardware, shapes
from sampler import Request, Sampler

SHAPES = {
    "small": qwen.ModelConfig(32768, 512, 1408, 8, 8, 2),
    "0.5b": shapes.SHAPES["0.5b"],
}
TEMPERATURE = 0.8


def workload(vocabulary: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocabulary) for _ in range(64)] for _ in range(4)]
    lengths = [min(512, max(16, round(rng.expovariate(1 / 128)))) for _ in range(32)]
    return [Request(prompts[i // 8], max_new_tokens=n, temperature=TEMPERATURE, seed=i)
            for i, n in enumerate(lengths)]


class Ours:
    def __init__(self, model, device: str):
        self.model, self.device = model, device

    def __call__(self, requests: list[Request]) -> dict:
        sampler = Sampler(self.model)
        start = time.perf_counter()
        done = sum(len(completion.token_ids) for completion in sampler.generate(requests))
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        assert done == sum(r.max_new_tokens for r in requests)
        return {"seconds": seconds, "decode_steps": sampler.stats.decode_steps}


class Transformers:
    def __init__(self, path: str, dtype: torch.dtype, device: str):
        import transformers

        transformers.logging.set_verbosity_error()
        self.device = device
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        self.model.generation_config = transformers.GenerationConfig(  # the checkpoint's may end samples
            do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, pad_token_id=0)

    def __call__(self, requests: list[Request]) -> dict:
        from transformers import StoppingCriteria, StoppingCriteriaList

        ids = torch.tensor([r.prompt_ids for r in requests], device=self.device)
        ends = torch.tensor([ids.shape[1] + r.max_new_tokens for r in requests], device=self.device)

        class OwnLength(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                return input_ids.shape[1] >= ends

        start = time.perf_counter()
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids),
                                  max_new_tokens=max(r.max_new_tokens for r in requests),
                                  stopping_criteria=StoppingCriteriaList([OwnLength()]))
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        assert out.shape[1] == ends.max()
        return {"seconds": seconds}


class VLLM:
    """A process of bench/vllm_peer.py, which loads once and serves what it is asked."""
    def __init__(self, python: str, device: str, log: Path, **engine):
        self.log = log
        self.process = subprocess.Popen([python, str(Path(__file__).with_name("vllm_peer.py"))],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=log.open("w"), env=environment(python, device))
        self.say({"temperature": TEMPERATURE, "engine": engine})

    def say(self, value):
        try:
            print(json.dumps(value), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self.fail()

    def fail(self):
        sys.exit(f"vLLM ended with {self.process.wait()}:\n" + self.log.read_text()[-4000:])

    def __call__(self, requests: list[Request]) -> dict:
        self.say([[r.prompt_ids, r.max_new_tokens] for r in requests])
        return json.loads(self.process.stdout.readline() or self.fail())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def environment(python: str, device: str) -> dict[str, str]:
    """vLLM's at its best on CPU; what the caller has set is kept. By itself vLLM leaves a core to its
    scheduler, which spins there; in one process it does not place its threads, so they are placed as it
    would. Intel's OpenMP comes with its CPU build and has to be there before the process starts."""
    if device != "cpu":
        return dict(os.environ)
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    library = Path(python).parent.parent / "lib/libiomp5.so"
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": ",".join(cores),
            "OMP_NUM_THREADS": str(len(cores)), "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0",
            "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(cores)}]",
            "LD_PRELOAD": str(library) if library.exists() else "", **os.environ}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint folder; empty: random weights")
    parser.add_argument("--shape", default="small", choices=list(SHAPES), help="of the random weights")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["transformers", "vllm"],
                        choices=("transformers", "vllm"))
    parser.add_argument("--vllm", default="", metavar="PYTHON", help="that has vLLM; empty: left out")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            qwen.save(qwen.Qwen2(SHAPES[args.shape]).init_weights_(0).to(dtype), folder)
        path = args.model or folder
        runners = {"ours": Ours(qwen.load(path, dtype, args.device), args.device)}
        config = runners["ours"].model.config
        requests = workload(config.vocab_size)
        lengths = [r.max_new_tokens for r in requests]
        if "transformers" in args.peers and importlib.util.find_spec("transformers"):
            runners["transformers"] = Transformers(path, dtype, args.device)
        if "vllm" in args.peers and args.vllm:
            runners["vllm"] = VLLM(
                args.vllm, args.device, Path(folder) / "vllm.log", model=path, dtype=args.dtype,
                max_model_len=1024, generation_config="vllm",
                kv_cache_memory_bytes=len(requests) * 1024 * config.kv_bytes_per_token(dtype),
                logprobs_mode="processed_logprobs")  # at the sampling temperature, as ours
        machine = hardware()
        print(f"{config.num_parameters:,} parameters, {args.dtype}; 32 requests of 64 tokens, "
              f"{sum(lengths)} tokens to write, longest {max(lengths)}", flush=True)
        figures = {name: [] for name in runners}
        for runner in runners.values():  # warm up, with many rows and with few
            runner([replace(r, max_new_tokens=8 + 8 * (i % 2)) for i, r in enumerate(requests)])
        for _ in range(args.repeats):
            for name, runner in runners.items():
                row = runner(requests)
                row["tokens_per_second"] = sum(lengths) / row["seconds"]
                figures[name].append(row)
                print(f"{name:13}{row['tokens_per_second']:9,.1f} tok/s {row['seconds']:7.1f} s",
                      flush=True)
        if "vllm" in runners:
            runners["vllm"].close()
    result = {"bench": "sampler", **machine, "shape": args.model or args.shape, "dtype": args.dtype,
              "tokens": sum(lengths), "parameters": config.num_parameters,
              "decode_steps": figures["ours"][0]["decode_steps"],
              "peak_gb": round(run.peak_memory_gb(torch.device(args.device)), 2)}
    rates = {name: [row["tokens_per_second"] for row in rows] for name, rows in figures.items()}
    for name, values in rates.items():
        result[f"{name}_tokens_per_second"] = round(statistics.median(values), 1)
        if name != "ours":
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], values))
            result[f"ratio_{name}"] = round(ratio, 2)
            print(f"ours / {name}: {ratio:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
