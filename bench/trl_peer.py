"""TRL's side of bench.bench_step, which runs this file with a Python that has TRL 1.16 and transformers.

    PYTHON bench/trl_peer.py < SETTINGS.json

Trains with GRPOTrainer as ours is set: fp32, no gradient checkpointing (TRL's defaults are bf16 and gradient
checkpointing), on-policy, no KL, transformers' generate with its cache, the samples of a step in as many
micro-batches. No id ends a sample. Answers with one line of JSON on standard output; what TRL prints goes to
standard error. Imports nothing of this repository.
"""

import json
import os
import sys
import tempfile
import time


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.read())
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(settings["threads"])
    stamps, lengths = [], []

    class Stamp(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append((time.perf_counter(), time.process_time()))

    def reward(completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [len(text) % 97 / 97 for text in completions]

    samples = settings["prompts_per_step"] * settings["group_size"]
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            folder, per_device_train_batch_size=samples, num_generations=settings["group_size"],
            max_completion_length=settings["max_new_tokens"], temperature=settings["temperature"],
            learning_rate=settings["lr"], lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0,
            optim="adamw_torch_fused", beta=0.0, num_iterations=1, loss_type="dapo", bf16=False,
            gradient_checkpointing=False, use_cpu=True, use_vllm=False,
            generation_kwargs={"eos_token_id": None}, max_steps=settings["steps"], save_strategy="no",
            report_to="none", logging_steps=1, shuffle_dataset=False, dataloader_pin_memory=False,
            disable_tqdm=True, seed=0)
        model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        trainer = trl.GRPOTrainer(
            model, reward, config, datasets.Dataset.from_list([{"prompt": p} for p in settings["prompts"]]),
            processing_class=transformers.AutoTokenizer.from_pretrained(settings["model"]),
            callbacks=[Stamp()])
        trainer.eos_token_ids = [-1]  # else a sample is cut at one
        trainer.train()
    assert torch.get_num_threads() == settings["threads"]
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 2**20
    assert set(lengths) == {settings["max_new_tokens"]} and len(lengths) == samples * settings["steps"]
    print(json.dumps({"stamps": stamps, "peak_gb": peak, "trl": trl.__version__,
                      "transformers": transformers.__version__}), file=answers)


if __name__ == "__main__":
    main()
