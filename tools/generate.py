"""Draws samples from a pipeline folder, a teacher's or an exported student's, from LoRA files or from a finished run.

    python tools/generate.py --load runs/quickstart --prompts examples/tiny_wan/prompts.txt --save runs/samples
    python tools/generate.py --hf examples/tiny_wan --num-steps 40 --prompts prompts.txt --save runs/teacher
    python tools/generate.py --lora exports/loras --hf Wan2.2-T2V-A14B-Diffusers --prompts prompts.txt --save samples

Writes `samples.safetensors` (tensor `latents`), `prompts.txt` with a line for each sample, and pictures. One expert is
in memory at a time.
"""

import gc
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

from megatron_pdmd.config import Floats, Ints
from megatron_pdmd.conversion.few_step_sampling import FewStepSampling
from megatron_pdmd.conversion.inference import (
    SamplingPlan,
    batches,
    description,
    expert_subfolder,
    load_expert,
    plan_sampling,
    read_lora_of,
    sample_stage,
)
from megatron_pdmd.conversion.inference_checks import (
    LARGE_MODEL,
    check_device,
    check_latent_size,
    check_memory,
    check_text_width,
    count_weights,
    memory_told,
    text_to_video_config,
)
from megatron_pdmd.conversion.lora_folder import LoraFolder, read_lora_folder
from megatron_pdmd.conversion.pipeline_folder import PipelineFolder, read_pipeline
from megatron_pdmd.conversion.vae import decode_latents
from megatron_pdmd.data.prompts import PromptEmbeddings, load_prompts, read_prompts
from megatron_pdmd.data.umt5 import read_umt5_config
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.errors import parse_options, require_space, user_errors
from megatron_pdmd.evaluation.samples import LATENTS_FILE, PROMPTS_FILE
from megatron_pdmd.evaluation.sheets import mp4_available, save_animation, save_contact_sheet
from megatron_pdmd.files.whole import check_destination, replaced_whole, write_text
from megatron_pdmd.limits import LIMITS, check_limits, check_range

SHEET, SHEET_PROMPTS, ANIMATIONS = "sheet.png", "sheet.txt", ("samples.gif", "samples.mp4")
SHEET_ROWS, ANIMATED_CLIPS = 16, 64
TEACHERS_SIZE = (21, 60, 104)  # latents of 81 frames of 480 x 832 pixels
MOST_SAMPLES = 10**6
SMALLER = "lower --batch-size, --frames, --height or --width, or use --dtype bfloat16"


@dataclass(frozen=True)
class GenerateOptions:
    """Name one of --hf, --load and --lora; --lora may have --hf besides."""

    # Text file with a prompt in each line, or a folder that encode_prompts.py wrote.
    prompts: Path
    # Folder for the samples.
    save: Path
    # Hugging Face pipeline folder.
    hf: Path | None = None
    # Folder of a training run; its exported pipeline in hf/ is taken.
    load: Path | None = None
    # Folder of LoRA files; --hf names their teacher where it is no longer at the place that the files know.
    lora: Path | None = None
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
    # Latent frames; by default those an export was trained with, or 21.
    frames: int | None = None
    # Latent rows; by default those an export was trained with, or 60.
    height: int | None = None
    # Latent columns; by default those an export was trained with, or 104.
    width: int | None = None
    # Samples in one forward pass; by default 16, and 1 for networks of 10^9 weights and more.
    batch_size: int | None = None
    # Pipeline folder whose text encoder reads a text file of prompts; by default the sampled one.
    text_encoder: Path | None = None
    # Text tokens; by default an export's own number, or the tokenizer's limit, at most 512.
    max_length: int | None = None
    # What guidance leads away from.
    negative_prompt: str = ""
    # Number format of the networks; auto is float32, and bfloat16 for networks of 10^9 weights and more.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Where they run; auto takes a GPU where there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Draw a contact sheet and an animation; latents are decoded where the folder has a VAE.
    pictures: bool = True


@dataclass(frozen=True)
class Request:
    """What is asked for, found to fit the folder before anything large is loaded.

    Attributes:
        folder: the pipeline.
        lora: LoRA files on top of it.
        plan: the steps.
        latent_shape: [C, F, H, W] of a sample.
        prompt_length: tokens; None leaves it to the prompts.
        text_dim: width of the embeddings.
        dtype, device: of the networks.
        batch_size: samples in one forward pass.
    """

    folder: PipelineFolder
    lora: LoraFolder | None
    plan: SamplingPlan
    latent_shape: tuple[int, int, int, int]
    prompt_length: int | None
    text_dim: int
    dtype: torch.dtype
    device: torch.device
    batch_size: int


def main() -> None:
    with user_errors():
        generate(parse_options(GenerateOptions, __doc__))


def generate(options: GenerateOptions) -> None:
    """Reads everything, samples, writes."""
    request = prepare(options)
    prompts = read_embeddings(options, request)
    count = len(prompts) if options.max_prompts == 0 else min(options.max_prompts, len(prompts))
    size = count * options.samples_per_prompt * math.prod(request.latent_shape) * 4
    check_memory(size, torch.device("cpu"), "--samples-per-prompt: the samples", "ask for fewer, or for smaller ones")
    require_space(options.save, size, "--save")
    owners = [index for index in range(count) for _ in range(options.samples_per_prompt)]
    with memory_told(SMALLER):
        latents = sample_all(request, prompts, owners, options.seed)
    if not latents.isfinite().all():
        raise ValueError(f"{request.folder.path}: its samples are not finite, so none is saved; try --dtype float32")
    texts = [one_line(prompts.prompts[owner]) for owner in owners]
    with replaced_whole(options.save, "--save", is_samples_folder) as partial:
        write_text(partial / PROMPTS_FILE, "\n".join(texts) + "\n")
        save_file({"latents": latents}, partial / LATENTS_FILE)
    if options.pictures:
        save_pictures(options.save, request.folder, latents, texts)
    print(f"{len(latents)} samples of {len(request.plan.experts)} steps, ", end="")
    print(f"guidance {request.plan.guidance}, in {options.save}")


def prepare(options: GenerateOptions) -> Request:
    """Checks the options and what they name by headers and configs.

    Raises:
        ValueError: names the flag or the file, what is wrong and what to do.
    """
    check_options(options)
    device = check_device(options.device)
    lora = read_lora_folder(options.lora) if options.lora else None
    folder = read_pipeline(source_folder(options, lora))
    plan = plan_sampling(
        folder,
        lora=lora,
        num_steps=options.num_steps,
        phase_steps=options.phase_steps,
        timestep_shift=options.timestep_shift,
        guidance_scale=options.guidance_scale,
    )
    used = dict.fromkeys(expert_subfolder(folder, stage.expert, lora) for stage in plan.stages)
    configs = [text_to_video_config(folder, subfolder) for subfolder in used]
    exported = description(folder, lora)
    size = latent_size(options, exported)
    for config in configs:
        check_latent_size(config, size)
    weights = max(map(count_weights, configs))
    large = weights >= LARGE_MODEL
    if lora:
        for stage in plan.stages:
            read_lora_of(folder, stage.expert, lora)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" or (large and options.dtype == "auto") else torch.float32
    check_memory(weights * dtype.itemsize, device, f"{folder.path}: a transformer in {dtype}", "use a larger device")
    return Request(
        folder,
        lora,
        plan,
        (configs[0].out_channels, *size),
        options.max_length or (exported and exported.prompt_length),
        configs[0].text_dim,
        dtype,
        device,
        options.batch_size or (1 if large else 16),
    )


def latent_size(options: GenerateOptions, exported: FewStepSampling | None) -> tuple[int, int, int]:
    """Frames, rows and columns: the flags', else those of training, else a teacher's."""
    own = (exported and exported.latent_size) or TEACHERS_SIZE
    asked = (options.frames, options.height, options.width)
    frames, height, width = (side if side is not None else default for side, default in zip(asked, own, strict=True))
    return frames, height, width


def read_embeddings(options: GenerateOptions, request: Request) -> PromptEmbeddings:
    """The prompts' embeddings, encoded now if they are text.

    Raises:
        ValueError: they cannot be read, or are of another width than the model's.
    """
    encoder = options.text_encoder or request.folder.path
    if not options.prompts.is_dir():
        read_prompts(options.prompts)
        check_text_width(read_umt5_config(encoder)["d_model"], request.text_dim, encoder)
        print(f"encoding {options.prompts} with the text encoder of {encoder}", flush=True)
    with memory_told("encode the prompts elsewhere with tools/encode_prompts.py"):
        prompts = load_prompts(
            options.prompts,
            encoder,
            max_length=request.prompt_length,
            negative_prompt=options.negative_prompt,
            dtype=request.dtype,
        )
    check_text_width(prompts.negative.shape[-1], request.text_dim, options.prompts)
    prompts.require_finite(f"--prompts {options.prompts}")
    return prompts


def sample_all(request: Request, prompts: PromptEmbeddings, owners: list[int], seed: int) -> torch.Tensor:
    """Latents [N, C, F, H, W] on the CPU; sample n belongs to prompt `owners[n]`."""
    device, dtype, shape = request.device, request.dtype, request.latent_shape
    counter = Counter(seed=seed, phase=0, iteration=0, update=0)
    latents = torch.empty(len(owners), *shape)
    stages = request.plan.stages
    with Progress(console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("samples", total=len(owners))
        for number, stage in enumerate(stages):
            subfolder = expert_subfolder(request.folder, stage.expert, request.lora)
            file = f" with {request.lora.files[stage.expert]}" if request.lora else ""
            print(f"loading {request.folder.path / subfolder}{file} in {dtype} on {device}", flush=True)
            model = load_expert(request.folder, stage.expert, lora=request.lora, dtype=dtype, device=device)
            for batch in batches(len(owners), request.batch_size):
                if number == 0:
                    x = counter.normal(Purpose.INITIAL_NOISE, shape, batch, device)
                else:
                    x = latents[batch.start : batch.stop].to(device)
                text = prompts.batch([owners[index] for index in batch]).to(device, dtype)
                negative = prompts.negative.to(device, dtype).expand_as(text) if stage.guidance != 1 else None
                latents[batch.start : batch.stop] = sample_stage(model, stage, x, text, negative).cpu()
                progress.advance(task, len(batch) * (len(stage.times) - 1) / len(request.plan.experts))
            del model  # before the next one is loaded
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return latents


def save_pictures(save: Path, folder: PipelineFolder, latents: torch.Tensor, texts: list[str]) -> None:
    """A contact sheet of the first samples, and an animation where there are several frames.

    The samples are saved already: a VAE that cannot be used costs the pictures alone, and a line says so.
    """
    try:
        with memory_told("the samples are saved without pictures"):
            pixels = decode_latents(folder, latents[:ANIMATED_CLIPS]) if folder.has_vae else latents[:ANIMATED_CLIPS]
    except ValueError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return
    if pixels.shape[1] not in (1, 3):
        print(f"no pictures: {folder.path} has no VAE and its latents have {pixels.shape[1]} channels", file=sys.stderr)
        return
    save_contact_sheet(save / SHEET, pixels[:SHEET_ROWS], texts[:SHEET_ROWS])
    if pixels.shape[2] > 1:
        save_animation(save / ANIMATIONS[folder.has_vae and mp4_available()], pixels)


def one_line(prompt: str) -> str:
    """A prompt as a line of a text file."""
    return prompt.replace("\n", " ").encode("utf-8", "replace").decode("utf-8")


def is_samples_folder(folder: Path) -> bool:
    """Whether this program made a folder, and nothing else is in it."""
    names = {path.name for path in folder.iterdir()}
    return LATENTS_FILE in names and names <= {LATENTS_FILE, PROMPTS_FILE, SHEET, SHEET_PROMPTS, *ANIMATIONS}


def source_folder(options: GenerateOptions, lora: LoraFolder | None) -> Path:
    """The pipeline folder that is sampled.

    Raises:
        ValueError: none or two are named, or it is not there.
    """
    if lora:
        if options.load is not None:
            raise ValueError("--lora takes the teacher of --hf, not a run of --load; drop one of them")
        if options.hf is None and not lora.teacher.is_dir():
            raise ValueError(f"--lora {lora.path}: its teacher {lora.teacher} is not there; name it with --hf")
        return options.hf or lora.teacher
    if (options.hf is None) == (options.load is None):
        raise ValueError("name either --hf, a pipeline folder, or --load, a run's folder, or --lora, LoRA files")
    if options.hf is not None:
        return options.hf
    exported = options.load / "hf"
    if not options.load.is_dir():
        raise ValueError(f"--load {options.load}: no such folder; name a run's folder")
    if not exported.is_dir():
        raise ValueError(f"--load {options.load}: no hf/ in it; export the run with tools/convert_checkpoint.py first")
    return exported


def check_options(options: GenerateOptions) -> None:
    """Refuses numbers that cannot be, and a folder that cannot be written.

    Raises:
        ValueError: names the flag.
    """
    check_limits(options)
    check_range("--samples-per-prompt", options.samples_per_prompt, 1, MOST_SAMPLES)
    check_range("--max-prompts", options.max_prompts, 0, MOST_SAMPLES)
    if options.max_length is not None:
        check_range("--max-length", options.max_length, 1, LIMITS["prompt_length"].most)
    check_destination(options.save, "--save", is_samples_folder)


if __name__ == "__main__":
    main()
