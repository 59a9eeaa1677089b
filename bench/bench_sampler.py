"""The sampler against transformers' generate and vLLM: useful tokens a second on the same requests.

    python -m bench.bench_sampler [--shape 0.5b | --model FOLDER] [--dtype bfloat16] [--device cuda]
                                  [--vllm PYTHON] [--no_transformers]

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

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import model as qwen
import run
from bench import CUDA, finish, hardware, now, parser
from bench.shapes import SHAPES
from sampler import Request, Sampler

TEMPERATURE, REPEATS = 0.8, 3


def workload(vocabulary: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocabulary) for _ in range(64)] for _ in range(4)]
    lengths = [min(512, max(16, round(rng.expovariate(1 / 128)))) for _ in range(32)]
    return [Request(prompts[i // 8], max_new_tokens=n, temperature=TEMPERATURE, seed=i)
            for i, n in enumerate(lengths)]


def ours(model, requests: list[Request]) -> dict:
    sampler, start = Sampler(model), now()
    done = sum(len(completion.token_ids) for completion in sampler.generate(requests))
    assert done == sum(r.max_new_tokens for r in requests)
    return {"seconds": now() - start, "decode_steps": sampler.stats.decode_steps}


def transformers_peer(path: str, dtype: torch.dtype, device: str):
    """A function that serves requests."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    model.generation_config = transformers.GenerationConfig(  # the checkpoint's may end samples
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, pad_token_id=0)

    def generate(requests: list[Request]) -> dict:
        ids = torch.tensor([r.prompt_ids for r in requests], device=device)
        ends = torch.tensor([ids.shape[1] + r.max_new_tokens for r in requests], device=device)
        start = now()
        out = model.generate(ids, attention_mask=torch.ones_like(ids),
                             max_new_tokens=max(r.max_new_tokens for r in requests),
                             stopping_criteria=[lambda ids, scores, **_: ids.shape[1] >= ends])
        assert out.shape[1] == ends.max()
        return {"seconds": now() - start}

    return generate


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
    options = parser(__doc__)
    options.add_argument("--model", default="", help="checkpoint folder; empty: random weights")
    options.add_argument("--shape", default="small", choices=list(SHAPES), help="of the random weights")
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options.add_argument("--device", default="cuda" if CUDA else "cpu")
    options.add_argument("--no_transformers", action="store_true", help="leaves it out")
    options.add_argument("--vllm", default="", metavar="PYTHON", help="that has vLLM; empty: left out")
    args = options.parse_args()
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            qwen.save(qwen.Qwen2(SHAPES[args.shape]).init_weights_(0).to(dtype), folder)
        path = args.model or folder
        model = qwen.load(path, dtype, args.device)
        config, requests = model.config, workload(model.config.vocab_size)
        lengths = [r.max_new_tokens for r in requests]
        runners = {"ours": partial(ours, model)}
        if not args.no_transformers:
            runners["transformers"] = transformers_peer(path, dtype, args.device)
        if args.vllm:
            runners["vllm"] = VLLM(
                args.vllm, args.device, Path(folder) / "vllm.log", model=path, dtype=args.dtype,
                max_model_len=1024, generation_config="vllm",
                kv_cache_memory_bytes=len(requests) * 1024 * config.kv_bytes_per_token(dtype),
                logprobs_mode="processed_logprobs")  # at the sampling temperature, as ours
        machine = hardware()
        print(f"{config.num_parameters:,} parameters, {args.dtype}; 32 requests of 64 tokens, "
              f"{sum(lengths)} tokens to write, longest {max(lengths)}", flush=True)
        for runner in runners.values():  # warm up, with many rows and with few
            runner([replace(r, max_new_tokens=8 + 8 * (i % 2)) for i, r in enumerate(requests)])
        rows = {name: [] for name in runners}
        for _ in range(REPEATS):
            for name, runner in runners.items():
                rows[name].append(row := runner(requests))
                print(f"{name:13}{sum(lengths) / row['seconds']:9,.1f} tok/s {row['seconds']:7.1f} s",
                      flush=True)
        if args.vllm:
            runners["vllm"].process.communicate()  # ends it
    result = {"bench": "sampler", **machine, "shape": args.model or args.shape, "dtype": args.dtype,
              "tokens": sum(lengths), "parameters": config.num_parameters,
              "decode_steps": rows["ours"][0]["decode_steps"],
              "peak_gb": round(run.peak_memory_gb(torch.device(args.device)), 2)}
    for name in rows:
        rate = statistics.median(sum(lengths) / row["seconds"] for row in rows[name])
        result[f"{name}_tokens_per_second"] = round(rate, 1)
        if name != "ours":
            ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(rows["ours"], rows[name]))
            result[f"ratio_{name}"] = round(ratio, 2)
            print(f"ours / {name}: {ratio:.2f}")
    finish(result)


if __name__ == "__main__":
    main()
