"""A run's prompts: those of a folder, or of a text that one rank encodes once, for all ranks and for later launches."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_pdmd.data.prompts import (
    ENCODING_BATCH,
    PromptEmbeddings,
    encode_shards,
    load_prompts,
    read_prompts,
    shards_written,
)
from megatron_pdmd.data.text_encoder import TextEncoder, clean_prompt
from megatron_pdmd.data.umt5 import read_umt5_config
from megatron_pdmd.errors import require_space
from megatron_pdmd.files.safetensors_files import TRANSFORMERS_STEM, read_model_header
from megatron_pdmd.parallel.agreement import together
from megatron_pdmd.parallel.patience import patient_group
from megatron_pdmd.parallel.topology import Topology

FOLDER = "prompts"  # in the run's folder
_SHARD_SIZE = 4 * ENCODING_BATCH  # after each of which the ranks that wait hear of rank 0
_SECONDS_BETWEEN_LINES = 60.0


def load_run_prompts(
    path: Path,
    text_encoder: Path,
    save: Path,
    topology: Topology,
    *,
    max_length: int,
    negative_prompt: str = "",
    dtype: torch.dtype = torch.float32,
    flag: str = "--prompts",
) -> PromptEmbeddings:
    """The embeddings of a run's prompts, mapped into memory. Every rank must call it.

    A text is encoded by rank 0, on its device and in fp32, into a folder of the run. That is named after all that the
    embeddings depend on, so that a later launch finds it.

    Args:
        path: folder of encoded prompts, or text file.
        text_encoder: pipeline folder with the text encoder; needed for a text file.
        save: the run's folder.
        topology: the ranks.
        max_length: tokens of a prompt; a folder must agree with it.
        negative_prompt: what guidance leads away from; a folder must agree with one that is given.
        dtype: what embeddings of a text are kept in; a model of that dtype casts them to it anyway.
        flag: option that names the path, for errors.

    Raises:
        ValueError: this rank's mistake, or the first that another met; see `load_prompts`.
    """
    if not path.is_dir():
        with together():
            prompts = read_prompts(path, flag)
            digest = _digest(prompts, negative_prompt, max_length, dtype, text_encoder)
            path, flag = save / FOLDER / digest[:16], "--save"
            missing = topology.rank == 0 and not _is_whole(path)
        if _first_rank_says(missing, topology):
            _encode(prompts, text_encoder, path, topology, max_length, negative_prompt, dtype)
    with together():
        if not path.is_dir():
            raise ValueError(
                f"--save {save}: rank {topology.rank} does not see it; name a folder that all machines share"
            )
        loaded = load_prompts(path, max_length=max_length, negative_prompt=negative_prompt, flag=flag)
        loaded.require_finite(f"{flag} {path}", part=topology.rank, parts=topology.world_size)
    return loaded


def _encode(
    prompts: Sequence[str],
    text_encoder: Path,
    folder: Path,
    topology: Topology,
    max_length: int,
    negative_prompt: str,
    dtype: torch.dtype,
) -> None:
    """Writes the embeddings on rank 0; the other ranks wait, shard by shard, so that none waits for too long."""
    steps: Iterator[int] = iter(())
    with together(patient_group()):
        if topology.rank == 0:
            where = f"{text_encoder} on {topology.device.type}"
            print(f"encoding {len(prompts)} prompts, once, with {where}, into {folder}", flush=True)
            width = read_umt5_config(text_encoder)["d_model"]
            require_space(folder, (len(prompts) + 1) * max_length * width * dtype.itemsize, "--save")
            encoder = TextEncoder(text_encoder, max_length=max_length, device=topology.device)
            steps = shards_written(
                folder,
                prompts,
                (shard.to("cpu", dtype) for shard in encode_shards(encoder, prompts, shard_size=_SHARD_SIZE)),
                encoder.encode([negative_prompt])[0].to("cpu", dtype),
                negative_prompt=negative_prompt,
                encoder=encoder.name,
                shard_size=_SHARD_SIZE,
            )
            del encoder  # the shards alone keep it
    told = time.monotonic()
    for _ in range(0, len(prompts) + _SHARD_SIZE, _SHARD_SIZE):  # one more than there are shards: the folder's end
        with together(patient_group()):
            done = next(steps, 0)
            if done and time.monotonic() > told + _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                print(f"encoded {done} of {len(prompts)} prompts", flush=True)


def _is_whole(folder: Path) -> bool:
    """Whether an earlier launch left the embeddings; what is damaged is made again."""
    try:
        PromptEmbeddings.load(folder)
    except ValueError:
        return False
    return True


def _first_rank_says(answer: bool, topology: Topology) -> bool:
    """Rank 0's answer, on all ranks. The others do not look: what is not there yet, a network's disk would remember."""
    said = [answer]
    if topology.world_size > 1:
        dist.broadcast_object_list(said, src=0, group=patient_group())
    return said[0]


def _digest(
    prompts: Sequence[str], negative_prompt: str, max_length: int, dtype: torch.dtype, text_encoder: Path
) -> str:
    """Stands for all that decides on embeddings, the encoder's weights by their header alone."""
    digest = hashlib.sha256()
    texts = [*prompts, negative_prompt]
    header = read_model_header(text_encoder / "text_encoder", TRANSFORMERS_STEM)
    parts = [
        texts,
        [clean_prompt(text) for text in texts],  # which packages that are installed have a say in
        [max_length, str(dtype)],
        read_umt5_config(text_encoder),
        sorted((name, tensor.dtype, tensor.shape) for name, tensor in header.items()),
    ]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    for file in sorted(path for path in (text_encoder / "tokenizer").iterdir() if path.is_file()):
        digest.update(json.dumps([file.name, file.stat().st_size]).encode() + file.read_bytes())
    return digest.hexdigest()
