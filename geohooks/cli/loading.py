"""Models and tokenizers by name: a hub name, a local folder, or `zoo:NAME`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import attrs

from geohooks.artifacts import ModelSource
from geohooks.errors import ArtifactError

__all__ = ["DTYPES", "Loaded", "load"]

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_ZOO = "zoo:"
# 64 MiB at the most are read of a file.
_BLOCK, _BLOCKS = 65_536, 1024
_WEIGHTS = ("*.safetensors", "*.bin", "*.json")


@attrs.frozen(eq=False)
class Loaded:
    """A causal language model in evaluation mode, its tokenizer, and where both come from."""

    model: Any
    tokenizer: Any
    source: ModelSource


def load(name: str, *, dtype: str = "auto", device_map: str | None = None, trust_remote_code: bool = False) -> Loaded:
    """The causal language model called `name`, on one device, or spread as `device_map` says.

    The device is the process's own GPU where there is one. An `ArtifactError` says why a model can't be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if dtype not in DTYPES:
        raise ArtifactError(f"dtype '{dtype}' is not known; use one of {', '.join(DTYPES)}")
    place = _place(name)
    if dtype == "auto" and name.startswith(_ZOO):
        dtype = "float32"  # they are stored as float16 to be small, not to compute in it
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"model '{name}' can't be loaded: {error}") from error
    if device_map is None and torch.cuda.is_available():
        model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    _check_tokenizer(name, model, tokenizer)
    return Loaded(model.eval(), tokenizer, ModelSource(name, _fingerprint(place, model)))


def _check_tokenizer(name: str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer without tokens, or with more than the model has embeddings for."""
    rows, tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if tokens == 0:
        raise ArtifactError(f"model '{name}' has no tokenizer: it has no tokens; put the tokenizer's files beside it")
    if tokens > rows:
        raise ArtifactError(
            f"model '{name}' has embeddings for {rows} tokens, its tokenizer has {tokens}; use the model's own"
        )


def _place(name: str) -> str:
    if name.startswith(_ZOO):
        from geohooks import zoo

        return str(zoo.path(name.removeprefix(_ZOO)))
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ArtifactError(f"model '{name}' can't be loaded: the folder has no config.json")
    if folder.is_file():
        raise ArtifactError(f"model '{name}' can't be loaded: it is a file; name the folder that it lies in")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ArtifactError(f"model '{name}' can't be loaded: there is no such folder")
    return str(folder) if folder.is_dir() else name


def _fingerprint(place: str, model: Any) -> str:
    """The hub's commit, or a hash of the folder's files: whole ones, and of very large ones blocks from end to end."""
    folder = Path(place)
    if not folder.is_dir():
        return str(getattr(model.config, "_commit_hash", None) or "unknown")
    digest = hashlib.sha256()
    for file in sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
                opened.seek(start)
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()
