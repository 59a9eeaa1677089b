"""The peer's side of bench.bench_pretrain, run by a Python that has transformers and accelerate.

    PYTHON bench/trainer_peer.py < SETTINGS.json

Trains with transformers' Trainer on rows that are packed as its own collator packs: positions start again at
each document, which the attention mask follows. Answers with one line of JSON on standard output. Imports
nothing of this repository.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
import time


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.read())
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    rows = np.load(settings["rows"])
    labels = np.where(rows["targets"] < 0, -100, rows["targets"])
    data = [{"input_ids": ids, "position_ids": positions, "labels": y, "shift_labels": y}
            for ids, positions, y in zip(rows["tokens"], rows["positions"], labels)]
    stamps, losses = [time.perf_counter()], []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append(time.perf_counter())

        def on_log(self, *_, logs, **__):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=settings["batch"], max_steps=len(data) // settings["batch"],
            learning_rate=settings["lr"], weight_decay=settings["weight_decay"], adam_beta2=0.95, max_grad_norm=1.0,
            optim="adamw_torch_fused", lr_scheduler_type="constant", warmup_steps=0, use_cpu=True, bf16=False,
            save_strategy="no", report_to="none", logging_steps=1, remove_unused_columns=False,
            dataloader_pin_memory=False, disable_tqdm=True, train_sampling_strategy="sequential", seed=0)
        model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Watch()]).train()
    assert torch.get_num_threads() == settings["threads"]
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 2**20
    print(json.dumps({"seconds": [b - a for a, b in zip(stamps, stamps[1:])], "losses": losses, "peak_gb": peak,
                      **{name: importlib.metadata.version(name) for name in ("transformers", "accelerate")}}),
          file=answers)


if __name__ == "__main__":
    main()
