"""Initial weights of a model from any published file: read, rename, check, copy, report.

Nothing is loaded silently wrong. Order, as in VISSL: STATE_DICT_KEY_NAME, PRESET and RENAME, REMOVE_PREFIX,
APPEND_PREFIX, base_model, then SKIP_LAYERS while copying. Differs from VISSL: both documented prefixes work in both
modes, every ViT's position table is resampled, and fewer than MIN_LOADED of the trunk's parameters are an error that names the
right prefix.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vissl_like.config.schema_model import FeatureEval, WeightsInit
from vissl_like.core import distributed
from vissl_like.core.weights_files import WeightsFile, open_weights
from vissl_like.core.weights_plan import (
    FILLED,
    LoadPlan,
    Row,
    Shape,
    Shapes,
    Share,
    Status,
    Suggestion,
    plan_loading,
    prefix_tokens,
    suggest_rules,
)
from vissl_like.core.weights_rules import BLOCKS, HEADS, KEY, TRUNK, KeyRules, find_preset, rules_of, state_dict_key
from vissl_like.errors import WeightsError

__all__ = [
    "WeightsReport",
    "fingerprint",
    "load_initial_weights",
    "plan_loading",
    "read_state_dict",
    "saved_head_shapes",
    "state_shapes",
]

log = logging.getLogger(__name__)
#: Names per status that the text report prints.
LISTED = 6
EXTRACTION_KEY = "config.MODEL.FEATURE_EVAL_SETTINGS"


@dataclass(frozen=True)
class WeightsReport:
    """What became of every tensor. An empty source stands for random initialisation."""

    source: str
    rows: tuple[Row, ...]
    trunk: Share
    heads: Share
    state_dict_path: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def count(self, *statuses: Status) -> int:
        return sum(row.status in statuses for row in self.rows)

    def table(self) -> str:
        """Text: shares, counts, and the names of whatever was not simply loaded."""
        if not self.source:
            return "\n".join(
                ["weights: randomly initialised (no PARAMS_FILE)", *(f"  note: {note}" for note in self.notes)]
            )
        path = f" [{'/'.join(self.state_dict_path)}]" if self.state_dict_path else ""
        counts = "  ".join(f"{status.value} {self.count(status)}" for status in Status)
        lines = [
            f"weights: {self.source}{path}",
            f"  trunk: {self.trunk}",
            f"  heads: {self.heads}",
            f"  tensors: {counts}",
        ]
        for status in (Status.RESAMPLED, Status.MISSING, Status.MISMATCHED, Status.UNEXPECTED, Status.SKIPPED):
            rows = [row for row in self.rows if row.status is status]
            if rows:
                more = f", and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
                lines.append(f"  {status.value}: {', '.join(map(_described, rows[:LISTED]))}{more}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with every tensor."""
        return {
            "source": self.source,
            "state_dict_path": list(self.state_dict_path),
            "trunk": {"loaded": self.trunk.loaded, "total": self.trunk.total, "share": self.trunk.value},
            "heads": {"loaded": self.heads.loaded, "total": self.heads.total, "share": self.heads.value},
            "counts": {status.value: self.count(status) for status in Status},
            "notes": list(self.notes),
            "tensors": [
                {
                    "status": row.status.value,
                    "model": row.model_key,
                    "file": row.file_key,
                    "model_shape": None if row.model_shape is None else list(row.model_shape),
                    "file_shape": None if row.file_shape is None else list(row.file_shape),
                }
                for row in self.rows
            ],
        }

    def to_json(self) -> str:
        """The text of weights_report.json."""
        return json.dumps(self.as_dict(), indent=1)


def _described(row: Row) -> str:
    """A name, with both shapes where they differ."""
    name = row.model_key or row.file_key
    differ = row.model_shape is not None and row.file_shape is not None and row.model_shape != row.file_shape
    return f"{name} (file {_by(row.file_shape)}, model {_by(row.model_shape)})" if differ else name


def _by(shape: Shape | None) -> str:
    return "x".join(map(str, shape or ())) or "scalar"


def state_shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shape of each tensor."""
    return {key: tuple(value.shape) for key, value in state.items()}


def read_state_dict(path: str | Path, *, key_name: str | list[str] = "auto") -> dict[str, Tensor]:
    """Tensors by name of a weights file or folder; files that need code to load are refused."""
    return open_weights(str(path), key_name=key_name).tensors


def _unpickle(path: Path) -> Any:
    """The one place that runs what a file brings along: for ALLOW_UNSAFE alone."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a foreign pickle can raise anything
        raise WeightsError(f"{KEY}.PARAMS_FILE={str(path)!r}: cannot be unpickled here ({error}).") from error


def load_initial_weights(model: nn.Module, options: WeightsInit, *, feature_eval: FeatureEval) -> WeightsReport:
    """Fill the model from PARAMS_FILE and report; raises WeightsError, before anything is copied, if it does not fit.

    On a model on the meta device everything is checked and nothing copied. Every rank calls it, and all get the same.
    """
    state = model.state_dict()
    if not options.PARAMS_FILE:
        nothing = plan_loading({}, state_shapes(state), rules=KeyRules())
        frozen = feature_eval.FREEZE_TRUNK_ONLY or feature_eval.FREEZE_TRUNK_AND_HEAD
        note = (f"the trunk is frozen and untrained: its features are random; set {KEY}.PARAMS_FILE",)
        has_parameters = nothing.trunk.total > 0
        return WeightsReport(
            "", nothing.rows, nothing.trunk, nothing.heads, notes=note if frozen and has_parameters else ()
        )
    unpickle = _unpickle if options.ALLOW_UNSAFE else None
    file = _divided(open_weights(options.PARAMS_FILE, key_name=state_dict_key(options), unpickle=unpickle), options)
    rules = rules_of(options, default_append=BLOCKS if file.library else "")
    _refuse_other_weights(file)
    notes = list(file.notes)
    if file.is_classy and (rules.remove or rules.append):
        notes.append("REMOVE_PREFIX and APPEND_PREFIX are not used on a classy_state_dict: its names are the model's")
        rules = KeyRules(renames=rules.renames)
    loading = _Loading(model, state, options, feature_eval, rules)
    tensors, plan = loading.best(file.tensors)
    if tensors is not file.tensors:
        notes.append("names were converted by timm's own checkpoint filter")
    _check(plan, loading, file, options=options, feature_eval=feature_eval)
    notes += [*plan.notes, *_warnings(plan)]
    with torch.no_grad():
        for row in plan.of(*FILLED):
            state[row.model_key].copy_(_fitted(tensors[row.file_key], row, grid=loading.grids.get(row.model_key)))
    rows = plan.rows if tensors is file.tensors else _original_names(plan.rows, tensors, file.tensors)
    return WeightsReport(file.source, rows, plan.trunk, plan.heads, state_dict_path=file.path, notes=tuple(notes))


def _refuse_other_weights(file: WeightsFile) -> None:
    """Raise WeightsError, on every process, unless all of them have read the same."""
    different = distributed.disagreement(lambda: f"weights {_digest(file.tensors.items())[:8]}")
    if different:
        raise WeightsError(
            f"{KEY}.PARAMS_FILE={file.source!r}: the processes have read different weights: {different}. The file was "
            "written while they read it, or another one lies there on another machine. Start again with a file that stays "
            "as it is and is the same everywhere."
        )


def _divided(file: WeightsFile, options: WeightsInit) -> WeightsFile:
    """The file with its tensors taken apart where the preset says that they hold several of the model's."""
    preset = find_preset(options.PRESET)
    if preset is None or not preset.divisions:
        return file
    names = {key: preset.parts_of(key) for key in file.tensors}
    tensors = {
        name: part
        for key, value in file.tensors.items()
        for name, part in zip(names[key], value.chunk(len(names[key])) if len(names[key]) > 1 else [value])
    }
    count = sum(len(parts) > 1 for parts in names.values())
    notes = (f"{count} tensors were taken apart into {count + len(tensors) - len(names)}",) if count else ()
    return replace(file, tensors=tensors, notes=(*file.notes, *notes))


def saved_head_shapes(options: WeightsInit) -> dict[str, Shape]:
    """Shape of every tensor of the heads that PARAMS_FILE holds, under the model's names; empty where it holds none."""
    if not options.PARAMS_FILE:
        return {}
    unpickle = _unpickle if options.ALLOW_UNSAFE else None
    file = open_weights(options.PARAMS_FILE, key_name=state_dict_key(options), unpickle=unpickle)
    rules = rules_of(options, default_append=BLOCKS if file.library else "")
    if file.is_classy:
        rules = KeyRules(renames=rules.renames)
    named = {rules.apply(key): shape for key, shape in state_shapes(file.tensors).items()}
    return {name: shape for name, shape in named.items() if name.startswith(HEADS)}


def _original_names(
    rows: tuple[Row, ...], converted: dict[str, Tensor], original: dict[str, Tensor]
) -> tuple[Row, ...]:
    """The rows with the names of the file instead of the converted ones, where the tensor itself was not changed."""
    origin = {id(value): key for key, value in original.items()}
    renamed = []
    for row in rows:
        key = origin.get(id(converted[row.file_key]), f"{row.file_key} (converted)") if row.file_key else ""
        status = Status.REMAPPED if row.status is Status.LOADED and key != row.model_key else row.status
        renamed.append(replace(row, file_key=key, status=status))
    return tuple(renamed)


class _Loading:
    """One model and one set of options: plans for state dicts."""

    def __init__(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        options: WeightsInit,
        feature_eval: FeatureEval,
        rules: KeyRules,
    ) -> None:
        self.model, self.options, self.feature_eval = model, options, feature_eval
        self.shapes = state_shapes(state)
        self.skip = options.SKIP_LAYERS
        self.load_heads = not feature_eval.EVAL_MODE_ON or feature_eval.EVAL_TRUNK_AND_HEAD
        self.rules = rules
        self.grids = position_grids(model)
        self.backbones = backbones(model)
        self.copies = {
            key: BLOCKS + key.removeprefix(place)
            for place in self.backbones
            for key in self.shapes
            if key.startswith(place) and place != BLOCKS
        }

    def plan(self, file: Shapes, rules: KeyRules) -> LoadPlan:
        parameters = {name for name, _ in self.model.named_parameters()}
        return plan_loading(
            file,
            self.shapes,
            rules=rules,
            skip=self.skip,
            load_heads=self.load_heads,
            parameters=parameters,
            grids=self.grids,
            copies=self.copies,
        )

    def best(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], LoadPlan]:
        """The plan as it is; if that leaves gaps in a timm trunk, with timm's own conversion where this loads more."""
        plan = self.plan(state_shapes(tensors), self.rules)
        if plan.of(Status.MISMATCHED) or plan.trunk.loaded < plan.trunk.total:
            converted = self._converted(tensors)
            if converted:
                other = self.plan(state_shapes(converted), KeyRules())
                if other.trunk.loaded > plan.trunk.loaded:
                    return converted, other
        return tensors, plan

    def _converted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the model's names by way of timm's filter, which comes between REMOVE and APPEND_PREFIX."""
        trunk: Any = next(iter(self.backbones.values()), None)
        if trunk is None or trunk.adapter.library != "timm":
            return {}
        convert = getattr(sys.modules[type(trunk.backbone).__module__], "checkpoint_filter_fn", None)
        if convert is None:
            return {}
        stripped = {self.rules.strip(key)[0]: value for key, value in tensors.items()}
        try:
            names = dict(convert(stripped, trunk.backbone))
        except Exception as error:  # foreign names can make the library's filter fail in any way; the plain plan stands
            log.debug("timm's checkpoint filter does not take these names: %s", error)
            return {}
        complete = (TRUNK, HEADS)
        return {
            key if key.startswith(complete) else self.rules.append + key: value
            for key, value in names.items()
            if isinstance(value, Tensor)
        }


def backbones(model: nn.Module) -> dict[str, nn.Module]:
    """Beginning of the names below each trunk's backbone -> the trunk; a model of two stages has two."""
    trunks = {name: module for name, module in model.named_modules() if hasattr(module, "adapter")}
    return {f"{name}._feature_blocks.": module for name, module in trunks.items()}


def position_grids(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Height and width of the position tables in timm models, which may be made for images that are not square."""
    grids = {}
    for name, module in model.named_modules():
        grid = getattr(getattr(module, "patch_embed", None), "grid_size", None)
        if isinstance(getattr(module, "pos_embed", None), Tensor) and isinstance(grid, tuple) and len(grid) == 2:
            grids[f"{name}.pos_embed"] = (int(grid[0]), int(grid[1]))
    return grids


def _check(
    plan: LoadPlan, loading: _Loading, file: WeightsFile, *, options: WeightsInit, feature_eval: FeatureEval
) -> None:
    """Raise WeightsError unless the plan is good enough."""
    where = f"{KEY}.PARAMS_FILE={options.PARAMS_FILE!r}"
    wrong = plan.errors_in_shape(assert_heads=feature_eval.ASSERT_HEAD_LAYER_SHAPE_INIT)
    least = options.MIN_LOADED
    nothing = least > 0 and not plan.of(*FILLED)
    if nothing or plan.incompatible or plan.trunk.value < least:
        raise WeightsError("\n  ".join([f"{where}: {_shortfall(plan, least)}", *_cures(loading, file, wrong, least)]))
    if wrong:
        raise WeightsError(f"{where}: {_shape_problem(wrong)}")
    heads_wanted = feature_eval.EVAL_MODE_ON and feature_eval.EVAL_TRUNK_AND_HEAD
    if heads_wanted and plan.heads.value < least:
        missing = [row for row in plan.of(Status.MISSING) if row.model_key.startswith(HEADS)]
        raise WeightsError(
            f"{where}: {plan.heads} of the heads are in the file, fewer than {KEY}.MIN_LOADED={least}, although"
            f" {EXTRACTION_KEY}.EVAL_TRUNK_AND_HEAD asks for trained heads. Missing: {_some(missing)}."
        )


def _shortfall(plan: LoadPlan, least: float) -> str:
    if plan.trunk.total == 0:
        return "nothing in it fits, and the trunk has no parameters of its own to load."
    if plan.trunk.value < least:
        return f"loaded {plan.trunk} of the trunk, fewer than {KEY}.MIN_LOADED={least}."
    return "no name in it lies in trunk.* or heads.* after REMOVE_PREFIX and APPEND_PREFIX."


def _cures(loading: _Loading, file: WeightsFile, wrong: list[Row], least: float) -> list[str]:
    """What the user could change, the best first, and the names that he has to bring together."""
    shapes = state_shapes(file.tensors)
    best = suggest_rules(shapes, loading.shapes, rules=loading.rules)
    if BLOCKS not in loading.rules.append:
        other = _Loading(
            loading.model, loading.model.state_dict(), loading.options, loading.feature_eval, KeyRules(append=BLOCKS)
        )
        converted = other.best(file.tensors)[1].trunk
        if converted.value > (best.share if best else 0.0):  # only with timm's filter can this beat the prefixes tried
            best = Suggestion((f"{KEY}.APPEND_PREFIX={BLOCKS}",), converted.value)
    lines = [f"{best}."] if best else []
    if wrong:
        lines.append(_shape_problem(wrong))
    if best is None or best.share < least:
        lines.append(
            "No prefix makes the file fit: it may belong to another architecture, or need RENAME rules or a PRESET."
        )
    for what, names in (("file", shapes), ("model", loading.shapes)):
        lines.append(f"Names in the {what}: {', '.join(list(names)[:3]) or 'none'}{', ...' if len(names) > 3 else ''}")
    return lines


def _shape_problem(rows: list[Row]) -> str:
    cure = "The file is of another architecture or size"
    if all(row.model_key.startswith(HEADS) for row in rows):
        cure = (
            f"To start these heads anew set {EXTRACTION_KEY}.ASSERT_HEAD_LAYER_SHAPE_INIT=false, or add 'heads' to"
            f" {KEY}.SKIP_LAYERS"
        )
    return f"{len(rows)} tensors have another shape than in the model: {_some(rows)}. {cure}."


def _some(rows: list[Row]) -> str:
    return ", ".join(map(_described, rows[:4])) + (f", and {len(rows) - 4} more" if len(rows) > 4 else "")


def _warnings(plan: LoadPlan) -> list[str]:
    """What is not an error, but would change results."""
    missing = [row.model_key for row in plan.of(Status.MISSING) if not row.model_key.startswith(HEADS)]
    statistics = [key for key in missing if key.endswith(("running_mean", "running_var"))]
    notes = []
    if len(missing) > len(statistics):
        notes.append(f"{len(missing) - len(statistics)} tensors of the trunk are not in the file and stay random")
    if statistics:
        notes.append(
            f"{len(statistics)} running statistics of the trunk are not in the file: evaluation would use initial ones"
        )
    return notes


def _fitted(value: Tensor, row: Row, *, grid: tuple[int, int] | None) -> Tensor:
    """The file's tensor in the model's shape."""
    if row.status is not Status.RESAMPLED or row.model_shape is None or row.file_shape is None:
        return value
    prefix = prefix_tokens(row.model_key, row.file_shape, row.model_shape, grid=grid)
    assert prefix is not None  # the plan has just said so
    cells = row.model_shape[-2] - prefix
    side = round(cells**0.5)
    # torchvision and ConViT call the table pos_embedding and align the corners; everyone else does not.
    align = row.model_key.endswith("pos_embedding")
    return resample_positions(value, prefix=prefix, grid=grid or (side, side), align_corners=align)


def resample_positions(table: Tensor, *, prefix: int, grid: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Position table ((1,) prefix + n*n, C) -> ((1,) prefix + H*W, C): bicubic, the first `prefix` tokens kept."""
    tokens = table.reshape(-1, table.shape[-1])  # (prefix + n*n, C)
    kept, cells = tokens[:prefix], tokens[prefix:].float()
    side = round(len(cells) ** 0.5)
    maps = cells.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, n, n)
    maps = functional.interpolate(maps, size=grid, mode="bicubic", align_corners=align_corners)
    cells = maps.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(table.dtype)
    resampled = torch.cat([kept, cells])
    return resampled.reshape((1, *resampled.shape)) if table.ndim == 3 else resampled


def fingerprint(model: nn.Module) -> str:
    """Hash of all weights: names, shapes, types and values. Equal weights on any device have equal fingerprints."""
    return _digest(chain(model.named_parameters(), model.named_buffers()))


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
