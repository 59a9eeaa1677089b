"""Finds and loads a model: a Hugging Face folder, a run, or a checkpoint of one, sharded as it is."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

import checkpoints
import model as qwen
import parallel
import rollout
from data.prompts import STOP, STYLES
from data.tokenizer import Tokenizer
from lib.files import locate
from lib.options import Field, read_json
from sampler import Sampler

TEMPLATES = ("auto", "chat", "chat_nothink", *STYLES)  # by which a model may be asked, see `find`


@dataclass(frozen=True)
class Source:
    path: str  # that names the weights
    folder: str  # of config.json and tokenizer
    sharded: str  # weights of a run's checkpoint; empty: the folder has them
    template: str  # by which it is asked: chat, chat_nothink, think or direct
    stop: tuple[str, ...]  # strings that end its texts
    fingerprint: str  # sha256 of its weights' files
    scalar: bool  # a reward model


def fingerprint(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find(path: str, template: str = "auto") -> Source:
    """Reads all files once, for their checksums. template: auto for a run's own, chat where <|im_end|> ends
    the model's texts, or think. Raises an error of one sentence."""
    place, folder, style, stop = Path(locate(path)), locate(path), "", STOP
    if sharded := (place / "checkpoints").is_dir() or (place / "weights").is_dir():
        folder, place = checkpoints.find(place)
        made_by = read_json(folder / "config.json", "give a run", model=Field(str), prompt_style=Field(str),
                            stop=Field(str))
        folder, style, stop = locate(made_by["model"]), made_by["prompt_style"], made_by["stop"]
        files = {name: digest for name, digest in read_json(place / "manifest.json", "give another").items()
                 if name.startswith("weights/")}
    shape, tokenizer = qwen.read_config(folder), Tokenizer(folder)
    if not sharded:
        files = {f.name: checkpoints.digest(f) for f in set(qwen.check_tensors(shape, folder).values())}
    tokenizer.check_rows(shape.vocab_size, folder)
    if template == "auto":
        template = style or ("chat" if tokenizer.chats else "think")
    return Source(str(place), folder, str(place / "weights") if sharded else "", template,
                  () if template.startswith("chat") else tuple(filter(None, stop.split(","))),
                  fingerprint(files), shape.scalar_head)


def open_sampler(source: Source, config, world) -> Sampler:
    """On all ranks together, each of which needs room for its shard of the weights beside it meanwhile.
    config: tp, sampler_dtype, max_sequences, page_size."""
    dtype = rollout.sampler_dtype(config, world.device)
    if source.sharded:
        with torch.device("meta"):
            model = qwen.build(qwen.read_config(source.folder)).to(dtype)
        parallel.shard(model, world).to_empty(device=world.device)
        dcp.load({name: p.detach() for name, p in model.named_parameters()},
                 storage_reader=dcp.HuggingFaceStorageReader(source.sharded))
    else:
        model = parallel.load_sharded(source.folder, world, dtype)
    sampler = rollout.make_sampler(model.config, Tokenizer(source.folder), config, world)
    parallel.publish(model, sampler.model)
    return sampler
