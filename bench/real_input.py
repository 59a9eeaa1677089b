"""Two GRPO steps on real input: Qwen2.5's tokenizer, real prompts, a random checkpoint of the 0.5B shape.

    python -m bench.real_input --tokenizer FOLDER --prompts FILE.jsonl [--shape small] [--ranks 2]

Runs the step twice, with the streamed LM head and with materialised T x V logits in its place, and prints the
peak of resident memory of each. Checks that no id beyond the tokenizer's last was sampled. Ends with one JSON
line.
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
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SHAPES = {
    "0.5b": qwen.ModelConfig(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "small": qwen.ModelConfig(151936, 64, 128, 2, 4, 2, tie_word_embeddings=True)
}
# Replaces the streamed head by what one would write first, and keeps the largest sampled id.
DRIVER = """
import sys, torch, train
def materialised(hidden, weight, targets, temperature=1.0):
    logp = ((hidden.float() @ weight.float().T) / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
if sys.argv.pop(1) == "materialised":
    train.linear_logprob = materialised
collate, largest = train.grpo.collate, [0]
def watched(samples, device):
    largest[0] = max([largest[0]] + [t for s in samples for t in s.token_ids])
    return collate(samples, device)
train.grpo.collate = watched
train.main()
print(f"largest sampled id {largest[0]}", flush=True)
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
        str(driver), head, "--model",
        str(folder), "--prompts",
        str(args.prompts), "--run_dir",
        str(run), "--eval_prompts", "", "--steps", "2", "--prompts_per_step",
        str(args.ranks), "--group_size", "4", "--max_new_tokens",
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
        "gap_mean": last["gap/mean"], "largest_id": max(ids)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Qwen2.5's tokenizer.json")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=64)
    args = parser.parse_args()
    last_id = Tokenizer(args.tokenizer).n_valid - 1
    result = {"bench": "real_input", "shape": args.shape, "ranks": args.ranks, "new_tokens": args.new_tokens}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), args.shape, args.tokenizer)
        for head in ("streamed", "materialised"):
            result[head] = step(Path(folder), args, head)
            assert result[head]["largest_id"] <= last_id, "an id was sampled that the tokenizer does not have"
    print(f"peak of resident memory per rank: streamed {result['streamed']['peak_gb']:.2f} GB, "
          f"materialised {result['materialised']['peak_gb']:.2f} GB; tokenizer's last id {last_id}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
