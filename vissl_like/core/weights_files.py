"""Tensors out of any weights file, folder, address or library name, without running code that the file brings along."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import pickle
import re
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vissl_like.core import checkpoint
from vissl_like.core.weights_rules import KEY
from vissl_like.errors import WeightsError

CLASSY = "classy_state_dict"
#: Where `auto` looks for the state dict, in this order, if the file itself is none. Nested ones are followed.
AUTO_KEYS = (
    CLASSY,
    "model",
    "state_dict",
    "teacher",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "encoder",
    "backbone",
    "module",
    "student",
    "weights",
    "params",
    "ema",
)
#: Files of a folder that hold weights, the first there is.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "model.pt")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsFile:
    """What was read: tensors by their names in the file, and where they were found."""

    source: str
    tensors: dict[str, Tensor]
    #: Keys that lead to the state dict in the file, outermost first.
    path: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    #: The names are those of this library ("timm", "torchvision", "hf"), asked for by name.
    library: str = ""
    #: VISSL's own layout: names already begin with trunk. or heads.
    is_classy: bool = False


def open_weights(
    source: str, *, key_name: str | list[str] = "auto", unpickle: Callable[[Path], Any] | None = None
) -> WeightsFile:
    """Read PARAMS_FILE: a file, a run or checkpoint folder, a folder of transformers, http(s)://, or LIBRARY:NAME.

    unpickle: what reads a file that needs code to load; None: such files are refused.
    """
    library, _, name = source.partition(":")
    if library in LIBRARIES and name and not Path(source).exists():
        return WeightsFile(source=source, tensors=_named(library, name), library=library)
    if source.startswith(("http://", "https://")):
        return _in_file(fetch(source), source=source, key_name=key_name, unpickle=unpickle)
    path = Path(source).expanduser()
    if not path.exists():
        raise WeightsError(f"{KEY}.PARAMS_FILE={source!r}: there is no such file or folder ({path.absolute()}).")
    if path.is_dir():
        return _in_folder(path, source=source, key_name=key_name, unpickle=unpickle)
    return _in_file(path, source=source, key_name=key_name, unpickle=unpickle)


def _in_folder(
    path: Path, *, source: str, key_name: str | list[str], unpickle: Callable[[Path], Any] | None
) -> WeightsFile:
    if (path / checkpoint.FOLDER).is_dir() or path.name == checkpoint.FOLDER or (path / checkpoint.MANIFEST).exists():
        return WeightsFile(source=source, tensors=checkpoint.load_model_state(path))
    if _is_transformers(path):
        # Its files have older names than its models: only the library itself knows how they go together.
        return WeightsFile(source=source, tensors=_named("hf", str(path)), library="hf")
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return _in_file(path / name, source=source, key_name=key_name, unpickle=unpickle)
    raise WeightsError(
        f"{KEY}.PARAMS_FILE={source!r}: this folder holds no weights: neither {checkpoint.FOLDER}/ of a run nor one of"
        f" {', '.join(FOLDER_FILES)}."
    )


def _in_file(
    path: Path, *, source: str, key_name: str | list[str], unpickle: Callable[[Path], Any] | None
) -> WeightsFile:
    content = read_content(path, unpickle=unpickle)
    return find_state_dict(content, key_name=key_name, source=source)


def _is_transformers(path: Path) -> bool:
    """Whether transformers wrote this folder."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


# --- one file -------------------------------------------------------------------------------------------------------


def read_content(path: Path, *, unpickle: Callable[[Path], Any] | None = None) -> Any:
    """Whatever one file holds. Nothing that could run code is unpickled, unless `unpickle`, which may, is given."""
    if not path.is_file():
        raise WeightsError(f"{KEY}.PARAMS_FILE={str(path)!r}: not a file.")
    if path.stat().st_size == 0:
        raise WeightsError(f"{KEY}.PARAMS_FILE={str(path)!r}: the file is empty. Download or copy it again.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _refused(error)
        if refused is None:
            raise _torn(path, error) from error
        if unpickle is None:
            raise WeightsError(
                f"{KEY}.PARAMS_FILE={str(path)!r}: needs code to load, which could do anything ({refused}). Ask for a"
                " plain state dict (torch.save(model.state_dict(), ...)) or a .safetensors file; only if you trust its"
                f" author, set {KEY}.ALLOW_UNSAFE=true."
            ) from error
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise _torn(path, error) from error
    log.warning("%s: loading a pickle that runs code, because ALLOW_UNSAFE is set", path)
    return unpickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _torn(path, error) from error


def _harmless() -> list[Any]:
    """Types that published files hold beside tensors and that only carry data: numpy arrays, and argparse's options."""
    core = np._core.multiarray  # type: ignore[attr-defined]
    dtypes = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"}
    numpy_1 = [(getattr(core, name), f"numpy.core.multiarray.{name}") for name in ("_reconstruct", "scalar")]
    numpy_2 = [(getattr(core, name), f"numpy._core.multiarray.{name}") for name in ("_reconstruct", "scalar")]
    return [*numpy_1, *numpy_2, np.ndarray, np.dtype, *sorted(dtypes, key=str), argparse.Namespace]


def _refused(error: pickle.UnpicklingError) -> str | None:
    """What torch refused to run or import, or None if the file is rather damaged."""
    text = str(error)
    named = re.search(r"GLOBAL (\S+)", text)
    if named:
        return f"it imports {named[1]}"
    lines = [
        line
        for line in text.splitlines()
        if re.search("unrecognized function|[Uu]nsupported class|Can only build", line)
    ]
    return lines[0].strip()[:200] if lines else None


def _torn(path: Path, error: Exception) -> WeightsError:
    first = (str(error).strip().splitlines() or [""])[0].partition(". ")[0][:120]  # PyTorch goes on about its options
    return WeightsError(
        f"{KEY}.PARAMS_FILE={str(path)!r}: not a weights file, or damaged ({type(error).__name__}: {first})."
        " Download or copy it again; .pth, .pt, .torch, .ckpt, .bin and .safetensors can be read."
    )


# --- the state dict in it -------------------------------------------------------------------------------------------


def find_state_dict(content: Any, *, key_name: str | list[str] = "auto", source: str = "") -> WeightsFile:
    """The state dict in a file's content. `auto` takes the content if it holds tensors, else the first of AUTO_KEYS."""
    where = f"{KEY}.PARAMS_FILE={source!r}"
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        cure = " Save its state_dict() instead." if isinstance(content, torch.nn.Module) else ""
        raise WeightsError(f"{where}: holds a {kind}, not a dictionary of tensors.{cure}")
    if content.get("type") in ("shard_list", "slice_list"):
        raise WeightsError(
            f"{where}: is the index of a VISSL checkpoint in pieces ({content['type']}). Make one file of it with VISSL's"
            " convert_sharded_checkpoint script first."
        )
    if key_name == "auto":
        path, notes = _auto_path(content)
    else:
        path, notes = [key_name] if isinstance(key_name, str) and key_name else list(key_name), []
    found: Any = content
    for depth, key in enumerate(path):
        if not isinstance(found, Mapping) or key not in found:
            present = ", ".join(repr(name) for name in list(found)[:20]) if isinstance(found, Mapping) else "none"
            inside = f" inside {'/'.join(path[:depth])}" if depth else ""
            raise WeightsError(
                f"{where}: {KEY}.STATE_DICT_KEY_NAME={key_name!r}: there is no key {key!r}{inside}."
                f" Keys there: {present}. Use one of them, '' if the file itself is the state dict, or auto."
            )
        found = found[key]
    if not isinstance(found, Mapping):
        raise WeightsError(f"{where}: {'/'.join(path)} holds a {type(found).__name__}, not a dictionary of tensors.")
    is_classy = path == [CLASSY] and isinstance(found.get("base_model"), Mapping)
    if is_classy:
        found = _classy(found, where=where)
    tensors, dropped = _tensors(found)
    if dropped:
        notes.append(f"{len(dropped)} entries are not tensors and were left out: {', '.join(dropped[:5])}")
    return WeightsFile(source=source, tensors=tensors, path=tuple(path), notes=tuple(notes), is_classy=is_classy)


def _auto_path(content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Keys to the state dict, and a note if there were others to choose from."""
    path: list[str] = []
    notes = []
    while len(path) < 4:
        # A measure beside the weights (best_acc1) makes no state dict of the file, an average beside them no checkpoint.
        beside = sum(map(_is_table, content.values()))
        inside = {key: content[key] for key in AUTO_KEYS if isinstance(content.get(key), Mapping)}
        candidates = [key for key, found in inside.items() if not beside or _num_tables(found) > beside]
        if not candidates:
            break
        if len(candidates) > 1:
            notes.append(
                f"STATE_DICT_KEY_NAME=auto chose {candidates[0]!r}; there are also {', '.join(candidates[1:])}"
            )
        path.append(candidates[0])
        content = content[candidates[0]]
        if candidates[0] == CLASSY and isinstance(content.get("base_model"), Mapping):
            break
    return path, notes


def _classy(found: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """VISSL's layout base_model/model/{trunk,heads} -> names that begin with trunk. and heads."""
    model = found["base_model"].get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("trunk"), Mapping):
        raise WeightsError(f"{where}: {CLASSY} has no base_model/model/trunk; it is not a checkpoint of VISSL.")
    parts = {part: model.get(part) for part in ("trunk", "heads")}
    return {
        f"{part}.{key}": value
        for part, state in parts.items()
        if isinstance(state, Mapping)
        for key, value in state.items()
    }


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_table(value: Any) -> bool:
    """Whether this is a tensor of several numbers: most likely weights."""
    return _is_array(value) and math.prod(value.shape) > 1


def _num_tables(node: Any) -> int:
    """How many tensors of several numbers there are in a dictionary and those within it."""
    values = node.values() if isinstance(node, Mapping) else ()
    return sum(_is_table(value) or _num_tables(value) for value in values)


def _tensors(found: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    tensors, dropped = {}, []
    for key, value in found.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            tensors[str(key)] = torch.from_numpy(np.ascontiguousarray(value))
        elif isinstance(value, Tensor):
            tensors[str(key)] = value
        else:
            dropped.append(str(key))
    return tensors, dropped


# --- by address and by name -----------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where downloads stay: $VISSL_LIKE_CACHE, else $XDG_CACHE_HOME/vissl_like, else ~/.cache/vissl_like."""
    own = os.environ.get("VISSL_LIKE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "vissl_like"


def fetch(url: str) -> Path:
    """The file behind an address, downloaded once into the cache folder."""
    name = url.split("?")[0].rstrip("/").rpartition("/")[2] or "weights"
    path = cache_folder() / "weights" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{name}"
    if path.exists():
        return path
    log.info("downloading %s to %s", url, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")  # renamed when whole, so a torn download is never used
    try:
        torch.hub.download_url_to_file(url, str(partial), progress=False)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        raise WeightsError(_offline(url, error)) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _offline(source: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (
        f"{KEY}.PARAMS_FILE={source!r}: cannot be fetched ({first})."
        " Check the name and the network, or download the file elsewhere and give its path."
    )


def _named(library: str, name: str) -> dict[str, Tensor]:
    """State dict of a published model, with the library's own names."""
    try:
        return LIBRARIES[library](name)
    except (OSError, urllib.error.URLError, RuntimeError, ValueError, KeyError) as error:
        raise WeightsError(_offline(f"{library}:{name}", error)) from error


def _torchvision(name: str) -> dict[str, Tensor]:
    """`resnet50` (its default weights) or `ResNet50_Weights.IMAGENET1K_V1`."""
    from torchvision import models

    weights = models.get_weight(name) if "." in name else models.get_model_weights(name).DEFAULT
    return dict(weights.get_state_dict(progress=False, check_hash=True))


def _timm(name: str) -> dict[str, Tensor]:
    import timm

    return dict(timm.create_model(name, pretrained=True).state_dict())


def _hf(name: str) -> dict[str, Tensor]:
    from transformers import AutoModel
    from transformers.utils import logging as library_logging

    shown = library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    try:
        return dict(AutoModel.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False).state_dict())
    finally:
        if shown:
            library_logging.enable_progress_bar()


LIBRARIES: dict[str, Callable[[str], dict[str, Tensor]]] = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}
