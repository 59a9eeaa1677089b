"""How near decoding comes to the limit that memory sets: Qwen2.5's shapes in bf16, with and without graphs.

    python -m bench.bench_engine [--shapes 0.5b 1.5b 7b] [--rows 1 32 128] [--outputs 1024 8192] [--smoke]

A decode step has to read the weights once (the embedding's table apart, if it is not the head's too) and the
keys and values of every row; the limit is that many bytes at the rate of a plain copy on the same device.
An output of N tokens is measured where half of it is written: prompts of N / 2 random tokens, a different
one for each row, then 128 steps. Weights are random.

transformers' generate, with its static batch, decodes the same rows from the same prompts where its cache
fits; its prefill is timed apart and taken off. --smoke runs a small shape on any device.
"""

import argparse
import gc
import json
import time

import torch

import model as qwen
from bench import hardware, shapes
from bench.bench_kernels import limits
from sampler import Sampler
from scheduler import Request

SHAPES = shapes.SHAPES | {"smoke": qwen.ModelConfig(512, 64, 96, 2, 4, 2)}
BARS = {("7b", 32, 1024): 0.7, ("7b", 32, 8192): 0.7}  # least share of the limit


def prompts(rows: int, length: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (rows, length), generator=generator).tolist()


def ours(model, texts: list[list[int]], steps: int, graphs: bool) -> float:
    """Seconds of a step in which all rows decode and nobody is prefilled."""
    sampler = Sampler(model, max_sequences=len(texts), token_budget=4096, graphs=graphs)
    launch, clock = sampler.launch, []

    def timed(step):
        drawn = launch(step)
        if len(step.decode) == len(texts) and not step.chunks:
            if len(clock) in (3, 3 + steps):  # after three the graph is captured
                synchronize()
            clock.append(time.perf_counter())
            if len(clock) == 4 + steps:
                for i in range(len(texts)):
                    sampler.cancel(i)
        return drawn

    sampler.launch = timed
    prefill = sum(map(len, texts)) // (4096 - len(texts)) + 1  # steps in which the first ones already decode
    new = prefill + steps + 8
    for _ in sampler.generate([Request(text, 1, new, seed=i) for i, text in enumerate(texts)]):
        pass
    sampler.sleep()
    return (clock[3 + steps] - clock[3]) / steps


def theirs(model, texts: list[list[int]], steps: int) -> float:
    ids = torch.tensor(texts, device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": True, "pad_token_id": 0, "top_k": 0,
               "eos_token_id": None}
    took = []
    for new in (1, 1 + steps):
        synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new, **options)
        synchronize()
        took.append(time.perf_counter() - start)
    return (took[1] - took[0]) / steps


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peer(config: qwen.ModelConfig, device: str):
    import transformers

    transformers.logging.set_verbosity_error()
    fields = {k: v for k, v in qwen.config_json(config, torch.bfloat16).items() if k != "architectures"}
    with torch.device(device):  # in bf16 at once: on a CPU in fp32 7B takes minutes
        return transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**fields),
                                                             dtype=torch.bfloat16).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "1.5b", "7b"], choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32, 128])
    parser.add_argument("--outputs", nargs="+", type=int, default=[1024, 8192])
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--no_peer", action="store_true", help="without transformers")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.shapes, args.rows, args.outputs, args.steps = ["smoke"], [1, 3], [64], 8
    elif not torch.cuda.is_available():
        raise SystemExit("bench_engine: torch sees no GPU here; --smoke runs anywhere")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine, copy = hardware(), limits(args.smoke)["copy_bytes_per_s"]
    cases = []
    for shape in args.shapes:
        config = SHAPES[shape]
        with torch.device(device):
            model = qwen.Qwen2(config).to(torch.bfloat16).requires_grad_(False)
        for p in model.parameters():
            p.normal_(0, 0.02)
        read = 2 * (config.num_parameters
                    - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size))
        runs = [(rows, output) for output in args.outputs for rows in args.rows]
        found = {}
        for rows, output in runs:
            texts = prompts(rows, output // 2, config.vocab_size)
            cache = rows * (output // 2 + args.steps // 2) * config.kv_bytes_per_token(torch.bfloat16)
            for graphs in (False, True):
                seconds = ours(model, texts, args.steps, graphs)
                name = "graphs" if graphs else "eager"
                found.setdefault((rows, output), {})[name] = seconds
                print(f"{shape} rows {rows} output {output} {name}: {rows / seconds:,.0f} tok/s, "
                      f"{100 * (read + cache) / copy / seconds:.0f} % of the limit", flush=True)
            found[rows, output]["limit"] = (read + cache) / copy
        del model
        gc.collect()
        if not args.no_peer:
            other = peer(config, device)
            for rows, output in runs:
                try:
                    seconds = theirs(other, prompts(rows, output // 2, config.vocab_size), args.steps)
                except torch.OutOfMemoryError as e:
                    print(f"{shape} rows {rows} output {output} transformers: {str(e).splitlines()[0]}")
                    torch.cuda.empty_cache()
                    continue
                found[rows, output]["transformers"] = seconds
                print(f"{shape} rows {rows} output {output} transformers: {rows / seconds:,.0f} tok/s",
                      flush=True)
            del other
            gc.collect()
        for (rows, output), seconds in found.items():
            share = seconds["limit"] / seconds["graphs"]
            bound = BARS.get((shape, rows, output))
            bars = {"share of the limit": {"figure": share, "bound": bound, "met": share >= bound}} if bound \
                else {}
            cases.append({"case": f"{shape} rows {rows} output {output}", "share": share, "bars": bars,
                          "ms_per_step": {name: 1e3 * s for name, s in seconds.items()},
                          "tokens_per_second": {name: rows / s for name, s in seconds.items()}})
    print(json.dumps({"bench": "engine", **machine, "copy_bytes_per_s": copy, "cases": cases}))


if __name__ == "__main__":
    main()
