"""From a run to a Hugging Face folder that transformers and vLLM serve.

    python -m scripts.export RUN_OR_CHECKPOINT OUT [--dtype bfloat16] [--model FOLDER]

RUN_OR_CHECKPOINT is runs/NAME (its newest complete checkpoint) or runs/NAME/checkpoints/step_NNNNNN, written
by any number of ranks. config.json, tokenizer and generation_config.json come from the checkpoint that the
run started from, which its config.json names and --model can replace. Weights are cast to the dtype of that
checkpoint, or to --dtype.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

import checkpoints
import model as qwen
from data.tokenizer import Tokenizer, copy_files
from lib import options, weights
from lib.files import locate
from lib.options import Field, UserError, read_json, shown

DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class Config:
    source: str = ""  # a run, or one of its checkpoints
    out: str = ""  # the folder to make
    dtype: str = ""  # of the weights: bfloat16, float16 or float32; empty: that of the checkpoint
    model: str = ""  # folder with config.json and tokenizer; empty: what the run started from


def export(source: Path, out: Path, dtype: str = "", model_path: str = "") -> Path:
    """Writes the folder; returns the checkpoint that it holds."""
    run, checkpoint = checkpoints.find(source)
    recorded = read_json(run / "config.json", "give a run", model=Field(str))["model"]
    start = Path(locate(model_path or recorded or str(run / "start")))  # start: of a model from scratch
    config, tokenizer = qwen.read_config(start), Tokenizer(start)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose another folder")
    original = read_json(start / "config.json", "copy it again")
    dtype = dtype or original.get("torch_dtype") or original.get("dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(dtype)}: set --dtype")
    dtype = getattr(torch, dtype)
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
        generation |= read_json(start / "generation_config.json", "copy it again")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return checkpoint


@options.command
def main():
    config = options.parse(Config, sys.argv[1:], __doc__, "source out")
    made = export(Path(config.source), Path(config.out), config.dtype, config.model)
    print(f"{config.out}: the weights of {made}")


if __name__ == "__main__":
    main()
