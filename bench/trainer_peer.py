"""transformers' side of bench.bench_pretrain, which runs this file with a Python that has it and accelerate.

    PYTHON bench/trainer_peer.py < SETTINGS.json

Answers with one line of JSON on standard output. Imports nothing of this repository.
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
    data = [{"input_ids": ids, "position_ids": positions, "labels": label, "shift_labels": label}
            for ids, positions, label in zip(rows["tokens"], rows["positions"], labels)]
    stamps, losses = [time.perf_counter()], []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append(time.perf_counter())

        def on_log(self, *_, logs, **__):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=settings["batch"], max_steps=len(data) // settings["batch"],
            learning_rate=settings["lr"], lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0,
            weight_decay=settings["weight_decay"], optim="adamw_torch_fused", use_cpu=True, bf16=False,
            train_sampling_strategy="sequential", remove_unused_columns=False, logging_steps=1,
            save_strategy="no", report_to="none", dataloader_pin_memory=False, disable_tqdm=True, seed=0)
        model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Watch()]).train()
    assert torch.get_num_threads() == settings["threads"]
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 2**20
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "accelerate")}
    print(json.dumps({"seconds": [b - a for a, b in zip(stamps, stamps[1:])], "losses": losses,
                      "peak_gb": peak, "versions": versions}), file=answers)


if __name__ == "__main__":
    main()
