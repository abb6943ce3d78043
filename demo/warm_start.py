"""The demo's models: a small Qwen2-Audio of random weights, and its supervised warm start.

`sh run_grpo.sh demo` runs this after `demo/make_demo.py`, and then trains and evaluates as for any model.
"""

import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from baselines.sft_trainer import AudioSFTTrainer
from dataset.dataset import load_train_dataset
from tiny import build_demo_model, build_processor
from utils.flags import at_least

UNTRAINED, WARM_START, SFT = "untrained", "warm_start", "sft"  # folders below the demo's output
SMOOTHED = 5  # steps over which the loss is averaged


class StopAtLoss(TrainerCallback):
    """Ends training when the mean of the last `SMOOTHED` losses reaches a target: GRPO needs a model that uses the
    audio but still errs, and the step at which the loss begins to fall depends on the seed."""

    def __init__(self, target_loss: float):
        self.target_loss, self.losses = target_loss, list[float]()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" not in logs:  # the summary at the end
            return
        self.losses.append(logs["loss"])
        mean = fmean(self.losses[-SMOOTHED:])
        control.should_training_stop |= len(self.losses) >= SMOOTHED and mean <= self.target_loss
        if control.should_training_stop or len(self.losses) % SMOOTHED == 0:
            print(f"warm start: step {len(self.losses)}, loss {mean:.3f} (until {self.target_loss})", flush=True)


def prepare(data: Path, out: Path, seed: int, max_steps: int, target_loss: float = 0.25) -> int:
    """Write `out`/untrained and `out`/warm_start, the latter trained to `max_steps` or `target_loss` (nats per answer
    token: at 0.4 the shape is right and the word random), and return the steps. What an earlier demo wrote is removed.
    Raises a `FileNotFoundError` without demo data, and a `ValueError` if `out` holds checkpoints of another run."""
    dataset = load_train_dataset(data / "warm_start.jsonl")
    if any(out.glob("checkpoint-*")) and not (out / UNTRAINED).is_dir():
        raise ValueError(f"{out}: holds checkpoints of another run; choose another --out")
    for pattern in (UNTRAINED, WARM_START, SFT, "checkpoint-*", "test_*"):
        for folder in out.glob(pattern):
            shutil.rmtree(folder)
    processor = build_processor([*dataset["prompt"], *dataset["solution"]])
    model = build_demo_model(out / UNTRAINED, processor, seed)
    print(f"{out / UNTRAINED}: a Qwen2-Audio of {model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    recipe = TrainingArguments(
        output_dir=str(out / WARM_START),
        max_steps=max_steps,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = AudioSFTTrainer(model, recipe, dataset, processor, callbacks=[StopAtLoss(target_loss)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(recipe.output_dir)
    return trainer.state.global_step


def main() -> None:
    parser = ArgumentParser(description="The demo's model and its warm start.", allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="what demo/make_demo.py wrote")
    parser.add_argument("--out", type=Path, default=Path("exp/demo"), help="for the models")
    parser.add_argument("--seed", type=at_least(0), default=1, help="decides weights and order")
    parser.add_argument("--max_steps", type=at_least(1), default=80, help="of the warm start, at most")
    args = parser.parse_args()
    try:
        prepare(**vars(args))
    except (ValueError, OSError) as error:
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
