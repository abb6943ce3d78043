"""vLLM's engine in this process, for rollouts and evaluation. Leaves out how rollouts sample. Shapes: N questions."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from dataset.audio import SAMPLE_RATE
from dataset.encode import Batch

from .qwen2_audio import FORBIDDEN, audio_token_id, checkpoint_name, let_vllm_take_any_window


def start_engine(model: PreTrainedModel, state: PartialState, on_cpu: bool, **settings) -> Any:
    """An engine, vLLM's `LLM`, for a model of this configuration, with weights that are still to come, and more of its
    `settings`; to be called in all processes, among which `state` knows this one's place."""
    from trl.trainer.utils import ensure_master_addr_port
    from vllm import LLM  # not among the requirements, and 15 s of imports

    let_vllm_take_any_window(model)
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


def push_weights(llm: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give an engine a model's tensors by their names in its checkpoint. What it has computed with others goes: a
    clip's embeddings and a prompt's keys and values are kept by what was heard and asked, not by the model."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()


def ask(llm: Any, prompts: list[list[int]], clips: list[np.ndarray], placeholder: int, sampling: Any) -> list:
    """vLLM's outputs for N prompts as the processor makes them, with an audio token (`placeholder`) for each 40 ms, and
    their N clips, float32 (samples,) at 16 kHz."""
    requests = []
    for ids, clip in zip(prompts, clips, strict=True):
        first, count = ids.index(placeholder), ids.count(placeholder)  # vLLM takes one in the place of their run
        unexpanded = ids[: first + 1] + ids[first + count :]
        requests.append({"prompt_token_ids": unexpanded, "multi_modal_data": {"audio": [(clip, SAMPLE_RATE)]}})
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts, "vLLM has expanded the audio token otherwise"
    return outputs


class GreedyEngine:
    """Answers in the place of one model after the other, as `generate` does but for the rounding of its sums."""

    device, llm = torch.device("cpu"), None  # where batches go; vLLM's `LLM`, started for the first model

    def take(self, model: PreTrainedModel, on_cpu: bool, at_once: int) -> "GreedyEngine":
        """Itself, from now on with this model's weights; a `ValueError` if it is not of the first one's size."""
        if self.llm is None:
            self.placeholder, self.size = audio_token_id(model), model.num_parameters()
            try:
                self.llm = start_engine(model, PartialState(), on_cpu, dtype=model.dtype, max_num_seqs=at_once)
            except ValueError as error:  # of one process: the others are not to wait for it in their own start
                raise RuntimeError(f"vLLM cannot be started: {error}") from error
        if model.num_parameters() != self.size:
            raise ValueError(f"{model.name_or_path}: not of the size that vLLM was started for; evaluate it alone")
        push_weights(self.llm, ((checkpoint_name(name), tensor.data) for name, tensor in model.named_parameters()))
        return self

    def generate(self, batch: Batch, clips: list[np.ndarray], ends: list[int], max_new_tokens: int) -> list[list[int]]:
        """As `generation.generate`; of the batch it takes the prompts, and hears the N clips by itself."""
        from vllm import SamplingParams

        forbidden = {self.placeholder: FORBIDDEN}
        sampling = SamplingParams(temperature=0, max_tokens=max_new_tokens, logit_bias=forbidden, stop_token_ids=ends)
        prompts = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)]
        outputs = ask(self.llm, prompts, clips, self.placeholder, sampling)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """End it, and with it the processes' group; that one which has left it first would fail as Python ends."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
