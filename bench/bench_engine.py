"""How near decoding comes to the limit that memory sets: Qwen2.5's shapes in bf16, with and without graphs.

    python -m bench.bench_engine [--shapes 0.5b 1.5b 7b] [--rows 1 32 128] [--no_peer] [--smoke]

A decode step has to read the weights once (the embedding's table apart, if it is not the head's too) and the
keys and values of every row; the limit is that many bytes at the rate of a plain copy on the same device.
An output of N tokens (1,024 and 8,192) is measured where half of it is written: prompts of N / 2 random
tokens, a different one for each row, then 128 steps. Weights are random.

transformers' generate, with its static batch, decodes the same rows from the same prompts where its cache
fits; its prefill is timed apart and taken off. --smoke runs a small shape on any device.
"""

import gc
import tempfile
from functools import partial

import torch

import model as qwen
from bench import CUDA, finish, first_line, hardware, now, parser
from bench.bench_kernels import DEVICE, limits
from bench.shapes import SHAPES
from sampler import Sampler
from scheduler import Request

BARS, BAR = ("7b rows 32 output 1024", "7b rows 32 output 8192"), 0.7  # least share of the limit


def bytes_to_read(config: qwen.ModelConfig, rows: int, context: int) -> int:
    """In a step that decodes so many rows after a context of so many tokens."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    cache = rows * context * config.kv_bytes_per_token(torch.bfloat16)
    return 2 * (config.num_parameters - embedding) + cache


def ours(model, texts: list[list[int]], steps: int, graphs: bool) -> float:
    """Seconds of a step in which all rows decode and nobody is prefilled."""
    sampler = Sampler(model, max_sequences=len(texts), token_budget=4096, graphs=graphs)
    launch, clock = sampler.launch, []

    def timed(step):
        drawn = launch(step)
        if len(step.decode) == len(texts) and not step.chunks:
            clock.append(now() if len(clock) in (3, 3 + steps) else 0)  # after three the graph is captured
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
        start = now()
        model.generate(ids, max_new_tokens=new, **options)
        took.append(now() - start)
    return (took[1] - took[0]) / steps


def our_model(config: qwen.ModelConfig):
    with torch.device(DEVICE):
        model = qwen.Qwen2(config).to(torch.bfloat16).requires_grad_(False)
    for p in model.parameters():
        p.normal_(0, 0.02)
    return model


def their_model(config: qwen.ModelConfig):
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        qwen.write_config(config, folder, torch.bfloat16)
        theirs = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(DEVICE):  # in bf16 at once: on a CPU in fp32 7B takes minutes
        return transformers.AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16).eval()


ENGINES = {"eager": (our_model, partial(ours, graphs=False)),
           "graphs": (our_model, partial(ours, graphs=True)), "transformers": (their_model, theirs)}


def main():
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", default=["0.5b", "1.5b", "7b"], choices=list(SHAPES))
    options.add_argument("--rows", nargs="+", type=int, default=[1, 32, 128])
    options.add_argument("--no_peer", action="store_true", help="without transformers")
    options.add_argument("--smoke", action="store_true", help="a small shape, on any machine")
    args = options.parse_args()
    outputs, steps = (1024, 8192), 128
    if args.smoke:
        args.shapes, args.rows, outputs, steps = ["smoke"], [1, 3], (64, ), 8
    elif not CUDA:
        raise SystemExit("bench_engine: torch sees no GPU here; --smoke runs anywhere")
    machine, copy = hardware(), limits(args.smoke)["copy_bytes_per_s"]
    cases = []
    for shape in args.shapes:
        config, runs = SHAPES[shape], {}
        for rows, output in ((rows, output) for output in outputs for rows in args.rows):
            torch.manual_seed(0)
            texts = torch.randint(config.vocab_size, (rows, output // 2)).tolist()
            limit = bytes_to_read(config, rows, (output + steps) // 2) / copy
            runs[f"{shape} rows {rows} output {output}"] = texts, {"limit": limit}
        for name, (make, run) in ENGINES.items():
            if name == "transformers" and args.no_peer:
                continue
            model = make(config)
            for case, (texts, seconds) in runs.items():
                try:
                    seconds[name] = run(model, texts, steps)
                except torch.OutOfMemoryError as e:
                    print(f"{case} {name}: {first_line(e)}")
                    torch.cuda.empty_cache()
                    continue
                print(f"{case} {name}: {len(texts) / seconds[name]:,.0f} tok/s, "
                      f"{100 * seconds['limit'] / seconds[name]:.0f} % of the limit", flush=True)
            del model
            gc.collect()
        for case, (texts, seconds) in runs.items():
            share, bars = seconds["limit"] / seconds.get("graphs", float("inf")), {}
            if case in BARS:
                bars["share of the limit"] = {"figure": share, "bound": BAR, "met": share >= BAR}
            cases.append({"case": case, "share": share, "bars": bars,
                          "ms_per_step": {name: 1e3 * s for name, s in seconds.items()},
                          "tokens_per_second": {name: len(texts) / s for name, s in seconds.items()}})
    finish({"bench": "engine", **machine, "copy_bytes_per_s": copy, "cases": cases})


if __name__ == "__main__":
    main()
