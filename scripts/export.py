"""From a run to a Hugging Face folder that transformers and vLLM serve.

    python -m scripts.export RUN_OR_CHECKPOINT OUT [--dtype bfloat16] [--model FOLDER]

RUN_OR_CHECKPOINT is runs/NAME (its newest complete checkpoint) or runs/NAME/checkpoints/step_NNNNNN, written
by any number of ranks. config.json, tokenizer and generation_config.json come from the checkpoint that the
run started from, which its config.json names and --model can replace. Weights are cast to the dtype of that
checkpoint, or to --dtype.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

import checkpoints
import model as qwen
from data.tokenizer import Tokenizer, copy_files
from lib import options, weights
from lib.files import locate
from lib.options import UserError


def export(source: Path, out: Path, dtype: str = "", model_path: str = "") -> Path:
    """Writes the folder; returns the checkpoint that it holds."""
    run, checkpoint = checkpoints.find(source)
    start = Path(locate(model_path or json.loads((run / "config.json").read_text())["model"]))
    config, tokenizer = qwen.read_config(start), Tokenizer(start)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose another folder")
    original = json.loads((start / "config.json").read_text())
    dtype = getattr(torch, dtype or original.get("torch_dtype") or original.get("dtype") or "float32")
    with torch.device("meta"):
        model = qwen.Qwen2(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    files = weights.plan_files(model, dtype.itemsize)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint / "weights"))
    for file, names in files.items():  # read as they are cast: no more than a file is ever in memory
        tensors = {name: torch.empty(shapes[name], dtype=dtype) for name in names}
        with warnings.catch_warnings(action="ignore"):  # that it reads without a process group, as it should
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        weights.write_file(tensors, out / file)
    weights.write_index(model, out, dtype, files)
    qwen.write_config(config, out, dtype)
    copy_files(start, out)
    generation = {"eos_token_id": tokenizer.eos_ids, "pad_token_id": tokenizer.eos_ids[0]}
    if (start / "generation_config.json").exists():
        generation |= json.loads((start / "generation_config.json").read_text())
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return checkpoint


@options.command
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--dtype", default="", choices=("", "bfloat16", "float16", "float32"))
    parser.add_argument("--model", default="", help="folder with config.json and tokenizer")
    args = parser.parse_args()
    print(f"{args.out}: the weights of {export(args.source, args.out, args.dtype, args.model)}")


if __name__ == "__main__":
    main()
