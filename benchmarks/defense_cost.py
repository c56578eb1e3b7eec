"""Time and memory of a training step under every alignment-stage defense, relative to SFT, side by side in one run.

    python benchmarks/defense_cost.py     # a random tiny Llama, a tenth of whose weights are those of its output head
    python benchmarks/defense_cost.py --model MODEL --device cuda

Every defense trains its own LoRA adapter on the same model and the same batches with the Trainer's own step (forward,
backward, clipping, AdamW). The steps of all defenses are interleaved, round by round, so that whatever else the
machine does falls on all of them alike; a ratio is formed within each round. Printed are the median and the range over
rounds. `--clock cpu` counts the process's own time, not the wall's, for machines that are busy with other things.
T-Vaccine draws its layers anew in every round, and its rare measurement of them is timed apart and added in shares.
Memory on a GPU is the allocator's peak; on a CPU it is what the step allocates at most above what was there
before it, from torch's profiler, in a pass of its own.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from pharmacist.core.files import write_json
from pharmacist.data.batches import collate
from pharmacist.defenses import DEFENSES
from pharmacist.defenses.alignment.t_vaccine import TVaccineConfig
from pharmacist.nn.locate import decoder_layers, linear_names
from pharmacist.training.options import LoraOptions, TrainingStageOptions, training_arguments
from pharmacist.training.strategy import StepContext
from pharmacist.training.trainer import StrategyTrainer, token_mean_loss


LINES = {
    "sft": ("sft", {}),
    "vaccine": ("vaccine", {}),
    "t-vaccine": ("t-vaccine", {}),
    "repnoise": ("repnoise", {}),
    "booster": ("booster", {}),
    "booster, aware": ("booster", {"rho": 2.0}),
    "tar, one step": ("tar", {"form": "one-step"}),
}
TARGETS = {"vaccine": 1.9, "t-vaccine": 1.6, "booster": 2.9, "repnoise": 2.3}


def random_llama(arguments):
    torch.manual_seed(0)
    width = arguments.width
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=arguments.vocabulary,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


class Same:
    """An endless stream of one batch, which is also the partner of every row."""

    def __init__(self, fixed):
        self.fixed = fixed

    def __next__(self):
        return dict(self.fixed)

    def batch(self, rows):
        """All rows have their partner."""
        return list(range(len(rows))), dict(self.fixed)


def make_batch(vocabulary, arguments, seed, device, prompts=None):
    """Rows of random tokens of different lengths; given prompts are continued."""
    rng, items = np.random.default_rng(seed), []
    for row in range(arguments.batch):
        n = int(rng.integers(arguments.length * 3 // 4, arguments.length + 1)) if row else arguments.length
        ids = rng.integers(3, vocabulary, n)
        n_prompt = int(arguments.prompt_share * arguments.length)
        if prompts is not None:
            ids[:n_prompt] = prompts[row, :n_prompt]
        items.append({"input_ids": ids, "n_prompt": n_prompt})
    return {key: value.to(device) for key, value in collate(items, 0).items()}


class Line:
    """One defense, ready to take steps."""

    def __init__(self, name, options, arguments, device, dtype, folder):
        if arguments.model:
            base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        else:
            base = random_llama(arguments).to(dtype)
        base.to(device)
        lora = LoraOptions()
        torch.manual_seed(1)
        model = get_peft_model(
            base,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=linear_names(base),
                bias="none",
            ),
        )
        vocabulary = base.config.vocab_size
        batch = make_batch(vocabulary, arguments, 0, device)
        harmful = make_batch(vocabulary, arguments, 1, device, batch["input_ids"].cpu().numpy())
        if name == "t-vaccine":
            depth = len(decoder_layers(base))
            options = {"layers": max(1, depth // 4), "sample_every": 1, "score_every": 10**9} | options
        self.strategy = DEFENSES.build(name, options)
        self.found = self.strategy.setup(model, 0)
        given = TrainingStageOptions(
            output_dir=folder,
            model=arguments.model or "random",
            train={"per_device_train_batch_size": arguments.batch, "max_steps": 10**6, "learning_rate": 1e-5},
        )
        self.trainer = StrategyTrainer(
            model=model,
            args=training_arguments(given, folder=folder, device=device, bf16=dtype == torch.bfloat16, seed=0),
            train_dataset=[0],
            compute_loss_func=token_mean_loss,
            strategy=self.strategy,
            streams={
                "harmful": Same(harmful),
                "held_out": Same(harmful),
                "retain": Same(batch),
                "paired": Same(harmful),
            },
        )
        self.batch, self.device = batch | {"row": torch.arange(arguments.batch)}, device
        self.trainer.create_optimizer_and_scheduler(10**6)
        self.trainer.current_gradient_accumulation_steps = 1
        self.targets = (batch["labels"][:, 1:] != -100).sum()

    def step(self):
        """What the Trainer does for one update."""
        trainer, model = self.trainer, self.trainer.model
        trainer.training_step(model, dict(self.batch), self.targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        trainer.state.global_step += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, clock, act=None):
        """Seconds that a step (or `act`) takes."""
        start = clock()
        (act or self.step)()
        return clock() - start

    def measure_layers(self):
        """T-Vaccine's own pass over harmful rows."""
        own = self.trainer
        context = StepContext(own.model, self.batch, autocast=own.accelerator.autocast, streams=own.streams)
        self.strategy.scores(context)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self):
        """Bytes that a step needs at most, above what lies there before it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; a random Llama without it")
    parser.add_argument("--layers", type=int, default=12, help="of the random Llama")
    parser.add_argument("--width", type=int, default=256, help="of the random Llama")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the random Llama")
    parser.add_argument("--batch", type=int, default=10, help="rows")
    parser.add_argument("--length", type=int, default=96, help="longest row in tokens")
    parser.add_argument("--prompt-share", type=float, default=0.4, help="of the longest row")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None)
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--json", type=Path, help="write all measurements here")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: must be at least 1")
    logging.set_verbosity_error()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    with tempfile.TemporaryDirectory() as folder:
        names = list(dict.fromkeys(["sft", *arguments.only]))
        lines = {name: Line(*LINES[name], arguments, device, dtype, folder) for name in names}
        seconds = {name: [] for name in names}
        clock = time.perf_counter if arguments.clock == "wall" else time.process_time
        measured = []
        for round_number in range(arguments.rounds + 2):
            for name, line in lines.items():
                took = line.timed(clock)
                if name == "t-vaccine" and round_number:
                    took += statistics.median(measured)
                if round_number >= 2:  # two rounds to warm up
                    seconds[name].append(took)
            if "t-vaccine" in lines and round_number < 2:
                own = lines["t-vaccine"]
                share = TVaccineConfig().score_every
                measured.append(own.timed(clock, own.measure_layers) / share)
        memory = {name: line.peak() for name, line in lines.items()}
    own = f"{statistics.median(seconds['sft']) * 1e3:.0f} ms, {memory['sft'] / 2**20:.0f} MiB"
    print(
        f"{arguments.model or 'random Llama'}, {dtype}, {device}, {torch.get_num_threads()} threads, "
        f"batch {arguments.batch} x {arguments.length}, {arguments.rounds} rounds, {arguments.clock} clock; "
        f"SFT: {own}"
    )
    print("| defense | time / SFT: median | range | target | peak memory / SFT |\n|---|---|---|---|---|")
    for name in names:
        ratios = [own / sft for own, sft in zip(seconds[name], seconds["sft"], strict=True)]
        target = TARGETS.get(name, "")
        print(
            f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {target} | "
            f"{memory[name] / memory['sft']:.2f} |"
        )
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        write_json(arguments.json, {"settings": settings, "s": seconds, "bytes": memory})


if __name__ == "__main__":
    main()
