"""Every option, one dataclass per concern. Each field's comment is its help text; the defaults stand here alone.

Flags carry the field's name (`--micro-batch-size`); a YAML recipe groups them by concern (`training:
{micro_batch_size: 1}`). Names and meanings are Megatron's where Megatron has them. Defaults of the method are the
paper's (Appendix C).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_pdmd.options import comma_separated

Ints = Annotated[tuple[int, ...], comma_separated(int, "N,N")]
Floats = Annotated[tuple[float, ...], comma_separated(float, "X,X")]
DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root"]


@dataclass(frozen=True)
class ModelConfig:
    """The teacher and how the networks are run."""

    # Hugging Face pipeline folder of the teacher (model_index.json, transformer/, perhaps transformer_2/).
    teacher: Path | None = None
    # Attention kernels: torch's own, or the flash-attn package on a GPU.
    attention_backend: Literal["sdpa", "flash"] = "sdpa"
    # Fused kernels: Triton on a GPU, C++ on the CPU, plain torch as reference; auto takes what is there.
    kernel_backend: Literal["auto", "triton", "native", "reference"] = "auto"
    # Recompute activations in the backward pass: every block's (full), or all but the attentions' outputs (selective).
    recompute_granularity: Literal["none", "full", "selective"] = "none"


@dataclass(frozen=True)
class MethodConfig:
    """Phased DMD. One phase without truncation is few-step DMD, one phase with SGTS is DMD with SGTS (Fig. 1)."""

    # Sampling steps N of the distilled generator.
    num_steps: int = 4
    # Steps of each phase, first phase first; one number is one phase.
    phase_steps: Ints = (2, 2)
    # Train this phase alone (1 is the first), from the checkpoints of the phases before it; 0 trains all in turn.
    phase: int = 0
    # sgts: only a random step of the phase has the gradient, and jumps to the phase's end; none: all its steps have it.
    gradient_truncation: Literal["sgts", "none"] = "sgts"
    # Where the diffused time t is drawn: nested (s, 1), disjoint (t_k, t_{k-1}), or fixed.
    noise_interval: Literal["nested", "disjoint", "fixed"] = "nested"
    # The time of --noise-interval fixed, in (0, 1).
    fixed_timestep: float = 0.882
    # Shift of the flow matching schedule: t = shift u / (1 + (shift - 1) u).
    timestep_shift: float = 5.0
    # Distribution of u before the shift.
    timestep_distribution: Literal["uniform", "logit_normal"] = "uniform"
    # Kept free of samples at both ends of the interval, in u.
    timestep_margin: float = 0.02
    # The fake score's objective: flow is Eq. 13, x0 is Eq. 15, biased is the wrong one of Fig. 2c (an ablation).
    objective: Literal["flow", "x0", "biased"] = "flow"
    # Upper limit of 1 / sigma_{t|s}^2 in Eq. 13.
    clamp_max: float = 10.0
    # Weight of the generator's gradient: the paper's w_{t|s}, or DMD's mean absolute error per sample.
    dmd_weighting: Literal["score", "mean_abs"] = "score"
    # Classifier-free guidance of the teacher; one number, or low-noise and high-noise expert.
    guidance_scale: Floats = (4.0,)
    # Updates of the fake score for each update of the generator.
    fake_updates: int = 5
    # Fake updates before a phase's first generator update.
    fake_warmup: int = 0
    # Samples the fake score learns from: truncated like the generator's, or run through all steps of the phase.
    fake_rollout: Literal["same", "full"] = "same"
    # Updates of an iteration that share one rollout of the frozen earlier phases, its prompts and its noise.
    phase_start_reuse: int = 1
    # Networks of the fake score: one for each teacher expert in range, or one from the phase's own expert.
    fake_experts: Literal["match-teacher", "single"] = "match-teacher"
    # Trained parameters of the generator: adapters on the teacher's weights, or a full copy.
    generator: Literal["lora", "full"] = "lora"
    # Rank of the adapters.
    lora_rank: int = 64
    # Scale of the adapters: their output is multiplied by alpha / rank.
    lora_alpha: float = 8.0
    # Decay of the generator's moving average; 0 keeps none.
    ema_decay: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for both trained roles."""

    # Learning rate of the generator.
    lr: float = 5e-5
    # Learning rate of the fake score.
    fake_lr: float = 4e-7
    # AdamW's beta_1.
    adam_beta1: float = 0.0
    # AdamW's beta_2.
    adam_beta2: float = 0.999
    # AdamW's epsilon.
    adam_eps: float = 1e-8
    # Decoupled weight decay.
    weight_decay: float = 0.0
    # Largest gradient norm; larger ones are scaled down to it. 0 does not clip.
    clip_grad: float = 1.0
    # How the generator's rate falls from --lr after its warm-up, over the iterations of each phase.
    lr_decay_style: DecayStyle = "constant"
    # Iterations of each phase in which the generator's rate rises to --lr.
    lr_warmup_iters: int = 0
    # The generator's rate in the first iteration of its warm-up.
    lr_warmup_init: float = 0.0
    # Iterations of each phase, warm-up included, after which the generator's rate is --min-lr; 0 takes the phase's.
    lr_decay_iters: int = 0
    # The generator's rate decays no further than to this.
    min_lr: float = 0.0
    # How the fake score's rate falls from --fake-lr after its warm-up, over the iterations of each phase.
    fake_lr_decay_style: DecayStyle = "constant"
    # Iterations of each phase in which the fake score's rate rises to --fake-lr.
    fake_lr_warmup_iters: int = 0
    # The fake score's rate in the first iteration of its warm-up.
    fake_lr_warmup_init: float = 0.0
    # Iterations of each phase after which the fake score's rate is --fake-min-lr; 0 takes the phase's.
    fake_lr_decay_iters: int = 0
    # The fake score's rate decays no further than to this.
    fake_min_lr: float = 0.0


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch and numbers of a run."""

    # Iterations (generator updates) of each phase; one number goes for every phase.
    train_iters: Ints = (1000,)
    # Samples in one forward pass of one rank; a rank whose share of the global batch is smaller takes that at once.
    micro_batch_size: int = 1
    # Samples of one update over all ranks.
    global_batch_size: int = 64
    # Seed of everything random.
    seed: int = 42
    # Run the networks in bfloat16, with fp32 master weights.
    bf16: bool = False
    # Stop after saving when this many minutes have passed, also inside an iteration; 0 never does.
    exit_duration_in_mins: float = 0.0
    # Stop after saving once this many iterations are done in this launch; 0 never does.
    exit_interval: int = 0
    # Stop (exit code 1) once so many updates of a network in a row were skipped as not finite; 0 never does.
    max_skipped_updates: int = 10
    # Save and stop (exit code 3) after the present update on SIGTERM and SIGINT.
    exit_signal_handler: bool = True

    def iterations_of(self, phase: int) -> int:
        """Iterations of a phase, by its 1-based index."""
        return self.train_iters[0] if len(self.train_iters) == 1 else self.train_iters[phase - 1]


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is split over ranks, and how they talk. What the sizes leave of the world is data parallel."""

    # Ranks that share each linear layer and the heads of each attention.
    tensor_model_parallel_size: int = 1
    # Split the activations between the tensor-parallel layers over the same ranks.
    sequence_parallel: bool = False
    # Stages that share the layers, one after another.
    pipeline_model_parallel_size: int = 1
    # interleaved: all passes of an iteration are scheduled as one; sequential: one pipeline for each pass.
    pipeline_schedule: Literal["interleaved", "sequential"] = "interleaved"
    # Layers of each stage; not given, an even split in which embeddings and head count as a layer each.
    pipeline_layer_split: Ints = ()
    # Micro-batches whose activations a stage holds at most; 0 takes what 1F1B holds: the stages, or all if fewer.
    pipeline_live_microbatches: int = 0
    # Ranks that share each sequence.
    context_parallel_size: int = 1
    # ulysses trades tokens for heads by all-to-all, ring passes keys and values on; auto: ulysses where heads divide.
    context_parallel_method: Literal["auto", "ulysses", "ring"] = "auto"
    # Communication library; auto takes nccl with CUDA and gloo without.
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    # Minutes after which a rank that waits for another gives up.
    distributed_timeout_minutes: float = 10.0
    # Split gradients, fp32 weights and moments of the trained networks over the data-parallel ranks.
    use_distributed_optimizer: bool = False
    # Start to reduce the gradients while the backward pass runs.
    overlap_grad_reduce: bool = False
    # With --use-distributed-optimizer: gather a network's new weights while others run, until its next pass.
    overlap_param_gather: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Prompts and the shape of a sample. Training needs no videos: prompts and noise only."""

    # Text file with a prompt in each line, or a folder that encode_prompts.py wrote.
    prompts: Path | None = None
    # What the teacher's guidance leads away from.
    negative_prompt: str = ""
    # Text tokens a prompt is padded to.
    prompt_length: int = 512
    # Latent frames; pixels are 4 (frames - 1) + 1 for Wan.
    frames: int = 21
    # Latent rows.
    height: int = 60
    # Latent columns.
    width: int = 104


@dataclass(frozen=True)
class CheckpointConfig:
    """The run's folder, saving and resuming."""

    # The run's folder; checkpoints go to its checkpoints/.
    save: Path = Path("runs/pdmd")
    # Run folder to continue; the run's own folder continues by itself, whatever the next two flags say.
    load: Path | None = None
    # Take the optimizers' states from --load; without them, optimizers start anew from its weights.
    load_optim: bool = True
    # Take the weights alone from --load, and begin with iteration 0; its other options may then differ.
    finetune: bool = False
    # Format of checkpoints: torch.distributed.checkpoint's, which any layout of ranks reads.
    ckpt_format: Literal["torch_dist"] = "torch_dist"
    # Go on training while a checkpoint is written, from a copy in CPU memory.
    async_save: bool = False
    # Iterations between checkpoints; 0 saves only at the end of each phase.
    save_interval: int = 100
    # Save, also inside an iteration, once this many minutes have passed since the last checkpoint; 0 never does.
    save_interval_minutes: float = 0.0
    # Checkpoints kept, the newest ones; 0 keeps all.
    keep_last: int = 2
    # Write Hugging Face folders of the trained experts at the end.
    export: bool = True


@dataclass(frozen=True)
class LoggingConfig:
    """What is told while the run goes."""

    # Iterations between log entries, each the mean over them; a phase's first and last iteration always have one.
    log_interval: int = 10
    # Log tokens and model TFLOP a second of one GPU, and peak memory.
    log_throughput: bool = False
    # Time the iteration (0), the updates of each role and what they end with (1), each pass of each role (2).
    timing_log_level: Literal[0, 1, 2] = 0
    # Write TensorBoard events to the run folder.
    tensorboard: bool = True
    # Log to this project of Weights & Biases too.
    wandb_project: str = ""
    # Name of the run there; the name of the --save folder where not given.
    wandb_exp_name: str = ""
    # Folder for the files that wandb keeps; the --save folder where not given.
    wandb_save_dir: Path | None = None
    # Iterations between sample sheets; 0 draws one at the end of each phase.
    sample_interval: int = 0
    # Prompts on a sample sheet; 0 draws no sheets.
    sample_prompts: int = 8


@dataclass(frozen=True)
class EvaluationConfig:
    """Measurement while a run goes, on fixed prompts and noise, and at its end, for tasks that have one."""

    # Iterations between evaluations on fixed prompts and noise; 0 makes none.
    eval_interval: int = 0
    # Prompts of evaluations and sample sheets, in any form that --prompts takes; by default the run's own.
    eval_prompts: Path | None = None
    # Samples of an evaluation, each of another prompt; the prompts are spread over all there are.
    eval_samples: int = 8

    # Task whose metrics are measured; none for real models.
    task: Literal["none", "moving_digits"] = "none"
    # Folder with the task's classifier and held-out digits.
    task_folder: Path | None = None
    # Clips of each sampler.
    clips: int = 1024
    # Steps of the teacher's reference sampler.
    teacher_steps: int = 40
    # Clips in one forward pass.
    batch_size: int = 64

    @property
    def classifier(self) -> Path:
        """The task's classifier."""
        return self.task_folder / "classifier.safetensors"

    @property
    def heldout_digits(self) -> Path:
        """The digits of the task's real clips."""
        return self.task_folder / "heldout_digits.png"


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True)
class LaunchConfig:
    """What one launch does; no part of a run."""

    # YAML recipe; flags win over it.
    config: Path | None = None
    # Print the resolved recipe and exit.
    print_config: bool = False
    # Rehearse the run for so many GPUs with tensors that have no memory, on this machine; 0 trains.
    dry_run: int = 0
    # The rank that is rehearsed.
    dry_run_rank: int = 0
    # JSON file for what the rehearsal counted.
    json: Path | None = None


@dataclass(frozen=True)
class CommandLine(Config):
    """A run and what to do with it."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)


FlatCommandLine = tyro.conf.OmitArgPrefixes[CommandLine]
