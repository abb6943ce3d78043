"""GRPO for audio: load -> sample -> reward -> log-probs -> loss, on TRL's `GRPOTrainer`.

TRL provides configuration, model, reference, adapters and engines, the order of questions, the calls of the rewards,
and logging. The algorithm is here: a step's questions become a `Rollout` (`rollout.py`), whose groups share their
prompt in sampling (`model/branches.py`) and in log-probs (`shared_prompt.py`); `loss.py` turns it into the loss.

A run attaches what it needs by replacing the attributes `load`, `sample`, `roll_out` and `log_probs`, see `run/`.

Shapes: N questions, G generations, B = N * G completions of a process, F reward functions, P prompt tokens, C
completion tokens.
"""

from collections.abc import Sequence

import torch
from accelerate.utils import gather, gather_object
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from dataset.encode import Batch, load_and_encode
from model.branches import check_generation, roll_out
from model.qwen2_audio import (
    audio_token_id,
    base_model,
    check_audio_token,
    encode_clips,
    encoder_is_frozen,
    freeze_parts,
    load_processor,
    pad_clips,
)

from .loss import check_loss, groups_with_gradient, grpo_loss, token_weights
from .rollout import Rollout, check_whole_groups, describe_rollout, group_advantages, log_completions, pad_completions
from .saving import SelfContainedCheckpoints
from .shared_prompt import check_attention, pack, score, unpack


class AudioGRPOTrainer(SelfContainedCheckpoints, GRPOTrainer):
    """GRPO on questions about audio, for Qwen2-Audio and models with its interface.

    Args:
        model: path, hub name, or the loaded model.
        reward_funcs: as for `trl.GRPOTrainer`.
        args: `trl.GRPOConfig`. Micro-batches count completions and must hold whole groups.
        train_dataset: with the columns `prompt` (the user's text), `audio_path` and those that the rewards ask for; a
            column `style` is recorded in the checkpoints. `dataset.dataset.load_train_dataset` makes it.
        processing_class: the model's processor; by default it is loaded.
        audio_channels: `first` or `mean`, see `load_audio`.
        freeze: parts of the model that are not trained, of `PARTS`.
        **kwargs: passed to `trl.GRPOTrainer` (`callbacks`, `peft_config`, `eval_dataset`, ...).

    Raises:
        ValueError: a setting does not work with audio, or is not implemented; names the setting and the remedy.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs,
        args: GRPOConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin | None = None,
        audio_channels: str = "first",
        freeze: Sequence[str] = (),
        **kwargs,
    ):
        check_settings(args)
        processor = load_processor(model if isinstance(model, str) else model.config._name_or_path, processing_class)
        # TRL takes a processor for one of images and asks the model for its image token: it gets the tokenizer.
        super().__init__(model, reward_funcs, args, train_dataset, processing_class=processor.tokenizer, **kwargs)
        self.processing_class = processor  # saved with every checkpoint
        self.audio_channels, self.freeze = audio_channels, freeze
        styles = train_dataset.unique("style") if "style" in train_dataset.column_names else []
        self.prompt_style = styles[0] if len(styles) == 1 else None

        base = base_model(self.model)
        check_audio_token(base, processor)
        check_attention(base.config._attn_implementation)
        freeze_parts(self.model, freeze)
        self.encodes_once = encoder_is_frozen(base.model)  # then the reference's encoder is the same
        # A sampled `<|AUDIO|>` would be counted as audio in the log-prob passes.
        suppressed = {*(self.generation_config.suppress_tokens or []), audio_token_id(base)}
        self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = sorted(suppressed)
        check_generation(self.generation_config)
        # A later policy than the one that sampled learns from a rollout, unless an optimizer step uses up whole ones.
        self.keeps_old_logps = args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations) != 0

    # A step

    def _prepare_inputs(self, rows: list[dict]) -> Rollout:
        """The micro-batch of this call: of a fresh rollout, or of the last one while that is not used up.

        Args:
            rows: B times the micro-batches of a generation batch, each question's row G times.
        """
        generations, parts = self.group_size, self.args.steps_per_generation
        if not self.model.training:
            return self._finish(self.roll_out(rows[::generations]), parts=1)[0]
        if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._finish(self.roll_out(rows[::generations]), parts)
        return self._buffered_inputs[self._step % parts]

    def compute_loss(self, model, rollout: Rollout, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        """The loss of a micro-batch, divided by the number of accumulated ones."""
        weights = token_weights(rollout, self.args)  # (N, G, C)
        kept = groups_with_gradient(rollout, self.beta)
        tokens, rollout = rollout.mask.sum(), rollout.select(kept)
        logps, entropies = self.log_probs(model, rollout, entropy=True)  # (kept, G, C)
        loss, logged = grpo_loss(logps, rollout, weights[kept], self.args)
        # Groups without a gradient are never clipped, and their entropy is not known.
        counts = [tokens] * len(logged) + [rollout.mask.sum()]
        sums = [(value * rollout.mask).sum() for value in (*logged.values(), entropies)]
        totals = self.accelerator.reduce(torch.stack([torch.stack(sums), torch.stack(counts).to(sums[0])]))
        for name, value in zip((*logged, "entropy"), (totals[0] / totals[1].clamp(min=1)).tolist(), strict=True):
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)

    # A rollout

    def roll_out(self, rows: list[dict]) -> Rollout:
        """Sample G completions of each of N rows, grade them, and take the log-probs that stay fixed."""
        rows, questions = self.load(rows)
        questions, ids, mask = self.sample(questions)
        lengths = mask.sum(dim=2)  # (N, G)
        last = ids.gather(2, lengths[..., None] - 1).squeeze(2)
        ended = torch.isin(last, torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=ids.device))
        rewards, advantages = self.reward(rows, ids, lengths)
        if self.mask_truncated_completions:
            mask = mask * ended[..., None]
        rollout = Rollout(rows, questions, ids, mask, lengths, ended, rewards, advantages)
        with torch.no_grad():
            if self.keeps_old_logps:
                rollout.old_logps, _ = self.log_probs(self.model, rollout)
            if self.beta:
                rollout.ref_logps = self.reference_log_probs(rollout)
        return rollout

    def load(self, rows: list[dict]) -> tuple[list[dict], Batch]:
        """The clips of N rows, decoded by threads and encoded with their prompts."""
        return rows, load_and_encode(self.processing_class, rows, self.audio_channels)

    def sample(self, questions: Batch) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """G completions of each question.

        Returns:
            The questions on the device, encoded if the encoder is frozen; token ids and mask (N, G, C), right-padded.
        """
        device = self.accelerator.device
        questions = questions.to(device)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            self.accelerator.autocast(),
        ):
            model, clips = base_model(model), None
            if self.encodes_once:
                clips = encode_clips(model.model, questions.input_features, questions.frames)
                questions = questions.encoded_as(pad_clips(clips))
            in_step = is_deepspeed_zero3_enabled() and not self.args.ds3_gather_for_generation
            # Each forward pass then gathers weights from all processes: none stops before the others.
            going = (lambda goes_on: any(gather_object([goes_on]))) if in_step else bool
            completions = roll_out(model, questions, self.group_size, self.generation_config, clips, going)
        return questions, *pad_completions(completions, self.group_size, self._tokenizer.pad_token_id, device)

    def reward(self, rows: list[dict], ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (N, G, F), NaN where a function does not apply, and advantages (N, G) of the completions."""
        generations = ids.shape[1]
        tokens = [row[:length].tolist() for row, length in zip(ids.flatten(0, 1), lengths.flatten(), strict=True)]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        repeated = [row for row in rows for _ in range(generations)]  # B
        prompts = [row["prompt"] for row in repeated]
        rewards = self._calculate_rewards(repeated, prompts, texts, tokens)  # (B of all processes, F)
        groups = rewards.unflatten(0, (-1, generations))
        weights = self.reward_weights.to(groups.device)
        advantages = group_advantages(groups, weights, self.scale_rewards, self.multi_objective_aggregation)
        log_completions(self, prompts, texts, rewards, advantages)
        own = slice(self.accelerator.process_index * len(rows), (self.accelerator.process_index + 1) * len(rows))
        return groups[own], advantages[own]

    def reference_log_probs(self, rollout: Rollout) -> torch.Tensor:
        """Log-probs (N, G, C) under the reference: a model beside the policy, or the policy without its adapters."""
        if self.ref_model is not None:
            return self.log_probs(self.ref_model, rollout)[0]
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            logps, _ = self.log_probs(self.model, rollout)
        freeze_parts(self.model, self.freeze)  # PEFT makes all adapters trainable when it turns them on again
        return logps

    def log_probs(self, model, rollout: Rollout, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs (N, G, C) of the completions in nats, 0 at padding, and entropies (N, G, C) if asked for."""
        base = base_model(self.accelerator.unwrap_model(model))
        at_once = max(1, self.args.per_device_train_batch_size // rollout.ids.shape[1])
        parts = []
        for start in range(0, len(rollout), at_once):
            part = rollout.select(range(start, min(start + at_once, len(rollout))))
            packed = pack(part.questions.input_ids, part.questions.attention_mask, part.ids, part.mask)
            with self.accelerator.autocast():
                output = score(model, base, packed, part.questions.audio_inputs)
            wanted = [output.log_probs, output.entropy] if entropy else [output.log_probs]
            parts.append([unpack(values, packed, *part.ids.shape[1:]) for values in wanted])
        logps, *entropies = map(torch.cat, zip(*parts, strict=True))
        return logps, entropies[0] if entropies else None

    @property
    def group_size(self) -> int:
        """G, in training or in TRL's own evaluation."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _finish(self, rollout: Rollout, parts: int) -> list[Rollout]:
        """Log a generation batch and split it into micro-batches of whole groups."""
        processes = self.accelerator.num_processes
        counts = torch.stack([rollout.mask.sum(), rollout.lengths.sum(), rollout.questions.attention_mask.sum()])
        trained, sampled, prompts = self.accelerator.reduce(counts).tolist()
        rollout.mean_tokens = torch.tensor(max(trained, 1.0) / (processes * parts), device=rollout.ids.device)
        fields = [value.contiguous() for value in (rollout.rewards, rollout.lengths, rollout.ended)]
        rewards, lengths, ended = (value.cpu() for value in gather(fields))
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self.state.num_input_tokens_seen += sampled + prompts * rollout.ids.shape[1]
        metrics = describe_rollout(rewards, self.reward_func_names, self.reward_weights.cpu(), lengths, ended)
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        self._metrics[mode]["num_tokens"] = [self.state.num_input_tokens_seen]
        return rollout.shuffled(parts) if mode == "train" else [rollout]


def check_settings(args: GRPOConfig) -> None:
    """Raise a `ValueError` for settings that audio does not work with, or that are not implemented."""
    for name in ("use_vllm", "use_transformers_continuous_batching"):  # `run/vllm.py` attaches rollouts by vLLM
        if getattr(args, name):
            raise ValueError(f"--{name} true: TRL's engine takes no audio; omit it")
    check_loss(args)
    check_whole_groups("per_device_train_batch_size", args.per_device_train_batch_size, args.num_generations)
    if args.eval_strategy != "no":
        generations = args.num_generations_eval or args.num_generations
        check_whole_groups("per_device_eval_batch_size", args.per_device_eval_batch_size, generations)
