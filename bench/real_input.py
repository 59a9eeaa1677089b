"""Two GRPO steps on real input: Qwen2.5's tokenizer, real prompts, a random checkpoint of the 0.5B shape.

    python -m bench.real_input --tokenizer FOLDER --prompts FILE.jsonl [--shape small] [--ranks 2]

Runs the step twice, with the streamed LM head and with materialised T x V logits in its place, and prints the
peak of resident memory of each; then the same for the head alone. A random checkpoint never writes a tag, so
a reward with spread, the share of even ids, joins length and format. Checks that no id beyond the
tokenizer's last was sampled. Writes bench/results/real_input.json and ends with the same as one JSON line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import model as qwen
from bench import hardware
from data.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SHAPES = {
    "0.5b": qwen.ModelConfig(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "small": qwen.ModelConfig(151936, 64, 128, 2, 4, 2, tie_word_embeddings=True)
}
MATERIALISED = """
def materialised(hidden, weight, targets, temperature=1.0):
    logp = ((hidden.float() @ weight.float().T) / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
"""
# Replaces the streamed head by what one would write first, and keeps the largest sampled id.
DRIVER = MATERIALISED + """
import sys, train, rewards, grpo
if sys.argv.pop(1) == "materialised":
    train.linear_logprob = materialised
rewards.REWARDS["even"] = (lambda c, prompt: sum(t % 2 for t in c.token_ids) / len(c.token_ids), 1.0)
collate, largest = grpo.collate, [0]
def watched(samples, device):
    largest[0] = max([largest[0]] + [t for s in samples for t in s.token_ids.tolist()])
    return collate(samples, device)
grpo.collate = watched
train.main()
print(f"largest sampled id {largest[0]}", flush=True)
"""
HEAD = MATERIALISED + """
import sys, torch
from kernels import linear_logprob
from run import peak_memory_gb
rows, vocabulary, width = map(int, sys.argv[2:])
hidden = torch.randn(rows, width, requires_grad=True)
weight = torch.randn(vocabulary, width, requires_grad=True)
targets = torch.randint(0, vocabulary, (rows,))
before = peak_memory_gb(torch.device("cpu"))
head = materialised if sys.argv[1] == "materialised" else linear_logprob
logp, entropy = head(hidden, weight, targets, 0.8)
logp.sum().backward()
print(peak_memory_gb(torch.device("cpu")) - before)
"""


def checkpoint(folder: Path, shape: str, tokenizer: Path):
    """A random checkpoint that pads its vocabulary as the released ones do."""
    qwen.save(qwen.Qwen2(SHAPES[shape]).init_weights_(0), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)


def step(folder: Path, args, head: str) -> dict:
    """Two steps of train.py; peak memory of the hungriest rank and what else the run says of itself."""
    driver, run = folder / "driver.py", folder / head
    driver.write_text(DRIVER)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}",
        str(driver), head, "--config", str(ROOT / "configs" / "tiny.json"), "--model",
        str(folder), "--prompts",
        str(args.prompts), "--run_dir",
        str(run), "--eval_prompts", "", "--reward", "length,format,even", "--steps", "2",
        "--prompts_per_step", str(args.ranks), "--group_size", "4", "--max_new_tokens",
        str(args.new_tokens), "--unreachable", "keep", "--temperature", "0.8", "--lr", "1e-6", "--save_every",
        "1000"
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    print(done.stdout.strip(), flush=True)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    ids = [
        int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("largest sampled id")
    ]
    return {
        "peak_gb": last["memory/peak_gb"], "update_s": last["time/update"], "sample_s": last["time/sample"],
        "gap_mean": last["gap/mean"], "grad_norm": last["grad_norm"], "largest_id": max(ids)
    }


def head_alone(head: str, rows: int, shape: qwen.ModelConfig) -> float:
    """GB that forward and backward of the head add to resident memory, the weight's gradient included."""
    command = [sys.executable, "-c", HEAD, head, *map(str, (rows, shape.vocab_size, shape.hidden_size))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Qwen2.5's tokenizer.json")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--head_rows", type=int, default=1024, help="tokens of the head alone")
    args = parser.parse_args()
    last_id = Tokenizer(args.tokenizer).n_valid - 1
    result = {"bench": "real_input", **hardware(), "shape": args.shape, "ranks": args.ranks,
              "new_tokens": args.new_tokens, "head_rows": args.head_rows}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), args.shape, args.tokenizer)
        for head in ("streamed", "materialised"):
            result[head] = step(Path(folder), args, head)
            assert result[head]["largest_id"] <= last_id, "an id was sampled that the tokenizer does not have"
    print(f"peak of resident memory per rank: streamed {result['streamed']['peak_gb']:.2f} GB, "
          f"materialised {result['materialised']['peak_gb']:.2f} GB; tokenizer's last id {last_id}")
    for head in ("streamed", "materialised"):
        result[head]["head_alone_gb"] = head_alone(head, args.head_rows, SHAPES[args.shape])
    print(f"head alone, {args.head_rows} tokens, forward and backward: streamed "
          f"{result['streamed']['head_alone_gb']:.2f} GB, materialised "
          f"{result['materialised']['head_alone_gb']:.2f} GB")
    (ROOT / "bench" / "results" / "real_input.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
