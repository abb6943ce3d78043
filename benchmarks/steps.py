"""The three contenders of the benchmarks, and one optimizer step of each, timed and counted: GRPO row by row, this
project's GRPO, and supervised fine-tuning on the same questions.

All are real trainers on one model. Steps call the trainers' own methods as `Trainer.train` does, without logging,
callbacks and schedule. Row by row is what TRL, ms-swift and the original do: prompt and audio of a question G times,
whole windows of 30 s, in rollout, reference and policy pass.

Shapes: N questions, G generations, P prompt tokens, C completion tokens.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "tests", "demo")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import soundfile
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2AudioProcessor
from trl.models import unwrap_model_for_generation

import row_by_row
from baselines.sft_trainer import AudioSFTTrainer
from dataset.audio import SAMPLE_RATE
from dataset.encode import Batch, count_audio_tokens
from dataset.prompt import build_solution
from evaluation.files import write_whole
from evaluation.lengths import count_text_tokens
from floor import ROW_BY_ROW, SHARED, SUPERVISED, Shape, now
from model import branches, generation
from model.qwen2_audio import base_model, freeze_parts
from run.arguments import AudioModelConfig
from tiny import build_model, build_processor
from train import RecipeConfig
from train_sft import SFTRecipeConfig
from trainer import grpo_trainer
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.rollout import Rollout
from utils.rewards import accuracy_reward, format_reward
from without_storage import PeakMemory

# Widths, depths and vocabularies; `7b` is Qwen2-Audio-7B's.
SIZES = {
    "tiny": {"initializer_range": 0.02},
    "small": dict(
        audio_size=384, audio_layers=6, audio_heads=6, hidden_size=512, layers=8, heads=8, vocab_size=32_000,
        initializer_range=0.02,
    ),
    "7b": dict(
        audio_size=1280, audio_layers=32, audio_heads=20, hidden_size=4096, layers=32, heads=32, vocab_size=156_032,
        intermediate_size=11_008, initializer_range=0.02,
    ),
}  # fmt: skip
# Engines of rollouts: settings of `RecipeConfig`.
ENGINES: dict[str, dict] = {"built-in": {}}
if find_spec("vllm"):
    ENGINES["vllm"] = {"use_vllm": True, "vllm_mode": "colocate", "top_k": 0}


@dataclass(frozen=True)
class Settings:
    """The model and the work of a step."""

    size: str = "small"  # one of SIZES
    questions: int = 2  # N, per process and optimizer step
    generations: int = 8  # G
    seconds: float = 10  # of a clip
    text: int = 60  # tokens of a prompt beside those of its audio
    completion: int = 16  # C
    lora: bool = False
    checkpointing: bool = False
    engine: str = "built-in"  # one of ENGINES
    processes: int = 1  # that share the optimizer's work, as under ZeRO
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> Shape:
        samples = round(self.seconds * SAMPLE_RATE)
        prompt = count_audio_tokens(samples) + self.text
        return Shape(self.questions, self.generations, -(-samples // 160), prompt, self.completion)


def build_processor_of_30_seconds() -> Qwen2AudioProcessor:
    processor = build_processor([], vocab_size=1000, mel_bins=128, seconds=30)
    processor.tokenizer.padding_side = "left"
    return processor


def build(settings: Settings, processor: Qwen2AudioProcessor):
    """The model with random weights, on its device and in its dtype; with adapters if `settings.lora`."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(settings.dtype)
    try:
        with settings.device:
            model = build_model(processor, **SIZES[settings.size]).to(settings.dtype)
    finally:
        torch.set_default_dtype(usual)
    if settings.lora:
        model = get_peft_model(model, AudioModelConfig(use_peft=True).adapters()).to(settings.dtype)
    if settings.checkpointing:
        base_model(model).activation_checkpointing_enable({"use_reentrant": False})
        if settings.lora:
            model.enable_input_require_grads()
    freeze_parts(model, ())
    return model


def make_questions(folder: Path, settings: Settings, processor: Qwen2AudioProcessor, steps: int) -> Dataset:
    """N questions with N clips, repeated for each of `steps`. Prompts and answers have exactly the tokens that
    `settings` state: each digit is one token."""
    rng = np.random.default_rng(0)
    (least,) = count_text_tokens(processor, [""])
    if settings.text < least:
        raise ValueError(f"--text {settings.text}: the template of a prompt alone takes {least} tokens")
    rows = []
    for number in range(settings.questions):
        path = folder / f"{number}.wav"
        soundfile.write(path, rng.normal(scale=0.05, size=round(settings.seconds * SAMPLE_RATE)), SAMPLE_RATE)
        prompt, answer = (
            "".join(map(str, rng.integers(10, size=length)))
            for length in (settings.text - least, settings.completion - 1)  # the answer's last token is its end
        )
        rows.append(
            {
                "prompt": prompt,
                "solution": build_solution(answer),
                "audio_path": str(path),
                "style": "choice",
                "row": number,
            }
        )
    return Dataset.from_list(rows * (steps + 1))  # the loader fetches a batch ahead


class RowByRow(AudioGRPOTrainer):
    """This project's trainer, with every completion in a separate row for rollouts and log-probs."""

    def sample(self, questions: Batch) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        questions = questions.to(self.accelerator.device)
        kwargs = {"generation_kwargs": self.generation_kwargs}
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator, **kwargs) as model:
            inputs = row_by_row.as_inputs(questions)
            ids = row_by_row.generate(model, inputs, self.group_size, generation_config=self.generation_config)
        ids = ids.unflatten(0, (len(questions), self.group_size))  # all of the full length
        return questions, ids, torch.ones_like(ids)

    def log_probs(self, model, rollout: Rollout, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """TRL's own method, whose calls of the model get each clip once for every completion."""
        base, (questions, generations, length) = base_model(model), rollout.ids.shape
        at_once = self.args.per_device_train_batch_size
        window = row_by_row.whole_windows(base, row_by_row.as_inputs(rollout.questions))
        rows = row_by_row.repeat_rows(window, generations)
        ids = torch.cat([rows["input_ids"], rollout.ids.flatten(0, 1)], dim=1)
        mask = torch.cat([rows["attention_mask"], rollout.mask.flatten(0, 1)], dim=1)
        chunks = zip(*(rows[key].split(at_once) for key in row_by_row.AUDIO_INPUTS), strict=True)

        def add_clips(backbone, args, kwargs):
            return args, kwargs | dict(zip(row_by_row.AUDIO_INPUTS, next(chunks), strict=True))

        with base.model.register_forward_pre_hook(add_clips, with_kwargs=True):
            found = self._get_per_token_logps_and_entropies(model, ids, mask, length, at_once, compute_entropy=entropy)
        logps, entropies = (
            value if value is None else value.unflatten(0, (questions, generations)) for value in found[:2]
        )
        return logps * rollout.mask, entropies


class Phases:
    """Seconds of each phase, without those of phases within it. A phase begins and ends when the device is idle."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @property
    def current(self) -> str:
        return self._open[-1]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._account()
        self._open.append(name)
        try:
            yield
        finally:
            self._account()
            self._open.pop()

    def _account(self) -> None:
        moment = now(self.device)
        if self._open:
            self.seconds[self._open[-1]] += moment - self._since
        self._since = moment

    def timed(self, name: str | Callable[..., str], function: Callable) -> Callable:
        """`function` as a phase with this name; `name` may be a function of its arguments."""

        @wraps(function)
        def wrapper(*args, **kwargs):
            with self(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        return wrapper


class Synchronisations(TorchDispatchMode):
    """Counts the operators after which the host waits for the device: it reads a value (`.item()`), a shape depends on
    values (`nonzero`, boolean indices), or a blocking copy of a tensor to or from the host (an index, too). Not counted
    are copies on a CPU, and on a GPU those within `torch.tensor`."""

    _aten = torch.ops.aten
    WAITING = {
        _aten._local_scalar_dense.default,
        _aten.nonzero.default,
        _aten.masked_select.default,
        _aten.masked_scatter_backward.default,
        _aten._unique2.default,
        _aten.repeat_interleave.Tensor,
        _aten.equal.default,
    }
    INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
    COPYING = {_aten._to_copy.default, _aten.copy_.default}

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == self.device.type for tensor in given):
            self.count += func in self.WAITING
        if func in self.INDEXING and args[0].device.type == self.device.type:
            indices = [index for index in args[1] if index is not None]
            self.count += any(index.dtype == torch.bool or index.device != args[0].device for index in indices)
        if func in self.COPYING:
            target, non_blocking = output.device.type, (kwargs or {}).get("non_blocking") or True in args[2:]
            between_devices = target != given[-1].device.type and self.device.type in (target, given[-1].device.type)
            self.count += between_devices and (target == "cpu" or not non_blocking)
        return output


class Contender:
    """A trainer, its batches, and the optimizer, which all contenders share."""

    def __init__(self, trainer, optimizer: torch.optim.Optimizer):
        self.trainer, self.optimizer, self.model = trainer, optimizer, trainer.model
        self.base = base_model(trainer.model)
        self.forward = self.base.forward  # with this trainer's head
        self.batches = iter(trainer.get_train_dataloader())

    @property
    def stepped(self) -> int:
        """Parameters that the optimizer steps on."""
        return sum(parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"])

    def step(self, phases: Phases) -> None:
        """One optimizer step."""
        trainer = self.trainer
        self.base.forward = self.forward
        with self._watched(phases), phases("other"):
            with phases("data"):
                accumulation = trainer.args.gradient_accumulation_steps
                batches, items = trainer.get_batch_samples(self.batches, accumulation, trainer.args.device)
            trainer.current_gradient_accumulation_steps = len(batches)
            for batch in batches:
                trainer.training_step(self.model, batch, items)
            with phases("optimizer"):
                trainer._get_grad_norm(self.model, grad_norm=trainer._clip_grad_norm(self.model))
                self.optimizer.step()
                self.model.zero_grad()
            trainer.state.global_step += 1  # an engine's sign that weights have changed

    @contextmanager
    def _watched(self, phases: Phases) -> Iterator[None]:
        """Within this context, the trainer's work is attributed to phases."""
        trainer, base = self.trainer, self.base

        def policy_or_reference(*args, **kwargs) -> str:
            return "policy forward" if torch.is_grad_enabled() else "reference"

        def model_in_rollout(*args, **kwargs) -> str:
            prompts = phases.current == "decoding" and kwargs["input_ids"].shape[1] > 1
            return "prefill" if prompts else phases.current

        def encoder_in_rollout(*args, **kwargs) -> str:
            return "encoder" if phases.current == "prefill" else phases.current

        parts: list[tuple] = [
            (trainer, "compute_loss", "policy forward"),
            (trainer.accelerator, "backward", "backward"),
        ]
        if isinstance(trainer, AudioGRPOTrainer):
            parts += [
                (trainer, "load", "data"),
                (trainer, "sample", "decoding"),
                (generation, "encode_clips", "encoder"),
                (grpo_trainer, "encode_clips", "encoder"),
                (branches, "prefill", "prefill"),
                (trainer, "reward", "rewards"),
                (trainer, "log_probs", policy_or_reference),
            ]
        if isinstance(trainer, RowByRow):
            parts += [(base, "forward", model_in_rollout), (base.model.audio_tower, "forward", encoder_in_rollout)]
        with ExitStack() as stack:
            for owner, name, phase in parts:
                stack.enter_context(patch.object(owner, name, phases.timed(phase, getattr(owner, name))))
            yield


def build_contenders(settings: Settings, folder: Path, steps: int) -> dict[str, Contender]:
    """The contenders of WAYS on one model, with data for so many steps; files are written to `folder`."""
    processor = build_processor_of_30_seconds()
    rows = make_questions(folder, settings, processor, steps)
    model = build(settings, processor)
    reference = None if settings.lora else deepcopy(model).eval()
    optimizer = build_optimizer(model, settings.processes)
    grpo = model, reference, rows, processor, folder
    sft = SFTRecipeConfig(str(folder), **common(settings))
    return {  # the next trainer gives the model another head
        ROW_BY_ROW: Contender(build_grpo(RowByRow, replace(settings, engine="built-in"), *grpo), optimizer),
        SHARED: Contender(build_grpo(AudioGRPOTrainer, settings, *grpo), optimizer),
        SUPERVISED: Contender(AudioSFTTrainer(model, sft, rows, processor), optimizer),
    }


def build_grpo(
    kind: type[AudioGRPOTrainer], settings: Settings, model, reference, rows, processor, folder: Path, greedy=False
):
    """A GRPO trainer of this kind with the paper's recipe; completions have the full length."""
    engine = dict(ENGINES[settings.engine])
    use_vllm = engine.pop("use_vllm", False)
    kwargs = {"min_new_tokens": settings.completion, "do_sample": not greedy}
    args = RecipeConfig(
        str(folder),
        num_generations=settings.generations,
        max_completion_length=settings.completion,
        generation_kwargs=None if use_vllm else kwargs,
        shuffle_dataset=False,
        **common(settings),
        **engine,
    )
    if use_vllm:  # vLLM reads configuration and processor from where the model came from
        base = base_model(model)
        base.config.architectures = [type(base).__name__]
        base.config.save_pretrained(folder)
        base.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        base.config._name_or_path = base.name_or_path = str(folder)
    # TRL would load the reference from where the model came from.
    with patch("trl.trainer.grpo_trainer.create_model_from_path", lambda *args, **kwargs: reference):
        trainer = kind(model, [accuracy_reward, format_reward], args, rows, processor)
    if use_vllm:
        from run.vllm import sample_by_vllm

        args.use_vllm = True
        sample_by_vllm(trainer)
        sampling = trainer.sample.__self__.sampling
        sampling.min_tokens = settings.completion
        if greedy:
            sampling.top_k = 1
    if settings.lora:  # TRL copies adapters that come with a model; here the reference is the base
        trainer.model.delete_adapter("ref")
    return trainer


def common(settings: Settings) -> dict:
    """Arguments of all trainers."""
    return {
        "use_cpu": settings.device.type == "cpu",
        "bf16": False,  # no autocast, as under an engine
        "activation_checkpointing": settings.checkpointing,
        "questions_per_step": settings.questions,
        "report_to": "none",
        "disable_tqdm": True,
    }


def build_optimizer(model: torch.nn.Module, processes: int) -> torch.optim.Optimizer:
    """AdamW on one process's share of the trained weights, as under ZeRO: the first tensors that fit into the share."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    room = sum(parameter.numel() for parameter in trained) // processes
    share = []
    for parameter in trained:
        if parameter.numel() <= room:
            share.append(parameter)
            room -= parameter.numel()
    return torch.optim.AdamW(share, lr=1e-6, fused=True)


def count_waits_and_memory(contender: Contender, device: torch.device) -> tuple[int, int]:
    """(how often the host waits for the device, most bytes held at once) in a step. Counting slows the step down."""
    reference = getattr(contender.trainer, "ref_model", None)
    models = [model for model in (contender.model, reference) if model is not None]
    held = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    held += [leaf for leaf in tree_leaves(dict(contender.optimizer.state)) if isinstance(leaf, torch.Tensor)]
    waits = Synchronisations(device)
    if device.type == "cuda":
        others = torch.cuda.memory_allocated(device) - sum(
            tensor.nbytes for tensor in held
        )  # held by the other contenders
        torch.cuda.reset_peak_memory_stats(device)
        with waits:
            contender.step(Phases(device))
        return waits.count, torch.cuda.max_memory_allocated(device) - others
    with PeakMemory(held) as memory, waits:
        contender.step(Phases(device))
    return waits.count, memory.peak


def close(trainer) -> None:
    """Shut down the trainer's engine, if it has one."""
    getattr(trainer, "close", lambda: None)()


def write_record(path: Path, record: dict) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(record, indent=1) + "\n")
