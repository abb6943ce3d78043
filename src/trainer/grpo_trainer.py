"""GRPO for audio: TRL's `GRPOTrainer`, given ears, with the prompt of a group computed once.

The loop is TRL's: encode the questions, roll out G completions of each, score them, take the log-probs, form the loss.
Losses, logging, PEFT, DeepSpeed and completion tables are inherited; accuracy and checkpoints are the mixins'. The
overridden methods are private ones, which the pinned version (trl 1.16.0) protects:

    __init__                             refuses what audio does not work with; freezes what the original never trains
    _get_dataloader, _get_train_sampler  rows come with their clips (see loading.py); an epoch's order of questions
                                         follows from seed and epoch, resumed or not
    _generate_and_score_completions      hands out whole groups, (N, G, ...)
    _tokenize_prompts                    the prompts were tokenized with their clips
    _generate_single_turn                rollouts: one prefill per question, from which its G completions branch off
                                         (see model/branches.py), or by vLLM; an encoder that is not trained runs here
                                         alone
    _calculate_rewards                   what a reward raises or returns wrongly ends the run in all processes
    _prepare_inputs                      micro-batches that cost no pass come first
    _compute_loss                        groups back to rows; groups without a gradient cost no pass (see no_pass.py)
    _get_per_token_logps_and_entropies   policy and reference: one packed row per question (see shared_prompt.py)
    _save_rng_state, _load_rng_state     rollouts that later steps still learn from, beside the random state

TRL shuffles the generation batch before it cuts it into micro-batches. Tensors of shape (N, G, ...) make it shuffle and
cut questions instead of completions, so that groups stay whole.

Shapes: N questions, G generations, B = N * G completions, P prompt, C completion, M mel bins, F mel frames, T packed.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from dataset.encode import Batch
from model.branches import check_generation, roll_out
from model.qwen2_audio import (
    audio_token_forbidden,
    audio_token_id,
    base_model,
    check_audio_token,
    encode_clips,
    encoder_is_frozen,
    freeze_parts,
    load_processor,
    pad_clips,
)

from .accuracy import GreedyAccuracy
from .checked_rewards import checked, find_error, raise_together
from .finite import FiniteSteps
from .loading import LoadsAhead, MarkedRows, QuestionLoader, QuestionOrder, Questions
from .memory import longest_questions
from .no_pass import RolloutEntropies, adds_nothing, fill_in, find_idle_groups, shortest_question
from .probe import MemoryProbe
from .reference import WaitingReference, check_ref_offload
from .resample import find_uniform_groups, replace_uniform_groups
from .saving import SelfContainedCheckpoints
from .shared_prompt import ATTENTION, pack, score, unpack
from .vllm_rollouts import VLLMRollouts, check_vllm

# How a batch has its clips: the features, or what an encoder that is not trained makes of them; and their lengths.
CLIPS = ("input_features", "encoded_clips", "frames")


class AudioGRPOTrainer(GreedyAccuracy, LoadsAhead, FiniteSteps, MemoryProbe, SelfContainedCheckpoints, GRPOTrainer):
    """GRPO on questions about audio, for Qwen2-Audio and models with its interface.

    Args:
        model: path, hub name, or the loaded model.
        reward_funcs: as for `trl.GRPOTrainer`; functions get those of the data set's columns that they name (see
            `checked_rewards.py`).
        args: `trl.GRPOConfig`. Micro-batches count completions and must hold whole groups.
        train_dataset: with the columns `prompt` (the user's text), `audio_path` and what the rewards ask for; a column
            `style` is recorded in the checkpoints. `dataset.dataset.load_train_dataset` makes it.
        processing_class: the model's processor; by default it is loaded.
        audio_channels: `first` or `mean`, see `load_audio`.
        freeze: parts of the model that are not trained, of `PARTS`.
        max_resample_rounds: rounds of replacing questions whose G rewards are all equal by fresh ones; 0: none.
        ref_offload: the reference model waits on the CPU between its passes, see `reference.py`.
        **kwargs: `eval_questions`, asked greedily by `evaluate` instead of what TRL does with an `eval_dataset` (see
            `accuracy.py`); the others are passed on to `trl.GRPOTrainer` (`callbacks`, `peft_config`, ...).

    Raises:
        ValueError: a setting that audio does not work with, with its remedy. (Rows are examined before, by
            `dataset.check`; one with a special token or a clip of a wrong length is refused when its turn comes, too.)
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
        max_resample_rounds: int = 0,
        ref_offload: bool = False,
        **kwargs,
    ):
        name = model if isinstance(model, str) else model.config._name_or_path
        processor = load_processor(name, processing_class)
        check_rollout_engine(args, quantised=kwargs.get("quantization_config") is not None)
        check_whole_groups("per_device_train_batch_size", args.per_device_train_batch_size, args.num_generations)
        if args.eval_strategy != "no":
            generations = args.num_generations_eval or args.num_generations
            check_whole_groups("per_device_eval_batch_size", args.per_device_eval_batch_size, generations)
        # TRL takes a processor for one of images and asks the model for its image token: it gets the tokenizer.
        rewards = list(map(checked, reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]))
        use_vllm, args.use_vllm = args.use_vllm, False  # TRL's own knows images only: ours comes below
        super().__init__(model, rewards, args, train_dataset, processing_class=processor.tokenizer, **kwargs)
        self.data_collator = QuestionLoader(processor, audio_channels, self.num_generations, train_dataset)
        self.use_vllm = args.use_vllm = use_vllm
        self.processing_class = processor  # what checkpoints are saved with
        self.audio_channels, self.max_resample_rounds = audio_channels, max_resample_rounds
        styles = train_dataset.unique("style") if "style" in train_dataset.column_names else []
        self.prompt_style = styles[0] if len(styles) == 1 else None
        self._questions: Batch  # the generation batch's, encoded
        self._waves: list[np.ndarray]  # their clips
        self._reference: WaitingReference | None = None
        if ref_offload:
            check_ref_offload(args, adapters=isinstance(self.model, PeftModel))
            self._reference = WaitingReference(self.ref_model, self.accelerator.device)
        self._clips: dict[str, Any] = {}  # of the batch whose log-probs are being computed: CLIPS
        self._tokens: list[int] = []  # of a micro-batch: N, the completion tokens of each group
        self._entropies: torch.Tensor | None = None  # (B, C) of the last rollout's tokens, where they are wanted
        # Of a micro-batch whose idle groups are left out: which are (N), and its entropies, (N, G, C).
        self._idle: list[bool] = []
        self._rollout_entropies: torch.Tensor | None = None
        self._skipped = 0  # the first micro-batches of the rollouts, which have idle groups only on all processes

        base = base_model(self.model)
        check_audio_token(base, processor)
        if base.config._attn_implementation not in ATTENTION:
            raise ValueError(
                f"attn_implementation {base.config._attn_implementation!r} cannot take the mask of a shared prompt; "
                f"use one of {', '.join(ATTENTION)}"
            )
        if getattr(base, "is_quantized", False):
            # TRL has rounded the adapters to bfloat16, in which steps of 1e-6 are lost.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.freeze = freeze
        freeze_parts(self.model, freeze)
        self.encodes_once = encoder_is_frozen(base.model)  # which is then the reference's, too
        self._prepare_rollouts()

    # Rollouts

    def _prepare_rollouts(self) -> None:
        """Let nobody sample `<|AUDIO|>`, which would be counted as audio in the log-prob passes; start an engine."""
        suppressed = {*(self.generation_kwargs.get("suppress_tokens") or []), audio_token_id(base_model(self.model))}
        self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = sorted(suppressed)
        check_generation(self.generation_config)
        if self.use_vllm:
            self.vllm = VLLMRollouts(self.model, self.args, self.accelerator, self.eos_token_ids)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        """Roll out and score B rows, which repeat each of N questions G times.

        Returns:
            TRL's tensors as (N, G, ...) instead of (B, ...), and the CLIPS, (N, ...). What the sizes in a policy pass
            follow from are lists of N, which TRL shuffles and cuts alike: a pass asks the device for nothing.
        """
        generations = self.num_generations if self.model.training else self.num_generations_eval
        loaded = inputs[0].pop("questions", None)  # not there, where a run went on in the middle of a batch
        rows = inputs[::generations]
        assert all(row == rows[i // generations] for i, row in enumerate(inputs)), "a group is not whole"
        questions = loaded or self.data_collator.load(rows, replace=self.model.training)
        batch = self._roll_out(questions, generations)
        if self.max_resample_rounds and self.model.training:
            batch = self._resample_uniform_groups(batch, questions.rows)
        batch["tokens"] = batch["completion_mask"].sum(dim=(1, 2)).tolist()
        if "entropies" in batch:
            idle = find_idle_groups(batch["advantages"])
            batch["idle"] = idle.tolist()
            self._metrics["train"]["groups/no_pass_share"].append(self.accelerator.gather(idle.float()).mean().item())
        return batch

    def _roll_out(self, questions: Questions, generations: int) -> dict[str, Any]:
        """One round of `_generate_and_score_completions`: N questions, each with G fresh completions, scored.

        The metric `clips/replaced` counts questions whose clip could not be used, over all processes.
        """
        if self.model.training:
            self._metrics["train"]["clips/replaced"].append(float(sum(gather_object([questions.replaced]))))
        self._waves = questions.clips
        self._questions = questions.batch.to(self.accelerator.device)
        self._clips = self._questions.audio_inputs
        self.describe_batch = partial(self._describe_rollout, questions.batch, generations)

        self._entropies = None
        output = super()._generate_and_score_completions([row for row in questions.rows for _ in range(generations)])
        freeze_parts(self.model, self.freeze)  # PEFT trains all adapters again once they were off for the reference
        if self._entropies is not None:
            mask = output["completion_mask"]
            missing = mask.shape[1] - self._entropies.shape[1]  # `pad_to_multiple_of`
            output["entropies"] = torch.nn.functional.pad(self._entropies, (0, missing)) * mask
        shape = len(questions.rows), generations
        return {key: value.unflatten(0, shape) if value.ndim else value for key, value in output.items()} | self._clips

    def _resample_uniform_groups(self, batch: dict, questions: list[dict]) -> dict[str, Any]:
        """Replace groups whose rewards are all equal by groups of fresh questions, in `max_resample_rounds` at most.

        All processes take the same number of rounds with the same number of questions, to stay in step: as many
        as the process that lacks most. The order of fresh questions follows from the seed and the step alone.
        """
        generator = torch.Generator().manual_seed(self.args.seed + 1_000_003 * (self.state.global_step + 1))
        order = torch.randperm(len(self.train_dataset), generator=generator).tolist()
        order = order[self.accelerator.process_index :: self.accelerator.num_processes]
        fresh = (row for row in map(self.train_dataset.__getitem__, order) if row not in questions)
        shares = []  # of uniform groups, before each round and after the last
        while True:
            uniform = find_uniform_groups(batch["advantages"])
            shares.append(fmean(gather_object(uniform.tolist())))
            rows = list(islice(fresh, max(gather_object([int(uniform.sum())]))))
            drawn = min(gather_object([len(rows)]))
            # No rounds left, nothing lacks, or a process has tried all its questions.
            if len(shares) > self.max_resample_rounds or drawn == 0:
                break
            tried = self._roll_out(self.data_collator.load(rows[:drawn]), self.num_generations)
            batch = replace_uniform_groups(batch, tried, self._tokenizer.pad_token_id)
        batch["num_items_in_batch"] = self.accelerator.gather(batch["completion_mask"].sum()).sum()
        metrics = self._metrics["train"]
        metrics["groups/uniform_share"].append(shares[0])
        metrics["groups/uniform_share_left"].append(shares[-1])
        metrics["groups/resample_rounds"].append(len(shares) - 1)
        return batch

    def _tokenize_prompts(self, prompts: list):
        """Token ids of the B prompts, as TRL wants them: lists without padding."""
        generations = len(prompts) // len(self._questions)
        encoded = zip(self._questions.input_ids, self._questions.attention_mask, strict=True)
        prompt_ids = [ids[mask.bool()].tolist() for ids, mask in encoded]
        return [ids for ids in prompt_ids for _ in range(generations)], None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """Sample G completions of each question: lists of B token-id lists, and their log-probs if vLLM did it."""
        if self.use_vllm:
            prompts = prompt_ids[::num_generations]
            return self.vllm.generate(self.state.global_step, prompts, self._waves, num_generations)
        entropies = RolloutEntropies(self.temperature) if adds_nothing(self) else None
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
            model = base_model(model)
            clips = self._encode_once(model)
            completions = roll_out(
                model, self._questions, num_generations, self.generation_config, clips, entropies, self._anyone
            )
        if entropies is not None:
            self._entropies = entropies.as_rows(len(completions))
        return completions, None

    def _anyone(self, goes_on: bool) -> bool:
        """Whether any process goes on with its rollout, where a step of it needs them all: under ZeRO-3, whose weights
        are gathered module by module then."""
        if self.args.ds3_gather_for_generation or not is_deepspeed_zero3_enabled():
            return goes_on
        return any(gather_object([goes_on]))

    def _encode_once(self, base: PreTrainedModel) -> list[torch.Tensor] | None:
        """The questions' clips, encoded for this rollout and every pass over it, by an encoder that is not trained;
        None if it is. To be called where `base` has all its weights (under ZeRO-3 they are gathered for a rollout)."""
        if not self.encodes_once:
            return None
        clips = encode_clips(base.model, self._questions.input_features, self._questions.frames)
        self._clips = {"encoded_clips": pad_clips(clips), "frames": self._questions.frames}
        return clips

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """Rewards (B of all processes, functions). What one raises ends the run in all processes, and so does a value
        that is NaN or infinite; None, which TRL makes NaN, is not applicable."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        given = {key: [row[key] for row in inputs] for key in inputs[0]}
        given |= {"prompts": prompts, "completions": completions}
        start = self.accelerator.process_index * len(prompts)
        own = rewards[start : start + len(prompts)]
        raise_together(find_error(self.reward_funcs, self.reward_func_names, own, given))
        # The paper's curve; TRL's `reward_std` is that over all completions.
        mode = "train" if self.model.training else "eval"
        size = self.num_generations if mode == "train" else self.num_generations_eval
        groups = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1).view(-1, size)
        self._metrics[mode]["group_reward_std"].append(groups.std(dim=1).mean().item())
        return rewards

    # Going on

    def _get_dataloader(self, dataset: Dataset, *args, **kwargs):
        rows = MarkedRows(dataset) if kwargs.get("is_training") else dataset
        return super()._get_dataloader(rows, *args, **kwargs)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> QuestionOrder:
        usual = super()._get_train_sampler(dataset)
        return QuestionOrder(
            usual.data_source, usual.mini_repeat_count, usual.batch_size, usual.repeat_count, usual.shuffle, usual.seed
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """Save, beside the random state, this process's place among the micro-batches of its rollouts, and these if
        later steps learn from them, too (`num_iterations`, `steps_per_generation`)."""
        super()._save_rng_state(output_dir)
        used_up = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        torch.save(
            {
                "processes": self.args.world_size,
                "step": self._step,
                "rollouts": None if used_up else self._buffered_inputs,
            },
            Path(output_dir) / f"rollouts_{self.args.process_index}.pt",
        )

    def _load_rng_state(self, checkpoint: str) -> None:
        """Load what `_save_rng_state` saved. On another number of processes, a batch of rollouts that was not used up
        is sampled anew, for the same questions."""
        super()._load_rng_state(checkpoint)
        path = Path(checkpoint) / f"rollouts_{self.args.process_index}.pt"
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if path.is_file():
            saved = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            if saved["processes"] == self.args.world_size:
                self._step, self._buffered_inputs = saved["step"], saved["rollouts"]

    # Log-probs and loss

    def _prepare_inputs(self, generation_batch):
        """A micro-batch. Those of fresh rollouts with fewest groups to pass come first: then the processes, which wait
        for each other, have the cheap ones at the same time. The order is free where `adds_nothing`: one optimizer
        step takes them all."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or "idle" not in inputs:
            return inputs
        self._buffered_inputs.sort(key=lambda batch: batch["idle"].count(False))
        self._skipped = min(gather_object([sum(all(batch["idle"]) for batch in self._buffered_inputs)]))
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss on a micro-batch of whole groups."""
        self._clips = {key: inputs[key] for key in CLIPS if key in inputs}
        self.describe_batch = partial(describe_pass, inputs["prompt_mask"], inputs["completion_mask"])
        beside = *CLIPS, "tokens", "entropies", "idle"
        rows = {key: value for key, value in inputs.items() if key not in beside}
        rows = {key: value.flatten(0, 1) if value.ndim > 1 else value for key, value in rows.items()}
        self._tokens = inputs["tokens"]
        if "idle" in inputs:
            self._idle, self._rollout_entropies = inputs["idle"], inputs["entropies"]
        try:
            return super()._compute_loss(model, rows)
        finally:
            self._tokens, self._idle, self._rollout_entropies = [], [], None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        """TRL's name for `_log_probs`. A reference that waits on the CPU is fetched for all of a call's passes."""
        asked = self._reference if model is self.ref_model else None
        with asked.fetched() if asked else nullcontext():
            return self._log_probs(model, *args, **kwargs)

    def _log_probs(
        self,
        model,
        input_ids: torch.Tensor,  # (B, P + C)
        attention_mask: torch.Tensor,  # (B, P + C)
        logits_to_keep: int,  # C
        batch_size: int | None = None,  # completions per forward pass
        compute_entropy: bool = False,
        **unused,  # images, and the auxiliary loss of mixtures of experts
    ):
        """Log-probs (B, C), and entropies (B, C) or None, of the completions; no auxiliary loss."""
        questions = len(next(iter(self._clips.values())))
        ids, mask = (rows.unflatten(0, (questions, -1)) for rows in (input_ids, attention_mask))  # (N, G, P + C)
        # The passes over a rollout count once for all of it.
        tokens = self._tokens or mask[:, :, -logits_to_keep:].sum(dim=(1, 2)).tolist()
        groups = ids, mask, tokens, self._clips
        if not any(self._idle):
            return *self._score(model, *groups, logits_to_keep, batch_size, compute_entropy), None
        kept = [question for question, idle in enumerate(self._idle) if not idle]
        places = torch.tensor(kept, dtype=torch.long).to(ids.device, non_blocking=True)
        assert self._rollout_entropies is not None
        logps = torch.zeros_like(self._rollout_entropies)
        if kept:

            def take(values):
                return [values[question] for question in kept] if isinstance(values, list) else values[places]

            groups = take(ids), take(mask), take(tokens), {key: take(value) for key, value in self._clips.items()}
            found = self._score(model, *groups, logits_to_keep, batch_size, compute_entropy)
            filled = zip((logps, self._rollout_entropies), found, strict=True)
            return *(values if rows is None else fill_in(values, rows, places) for values, rows in filled), None
        together = self._step % self.args.steps_per_generation < self._skipped  # DDP has collectives in forward passes
        if self.accelerator.sync_gradients or self.is_deepspeed_enabled or not together:
            # Engines synchronise in a pass, and an optimizer tells a gradient of zero from none.
            base = base_model(self.accelerator.unwrap_model(model))
            groups = shortest_question(ids, self._clips, audio_token_id(base))
            logps = logps + 0 * self._score(model, *groups, 1, None, False)[0].sum()
        else:
            logps.requires_grad_()  # for `backward`, which finds nothing behind it
        return logps.flatten(0, 1), self._rollout_entropies.flatten(0, 1), None

    def _score(
        self,
        model,
        ids: torch.Tensor,  # (N, G, P + C)
        mask: torch.Tensor,  # (N, G, P + C)
        tokens: list[int],  # N, completion tokens of each group
        clips: dict[str, Any],  # CLIPS of N questions
        length: int,  # C
        batch_size: int | None,  # completions per forward pass
        compute_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs (B, C), and entropies (B, C) or None, by forward passes."""
        base = base_model(self.accelerator.unwrap_model(model))
        generations = ids.shape[1]
        logps, entropies = [], []
        step = max((batch_size or len(ids) * generations) // generations, 1)
        for start in range(0, len(ids), step):
            chunk = slice(start, start + step)
            packed = pack(
                prompt_ids=ids[chunk, 0, :-length],
                prompt_mask=mask[chunk, 0, :-length],
                completion_ids=ids[chunk, :, -length:],
                completion_mask=mask[chunk, :, -length:],
                tokens=tokens[chunk],
            )
            with self.accelerator.autocast(), audio_token_forbidden(base) if self.use_vllm else nullcontext():
                outputs = score(model, base, packed, {key: value[chunk] for key, value in clips.items()})
            logps.append(unpack(outputs.log_probs, packed, generations, length))
            if compute_entropy:
                entropies.append(unpack(outputs.entropy, packed, generations, length))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None

    def close(self) -> None:
        """End what is of no use after all training and saving, and before the processes leave their group."""
        if self.use_vllm:
            self.vllm.close()

    # Memory

    def probe_memory(self) -> None:
        metrics, entropies = self._metrics, self._entropy_window_stats
        self._metrics = {mode: defaultdict(list) for mode in metrics}
        super().probe_memory()
        self._metrics, self._entropy_window_stats = metrics, entropies

    def _largest_batch(self) -> dict[str, Any]:
        """By a rollout of as many questions as ever, completions of the full length, and a pass as the reference's."""
        s, args, G = self.memory_settings, self.args, self.num_generations
        assert s is not None
        whole = replace(s, questions=s.questions * args.steps_per_generation)
        self._questions = questions = longest_questions(base_model(self.model), whole, args.device)
        self._clips = questions.audio_inputs
        self.describe_batch = partial(self._describe_rollout, questions, G)
        completions = [[self.eos_token_ids[0]] * s.completion] * len(questions) * G
        if not self.use_vllm:  # whose engine has all its memory already
            config = self.generation_config
            self.generation_config = deepcopy(config)
            self.generation_config.min_new_tokens = s.completion
            try:
                completions, _ = self._generate_single_turn([], None, {}, G)
            finally:
                self.generation_config = config
        batch = {
            "prompt_ids": questions.input_ids[:, None].expand(-1, G, -1),  # (N, G, P)
            "prompt_mask": questions.attention_mask[:, None].expand(-1, G, -1),
            "completion_ids": torch.tensor(completions, device=args.device).unflatten(0, (-1, G)),  # (N, G, C)
        }
        batch["completion_mask"] = torch.ones_like(batch["completion_ids"])
        ids, mask = (
            torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], dim=2).flatten(0, 1)
            for kind in ("ids", "mask")
        )
        with torch.no_grad():
            log_probs, _, _ = self._get_per_token_logps_and_entropies(
                self.ref_model or self.model, ids, mask, s.completion, args.per_device_train_batch_size
            )
        batch |= self._clips
        batch["ref_per_token_logps"] = log_probs.unflatten(0, (-1, G))
        batch["advantages"] = torch.zeros_like(batch["completion_ids"][..., 0], dtype=torch.float32)  # (N, G)
        batch["tokens"] = [G * s.completion] * len(questions)
        first = {key: value[: s.questions] for key, value in batch.items()}
        return first | {"num_items_in_batch": batch["completion_mask"].sum()}

    def _describe_rollout(self, questions: Batch, generations: int) -> str:
        longest = int(questions.attention_mask.cpu().sum(dim=1).max())
        return (
            f"a rollout of {len(questions)} question(s) x {generations} completions, the longest prompt {longest} "
            f"tokens, completions of up to {self.max_completion_length}"
        )


def describe_pass(prompt_mask: torch.Tensor, completion_mask: torch.Tensor) -> str:
    """What a micro-batch of masks (N, G, P) and (N, G, C) takes memory for."""
    prompt, completion = (int(mask.cpu().sum(dim=-1).max()) for mask in (prompt_mask, completion_mask))
    questions, generations = prompt_mask.shape[:2]
    return (
        f"a pass over {questions} question(s) x {generations} completions, the longest prompt {prompt} tokens, the "
        f"longest completion {completion}"
    )


def check_rollout_engine(args: GRPOConfig, quantised: bool) -> None:
    """Raise a `ValueError` for an engine of TRL's that gets no clips, and for what vLLM does not go with."""
    if args.use_transformers_continuous_batching:
        raise ValueError("--use_transformers_continuous_batching true: it cannot take audio in GRPO; leave it off")
    if args.use_vllm:
        check_vllm(args, quantised)


def check_whole_groups(flag: str, size: int, generations: int) -> None:
    """Raise a `ValueError` that names what would work, where a batch of `size` completions cuts a group in two."""
    if size % generations:
        raise ValueError(
            f"{flag} {size} counts completions and must hold whole groups of {generations}: "
            f"use {max(size // generations, 1) * generations} or another multiple"
        )
