"""The small trained models that ship with the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from geohooks.errors import ArtifactError

__all__ = ["ZooModel", "load", "names", "path"]

_MODELS = Path(__file__).parent / "models"


class ZooModel(NamedTuple):
    """A model in evaluation mode, and its tokenizer: `model, tokenizer = zoo.load(name)`."""

    model: Any
    tokenizer: Any


def names() -> tuple[str, ...]:
    """The names of the trained models."""
    return tuple(sorted(config.parent.name for config in _MODELS.glob("*/config.json")))


def path(name: str) -> Path:
    """The folder of the model's files, with its card `README.md`; `ArtifactError` for an unknown name."""
    if name not in names():
        nearest = ", ".join(difflib.get_close_matches(name, names(), cutoff=0.3) or names()) or "none"
        raise ArtifactError(f"the zoo has no model '{name}'; nearest are {nearest}; geohooks.zoo.names() lists them")
    return _MODELS / name


def load(name: str, dtype: torch.dtype = torch.float32) -> ZooModel:
    """The trained model called `name`, computing in `dtype` (it is stored as float16), and its tokenizer.

    Nothing is fetched from a network. Raises `ArtifactError` for an unknown name.
    """
    folder = path(name)
    with _no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ZooModel(model.eval(), tokenizer)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
