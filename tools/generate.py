"""Draws samples from a pipeline folder, a teacher's or an exported student's, or from a finished run.

    python tools/generate.py --load runs/quickstart --prompts examples/tiny_wan/prompts.txt --save runs/samples
    python tools/generate.py --hf examples/tiny_wan --num-steps 40 --prompts prompts.txt --save runs/teacher

Writes `samples.safetensors` (tensor `latents`), `prompts.txt` with a line for each sample, and pictures.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

from megatron_pdmd.config import Floats, Ints
from megatron_pdmd.conversion.export import read_sampling
from megatron_pdmd.conversion.inference import SamplingPlan, batches, load_experts, plan_sampling, sample_latents
from megatron_pdmd.conversion.pipeline_folder import PipelineFolder, read_pipeline
from megatron_pdmd.conversion.vae import decode_latents
from megatron_pdmd.data.prompts import PromptEmbeddings, load_prompts
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.evaluation.samples import LATENTS_FILE, PROMPTS_FILE
from megatron_pdmd.evaluation.sheets import mp4_available, save_animation, save_contact_sheet

SHEET_ROWS, ANIMATED_CLIPS = 16, 64


@dataclass(frozen=True)
class GenerateOptions:
    """Name either --hf or --load."""

    # Text file with a prompt in each line, or a folder that encode_prompts.py wrote.
    prompts: Path
    # Folder for the samples.
    save: Path
    # Hugging Face pipeline folder.
    hf: Path | None = None
    # Folder of a training run; its exported pipeline in hf/ is taken.
    load: Path | None = None
    # Seed of the noise; a sample's noise depends on this and its number alone.
    seed: int = 0
    # Sampling steps; by default an export's own number, or 40.
    num_steps: int | None = None
    # Steps of each transformer; by default the folder's boundary decides.
    phase_steps: Ints | None = None
    # Shift of the flow matching schedule; by default the folder's.
    timestep_shift: float | None = None
    # Classifier-free guidance, one number or low-noise,high-noise; by default none for an export, 4 for a teacher.
    guidance_scale: Floats | None = None
    # Samples for each prompt.
    samples_per_prompt: int = 1
    # Prompts of a text file that are used, from the first; 0 uses all.
    max_prompts: int = 0
    # Latent frames.
    frames: int = 21
    # Latent rows.
    height: int = 60
    # Latent columns.
    width: int = 104
    # Samples in one forward pass.
    batch_size: int = 16
    # Pipeline folder whose text encoder reads a text file of prompts; by default the sampled one.
    text_encoder: Path | None = None
    # Text tokens; by default an export's own number, or the tokenizer's limit, at most 512.
    max_length: int | None = None
    # What guidance leads away from.
    negative_prompt: str = ""
    # Number format of the networks.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Where they run; auto takes a GPU where there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Draw a contact sheet and an animation; latents are decoded where the folder has a VAE.
    pictures: bool = True


def main() -> None:
    with user_errors():
        generate(parse_options(GenerateOptions, __doc__))


def generate(options: GenerateOptions) -> None:
    """Reads everything, samples, writes."""
    _check(options)
    folder = read_pipeline(_source(options))
    plan = plan_sampling(
        folder,
        num_steps=options.num_steps,
        phase_steps=options.phase_steps,
        timestep_shift=options.timestep_shift,
        guidance_scale=options.guidance_scale,
    )
    dtype = getattr(torch, options.dtype)
    prompts = load_prompts(
        options.prompts,
        options.text_encoder or folder.path,
        max_length=options.max_length or prompt_length(folder),
        negative_prompt=options.negative_prompt,
        dtype=dtype,
    )
    count = len(prompts) if options.max_prompts == 0 else min(options.max_prompts, len(prompts))
    owners = [index for index in range(count) for _ in range(options.samples_per_prompt)]
    latents = sample_all(options, folder, plan, prompts, owners)
    texts = [prompts.prompts[owner] for owner in owners]
    options.save.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents}, options.save / LATENTS_FILE)
    (options.save / PROMPTS_FILE).write_text("\n".join(texts) + "\n", encoding="utf-8")
    if options.pictures:
        save_pictures(options.save, folder, latents, texts)
    steps = len(plan.experts)
    print(f"{len(latents)} samples of {steps} steps, guidance {plan.guidance}, in {options.save}")


def sample_all(
    options: GenerateOptions,
    folder: PipelineFolder,
    plan: SamplingPlan,
    prompts: PromptEmbeddings,
    owners: list[int],
) -> torch.Tensor:
    """Latents [N, C, F, H, W] on the CPU; sample n belongs to prompt `owners[n]`."""
    device, dtype = options.device, getattr(torch, options.dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    models = load_experts(folder, plan, dtype=dtype, device=device)
    channels = next(iter(models.values())).config.out_channels
    shape = (channels, options.frames, options.height, options.width)
    counter = Counter(seed=options.seed, phase=0, iteration=0, update=0)
    latents = []
    with Progress(console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("samples", total=len(owners))
        for batch in batches(len(owners), options.batch_size):
            noise = counter.normal(Purpose.INITIAL_NOISE, shape, batch, device)
            text = prompts.batch([owners[index] for index in batch]).to(device, dtype)
            negative = prompts.negative.to(device, dtype).expand_as(text)
            latents.append(sample_latents(models, plan, noise, text, negative).cpu())
            progress.advance(task, len(batch))
    return torch.cat(latents)


def save_pictures(save: Path, folder: PipelineFolder, latents: torch.Tensor, texts: list[str]) -> None:
    """A contact sheet of the first samples, and an animation where there are several frames."""
    pixels = decode_latents(folder, latents[:ANIMATED_CLIPS]) if folder.has_vae else latents[:ANIMATED_CLIPS]
    if pixels.shape[1] not in (1, 3):
        print(f"no pictures: {folder.path} has no VAE and its latents have {pixels.shape[1]} channels", file=sys.stderr)
        return
    save_contact_sheet(save / "sheet.png", pixels[:SHEET_ROWS], texts[:SHEET_ROWS])
    if pixels.shape[2] > 1:
        save_animation(save / ("samples.mp4" if folder.has_vae and mp4_available() else "samples.gif"), pixels)


def prompt_length(folder: PipelineFolder) -> int | None:
    """The tokens an exported student was trained with, where it says so."""
    return (read_sampling(folder.path) or {}).get("prompt_length")


def _source(options: GenerateOptions) -> Path:
    if (options.hf is None) == (options.load is None):
        raise ValueError("name either --hf, a pipeline folder, or --load, a run's folder")
    if options.hf is not None:
        return options.hf
    exported = options.load / "hf"
    if not options.load.is_dir():
        raise ValueError(f"--load {options.load}: no such folder; name a run's folder")
    if not exported.is_dir():
        raise ValueError(f"--load {options.load}: no hf/ in it; export the run with tools/convert_checkpoint.py first")
    return exported


def _check(options: GenerateOptions) -> None:
    names = (
        "frames",
        "height",
        "width",
        "samples_per_prompt",
        "batch_size",
        "num_steps",
        "timestep_shift",
        "max_length",
    )
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be greater than 0")
    if options.max_prompts < 0:
        raise ValueError(f"--max-prompts {options.max_prompts}: must not be negative")
    save = options.save
    if save.exists() and not save.is_dir():
        raise ValueError(f"--save {save}: is a file; name a folder")
    if save.exists() and any(save.iterdir()) and not (save / LATENTS_FILE).is_file():
        raise ValueError(f"--save {save}: is not empty and holds no samples; name a new folder")


if __name__ == "__main__":
    main()
