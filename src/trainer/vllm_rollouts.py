"""Rollouts by vLLM in the trainer's own process, which hears the clips (`--use_vllm true`).

TRL's own way of using vLLM knows images only, pushes weights under names that vLLM's Qwen2-Audio does not have, and
repeats the prompt for each completion. Here:

    prompt    one for a question, with n = G; vLLM expands its single <|AUDIO|> as the processor does: asserted
    sampling  as the trainer scores: the same temperature, nothing cut off that it does not know of (`check_vllm`), no
              <|AUDIO|> on either side (`audio_token_forbidden`), in the dtype of the trainer's passes
    weights   the trainer's, adapters merged, before the first rollout after a step; what others left is forgotten
    chance    from PyTorch's generator, as without vLLM: a run follows from its seed, and goes on as it would have

Every process has an engine of its own, for its own questions. Leaves out servers and engines over several devices.

Shapes: N questions, G generations, B = N * G completions.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from trl import GRPOConfig
from trl.distributed import DistributedBackend

from model.qwen2_audio import FORBIDDEN, audio_token_id, base_model, checkpoint_name
from model.vllm_engine import ask, push_weights, start_engine

from .probe import unchanged_random_state

# flag -> what it may be, and why nothing else
FIXED = {
    "vllm_mode": (("colocate",), "a server of TRL's gets no clips"),
    "vllm_tensor_parallel_size": ((1,), "each process samples the completions of its own questions"),
    "vllm_model_impl": (("vllm", "auto"), "weights are pushed under the names of vLLM's own model"),
    "vllm_structured_outputs_regex": ((None,), "the trainer scores tokens as if all of them could have been drawn"),
    "generation_kwargs": ((None,), "they are those of transformers' `generate`"),
}
UNCUT = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def check_vllm(args: GRPOConfig, quantised: bool = False) -> None:
    """Raise a `ValueError` for settings that rollouts by vLLM do not go with, with the remedy.

    Args:
        quantised: the model's layers are stored in 4 or 8 bits.
    """
    for flag, (possible, reason) in FIXED.items():
        if (value := getattr(args, flag)) not in possible:
            remedy = f"give --{flag} {possible[0]}" if possible[0] else f"leave --{flag} away"
            raise ValueError(f"--{flag} {value} with --use_vllm true: {reason}; {remedy}")
    if quantised:
        raise ValueError("--use_vllm true: its weights are not of 4 or 8 bits; leave --use_vllm or the bits away")
    if not args.vllm_importance_sampling_correction:
        return
    for flag, off in UNCUT.items():
        if (value := getattr(args, flag)) not in (None, off):
            raise ValueError(
                f"--{flag} {value} with --use_vllm true: vLLM's log-probs are then of another distribution than the "
                f"trainer's, which the importance sampling correction would take for a difference of the models; give "
                f"--{flag} {off:g}, or --vllm_importance_sampling_correction false"
            )
    if args.loss_type == "vespo" and not args.vllm_importance_sampling_mode.startswith("token"):
        raise ValueError("--loss_type vespo with --use_vllm true: give --vllm_importance_sampling_mode token_truncate")


class VLLMRollouts:
    """An engine that follows a trainer's model."""

    def __init__(self, model: PreTrainedModel, args: GRPOConfig, accelerator: Accelerator, ends: list[int]):
        """
        Args:
            model: the trainer's, with adapters or without, below its engine.
            ends: ids of tokens that end a completion.
        """
        from vllm import SamplingParams

        self.model, self.args = model, args
        self.gather = DistributedBackend(accelerator).gather_params
        self.placeholder = audio_token_id(base_model(model))
        self.step: int | None = None  # of the weights that the engine has
        self.sampling = SamplingParams(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p or 0.0,
            repetition_penalty=args.repetition_penalty,
            max_tokens=args.max_completion_length,
            logit_bias={self.placeholder: FORBIDDEN},
            logprobs=0,  # that of the drawn token, and no other's
            stop_token_ids=ends,
            detokenize=False,
        )
        # vLLM seeds the generators anew.
        with unchanged_random_state(args.device):
            self.llm = start_engine(
                base := base_model(model),
                accelerator,
                on_cpu=args.device.type == "cpu",
                revision=(args.model_init_kwargs or {}).get("revision"),
                dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else base.dtype,  # as autocast's
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                enable_sleep_mode=args.vllm_enable_sleep_mode,
                max_model_len=args.vllm_max_model_length,
                max_num_seqs=args.per_device_train_batch_size * args.steps_per_generation,
                logprobs_mode="processed_logprobs",  # of what was drawn from
            )
            if args.vllm_enable_sleep_mode:
                self.llm.sleep(level=2)
            accelerator.wait_for_everyone()

    def generate(
        self, step: int, prompt_ids: list[list[int]], clips: list[np.ndarray], generations: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Sample G completions of each of N questions.

        Args:
            step: that the model has taken; at a new one its weights are pushed.
            prompt_ids: N prompts as the trainer has them, with an `<|AUDIO|>` for each 40 ms.
            clips: the N clips, float32 (samples,) at 16 kHz.

        Returns:
            B token-id lists, by question, and the log-probs of their tokens, in nats; None without the importance
            sampling correction, which alone is for them.
        """
        if step != self.step:
            self.push_weights()
            self.step = step
        if self.args.vllm_enable_sleep_mode:
            self.llm.wake_up(tags=["kv_cache"])
        sampling = self.sampling.clone()
        sampling.n = generations
        outputs = ask(self.llm, prompt_ids, clips, self.placeholder, sampling)
        if self.args.vllm_enable_sleep_mode:
            self._sleep()
        completions = [completion for output in outputs for completion in output.outputs]
        completion_ids = [list(completion.token_ids) for completion in completions]
        if not self.args.vllm_importance_sampling_correction:
            return completion_ids, None
        return completion_ids, [[next(iter(drawn.values())).logprob for drawn in one.logprobs] for one in completions]

    def push_weights(self) -> None:
        """Give the engine the model's weights; to be called in all processes."""
        if self.args.vllm_enable_sleep_mode:
            torch.cuda.empty_cache()  # what the trainer's passes have left: the engine takes memory of its own
            self.llm.wake_up(tags=["weights"])
        push_weights(self.llm, merged_tensors(self.model, self.gather))

    def _sleep(self) -> None:
        """Free the engine's memory until the next rollout, weights included: they must be pushed again."""
        self.llm.sleep(level=2)
        self.step = None

    def close(self) -> None:
        """End the engine, and with it the processes' group; that one which has left it first would fail as Python ends.
        To be called when no process needs the others any more."""
        self.llm.llm_engine.engine_core.shutdown()


def merged_tensors(
    model: PreTrainedModel, gather: Callable[[list[torch.nn.Parameter]], AbstractContextManager]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors under the names of its checkpoint, each in full, with the adapters merged; the model stays what
    it is, bit for bit, which it would not if adapters were added and subtracted.

    They are copies: vLLM keeps them until a layer is complete, when ZeRO-3 has taken its own back.

    Args:
        gather: a context in which parameters that are spread over processes are there in full; all must iterate.
    """
    adapted = {m.get_base_layer().weight: m for m in model.modules() if isinstance(m, BaseTunerLayer)}
    for name, parameter in base_model(model).named_parameters():
        if (hasattr(model, "peft_config") and model.prefix in name) or ".original_module." in name:
            continue
        layer = adapted.get(parameter)
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        with gather([parameter] if layer is None else list(layer.parameters())):
            yield checkpoint_name(name), parameter.data.clone() if layer is None else merge(layer, parameter)


def merge(layer: BaseTunerLayer, weight: torch.nn.Parameter) -> torch.Tensor:
    """The weight of a layer with its adapter merged, as a copy."""
    kept = weight.data
    layer.merge(safe_merge=True)  # in a copy
    merged = weight.data.clone()
    layer.unmerge()
    weight.data = kept
    return merged
