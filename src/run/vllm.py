"""Rollouts by vLLM in the training process (`--use_vllm true`).

TRL's own use of vLLM knows images only, pushes weights under names that vLLM's Qwen2-Audio does not have, and repeats
the prompt for each completion. Here a prompt is sent once, with n = G. Tokens are drawn from the distribution that the
trainer scores: same temperature, nothing cut off (`check_vllm`), no <|AUDIO|> on either side (`audio_token_forbidden`).
Weights are pushed before the first rollout after a step. vLLM draws by PyTorch's generator, which the seed decides.
Every process has its own engine for its own questions. Shapes: N questions, G generations, C completion tokens.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather, set_seed
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig

from dataset.audio import SAMPLE_RATE
from dataset.encode import Batch
from model.qwen2_audio import HEAD, audio_token_id, base_model
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.rollout import Rollout, pad_completions

FORBIDDEN = -100.0  # on a token's logit: the lowest that vLLM takes
# flag -> the values that work, and why others do not
FIXED = {
    "vllm_mode": (("colocate",), "TRL's server does not receive the clips"),
    "vllm_tensor_parallel_size": ((1,), "each process samples the completions of its own questions"),
    "vllm_model_impl": (("vllm", "auto"), "weights are pushed under the names of vLLM's own model"),
    "vllm_structured_outputs_regex": ((None,), "the trainer scores tokens as if all of them could have been drawn"),
    "vllm_enable_sleep_mode": ((False,), "sleep mode is not supported"),
    "generation_kwargs": ((None,), "they are those of transformers' `generate`"),
}
UNCUT = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def check_vllm(args: GRPOConfig, max_prompt_length: int, quantised: bool = False) -> None:
    """Raise a `ValueError` for settings that do not work with rollouts by vLLM. `max_prompt_length` is that of
    the longest prompt, in tokens; `quantised` layers are stored in 4 or 8 bits."""
    for flag, (possible, reason) in FIXED.items():
        if (value := getattr(args, flag)) not in possible:
            raise ValueError(f"--{flag} {value} with --use_vllm true: {reason}; omit it")
    if quantised:
        raise ValueError("--use_vllm true: quantised weights are not supported; drop one of the two flags")
    longest = max_prompt_length + (args.max_completion_length or 0)
    if (args.vllm_max_model_length or longest) < longest:
        raise ValueError(f"--vllm_max_model_length {args.vllm_max_model_length}: prompt and completion take {longest}")
    for flag, off in UNCUT.items() if args.vllm_importance_sampling_correction else ():
        if (value := getattr(args, flag)) not in (None, off):
            raise ValueError(
                f"--{flag} {value} with --use_vllm true: vLLM's log-probs are then of another distribution than the "
                f"trainer's; use --{flag} {off:g}, or --vllm_importance_sampling_correction false"
            )


def sample_by_vllm(trainer: AudioGRPOTrainer) -> None:
    """Replace the trainer's `sample`, and weight its loss by `correct` where the arguments ask for it. `trainer.close`
    shuts the engine down."""
    engine = Engine(trainer)
    trainer.sample, trainer.close = engine.sample, engine.close
    log_probs, roll_out = trainer.log_probs, trainer.roll_out

    def log_probs_without_audio_token(model, rollout: Rollout, entropy: bool = False):
        with audio_token_forbidden(base_model(trainer.accelerator.unwrap_model(model))):
            return log_probs(model, rollout, entropy)

    trainer.log_probs = log_probs_without_audio_token
    if trainer.args.vllm_importance_sampling_correction:
        trainer.keeps_old_logps = True
        trainer.roll_out = lambda rows: correct(trainer, roll_out(rows), engine.sampled)


def correct(trainer: AudioGRPOTrainer, rollout: Rollout, sampled: torch.Tensor) -> Rollout:
    """Weight the loss by the ratio of the trainer's to vLLM's probability of what was sampled (truncated importance
    sampling), given vLLM's log-probs `sampled` (N, G, C), NaN where it has none."""
    args, mask, mode = trainer.args, rollout.mask.bool(), trainer.args.vllm_importance_sampling_mode
    difference = ((rollout.old_logps - sampled) * rollout.mask).nan_to_num(nan=0.0)
    ratio = (difference.sum(dim=2, keepdim=True) if mode.startswith("sequence") else difference).exp()
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    bounded = ratio if low is None and high is None else ratio.clamp(min=low, max=high)
    rollout.importance = bounded if mode.endswith("truncate") else ratio * (bounded == ratio)
    shown = mask if mask.any() else torch.ones_like(mask)  # all completions may be masked
    weights = rollout.importance.expand_as(mask)
    for name, values in (("sampling_logp_difference", difference.abs()), ("importance_sampling_ratio", weights)):
        for kind in ("min", "mean", "max"):  # of this process, then of all
            found = gather(getattr(values[shown], kind)()[None])
            trainer._metrics["train"][f"sampling/{name}/{kind}"].append(getattr(found, kind)().item())
    return rollout


class Engine:
    """vLLM, following a trainer's model."""

    def __init__(self, trainer: AudioGRPOTrainer):
        from vllm import SamplingParams

        args, self.trainer = trainer.args, trainer
        base = base_model(trainer.model)
        self.placeholder = audio_token_id(base)
        self.step: int | None = None  # of the weights that the engine has
        self.sampled: torch.Tensor  # log-probs (N, G, C) of the last completions
        self.sampling = SamplingParams(
            temperature=args.temperature, repetition_penalty=args.repetition_penalty,
            top_k=args.top_k, top_p=args.top_p, min_p=args.min_p or 0.0,
            max_tokens=args.max_completion_length, stop_token_ids=trainer.eos_token_ids, detokenize=False,
            logit_bias={self.placeholder: FORBIDDEN},
            logprobs=0,  # that of the drawn token only
        )  # fmt: skip
        self.llm = start(
            base, trainer.accelerator, on_cpu=args.device.type == "cpu",
            revision=(args.model_init_kwargs or {}).get("revision"),
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else base.dtype,  # as autocast's
            gpu_memory_utilization=args.vllm_gpu_memory_utilization, max_model_len=args.vllm_max_model_length,
            max_num_seqs=args.per_device_train_batch_size * args.steps_per_generation,
            logprobs_mode="processed_logprobs",  # of the distribution that was drawn from
        )  # fmt: skip
        set_seed(args.seed, device_specific=True)  # as TRL's trainer does: vLLM has seeded all processes alike
        trainer.accelerator.wait_for_everyone()

    def sample(self, questions: Batch) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """G completions of each question; as the trainer's `sample`."""
        trainer = self.trainer
        if trainer.state.global_step != self.step:
            push(self.llm, merged_tensors(trainer.model, trainer._dist.gather_params))
            self.step = trainer.state.global_step
        sampling, device = self.sampling.clone(), trainer.accelerator.device
        sampling.n = trainer.group_size
        outputs = ask(self.llm, questions, questions.waves, self.placeholder, sampling)
        completions = [completion for output in outputs for completion in output.outputs]
        logps = [[next(iter(drawn.values())).logprob for drawn in one.logprobs] for one in completions]
        rows = [torch.tensor(np.array(row, dtype=np.float32)) for row in logps]  # None becomes NaN
        self.sampled = pad_sequence(rows, batch_first=True).unflatten(0, (-1, sampling.n)).to(device)
        ids, pad_id = [list(one.token_ids) for one in completions], trainer.processing_class.tokenizer.pad_token_id
        return questions.to(device), *pad_completions(ids, sampling.n, pad_id, device)

    def close(self) -> None:
        """Shut the engine down, and with it the process group: call it when no process needs the others."""
        self.llm.llm_engine.engine_core.shutdown()


def start(model: PreTrainedModel, state: Any, on_cpu: bool, **settings) -> Any:
    """vLLM's `LLM` for a model of this configuration, without its weights. All processes call it, with accelerate's
    `state`, which knows their place, and the `settings` of `vllm.LLM`."""
    from trl.trainer.utils import ensure_master_addr_port
    from vllm import LLM
    from vllm.model_executor.models.qwen2_audio import Qwen2AudioFeatureInputs

    if llvmlite := sys.modules.get("llvmlite.binding.ffi"):  # loaded by librosa, for clips of another rate than 16 kHz
        # vLLM reads the `__dict__` of all modules' values; llvmlite would return a function of its library.
        llvmlite.lib._fntab.setdefault("__dict__", {})
    if 2 * model.config.audio_config.max_source_positions != 3000:  # vLLM refuses other windows, its encoder does not
        Qwen2AudioFeatureInputs.validate = lambda self: None
    place = {"RANK": state.process_index, "LOCAL_RANK": state.local_process_index, "WORLD_SIZE": state.num_processes}
    os.environ.update({name: str(value) for name, value in place.items()})
    ensure_master_addr_port()
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # its threads are PyTorch's, too
    return LLM(
        model.name_or_path,
        load_format="dummy",
        distributed_executor_backend="external_launcher",  # within this process
        model_impl="vllm",
        max_num_batched_tokens=4096,
        limit_mm_per_prompt={"audio": 1},
        enforce_eager=on_cpu,
        **settings,
    )


def push(llm: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give an engine a model's tensors by their names in its checkpoint, and reset its caches: it keeps clips'
    embeddings and prompts' keys and values by input, whatever the weights."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()


def ask(llm: Any, prompts: Batch, clips: list[np.ndarray], placeholder: int, sampling: Any) -> list:
    """vLLM's outputs for N prompts, with an audio token (`placeholder`) for each 40 ms, and their N clips, float32
    (samples,) at 16 kHz."""
    rows = zip(prompts.input_ids, prompts.attention_mask.bool(), strict=True)
    expanded, requests = [ids[kept].tolist() for ids, kept in rows], []
    for ids, clip in zip(expanded, clips, strict=True):
        first, count = ids.index(placeholder), ids.count(placeholder)  # vLLM takes one in the place of their run
        unexpanded = ids[: first + 1] + ids[first + count :]
        requests.append({"prompt_token_ids": unexpanded, "multi_modal_data": {"audio": [(clip, SAMPLE_RATE)]}})
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == expanded, "vLLM expanded the audio tokens differently"
    return outputs


def checkpoint_name(name: str) -> str:
    """A tensor's name in transformers 5 -> its name in Qwen2-Audio's checkpoint, which vLLM uses."""
    if name.startswith(HEAD):
        return f"language_model.{name}"
    return name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


@contextmanager
def audio_token_forbidden(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, TRL's fused head scores tokens by the distribution without `<|AUDIO|>`, from which vLLM
    draws. The head adds the bias of the last layer; Qwen2-Audio's has none and gets one that is no parameter."""
    head, size = model.get_output_embeddings(), model.config.text_config.vocab_size
    bias = torch.zeros(size, dtype=head.weight.dtype, device=head.weight.device)
    bias[audio_token_id(model)] = FORBIDDEN
    if is_deepspeed_zero3_enabled():
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        vars(bias).update(ds_status=ZeroParamStatus.AVAILABLE)  # TRL would gather it as it does the weight
    vars(head)["bias"] = bias  # found before the module's own, which is None
    try:
        yield
    finally:
        del vars(head)["bias"]


def merged_tensors(
    model: PreTrainedModel, gather_params: Callable[[list[torch.nn.Parameter]], AbstractContextManager]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of a model's tensors under the names of its checkpoint, with the adapters merged. vLLM keeps them until a
    layer is complete, when ZeRO-3 has freed its own. The model stays bitwise the same. All processes must iterate: in
    the context `gather_params`, parameters that are spread over them are whole."""
    adapted = {m.get_base_layer().weight: m for m in model.modules() if isinstance(m, BaseTunerLayer)}
    for name, parameter in base_model(model).named_parameters():
        if (hasattr(model, "peft_config") and model.prefix in name) or ".original_module." in name:
            continue
        layer = adapted.get(parameter)
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        with gather_params([parameter] if layer is None else list(layer.parameters())):
            kept = parameter.data
            if layer is not None:
                layer.merge(safe_merge=True)  # in a copy
            merged = parameter.data.clone()
            if layer is not None:
                layer.unmerge()
                parameter.data = kept
            yield checkpoint_name(name), merged
